"""Anyone's pictures scored by the code that scores our own; and reference statistics as files."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffbench.config import schema
from diffbench.config.kinds import RunConfig
from diffbench.config.layers import COMMAND_LINE, parse_overrides
from diffbench.config.sample_sections import EvaluateConfig
from diffbench.core.errors import UserError
from diffbench.core.files import sha256
from diffbench.data.digits import DigitsConfig
from diffbench.data.registry import SOURCES
from diffbench.data.sets import ImageSet
from diffbench.evaluation import judging, records
from diffbench.evaluation import reference as references
from diffbench.evaluation.images import Pictures, holds_pictures, open_pictures, read_statistics
from diffbench.evaluation.judging import Judgement
from diffbench.metrics import EXTRACTORS, Extractor, Request
from diffbench.metrics import extractor as build_extractor
from diffbench.metrics.suite import KEPT, Reference
from diffbench.runs.build import device_of, load_data
from diffbench.runs.folder import read_config


def is_run(path: Path) -> bool:
    """Whether a path is a run folder."""
    return (path / "config.yaml").is_file()


def settings_of(overrides: Sequence[str], against: Path | None) -> EvaluateConfig:
    """The section `evaluate` of a command without a run: the overrides over those of the run compared with, if any.

    Raises:
        UserError: for other keys, or where no extractor is named.
    """
    changes = parse_overrides(overrides)
    for key in changes:
        if key != "evaluate":
            raise UserError(
                f"{COMMAND_LINE}: {key}: not for pictures; allowed: evaluate.KEY, as evaluate.extractor=NAME"
            )
    values = changes.get("evaluate", {})
    base: dict[str, Any] = {}
    if against is not None and is_run(against):
        theirs = _config(against).evaluate
        extractor = references.named(theirs.extractor, run_images(against))
        base = {"extractor": extractor, "weights": theirs.weights, "reference": theirs.reference}
    with _told():
        if not isinstance(values, dict):
            raise ValueError(f"evaluate: must be a section with keys, got {values!r}; write evaluate.extractor=NAME")
        if (base | values).get("extractor") is None:
            raise ValueError(f"evaluate.extractor: missing; choose from {', '.join(EXTRACTORS)}")
        found = schema.build(EvaluateConfig, base | values, "evaluate.")
    assert isinstance(found, EvaluateConfig)
    return found


def evaluate_pictures(what: Path, against: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Scores pictures against others; the record is also appended to WHAT.results.jsonl beside them.

    Args:
        what: a folder of pictures, or an npz with arr_0 (and labels in arr_1, which the extractor may judge).
        against: a run folder (its training images), a folder of pictures, an npz with arr_0, with mu and sigma or with
            both, or statistics that `reference build` wrote.
        overrides: key=value for the section `evaluate`; the count is that of the pictures.

    Raises:
        UserError: one line that says what does not fit.
    """
    settings = settings_of(overrides, against)
    pictures = open_pictures(what)
    if len(pictures) < judging.LEAST:
        raise UserError(f"{what}: holds {len(pictures)} pictures; at least {judging.LEAST} are needed")
    settings.count = len(pictures)
    extractor = extractor_for(settings, pictures.shape, against)
    judgement = _against(settings, extractor, against, pictures)
    judgement.labels, judgement.by_class = pictures.labels is not None, False
    started = time.perf_counter()
    values = judgement.scores(judging.numbered(pictures.batches(references.BATCH), pictures.labels))
    record = {
        **records.surroundings(extractor, extractor.device),
        "pictures": {"path": str(what), "sha256": pictures.identity(), "count": len(pictures)},
        **judgement.told(),
        "scoring_seconds": time.perf_counter() - started,
        **values,
    }
    records.append(what.with_name(what.name + ".results.jsonl"), record)
    return record


def extractor_for(settings: EvaluateConfig, shape: tuple[int, int, int], against: Path | None = None) -> Extractor:
    """The extractor of the settings for pictures of a shape; digits-cnn learns from the run's digits, or the package's.

    Raises:
        UserError: one line that begins with the key.
    """
    asked = Request(shape, settings.weights)
    assert settings.extractor is not None
    if settings.extractor == "digits-cnn":
        run = against is not None and is_run(against)
        digits = run_images(against) if run and against else SOURCES["digits"].load(DigitsConfig())[0]
        asked = replace(references.request(digits, None), shape=shape)
    with _told():
        return build_extractor(settings.extractor, asked).to(device_of("auto"))


def _against(settings: EvaluateConfig, extractor: Extractor, against: Path, pictures: Pictures) -> Judgement:
    if is_run(against):
        train, held_out = load_data(_config(against))
        judgement = judging.of_run(settings, train, held_out, extractor=extractor)
        if tuple(train.images.shape[1:]) != pictures.shape:
            judgement.training = None  # no pixel distance between pictures of two sizes
        return judgement
    reference, told = load_reference(extractor, against, min(len(pictures), KEPT))
    if told["count"] != len(pictures):
        print(
            f"note: {len(pictures):,} pictures against {told['count'] or 'an unknown number of'} real ones: a Fréchet"
            " distance depends on both counts; compare it with others of the same counts only"
        )
    return Judgement(extractor, len(pictures), {"fd": reference}, told)


def load_reference(extractor: Extractor, path: Path, keep: int = KEPT) -> tuple[Reference, dict[str, Any]]:
    """Statistics of a folder, an npz, or a file of statistics, and what a record says of them.

    Raises:
        UserError: if they are another extractor's.
    """
    if path.suffix == ".safetensors" and path.is_file():
        key, reference = references.read(path)
        for name, mine in (("extractor", extractor.name), ("weights", extractor.weights)):
            if key.get(name) != mine:
                raise UserError(f"{path}: {name} is {key.get(name)!r}, not {mine!r}; build it with this extractor")
        return reference, {"key": references.digest(key), "count": key["count"]}
    fits = read_statistics(path)
    if fits is None:
        return of_pictures(extractor, path, keep)
    if len(fits[0].mean) != extractor.dim:
        raise UserError(f"{path}: mu has {len(fits[0].mean)} numbers, but {extractor.name} gives {extractor.dim}")
    rows = of_pictures(extractor, path, KEPT)[0].rows if holds_pictures(path) else torch.zeros(0, extractor.dim)
    spatial = fits[1] if extractor.spatial is not None else None
    return Reference(fits[0], rows, spatial), {"key": sha256(path)[:16], "count": 0}


def of_pictures(extractor: Extractor, path: Path, keep: int = KEPT) -> tuple[Reference, dict[str, Any]]:
    """Statistics of a folder of pictures or an npz, cached; and what a record says of them."""
    pictures = open_pictures(path)
    source = {"pictures": pictures.identity(), "size": list(pictures.shape)}
    batches = partial(pictures.batches, references.BATCH)
    reference, key = references.cached(extractor, source, len(pictures), batches, keep)
    return reference, {"key": key, "count": len(pictures)}


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Blames the command line for what it asks."""
    try:
        yield
    except ValueError as e:
        raise UserError(f"{COMMAND_LINE}: {e}") from None


def run_images(run: Path) -> ImageSet:
    """The training images of a run."""
    return load_data(_config(run))[0]


def _config(run: Path) -> RunConfig:
    config = read_config(run)
    if not isinstance(config, RunConfig):
        raise UserError(f"{run}: a run of kind {config.kind}; choose a denoiser's")
    return config
