"""An estimate of the time of training, printed before its first step."""

from typing import Any

import lightning as L
import torch

from diffbench.core import distributed
from diffbench.core.progress import span
from diffbench.core.tensors import eval_mode
from diffbench.sampling.cost import timed, zeros
from diffbench.training.clock import find
from diffbench.training.logger import RunLogger
from diffbench.training.module import TrainingModule

WORTH_SAYING = 30.0
"""Seconds of training below which nothing is said."""


class TimeEstimate(L.Callback):
    """Times a step of zeros (C, H, W), which leaves no trace, and says how long all of them take here."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        logger = find(trainer, RunLogger)
        assert logger is not None and isinstance(pl_module, TrainingModule)
        left = trainer.max_steps * pl_module.batch_size - pl_module.images_seen
        if distributed.world_size() > 1 or left <= 0:  # several processes would have to do it together
            return
        with logger.clock.paused():
            each = self._seconds(trainer, pl_module)
        if left * each >= WORTH_SAYING:
            size = 10 ** max(2, len(str(int(600 / each))) - 1)  # to one digit that is not zero
            logger.say(
                f"time: {left:,} images at about {1 / each:,.0f} images/s here, {span(left * each)} of training"
                f" (trainer.max_images={max(100, int(600 / each // size * size)):_} takes ten minutes)"
            )

    def _seconds(self, trainer: L.Trainer, module: Any) -> float:
        """Seconds of training for an image; of a few images where a whole micro-batch takes long."""
        network = module.network

        def step(size: int) -> float:
            x, t, y = zeros(network, module.process, (size, *self.shape))

            def work() -> None:
                with trainer.precision_plugin.forward_context():
                    loss = network(x, t, y).square().mean()
                loss.backward()

            return timed(work, x.device) / size

        size = module.batch_size // trainer.accumulate_grad_batches
        with torch.random.fork_rng(devices=[]), eval_mode(network):  # no batch statistics change
            found = step(min(8, size))
            if found * size < 1:
                found = step(size)
        network.zero_grad(set_to_none=True)
        return found
