"""Score images of any origin with the code that scores a run's samples; build files of reference statistics."""

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffbench.config.layers import COMMAND_LINE, located, parse_overrides
from diffbench.config.load import build
from diffbench.config.sections import EvaluateConfig
from diffbench.core.errors import UserError
from diffbench.core.files import digest, sha256, write_bytes
from diffbench.data.registry import SOURCES
from diffbench.evaluation import records
from diffbench.evaluation import reference as references
from diffbench.evaluation import scorer as scorers
from diffbench.evaluation.images import (
    ImageSource,
    compression_note,
    has_images,
    open_images,
    read_statistics,
    refuse_missing,
    refuse_to_overwrite,
    write_adm_reference,
)
from diffbench.evaluation.scorer import Scorer
from diffbench.metrics import EXTRACTORS, DensityCoverage, Extractor, Request
from diffbench.metrics import extractor as build_extractor
from diffbench.metrics.base import KEPT, Measurement, ReferenceStatistics, evenly_spaced
from diffbench.runs.base import open_run
from diffbench.runs.build import device_of
from diffbench.runs.checks import check_evaluation, refuse_unused
from diffbench.runs.denoiser import DenoiserRun


def run_of(path: Path) -> DenoiserRun | None:
    """Open the denoiser's run in a folder; None if the path is not a run folder."""
    return open_run(path, [DenoiserRun]) if (path / "config.yaml").is_file() else None


def settings_of(overrides: Sequence[str], run: DenoiserRun | None, count: int | None = None) -> EvaluateConfig:
    """Build the section `evaluate` of a command on images, with defaults from the run they are compared with.

    Args:
        count: number of images; None when building statistics.
    """
    changes = parse_overrides(overrides)
    for key in changes:
        if key != "evaluate":
            raise UserError(f"{COMMAND_LINE}: {key}: not for images; allowed: evaluate.KEY, such as evaluate.extractor")
    values = changes.get("evaluate", {})
    base: dict[str, Any] = {}
    if run is not None:
        theirs = run.config.evaluate
        extractor = references.suited_extractor(run.config)
        base = {"extractor": extractor, "weights": theirs.weights, "reference": theirs.reference, "count": theirs.count}
    with located():
        if not isinstance(values, dict):
            raise ValueError(f"evaluate: must be a section with keys, got {values!r}; write evaluate.extractor=NAME")
        if (base | values).get("extractor") is None:
            raise ValueError(f"evaluate.extractor: missing; choose from {', '.join(EXTRACTORS)}")
        used = ["extractor", "weights", *([] if run is None else ["reference", "infinity" if count else "count"])]
        refuse_unused(values, used)
        return build(EvaluateConfig, base | values | ({"count": count} if count else {}), "evaluate.")


def evaluate_images(what: Path, against: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Score images against other images; also append the record to WHAT.results.jsonl next to them.

    Args:
        what: a folder of images, or an npz with arr_0 (and labels in arr_1 for label accuracy).
        against: a run folder (its training images), a folder of images, an npz with arr_0, with mu and sigma or with
            both, or statistics written by `diffbench reference`.
        overrides: key=value for the section `evaluate`; the count is that of the images.

    Raises:
        UserError: naming what does not fit.
    """
    run = run_of(against)
    images = open_images(what)
    refuse_missing(against)
    if len(images) < scorers.LEAST:
        raise UserError(f"{what}: has {len(images)} images; at least {scorers.LEAST} are needed")
    settings = settings_of(overrides, run, len(images))
    scores = Path(f"{os.path.abspath(what)}.results.jsonl")
    if not os.access(scores.parent, os.W_OK):
        raise UserError(
            f"{scores}: not writable, but scores are stored next to the images; copy or link them elsewhere"
        )
    extractor = make_extractor(settings, images.shape, run)
    scorer = _run_scorer(settings, extractor, run, images, what) if run else _scorer(extractor, against, len(images))
    labelled = scorer.measurement.labels and images.labels is not None
    scorer.measurement = replace(scorer.measurement, labels=labelled, by_class=False)
    started = time.perf_counter()
    values = scorer.scores(scorers.numbered(images.batches(references.BATCH), images.labels))
    formats = images.formats()
    record = {
        **records.environment(extractor, extractor.device),
        "images": {"path": str(what), "sha256": images.identity(), "count": len(images), "formats": formats},
        **scorer.facts(),
        "compression": compression_note(formats, scorer.reference.get("formats", {})),
        "scoring_seconds": time.perf_counter() - started,
        **values,
    }
    records.append(scores, record)
    return record


def make_extractor(settings: EvaluateConfig, shape: tuple[int, int, int], run: DenoiserRun | None) -> Extractor:
    """Make the extractor of the settings for images of a shape.

    An extractor that is trained learns from the run's images, or else from the data set whose registry row names it.
    """
    name = settings.extractor
    assert name is not None
    if run is not None:
        request = replace(references.extractor_request(run.train_set, settings.weights), shape=shape)
    else:
        suited = next((source for source in SOURCES.values() if name in source.extractors), None)
        learning = suited and (lambda: references.training_of(suited.load(suited.config())[0]))
        request = Request(shape, settings.weights, learning or None, cached=references.cached_network)
    with located():
        return build_extractor(name, request).to(device_of("auto"))


def _run_scorer(
    settings: EvaluateConfig, extractor: Extractor, run: DenoiserRun, images: ImageSource, what: Path
) -> Scorer:
    train, counts = run.train_set, None
    if images.labels is not None and train.num_classes:
        if (highest := int(images.labels.max())) >= train.num_classes:
            raise UserError(
                f"{what}: arr_1 has label {highest}, but {run.folder} has {train.num_classes} classes, 0 to"
                f" {train.num_classes - 1}"
            )
        counts = images.labels.bincount()
    _check_channels(extractor, train.shape[0], run.folder)
    scorer = scorers.run_scorer(settings, extractor, train, run.held_out, counts)
    if train.shape != images.shape:
        scorer.measurement.detector = scorer.measurement.rule = None  # both need images of the same shape
    scorer.reference["formats"] = train.formats
    return scorer


def _check_channels(extractor: Extractor, channels: int, path: Path) -> None:
    """Raise UserError if an extractor made for the samples cannot read real images of this many channels."""
    if channels not in (1, extractor.channels):
        raise UserError(
            f"{path}: its images have {channels} channels, but {extractor.name} was made for the samples'"
            f" {extractor.channels}"
        )


def _scorer(extractor: Extractor, against: Path, count: int) -> Scorer:
    reference, facts = load_reference(extractor, against, min(count, KEPT))
    if 0 < len(reference.rows) <= DensityCoverage.k:
        raise UserError(f"{against}: has {len(reference.rows)} images; at least {DensityCoverage.k + 1} are needed")
    if facts["count"] != count:
        print(
            f"note: {count:,} images against {facts['count'] or 'an unknown number of'} real ones: a Fréchet distance"
            " depends on both counts; compare it only with distances at the same counts"
        )
    compared = Measurement(extractor, {"fd": reference}, count, permutation=scorers.permutation)
    return Scorer(compared, facts)


def load_reference(extractor: Extractor, path: Path, keep: int = KEPT) -> tuple[ReferenceStatistics, dict[str, Any]]:
    """Load the statistics of a folder, an npz, or a file of statistics; also return entries about them for a record."""
    if path.suffix == ".safetensors" and path.is_file():
        key, reference = references.read(path)
        for name, mine in (("extractor", extractor.name), ("weights", extractor.weights)):
            if key.get(name) != mine:
                raise UserError(f"{path}: {name} is {key.get(name)!r}, not {mine!r}; build it with this extractor")
        return reference, {"key": digest(key)[:16], "count": key["count"]}
    fits = read_statistics(path)
    if fits is None:
        return statistics_of_images(extractor, path, keep)
    if len(fits[0].mean) != extractor.dim:
        raise UserError(f"{path}: mu has {len(fits[0].mean)} numbers, but {extractor.name} gives {extractor.dim}")
    rows = statistics_of_images(extractor, path)[0].rows if has_images(path) else torch.zeros(0, extractor.dim)
    spatial = fits[1] if extractor.spatial is not None else None
    return ReferenceStatistics(fits[0], rows, spatial), {"key": sha256(path)[:16], "count": 0}


def statistics_of_images(
    extractor: Extractor, path: Path, keep: int = KEPT
) -> tuple[ReferenceStatistics, dict[str, Any]]:
    """Load or compute the statistics of a folder of images or an npz; also return entries about them for a record."""
    images = open_images(path)
    _check_channels(extractor, images.shape[0], path)
    source = {"images": images.identity(), "size": list(images.shape)}
    batches = partial(images.batches, references.BATCH)
    reference, key = references.cached_statistics(extractor, source, len(images), batches, keep)
    return reference, {"key": key, "count": len(images), "formats": images.formats()}


def build_reference(what: Path, overrides: Sequence[str]) -> str:
    """Compute and cache the statistics of images; `out=FILE` also writes them to a file.

    Args:
        what: a run folder (its training images: evaluate.count of them, or evaluate.reference=all), a folder of
            images, or an npz with arr_0.
        overrides: keys of the section `evaluate`, and `out`: a .safetensors file for `evaluate --against`, or an .npz
            for the ADM evaluator.

    Returns:
        Lines that describe the statistics.

    Raises:
        UserError: naming what does not fit.
    """
    named = [o.partition("=")[2] for o in overrides if o.startswith("out=")]
    out = Path(named[-1]) if named else None
    if out is not None:
        if out.suffix not in (".safetensors", ".npz"):
            raise UserError(
                f"{COMMAND_LINE}: out: must end in .safetensors, or in .npz for the ADM evaluator, got {out}"
            )
        refuse_to_overwrite(out)
    run = run_of(what)
    images = None if run else open_images(what)
    settings = settings_of([o for o in overrides if not o.startswith("out=")], run)
    batches: Any
    if run is not None:
        train, everything = run.train_set, settings.reference == "all"
        with located([(COMMAND_LINE if overrides else str(what), {})]):
            check_evaluation(replace(run.config, evaluate=settings), train)
        extractor = make_extractor(settings, train.shape, run)
        part = (
            references.choose_all(train, "train")
            if everything
            else references.choose_first(train, "train", settings.count)
        )
        reference, key = references.statistics_of(extractor, part)
        count, batches = len(part), part.batches
    else:
        assert images is not None
        extractor = make_extractor(settings, images.shape, None)
        reference, facts = statistics_of_images(extractor, what)
        key, count, batches = facts["key"], len(images), partial(images.batches, references.BATCH)
    (path,) = references.reference_folder().glob(f"*-{key}.safetensors")
    if out is not None and out.suffix == ".npz":
        write_adm_reference(out, extractor, reference, _evenly(batches(), count))
    elif out is not None:
        write_bytes(out, path.read_bytes())
    facts = {**references.read(path)[0], "features": extractor.dim, "feature vectors kept": len(reference.rows)}
    return "\n".join([*(f"{name}: {value}" for name, value in facts.items()), f"key: {key}", f"file: {out or path}"])


def _evenly(batches: Any, count: int) -> list[Tensor]:
    """Choose at most 10,000 evenly spaced images."""
    chosen = set(evenly_spaced(count, min(count, KEPT)).tolist())
    return [image for i, image in enumerate(image for batch in batches for image in batch) if i in chosen]
