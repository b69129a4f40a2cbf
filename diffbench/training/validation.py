"""Validation error: the squared error of the denoised image at fixed noise levels, on fixed images and noise.

One unit for every process and prediction, so that it compares between them and shows where a backbone is better.
"""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import nn

from diffbench.core import keyed
from diffbench.data.latents import LatentSet
from diffbench.data.sets import ImageSet
from diffbench.diffusion import Process, predictor
from diffbench.training import together
from diffbench.training.clock import at_step_end, due
from diffbench.training.ema import EMA
from diffbench.training.log import RunLog
from diffbench.training.module import DiffusionModule


@torch.no_grad()
def denoising_error(
    denoiser: nn.Module, process: Process, data: ImageSet | LatentSet, log_snr: Sequence[float], batch_size: int = 512
) -> dict[float, float]:
    """Mean squared error per number of the denoised picture or latent, as the data set gives it, at each log-SNR.

    The noise of image i is keyed by (level, i), not by any run's seed. The network sees the true labels. Of several
    ranks each takes a share of the images, and all get the result.
    """
    parameter = next(denoiser.parameters())
    training = denoiser.training
    denoiser.eval()
    predict, errors, mine = predictor(process, denoiser), {}, together.share(len(data))
    numbers = data.clean(torch.arange(1))[0].numel()
    for level in log_snr:
        total = torch.zeros((), dtype=torch.float64, device=parameter.device)
        for index in mine.split(batch_size) if len(mine) else ():
            x0 = data.clean(index).to(parameter)
            y = data.labels[index].to(parameter.device)
            t = process.time_at(torch.full((len(index),), level, dtype=torch.float64, device=parameter.device))
            noise_key = keyed.key("validation", str(float(level)))
            eps = keyed.normal(noise_key, index.to(parameter.device), tuple(x0.shape[1:])).to(parameter.dtype)
            x_t = process.add_noise(x0, t, eps)
            denoised = predict(x_t, t, y).x0
            total += (denoised - x0).double().square().sum()
        errors[level] = float(together.total(total)) / (len(data) * numbers)
    denoiser.train(training)
    return errors


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
