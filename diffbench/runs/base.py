"""What runs of every kind share: a folder, a config, one network, and how training begins, resumes and ends."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from diffbench.config.kinds import BaseConfig
from diffbench.config.layers import blaming
from diffbench.config.load import flatten, to_dict, to_yaml
from diffbench.core import ranks
from diffbench.core.errors import UserError
from diffbench.core.files import sweep
from diffbench.denoisers.flops import Cost
from diffbench.runs import weights
from diffbench.runs.folder import read_config, update_length
from diffbench.training.speed import keep_memory

if TYPE_CHECKING:
    from lightning import Callback, LightningDataModule

    from diffbench.training.ema import EMA
    from diffbench.training.logger import RunLog
    from diffbench.training.module import Module

HPARAMS = ("denoiser.name", "process.name", "sample.sampler", "optimizer.lr", "trainer.batch_size", "seed")

C = TypeVar("C", bound=BaseConfig)


class Trained(ABC, Generic[C]):
    """A run folder with its network. A kind says how it is built, what trains it, and what it shows meanwhile.

    Attributes:
        folder: where it lies.
        config: its resolved config.
        network: with averaged weights after `use_average`.
        ema: decay of the average that the network holds then.
        images_seen: of the weights that were loaded.
        snapshot: "last", or "best" after `use_best`.
        lock: open file that holds the folder, for the processes that train it.
    """

    lock: int | None = None

    def __init__(self, folder: Path, config: C) -> None:
        self.folder, self.config = folder, config
        keep_memory()
        torch.manual_seed(config.seed)
        self.network = self.build()
        if config.trainer.channels_last:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = config.ema.decays[0]
        self.images_seen = 0
        self.snapshot = "last"

    @abstractmethod
    def build(self) -> nn.Module:
        """The network, initialised from the default generator."""

    @property
    @abstractmethod
    def cost(self) -> Cost:
        """Parameters and multiply-accumulates of the network."""

    @abstractmethod
    def module(self) -> "Module":
        """What is trained."""

    @abstractmethod
    def data(self) -> "LightningDataModule":
        """The batches."""

    @abstractmethod
    def scores(self, log: "RunLog", ema: "EMA") -> "list[Callback]":
        """What is measured and drawn in training."""

    @classmethod
    @abstractmethod
    def check(cls, config: Any) -> None:
        """Finds what would fail only once a run is under way: in seconds, before anything is written.

        Raises:
            ValueError: a line that begins with the key.
        """

    @classmethod
    def start(cls, config: Any) -> dict[str, Tensor] | None:
        """The weights that training starts from, or None for fresh ones."""
        return None

    def use_average(self, decay: float) -> None:
        """Loads the average of a decay into the network.

        Raises:
            UserError: if the run keeps no such average, has no weights yet, or those of another network.
        """
        averaged, self.images_seen = weights.read(self.folder, self.config, self.network, decay)
        wrong = weights.mismatch(self.network.state_dict(), averaged)
        if wrong:
            raise UserError(f"{self.folder}: holds the weights of another network than its config.yaml says: {wrong}")
        self.network.load_state_dict(averaged, strict=True)
        self.network.eval()
        self.ema, self.snapshot = decay, "last"

    def use_best(self) -> None:
        """Loads the averaged weights of the least distance in training into the network.

        Raises:
            UserError: if the run keeps none.
        """
        best, self.images_seen, self.ema = weights.read_best(self.folder)
        self.network.load_state_dict(best, strict=True)
        self.network.eval()
        self.snapshot = "best"

    def fit(self, existed: bool, start: dict[str, Tensor] | None) -> None:
        """Trains, resumes, or finds the run complete; exports its averages.

        Several processes are started from here, unless torchrun or srun has started them: then each calls this.

        Raises:
            SystemExit: if one of them failed, which has told why.
        """
        from diffbench.training.checkpoint import newest, step_of

        settings = self.config.trainer
        sweep(self.folder)
        checkpoint = newest(self.folder / "checkpoints") if existed else None
        done = step_of(checkpoint) if checkpoint else 0
        images = done * settings.batch_size
        if checkpoint and done >= settings.max_steps:
            print(f"{self.folder}: complete at {images:,} images")
            if ranks.leads() and not weights.export_path(self.folder, self.config.ema.decays[0]).exists():
                weights.export_from(checkpoint, self.folder, self.network, images)
            return
        if existed and ranks.leads():
            update_length(self.folder, self.config)
        if checkpoint is None and start is not None:
            print(f"weights start from {getattr(self.config, 'init_from', None)}")
        state = f"resuming at {images:,} images" if checkpoint else "starting"
        cost = f"{self.cost.parameters:,} parameters, {self.cost.gmacs:.4f} GMACs"
        print(f"{self.folder}: {state}, {cost}, {settings.precision}")
        for path in self.folder.glob("ema-*.safetensors") if ranks.leads() else ():
            path.unlink()  # of the shorter run; written anew at the end
        if settings.processes > 1 and ranks.place()[1] == 1:
            self._launch(checkpoint)
        else:
            self.train_here(checkpoint, start)

    def _launch(self, checkpoint: Path | None) -> None:
        from diffbench.core.launcher import launch

        command = [sys.executable, "-m", "diffbench.runs.worker", "train", str(self.folder)]
        command += [str(checkpoint)] if checkpoint else []
        code = launch(command, self.config.trainer.processes, keep=[] if self.lock is None else [self.lock])
        if code:
            raise SystemExit(code)

    def hparams(self) -> dict[str, str | float]:
        """The few facts by which TensorBoard's hparams tab sorts runs."""
        known = flatten(to_dict(self.config))
        chosen = {key: known[key] for key in HPARAMS if key in known}
        return {**chosen, "parameters": self.cost.parameters, "GMACs": self.cost.gmacs}

    def train_here(self, checkpoint: Path | None, start: dict[str, Tensor] | None) -> None:
        """Trains in this process, with the others of its job if there are any; the first one exports the averages."""
        from diffbench.core import collectives as together
        from diffbench.training.trainer import fit

        if checkpoint is None and start is not None:
            self.network.load_state_dict(start, strict=True)
        c, data = self.config, self.data()
        ema = fit(
            self.module(), data, self.folder, c.trainer, c.ema, to_yaml(c), self.scores, checkpoint, self.hparams()
        )
        for decay in ema.averages:
            average = ema.whole(decay)
            if together.rank() == 0:
                weights.export(self.folder, self.network, decay, average, c.trainer.max_steps * c.trainer.batch_size)
        together.part()


def open_run(folder: str | Path, kinds: Mapping[str, type[Trained[Any]]], ema: float | None = None) -> Trained[Any]:
    """A trained run of one of these kinds with its averaged weights, on the CPU.

    Args:
        folder: the run folder.
        kinds: the kinds that will do, by name.
        ema: decay of the average, one of `config.ema.decays`; by default the first.

    Raises:
        UserError: if the folder holds no run of such a kind, no weights yet, or no such average.
    """
    folder = Path(folder)
    config = read_config(folder)
    if config.kind not in kinds:
        raise UserError(f"{folder}: a run of kind {config.kind}; choose a {' or a '.join(kinds)}'s")
    with blaming([(str(folder / "config.yaml"), to_dict(config))]):
        run = kinds[config.kind](folder, config)
    run.use_average(run.ema if ema is None else ema)
    return run
