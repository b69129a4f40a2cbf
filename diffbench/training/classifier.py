"""Training of the noise-aware classifier that guides samples."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from diffbench.config.sections import OptimizerConfig
from diffbench.core import collectives as together
from diffbench.core import rng
from diffbench.core.pixels import from_uint8
from diffbench.data.registry import ImageSet
from diffbench.diffusion import Process
from diffbench.training.clock import at_step_end, due
from diffbench.training.ema import EMA
from diffbench.training.logger import RunLog
from diffbench.training.module import Module


class ClassifierModule(Module):
    """Trains `classifier` (x, t) -> logits on noisy images of the process (Dhariwal & Nichol 2021, §4.1)."""

    def __init__(
        self, classifier: nn.Module, process: Process, optimizer: OptimizerConfig, seed: int, batch_size: int
    ) -> None:
        super().__init__(classifier, optimizer, seed, batch_size)
        self.process = process
        self._keys = {what: rng.key(seed, what) for what in ("noise", "time")}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The batch's mean cross entropy."""
        x0, position = batch["x0"], batch["position"]
        t = self.process.time(rng.uniform(self._keys["time"], position))
        eps = rng.normal(self._keys["noise"], position, tuple(x0.shape[1:])).to(x0.dtype)
        self.seed_dropout(batch)
        self.times = t
        x, time = self.process.inputs(self.process.add_noise(x0, t, eps), t)
        return cross_entropy(self.network(x, time), batch["label"])


@torch.no_grad()
def accuracy(
    classifier: nn.Module, process: Process, data: ImageSet, log_snr: Sequence[float], batch_size: int = 512
) -> dict[float, float]:
    """Share of held-out images that are read right, at each log(alpha^2 / sigma^2); noise keyed by (level, image).

    Of several ranks each takes a share of the images, and all get the result.
    """
    parameter = next(classifier.parameters())
    training = classifier.training
    classifier.eval()
    shares, mine = {}, together.share(len(data))
    for level in log_snr:
        right = torch.zeros((), dtype=torch.int64)
        for index in mine.split(batch_size) if len(mine) else ():
            x0 = from_uint8(data.images[index].to(parameter.device)).to(parameter.dtype)
            t = process.time_at(torch.full((len(index),), level, dtype=torch.float64, device=parameter.device))
            noise_key = rng.key("validation", str(float(level)))
            eps = rng.normal(noise_key, index.to(parameter.device), tuple(x0.shape[1:])).to(parameter.dtype)
            x, time = process.inputs(process.add_noise(x0, t, eps), t)
            right += (classifier(x, time).argmax(-1).cpu() == data.labels[index]).sum()
        shares[level] = int(together.total(right)) / len(data)
    classifier.train(training)
    return shares


class Accuracy(L.Callback):
    """Records the held-out accuracy of the averaged weights every `every` images and at the end."""

    def __init__(self, run_log: RunLog, ema: EMA, data: ImageSet, log_snr: Sequence[float], every: int) -> None:
        self.run_log, self.ema, self.data, self.log_snr, self.every = run_log, ema, data, log_snr, every

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not at_step_end(trainer, batch_idx):
            return
        last = trainer.global_step == trainer.max_steps
        if not (last or due(trainer.global_step, self.run_log.batch_size, self.every)):
            return
        assert isinstance(pl_module, ClassifierModule)
        with self.run_log.clock.paused(), self.ema.applied():
            shares = accuracy(pl_module.network, pl_module.process, self.data, self.log_snr)
        mean = sum(shares.values()) / len(shares)
        self.run_log.record(
            {"val/accuracy": mean, **{f"val/accuracy_log_snr_{level:g}": s for level, s in shares.items()}}
        )
