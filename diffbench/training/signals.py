"""SIGTERM and SIGINT during training: the first one saves the state and stops, a second one stops at once."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import lightning as L

from diffbench.core import distributed
from diffbench.training.clock import Ordered

T = TypeVar("T")


class Interrupted(Exception):
    """An evaluation was interrupted by a signal; the resumed run repeats it."""


class StopOnSignal(Ordered):
    """Callback that handles SIGTERM and SIGINT during training.

    The first signal requests a stop at the end of the current step, or between two batches of a running validation or
    grid. The checkpoint lists an interrupted evaluation, and the resumed run does it first. With several ranks,
    all of them check together about once a second whether one received a signal, and stop at the same step.

    A trainer that resumes after the last of `max_steps` must be given one step more, or Lightning would call no hooks;
    this callback restores the true limit before the others act.
    """

    def __init__(self, folder: Path, max_steps: int) -> None:
        self.folder, self.max_steps = folder, max_steps
        self.number: int | None = None
        """Number of the first signal; all ranks know it once they have checked."""
        self.pending: list[str] = []
        """State keys of the callbacks whose evaluation was interrupted."""
        self._received_at = 0.0  # time of the first signal
        self._agreed = False
        self._last_check, self._next_check = (0, 0.0), 0  # step and time of the last check, step of the next
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.fit_loop.epoch_loop.max_steps = self.max_steps
        present = [callback.state_key for callback in trainer.callbacks]  # type: ignore[attr-defined]
        self.pending = [key for key in self.pending if key in present]  # an evaluation may have been switched off since
        self._last_check, self._next_check = (trainer.global_step, time.monotonic()), trainer.global_step
        with contextlib.suppress(ValueError):  # handlers can be set in the main thread only
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            if time.monotonic() - self._received_at < distributed.SIGNAL_DEBOUNCE_S:
                return
            self._restore_handlers()
            self._print("stopped without saving the state")
            raise SystemExit(128 + number)
        self._note(number)
        self._print("saving the state; a second signal or Ctrl-C stops without saving")

    def _note(self, number: float) -> None:
        if number and self.number is None:
            self.number, self._received_at = int(number), time.monotonic()

    def _print(self, text: str) -> None:
        if distributed.rank() == 0:  # print is not reentrant, and the signal may have interrupted one
            os.write(2, f"{self.folder}: {text}\n".encode())

    def check(self) -> None:
        """Raise Interrupted if a signal was received."""
        if self.number is not None:
            raise Interrupted

    def interruptible(self, work: Callable[[], T]) -> T:
        """Return the result of `work`, which calls `check` regularly; Interrupted on all ranks if one was stopped."""
        results: list[T] = []
        with contextlib.suppress(Interrupted):
            self.check()
            results.append(work())
        stopped, number = distributed.all_reduce_max([float(not results), float(self.number or 0)])
        if stopped:
            self._note(number)
            self._agreed = True
            raise Interrupted
        return results[0]

    @property
    def agreed(self) -> bool:
        """Whether all ranks know that a signal was received."""
        return self.number is not None and (self._agreed or distributed.world_size() == 1)

    def should_stop_at(self, step: int) -> bool:
        """Return whether to stop after this step; the same on all ranks."""
        if distributed.world_size() > 1 and not self._agreed:
            if step < self._next_check:
                return False
            now, (last_step, last_time) = time.monotonic(), self._last_check
            number, pace = distributed.all_reduce_max([self.number or 0, (now - last_time) / max(1, step - last_step)])
            self._note(number)
            self._last_check, self._next_check = (step, now), step + min(1000, max(1, int(1 / max(pace, 1e-3))))
        return self.number is not None

    def state_dict(self) -> dict[str, Any]:
        return {"owed": list(self.pending)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.pending = list(state_dict["owed"])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore_handlers()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        """Restore the previous handlers, before Lightning removes its own."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
