"""Errors on fixed images at fixed noise levels and fixed noise: a denoiser's squared error, a classifier's accuracy.

The squared error of the noise eps, which is SNR times that of the denoised image, weights every log-SNR as the
variational bound does, whatever the schedule: half its integral over log-SNR is the bound's diffusion loss (Kingma et
al. 2021; Kingma & Gao 2023, Eq. 2). A single number in nats per dimension is therefore comparable across processes and
prediction types, and the error at each level shows at which noise a denoiser is better.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffbench.core import distributed, rng
from diffbench.core.tensors import eval_mode
from diffbench.data.latents import LatentSet
from diffbench.data.sets import ImageSet
from diffbench.diffusion import LabelledPredict, Process, predictor

Data = ImageSet | LatentSet
BATCH = 512


def denoising_error(denoiser: nn.Module, process: Process, data: Data, log_snr: Sequence[float]) -> dict[float, float]:
    """Compute the mean squared error of eps, per element of an image or latent, at each log-SNR.

    The noise of image i is keyed by (level, i), not by any run's seed. The network sees the true labels. Each rank
    processes a slice of the images, and all ranks get the result.
    """
    return level_means(log_snr, error_sums(denoiser, process, data, log_snr))


def error_sums(
    denoiser: nn.Module,
    process: Process,
    data: Data,
    log_snr: Sequence[float],
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return the sum of squared errors and the number of elements over this rank's slice: (levels, 2) float64.

    `check` is called before each batch and may raise to stop.
    """
    mine = distributed.rank_slice(len(data)).split(BATCH)
    sums = torch.zeros(len(log_snr), 2, dtype=torch.float64, device=next(denoiser.parameters()).device)
    for row, level in zip(sums, log_snr, strict=True):
        for squares in _squares(denoiser, process, data, level, mine):
            check()
            row += torch.stack([squares.sum(), squares.new_tensor(squares.numel())])
    return sums


def level_means(log_snr: Sequence[float], sums: Tensor) -> dict[float, float]:
    """Reduce `error_sums` or `accuracy_sums` over ranks to level -> mean error or accuracy; every rank must call it."""
    totals = zip(log_snr, distributed.all_reduce_sum(sums).tolist(), strict=True)
    return {level: total / count if count else float("nan") for level, (total, count) in totals}


def image_errors(denoiser: nn.Module, process: Process, data: Data, log_snr: Sequence[float]) -> Tensor:
    """Compute the errors of single images, (levels, N) float64 on the CPU, whose means are `denoising_error`.

    Errors of two denoisers are paired: at each level, image i has the same noise for both.
    """
    batches = torch.arange(len(data)).split(BATCH)
    rows = [
        torch.cat([s.flatten(1).mean(1).cpu() for s in _squares(denoiser, process, data, level, batches)])
        for level in log_snr
    ]
    return torch.stack(rows)


@torch.no_grad()
def _squares(
    denoiser: nn.Module, process: Process, data: Data, level: float, batches: Sequence[Tensor]
) -> Iterator[Tensor]:
    """Yield the squared errors of eps at one level for each batch: (B, ...) float64 on the denoiser's device."""
    parameter = next(denoiser.parameters())
    predict = predictor(process, denoiser)
    with eval_mode(denoiser):
        for index in batches:
            if len(index):
                x0 = data.clean(index).to(parameter)
                y = data.labels[index].to(parameter.device)
                yield _square(predict, process, x0, y, index, level)


@torch.no_grad()
def batch_errors(
    denoiser: nn.Module, process: Process, x0: Tensor, y: Tensor | None, index: Tensor, log_snr: Sequence[float]
) -> Tensor:
    """Return (levels, B) float64 errors of images x0 (B, C, H, W) with labels y (B,), numbered `index` (B,)."""
    x0, predict = x0.to(next(denoiser.parameters()).dtype), predictor(process, denoiser)
    errors = [_square(predict, process, x0, y, index, level).flatten(1).mean(1) for level in log_snr]
    return torch.stack(errors)


def _square(
    predict: LabelledPredict, process: Process, x0: Tensor, y: Tensor | None, index: Tensor, level: float
) -> Tensor:
    x_t, t = _noised(process, x0, index, level)
    denoised = predict(x_t, t, y).x0  # type: ignore[arg-type]
    return math.exp(level) * (denoised - x0).double().square()


@torch.no_grad()
def accuracy_sums(
    classifier: nn.Module,
    process: Process,
    data: ImageSet,
    log_snr: Sequence[float],
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """Count a classifier's correct images in this rank's slice, and all of them: (levels, 2) float64.

    The classifier maps (x, t) to logits. Noise and `check` are as in `denoising_error` and `error_sums`.
    """
    parameter = next(classifier.parameters())
    sums, mine = torch.zeros(len(log_snr), 2, dtype=torch.float64), distributed.rank_slice(len(data))
    with eval_mode(classifier):
        for row, level in zip(sums, log_snr, strict=True):
            for index in mine.split(BATCH) if len(mine) else ():
                check()
                x_t, t = _noised(process, data.clean(index).to(parameter), index, level)
                x, time = process.inputs(x_t, t)
                right = classifier(x, time).argmax(-1).cpu() == data.labels[index]
                row += torch.tensor([int(right.sum()), len(right)])
    return sums


def _noised(process: Process, x0: Tensor, index: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Return the images numbered `index` (B,) with their noise at a log-SNR, and the times (B,) of that level."""
    t = process.time_at(torch.full((len(index),), level, dtype=torch.float64, device=x0.device))
    eps = rng.normal(rng.key("validation", str(float(level))), index.to(x0.device), tuple(x0.shape[1:])).to(x0.dtype)
    return process.add_noise(x0, t, eps), t


def bound(log_snr: Sequence[float] | np.ndarray, errors: Sequence[float] | np.ndarray) -> Any:
    """Compute the variational bound's diffusion loss over the given levels: half the integral of the error of eps.

    Args:
        log_snr: (levels,), increasing; the trapezoidal integral runs from the first to the last.
        errors: (levels, ...) squared errors of eps per element.

    Returns:
        (...) nats per element.
    """
    errors = np.asarray(errors)
    return 0.25 * np.tensordot(np.diff(log_snr), errors[1:] + errors[:-1], axes=1)


def validation_sets(held_out: Data, train: Data | None = None) -> dict[str, Data]:
    """Return the validation sets: "val", held-out images, and "train", as many training images to show overfitting."""
    return {"val": held_out} | ({} if train is None else {"train": train.balanced_subset(len(held_out))})


def bound_metrics(part: str, errors: Mapping[float, float]) -> dict[str, float]:
    """Return {"<part>/bound": nats per dimension, "<part>/level/-2": squared error of eps at log-SNR -2, ...}."""
    each = {f"{part}/level/{level:g}": error for level, error in errors.items()}
    return {f"{part}/bound": float(bound(list(errors), list(errors.values()))), **each}


def accuracy_metrics(values: Mapping[float, float]) -> dict[str, float]:
    """Return {"val/accuracy": mean over the levels, "val/accuracy_log_snr_-2": ..., ...}."""
    mean = sum(values.values()) / len(values)
    return {"val/accuracy": mean, **{f"val/accuracy_log_snr_{level:g}": v for level, v in values.items()}}
