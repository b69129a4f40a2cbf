"""Scores of a run's samples against real images, as records appended to results.jsonl."""

import dataclasses
import hashlib
import inspect
import json
import os
import platform
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from diffbench import __version__
from diffbench.config import change
from diffbench.config_kinds import RunConfig
from diffbench.config_layers import COMMAND_LINE, parse_overrides
from diffbench.core.errors import UserError, suggest
from diffbench.core.files import atomic
from diffbench.data.sources import ImageSet, balanced
from diffbench.evaluation import digits_cnn
from diffbench.evaluation.digits_cnn import DigitsCNN, train_digits_cnn
from diffbench.evaluation.metrics import coverage, frechet_distance, nearest_distance
from diffbench.parts import check_evaluation
from diffbench.run import Run
from diffbench.training.settings import SampleConfig


def cache_folder() -> Path:
    """Where small networks trained on first use are kept: $DIFFBENCH_CACHE, or ~/.cache/diffbench."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DIFFBENCH_CACHE") or Path(home) / "diffbench")


def load_digits_cnn(train_set: ImageSet) -> DigitsCNN:
    """digits-cnn for a training set: from the cache, or trained in seconds and cached under a key of data and code.

    Raises:
        UserError: if the images are not (1, 8, 8) digits.
    """
    if tuple(train_set.images.shape[1:]) != (1, 8, 8) or train_set.num_classes != 10:
        shape = tuple(train_set.images.shape[1:])
        raise UserError(f"evaluate.extractor: digits-cnn scores 8x8 grey digits in ten classes, not {shape}")
    code = hashlib.sha256(inspect.getsource(digits_cnn).encode()).hexdigest()[:8]
    path = cache_folder() / f"digits-cnn-{train_set.fingerprint()}-{code}.safetensors"
    if not path.exists():
        print(f"training digits-cnn, the judge of the samples, once (kept in {path})", flush=True)
        net = train_digits_cnn(train_set.images, train_set.labels)
        with atomic(path) as file:
            file.write(save(net.state_dict()))
    net = DigitsCNN()
    net.load_state_dict(load_file(path))
    return net.eval().requires_grad_(False)


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
    records = []
    for how in settings:
        records.append(_score(run, config, judge, how))
        with (run.folder / "results.jsonl").open("a") as file:
            file.write(json.dumps(records[-1]) + "\n")
    return records


def _score(run: Run, config: RunConfig, judge: DigitsCNN, how: SampleConfig) -> dict[str, Any]:
    count, name = config.evaluate.count, config.evaluate.extractor
    labels = torch.arange(count) * run.train_set.num_classes // count
    started = time.perf_counter()
    samples = run.generate(labels, how, config.seed)
    seconds = time.perf_counter() - started
    return {
        "format": 1,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "images_seen": run.images_seen,
        "guidance": how.guidance,
        "sample": dataclasses.asdict(how) | {"seed": config.seed, "seconds": seconds},
        "ema": run.ema,
        "data": run.train_set.fingerprint(),
        "versions": {
            "diffbench": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        **scores(samples, labels, run.train_set, run.held_out, judge, name),
    }


def scores(
    samples: Tensor, labels: Tensor, train_set: ImageSet, held_out: ImageSet, judge: DigitsCNN, name: str
) -> dict[str, float]:
    """Metrics of samples (N, C, H, W) uint8 with labels (N,); names say extractor and count.

    Fréchet distance and coverage (k=5) compare with N real training images, spread evenly over the classes; the
    distance to the nearest training image stands beside the same for held-out images, so that copies show.
    """
    n = len(samples)
    real = train_set.images[balanced(train_set.labels, n)]
    features, reference = judge.features(samples), judge.features(real)
    return {
        f"fd/{name}@{n}": frechet_distance(features, reference),
        f"label_accuracy/{name}@{n}": float((judge(samples).argmax(1) == labels).double().mean()),
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
