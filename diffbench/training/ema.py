"""Exponential moving averages of a network's weights, one or several per run."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from diffbench.config.sections import EMAConfig
from diffbench.core import distributed
from diffbench.training.clock import Ordered
from diffbench.training.fsdp import full_tensor, local_shard, shard_of, weights_replaced
from diffbench.training.module import TrainingModule
from diffbench.training.nan_guard import Outcome


class EMA(Ordered):
    """Callback that averages the weights of a LightningModule after each optimizer step, for several decays at once.

    `validate`, `test`, `predict` and our measuring callbacks use the first average. Training continues with the raw
    weights, which are in the module at all other times and in a checkpoint's `state_dict`; the averages are in this
    callback's state. `applied()` puts an average in place inside a block; `load` reads one from a checkpoint.
    (Lightning's WeightAveraging copies the whole module, takes one decay, and leaves averaged weights in a checkpoint's
    `state_dict` and in the module after `fit`.) In our modules only `network` is averaged, in any other LightningModule
    all parameters; buffers are not averaged. With a sharded network (FSDP) each rank averages its shards; checkpoints
    and exports contain full tensors.

    Args:
        config: a decay per step in (0, 1), several of them, or an `EMAConfig` with all settings.
    """

    place = 2

    def __init__(self, config: float | Sequence[float] | EMAConfig = 0.9999) -> None:
        if not isinstance(config, EMAConfig):
            config = EMAConfig([config] if isinstance(config, float) else list(config))
        if config.half_life is not None and config.decays == EMAConfig().decays:
            raise ValueError("ema.half_life: give EMAConfig(half_life=...).in_steps(batch_size)")
        self.config = config
        self.updates = 0
        self.averages: dict[float, list[Tensor]] = {}
        self._parameters: list[Tensor] = []
        self._network = nn.Module()
        self._pending: Outcome | None = None
        self._restored: dict[str, Any] | None = None
        self._applied = contextlib.ExitStack()

    def attach(self, network: nn.Module) -> None:
        """Start the averages from the network's current weights, on its device."""
        self.updates = 0
        self._network, self._parameters = network, list(network.parameters())
        self.averages = {d: [local_shard(p).clone() for p in self._parameters] for d in self.config.decays}

    def _attach_to(self, module: nn.Module) -> None:
        """Attach to a module's network and load the restored state, if any; a second fit keeps the averages."""
        network = module.network if isinstance(module, TrainingModule) else module
        if network is self._network and self._restored is None:
            for average in self.averages.values():  # the network may have moved to another device and back
                average[:] = [a.to(p.device) for a, p in zip(average, self._parameters, strict=True)]
            return
        self.attach(network)
        state, self._restored = self._restored, None
        if state is None:
            return
        if missing := [d for d in self.config.decays if str(d) not in state["averages"]]:
            raise ValueError(f"EMA: the checkpoint has decays {', '.join(state['averages'])}, not {missing[0]}")
        self.updates = state["updates"]
        for decay, average in self.averages.items():
            for target, source, p in zip(average, state["averages"][str(decay)], self._parameters, strict=True):
                target.copy_(shard_of(source, p))

    @staticmethod
    def load(checkpoint: str | Path, module: nn.Module, decay: float | None = None) -> None:
        """Copy an average (the first by default) from a checkpoint into the module that the checkpoint belongs to.

        Raises:
            ValueError: if the checkpoint has no such average.
        """
        states = torch.load(checkpoint, map_location="cpu", weights_only=True).get("callbacks", {})
        averages = states.get("EMA", {}).get("averages", {})
        if not averages or str(decay or next(iter(averages))) not in averages:
            kept = ", ".join(averages) or "none"
            raise ValueError(f"{checkpoint}: no average with decay {decay}; available: {kept}")
        network = module.network if isinstance(module, TrainingModule) else module
        for parameter, average in zip(network.parameters(), averages[str(decay or next(iter(averages)))], strict=True):
            parameter.data.copy_(average)

    @torch.no_grad()
    def update(self) -> None:
        current = [local_shard(p) for p in self._parameters]
        for decay, average in self.averages.items():
            torch._foreach_lerp_(average, current, 1 - self.config.decay_at(self.updates, decay))
        self.updates += 1

    def catch_up(self) -> None:
        """Add the last step to the averages unless it was skipped; called a step late so as not to wait for the GPU."""
        outcome, self._pending = self._pending, None
        if outcome is not None and not outcome.skipped:
            self.update()

    @contextlib.contextmanager
    def applied(self, decay: float | None = None) -> Iterator[None]:
        """Put averaged weights (the first decay's by default) into the network inside the block.

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
        """Return the average for a decay, by parameter; all ranks must call this, and rank 0 gets full tensors."""
        self.catch_up()
        if not isinstance(self._network, FSDPModule):
            return list(self.averages[decay])
        full = []
        for shard, parameter in zip(self.averages[decay], self._parameters, strict=True):
            value = full_tensor(shard, parameter)
            full.append(value.cpu() if distributed.rank() == 0 else value.new_empty(0))
        return full

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start from the weights, which are on the device by now, or from the state loaded earlier."""
        self._attach_to(pl_module)

    def on_step_end(self, trainer: L.Trainer, module: Any) -> None:
        self._pending = getattr(module, "outcome", None)
        if self._pending is None:  # modules other than ours skip no steps
            self.update()
        elif self._pending.on_host:
            self.catch_up()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the first average in place until the end of validation, test or prediction."""
        if self.averages or self._restored is not None:
            self._attach_to(pl_module)
            self._applied.enter_context(self.applied())

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._applied.close()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._applied.close()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.catch_up()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.catch_up()

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "averages": {str(decay): self.full_average(decay) for decay in self.averages}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["averages"]:
            self._restored = state_dict
        else:  # a state from before training, which `Tuner.lr_find` restores
            self._restored, self._network, self.averages = None, nn.Module(), {}
