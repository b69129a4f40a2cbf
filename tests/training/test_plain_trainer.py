"""diffbench's modules, data and callbacks in a custom script, with a plain Lightning trainer."""

import csv
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from diffbench import (
    EDM,
    EMA,
    VP,
    DiffusionModule,
    DiT,
    ImageDataModule,
    LatentDataModule,
    SampleGrid,
    ValidationError,
    metrics,
    sample,
)
from diffbench.config.sections import EMAConfig, OptimizerConfig, SampleConfig
from diffbench.data.batches import image_set
from diffbench.data.sets import ImageSet
from diffbench.denoisers import DiTConfig
from diffbench.evaluation.validation_error import bound_metrics, denoising_error
from diffbench.sampling.sampler import Sampler
from diffbench.training import FrechetDistance

IMAGES = torch.randint(0, 256, (48, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(48) % 4
LEVELS, QUICK = [0.0, 2.0], SampleConfig(steps="2")


class Own(nn.Module):
    """A custom network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.conv(x)


class Recorded(DiffusionModule):
    """A module that records what each micro-batch trained on."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        steps.append({"position": self.batch["position"].tolist(), "x0": self.batch["x0"], "time": self.batch["time"]})
        return loss


steps: list[dict[str, Any]] = []


def positions() -> list[int]:
    return [p for step in steps for p in step["position"]]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(0)
    steps.clear()


def dit() -> DiT:
    return DiT(DiTConfig(hidden_size=16, depth=1, num_heads=2), image_size=8, channels=1, num_classes=4)


def module(network: nn.Module | None = None, **options: Any) -> Recorded:
    return Recorded(network or Own(), VP(), log_snr=LEVELS, sample=QUICK, **options)


def loader(batch_size: int = 8, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(IMAGES, LABELS), batch_size, **options)


def one(batch: Any) -> DataLoader[Any]:
    return DataLoader([batch], batch_size=None)


def trainer(folder: Path | None = None, **options: Any) -> L.Trainer:
    plain: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "log_every_n_steps": 1,
    }
    return L.Trainer(**plain | options)


FLOATS = IMAGES / 127.5 - 1


@pytest.mark.parametrize(
    "batch",
    [
        [FLOATS, LABELS],
        FLOATS,
        IMAGES,
        {"image": IMAGES, "label": LABELS.int()},
        {"pixel_values": IMAGES, "labels": LABELS, "file": ["a.png"] * 48},
        (FLOATS.double(), LABELS),
    ],
)
def test_batches_of_any_common_form_are_read(batch: Any) -> None:
    lm = module(dit())
    trainer(max_steps=1).fit(lm, one(batch))
    assert (lm.batch["label"] is None) == isinstance(batch, Tensor)
    assert torch.allclose(steps[0]["x0"].float(), FLOATS, atol=1e-6) and positions() == list(range(48))


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        ("images", "str"),
        ([LABELS, LABELS], r"torch.int64 (48,)"),
        ({"pixels": IMAGES, "label": LABELS}, "only pixels, label"),
    ],
)
def test_a_batch_of_another_form_is_refused(batch: Any, got: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"of shape (B, C, H, W); got {got}")):
        module().training_step(batch, 0)


@pytest.mark.parametrize("do", ["fit", "validate", "predict"])
def test_labels_out_of_range_are_refused(do: str) -> None:
    with pytest.raises(ValueError, match=r"labels lie in 0\.\.5, allowed are 0\.\.3"):
        getattr(trainer(max_steps=1), do)(module(dit()), one([FLOATS, torch.arange(48) % 6]))


def test_labels_are_checked_in_every_batch() -> None:
    from_one = DataLoader(TensorDataset(IMAGES, torch.arange(48) // 12 + 1), 12)  # sorted: 4 comes last
    for do in ("fit", "validate"):
        with pytest.raises(ValueError, match=r"labels lie in 4\.\.4, allowed are 0\.\.3"):
            getattr(trainer(max_epochs=1), do)(module(dit()), from_one)


@pytest.mark.parametrize(("label", "got"), [(LABELS[:, None], r"int64 \(48, 1\)"), (["cat"] * 48, "list")])
def test_labels_of_the_wrong_type_or_shape_are_refused(label: Any, got: str) -> None:
    with pytest.raises(ValueError, match=r"labels must be whole numbers \(48,\), or float weights .* got .*" + got):
        module(dit()).training_step([FLOATS, label], 0)


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(zip(IMAGES, LABELS, strict=True))


def test_third_party_data_sets_are_read_into_memory() -> None:
    names = ["ape", "bee", "cat", "dog"]
    columns = {"img": [Image.fromarray(image[0].numpy()) for image in IMAGES], "fine_label": LABELS.tolist()}
    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=names)})
    rows = datasets.Dataset.from_dict(columns, features=features)
    for data, known in ((rows, names), (Subset(rows, range(48)), names), (Streamed(), [])):  # type: ignore[arg-type]
        found = image_set(data)
        assert torch.equal(found.images, IMAGES) and torch.equal(found.labels, LABELS)
        assert (found.num_classes, list(found.class_names)) == (4, known)
    with pytest.raises(ValueError, match="labels must be whole numbers, or all None; got 'cat'"):
        image_set([(IMAGES[0], "cat")])  # type: ignore[arg-type]
    for labels, odd in (([1, 0.7], "0.7"), ([torch.tensor(1), torch.tensor(0.7)], "tensor"), ([None, 1], "None")):
        with pytest.raises(ValueError, match=f"labels must be whole numbers, or all None; got {odd}"):
            image_set([(IMAGES[0], label) for label in labels])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one of image, img, images, pixel_values; it has photo, label"):
        image_set([{"photo": IMAGES[0], "label": 1}])  # type: ignore[arg-type]


def test_pillow_images_of_any_integer_mode_are_read() -> None:
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    found = image_set([Image.fromarray(levels)]).images  # type: ignore[arg-type]
    assert found.shape == (1, 1, 8, 8) and (found[0, 0].numpy() == np.round(levels / 257)).all()
    grey = Image.fromarray(levels.astype(np.uint8))
    assert image_set([grey.convert("P")]).shape == image_set([grey.convert("RGBA")]).shape == (3, 8, 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="floating-point pixels, whose range is unknown"):
        image_set([Image.fromarray(levels.astype(np.float32))])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"images must have one shape; got \(1, 8, 8\) and \(3, 8, 8\)"):
        image_set([grey, grey.convert("RGB")])  # type: ignore[arg-type]


def test_floats_well_beyond_1_are_refused_not_clipped() -> None:
    slightly = FLOATS * 1.001
    assert torch.equal(image_set(TensorDataset(slightly)).images, IMAGES)
    standardised, mixed = TensorDataset(2 * FLOATS), [IMAGES[0], FLOATS[0]]
    with pytest.raises(ValueError, match=r"images lie in -2\.\.2: give uint8, or float in -1\.\.1$"):
        ImageDataModule(standardised)
    with pytest.raises(ValueError, match=r"images lie in -0\.929\.\.254: give uint8"):
        image_set(mixed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"images lie in \S+: give uint8"):
        ValidationError(TensorDataset(3 * torch.randn(4, 4, 2, 2)), 8)  # latents


def test_floats_in_0_to_1_are_detected() -> None:
    with pytest.warns(
        UserWarning, match=r"images lie in 0\.\.1: give uint8, or float in -1\.\.1 \(2 \* x - 1 converts"
    ):
        trainer(max_steps=1).fit(module(), one(IMAGES / 255))
    with pytest.raises(ValueError, match=r"images lie in 0\.\.1: give uint8"):
        ImageDataModule(TensorDataset(IMAGES / 255))
    with pytest.raises(ValueError, match=r"images must be uint8 \(N, C, H, W\) in 0\.\.255, got torch\.float32"):
        ImageSet(IMAGES / 255, LABELS, 4)


EPOCHS = [
    ({"limit_train_batches": 2, "max_epochs": 3}, 48),
    ({"limit_train_batches": 0.5, "max_epochs": 2}, 48),
    ({"overfit_batches": 2, "max_epochs": 3}, 48),
    ({"max_epochs": 1}, 48),
    ({"max_steps": 8}, 64),
    ({"fast_dev_run": True}, 8),
    ({"accumulate_grad_batches": 2, "max_steps": 4}, 64),
]


@pytest.mark.parametrize(("options", "images"), EPOCHS)
def test_positions_continue_across_epochs_and_fits(options: dict[str, Any], images: int) -> None:
    lm = module()
    for _ in range(2):
        trainer(**options).fit(lm, loader())
    assert positions() == list(range(2 * images)) and lm.images_seen == 2 * images
    assert len({round(float(t), 6) for step in steps for t in step["time"]}) > images // 2


@pytest.mark.parametrize(("options", "images"), EPOCHS)
def test_positions_of_the_data_module_continue_across_epochs_and_fits(options: dict[str, Any], images: int) -> None:
    lm, data = (
        module(),
        ImageDataModule(TensorDataset(IMAGES, LABELS), batch_size=16 if "accumulate" in str(options) else 8),
    )
    for _ in range(2):
        trainer(**options).fit(lm, datamodule=data)
    assert positions() == list(range(2 * images)) and lm.images_seen == data.samples_seen == 2 * images
    seen = torch.cat([step["x0"] for step in steps])
    distinct = len(seen.flatten(1).unique(dim=0))
    assert distinct == (16 if "overfit_batches" in options else min(48, 2 * images))


def test_a_resumed_fit_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    def fit(ckpt: str | None, *callbacks: L.Callback) -> list[Tensor]:
        torch.manual_seed(0)
        lm, data = module(dit(), label_dropout=0.2), ImageDataModule(TensorDataset(IMAGES, LABELS), batch_size=8)
        ema = EMA(0.9)
        trainer(max_epochs=2, callbacks=[ema, *callbacks]).fit(lm, datamodule=data, ckpt_path=ckpt)
        return [*lm.parameters(), *ema.averages[0.9]]

    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 8:  # within the second epoch
                trainer.save_checkpoint(tmp_path / "8.ckpt")

    whole, resumed = fit(None, Saves()), fit(str(tmp_path / "8.ckpt"))
    assert positions()[96:] == list(range(64, 96))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_the_learning_rate_follows_the_warmup_or_the_given_scheduler() -> None:
    rates: list[float] = []

    class Rates(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    ramp = OptimizerConfig(lr=1.0, warmup_images=64)
    trainer(max_steps=4, accumulate_grad_batches=2, callbacks=[Rates()]).fit(module(optimizer=ramp), loader())
    assert rates[::2] == [0.25, 0.5, 0.75, 1.0]  # 16 images a step
    rates.clear()
    short = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=32)  # 32 images, then 16
    trainer(max_steps=4, callbacks=[Rates()]).fit(module(optimizer=OptimizerConfig(lr=1.0, warmup_images=160)), short)
    assert rates == [32 / 160, 64 / 160, 80 / 160, 112 / 160]
    rates.clear()
    halving = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)  # noqa: E731
    custom = module(optimizer=torch.optim.SGD, lr_scheduler=halving, lr=0.8)
    trainer(max_steps=3, callbacks=[Rates()]).fit(custom, loader())
    assert rates == [0.8, 0.4, 0.2] and isinstance(custom.optimizers().optimizer, torch.optim.SGD)  # type: ignore[union-attr]


def test_clipping_covers_every_parameter_group_and_is_set_in_one_place() -> None:
    def groups(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": [p]} for p in parameters], lr=1.0)

    def moved(by: str | None = None, **options: Any) -> Tensor:
        torch.manual_seed(0)
        lm = module(optimizer=groups)
        before = [p.detach().clone() for p in lm.parameters()]
        trainer(max_steps=1, gradient_clip_algorithm=by, **options).fit(lm, loader())
        return torch.cat([(p - b).detach().flatten() for p, b in zip(lm.parameters(), before, strict=True)])

    whole = moved()
    assert moved(gradient_clip_val=0.01).norm() == pytest.approx(0.01, rel=1e-4) and whole.norm() > 0.02
    assert moved("value", gradient_clip_val=0.001).abs().max() == pytest.approx(0.001, rel=1e-3)
    both = module(optimizer=OptimizerConfig(grad_clip_norm=1.0))
    with pytest.raises(ValueError, match=r"give either grad_clip_norm=1 or gradient_clip_val=2"):
        trainer(max_steps=1, gradient_clip_val=2.0).fit(both, loader())


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_of_fp16_are_unscaled_once(kind: Any, fused: bool) -> None:
    lm = module(optimizer=lambda parameters: kind(parameters, lr=1e-3, fused=fused))
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))  # type: ignore[attr-defined]
    trainer(max_steps=2, plugins=[plugin]).fit(lm, loader())
    assert lm.grad_norm is not None and 0 < float(lm.grad_norm) < 100


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_parameters_have_the_dtype_of_the_precision(precision: Any) -> None:
    lm = module()
    trainer(max_steps=2, precision=precision).fit(lm, loader())
    assert next(lm.network.parameters()).dtype == (torch.float64 if precision == "64-true" else torch.float32)


def test_true_16_bit_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="times and noise need more than 16 bits; choose bf16-mixed"):
        trainer(max_steps=1, precision="bf16-true").fit(module(), loader())


def test_load_from_checkpoint_restores_module_and_average(tmp_path: Path) -> None:
    fitter = trainer(max_steps=2, callbacks=[EMA(0.5)])
    lm = module(dit(), seed=3, label_dropout=0.1, optimizer=torch.optim.SGD, lr=0.1)
    fitter.fit(lm, loader())
    fitter.save_checkpoint(path := tmp_path / "a.ckpt")
    again = DiffusionModule.load_from_checkpoint(path)
    assert (again.seed, again.null_label, again.images_seen, again.log_snr) == (3, 4, 16, LEVELS)
    assert torch.equal(again.network.final.weight, lm.network.final.weight)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="trained with optimizer SGD; pass optimizer= to load_from_checkpoint"):
        trainer(max_steps=1).fit(again, loader())
    with pytest.raises(ValueError, match=r"EMA: the checkpoint has decays 0.5, not 0.9"):
        trainer(max_steps=4, callbacks=[EMA(0.9)]).fit(module(dit()), loader(), ckpt_path=path)
    EMA.load(path, again)
    average = fitter.callbacks[0].averages[0.5]  # type: ignore[attr-defined]
    assert all(torch.equal(p, a) for p, a in zip(again.network.parameters(), average, strict=True))
    trainer(max_steps=1).fit(custom := module(), loader())
    custom.trainer.save_checkpoint(path)
    with pytest.raises(ValueError, match="does not hold network=Own; pass load_from_checkpoint"):
        DiffusionModule.load_from_checkpoint(path)
    loaded = DiffusionModule.load_from_checkpoint(path, network=Own())
    assert torch.equal(loaded.network.conv.weight, custom.network.conv.weight)  # type: ignore[union-attr]
    assert loaded.shape == (1, 8, 8)


def test_validate_test_and_predict_agree_with_direct_calls() -> None:
    lm = module(dit())
    fitter = trainer()
    wanted = bound_metrics("val", denoising_error(lm.network, lm.process, ImageSet(IMAGES, LABELS, 4), LEVELS))
    (found,) = fitter.validate(lm, loader(20), verbose=False)
    assert found == pytest.approx(wanted, rel=1e-5)
    data = ImageDataModule(TensorDataset(IMAGES), TensorDataset(IMAGES, LABELS), batch_size=20)
    (tested,) = fitter.test(lm, datamodule=data, verbose=False)
    assert tested["test/bound"] == pytest.approx(wanted["val/bound"], rel=1e-5)
    samples = torch.cat(fitter.predict(lm, DataLoader(LABELS[:6], batch_size=4)))  # type: ignore[arg-type]
    assert samples.shape == (6, 1, 8, 8) and samples.dtype == torch.uint8
    assert torch.equal(samples, torch.cat(fitter.predict(lm, loader(48)))[:6])  # type: ignore[arg-type]


def test_ranks_with_batches_of_different_sizes_share_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = module(dit())
    lm.shape = (1, 8, 8)
    drawn = []
    for rank, sizes in enumerate(([2, 1], [2])):
        monkeypatch.setattr("diffbench.training.diffusion.distributed.rank", lambda rank=rank: rank)
        lm.on_predict_epoch_start()
        drawn += [lm.predict_step(torch.zeros(size, dtype=torch.int64), i) for i, size in enumerate(sizes)]
    assert len(torch.cat(drawn).flatten(1).unique(dim=0)) == 5


def test_sample_draws_from_a_network_and_checks_its_arguments() -> None:
    net = dit()
    several, one_label = sample(net, VP(), labels=[1, 1, 1], steps="2"), sample(net, VP(), 3, labels=1, steps=2)
    assert several.shape == (3, 1, 8, 8) and torch.equal(several, one_label)
    with pytest.raises(ValueError, match=r"labels: lie in 0\.\.5, allowed are 0\.\.3"):
        sample(net, VP(), labels=[0, 5])
    with pytest.raises(ValueError, match="n: must be at least 1, got 0"):
        sample(net, VP(), 0)
    with pytest.raises(ValueError, match="labels: at least one is needed"):
        sample(net, VP(), labels=[])


def test_loggers_and_monitors_see_the_metrics(tmp_path: Path) -> None:
    log = CSVLogger(tmp_path, "log")
    best = ModelCheckpoint(tmp_path / "best", "best", monitor="val/bound")
    stop = EarlyStopping("val/bound", patience=1, min_delta=100)
    measured = ValidationError(TensorDataset(IMAGES, LABELS), every=16, log_snr=[0.0, 1.0])
    data = ImageDataModule(TensorDataset(IMAGES, LABELS), TensorDataset(IMAGES, LABELS), batch_size=8)
    fitter = trainer(tmp_path, max_epochs=5, logger=log, callbacks=[best, stop, measured], enable_checkpointing=True)
    fitter.fit(module(dit()), datamodule=data)
    assert fitter.current_epoch == 2 and best.best_model_path == str(tmp_path / "best" / "best.ckpt")
    with (Path(log.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["train/loss"]]) == 12
    assert (
        len([row for row in rows if row["val/level/1"]]) == 6 and len([row for row in rows if row["val/level/2"]]) == 2
    )


def test_callbacks_work_alone_in_any_order(tmp_path: Path) -> None:
    held_out = TensorDataset(IMAGES, LABELS)
    lm, ema = module(dit()), EMA(0.9)
    alone = ValidationError(held_out, every=24, log_snr=LEVELS)
    fd = FrechetDistance(held_out, every=24, extractor=Pixels(), count=20, settings=QUICK, best="fd")
    fitter = trainer(
        tmp_path,
        max_steps=5,
        callbacks=[fd, SampleGrid(32, settings=QUICK), SampleGrid(32, settings=QUICK, name="more"), alone, ema],
        logger=[CSVLogger(tmp_path), TensorBoardLogger(tmp_path, "tb")],
    )
    fitter.fit(lm, loader())
    with ema.applied():
        wanted = bound_metrics("val", denoising_error(lm.network, lm.process, ImageSet(IMAGES, LABELS, 4), LEVELS))
    assert float(fitter.callback_metrics["val/bound"]) == pytest.approx(wanted["val/bound"], rel=1e-5)
    assert {"fd/Pixels@20", "kid/Pixels@20", "best/fd/Pixels@20"} <= set(fitter.callback_metrics)
    folder = Path(str(fitter.log_dir))
    assert (folder / "best.safetensors").is_file()
    assert {path.name for path in (folder / "samples").iterdir()} == {"images-000000032.png", "more-000000032.png"}
    (events,) = (tmp_path / "tb").rglob("events*")
    shown = EventAccumulator(str(events)).Reload().Tags()  # type: ignore[no-untyped-call]
    assert (
        set(shown["images"]) == {"samples/ema", "samples/steps", "samples/more", "samples/more-steps"}
        and "val/bound" in shown["scalars"]
    )


class Pixels(nn.Module):
    """A feature extractor that returns the first four pixels."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float().flatten(1)[:, :4] / 255


class Regression(L.LightningModule):
    """A LightningModule that is not one of diffbench's."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(64, 4)
        self.fd = metrics.FrechetDistance(metrics.gaussian(IMAGES.flatten(1)[:, :4]))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.line(batch[0].flatten(1) / 255), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        seen.append(self.line.weight.detach().clone())
        self.fd.update(batch[0].flatten(1)[:, :4])
        self.log("fd", self.fd)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


seen: list[Tensor] = []


def test_ema_averages_any_lightning_module() -> None:
    lm, ema = Regression(), EMA(0.5)
    seen.clear()
    fitter = trainer(max_steps=6, callbacks=[ema], num_sanity_val_steps=0)
    fitter.fit(lm, loader(), loader(24))
    assert ema.updates == 6
    assert torch.equal(seen[0], ema.averages[0.5][0]) and not torch.equal(seen[0], lm.line.weight)
    assert fitter.callback_metrics["fd"] < 1e-6  # logged as a torchmetric
    with pytest.raises(
        TypeError, match="SampleGrid works with diffbench modules, such as DiffusionModule, got Regression"
    ):
        trainer(max_steps=1, callbacks=[SampleGrid(8)]).fit(lm, loader())


def test_an_ema_callback_starts_over_with_a_second_module() -> None:
    ema = EMA(0.9)
    for _ in range(2):
        lm = module(dit(), lr=0.1)
        trainer(max_steps=3, callbacks=[ema]).fit(lm, loader())
        assert ema.updates == 3 and ema.averages[0.9][0].shape == next(lm.parameters()).shape


def test_half_lives_need_the_batch_size() -> None:
    with pytest.raises(ValueError, match=r"ema\.half_life: give EMAConfig\(half_life=...\)\.in_steps\(batch_size\)"):
        EMA(EMAConfig(half_life=[500]))
    assert EMA(EMAConfig(half_life=[8]).in_steps(8)).config.decays == [0.5]


def test_a_sample_grid_is_drawn_in_parallel_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch is smaller than four, because the strip of steps needs the first four samples in one."""
    sizes: list[int] = []

    def recorded(self: Sampler, config: SampleConfig) -> int:
        sizes.append(config.batch_size)
        return config.batch_size

    monkeypatch.setattr(Sampler, "batch_size", recorded)
    network = dit()
    for at_once in (1, 3, 16):
        sampler = Sampler(network, VP(), (1, 8, 8), null_label=4, at_once=at_once)
        grid = SampleGrid(8, sampler, QUICK, name=f"on-{at_once}")
        trainer(tmp_path, max_steps=1, callbacks=[grid]).fit(module(network, lr=1e-9), loader())
    images = [np.array(Image.open(path)).astype(int) for path in sorted(tmp_path.rglob("on-*.png"))]
    assert sizes == [16, 6, 4] and len(images) == 3
    assert all(np.abs(image - images[0]).max() <= 1 for image in images)


def test_two_devices_split_the_positions(tmp_path: Path) -> None:
    """Ranks split the positions, both with the sampler that Lightning puts into a loader and with ours."""

    class Writes(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            (tmp_path / f"{kind}-{trainer.global_rank}.json").write_text(json.dumps(positions()))

    data_set = TensorDataset(IMAGES, LABELS)
    for kind, data in {
        "loader": loader(4),
        "module": ImageDataModule(TensorDataset(IMAGES, LABELS), batch_size=8),
    }.items():
        shown: list[L.Callback] = [
            EMA(0.9),
            SampleGrid(24, settings=QUICK),
            ValidationError(data_set, 24, log_snr=LEVELS),
        ]
        shown += [FrechetDistance(data_set, 24, extractor=Pixels(), count=7, settings=QUICK)]
        fitter = trainer(tmp_path, devices=2, strategy="ddp_fork", max_epochs=1, callbacks=[Writes(), *shown])
        fitter.fit(module(dit()), data)
        assert {"fd/Pixels@7", "val/bound"} <= set(fitter.callback_metrics)
        first, second = (json.loads((tmp_path / f"{kind}-{rank}.json").read_text()) for rank in (0, 1))
        assert sorted(first + second) == list(range(48)) and first[:4] == [0, 1, 2, 3] and second[:4] == [4, 5, 6, 7]


def test_two_devices_validate_and_predict_like_one(tmp_path: Path) -> None:
    """With unequal numbers of images per rank, bound and samples equal those of one device."""

    class Writes(L.Callback):
        def on_predict_batch_end(
            self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *rest: Any
        ) -> None:
            torch.save(
                (batch["index"], outputs), tmp_path / f"{devices}-{trainer.global_rank}-{int(batch['index'][0])}"
            )

    held_out = TensorDataset(IMAGES[:7], LABELS[:7])
    bounds, samples = [], []
    for devices in (1, 2):
        torch.manual_seed(0)
        options: dict[str, Any] = {"strategy": "ddp_fork"} if devices == 2 else {}
        fitter = trainer(tmp_path, devices=devices, callbacks=[Writes()], **options)
        lm, data = module(dit()), ImageDataModule(TensorDataset(IMAGES, LABELS), held_out, batch_size=2)
        bounds.append(fitter.validate(lm, data, verbose=False)[0]["val/bound"])
        fitter.predict(lm, datamodule=data, return_predictions=False)
        drawn = [torch.load(path) for path in tmp_path.glob(f"{devices}-*")]
        index, images = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        samples.append(images[index.argsort()])
    assert bounds[1] == pytest.approx(bounds[0], rel=1e-5)
    assert (samples[0].int() - samples[1].int()).abs().max() <= 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from Lightning's calls to jsonargparse
def test_lightning_cli_builds_module_and_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    network = {
        "config": {"hidden_size": 16, "depth": 1, "num_heads": 2},
        "image_size": 8,
        "channels": 1,
        "num_classes": 4,
    }
    options = {"max_steps": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    config = {
        "trainer": options | {"enable_progress_bar": False, "enable_model_summary": False},
        "model": {
            "network": {"class_path": "diffbench.DiT", "init_args": network},
            "process": {"class_path": "diffbench.EDM", "init_args": {"config": {"sigma_max": 60.0}}},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
            "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1}},
        },
        "data": {"batch_size": 8, "train": {"class_path": f"{__name__}.Squares", "init_args": {"count": 32}}},
    }
    monkeypatch.setattr("sys.argv", ["train.py"])
    argv = ["fit", "--config", str(tmp_path / "c.yaml")]
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    cli_options: dict[str, Any] = {"save_config_callback": None, "seed_everything_default": 0}
    cli = LightningCLI(DiffusionModule, ImageDataModule, args=argv, **cli_options)
    assert cli.model.process.config.sigma_max == 60 and cli.model.images_seen == 16
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.001)


class Squares(Dataset[Any]):
    """A data set that a command line can name."""

    def __init__(self, count: int = 4) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return IMAGES[index], LABELS[index]


def test_lr_find_suggests_a_rate_and_restores_the_module(tmp_path: Path) -> None:
    lm = module(dit())
    fitter = trainer(tmp_path, max_steps=20)
    found = Tuner(fitter).lr_find(lm, ImageDataModule(TensorDataset(IMAGES, LABELS), batch_size=8), num_training=12)
    assert found is not None and len(found.results["lr"]) >= 10
    assert lm.images_seen == 0 and lm.lr in (None, found.suggestion())


def test_lr_find_does_not_change_the_average(tmp_path: Path) -> None:
    def average(find: bool) -> list[Tensor]:
        torch.manual_seed(0)
        lm, ema = module(dit(), lr=0.1), EMA(0.9)
        fitter = trainer(tmp_path, max_steps=3, callbacks=[ema])
        if find:
            Tuner(fitter).lr_find(lm, loader(), num_training=12, update_attr=False)
        fitter.fit(lm, loader())
        assert ema.updates == 3
        return ema.averages[0.9]

    assert all(map(torch.equal, average(True), average(False)))


def test_latents_of_any_data_set_are_read() -> None:
    latents = torch.randn(24, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    data = LatentDataModule(TensorDataset(latents, LABELS[:24]), batch_size=8)
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    index = data.train_dataloader().dataset.index(0, 8)  # type: ignore[attr-defined]
    assert torch.equal(batch["x0"], latents[index]) and torch.equal(batch["label"], LABELS[index])
    with pytest.raises(ValueError, match="flip: these latents have no mirrored ones"):
        LatentDataModule(TensorDataset(latents), flip=True)


def test_latents_in_bfloat16_are_read_as_float32() -> None:
    latents = torch.randn(24, 4, 2, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    data = LatentDataModule(TensorDataset(latents, LABELS[:24]), batch_size=8)
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    index = data.train_dataloader().dataset.index(0, 8)  # type: ignore[attr-defined]
    assert torch.equal(batch["x0"], latents[index].float())


def test_callbacks_that_draw_latents_need_a_decoder(tmp_path: Path) -> None:
    net = DiT(DiTConfig(2, 16, 1, 2), 4, 4)
    data = DataLoader(torch.randn(48, 4, 4, 4, generator=torch.Generator().manual_seed(0)), batch_size=8)
    held_out = TensorDataset(IMAGES, LABELS)
    for callback in (SampleGrid(8, settings=QUICK), FrechetDistance(held_out, 8, Pixels(), 20, settings=QUICK)):
        with pytest.raises(ValueError, match=r"^sampler: 4 channels are not an image; give a Sampler with `decode`$"):
            trainer(tmp_path, max_steps=1, callbacks=[callback]).fit(DiffusionModule(net, VP()), data)


def test_loss_aware_times_need_vp() -> None:
    with pytest.raises(ValueError, match=r"^time_sampling: loss_aware counts the steps of vp, not edm$"):
        DiffusionModule(Own(), EDM(), time_sampling="loss_aware")


def test_a_misspelt_time_sampling_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^time_sampling: unknown value 'stratifed'; choose from uniform, strat"):
        DiffusionModule(Own(), VP(), time_sampling="stratifed")  # type: ignore[arg-type]


def test_a_warm_up_needs_a_loader_with_a_batch_size() -> None:
    with pytest.raises(ValueError, match="need the batch size, which this loader does not expose"):
        trainer(max_steps=1).fit(module(optimizer=OptimizerConfig(warmup_images=8)), one(IMAGES))


def test_reduce_on_plateau_lowers_the_learning_rate() -> None:
    plateau = lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10)  # noqa: E731
    lm = module(lr_scheduler=plateau, lr=0.1)
    trainer(max_epochs=4).fit(lm, loader(24), loader(48))
    assert lm.optimizers().param_groups[0]["lr"] < 0.1 and math.isfinite(lm.lr)  # type: ignore[union-attr, arg-type]


def test_lbfgs_is_refused() -> None:
    with pytest.raises(ValueError, match="LBFGS needs several losses per step, each with new noise"):
        trainer(max_steps=1).fit(module(optimizer=torch.optim.LBFGS), loader(24))
