"""Exponential moving averages of a network's weights, one or several in a run."""

import contextlib
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from diffbench.config.sections import EMAConfig
from diffbench.core import distributed
from diffbench.training.clock import at_step_end
from diffbench.training.fsdp import full_tensor, local_shard, shard_of, weights_replaced
from diffbench.training.nan_guard import Outcome


class EMA(L.Callback):
    """Averages the parameters of a module's `network` after each optimizer step, for several decays at once.

    Lightning's WeightAveraging copies the whole module, takes one decay, and leaves averaged weights in a checkpoint's
    `state_dict` and in the module after `fit`. Here a checkpoint's `state_dict` and the module hold the raw weights;
    the averages are in this callback's state, and in the module only inside `applied()`. Of a sharded network (FSDP)
    each rank averages its shards; states and exports hold full tensors.
    """

    def __init__(self, config: EMAConfig) -> None:
        self.config = config
        self.updates = 0
        self.averages: dict[float, list[Tensor]] = {}
        self._parameters: list[Tensor] = []
        self._network = nn.Module()
        self._pending: Outcome | None = None
        self._restored: dict[str, Any] | None = None

    def attach(self, network: nn.Module) -> None:
        """Starts the averages at the network's present weights, on its device."""
        self._network, self._parameters = network, list(network.parameters())
        self.averages = {d: [local_shard(p).clone() for p in self._parameters] for d in self.config.decays}

    @torch.no_grad()
    def update(self) -> None:
        """Moves every average towards the present weights."""
        current = [local_shard(p) for p in self._parameters]
        for decay, average in self.averages.items():
            torch._foreach_lerp_(average, current, 1 - self.config.decay_at(self.updates, decay))
        self.updates += 1

    def catch_up(self) -> None:
        """Takes the last step into the averages, unless it was skipped; a GPU's answer is awaited a step later."""
        outcome, self._pending = self._pending, None
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
        with weights_replaced(self._network, self._parameters, self.averages[decay]):
            yield

    def full_average(self, decay: float) -> list[Tensor]:
        """The average of a decay, weight by weight; all ranks must ask, and the first one gets full tensors."""
        self.catch_up()
        if not isinstance(self._network, FSDPModule):
            return list(self.averages[decay])
        found = []
        for shard, parameter in zip(self.averages[decay], self._parameters, strict=True):
            value = full_tensor(shard, parameter)
            found.append(value.cpu() if distributed.rank() == 0 else value.new_empty(0))
        return found

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts from the weights as they lie on the device by now, or from the state that was loaded before."""
        self.attach(pl_module.network)  # type: ignore[arg-type]
        state, self._restored = self._restored, None
        if state is None:
            return
        self.updates = state["updates"]
        for decay, average in self.averages.items():
            for target, source, p in zip(average, state["averages"][str(decay)], self._parameters, strict=True):
                target.copy_(shard_of(source, p))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if at_step_end(trainer, batch_idx):
            self._pending = pl_module.outcome  # type: ignore[assignment]
            if self._pending is not None and self._pending.on_host:
                self.catch_up()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.catch_up()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.catch_up()

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "averages": {str(decay): self.full_average(decay) for decay in self.averages}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict
