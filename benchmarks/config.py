"""The benchmark's config, and the division of its time."""

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
"""loop: Lightning against a bare loop; models: forward, training and sampling steps of each network; variants: other
ways to run one, interleaved with the default; data: loader and batches; growth: time and memory against size; sampling:
many images with all steps; command: CPU seconds of commands by stage; busy: training next to other busy processes."""
SHORT = {"loop": 0.35, "models": 0.6, "data": 0.05}
FULL = {"loop": 1.0, "models": 1.0, "data": 1.0, "growth": 1.0, "sampling": 1.0, "command": 1.0, "busy": 1.0}
GPU = {"models": 0.75, "loop": 0.12, "sampling": 0.1, "data": 0.03}
"""Share of the time for each part, in the order they run: on a GPU, the most valuable part comes first."""


@dataclass
class BenchConfig:
    """The networks and parts to measure, the time to spend, and the path of the report."""

    models: list[str] | None = None
    """Presets (DiT-S/2), custom networks (ADM-S/32) or experiments (experiments/digits/dit.yaml); null: those that suit
    the machine."""
    parts: list[str] | None = None
    """Some of loop, models, variants, data, growth, sampling, command and busy; null: those of the short form, or of
    full or gpu."""
    full: bool = False
    """Measure every preset that fits, and every part: up to an hour on two cores instead of three minutes."""
    gpu: bool = False
    """Measure published sizes in bf16 on one large GPU, for at most ten minutes. (Runs on a CPU only with tiny.)"""
    tiny: bool = False
    """Shrink every network and batch, to test within seconds that everything runs; the numbers mean nothing."""
    batch: int | None = None
    """Batch size of every network; null: 8 on a CPU, 128 or 512 on a GPU, or that of the experiment."""
    variants: list[str] | None = None
    """Additional variants, such as 'name: key=value key=value', with keys of an experiment."""
    seconds: float | None = None
    """Time after which no further measurement begins; null: 170 for the short form, 540 with gpu, unlimited with full
    or if none of the parts is in the short form."""
    baseline: str | None = None
    """An older JSON report to compare with."""
    out: str | None = None
    """Path of the report, ending in .json; the plots are saved next to it. null: a new file in runs/bench."""
    force: bool = False
    """Measure even if the machine is busy; the report records this."""

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
                raise ValueError(f"{name}: must contain at least one, or be null, got []")
        if self.full and self.gpu:
            raise ValueError("gpu: sets its own length; leave out full")
        if self.out is not None and not self.out.endswith(".json"):
            raise ValueError(f"out: must end in .json, got {self.out!r}")
        for variant in self.variants or ():
            name, colon, overrides = variant.partition(":")
            if not (name.strip() and colon and overrides.strip() and all("=" in word for word in overrides.split())):
                raise ValueError(f"variants: must look like 'plain: trainer.channels_last=false', got {variant!r}")
            if "trainer.compile=auto" in overrides.split():
                raise ValueError("variants: trainer.compile=auto depends on the machine; choose none, block or model")

    @property
    def shares(self) -> dict[str, float]:
        """Shares of the time of the parts to measure, in order; variants are measured with the models."""
        plan = GPU if self.gpu else FULL if self.full else SHORT
        if self.parts is None:
            return plan
        parts = {"models" if part == "variants" else part for part in self.parts}
        return {part: plan.get(part, 0.2) for part in dict.fromkeys([*plan, *FULL]) if part in parts}

    @property
    def with_variants(self) -> bool:
        """Whether to measure variants in addition to the default of each network."""
        return self.parts is None or "variants" in self.parts

    @property
    def rounds(self) -> int:
        """Number of times to measure everything."""
        return 2 if self.tiny else 5 if self.full or self.gpu else 3

    @property
    def budget(self) -> float:
        """Seconds after which no further measurement begins."""
        if self.seconds is not None:
            return self.seconds
        long = self.parts is not None and not {*SHORT, "variants"} & set(self.parts)
        return 540.0 if self.gpu else math.inf if self.full or long else 170.0


def shared(items: Sequence[T], deadline: float) -> Iterator[tuple[T, float | None]]:
    """Yield each item with its own deadline, which gives it an equal part of the time left, or None if none is left.

    Args:
        items: the things to measure.
        deadline: the deadline of all of them, on the clock of `time.monotonic`.
    """
    for i, item in enumerate(items):
        left = deadline - time.monotonic()
        yield item, time.monotonic() + left / (len(items) - i) if left > 0 else None


def read(overrides: Sequence[str]) -> BenchConfig:
    """Read the config from key=value arguments.

    Raises:
        UserError: naming the key that is wrong.
    """
    values = parse_overrides(overrides)
    with located([(COMMAND_LINE, values)]):
        return build(BenchConfig, values)
