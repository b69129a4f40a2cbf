"""The workflow with custom images: train at laptop size, view, score and sample a class, without optional packages."""

import re
from pathlib import Path

import pytest
from own_images import folder
from PIL import Image

from diffbench.cli import main
from diffbench.evaluation.records import results
from diffbench.sampling.images import CAPTION_HEIGHT
from diffbench.training import logger

TINY = ["denoiser.model_channels=8", "denoiser.channel_mult=[1,1]", "debug=smoke"]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def pets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFBENCH_CACHE", str(tmp_path / "cache"))
    return folder(tmp_path / "pets", {"cat": 20, "dog": 20}, height=10, width=8)


def command(pets: Path, *args: str) -> list[str]:
    return [
        "train",
        "experiments/own/unet.yaml",
        f"data.path={pets}",
        f"runs_dir={pets.parent / 'runs'}",
        *TINY,
        *args,
    ]


def test_train_look_score_and_ask_for_a_class(pets: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger, "LEAST_PRINTED_S", 0.0)
    monkeypatch.setattr(logger, "MEASURED_S", 0.0)
    run = pets.parent / "runs" / "own" / "unet-smoke-pets-model_channels_8-channel_mult_1.0,1.0-s0"
    assert main(command(pets, "evaluate=null")) == 0
    out = capsys.readouterr().out
    assert re.search(r"^time: 0 images at about [\d,]+ images/s here, 0\.0 s of training \(trainer\.max_im", out, re.M)
    assert "pets, 3x8x8: 36 images to train on" in out and "2 classes: cat 18, dog 18" in out
    assert "sizes (height x width): all 10x8; resized to 8x8, 36 of 36 cropped at the centre (up to 20% of an" in out
    assert "not scored" not in out and not results(run)
    with Image.open(run / "samples" / "final-000000016.png") as grid:  # a named column for each class
        assert grid.width == 2 * 68 and (grid.height - CAPTION_HEIGHT) % 68 == 0
    assert main(command(pets)) == 0  # without evaluate=null: scored now, and nothing is trained
    assert any(name.startswith("fd/random-cnn@") for name in results(run)[0])
    capsys.readouterr()
    assert main(["sample", str(run), "labels=cat", "n=3", "steps=2"]) == 0
    assert "labels: cat 3" in capsys.readouterr().out
    assert main(command(pets, "evaluate=no")) == 2
    assert capsys.readouterr().err == "error: command line: evaluate: must be null or false, got 'no'\n"


def test_class_folders_may_be_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("DIFFBENCH_CACHE", str(tmp_path / "cache"))
    pets = folder(tmp_path / "pets", {"1": 20, "2": 20, "10": 20}, height=8, width=8)
    assert main(command(pets, "evaluate=null", "tag=numbers")) == 0
    assert "3 classes: 1 18, 2 18, 10 18" in capsys.readouterr().out
    with Image.open(tmp_path / "runs/own/unet-smoke-numbers-s0/samples/final-000000016.png") as grid:
        assert grid.width == 3 * 68


def test_a_folder_may_be_spelled_otherwise(pets: Path, capsys: Capture) -> None:
    assert main(command(pets, "evaluate=null")) == 0
    for path in (f"{pets}/", f"{pets.parent}/./pets"):
        args = [f"data.path={path}" if arg.startswith("data.path=") else arg for arg in command(pets)]
        assert main([*args, "evaluate=null"]) == 0
        assert "complete at 16 images" in capsys.readouterr().out


def test_scoring_never_takes_longer_than_training(pets: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffbench.runs.drawing.drawing_seconds", lambda run: 900.0)
    assert main(command(pets, "tag=slow")) == 0
    assert "not scored: 20 samples would take about 15.0 min, longer than training; to" in capsys.readouterr().out
    run = pets.parent / "runs" / "own" / "unet-smoke-slow-s0"
    assert not results(run)
    with Image.open(run / "samples" / "final-000000016.png") as grid:
        assert grid.height == CAPTION_HEIGHT + 68  # as many rows as can be drawn in a minute


def test_images_need_not_be_square(pets: Path) -> None:
    sizes = ["data.image_size=[20,16]", "denoiser.attention_resolutions=[10]"]
    assert main(command(pets, "tag=tall", "evaluate=false", *sizes)) == 0
    with Image.open(pets.parent / "runs/own/unet-smoke-tall-s0/samples/final-000000016.png") as grid:
        assert grid.width == 2 * (16 * 3 + 4)
