"""Checkpoints to resume from: written atomically, verified before use, and saved at the end and on a signal too."""

import contextlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch.utils._pytree import tree_leaves, tree_map_only

from diffbench.core import distributed
from diffbench.core.errors import UserError
from diffbench.core.files import atomic, sha256, write_text
from diffbench.core.tensors import read_state
from diffbench.training.clock import Clock, Ordered
from diffbench.training.signals import StopOnSignal


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint IO that writes a temporary file, syncs it, writes a checksum for `sha256sum -c`, and renames the file.

    Args:
        background: write a copy of the state from a thread while training continues. The next save waits for it, and so
            does `join`, which must be called at the end; both raise an error of the thread. (Lightning's
            AsyncCheckpointIO keeps its copies on the GPU.)
        keep: number of checkpoints to keep in the folder, the newest ones; None for all.
    """

    def __init__(self, background: bool = False, keep: int | None = None) -> None:
        super().__init__()
        self.background, self.keep = background, keep
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.join()
        if not self.background:
            self._write(checkpoint, Path(path))
            return
        copied = tree_map_only(torch.Tensor, lambda t: t.detach().to("cpu", copy=True), checkpoint)
        self._writing = self._writer.submit(self._write, copied, Path(path))  # the process waits for it at exit

    def join(self) -> None:
        """Wait until the last checkpoint is written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, checkpoint: dict[str, Any], target: Path) -> None:
        staged = target.with_name(f".{target.name}.staged")
        size = sum(leaf.nbytes for leaf in tree_leaves(checkpoint) if isinstance(leaf, torch.Tensor))
        with atomic(staged, size, called=target) as file:
            torch.save(checkpoint, file)
        write_text(_checksum(target), f"{sha256(staged)}  {target.name}\n")
        os.replace(staged, target)
        for path in all_steps(target.parent)[: -self.keep] if self.keep else []:
            path.unlink()
            _checksum(path).unlink(missing_ok=True)

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        state = read_state(path, map_location)
        missing = [key for key in ("state_dict", "optimizer_states", "callbacks", "loops") if key not in state]
        if missing:
            raise UserError(f"{path}: is not a training checkpoint ({missing[0]} is missing); remove it")
        return state


def newest(folder: Path) -> Path | None:
    """Return the newest checkpoint that matches its checksum; None if there is none, UserError if all are damaged."""
    found = all_steps(folder)
    for path in reversed(found):
        if verified(path):
            return path
        print(f"warning: {path} is damaged (its checksum differs): trying the previous one")
    if found:
        raise UserError(f"{folder}: no checkpoint is intact; move the folder away to start over")
    return None


def verified(path: Path) -> bool:
    """Return whether a checkpoint matches its checksum file."""
    with contextlib.suppress(OSError):
        return _checksum(path).read_text().split()[:1] == [sha256(path)]
    return False


def all_steps(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first."""
    return sorted((p for p in folder.glob("step-*.ckpt") if p.stem[5:].isdecimal()), key=step_of)


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def pending(path: Path) -> list[str]:
    """Return the evaluations that a signal interrupted at a checkpoint's step; a resumed run does them first."""
    state: dict[str, Any] = read_state(path, "meta").get("callbacks", {})
    return list(state.get("StopOnSignal", {}).get("owed", []))


def _checksum(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


class SaveState(Ordered):
    """Callback that saves a checkpoint every `every` images, at the last step, and at the end of a step after a signal.

    It acts last, so that a checkpoint includes what the other callbacks did at its step.
    """

    place = 5

    def __init__(self, folder: Path, every: int, clock: Clock, stop: StopOnSignal) -> None:
        self.folder, self.every, self.clock, self.stop = folder, every, clock, stop

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = trainer.global_step
        if distributed.all_reduce_max([step, -step]) != [step, -step]:
            raise UserError(f"{self.folder}: the processes see different checkpoints; is the folder the same for all?")
        if step == trainer.max_steps:  # resumed only to do the pending evaluations, which are done by now
            self.save(trainer)
        trainer.should_stop = self.stop.agreed

    def on_step_end(self, trainer: L.Trainer, module: Any) -> None:
        step, stopping = trainer.global_step, self.stop.should_stop_at(trainer.global_step)
        if stopping or step == trainer.max_steps or module.is_due(self.every):
            with self.clock.paused():
                self.save(trainer)
        if stopping:
            trainer.should_stop = True

    def save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.folder / f"step-{trainer.global_step}.ckpt")
