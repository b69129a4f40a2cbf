"""A rank of a job under test: it trains like `diffbench.runs.worker` until a fault is injected at a given step."""

import functools
import os
import signal
from collections.abc import Callable
from typing import Any

from diffbench.core import distributed
from diffbench.evaluation import validation_error
from diffbench.runs import worker
from diffbench.training.checkpoint import SaveState


def faulty_worker(fault: str, rank: int, step: int) -> Callable[..., int]:
    """Return a worker main in which rank `rank`, at step `step`, raises (`raise`), kills itself (`kill`) or sends
    SIGTERM to the launcher (`signal`); with `interrupt` it sends SIGTERM to itself when a validation begins."""
    return functools.partial(_main, fault, rank, step)


def _main(fault: str, rank: int, step: int, *arguments: str) -> int:
    step_end, sums = SaveState.on_train_batch_end, validation_error.error_sums

    def interrupted_sums(*arguments: Any, **options: Any) -> Any:
        if distributed.rank_and_world()[0] == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return sums(*arguments, **options)

    if fault == "interrupt":
        validation_error.error_sums = interrupted_sums
        return worker.main(*arguments)

    def fail_at_step(self: SaveState, trainer: Any, *rest: Any) -> None:
        if distributed.rank_and_world()[0] == rank and trainer.global_step == step:
            if fault == "raise":
                raise RuntimeError(f"rank {rank} meets its end")
            os.kill(
                os.getpid() if fault == "kill" else os.getppid(), signal.SIGKILL if fault == "kill" else signal.SIGTERM
            )
        step_end(self, trainer, *rest)

    SaveState.on_train_batch_end = fail_at_step  # type: ignore[method-assign]
    return worker.main(*arguments)
