"""Lightning's trainer as every kind of run uses it."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from diffbench.training.checkpoints import AtomicCheckpointIO, SaveState
from diffbench.training.clock import Clock
from diffbench.training.ema import EMA
from diffbench.training.guard import Guard
from diffbench.training.log import RunLog, naming_events
from diffbench.training.module import DiffusionModule, Module
from diffbench.training.settings import EMAConfig, TrainerConfig, precision_here
from diffbench.training.speed import float32_products

Scores = Callable[[RunLog, EMA], list[L.Callback]]


def fit(
    module: Module,
    data: L.LightningDataModule,
    folder: Path,
    settings: TrainerConfig,
    ema: EMAConfig,
    config_text: str,
    scores: Scores,
    checkpoint: Path | None = None,
    hparams: dict[str, str | float] | None = None,
) -> EMA:
    """Trains to `settings.max_images`, from a resume state where one is given.

    Args:
        module: what is trained.
        data: its batches.
        folder: the run folder.
        settings: length, batch, cadence, device.
        ema: which averages are kept.
        config_text: the resolved config, for TensorBoard.
        scores: makes the kind's own callbacks (validation, grids) from the log and the averages.
        checkpoint: the state to resume from.
        hparams: what TensorBoard's hparams tab says of the run.

    Returns:
        The averages at the end.

    Raises:
        SystemExit: 143 or 130 after SIGTERM or SIGINT, with the state saved.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    clock, averages = Clock(), EMA(ema)
    log = RunLog(folder, settings.batch_size, settings.log_images, clock, config_text, hparams)
    guard = Guard(folder, settings.batch_size, settings.log_images, settings.max_skipped)
    on_gpu = settings.accelerator in ("auto", "gpu") and torch.cuda.is_available()
    states = AtomicCheckpointIO(on_gpu if settings.async_checkpoints is None else settings.async_checkpoints, keep=2)
    precision = precision_here(settings, low=isinstance(module, DiffusionModule))
    save_state = SaveState(folder / "checkpoints", settings.batch_size, settings.checkpoint_images, clock)
    with warnings.catch_warnings(), float32_products(settings.tf32):
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*`srun` command is available.*")  # a cluster's login node is fine
        trainer = L.Trainer(
            accelerator=settings.accelerator,
            devices=1,
            precision=None if precision == "16-mixed" else precision,
            deterministic=settings.deterministic,
            max_steps=settings.max_steps,
            max_epochs=-1,
            accumulate_grad_batches=settings.accumulate,
            # At a step's end they act in this order: was it taken, the average, the log, scores, the state of it all.
            callbacks=[guard, averages, log, *scores(log, averages), save_state],
            plugins=[states, *_scaled(settings)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=str(folder),
        )
        try:
            with naming_events(folder):  # all other files are named where they are written
                trainer.fit(module, datamodule=data, ckpt_path=str(checkpoint) if checkpoint else None)
        finally:
            states.join()
    if save_state.signal:
        print(f"{folder}: stopped by signal {save_state.signal} at {log.images:,} images, state saved")
        raise SystemExit(128 + save_state.signal)
    return averages


def _scaled(settings: TrainerConfig) -> list[MixedPrecision]:
    """Lightning's fp16 with scaled gradients, on a CPU too, where it would take bf16 instead."""
    if settings.precision != "16-mixed":
        return []
    gpu = torch.accelerator.current_accelerator() if settings.accelerator != "cpu" else None
    return [MixedPrecision("16-mixed", gpu.type if gpu else "cpu")]
