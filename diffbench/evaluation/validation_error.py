"""Errors on fixed images at fixed noise levels and fixed noise: a denoiser's squared error, a classifier's accuracy.

The squared error of the noise eps, which is SNR times that of the denoised image, weighs every log-SNR as the
variational bound does, whatever the schedule: half its integral over log-SNR is the bound's diffusion loss (Kingma et
al. 2021; Kingma & Gao 2023, Eq. 2). So one number in nats per dimension compares every process and prediction, and the
curve below it shows at which noise level a denoiser is better.
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
    """Mean squared error of eps, per number of an image or latent, at each log-SNR.

    The noise of image i is keyed by (level, i), not by any run's seed. The network sees the true labels. Of several
    ranks each takes a slice of the images, and all get the result.
    """
    return level_means(log_snr, error_sums(denoiser, process, data, log_snr))


def error_sums(
    denoiser: nn.Module,
    process: Process,
    data: Data,
    log_snr: Sequence[float],
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """Sums of squared errors, and how many numbers they are of, over this rank's slice: (levels, 2) float64.

    `check` is called before each batch, and may raise to stop.
    """
    mine = distributed.rank_slice(len(data)).split(BATCH)
    sums = torch.zeros(len(log_snr), 2, dtype=torch.float64, device=next(denoiser.parameters()).device)
    for row, level in zip(sums, log_snr, strict=True):
        for squares in _squares(denoiser, process, data, level, mine):
            check()
            row += torch.stack([squares.sum(), squares.new_tensor(squares.numel())])
    return sums


def level_means(log_snr: Sequence[float], sums: Tensor) -> dict[float, float]:
    """Level -> mean squared error or accuracy, from all ranks' `error_sums` or `classified`; each must call it."""
    found = zip(log_snr, distributed.all_reduce_sum(sums).tolist(), strict=True)
    return {level: total / numbers if numbers else float("nan") for level, (total, numbers) in found}


def image_errors(denoiser: nn.Module, process: Process, data: Data, log_snr: Sequence[float]) -> Tensor:
    """The same for each image alone: (levels, N) float64 on the CPU, whose means over images are `denoising_error`.

    Two denoisers' errors are paired: image i has the same noise at a level for all.
    """
    every = torch.arange(len(data)).split(BATCH)
    rows = [
        torch.cat([s.flatten(1).mean(1).cpu() for s in _squares(denoiser, process, data, level, every)])
        for level in log_snr
    ]
    return torch.stack(rows)


@torch.no_grad()
def _squares(
    denoiser: nn.Module, process: Process, data: Data, level: float, batches: Sequence[Tensor]
) -> Iterator[Tensor]:
    """Squared errors of eps at one noise level of batches of images (B,): (B, ...) float64 on the denoiser's device."""
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
    """The errors of a batch x0 (B, C, H, W) with labels y (B,), of images number `index` (B,): (levels, B) float64."""
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
def classified(
    classifier: nn.Module,
    process: Process,
    data: ImageSet,
    log_snr: Sequence[float],
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """Images of this rank's slice that a classifier (x, t) -> logits gets right, and all: (levels, 2) float64.

    The noise is keyed by (level, image), as in `denoising_error`; `check` is called before each batch.
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
    """Images number `index` (B,) with their noise of a log-SNR, and the time (B,) of that."""
    t = process.time_at(torch.full((len(index),), level, dtype=torch.float64, device=x0.device))
    eps = rng.normal(rng.key("validation", str(float(level))), index.to(x0.device), tuple(x0.shape[1:])).to(x0.dtype)
    return process.add_noise(x0, t, eps), t


def bound(log_snr: Sequence[float] | np.ndarray, errors: Sequence[float] | np.ndarray) -> Any:
    """The variational bound's diffusion loss over the covered levels: half the integral of the error of eps.

    Args:
        log_snr: (levels,), rising; the integral ends at the first and the last, and joins them by straight lines.
        errors: (levels, ...) squared errors of eps per number.

    Returns:
        (...) nats per number.
    """
    each = np.asarray(errors)
    return 0.25 * np.tensordot(np.diff(log_snr), each[1:] + each[:-1], axes=1)


def validation_sets(held_out: Data, train: Data | None = None) -> dict[str, Data]:
    """The sets of validation: "val", the held-out images, and "train", as many training images, to see overfitting."""
    return {"val": held_out} | ({} if train is None else {"train": train.evenly(len(held_out))})


def bound_metrics(part: str, errors: Mapping[float, float]) -> dict[str, float]:
    """{"<part>/bound": nats per dimension, "<part>/level/-2": squared error of eps at log-SNR -2, ...}."""
    each = {f"{part}/level/{level:g}": error for level, error in errors.items()}
    return {f"{part}/bound": float(bound(list(errors), list(errors.values()))), **each}


def accuracy_metrics(values: Mapping[float, float]) -> dict[str, float]:
    """{"val/accuracy": mean over the levels, "val/accuracy_log_snr_-2": ..., ...}."""
    mean = sum(values.values()) / len(values)
    return {"val/accuracy": mean, **{f"val/accuracy_log_snr_{level:g}": v for level, v in values.items()}}
