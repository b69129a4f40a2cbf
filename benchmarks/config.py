"""The benchmark's keys, and how its time is shared out."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from diffbench.config.layers import COMMAND_LINE, located, parse_overrides
from diffbench.config.load import build
from diffbench.core.errors import suggest

Row = dict[str, Any]
T = TypeVar("T")

PARTS = ("loop", "models", "variants", "data", "growth", "sampling", "command", "busy")
"""loop: Lightning against a bare loop; models: forward, training and sampling steps of each network; variants: of some,
in turns with the default; data: loader and batches; growth: time and memory against sizes; sampling: many images by the
whole sampler; command: CPU seconds of whole commands by stage; busy: training steps beside other busy processes."""
SHORT = {"loop": 0.35, "models": 0.6, "data": 0.05}
FULL = {"loop": 1.0, "models": 1.0, "data": 1.0, "growth": 1.0, "sampling": 1.0, "command": 1.0, "busy": 1.0}
GPU = {"models": 0.75, "loop": 0.12, "sampling": 0.1, "data": 0.03}
"""Share of the time for each part, in their order: on a GPU, what is worth most comes first."""


@dataclass
class BenchConfig:
    """The networks and parts to measure, for how long, and the place of the report."""

    models: list[str] | None = None
    """Presets as DiT-S/2, networks of our own as ADM-S/32, or experiments as experiments/digits/dit.yaml; null takes
    those that suit the machine."""
    parts: list[str] | None = None
    """Of `PARTS`; null: what suits the length."""
    full: bool = False
    """Every preset that fits, and growth: up to an hour on two cores, in place of three minutes."""
    gpu: bool = False
    """The plan for one large GPU, at most ten minutes: published sizes in bf16. (On a CPU with tiny alone.)"""
    tiny: bool = False
    """Shrink every network and batch: shows in seconds that all of it runs; the numbers mean nothing."""
    batch: int | None = None
    """Images of a step, for every network; null: 8 on a CPU, 128 or 512 on a GPU, or an experiment's own."""
    variants: list[str] | None = None
    """Besides the known ones, as 'name: key=value key=value'; the keys are an experiment's."""
    seconds: float | None = None
    """Time after which no further measurement begins; null: 170 for the short form, 540 with gpu, no end with full or
    with parts that the short form lacks."""
    baseline: str | None = None
    """An older report to compare with, JSON."""
    out: str | None = None
    """The report, a name that ends in .json; the plot lies beside it. null: a new one in runs/bench."""
    force: bool = False
    """Measure on a busy machine too; the report says so."""

    def __post_init__(self) -> None:
        for part in self.parts or ():
            if part not in PARTS:
                raise ValueError(f"parts: unknown value {part!r}; choose from {', '.join(PARTS)}{suggest(part, PARTS)}")
        for name in ("batch", "seconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: must be positive, got {value}")
        for name in ("models", "parts"):
            if getattr(self, name) == []:
                raise ValueError(f"{name}: must hold at least one, or be null, got []")
        if self.full and self.gpu:
            raise ValueError("gpu: has a length of its own; leave out full")
        if self.out is not None and not self.out.endswith(".json"):
            raise ValueError(f"out: must end in .json, got {self.out!r}")
        for variant in self.variants or ():
            name, colon, overrides = variant.partition(":")
            if not (name.strip() and colon and overrides.strip() and all("=" in word for word in overrides.split())):
                raise ValueError(f"variants: must be as 'plain: trainer.channels_last=false', got {variant!r}")
            if "trainer.compile=auto" in overrides.split():
                raise ValueError("variants: trainer.compile=auto follows the machine; choose none, block or model")

    @property
    def shares(self) -> dict[str, float]:
        """Share of the time for each part that is measured, in order; variants are measured with the models."""
        plan = GPU if self.gpu else FULL if self.full else SHORT
        if self.parts is None:
            return plan
        asked = {"models" if part == "variants" else part for part in self.parts}
        return {part: plan.get(part, 0.2) for part in dict.fromkeys([*plan, *FULL]) if part in asked}

    @property
    def with_variants(self) -> bool:
        """Whether variants are measured beside each network's default."""
        return self.parts is None or "variants" in self.parts

    @property
    def rounds(self) -> int:
        """Times that everything is measured."""
        return 2 if self.tiny else 5 if self.full or self.gpu else 3

    @property
    def budget(self) -> float:
        """Seconds after which no further measurement begins."""
        if self.seconds is not None:
            return self.seconds
        long = self.parts is not None and not {*SHORT, "variants"} & set(self.parts)
        return 540.0 if self.gpu else math.inf if self.full or long else 170.0


def shared(items: Sequence[T], deadline: float) -> Iterator[tuple[T, float | None]]:
    """Items, each with its own deadline: an equal part of the time left; None where no time is left.

    Args:
        items: what is measured.
        deadline: of all of them, on `time.monotonic`'s clock.
    """
    for i, item in enumerate(items):
        left = deadline - time.monotonic()
        yield item, time.monotonic() + left / (len(items) - i) if left > 0 else None


def read(overrides: Sequence[str]) -> BenchConfig:
    """The settings of key=value arguments.

    Raises:
        UserError: naming the key that is wrong.
    """
    values = parse_overrides(overrides)
    with located([(COMMAND_LINE, values)]):
        return build(BenchConfig, values)
