"""The times and the order at which our callbacks act, and the seconds of training itself."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any, TypeVar

import lightning as L

C = TypeVar("C", bound=L.Callback)


def at_step_end(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether this micro-batch ended an optimizer step; an epoch's last one always does."""
    return (batch_idx + 1) % int(trainer.accumulate_grad_batches) == 0 or trainer.is_last_batch


def is_last(trainer: L.Trainer) -> bool:
    """Whether all steps are done, or all epochs."""
    ended = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.global_step == trainer.max_steps or ended


class Clock:
    """Counts seconds of training over all resumes, without validation, sampling and saving."""

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
        """Leaves a block out of the count."""
        running = self._started is not None
        self.stop()
        try:
            yield
        finally:
            if running:
                self.start()


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

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if at_step_end(trainer, batch_idx):
            self.on_step_end(trainer, pl_module)

    def on_step_end(self, trainer: L.Trainer, module: Any) -> None:
        """Called after the last micro-batch of each optimizer step."""


def find(trainer: L.Trainer, kind: type[C]) -> C | None:
    """The trainer's callback of a kind, or None."""
    return next((c for c in trainer.callbacks if isinstance(c, kind)), None)  # type: ignore[attr-defined]
