"""Per-image errors on the held-out images, stored in the run folder for comparisons by image."""

from pathlib import Path

import numpy as np
import torch

from diffbench.core import tensors
from diffbench.core.errors import UserError
from diffbench.evaluation.validation_error import bound, image_errors
from diffbench.runs.build import device_of
from diffbench.runs.denoiser import DenoiserRun

IMAGE_ERRORS = "validation.safetensors"
"""File in a run folder with the error of every held-out image at every noise level."""


def save_image_errors(run: DenoiserRun) -> Path:
    """Write the errors of every held-out image at every noise level, unless they are stored for these weights.

    Args:
        run: a run with averaged weights.

    Returns:
        `validation.safetensors` in the run folder: "error" (levels, images) float32 and "log_snr" (levels,) float64.

    Raises:
        UserError: if the run has no held-out images.
    """
    path, levels = run.folder / IMAGE_ERRORS, run.config.validation.log_snr
    metadata = {"images": str(run.images_seen), "ema": str(run.ema), "snapshot": run.snapshot, "log_snr": str(levels)}
    if path.is_file() and tensors.read(path)[1] == metadata:
        return path
    data = run.sets[1]
    if not len(data):
        raise UserError(f"{run.folder}: data.name={run.config.data.name} has no held-out images")
    network = run.network.to(device_of(run.config.trainer.accelerator))
    error = image_errors(network, run.process, data, levels).float()
    tensors.write(path, {"error": error, "log_snr": torch.tensor(levels, dtype=torch.float64)}, metadata)
    return path


def image_bounds(folder: Path, images: int, ema: float) -> np.ndarray | None:
    """Return the bounds (images,) of held-out images in nats per dimension; None if not stored for these weights.

    Args:
        images: number of training images that the weights have seen.
        ema: EMA decay of the weights.

    Raises:
        UserError: if the file is damaged.
    """
    path = folder / IMAGE_ERRORS
    found, metadata = tensors.read(path) if path.is_file() else ({}, {})
    if (metadata.get("images"), metadata.get("ema")) != (str(images), str(ema)):
        return None
    return np.asarray(bound(found["log_snr"].numpy(), found["error"].double().numpy()))
