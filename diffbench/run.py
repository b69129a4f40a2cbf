"""One run: build its parts, train it, load it again, sample from it."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor, nn

from diffbench.config import RunConfig, to_yaml
from diffbench.config import load as load_config
from diffbench.core.errors import UserError
from diffbench.core.files import atomic, locked
from diffbench.data.sources import SOURCES, ImageSet
from diffbench.denoisers import build
from diffbench.denoisers.cost import Cost, count
from diffbench.diffusion import DiscreteVP
from diffbench.folder import check_same, folder_for, read_config


class Run:
    """A run folder with its network.

    Attributes:
        folder: where it lies.
        config: its resolved config.
        denoiser: the network, with averaged weights after `load`.
        process: what it was trained under.
        images_seen: of the weights that were loaded.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder, self.config = folder, config
        self.train_set, self.held_out = load_data(config)
        self.shape = tuple(self.train_set.images.shape[1:])
        self.process = DiscreteVP(config.process)
        self.null_label = self.train_set.num_classes if config.trainer.label_dropout else None
        torch.manual_seed(config.seed)
        self.denoiser: nn.Module = self._build()
        self.images_seen = 0

    def _build(self) -> nn.Module:
        channels, size, _ = self.shape
        return build(
            self.config.denoiser.name,
            self.config.denoiser,
            image_size=size,
            channels=channels,
            num_classes=self.train_set.num_classes,
            null_class=self.null_label is not None,
        )

    @property
    def cost(self) -> Cost:
        """Parameters and multiply-accumulates of the network."""
        return count(self._build, self.shape[0], self.shape[1])

    def weights_path(self, decay: float | None = None) -> Path:
        """The exported averaged weights (of the first decay by default)."""
        return self.folder / f"ema-{self.config.ema.decays[0] if decay is None else decay}.safetensors"

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
            ValueError: if a label is out of range, the counts disagree, or guidance meets a network without
                a null class.
            UserError: if a change is no key of the section, or out of range.
        """
        from diffbench.training.sampling import generate

        config = self.config
        if changes:
            config = override_sample(config, changes)
        y = self._labels(n, labels)
        device = next(self.denoiser.parameters()).device
        self.denoiser.to(device)
        return generate(
            self.denoiser,
            self.process,
            config.sample,
            y,
            self.shape,
            guidance=guidance,
            null_label=self.null_label,
            seed=seed,
        )

    def _labels(self, n: int | None, labels: int | Sequence[int] | Tensor | None) -> Tensor:
        classes = self.train_set.num_classes
        if labels is None:
            return torch.arange(16 if n is None else n) % classes
        y = torch.as_tensor(labels, dtype=torch.int64)
        if y.ndim == 0:
            y = y.repeat(1 if n is None else n)
        if n is not None and len(y) != n:
            raise ValueError(f"{len(y)} labels for n={n} samples: give one label, or one for each sample")
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
            raise ValueError(f"labels must lie in 0..{classes - 1}, got {int(y.min())}..{int(y.max())}")
        return y


def override_sample(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """The config with other values in its `sample` section, checked like any config."""
    from diffbench.config import from_dict, to_dict

    values = to_dict(config)
    values["sample"] |= changes
    return from_dict(values, "sample")


def load_data(config: RunConfig) -> tuple[ImageSet, ImageSet]:
    """The training and held-out parts of the config's data set."""
    return SOURCES[config.data.name].load(config.data)


def load(folder: str | Path) -> Run:
    """A trained run with its averaged weights, on the CPU, ready to sample.

    Raises:
        UserError: if the folder holds no run, or no weights yet.
    """
    folder = Path(folder)
    run = Run(folder, read_config(folder))
    weights, run.images_seen = load_weights(run)
    run.denoiser.load_state_dict(weights, strict=True)
    run.denoiser.eval()
    return run


def load_weights(run: Run) -> tuple[dict[str, Tensor], int]:
    """Averaged weights and the images they have seen: the export, or else the newest checkpoint's."""
    path = run.weights_path()
    if path.is_file():
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            images = int((file.metadata() or {}).get("images", 0))
        return load_file(path), images
    from diffbench.training.checkpoints import newest, step_of

    checkpoint = newest(run.folder / "checkpoints")
    if checkpoint is None:
        raise UserError(f"{run.folder}: no weights yet: train the run first")
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    average = state["callbacks"]["EMA"]["averages"][str(run.config.ema.decays[0])]
    names = [name for name, _ in run.denoiser.named_parameters()]
    weights = dict(run.denoiser.state_dict()) | dict(zip(names, average, strict=True))
    return weights, step_of(checkpoint) * run.config.trainer.batch_size


def train(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Trains the experiment of a YAML, resumes it, or finds it complete; returns it with averaged weights.

    Raises:
        UserError: for anything in config or folder that the user can mend.
        SystemExit: 143 or 130 after SIGTERM or SIGINT, with the state saved.
    """
    config = load_config(path, overrides)
    folder = folder_for(Path(path), overrides, config)
    with locked(folder):
        existed = check_same(folder, config)
        run = Run(folder, config)
        _fit(run, existed)
        return load(folder)


def _fit(run: Run, existed: bool) -> None:
    from diffbench.training.checkpoints import newest, step_of

    settings = run.config.trainer
    max_steps = -(-settings.max_images // settings.batch_size)
    checkpoint = newest(run.folder / "checkpoints") if existed else None
    done = step_of(checkpoint) if checkpoint else 0
    if checkpoint and done >= max_steps:
        print(f"{run.folder}: complete at {done * settings.batch_size:,} images")
        if not run.weights_path().exists():
            _export_from(checkpoint, run)
        return
    if checkpoint is None and run.config.init_from:
        _warm_start(run)
    state = f"resuming at {done * settings.batch_size:,} images" if checkpoint else "starting"
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
        _export(run, decay, average, max_steps * t.batch_size)


def _export_from(checkpoint: Path, run: Run) -> None:
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    from diffbench.training.checkpoints import step_of

    images = step_of(checkpoint) * run.config.trainer.batch_size
    for decay, average in state["callbacks"]["EMA"]["averages"].items():
        _export(run, float(decay), average, images)


def _export(run: Run, decay: float, average: Sequence[Tensor], images: int) -> None:
    names = [name for name, _ in run.denoiser.named_parameters()]
    tensors = {k: v.cpu().contiguous() for k, v in run.denoiser.state_dict().items()}
    tensors |= {name: value.cpu().contiguous() for name, value in zip(names, average, strict=True)}
    with atomic(run.weights_path(decay)) as file:
        file.write(save(tensors, {"images": str(images), "decay": str(decay)}))


def _warm_start(run: Run) -> None:
    source = Path(str(run.config.init_from))
    weights, _ = load_weights(Run(source, read_config(source)))
    try:
        run.denoiser.load_state_dict(weights, strict=True)
    except RuntimeError as e:
        raise UserError(f"init_from={source}: another network: {' '.join(str(e).split())[:200]}") from None
    print(f"weights start from {source}")
