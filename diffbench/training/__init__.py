"""LightningModules and callbacks for any Lightning Trainer, each imported on first use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffbench.training.callbacks import SampleGrid, ValidationError
    from diffbench.training.diffusion import DiffusionModule
    from diffbench.training.distances import FrechetDistance
    from diffbench.training.ema import EMA

__all__ = ["EMA", "DiffusionModule", "FrechetDistance", "SampleGrid", "ValidationError"]
_PLACES = dict(zip(__all__, ("ema", "diffusion", "distances", "callbacks", "callbacks"), strict=True))


def __getattr__(name: str) -> Any:
    """Import a name's module, and with it Lightning, on first use."""
    if name in _PLACES:
        return getattr(importlib.import_module(f"diffbench.training.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'diffbench.training' has no attribute {name!r}")
