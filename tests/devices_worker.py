"""A rank of a job under test: it trains as `diffbench.runs.worker` does, but for what befalls it at a step."""

import functools
import os
import signal
from collections.abc import Callable
from typing import Any

from diffbench.core import distributed
from diffbench.evaluation import validation_error
from diffbench.runs import worker
from diffbench.training.checkpoint import SaveState


def befallen(what: str, rank: int, step: int) -> Callable[..., int]:
    """A worker of which rank `rank`, at step `step`, meets an error (`raise`), SIGKILL (`kill`), sends the launcher
    SIGTERM (`signal`), or itself, when it begins to validate (`interrupt`)."""
    return functools.partial(_main, what, rank, step)


def _main(what: str, rank: int, step: int, *arguments: str) -> int:
    step_end, sums = SaveState.on_train_batch_end, validation_error.error_sums

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if distributed.rank_and_world()[0] == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return sums(*arguments, **options)

    if what == "interrupt":
        validation_error.error_sums = interrupted
        return worker.main(*arguments)

    def befalls(self: SaveState, trainer: Any, *rest: Any) -> None:
        if distributed.rank_and_world()[0] == rank and trainer.global_step == step:
            if what == "raise":
                raise RuntimeError(f"rank {rank} meets its end")
            os.kill(
                os.getpid() if what == "kill" else os.getppid(), signal.SIGKILL if what == "kill" else signal.SIGTERM
            )
        step_end(self, trainer, *rest)

    SaveState.on_train_batch_end = befalls  # type: ignore[method-assign]
    return worker.main(*arguments)
