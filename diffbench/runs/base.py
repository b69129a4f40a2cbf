"""A run on disk, of any kind: its config, logs, scores and network, and how its training starts and ends."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from diffbench.config.kinds import LAST, BaseConfig
from diffbench.config.layers import located
from diffbench.config.load import flatten, from_dict, to_dict
from diffbench.core.errors import UserError
from diffbench.data.facts import DataFacts, other_data
from diffbench.data.latents import LatentSet
from diffbench.data.sets import ImageSet
from diffbench.denoisers.flops import Cost
from diffbench.evaluation import records
from diffbench.evaluation.curves import NAME as CURVES
from diffbench.evaluation.curves import Band, read_curves
from diffbench.metrics import Extractor
from diffbench.runs import weights
from diffbench.runs.build import device_of, load_data
from diffbench.runs.checks import check_machine
from diffbench.runs.folder import CONFIG_FILE, read_values
from diffbench.training.speed import keep_memory, use_threads

if TYPE_CHECKING:
    from diffbench.data.datamodule import PositionDataModule
    from diffbench.training.module import TrainingModule

DATA_FACTS = "data.json"
"""File in the run folder with the facts about its training data."""
HPARAMS = ("denoiser.name", "process.name", "sample.sampler", "optimizer.lr", "trainer.batch_size", "seed")
NO_SIZE = {"seed", "seeds", "tag", "runs_dir", "debug", *LAST}
"""Keys that do not affect the size of the network."""

C = TypeVar("C", bound=BaseConfig)
R = TypeVar("R", bound="Run[Any]")

_costs: dict[str, Cost] = {}


class Run(ABC, Generic[C]):
    """A run folder. Opening it builds no network and reads no images: each is loaded when first used.

    Subclasses, one for each kind, define how the network is built, which module trains it, and what is measured.

    Args:
        folder: the run folder.
        config: resolved config; by default the folder's.
        values: the same config as plain values, if already read.

    Attributes:
        ema: decay of the average that `network` holds after `use_average`; also selects records.
        snapshot: "last", or "best" after `use_best`.
        at_once: number of sample batches, or of halves of a training batch, to compute concurrently; 1 until
            `use_threads` is called.
    """

    kind: ClassVar[str]

    def __init__(self, folder: str | Path, config: C | None = None, values: dict[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        if config is not None:
            self.config = config
        if values is not None:
            self.values = values
        self.ema = float(self.values["ema"]["decays"][0])
        self.snapshot = "last"
        self.at_once = 1

    # Contents of the folder.

    @cached_property
    def values(self) -> dict[str, Any]:
        """The resolved config as plain values; not validated again when read from the folder."""
        return to_dict(self.config) if "config" in vars(self) else read_values(self.folder)

    @cached_property
    def config(self) -> C:
        return from_dict(self.values, str(self.folder / CONFIG_FILE))  # type: ignore[return-value]

    @cached_property
    def flat(self) -> dict[str, Any]:
        return flatten(self.values)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return records.metrics(self.folder)

    @cached_property
    def results(self) -> list[dict[str, Any]]:
        """The records of results.jsonl, oldest first."""
        return records.results(self.folder)

    def add_result(self, record: dict[str, Any]) -> None:
        records.append(self.folder / "results.jsonl", record)
        vars(self).pop("results", None)

    def provenance(self, extractor: Extractor | None) -> dict[str, Any]:
        """Return a record's entries on the machine, code version, extractor, weights and data."""
        return {
            **records.environment(extractor, extractor.device if extractor else torch.device("cpu")),
            "threads": max(torch.get_num_threads(), self.at_once if self.halves_batches else 1),
            "images_seen": self.images_seen,
            "ema": self.ema,
            "data": self.train_set.fingerprint(),
            "data_name": self.train_set.name,
        }

    @cached_property
    def timeline(self) -> list[tuple[int, float]]:
        """(images, seconds of training so far) at each logged training rate."""
        # Each log line has the rate of its interval, so images / rate sums to the seconds of training.
        points, total, before = [], 0.0, 0
        for m in self.metrics:
            if "perf/images_per_s" in m:
                total += (m["images"] - before) / max(1e-9, m["perf/images_per_s"])
                before = m["images"]
                points.append((before, total))
        return points

    @property
    def seconds(self) -> float:
        """Seconds of training; 0 if nothing was logged."""
        return self.timeline[-1][1] if self.timeline else 0.0

    @cached_property
    def bands(self) -> dict[str, Band]:
        """Reference curves to compare the run with, by metric; empty if its experiment has none."""
        return read_curves(self.folder / CURVES)

    def last(self, name: str) -> float | None:
        return next((m[name] for m in reversed(self.metrics) if name in m), None)

    @cached_property
    def images_seen(self) -> int:
        """Number of training images seen by the loaded weights, or by the newest in the folder if none are loaded."""
        return weights.images_seen(self.folder, self.ema, int(self.values["trainer"]["batch_size"]))

    @property
    def has_weights(self) -> bool:
        """True if the folder holds trained or imported weights."""
        return self.images_seen > 0 or weights.export_path(self.folder, self.ema).is_file()

    @property
    def complete(self) -> bool:
        """True if all averages were exported at the end of training, or the weights were imported."""
        trainer = self.values["trainer"]
        batch_size = int(trainer["batch_size"])
        images = -(-int(trainer["max_images"]) // batch_size) * batch_size
        exported = [weights.exported_images(self.folder, decay) for decay in self.values["ema"]["decays"]]
        return all(seen is not None and seen in (0, images) for seen in exported)

    @property
    def cost(self) -> Cost:
        """Parameters and multiply-accumulates of the network, cached across runs with the same network."""
        sizes = {key: value for key, value in self.values.items() if key not in NO_SIZE}
        signature = json.dumps([sizes, self.values["trainer"].get("label_dropout")], sort_keys=True)
        if signature not in _costs:
            _costs[signature] = self.count()
        return _costs[signature]

    # Data.

    @cached_property
    def facts(self) -> DataFacts:
        """Shape, classes and fingerprint of the training images, stored so that a run works without the images."""
        path = self.folder / DATA_FACTS
        return DataFacts.read(path) if path.is_file() else DataFacts.of(self.train_set)

    @property
    def train_set(self) -> ImageSet:
        """The training images; UserError if they are not those that the run was trained on."""
        return self._parts[0]

    @property
    def held_out(self) -> ImageSet:
        """The held-out images."""
        return self._parts[1]

    @cached_property
    def _parts(self) -> tuple[ImageSet, ImageSet]:
        with self.located():
            train_set, held_out = load_data(self.config)
        if (self.folder / DATA_FACTS).is_file() and (changed := self.facts.difference(DataFacts.of(train_set))):
            raise other_data(changed)
        return train_set, held_out

    # Network.

    @cached_property
    def network(self) -> nn.Module:
        """The network, initialised from the run's `init` seed until weights are loaded."""
        keep_memory()
        with self.located():
            torch.manual_seed(self.config.seed_of("init"))
            network = self.build()
        trainer = self.config.trainer
        on_cpu = device_of(trainer.accelerator).type == "cpu"
        if on_cpu if trainer.channels_last is None else trainer.channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return network

    def use_threads(self) -> None:
        """Set `at_once` and this process's CPU threads for work on this network, following `trainer.threads`."""
        trainer = self.config.trainer
        parts = trainer.processes * trainer.accumulate_grad_batches
        on_cpu = device_of(trainer.accelerator).type == "cpu"
        macs = self.cost.macs * trainer.batch_size / parts if on_cpu else math.inf
        self.at_once = use_threads(trainer.threads, macs, self.halves_batches)

    def use_device(self) -> None:
        """Move the network to the config's device and set the threads to use there."""
        self.use_threads()
        self.network.to(device_of(self.config.trainer.accelerator))

    @property
    def halves_batches(self) -> bool:
        """Whether the halves of a training batch may be computed concurrently."""
        return False

    def located(self) -> Any:
        """Return a context manager that adds the folder's config.yaml to a ValueError that names a key."""
        return located([(str(self.folder / CONFIG_FILE), self.values)])

    @abstractmethod
    def build(self) -> nn.Module:
        """Return a new network, initialised from the default generator."""

    @abstractmethod
    def count(self) -> Cost:
        """Count parameters and multiply-accumulates without allocating the network."""

    def use_average(self, decay: float | None = None) -> Self:
        """Load an average, by default the first decay's; UserError if it is missing or does not fit the network."""
        decay = self.config.ema.decays[0] if decay is None else decay
        gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices=gpus):  # building a network seeds the caller's generators
            averaged, images = weights.read(self.folder, self.config, self.network, decay)
        if wrong := weights.mismatch(self.network.state_dict(), averaged):
            raise UserError(f"{self.folder}: the weights do not fit the network in its config.yaml: {wrong}")
        self._load(averaged, images, decay, "last")
        return self

    def use_best(self) -> None:
        """Load the averaged weights with the lowest distance in training; UserError if the run did not keep them."""
        best, images, decay = weights.read_best(self.folder)
        self._load(best, images, decay, "best")

    def _load(self, state: Mapping[str, Tensor], images: int, decay: float, snapshot: str) -> None:
        self.network.load_state_dict(state, strict=True)
        self.network.eval()
        self.images_seen, self.ema, self.snapshot = images, decay, snapshot

    # Training.

    @classmethod
    def check(cls, config: Any) -> None:
        """Find errors that would otherwise appear only during training; a ValueError names the key. Writes nothing."""
        check_machine(config.trainer)

    @classmethod
    def start(cls, config: Any) -> dict[str, Tensor] | None:
        """Return the weights to start training from, or None for a new initialisation."""
        return None

    @abstractmethod
    def module(self) -> "TrainingModule":
        """Return the LightningModule that trains the network."""

    @property
    def sets(self) -> tuple[ImageSet | LatentSet, ImageSet | LatentSet]:
        """Training and validation data."""
        return self._parts

    def data_module(self) -> "PositionDataModule":
        """Return the data module of the images or latents in `sets`."""
        from diffbench.data.datamodule import ImageDataModule, LatentDataModule

        (train, held_out), c = self.sets, self.config
        return (LatentDataModule if isinstance(train, LatentSet) else ImageDataModule)(
            train.first(c.trainer.batch_size) if c.debug == "overfit" else train,
            held_out,
            c.trainer.batch_size,
            c.seed_of("data"),
            num_workers=c.data.num_workers,
            flip=getattr(c.data, "flip", False),
            data_on_device=c.trainer.data_on_device,
            endless=True,
        )

    @abstractmethod
    def callbacks(self) -> "list[Any]":
        """Return the callbacks that measure and draw samples during training."""

    def prepare(self) -> None:
        """Write what the run needs besides its config, before training; called by the first process only."""
        train_set, path = self.train_set, self.folder / DATA_FACTS  # train_set raises if the images changed
        if not path.is_file():
            DataFacts.of(train_set).write(path)

    def finish(self) -> None:
        """Write what training leaves besides the averages; called by the first process only."""

    def hparams(self) -> dict[str, str | float]:
        """Return the values shown for this run in TensorBoard's hparams tab."""
        chosen = {key: self.flat[key] for key in HPARAMS if key in self.flat}
        return {**chosen, "parameters": self.cost.parameters, "GMACs": self.cost.gmacs}


def open_run(folder: str | Path, kinds: Sequence[type[R]]) -> R:
    """Open the run in a folder, without building its network; UserError if it is not a run of one of these kinds."""
    values = read_values(Path(folder))
    for kind in kinds:
        if kind.kind == values["kind"]:
            return kind(folder, values=values)
    choices = " or ".join(kind.kind for kind in kinds)
    raise UserError(f"{folder}: this is a run of kind {values['kind']}; choose one of kind {choices}")
