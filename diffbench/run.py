"""One run: build its parts, train it, load it again, sample from it."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffbench import weights
from diffbench.config import RunConfig, change, from_layers, read_layers, to_yaml
from diffbench.config_layers import blaming
from diffbench.core.files import locked
from diffbench.denoisers.cost import Cost
from diffbench.diffusion import DiscreteVP
from diffbench.folder import check_place, check_same, folder_for, has_checkpoint, read_config, update_length
from diffbench.parts import build_denoiser, check, cost_of, load_data, null_label


class Run:
    """A run folder with its network.

    Attributes:
        folder: where it lies.
        config: its resolved config.
        denoiser: the network, with averaged weights after `load`.
        process: what it was trained under.
        ema: decay of the average that the network holds after `load`.
        images_seen: of the weights that were loaded.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder, self.config = folder, config
        self.train_set, self.held_out = load_data(config)
        self.shape = tuple(self.train_set.images.shape[1:])
        self.process = DiscreteVP(config.process)
        self.null_label = null_label(config, self.train_set)
        torch.manual_seed(config.seed)
        self.denoiser: nn.Module = build_denoiser(config, self.train_set)
        if config.trainer.channels_last:
            self.denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = config.ema.decays[0]
        self.images_seen = 0

    def use_average(self, decay: float) -> None:
        """Loads the average of a decay into the network.

        Raises:
            UserError: if the run keeps no such average, or has no weights yet.
        """
        averaged, self.images_seen = weights.read(self.folder, self.config, self.denoiser, decay)
        self.denoiser.load_state_dict(averaged, strict=True)
        self.denoiser.eval()
        self.ema = decay

    @property
    def cost(self) -> Cost:
        """Parameters and multiply-accumulates of the network."""
        return cost_of(self.config, self.train_set)

    def sample(
        self,
        n: int | None = None,
        labels: int | Sequence[int] | Tensor | None = None,
        guidance: float | None = None,
        seed: int = 0,
        **changes: Any,
    ) -> list[Image.Image]:
        """Images as Pillow pictures; see `sample_tensor`."""
        images = self.sample_tensor(n, labels, guidance, seed, **changes)
        arrays = images.permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(np.squeeze(a)) for a in arrays]

    def sample_tensor(
        self,
        n: int | None = None,
        labels: int | Sequence[int] | Tensor | None = None,
        guidance: float | None = None,
        seed: int = 0,
        **changes: Any,
    ) -> Tensor:
        """Samples, (N, C, H, W) uint8.

        Args:
            n: how many; by default one for each label.
            labels: one class for all, or one for each; by default the classes in turn.
            guidance: weight of classifier-free guidance; by default the config's.
            seed: sample i's noise follows from (seed, i).
            **changes: other keys of the `sample` section, such as steps="50" or sampler="ddim".

        Raises:
            ValueError: if a label is out of range, or the counts disagree.
            UserError: if a change is no key of the section or out of range, or guidance meets a network without a
                null class.
        """
        if guidance is not None:
            changes["guidance"] = guidance
        settings = change(self.config, {"sample": changes}, "arguments").sample
        y = self._labels(n, labels)
        from diffbench.training.sampling import generate  # imports Lightning

        return generate(self.denoiser, self.process, settings, y, self.shape, null_label=self.null_label, seed=seed)

    def _labels(self, n: int | None, labels: int | Sequence[int] | Tensor | None) -> Tensor:
        classes = self.train_set.num_classes
        if n is not None and n < 1:
            raise ValueError(f"n: must be at least 1, got {n}")
        if labels is None:
            return torch.arange(16 if n is None else n) % classes
        y = torch.as_tensor(labels, dtype=torch.int64)
        if y.ndim == 0:
            y = y.repeat(1 if n is None else n)
        if not len(y) or (n is not None and len(y) != n):
            raise ValueError(f"labels: {len(y)} labels for n={n} samples; give one label, or one for each sample")
        if not 0 <= int(y.min()) <= int(y.max()) < classes:
            raise ValueError(f"labels: must lie in 0 to {classes - 1}, got {int(y.min())} to {int(y.max())}")
        return y


def load(folder: str | Path, ema: float | None = None) -> Run:
    """A trained run with its averaged weights, on the CPU, ready to sample.

    Args:
        folder: the run folder.
        ema: decay of the average, one of `config.ema.decays`; by default the first.

    Raises:
        UserError: if the folder holds no run, no weights yet, or no such average.
    """
    folder = Path(folder)
    run = Run(folder, read_config(folder))
    run.use_average(run.ema if ema is None else ema)
    return run


def train(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Trains the experiment of a YAML, resumes it, or finds it complete; returns it with averaged weights.

    Raises:
        UserError: for anything in config or folder that the user can mend.
        SystemExit: 143 or 130 after SIGTERM or SIGINT, with the state saved.
    """
    stack = read_layers(path, overrides)
    config = from_layers(stack)
    folder = folder_for(Path(path), overrides, config)
    with blaming(stack):  # all that can be found before the folder is made, or Lightning imported
        check(config)
        check_place(folder)
        start = None if has_checkpoint(folder) else weights.initial(config)
    with locked(folder):
        existed = check_same(folder, config)
        _fit(Run(folder, config), existed, start)
        return load(folder)


def _fit(run: Run, existed: bool, start: dict[str, Tensor] | None) -> None:
    from diffbench.training.checkpoints import newest, step_of

    settings = run.config.trainer
    max_steps = -(-settings.max_images // settings.batch_size)
    checkpoint = newest(run.folder / "checkpoints") if existed else None
    done = step_of(checkpoint) if checkpoint else 0
    images = done * settings.batch_size
    if checkpoint and done >= max_steps:
        print(f"{run.folder}: complete at {images:,} images")
        if not weights.export_path(run.folder, run.config.ema.decays[0]).exists():
            weights.export_from(checkpoint, run.folder, run.denoiser, images)
        return
    if existed:
        update_length(run.folder, run.config)
    if checkpoint is None and start is not None:
        run.denoiser.load_state_dict(start, strict=True)
        print(f"weights start from {run.config.init_from}")
    state = f"resuming at {images:,} images" if checkpoint else "starting"
    print(f"{run.folder}: {state}, {run.cost.parameters:,} parameters, {run.cost.gmacs:.4f} GMACs")
    for path in run.folder.glob("ema-*.safetensors"):
        path.unlink()  # of the shorter run; written anew at the end
    _train(run, max_steps, checkpoint)


def _train(run: Run, max_steps: int, checkpoint: Path | None) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    import lightning as L

    from diffbench.data.module import ImageDataModule
    from diffbench.training.checkpoints import AtomicCheckpointIO, SaveState
    from diffbench.training.clock import Clock
    from diffbench.training.ema import EMA
    from diffbench.training.log import RunLog
    from diffbench.training.module import DiffusionModule
    from diffbench.training.sampling import SampleGrid
    from diffbench.training.validation import Validation

    c, t, folder = run.config, run.config.trainer, run.folder
    data = ImageDataModule(
        train=run.train_set,
        held_out=run.held_out,
        seed=c.seed,
        batch_size=t.batch_size,
        accumulate=t.accumulate,
        num_workers=c.data.num_workers,
        only_first_batch=c.debug == "overfit",
    )
    module = DiffusionModule(
        run.denoiser, run.process, c.optimizer, c.seed, t.batch_size, t.label_dropout, run.null_label
    )
    clock, ema = Clock(), EMA(c.ema)
    log = RunLog(folder, t.batch_size, t.log_images, clock, to_yaml(c))
    save_state = SaveState(folder / "checkpoints", t.batch_size, t.checkpoint_images, clock)
    # At a step's end they act in this order: the average, the log, scores of the average, the state of it all.
    callbacks = [
        ema,
        log,
        Validation(log, ema, run.held_out, c.validation.log_snr, t.validate_images),
        SampleGrid(log, ema, c.sample, run.shape, run.train_set.num_classes, t.sample_images),
        save_state,
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        trainer = L.Trainer(
            accelerator=t.accelerator,
            devices=1,
            precision=t.precision,
            deterministic=t.deterministic,
            max_steps=max_steps,
            max_epochs=-1,
            accumulate_grad_batches=t.accumulate,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=str(folder),
        )
        trainer.fit(module, datamodule=data, ckpt_path=str(checkpoint) if checkpoint else None)
    if save_state.signal:
        print(f"{folder}: stopped by signal {save_state.signal} at {log.images:,} images, state saved")
        raise SystemExit(128 + save_state.signal)
    for decay, average in ema.averages.items():
        weights.export(folder, run.denoiser, decay, average, max_steps * t.batch_size)
