"""When things are due, and how long training itself took."""

import contextlib
import time
from collections.abc import Iterator

import lightning as L


def due(before: int, now: int, every: int) -> bool:
    """Whether the images seen, `before` the last step and `now`, have just reached a multiple of `every`."""
    return now // every > before // every


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
