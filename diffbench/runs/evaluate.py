"""Score a run: a denoiser's samples against real images, an autoencoder's reconstructions against originals."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffbench.config.kinds import AutoencoderConfig, RunConfig
from diffbench.config.layers import COMMAND_LINE, located, parse_overrides
from diffbench.config.load import change
from diffbench.config.sections import SampleConfig
from diffbench.core import distributed
from diffbench.core.errors import UserError, suggest
from diffbench.core.progress import progress, span
from diffbench.data.coding import reconstruct
from diffbench.data.sets import ImageSet
from diffbench.evaluation import records
from diffbench.evaluation import reference as references
from diffbench.evaluation import scorer as scorers
from diffbench.evaluation.images import refuse_to_overwrite, write_npz
from diffbench.evaluation.samples import SIZE, Samples
from diffbench.evaluation.scorer import Scorer
from diffbench.metrics import Extractor
from diffbench.metrics.base import evenly_spaced
from diffbench.metrics.extractors.base import state_hash
from diffbench.metrics.frechet import frechet_distance
from diffbench.metrics.memorisation import nearest
from diffbench.metrics.reconstruction import psnr, ssim
from diffbench.metrics.registry import metric_name
from diffbench.runs.autoencoder import AutoencoderRun
from diffbench.runs.build import device_of
from diffbench.runs.checks import check_evaluation
from diffbench.runs.denoiser import DenoiserRun
from diffbench.runs.ranks import run_ranks

ALLOWED = ("sample", "evaluate", "seed", "ema", "snapshot", "export")


def evaluate(run: DenoiserRun, overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Draw `evaluate.count` samples without and, where the config guides, with guidance; score both.

    Samples are kept in the run folder's `evaluations`: a killed command goes on, and other distances of the same
    samples draw none.

    Args:
        run: a loaded run.
        overrides: key=value for the sections `sample` and `evaluate`; `seed`; `ema` (the decay of the average);
            `snapshot` (last, or best for the weights of the least distance in training); `export` (an npz to write
            the last drawn samples to, in a fixed shuffled order, as the ADM evaluator takes them).

    Returns:
        One record for each, already appended to the run's results.jsonl.
    """
    changes = _changes(overrides, ALLOWED)
    decay, snapshot = changes.pop("ema", run.ema), changes.pop("snapshot", "last")
    export = changes.pop("export", None)
    config = change(run.config, changes)
    if snapshot not in ("last", "best"):
        raise UserError(f"{COMMAND_LINE}: snapshot: must be last or best, got {snapshot!r}")
    if export is not None:
        if Path(str(export)).suffix != ".npz":
            raise UserError(f"{COMMAND_LINE}: export: must end in .npz, got {export}")
        refuse_to_overwrite(Path(str(export)))
    if decay != run.ema:
        run.use_average(decay)
    if snapshot == "best":
        run.use_best()
    scorer = _scorer(run, config, COMMAND_LINE if overrides else str(run.folder))
    settings = config.sample.scored()
    found = [_record(run, config, how, scorer) for how in settings]
    if export is not None:
        _export(run, config, settings[-1], Path(str(export)))
    return found


def _changes(overrides: Sequence[str], allowed: Sequence[str]) -> dict[str, Any]:
    """Parse overrides; refuse keys and sections that are not allowed."""
    changes = parse_overrides(overrides)
    for key in changes:
        if key not in allowed:
            names = ", ".join(f"{name}.KEY" if name in ("sample", "evaluate") else name for name in allowed)
            raise UserError(f"{COMMAND_LINE}: {key}: not for evaluate; allowed: {names}{suggest(key, allowed)}")
    return changes


def evaluate_as(run: DenoiserRun, config: RunConfig, measured: Callable[[], dict[str, float]] = dict) -> dict[str, Any]:
    """Find or make the record of a run's samples exactly as `config.sample` and `config.evaluate` say.

    Args:
        run: with the weights that are scored.
        config: how they are sampled and evaluated.
        measured: gives further values of a new record.

    Raises:
        UserError: if the extractor or real images are missing.
    """
    known = find_record(run, config)
    return known or _record(run, config, config.sample, _scorer(run, config, str(run.folder)), measured())


def find_record(run: DenoiserRun, config: RunConfig) -> dict[str, Any] | None:
    """The newest record of a run's samples exactly as `config.sample` and `config.evaluate` say."""
    return next((r for r in reversed(records.results(run.folder)) if scores_as(r, config, run.ema, run.snapshot)), None)


def is_scored(run: DenoiserRun) -> bool:
    """Whether the weights are scored as the run's config says, without and, where it guides, with guidance."""
    trainer = replace(run.config.trainer, max_images=run.images_seen)  # of a longer run, whatever is asked for now
    configs = [replace(run.config, trainer=trainer, sample=how) for how in run.config.sample.scored()]
    return all(find_record(run, config) for config in configs)


def scores_as(record: Mapping[str, Any], config: RunConfig, ema: float, snapshot: str = "last") -> bool:
    """Return whether a record scores an average of the finished run, sampled and evaluated as the config says."""
    images = config.trainer.max_steps * config.trainer.batch_size
    held = (record["images_seen"], record["ema"], record.get("snapshot", "last"))
    wanted = config.sample.numbers() | {"seed": config.seed}
    sampled = {k: record["sample"].get(k) for k in wanted}
    e, extractor = config.evaluate, (record.get("extractor") or {}).get("name", "")
    counted = any(name.endswith(f"@{e.count}") for name in records.values(record))
    asked = e.extractor is None or extractor.startswith(e.extractor)
    asked &= (record["reference"]["count"] == e.count) == (e.reference == "same")
    return held == (images, ema, snapshot) and sampled == wanted and counted and asked


def _scorer(run: DenoiserRun, config: RunConfig, origin: str) -> Scorer:
    """Make the scorer of the run's samples; errors name the `origin` of the config."""
    with located([(origin, {})]):
        check_evaluation(config, run.train_set)
        extractor = references.run_extractor(config, run.train_set, device_of(config.trainer.accelerator))
    run.network.to(extractor.device)
    if config.evaluate.count < 2 * extractor.dim:
        print(
            f"note: {config.evaluate.count:,} samples against {extractor.dim:,} features of {extractor.name}: most of a"
            " Fréchet distance is then bias; compare it at this count only"
        )
    return scorers.run_scorer(config.evaluate, extractor, run.train_set, run.held_out)


def _record(
    run: DenoiserRun, config: RunConfig, how: SampleConfig, scorer: Scorer, more: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Draw and score samples; the record is appended to results.jsonl and shown in TensorBoard."""
    from diffbench.training.logger import show_scores  # imports Lightning

    found = _score(run, config, how, scorer) | {"departures": departures(run, config, how)}
    found |= _planted(run, config, how)
    found |= {**_restored(run, config.evaluate.count, scorer.measurement.extractor), **(more or {})}
    run.add_result(found)
    if "tensorboard" in run.config.trainer.logger:
        show_scores(run.folder, run.images_seen, records.values(found), records.tag_prefix(found))
    return found


def departures(run: DenoiserRun, config: RunConfig, how: SampleConfig) -> dict[str, Any]:
    """Keys and values by which samples are drawn and scored differently from the run's own config."""
    own, usual = run.config, run.config.sample if how.guided else run.config.sample.unguided()
    found = {f"sample.{key}": getattr(how, key) for key in how.numbers() | usual.numbers()}
    found = {key: value for key, value in found.items() if value != getattr(usual, key.removeprefix("sample."))}
    others = {
        "evaluate.reference": (config.evaluate.reference, own.evaluate.reference),
        "seed": (config.seed, own.seed),
        "ema": (run.ema, own.ema.decays[0]),
        "snapshot": (run.snapshot, "last"),
    }
    return found | {key: value for key, (value, usual_value) in others.items() if value != usual_value}


def samples_of(run: DenoiserRun, config: RunConfig, how: SampleConfig) -> Samples:
    """Store of a run's samples; its folder is named by everything that they depend on."""
    models = run.guidance_models(how)
    what = {
        "weights": state_hash(run.network),
        "guidance_models": [state_hash(n) for n in (models.weak_model, models.classifier) if n is not None],
        "autoencoder": None if run.autoencoder is None else run.autoencoder.fingerprint,
        "process": dataclasses.asdict(config.process),
        "sample": how.numbers(),
        "seed": config.seed,
        "labels": labels_of(run, config.evaluate.count).bincount(minlength=1).tolist(),
        "count": config.evaluate.count,
    }
    channels, height, width = run.train_set.images.shape[1:]
    return Samples(run.folder / "evaluations", what, config.evaluate.count, (channels, height, width))


def labels_of(run: DenoiserRun, count: int) -> Tensor:
    """Labels (N,) of a run's samples, class by class."""
    return references.sample_labels(run.train_set, count)


def drawing_seconds(run: DenoiserRun) -> float:
    """About how long the samples take that the run's config scores, on this machine."""
    from diffbench.sampling.cost import network_evaluations, seconds_per_evaluation

    run.network.to(device_of(run.config.trainer.accelerator))
    c = run.config
    evaluations = sum(network_evaluations(run.process, how) for how in c.sample.scored())
    return c.evaluate.count * evaluations * seconds_per_evaluation(run.sampler(c.sample), c.sample.batch_size)


def draw(
    run: DenoiserRun, how: SampleConfig, samples: Samples, seed: int, rank: int = 0, world: int = 1
) -> dict[str, Any]:
    """Draw the samples that are missing; print first how long that takes.

    Several processes, as many as `trainer.devices` of the run and as this machine has devices, draw chunks of their
    own. They are started from here; `rank` and `world` are for them alone.

    Returns:
        Entries of a record: network evaluations, seconds of this call, samples drawn, share of clipped values.
    """
    from diffbench.sampling.cost import network_evaluations, seconds_per_evaluation

    sampler, evaluations = run.sampler(how), network_evaluations(run.process, how)
    labels, started = labels_of(run, samples.count), time.perf_counter()
    missing = left = samples.count - samples.present()
    estimate = 0.0
    processes = min(run.config.trainer.devices, torch.cuda.device_count() or run.config.trainer.devices)
    if left > SIZE and processes > 1 and distributed.place()[1] == 1:
        wanted = {"ema": run.ema, "snapshot": run.snapshot, "seed": seed, "count": samples.count}
        wanted |= {"sample": dataclasses.asdict(how)}
        print(f"{left:,} samples in {processes} processes", flush=True)
        run_ranks(processes, "draw", str(run.folder), json.dumps(wanted))
        left = samples.count - samples.present()
    if left:
        run.compile(2.0 * run.cost.macs * evaluations * left / world)
        batch = min(how.batch_size, left)
        estimate = left * evaluations * seconds_per_evaluation(sampler, batch)
        print(
            f"{left:,} samples by {how.sampler}, {evaluations} network evaluations each: about {span(estimate)}",
            flush=True,
        )
    shown = progress("samples", samples.count) if estimate > scorers.PATIENCE else nullcontext(lambda count: None)
    with shown as advance:

        def one(first: int, count: int) -> Tensor:
            done = 0

            def drawn(now: int) -> None:
                nonlocal done
                advance(now - done)
                done = now

            return sampler(labels[first : first + count], how, seed=seed, first=first, progress=drawn)

        samples.fill(one, advance, rank, world)
    return {
        "network_evaluations": evaluations,
        "seconds": time.perf_counter() - started,
        "drawn": missing,
        "clipped": sampler.clipped / sampler.values if sampler.values else None,
    }


def _score(run: DenoiserRun, config: RunConfig, how: SampleConfig, scorer: Scorer) -> dict[str, Any]:
    samples = samples_of(run, config, how)
    drawn = draw(run, how, samples, config.seed)
    labels = labels_of(run, samples.count)
    started = time.perf_counter()
    batches = ((index, images, labels[index]) for index, images in samples.batches(references.BATCH))
    values = scorer.scores(batches)
    _draw_neighbours(samples, labels, run.train_set, run.facts.names)
    return {
        **_facts(run, scorer.measurement.extractor),
        "snapshot": run.snapshot,
        "guidance": how.guidance,
        "sample": how.numbers() | {"batch_size": how.batch_size, "seed": config.seed, "seconds": drawn.pop("seconds")},
        "drawing": drawn | {"folder": str(samples.folder.relative_to(run.folder))},
        "labels": references.spread_in_words(run.train_set, labels),
        "precision": str(next(run.network.parameters()).dtype).removeprefix("torch."),
        **scorer.facts(),
        "scoring_seconds": time.perf_counter() - started,
        **values,
    }


def _facts(run: DenoiserRun | AutoencoderRun, extractor: Extractor | None) -> dict[str, Any]:
    """Entries of any run's record about its surroundings, weights and data."""
    return {
        **records.surroundings(extractor, extractor.device if extractor else torch.device("cpu")),
        "images_seen": run.images_seen,
        "ema": run.ema,
        "data": run.train_set.fingerprint(),
        "data_name": run.train_set.name,
    }


def _draw_neighbours(samples: Samples, labels: Tensor, training: ImageSet, names: Sequence[str]) -> None:
    """Save nearest.png: sixteen samples above, the training image nearest to each below, both with their classes."""
    from diffbench.sampling.images import save_grid

    path, shown = samples.folder / "nearest.png", min(16, samples.count)
    if not path.exists():
        index = evenly_spaced(samples.count, shown)
        images = samples.images()[index]
        found = nearest(images, training.images)[1]
        captions = [names[label] for label in torch.cat([labels[index], training.labels[found]])] if names else None
        save_grid(torch.cat([images, training.images[found]]), shown, path, captions)


def _restored(run: DenoiserRun, count: int, extractor: Extractor) -> dict[str, Any]:
    """Distance of the real images from their reconstructions, which no denoiser of latents can undercut."""
    if run.autoencoder is None:
        return {}
    autoencoder = run.autoencoder.to(extractor.device)
    name = metric_name("reconstruction_fd", extractor, count)
    before, after = [], []
    for batch in references.first(run.train_set, "train", count).batches():
        before.append(extractor(batch).pooled)
        after.append(extractor(reconstruct(autoencoder, batch)[0]).pooled)
    distance = frechet_distance(torch.cat(after), torch.cat(before))
    return {"autoencoder": autoencoder.fingerprint, name: distance}


def _planted(run: DenoiserRun, config: RunConfig, how: SampleConfig) -> dict[str, float]:
    """How well the run explains the classes that its data plants, from unguided samples."""
    planted = getattr(config.data, "planted", {})
    if not planted or how.guided:
        return {}
    from diffbench.evaluation.explain import ExplainConfig, planted_scores

    print(f"explaining {len(planted)} planted classes", flush=True)
    return planted_scores(run.sampler(how), how, run.facts, planted, ExplainConfig(seed=config.seed))


def _export(run: DenoiserRun, config: RunConfig, how: SampleConfig, path: Path) -> None:
    samples = samples_of(run, config, how)
    order = scorers.permutation(samples.count, "order of samples", "export")
    write_npz(path, samples.count, samples.shape, samples.rows(order), labels_of(run, samples.count)[order])
    print(f"{path}: {samples.count:,} samples as arr_0, shuffled in a fixed order, their labels as arr_1")


def evaluate_autoencoder(run: AutoencoderRun, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Score the finished autoencoder, with averaged weights, on `evaluate.count` held-out images, or as many
    as there are.

    Args:
        run: a finished run.
        overrides: key=value for the section `evaluate`.

    Returns:
        The record, already appended to the run's results.jsonl: PSNR and SSIM, the Fréchet distance of the
        reconstructions from the same images, and how many the extractor still recognises.
    """
    config = change(run.config, _changes(overrides, ["evaluate"]))
    try:
        run.check(config)
    except ValueError as e:
        raise UserError(f"{COMMAND_LINE}: {e}") from None
    device = device_of(config.trainer.accelerator)
    net = run.trained.to(device)
    part = references.first(run.held_out, "held-out", min(config.evaluate.count, len(run.held_out)))
    images, labels = run.held_out.images[part.index], part.labels
    restored, divergence = reconstruct(net, images)
    n, extractor = len(images), _extractor(config, run, device)
    c, h, w = net.config.latent_shape(tuple(images.shape[1:]))
    record = {
        **_facts(run, extractor),
        "reference": {"split": "held-out", "count": n},
        "autoencoder": net.fingerprint,
        "numbers": c * h * w,
        f"psnr@{n}": psnr(restored, images),
        f"ssim@{n}": ssim(restored, images),
        f"kl_nats@{n}": float(divergence.double().mean()),
    }
    if extractor is not None:
        found, real = ([extractor(part) for part in a.split(references.BATCH)] for a in (restored, images))
        pooled = [torch.cat([part.pooled.cpu() for part in parts]) for parts in (found, real)]
        record[metric_name("reconstruction_fd", extractor, n)] = frechet_distance(*pooled)
        if extractor.predicts_labels:
            classes = torch.cat([part.logits.argmax(1).cpu() for part in found if part.logits is not None])
            record[metric_name("label_accuracy", extractor, n)] = float((classes == labels).double().mean())
    run.add_result(record)
    return record


def _extractor(config: AutoencoderConfig, run: AutoencoderRun, device: torch.device) -> Extractor | None:
    """Make the extractor, or print why not and return None: PSNR and SSIM need none."""
    try:
        return references.run_extractor(config, run.train_set, device)
    except ValueError as e:
        print(f"no Fréchet distance: {e}", flush=True)
        return None
