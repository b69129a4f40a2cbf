"""The schedule and order of our callbacks, and a clock of the training time alone."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any, TypeVar

import lightning as L

C = TypeVar("C", bound=L.Callback)


def at_step_end(trainer: L.Trainer, batch_idx: int) -> bool:
    """Return whether this micro-batch ended an optimizer step; the last one of an epoch always does."""
    return (batch_idx + 1) % int(trainer.accumulate_grad_batches) == 0 or trainer.is_last_batch


def is_last(trainer: L.Trainer) -> bool:
    """Return whether training has reached `max_steps` or the end of its last epoch."""
    ended = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.global_step == trainer.max_steps or ended


class Clock:
    """A count of the seconds spent training, over all resumes; validation, sampling and saving are left out."""

    def __init__(self) -> None:
        self.before = 0.0
        self._started: float | None = None

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        self.before, self._started = self.seconds, None

    @property
    def seconds(self) -> float:
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self.before + running

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent in the block out of the count."""
        running = self._started is not None
        self.stop()
        try:
            yield
        finally:
            if running:
                self.start()


class Ordered(L.Callback):
    """A callback whose position among the others matters; `setup` sorts all callbacks of this kind."""

    place = 0
    """Rank in that order, the smallest first: stop, guard, average, log, evaluate, save."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Sort the trainer's `Ordered` callbacks by `place`; other callbacks keep their positions."""
        callbacks: list[L.Callback] = list(trainer.callbacks)  # type: ignore[attr-defined]
        ours = iter(sorted((c for c in callbacks if isinstance(c, Ordered)), key=lambda c: c.place))
        # Assign a new list, because the trainer is iterating over the old one.
        trainer.callbacks = [next(ours) if isinstance(c, Ordered) else c for c in callbacks]  # type: ignore[attr-defined]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if at_step_end(trainer, batch_idx):
            self.on_step_end(trainer, pl_module)

    def on_step_end(self, trainer: L.Trainer, module: Any) -> None:
        """Act after the last micro-batch of each optimizer step; does nothing unless overridden."""


def find(trainer: L.Trainer, kind: type[C]) -> C | None:
    """Return the trainer's first callback of type `kind`, or None."""
    return next((c for c in trainer.callbacks if isinstance(c, kind)), None)  # type: ignore[attr-defined]
