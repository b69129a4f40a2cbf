"""The module, the data and the callbacks in a script of one's own, with Lightning's trainer as it is."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch

from diffbench.config.sections import EMAConfig, OptimizerConfig, SampleConfig
from diffbench.data.datamodule import ImageDataModule
from diffbench.data.registry import DigitsConfig, digits
from diffbench.denoisers import DiTConfig, build
from diffbench.diffusion import DiscreteVP, VPConfig
from diffbench.evaluation.validation_error import denoising_error
from diffbench.sampling.sampler import Sampler
from diffbench.training.callbacks import SampleGrid, Validation
from diffbench.training.diffusion import DiffusionModule
from diffbench.training.ema import EMA
from diffbench.training.logger import RunLogger


def test_with_lightnings_own_trainer(tmp_path: Path) -> None:
    train, held_out = digits(DigitsConfig(held_out=40))
    torch.manual_seed(0)
    net = build("dit", DiTConfig(hidden_size=16, depth=1, num_heads=2), image_size=8, channels=1, num_classes=10)
    process, ema, logger = DiscreteVP(VPConfig(100)), EMA(EMAConfig([0.9])), RunLogger(tmp_path, batch_size=8, every=16)
    sampler = Sampler(net, process, (1, 8, 8), null_label=10)
    evaluations = [
        Validation(logger, ema, held_out, [0.0, 2.0], every=24),
        SampleGrid(logger, ema, sampler, SampleConfig(steps="2"), class_names="0123456789", every=32),
    ]
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=5,
        callbacks=[ema, logger, *evaluations],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    module = DiffusionModule(net, process, OptimizerConfig(), seed=0, batch_size=8)
    trainer.fit(module, datamodule=ImageDataModule(train, held_out, seed=0, batch_size=8))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines if "train/loss" in line] == [16, 32, 40]
    errors = {line["images"]: line["val/level/2"] for line in lines if "val/bound" in line}
    assert list(errors) == [24, 40]
    with ema.applied():
        assert denoising_error(net, process, held_out, [2.0])[2.0] == pytest.approx(errors[40], rel=1e-6)
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["images-000000032.png"]
