"""Lightning's Trainer, set up the same way for every kind of run."""

import logging
import os
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from signal import SIGINT, Signals
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from diffbench.config.kinds import BaseConfig
from diffbench.config.trainer import TrainerConfig, precision_here
from diffbench.core import distributed
from diffbench.core.errors import LostError
from diffbench.training.checkpoint import AtomicCheckpointIO, SaveState, step_of
from diffbench.training.diffusion import DiffusionModule
from diffbench.training.ema import EMA
from diffbench.training.fsdp import restore
from diffbench.training.logger import RunLogger
from diffbench.training.module import TrainingModule, decay_warning
from diffbench.training.nan_guard import NonFiniteGuard
from diffbench.training.signals import StopOnSignal
from diffbench.training.speed import float32_products
from diffbench.training.tensorboard_log import full_disk_reported


def fit(
    module: TrainingModule,
    data: L.LightningDataModule,
    folder: Path,
    config: BaseConfig,
    callbacks: Sequence[L.Callback],
    checkpoint: Path | None = None,
    hparams: dict[str, str | float] | None = None,
) -> EMA:
    """Train a module up to `trainer.max_images` and return the averages of its weights.

    Args:
        config: its `trainer` and `ema` sections control training; the whole config is logged.
        callbacks: callbacks of this kind of run, which measure and draw.
        checkpoint: the checkpoint to resume from; None to start over.
        hparams: entries of TensorBoard's hparams tab.

    Raises:
        SystemExit: 143 or 130 after SIGTERM or SIGINT, with the state saved.
        LostError: if another process of the job has ended.
    """
    settings = config.trainer
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if settings.precision == "64-true":
        module.double()  # Lightning would convert it only after loading a checkpoint into it and into the averages
    averages = EMA(config.ema)
    log = RunLogger(folder, settings.log_images, config, hparams, settings.logger)
    guard = NonFiniteGuard(folder, settings.log_images, settings.max_skipped)
    on_gpu = settings.accelerator != "cpu" and torch.cuda.is_available()
    states = AtomicCheckpointIO(on_gpu if settings.async_checkpoints is None else settings.async_checkpoints, keep=2)
    precision = precision_here(settings, low=isinstance(module, DiffusionModule))
    # On a CPU, Lightning would replace fp16 by bf16 without gradient scaling.
    scaled = [MixedPrecision(precision, "cuda" if on_gpu else "cpu")] if precision == "16-mixed" else []
    stop = StopOnSignal(folder, settings.max_steps)
    save_state = SaveState(folder / "checkpoints", settings.checkpoint_images, log.clock, stop)
    seen = step_of(checkpoint) * settings.batch_size if checkpoint else 0
    if warning := decay_warning(module.optimizer, seen, settings.max_images):
        print(warning)
    at_end = checkpoint is not None and step_of(checkpoint) == settings.max_steps  # only evaluations remain
    with warnings.catch_warnings(), float32_products(settings.tf32):
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*no `validation_step`.*")  # our callbacks measure
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")  # its replacement is newer than torch 2.11
        warnings.filterwarnings("ignore", message=".*`srun` command is available.*")  # training on a login node is fine
        trainer = L.Trainer(
            accelerator="gpu" if on_gpu else "cpu",
            devices=settings.devices,
            num_nodes=settings.num_nodes,
            strategy=_strategy(settings),
            precision=None if scaled else precision,
            deterministic=settings.deterministic,
            max_steps=settings.max_steps + at_end,
            max_epochs=-1,
            accumulate_grad_batches=settings.accumulate_grad_batches,
            callbacks=[stop, guard, averages, log, *callbacks, save_state],
            plugins=[states, _environment(), *scaled],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            default_root_dir=str(folder),
        )
        try:
            with full_disk_reported(folder):  # for TensorBoard; other writers report a full disk themselves
                trainer.fit(
                    module, datamodule=data, ckpt_path=str(checkpoint) if checkpoint else None, weights_only=True
                )
        except RuntimeError as e:
            text = " ".join(str(e).split())
            lost = isinstance(e, torch.distributed.DistError) or any(w in text for w in ("gloo", "NCCL", "c10d"))
            if settings.processes == 1 or not lost:
                raise
            raise LostError(f"{folder}: another process of this job has ended or stopped answering ({text})") from None
        finally:
            states.join()
    if signal := int(distributed.all_reduce_max([float(stop.number or 0)])[0]):
        by = "Ctrl-C" if signal == SIGINT else Signals(signal).name
        print(f"{folder}: stopped by {by} at {log.images:,} images, state saved; run the same command again to resume")
        raise SystemExit(128 + signal)
    return averages


def _strategy(settings: TrainerConfig) -> Strategy | str:
    if settings.processes == 1:
        return "auto"
    timeout = timedelta(seconds=settings.timeout_s)
    if settings.strategy == "fsdp":
        return _Sharded(settings.processes, 1, save_distributed_checkpoint=False, timeout=timeout)
    return DDPStrategy(timeout=timeout, broadcast_buffers=False, gradient_as_bucket_view=True)


class _Sharded(ModelParallelStrategy):
    """FSDP2, also on CPUs, with checkpoints in the same format as those of a single process."""

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(checkpoint_path, map_location="cpu", weights_only=True, mmap=True)
        assert self.model is not None
        restore(self.model, self.optimizers, state)
        return state


def _environment() -> ClusterEnvironment:
    """Return the cluster environment, following `rank_and_world`. Nothing is requeued: SIGTERM saves the state."""
    if distributed.started_by_srun():
        return SLURMEnvironment(auto_requeue=False)
    return TorchElasticEnvironment() if "TORCHELASTIC_RUN_ID" in os.environ else LightningEnvironment()
