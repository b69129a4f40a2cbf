"""What a report knows of each result: its run folder and its values, and whether they may stand side by side."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from diffbench.core.errors import UserError
from diffbench.denoisers.flops import Cost
from diffbench.evaluation.records import difference, values
from diffbench.reports.measures import ImageErrors, read_validation
from diffbench.reports.results import Comparison, Result
from diffbench.reports.wording import HIGHER, LOWER, short
from diffbench.runs.seen import Seen, begun

NOT_PROTOCOL = ("data.num_workers", "data.flip", "data.path")
"""Keys of the data that leave the validation error comparable."""


@dataclass(eq=False)
class Entry:
    """One result with what is known of its run; results of one run share a `Seen`."""

    result: Result
    seen: Seen | None
    errors_of: dict[Path, ImageErrors | None] = field(default_factory=dict, repr=False)
    """Folder -> its validation errors; one for all entries."""

    @property
    def complete(self) -> bool:
        """Whether it counts."""
        return self.result.status == "complete"

    @cached_property
    def values(self) -> dict[str, float]:
        """Every number under its full name: the last validation errors, then the record's."""
        found: dict[str, float] = {}
        for line in self.seen.metrics if self.seen else ():
            found |= {name: value for name, value in line.items() if name.startswith("val/")}
        return found | (values(self.result.record) if self.result.record else {})

    @cached_property
    def cost(self) -> Cost | None:
        """Of its network; None where that cannot be counted here."""
        try:
            return self.seen.cost if self.seen else None
        except (UserError, ValueError, OSError):
            return None

    @property
    def flops(self) -> float | None:
        """Of training: twice the multiply-accumulates, three times the forward pass, for each image."""
        return None if self.cost is None or self.seen is None else self.cost.training_flops(self.seen.images_seen)

    @cached_property
    def peak_gb(self) -> float | None:
        """Largest memory on a GPU, where it was logged."""
        logged = [m["perf/peak_gpu_gb"] for m in (self.seen.metrics if self.seen else ()) if "perf/peak_gpu_gb" in m]
        return max(logged, default=None)

    @cached_property
    def image_errors(self) -> ImageErrors | None:
        """Validation errors of single images, of the weights that the run holds now."""
        if self.seen is None:
            return None
        if self.seen.folder not in self.errors_of:
            self.errors_of[self.seen.folder] = read_validation(self.seen.folder)
        found = self.errors_of[self.seen.folder]
        return found if found is not None and found.images == self.seen.images_seen else None


def entries(comparison: Comparison, known: Sequence[Seen] = ()) -> list[Entry]:
    """All results of a comparison, each folder looked at once, and not again where it is `known`.

    Raises:
        UserError: if records were measured differently, saying how.
    """
    looked: dict[Path, Seen | None] = {run.folder: run for run in known}
    errors: dict[Path, ImageErrors | None] = {}
    found = []
    for result in comparison.results:
        if result.folder not in looked:
            looked[result.folder] = begun(result.folder)
        found.append(Entry(result, looked[result.folder], errors))
    _check_primary(comparison.primary)
    _check_records(found)
    return found


def _check_primary(primary: str) -> None:
    if short(primary) not in (*LOWER, *HIGHER):
        raise UserError(f"primary: {primary} ranks nobody; choose from {', '.join((*LOWER, *HIGHER))}")


def _check_records(found: Sequence[Entry]) -> None:
    """Refuses what was measured differently: all of it within a variant, all but what is asked between them.

    Variants of the same runs may be measured by other extractors or counts: their values have other names.
    """
    seeds: dict[str, Entry] = {}
    shared = _runs_are_shared(found)
    sampling = shared or _sampling_is_asked(found)
    firsts: dict[frozenset[str], Entry] = {}
    for entry in found:
        if entry.result.record is None:
            continue
        alike = seeds.setdefault(entry.result.variant, entry)
        measured = frozenset(name.rpartition("/")[2] for name in values(entry.result.record)) if shared else frozenset()
        first = firsts.setdefault(measured, entry)
        for other, loose in ((alike, False), (first, sampling)):
            one, two = (_record(e, loose) for e in (other, entry))
            if (told := difference(one, two)) is not None:
                raise UserError(
                    f"{other.result.folder} and {entry.result.folder}: measured differently: {told}; evaluate both"
                    " with the same keys to compare them"
                )


def _record(entry: Entry, loose: bool) -> dict[str, Any]:
    record = entry.result.record or {}
    return {**record, "sample": None, "guidance": None} if loose else record


def _runs_are_shared(found: Sequence[Entry]) -> bool:
    variants: dict[Path, str] = {}
    return any(variants.setdefault(e.result.folder, e.result.variant) != e.result.variant for e in found)


def _sampling_is_asked(found: Sequence[Entry]) -> bool:
    """Whether variants are meant to be sampled differently, as their configs say."""
    keys = ("process.name", "sample.sampler", "sample.steps", "sample.clip", "sample.guidance")
    return len({tuple(e.seen.flat.get(key) for key in keys) for e in found if e.seen}) > 1


def common_data(found: Sequence[Entry]) -> str | None:
    """How the held-out images or the levels of validation differ between runs, in words; None where they agree."""
    first: dict[str, Any] | None = None
    for entry in found:
        if entry.seen is None:
            continue
        wanted = {
            key: value
            for key, value in entry.seen.flat.items()
            if (key.startswith(("data.", "validation.")) or key == "autoencoder") and key not in NOT_PROTOCOL
        }
        first = first or wanted
        for key in sorted(first | wanted):
            if first.get(key) != wanted.get(key):
                return f"{key} is {first.get(key)} in one and {wanted.get(key)} in the other"
    return None


def resolved(found: Sequence[Entry], metric: str) -> str | None:
    """The full name of a metric given up to its extractor or count, as results have it; None where none has it.

    "fd" is also "fid", which is what the Fréchet distance of the published protocol is called.
    """
    alike = {"fd": ("fd", "fid"), "kid": ("kid",)}.get(metric, (metric,))
    for entry in found:
        for name in entry.values:
            if name == metric or short(name) in alike:
                return name
    return None
