"""Scores of a run's samples against real images, as records appended to results.jsonl."""

import dataclasses
import json
import platform
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffbench import __version__
from diffbench.config import change
from diffbench.config_kinds import RunConfig
from diffbench.config_layers import COMMAND_LINE, parse_overrides
from diffbench.core.errors import UserError, suggest
from diffbench.data.sources import ImageSet, balanced
from diffbench.evaluation.digits_cnn import DigitsCNN
from diffbench.evaluation.metrics import coverage, frechet_distance, nearest_distance
from diffbench.judge import judge_name, load_digits_cnn, reduced
from diffbench.parts import check_evaluation
from diffbench.run import Run
from diffbench.trained import Trained
from diffbench.training.coding import reconstruct
from diffbench.training.settings import SampleConfig


def evaluate(run: Run, overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Draws `evaluate.count` samples without and, where the network can, with the config's guidance; scores both.

    Args:
        run: a loaded run.
        overrides: key=value for the sections `sample` and `evaluate`, `seed`, and `ema` (the decay of the average).

    Returns:
        One record a guidance weight, already appended to the run's results.jsonl.
    """
    changes = parse_overrides(overrides)
    for key in changes:
        if key not in ("sample", "evaluate", "seed", "ema"):
            near = suggest(key, ["sample", "evaluate", "seed", "ema"])
            raise UserError(
                f"{COMMAND_LINE}: {key}: not for evaluate; allowed: sample.KEY, evaluate.KEY, seed, ema{near}"
            )
    decay = changes.pop("ema", run.ema)
    config = change(run.config, changes)
    if decay != run.ema:
        run.use_average(decay)
    try:
        check_evaluation(config, run.train_set)
    except ValueError as e:
        raise UserError(f"{COMMAND_LINE if overrides else run.folder}: {e}") from None
    judge = load_digits_cnn(run.train_set)
    settings = [config.sample.unguided()]
    if config.sample.guided:
        settings.append(config.sample)
    floor = _floor(run, config.evaluate.count, judge)
    records = []
    for how in settings:
        records.append(_score(run, config, judge, how) | floor)
        append(run.folder, records[-1])
    return records


def append(folder: Path, record: dict[str, Any]) -> None:
    """Adds a record to the run folder's results.jsonl."""
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def header(run: Trained[Any], data: ImageSet) -> dict[str, Any]:
    """What a record says of when, what and with which versions."""
    return {
        "format": 1,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "images_seen": run.images_seen,
        "ema": run.ema,
        "data": data.fingerprint(),
        "versions": {
            "diffbench": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _floor(run: Run, count: int, judge: DigitsCNN) -> dict[str, Any]:
    """The distance of the real images, once through the autoencoder, from themselves: what no denoiser can undercut."""
    if run.autoencoder is None:
        return {}
    real = run.train_set.images[balanced(run.train_set.labels, count)]
    restored, _ = reconstruct(run.autoencoder, real)
    distance = frechet_distance(judge.features(reduced(restored)), judge.features(reduced(real)))
    return {"autoencoder": run.autoencoder.fingerprint, f"reconstruction_fd/{judge_name(real)}@{count}": distance}


def _score(run: Run, config: RunConfig, judge: DigitsCNN, how: SampleConfig) -> dict[str, Any]:
    count = config.evaluate.count
    labels = torch.arange(count) * run.train_set.num_classes // count
    started = time.perf_counter()
    samples = run.generate(labels, how, config.seed)
    seconds = time.perf_counter() - started
    return {
        **header(run, run.train_set),
        "guidance": how.guidance,
        "sample": dataclasses.asdict(how) | {"seed": config.seed, "seconds": seconds},
        **scores(samples, labels, run.train_set, run.held_out, judge),
    }


def scores(
    samples: Tensor, labels: Tensor, train_set: ImageSet, held_out: ImageSet, judge: DigitsCNN
) -> dict[str, float]:
    """Metrics of samples (N, C, H, W) uint8 with labels (N,); names say extractor and count.

    Fréchet distance and coverage (k=5) compare with N real training images, spread evenly over the classes; the
    distance to the nearest training image stands beside the same for held-out images, so that copies show.
    """
    n, name = len(samples), judge_name(samples)
    real = train_set.images[balanced(train_set.labels, n)]
    features, reference = judge.features(reduced(samples)), judge.features(reduced(real))
    return {
        f"fd/{name}@{n}": frechet_distance(features, reference),
        f"label_accuracy/{name}@{n}": float((judge(reduced(samples)).argmax(1) == labels).double().mean()),
        f"coverage/{name}@{n}": coverage(features, reference, k=5),
        f"nearest_train@{n}": float(nearest_distance(samples, train_set.images).mean()),
        "nearest_train_held_out": float(nearest_distance(held_out.images, train_set.images).mean()),
    }


def results(folder: Path) -> list[dict[str, Any]]:
    """The records of a run folder, oldest first."""
    return _records(folder / "results.jsonl")


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return _records(folder / "metrics.jsonl")


def _records(path: Path) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            raise UserError(f"{path}: line {number} is no JSON; remove that line") from None
    return records
