"""When things are due, and how long training itself took."""

import contextlib
import time
from collections.abc import Iterator

import lightning as L


def due(step: int, batch_size: int, every: int) -> bool:
    """Whether the images seen after `step` steps have just reached a multiple of `every`."""
    return step * batch_size // every > (step - 1) * batch_size // every


def at_step_end(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether this micro-batch ended an optimizer step."""
    return (batch_idx + 1) % int(trainer.accumulate_grad_batches) == 0


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
