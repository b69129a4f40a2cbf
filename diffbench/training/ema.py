"""Exponential moving averages of a network's weights, one or several in a run."""

import contextlib
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from diffbench.config.sections import EMAConfig
from diffbench.core import collectives as together
from diffbench.training.fsdp import assembled, gathered, local, part_of, sharded
from diffbench.training.nan_guard import Outcome


class EMA(WeightAveraging):
    """Lightning's weight averaging, narrowed to the network and widened to several decays.

    Differences from the base class, each found necessary: the averages live on the training device; only the
    network's parameters are averaged, in one multi-tensor operation; the decay warms up; a checkpoint's
    `state_dict` stays the raw weights, with the averages in this callback's state, so that nothing trains on from
    averaged weights by accident; the module holds averaged weights only inside `applied()`, which undoes itself
    after an exception; and training ends with the raw weights still in place. Of a network that is shared out between
    ranks (FSDP), each averages the parts that it holds; states and exports hold them whole.
    """

    def __init__(self, config: EMAConfig) -> None:
        super().__init__()
        self.config = config
        self.updates = 0
        self.averages: dict[float, list[Tensor]] = {}
        self.names: list[str] = []
        """Of the weights; with `buffers`, what else belongs to the network's state."""
        self.buffers: dict[str, Tensor] = {}
        self._network = nn.Module()
        self._parameters: list[Tensor] = []
        self._outcome: Outcome | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and not isinstance(trainer.strategy, ModelParallelStrategy):  # see on_fit_start
            self.attach(pl_module.network, trainer.strategy.root_device)  # type: ignore[arg-type]

    def attach(self, network: nn.Module, device: torch.device | str = "cpu") -> None:
        """Starts the averages at the network's present weights."""
        self._network, self._parameters = network, list(network.parameters())
        self.names = [name for name, _ in network.named_parameters()]
        self.buffers = {name: value for name, value in network.state_dict().items() if name not in self.names}
        self.averages = {d: [local(p).to(device, copy=True) for p in self._parameters] for d in self.config.decays}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes this rank's parts of a network that is shared out by now."""
        network: nn.Module = pl_module.network  # type: ignore[assignment]
        if sharded(network):
            self.attach(network, trainer.strategy.root_device)

    def decay_at(self, update: int, decay: float) -> float:
        """The decay of update number 0, 1, ...: min(decay, (1 + n) / (10 + n)) while warming up.

        With a ramp it is at most that of a half-life of `ramp` times the updates so far (Karras et al. 2022).
        """
        if self.config.ramp is not None:
            return min(decay, 0.5 ** (1 / max(self.config.ramp * update, 1e-8)))
        return min(decay, (1 + update) / (10 + update)) if self.config.warmup else decay

    @torch.no_grad()
    def update(self) -> None:
        """Moves every average towards the present weights."""
        current = [local(p) for p in self._parameters] if sharded(self._network) else self._parameters
        for decay, average in self.averages.items():
            share = 1 - self.decay_at(self.updates, decay)
            torch._foreach_lerp_(average, current, share)
        self.updates += 1

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._latest_update_step:
            self._outcome = pl_module.outcome  # type: ignore[assignment]
            self._latest_update_step = trainer.global_step
            if self._outcome is not None and self._outcome.on_host:
                self.catch_up()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.catch_up()

    def catch_up(self) -> None:
        """Takes the last step into the averages, unless it was skipped; a GPU's answer is awaited a step later."""
        outcome, self._outcome = self._outcome, None
        if outcome is not None and not outcome.skipped:
            self.update()

    @contextlib.contextmanager
    def applied(self, decay: float | None = None) -> Iterator[None]:
        """The network with averaged weights (the first decay's by default) while the block runs.

        Raises:
            ValueError: if no average has that decay.
        """
        decay = self.config.decays[0] if decay is None else decay
        if decay not in self.averages:
            raise ValueError(f"no average with decay {decay}: choose from {', '.join(map(str, self.averages))}")
        self.catch_up()
        if sharded(self._network):
            with gathered(self._network, self._parameters, self.averages[decay]):
                yield
            return
        raw = [p.data for p in self._parameters]
        try:
            for parameter, average in zip(self._parameters, self.averages[decay], strict=True):
                parameter.data = average
            yield
        finally:
            for parameter, data in zip(self._parameters, raw, strict=True):
                parameter.data = data

    def whole(self, decay: float) -> list[Tensor]:
        """The average of a decay, weight by weight; all ranks must ask, and the first one gets it."""
        self.catch_up()
        if not sharded(self._network):
            return list(self.averages[decay])
        found = []
        for part, parameter in zip(self.averages[decay], self._parameters, strict=True):
            value = assembled(part, parameter)
            found.append(value.cpu() if together.rank() == 0 else value.new_empty(0))
        return found

    def state_dict(self) -> dict[str, Any]:
        self.catch_up()
        return {
            "updates": self.updates,
            "latest_update_step": self._latest_update_step,
            "averages": {str(decay): self.whole(decay) for decay in self.averages},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = state_dict["updates"]
        self._latest_update_step = state_dict["latest_update_step"]
        for decay, average in self.averages.items():
            saved = state_dict["averages"][str(decay)]
            if sharded(self._network):
                saved = [part_of(s, p) for s, p in zip(saved, self._parameters, strict=True)]
            for target, source in zip(average, saved, strict=True):
                target.copy_(source)

    # The base class would swap, save and copy an averaged copy of the whole module here.
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing: averages follow optimizer steps only."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes the last step in; the raw weights stay."""
        self.catch_up()

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing: who scores averaged weights says so with `applied()`."""

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing, as above."""

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Nothing: `state_dict` of the callback holds the averages."""

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Nothing, as above."""
