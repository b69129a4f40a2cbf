"""The order in which our callbacks act, whatever order a trainer was given them in."""

from typing import TypeVar

import lightning as L

C = TypeVar("C", bound=L.Callback)


class Ordered(L.Callback):
    """A callback whose place among the others matters: it puts them in order as training is set up."""

    place = 0
    """Those with a smaller number act first: stop, guard, average, log, evaluate, save."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Orders the trainer's callbacks of this kind among themselves; others stay where they are."""
        callbacks: list[L.Callback] = list(trainer.callbacks)  # type: ignore[attr-defined]
        ours = iter(sorted((c for c in callbacks if isinstance(c, Ordered)), key=lambda c: c.place))
        # A new list: the trainer is going through the old one.
        trainer.callbacks = [next(ours) if isinstance(c, Ordered) else c for c in callbacks]  # type: ignore[attr-defined]


def find(trainer: L.Trainer, kind: type[C]) -> C | None:
    """The trainer's callback of a kind, or None."""
    return next((c for c in trainer.callbacks if isinstance(c, kind)), None)  # type: ignore[attr-defined]
