"""SIGTERM and SIGINT in training: the first saves the state and stops, a later second one stops at once."""

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
    """Raised when a signal interrupts an evaluation, which the resumed run repeats."""


class StopOnSignal(Ordered):
    """Handles SIGTERM and SIGINT while training runs.

    The first signal asks for a stop: at the next step's end, or, where a validation or a grid is under way, between two
    of its batches. What was interrupted is written into the checkpoint as owed, and done first after a resume. Several
    ranks look together whether one of them got a signal, about once a second, and stop at the same step.

    A trainer that resumes after the last of `max_steps` needs one more as its own limit, since Lightning would call no
    hook; the limit is put right before the others act.
    """

    def __init__(self, folder: Path, max_steps: int) -> None:
        self.folder, self.max_steps = folder, max_steps
        self.number: int | None = None
        """Of the first signal; on several ranks known to all once they have looked."""
        self.owed: list[str] = []
        """State keys of the callbacks whose evaluation was interrupted."""
        self._since = 0.0  # when the first signal came
        self._agreed = False
        self._looked, self._look_at = (0, 0.0), 0  # step and time of the last look, step of the next
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.fit_loop.epoch_loop.max_steps = self.max_steps
        here = [callback.state_key for callback in trainer.callbacks]  # type: ignore[attr-defined]
        self.owed = [key for key in self.owed if key in here]  # an evaluation may have been switched off since
        self._looked, self._look_at = (trainer.global_step, time.monotonic()), trainer.global_step
        with contextlib.suppress(ValueError):  # signals reach the main thread only
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            if time.monotonic() - self._since < distributed.AGAIN:
                return
            self._restore_handlers()
            self._answer("stopped without saving the state")
            raise SystemExit(128 + number)
        self._note(number)
        self._answer("saving the state; a second signal or Ctrl-C stops without")

    def _note(self, number: float) -> None:
        if number and self.number is None:
            self.number, self._since = int(number), time.monotonic()

    def _answer(self, text: str) -> None:
        if distributed.rank() == 0:  # not by print, which may be under way itself
            os.write(2, f"{self.folder}: {text}\n".encode())

    def check(self) -> None:
        """Raises Interrupted after a signal."""
        if self.number is not None:
            raise Interrupted

    def interruptible(self, work: Callable[[], T]) -> T:
        """The result of work that calls `check` now and then; Interrupted on all ranks, if a signal stopped one."""
        found: list[T] = []
        with contextlib.suppress(Interrupted):
            self.check()
            found.append(work())
        stopped, number = distributed.all_reduce_max([float(not found), float(self.number or 0)])
        if stopped:
            self._note(number)
            self._agreed = True
            raise Interrupted
        return found[0]

    @property
    def agreed(self) -> bool:
        """Whether all ranks know of a signal."""
        return self.number is not None and (self._agreed or distributed.world_size() == 1)

    def asked(self, step: int) -> bool:
        """Whether to stop after this step; the same on all ranks."""
        if distributed.world_size() > 1 and not self._agreed:
            if step < self._look_at:
                return False
            now, (before, since) = time.monotonic(), self._looked
            number, pace = distributed.all_reduce_max([self.number or 0, (now - since) / max(1, step - before)])
            self._note(number)
            self._looked, self._look_at = (step, now), step + min(1000, max(1, int(1 / max(pace, 1e-3))))
        return self.number is not None

    def state_dict(self) -> dict[str, Any]:
        return {"owed": list(self.owed)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.owed = list(state_dict["owed"])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore_handlers()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        """Puts back the earlier handlers, before Lightning takes away its own."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
