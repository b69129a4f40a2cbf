"""Scores of samples against real images: a run's own, or anyone's pictures, by the same code."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffbench.config.kinds import RunConfig
from diffbench.config.layers import COMMAND_LINE, parse_overrides
from diffbench.config.load import change
from diffbench.config.sample_sections import SampleConfig
from diffbench.core import ranks
from diffbench.core.errors import UserError, suggest
from diffbench.core.launcher import launch
from diffbench.core.progress import progress, span
from diffbench.data.coding import reconstruct
from diffbench.evaluation import judging, records, reference
from diffbench.evaluation.images import refuse_to_overwrite, write_npz
from diffbench.evaluation.judging import Judgement
from diffbench.evaluation.samples import SIZE, Samples
from diffbench.metrics import Extractor
from diffbench.metrics.extractors.base import state_hash
from diffbench.metrics.functional import frechet_distance, nearest
from diffbench.metrics.rows import spread
from diffbench.metrics.suite import metric_name
from diffbench.runs.build import device_of
from diffbench.runs.checks import check_evaluation
from diffbench.runs.denoiser import DenoiserRun

ALLOWED = ("sample", "evaluate", "seed", "ema", "snapshot", "export")


def evaluate(run: DenoiserRun, overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Draws `evaluate.count` samples without and, where the config guides, with guidance; scores both.

    Samples lie in the run folder's `evaluations`, in shards: a killed command goes on, and other distances of the same
    samples draw none.

    Args:
        run: a loaded run.
        overrides: key=value for the sections `sample` and `evaluate`; `seed`; `ema` (the decay of the average);
            `snapshot` (last, or best for the weights of the least distance in training); `export` (an npz to write
            the last drawn samples to, in a fixed shuffled order, as the ADM evaluator takes them).

    Returns:
        One record for each, already appended to the run's results.jsonl.
    """
    changes = parse_overrides(overrides)
    for key in changes:
        if key not in ALLOWED:
            allowed = "sample.KEY, evaluate.KEY, seed, ema, snapshot, export"
            raise UserError(f"{COMMAND_LINE}: {key}: not for evaluate; allowed: {allowed}{suggest(key, ALLOWED)}")
    decay, snapshot = changes.pop("ema", run.ema), changes.pop("snapshot", "last")
    export = changes.pop("export", None)
    config = change(run.config, changes)
    if snapshot not in ("last", "best"):
        raise UserError(f"{COMMAND_LINE}: snapshot: must be last or best, got {snapshot!r}")
    if export is not None:
        refuse_to_overwrite(Path(str(export)))
    if decay != run.ema:
        run.use_average(decay)
    if snapshot == "best":
        run.use_best()
    judgement = _judgement(run, config, COMMAND_LINE if overrides else str(run.folder))
    settings = [config.sample.unguided()]
    if config.sample.guided:
        settings.append(config.sample)
    found = [_record(run, config, how, judgement) for how in settings]
    if export is not None:
        _export(run, config, settings[-1], Path(str(export)))
    return found


def evaluate_as(run: DenoiserRun, config: RunConfig, told: Callable[[], dict[str, float]] = dict) -> dict[str, Any]:
    """The record of a run's samples just as `config.sample` and `config.evaluate` say, made unless it is there.

    Args:
        run: with the weights that are scored.
        config: how they are sampled and evaluated.
        told: what a new record says besides.

    Raises:
        UserError: if the extractor or real images are missing.
    """
    before = reversed(records.results(run.folder))
    known = next((r for r in before if scores_as(r, config, run.ema, run.snapshot)), None)
    return known or _record(run, config, config.sample, _judgement(run, config, str(run.folder)), told())


def scores_as(record: Mapping[str, Any], config: RunConfig, ema: float, snapshot: str = "last") -> bool:
    """Whether a record scores an average of the run's whole length, sampled and looked at as the config says."""
    images = config.trainer.max_steps * config.trainer.batch_size
    held = (record["images_seen"], record["ema"], record.get("snapshot", "last"))
    wanted = config.sample.numbers() | {"seed": config.seed}
    sampled = {k: record["sample"].get(k) for k in wanted}
    e, extractor = config.evaluate, (record.get("extractor") or {}).get("name", "")
    counted = any(name.endswith(f"@{e.count}") for name in records.values(record))
    asked = e.extractor is None or extractor.startswith(e.extractor)
    asked &= (record["reference"]["count"] == e.count) == (e.reference == "same")
    return held == (images, ema, snapshot) and sampled == wanted and counted and asked


def _judgement(run: DenoiserRun, config: RunConfig, origin: str) -> Judgement:
    """What scores the run's samples; `origin` of the config is named in errors."""
    try:
        check_evaluation(config, run.train_set)
    except ValueError as e:
        raise UserError(f"{origin}: {e}") from None
    device = device_of(config.trainer.accelerator)
    judgement = judging.of_run(config.evaluate, run.train_set, run.held_out, device)
    run.network.to(device)
    if config.evaluate.count < 2 * judgement.extractor.dim:
        print(
            f"note: {config.evaluate.count:,} samples against {judgement.extractor.dim:,} features of"
            f" {judgement.extractor.name}: most of a Fréchet distance is then bias; compare it at this count only"
        )
    return judgement


def _record(
    run: DenoiserRun,
    config: RunConfig,
    how: SampleConfig,
    judgement: Judgement,
    told: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Draws and scores samples; the record is appended to results.jsonl and shown in TensorBoard."""
    from diffbench.training.logger import show_scores  # imports Lightning

    found = _score(run, config, how, judgement) | _restored(run, config.evaluate.count, judgement.extractor)
    found |= told or {}
    run.add_result(found)
    show_scores(run.folder, run.images_seen, records.values(found), "guided/" if how.guided else "")
    return found


def samples_of(run: DenoiserRun, config: RunConfig, how: SampleConfig) -> Samples:
    """The place of a run's samples; what they depend on names it."""
    models = run.guidance_models(how)
    what = {
        "weights": state_hash(run.network),
        "helpers": [state_hash(n) for n in (models.weak_model, models.classifier) if n is not None],
        "autoencoder": None if run.autoencoder is None else run.autoencoder.fingerprint,
        "process": dataclasses.asdict(config.process),
        "sample": how.numbers(),
        "seed": config.seed,
        "labels": "evenly over the classes, class by class",
        "count": config.evaluate.count,
    }
    channels, height, width = run.train_set.images.shape[1:]
    return Samples(run.folder / "evaluations", what, config.evaluate.count, (channels, height, width))


def labels_of(run: DenoiserRun, count: int) -> Tensor:
    """(N,) labels of a run's samples, evenly over the classes, class by class."""
    return torch.arange(count) * run.train_set.num_classes // count


def draw(
    run: DenoiserRun, how: SampleConfig, shards: Samples, seed: int, rank: int = 0, world: int = 1
) -> dict[str, Any]:
    """Draws the samples that are not there yet; says first what that will take.

    Several processes, as many as `trainer.devices` of the run and as this machine has devices, draw shards of their
    own. They are started from here; `rank` and `world` are for them alone.

    Returns:
        What a record says of it: network evaluations, seconds of this sitting, values clipped.
    """
    from diffbench.sampling.cost import network_evaluations, seconds_per_evaluation  # imports Lightning

    sampler, evaluations = run.sampler(how), network_evaluations(run.process, how)
    labels, started = labels_of(run, shards.count), time.perf_counter()
    missing = left = shards.count - shards.present()
    estimate = 0.0
    helpers = min(run.config.trainer.devices, torch.cuda.device_count() or run.config.trainer.devices)
    if left > SIZE and helpers > 1 and ranks.place()[1] == 1:
        told = {"ema": run.ema, "snapshot": run.snapshot, "seed": seed, "count": shards.count}
        told |= {"sample": dataclasses.asdict(how)}
        command = [sys.executable, "-m", "diffbench.runs.worker", "draw", str(run.folder), json.dumps(told)]
        print(f"{left:,} samples in {helpers} processes", flush=True)
        if code := launch(command, helpers):
            raise SystemExit(code)
        left = shards.count - shards.present()
    if left:
        batch = min(how.batch_size, left)
        estimate = left * evaluations * seconds_per_evaluation(sampler, batch)
        print(
            f"{left:,} samples by {how.sampler}, {evaluations} network evaluations each: about {span(estimate)}",
            flush=True,
        )
    with _progress("samples", shards.count, estimate) as advance:

        def one(first: int, count: int) -> Tensor:
            done = 0

            def told(now: int) -> None:
                nonlocal done
                advance(now - done)
                done = now

            return sampler(labels[first : first + count], how, seed=seed, first=first, progress=told)

        shards.fill(one, advance, rank, world)
    return {
        "network_evaluations": evaluations,
        "seconds": time.perf_counter() - started,
        "drawn": missing,
        "clipped": sampler.clipped / sampler.values if sampler.values else None,
    }


def _progress(what: str, total: int, estimate: float) -> AbstractContextManager[Callable[[int], None]]:
    """A bar or lines for what takes longer than a few seconds."""
    return progress(what, total) if estimate > judging.PATIENCE else nullcontext(lambda count: None)


def _score(run: DenoiserRun, config: RunConfig, how: SampleConfig, judgement: Judgement) -> dict[str, Any]:
    shards = samples_of(run, config, how)
    drawn = draw(run, how, shards, config.seed)
    labels = labels_of(run, shards.count)
    started = time.perf_counter()
    batches = ((index, images, labels[index]) for index, images in shards.batches(reference.BATCH))
    values = judgement.scores(batches)
    _picture_neighbours(shards, run.train_set.images)
    return {
        **records.surroundings(judgement.extractor, judgement.extractor.device),
        "images_seen": run.images_seen,
        "snapshot": run.snapshot,
        "ema": run.ema,
        "guidance": how.guidance,
        "sample": how.numbers() | {"batch_size": how.batch_size, "seed": config.seed, "seconds": drawn.pop("seconds")},
        "drawing": drawn | {"folder": str(shards.folder.relative_to(run.folder))},
        "labels": "evenly over the classes" if run.train_set.num_classes else "none",
        "precision": str(next(run.network.parameters()).dtype).removeprefix("torch."),
        "data": run.train_set.fingerprint(),
        "data_name": run.train_set.name,
        **judgement.told(),
        "scoring_seconds": time.perf_counter() - started,
        **values,
    }


def _picture_neighbours(shards: Samples, training: Tensor) -> None:
    """nearest.png: sixteen samples above, the training image nearest to each below."""
    from diffbench.sampling.images import save_grid

    path, shown = shards.folder / "nearest.png", min(16, shards.count)
    if not path.exists():
        samples = torch.stack(list(shards.rows(spread(shards.count, shown))))
        beside = training[nearest(samples, training)[1]]
        save_grid(torch.cat([samples, beside]), columns=shown, path=path)


def _restored(run: DenoiserRun, count: int, extractor: Extractor) -> dict[str, Any]:
    """The distance of the real images, once through the autoencoder, from themselves: what no denoiser can undercut."""
    if run.autoencoder is None:
        return {}
    autoencoder = run.autoencoder.to(extractor.device)
    name = metric_name("reconstruction_fd", extractor, count)
    before, after = [], []
    for batch in reference.first(run.train_set, "train", count).batches():
        before.append(extractor(batch).pooled)
        after.append(extractor(reconstruct(autoencoder, batch)[0]).pooled)
    distance = frechet_distance(torch.cat(after), torch.cat(before))
    return {"autoencoder": autoencoder.fingerprint, name: distance}


def _export(run: DenoiserRun, config: RunConfig, how: SampleConfig, path: Path) -> None:
    shards = samples_of(run, config, how)
    order = judging.order("export", shards.count)
    write_npz(path, shards.count, shards.shape, shards.rows(order), labels_of(run, shards.count)[order])
    print(f"{path}: {shards.count:,} samples as arr_0, shuffled in a fixed order, their labels as arr_1")
