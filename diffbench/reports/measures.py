"""What is measured of a run for comparisons, beyond its own records: errors of single images."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file
from safetensors.torch import save

from diffbench.core.errors import UserError
from diffbench.core.files import atomic
from diffbench.evaluation.validation_error import image_errors
from diffbench.runs.build import device_of
from diffbench.runs.denoiser import DenoiserRun

VALIDATION = "validation.safetensors"


@dataclass(frozen=True)
class ImageErrors:
    """Validation errors of a run's averaged weights.

    Attributes:
        images: that the weights had seen.
        log_snr: (levels,).
        error: (levels, images) float32, mean squared error per number of each held-out image, at its fixed noise.
    """

    images: int
    log_snr: np.ndarray
    error: np.ndarray


def save_validation(run: DenoiserRun) -> Path:
    """Writes the validation error of every held-out image at every noise level; leaves a file of the same weights.

    Args:
        run: with averaged weights.

    Returns:
        `validation.safetensors` in the run folder: "error" (levels, images) float32 and "log_snr" (levels,) float64.

    Raises:
        UserError: if the run has no held-out images.
    """
    path, levels = run.folder / VALIDATION, run.config.validation.log_snr
    what = {"images": str(run.images_seen), "ema": str(run.ema), "snapshot": run.snapshot, "log_snr": str(levels)}
    if path.is_file() and _facts(path) == what:
        return path
    data = run.sets[1]
    if not len(data):
        raise UserError(f"{run.folder}: data.name={run.config.data.name} has no held-out images")
    network = run.network.to(device_of(run.config.trainer.accelerator))
    error = image_errors(network, run.process, data, levels).float()
    with atomic(path) as file:
        file.write(save({"error": error, "log_snr": torch.tensor(levels, dtype=torch.float64)}, what))
    return path


def read_validation(folder: Path) -> ImageErrors | None:
    """What `save_validation` wrote into a run folder, or None.

    Raises:
        UserError: if the file is damaged.
    """
    path = folder / VALIDATION
    if not path.is_file():
        return None
    images = int(_facts(path).get("images", -1))
    found = load_file(path)
    return ImageErrors(images, found["log_snr"], found["error"])


def _facts(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "np") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: damaged ({e}); remove it") from None
