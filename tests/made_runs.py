"""Run folders like those of real training and evaluation, made in milliseconds, for tests of reports and `compare`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffbench.config.load import load, to_yaml
from diffbench.core import tensors
from diffbench.core.store import Store
from diffbench.evaluation.validation_error import bound, bound_metrics
from diffbench.reports.results import Trial
from diffbench.runs.lifecycle import open_any

LEVELS = [-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0]
PROFILE = np.array([0.0012, 0.005, 0.018, 0.055, 0.15, 0.4, 0.75])
"""A trained network's squared error of eps at these log-SNRs."""
PARTS = {"val": 1.0, "train": 0.9}
"""Errors on held-out and on training images, as shares of the profile."""


def make_run(
    folder: Path,
    experiment: str = "dit",
    seed: int = 0,
    error: float = 0.1,
    overrides: Sequence[str] = (),
    tilt: float = 0.0,
    images: int = 98_304,
    rate: float = 2400.0,
    image_errors: bool = True,
) -> Path:
    """Make a trained run whose validation bound ends at `error`; `tilt` shifts the error between noise levels."""
    folder.mkdir(parents=True)
    config = load(f"experiments/digits/{experiment}.yaml", [f"seed={seed}", f"trainer.max_images={images}", *overrides])
    (folder / "config.yaml").write_text(to_yaml(config))
    noise = np.random.default_rng(seed)
    profile = PROFILE * np.exp(tilt * np.linspace(-1, 1, len(LEVELS)))
    profile *= error / bound(LEVELS, profile)
    lines: list[dict[str, Any]] = []
    for i in range(1, 13):
        seen = images * i // 12
        rest = 1 + 2.2 * np.exp(-4 * i / 12) - 2.2 * np.exp(-4)
        values = profile * rest
        speed = rate * float(noise.uniform(0.97, 1.03))
        lines.append({"images": seen, "train/loss": error * rest, "train/lr": 1e-3, "perf/images_per_s": speed})
        parts = [bound_metrics(part, dict(zip(LEVELS, share * values, strict=True))) for part, share in PARTS.items()]
        lines.append({"images": seen, **parts[0], **parts[1]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tensors.write(folder / f"ema-{config.ema.decays[0]}.safetensors", {"x": torch.zeros(1)}, {"images": str(images)})
    if image_errors:
        each = np.random.default_rng(7).gamma(4, 0.25, (len(LEVELS), 60))  # the same for all runs
        each = profile[:, None] * each / each.mean(1, keepdims=True)
        found = {
            "error": torch.from_numpy(each.astype(np.float32)),
            "log_snr": torch.tensor(LEVELS, dtype=torch.float64),
        }
        facts = {"images": str(images), "ema": str(config.ema.decays[0])}
        tensors.write(folder / "validation.safetensors", found, facts)
    return folder


def record(fd: float, seed: int = 0, images: int = 98_304, **changes: Any) -> dict[str, Any]:
    """Return an evaluation record; `changes` such as steps="10" or guidance=1.5 also change its sections."""
    sample = {"sampler": "ddpm", "steps": "50", "guidance": 1.0, "clip": True, "seed": seed, "seconds": 3.0}
    entry: dict[str, Any] = {
        "format": 1,
        "time": "2026-01-01T00:00:00+00:00",
        "extractor": {"name": "digits-cnn", "weights": "0123456789abcdef", "licence": "trained here"},
        "device": "cpu x86_64",
        "versions": {"diffbench": "0.1.0", "torch": "2.13.0"},
        "commit": "0" * 40,
        "images_seen": images,
        "snapshot": "last",
        "ema": 0.999,
        "guidance": 1.0,
        "sample": sample,
        "drawing": {"network_evaluations": 50, "drawn": 500, "clipped": 0.0},
        "labels": "evenly over the classes",
        "precision": "float32",
        "data": "f1e2d3c4b5a6",
        "data_name": "digits",
        "reference": {"key": "abc", "split": "train", "count": 500},
        "floor": {
            "count": 500,
            "images": "train: 500 outside the first 500",
            "fd": 0.181,
            "kid": 0.0004,
            "recall": 0.93,
            "coverage": 0.95,
        },
        "authenticity_held_out": 0.56,
        "memorisation": {"flagged": 5, "count": 500, "threshold": 0.6, "false_alarms": 2, "real": 360},
        "fd/digits-cnn@500": fd,
        "kid/digits-cnn@500": fd / 40,
        "label_accuracy/digits-cnn@500": 1 - fd / 30,
        "precision/digits-cnn@500": 0.96 - fd / 20,
        "recall/digits-cnn@500": 0.95 - fd / 25,
        "coverage/digits-cnn@500": 0.99 - fd / 60,
        "copies@500": 0.0045,
        "authenticity@500": 0.5 + fd / 20,
    }
    for key, value in changes.items():
        if key in ("steps", "sampler", "guidance"):
            sample[key] = value
        if key == "steps":
            entry["drawing"]["network_evaluations"] = int(value)
        if key not in ("steps", "sampler"):
            entry[key] = value
    return entry


def save_record(folder: Path, entry: dict[str, Any]) -> None:
    """Append a record to a run's results."""
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")


def save_samples(folder: Path, entry: dict[str, Any], images: torch.Tensor) -> None:
    """Store samples (N, C, H, W) uint8 in a run folder and note the place in a record."""
    place = folder / "evaluations" / "made"
    with Store(place).fill({}, {"images": ("|u1", tuple(images.shape[1:]))}, len(images)) as filling:
        for chunk in filling.missing:
            filling.add(chunk, {"images": images[chunk.first : chunk.last].numpy()})
        filling.finish()
    entry["drawing"]["folder"] = "evaluations/made"


def backbones(runs: Path, seeds: int = 5, errors: dict[str, float] | None = None) -> list[Trial]:
    """Make runs of three backbones by seeds; by default diffit is far the best, and dit and unet are close together."""
    found = []
    means = errors or {"unet": 0.1088, "dit": 0.1079, "diffit": 0.1012}
    for place, (name, mean) in enumerate(means.items()):
        for seed in range(seeds):
            shared, own = (np.random.default_rng([seed, n]).normal() for n in (99, place))
            error = mean * (1 + 0.008 * shared + 0.007 * own)
            tilt = {"unet": 0.07, "dit": -0.05, "diffit": 0.0}.get(name, 0.0)
            folder = make_run(runs / f"{name}-s{seed}", name, seed, error, tilt=tilt, rate=2400 - 150 * place)
            entry = record(max(0.2, 0.5 + 20 * (error - 0.1)), seed)
            save_record(folder, entry)
            found.append(Trial(name, seed, "complete", open_any(folder), entry))
    return found
