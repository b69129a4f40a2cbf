"""diffbench: compare diffusion denoisers behind one common diffusion module."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffbench.runs.base import Run
    from diffbench.runs.lifecycle import load, train

__version__ = "0.1.0"
__all__ = ["Run", "load", "train"]


def __getattr__(name: str) -> Any:
    """Imports torch and the rest only when something of theirs is asked for."""
    if name in __all__:
        from diffbench.runs import base, lifecycle

        return getattr(base if name == "Run" else lifecycle, name)
    raise AttributeError(f"module 'diffbench' has no attribute {name!r}")
