"""Score a denoiser's run: its samples against real images."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffbench.config.keys import IN_TRAINING
from diffbench.config.kinds import RunConfig
from diffbench.config.layers import COMMAND_LINE, located, parse_overrides, refuse_unknown
from diffbench.config.load import change
from diffbench.config.sections import SampleConfig
from diffbench.core.errors import UserError
from diffbench.data.coding import reconstruct
from diffbench.data.sets import ImageSet
from diffbench.evaluation import records
from diffbench.evaluation import reference as references
from diffbench.evaluation import scorer as scorers
from diffbench.evaluation.images import refuse_to_overwrite
from diffbench.evaluation.samples import Samples
from diffbench.evaluation.scorer import Scorer
from diffbench.evaluation.validation_error import accuracy_sums, level_means
from diffbench.metrics import Extractor
from diffbench.metrics.extractors.base import state_hash
from diffbench.metrics.frechet import frechet_distance
from diffbench.metrics.memorisation import Memorisation
from diffbench.metrics.registry import metric_name
from diffbench.runs.base import open_run
from diffbench.runs.build import device_of
from diffbench.runs.checks import check_evaluation, refuse_unused
from diffbench.runs.classifier import ClassifierRun, check_judge
from diffbench.runs.denoiser import DenoiserRun
from diffbench.runs.drawing import draw, samples_of


def evaluate(run: DenoiserRun, overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Draw `evaluate.count` samples without and, if the config uses guidance, with guidance; score both.

    Samples are stored under `evaluations` in the run folder: a killed command resumes, and other metrics of the same
    samples reuse them.

    Args:
        run: a run with weights loaded.
        overrides: key=value for the sections `sample` and `evaluate`; `seed` (of the samples); `ema` (decay of the
            average); `snapshot` (last, or best for the weights with the lowest distance in training); `export` (an npz
            for the samples drawn last, in a fixed shuffled order, as the ADM evaluator takes them).

    Returns:
        A record for each set of samples, already appended to the run's results.jsonl.
    """
    changes = parse_overrides(overrides)
    refuse_unknown(changes, "sample.KEY", "evaluate.KEY", "seed", "ema", "snapshot", "export", why="not for evaluate")
    ema, snapshot = changes.pop("ema", None), changes.pop("snapshot", "last")
    export = changes.pop("export", None)
    if "seed" in changes:
        changes["seeds"] = {"sample": changes.pop("seed")}
    config = change(run.config, changes)
    with located():
        refuse_unused(changes.get("evaluate", {}), [key for key in vars(config.evaluate) if key not in IN_TRAINING])
    if snapshot not in ("last", "best"):
        raise UserError(f"{COMMAND_LINE}: snapshot: must be last or best, got {snapshot!r}")
    if export is not None:
        if Path(str(export)).suffix != ".npz":
            raise UserError(f"{COMMAND_LINE}: export: must end in .npz, got {export}")
        refuse_to_overwrite(Path(str(export)))
    if ema is not None:
        if snapshot == "best":
            raise UserError(f"{COMMAND_LINE}: ema: snapshot=best fixes the average; leave one of the two out")
        try:
            decay = float(ema)
        except (TypeError, ValueError):
            raise UserError(f"{COMMAND_LINE}: ema: must be a number, got {ema!r}") from None
        run.use_average(decay)
    if snapshot == "best":
        run.use_best()
    origin, settings = COMMAND_LINE if overrides else str(run.folder), config.sample.scored()
    with located([(origin, {})]):
        for how in settings:  # find errors before any sample is drawn
            run.guided_by(how)
    scorer = _scorer(run, config, origin)
    found = [_record(run, config, how, scorer) for how in settings]
    if export is not None:
        from diffbench.sampling.images import save_npz

        path, samples = Path(str(export)), samples_of(run, config, settings[-1])
        order = scorers.permutation(samples.count, "order of samples", "export")
        labels = references.sample_labels(run.train_set, samples.count)[order]
        save_npz(samples.images()[order], labels, path)
        print(f"{path}: {samples.count:,} samples as arr_0, shuffled in a fixed order, their labels as arr_1")
    return found


def evaluate_as(run: DenoiserRun, config: RunConfig, measured: Callable[[], dict[str, float]] = dict) -> dict[str, Any]:
    """Find or make the record of samples drawn and scored exactly as `config.sample` and `config.evaluate` say.

    Args:
        run: a run with the weights to score loaded.
        measured: returns additional values for a new record.
    """
    known = find_record(run, config)
    return known or _record(run, config, config.sample, _scorer(run, config, str(run.folder)), measured())


def find_record(run: DenoiserRun, config: RunConfig) -> dict[str, Any] | None:
    """Find the newest record of samples drawn and scored exactly as `config.sample` and `config.evaluate` say."""
    return next((r for r in reversed(records.results(run.folder)) if scores_as(r, config, run.ema, run.snapshot)), None)


def is_scored(run: DenoiserRun) -> bool:
    """True if the weights are scored as the run's config says: without and, if it uses guidance, with guidance."""
    trainer = replace(run.config.trainer, max_images=run.images_seen)  # the run may be longer than now configured
    configs = [replace(run.config, trainer=trainer, sample=how) for how in run.config.sample.scored()]
    return all(find_record(run, config) for config in configs)


def scores_as(record: Mapping[str, Any], config: RunConfig, ema: float, snapshot: str = "last") -> bool:
    """Return whether a record scores an average of the finished run, sampled and evaluated as the config says."""
    if "asked" not in (record.get("extractor") or {}):
        return False  # written by an earlier version, which did not store what was asked for
    images = config.trainer.max_steps * config.trainer.batch_size
    scored = (record["images_seen"], record["ema"], record["snapshot"])
    wanted = config.sample.sampling_keys() | {"seed": config.seed_of("sample")}
    sampled = {k: v for k, v in record["sample"].items() if k not in ("batch_size", "seconds")}
    e, names = config.evaluate, list(records.values(record))
    counted = any(name.endswith(f"@{e.count}") for name in names)
    asked = _uses_extractor(record["extractor"], e.extractor) and record["extractor"]["file"] == e.weights
    asked &= not e.infinity or any("infinity" in name for name in names)
    asked &= records.compares_with_all(record, e.count) == (e.reference == "all")
    asked &= e.judge is None or (record.get("judge") or {}).get("run") == e.judge
    return scored == (images, ema, snapshot) and sampled == wanted and counted and asked


def _uses_extractor(extractor: Mapping[str, Any], wanted: str | None) -> bool:
    """Return whether a record's extractor is the one that a config asks for; by its name if null had chosen it."""
    if wanted is None or extractor["asked"] is not None:
        return bool(extractor["asked"] == wanted)
    return f"{extractor['name']}-".startswith(f"{wanted}-")


def _scorer(run: DenoiserRun, config: RunConfig, origin: str) -> Scorer:
    """Make the scorer of a run's samples; errors name the `origin` of the config."""
    with located([(origin, {})]):
        check_evaluation(config, run.train_set)
        check_judge(config, run.facts.shape, run.facts.names)
        extractor = references.run_extractor(config, run.train_set, device_of(config.trainer.accelerator))
    run.use_device()
    if config.evaluate.count < 2 * extractor.dim:
        print(
            f"note: {config.evaluate.count:,} samples are few for {extractor.dim:,} features of {extractor.name}: most"
            " of a Fréchet distance is then bias; compare it only with distances at this count"
        )
    return scorers.run_scorer(config.evaluate, extractor, run.train_set, run.held_out)


def _record(
    run: DenoiserRun, config: RunConfig, how: SampleConfig, scorer: Scorer, more: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Draw and score samples; append the record to results.jsonl and show it in TensorBoard."""
    from diffbench.training.tensorboard_log import show_scores

    samples = samples_of(run, config, how)
    drawn = draw(run, how, samples, config.seed_of("sample"))
    labels, started = references.sample_labels(run.train_set, samples.count), time.perf_counter()
    values = scorer.scores(scorers.numbered(samples.images().split(references.BATCH), labels))
    if scorer.copies is not None:
        _draw_nearest(samples, labels, scorer.copies, run.train_set, run.facts.names)
    provenance = run.provenance(scorer.measurement.extractor)
    provenance["extractor"] |= {"asked": config.evaluate.extractor, "file": config.evaluate.weights}
    found = {
        **provenance,
        "snapshot": run.snapshot,
        "guidance": how.guidance,
        "sample": how.sampling_keys()
        | {"batch_size": how.batch_size, "seed": config.seed_of("sample"), "seconds": drawn.pop("seconds")},
        "drawing": drawn | {"folder": str(samples.folder.relative_to(run.folder))},
        "labels": references.describe_class_spread(run.train_set, labels),
        "precision": str(next(run.network.parameters()).dtype).removeprefix("torch."),
        **scorer.facts(),
        "scoring_seconds": time.perf_counter() - started,
        **values,
        "departures": departures(run, config, how),
        **_planted(run, config, how),
        **_judged(run, config.evaluate.judge, samples, labels),
        **_restored(run, config.evaluate.count, scorer.measurement.extractor),
        **(more or {}),
    }
    run.add_result(found)
    if "tensorboard" in run.config.trainer.logger:
        show_scores(run.folder, run.images_seen, records.values(found), records.tag_prefix(found))
    return found


def departures(run: DenoiserRun, config: RunConfig, how: SampleConfig) -> dict[str, Any]:
    """Return the keys and values by which sampling and scoring depart from the run's own config."""
    own, usual = run.config, run.config.sample if how.guided else run.config.sample.unguided()
    found = {
        f"sample.{key}": (getattr(how, key), getattr(usual, key)) for key in how.sampling_keys() | usual.sampling_keys()
    }
    found |= {
        "evaluate.reference": (config.evaluate.reference, own.evaluate.reference),
        "seed": (config.seed_of("sample"), own.seed_of("sample")),
        "ema": (run.ema, own.ema.decays[0]),
        "snapshot": (run.snapshot, "last"),
    }
    return {key: value for key, (value, usual_value) in found.items() if value != usual_value}


def _draw_nearest(
    samples: Samples, labels: Tensor, copies: Memorisation, training: ImageSet, names: Sequence[str]
) -> None:
    """Save nearest.png: the sixteen samples most like copies, each above its nearest training image."""
    from diffbench.sampling.images import save_grid

    found = copies.rows().cpu()
    worst = found[:, 0].argsort(stable=True)[:16]
    near = found[worst, 2].long()
    classes = [[names[label] if names else "" for label in of] for of in (labels[worst], training.labels[near])]
    ratios = [f"{name} {ratio:.2f}".strip() for name, ratio in zip(classes[0], found[worst, 0], strict=True)]
    images = torch.cat([samples.images()[worst], training.images[near]])
    save_grid(images, len(worst), samples.folder / "nearest.png", ratios + classes[1])


def _restored(run: DenoiserRun, count: int, extractor: Extractor) -> dict[str, Any]:
    """Measure the distance of real images from their reconstructions: a lower bound for denoisers of these latents."""
    if run.autoencoder is None:
        return {}
    autoencoder = run.autoencoder.to(extractor.device)
    name = metric_name("reconstruction_fd", extractor, count)
    before, after = [], []
    for batch in references.choose_first(run.train_set, "train", count).batches():
        before.append(extractor(batch).pooled)
        after.append(extractor(reconstruct(autoencoder, batch)[0]).pooled)
    distance = frechet_distance(torch.cat(after), torch.cat(before))
    return {"autoencoder": autoencoder.fingerprint, name: distance}


def _planted(run: DenoiserRun, config: RunConfig, how: SampleConfig) -> dict[str, float]:
    """Score the run's explanations of the planted classes of its data, from unguided samples."""
    planted = getattr(config.data, "planted", {})
    if not planted or how.guided:
        return {}
    from diffbench.evaluation.explain import ExplainConfig, label_rows, planted_scores

    if label_rows(run.network) is None:
        print("note: planted classes are not explained, since this network has no table of label embeddings")
        return {}
    print(f"explaining {len(planted)} planted classes", flush=True)
    return planted_scores(run.sampler(how), how, run.facts, planted, ExplainConfig(seed=config.seed_of("sample")))


def _judged(run: DenoiserRun, folder: str | None, samples: Samples, labels: Tensor) -> dict[str, Any]:
    """Classify the samples with the run `folder`; return the share assigned to the label they were drawn for.

    The record also has the classifier's accuracy on held-out images.
    """
    if folder is None:
        return {}
    judge = open_run(folder, [ClassifierRun]).use_average()
    network, level = judge.network.to(device_of(run.config.trainer.accelerator)), judge.config.validation.log_snr[-1:]
    drawn = replace(run.held_out, images=samples.images(), labels=labels)
    share, real = (
        level_means(level, accuracy_sums(network, judge.process, images, level))[level[0]]
        for images in (drawn, run.held_out)
    )
    print(f"judge {folder}: accuracy {share:.1%} on samples, {real:.1%} on held-out images")
    found = {"run": folder, "weights": state_hash(network), "accuracy": real}
    return {"judge": found, f"label_accuracy/judge@{samples.count}": share}
