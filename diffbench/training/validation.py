"""Validation error: the squared error of the denoised image at fixed noise levels, on fixed images and noise.

One unit for every process and prediction, so that it compares between them and shows where a backbone is better.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from diffbench.core import collectives as together
from diffbench.core import rng
from diffbench.data.latents import LatentSet
from diffbench.data.sets import ImageSet
from diffbench.diffusion import Process, predictor
from diffbench.training.clock import at_step_end, due
from diffbench.training.ema import EMA
from diffbench.training.logger import RunLog
from diffbench.training.module import DiffusionModule


def denoising_error(
    denoiser: nn.Module, process: Process, data: ImageSet | LatentSet, log_snr: Sequence[float], batch_size: int = 512
) -> dict[float, float]:
    """Mean squared error per number of the denoised picture or latent, as the data set gives it, at each log-SNR.

    The noise of image i is keyed by (level, i), not by any run's seed. The network sees the true labels. Of several
    ranks each takes a share of the images, and all get the result.
    """
    errors, mine = {}, together.share(len(data)).split(batch_size)
    for level in log_snr:
        sums = torch.zeros(2, dtype=torch.float64, device=next(denoiser.parameters()).device)
        for squares in _squares(denoiser, process, data, level, mine):
            sums += torch.stack([squares.sum(), squares.new_tensor(squares.numel())])
        total, numbers = together.total(sums).tolist()
        errors[level] = total / numbers if numbers else float("nan")
    return errors


def image_errors(
    denoiser: nn.Module, process: Process, data: ImageSet | LatentSet, log_snr: Sequence[float], batch_size: int = 512
) -> Tensor:
    """The same for each image alone: (levels, N) float64 on the CPU, whose means over images are `denoising_error`.

    Two denoisers' errors are paired: image i has the same noise at a level for all.
    """
    every = torch.arange(len(data)).split(batch_size)
    rows = [
        torch.cat([s.flatten(1).mean(1).cpu() for s in _squares(denoiser, process, data, level, every)])
        for level in log_snr
    ]
    return torch.stack(rows)


@torch.no_grad()
def _squares(
    denoiser: nn.Module, process: Process, data: ImageSet | LatentSet, level: float, batches: Sequence[Tensor]
) -> Iterator[Tensor]:
    """Squared errors at one noise level of batches of images (B,): (B, ...) float64 on the denoiser's device."""
    parameter = next(denoiser.parameters())
    predict = predictor(process, denoiser)
    noise_key = rng.key("validation", str(float(level)))
    training = denoiser.training
    denoiser.eval()
    try:
        for index in batches:
            if not len(index):
                continue
            x0 = data.clean(index).to(parameter)
            y = data.labels[index].to(parameter.device)
            t = process.time_at(torch.full((len(index),), level, dtype=torch.float64, device=parameter.device))
            eps = rng.normal(noise_key, index.to(parameter.device), tuple(x0.shape[1:])).to(parameter.dtype)
            x_t = process.add_noise(x0, t, eps)
            denoised = predict(x_t, t, y).x0
            yield (denoised - x0).double().square()
    finally:
        denoiser.train(training)


def as_metrics(errors: dict[float, float]) -> dict[str, float]:
    """{"val/error": mean over the levels, "val/error_log_snr_-2": ..., ...}."""
    mean = sum(errors.values()) / len(errors)
    return {"val/error": mean, **{f"val/error_log_snr_{level:g}": e for level, e in errors.items()}}


class Validation(L.Callback):
    """Records the validation error of the averaged weights every `every` images and at the end."""

    def __init__(
        self, run_log: RunLog, ema: EMA, data: ImageSet | LatentSet, log_snr: Sequence[float], every: int
    ) -> None:
        self.run_log, self.ema, self.data, self.log_snr, self.every = run_log, ema, data, log_snr, every

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not at_step_end(trainer, batch_idx):
            return
        step, last = trainer.global_step, trainer.global_step == trainer.max_steps
        if not (last or due(step, self.run_log.batch_size, self.every)):
            return
        assert isinstance(pl_module, DiffusionModule)
        with self.run_log.clock.paused(), self.ema.applied():
            errors = denoising_error(pl_module.denoiser, pl_module.process, self.data, self.log_snr)
        self.run_log.record(as_metrics(errors))
