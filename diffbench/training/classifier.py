"""The LightningModule that trains a noise-aware classifier for classifier guidance."""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from diffbench.core import rng
from diffbench.diffusion import Process
from diffbench.training.module import OptimizerLike, TrainingModule


class ClassifierModule(TrainingModule):
    """LightningModule that trains `classifier`, (x, t) -> logits, on noisy images (Dhariwal & Nichol 2021, §4.1)."""

    def __init__(
        self, classifier: nn.Module, process: Process, optimizer: OptimizerLike | None = None, seed: int = 0
    ) -> None:
        super().__init__(classifier, optimizer, seed=seed)
        self.process = process
        self._keys = {what: rng.key(seed, what) for what in ("noise", "time")}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = self.take(batch)
        x0, position = batch["x0"], batch["position"]
        t = self.process.time(rng.uniform(self._keys["time"], position))
        eps = rng.normal(self._keys["noise"], position, tuple(x0.shape[1:])).to(x0.dtype)
        self.seed_dropout(batch)
        batch["time"] = t
        x, time = self.process.inputs(self.process.add_noise(x0, t, eps), t)
        return cross_entropy(self.network(x, time), batch["label"])
