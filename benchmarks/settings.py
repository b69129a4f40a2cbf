"""What `diffbench bench` takes as key=value."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from diffbench.config.layers import COMMAND_LINE, located, parse_overrides
from diffbench.config.load import build
from diffbench.core.errors import suggest

PARTS = ("loop", "models", "variants", "pieces", "growth", "sampling")
"""loop: Lightning against a bare loop; models: forward, training and sampling steps of each network; variants: of some,
side by side with the default; pieces: data, latents, averages, distances, imports, the first step; growth: time
and memory against sizes; sampling: many images by the whole sampler."""


@dataclass
class BenchConfig:
    """What is measured, how long, and where it goes."""

    models: list[str] | None = None
    """Presets as DiT-S/2, networks of our own as ADM-S/32, or experiments as experiments/digits/dit.yaml; null takes
    those that suit the machine."""
    parts: list[str] | None = None
    """Of `PARTS`; null: what suits the length."""
    full: bool = False
    """Every preset that fits, and growth: up to an hour on two cores, in place of three minutes."""
    gpu: bool = False
    """The plan for one large GPU, at most ten minutes: published sizes in bf16."""
    tiny: bool = False
    """Shrinks every network and batch: shows in seconds that all of it runs; the numbers mean nothing."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    precision: Literal["32-true", "bf16-mixed", "64-true"] | None = None
    """null: bf16-mixed on a GPU, 32-true elsewhere."""
    batch: int | None = None
    """Images of a step, for every network; null: 8 on a CPU and 128 on a GPU, an experiment's own, or what fits."""
    repeats: int | None = None
    """Rounds in which everything is measured once; null: 3 in the short form, else 5."""
    variants: list[str] | None = None
    """Besides the known ones, as 'name: key=value key=value'; the keys are an experiment's, or bench.attention."""
    other: str | None = None
    """package.module:function, called with (model's name, its config) for another implementation of the same network,
    (x, t, y) -> output, or None where it has none; measured in turns with ours."""
    seconds: float | None = None
    """Time after which no further measurement begins; null: 170 for the short form, 540 with gpu, no end with full."""
    baseline: str | None = None
    """An older report to compare with, JSON."""
    out: str | None = None
    """The report, a name that ends in .json; the plots lie beside it. null: a new one in runs/bench."""
    force: bool = False
    """Measures on a busy machine too; the report says so."""

    def __post_init__(self) -> None:
        for part in self.parts or ():
            if part not in PARTS:
                raise ValueError(f"parts: unknown value {part!r}; choose from {', '.join(PARTS)}{suggest(part, PARTS)}")
        for name in ("batch", "repeats", "seconds"):
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
        if self.other is not None and ":" not in self.other:
            raise ValueError(f"other: must be package.module:function, got {self.other!r}")
        for variant in self.variants or ():
            name, colon, overrides = variant.partition(":")
            if not (name.strip() and colon and overrides.strip() and all("=" in word for word in overrides.split())):
                raise ValueError(f"variants: must be as 'plain: trainer.channels_last=false', got {variant!r}")

    @property
    def chosen_parts(self) -> tuple[str, ...]:
        """The parts to measure, in order."""
        if self.parts is not None:
            return tuple(part for part in PARTS if part in self.parts)
        left_out = {"growth"} if self.gpu else set() if self.full else {"growth", "sampling"}
        return tuple(part for part in PARTS if part not in left_out)

    @property
    def rounds(self) -> int:
        """In which everything is measured once."""
        return self.repeats or (5 if self.full or self.gpu else 3)

    @property
    def budget(self) -> float:
        """Seconds after which no further measurement begins."""
        if self.seconds is not None:
            return self.seconds
        return 540.0 if self.gpu else float("inf") if self.full else 170.0


def read(overrides: Sequence[str]) -> BenchConfig:
    """The settings of key=value arguments; bench.full=true and full=true are the same.

    Raises:
        UserError: naming the key that is wrong.
    """
    values = parse_overrides(overrides)
    section = values.pop("bench", {})
    values |= section if isinstance(section, dict) else {"bench": section}
    with located([(COMMAND_LINE, values)]):
        config = build(BenchConfig, values)
    assert isinstance(config, BenchConfig)
    return config
