"""Rules of data sets whose labels are tasks."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """Decides without a network whether images solve the tasks of their labels.

    Attributes:
        holds: (images (B, C, H, W) uint8 on the CPU, labels (B,)) -> (B,) bool.
        abilities: the ability that each label's task asks for.
    """

    holds: Callable[[Tensor, Tensor], Tensor]
    abilities: tuple[str, ...]
