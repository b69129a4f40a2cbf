"""diffbench: compare diffusion denoisers behind one common diffusion module."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffbench.runs.lifecycle import Run, load, train

__version__ = "0.1.0"
__all__ = ["Run", "load", "train"]


def __getattr__(name: str) -> Any:
    """Imports torch and the rest only when something of theirs is asked for."""
    if name in __all__:
        from diffbench.runs import lifecycle

        return getattr(lifecycle, name)
    raise AttributeError(f"module 'diffbench' has no attribute {name!r}")
