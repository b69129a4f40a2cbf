"""Impossible experiments in latent space are refused before anything is trained or written."""

from collections.abc import Callable
from pathlib import Path

import pytest
from test_autoencoding import experiments, refused

from diffbench.config.kinds import RunConfig
from diffbench.config.load import load
from diffbench.runs.build import autoencoder_experiment

__all__ = ["refused"]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("autoencoder=nowhere", "autoencoder: nowhere: no such folder; give a folder with config.json"),
        ("autoencoder=''", "autoencoder: must be a folder, a hub name, an experiment's YAML, or null"),
        (
            "autoencoder=experiments/digits/dit.yaml",
            "autoencoder: experiments/digits/dit.yaml: its kind is",
        ),
        (
            "autoencoder=experiments/digits/nothing.yaml",
            "autoencoder: experiments/digits/nothing.yaml: no",
        ),
        (
            "data.size=9",
            "autoencoder: this autoencoder takes 1 channels and sides divisible by 2, got 1x9x9",
        ),
    ],
)
def test_an_unusable_autoencoder_is_refused_before_training(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, line: str
) -> None:
    paths = experiments(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert f": {line}" in refused("train", paths["dit"], f"runs_dir={tmp_path / 'none'}", *change.split())
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("network.norm_num_groups=3", "network.block_out_channels: norm_num_groups=3 must divide"),
        ("data.size=9", "network.block_out_channels: this autoencoder takes 1 channels and sides divisible by 2"),
        ("loss.perceptual=lpips", "command line: loss.perceptual: unknown extractor 'lpips'; choose from digits-cnn,"),
        ("trainer.label_dropout=0.1", "command line: trainer.label_dropout: unknown key"),
    ],
)
def test_an_impossible_autoencoder_is_refused_before_training(
    refused: Callable[..., str], tmp_path: Path, change: str, line: str
) -> None:
    paths = experiments(tmp_path)
    assert line in refused("train", paths["autoencoder"], f"runs_dir={tmp_path / 'none'}", change)
    assert not (tmp_path / "none").exists()


def test_the_data_path_of_a_denoiser_is_passed_to_its_autoencoder(tmp_path: Path) -> None:
    """data.path given to a denoiser's command reaches the autoencoder that is trained first."""
    cifar10 = "experiments/cifar10-latent/dit.yaml"
    config = load(cifar10, [f"data.path={tmp_path}", "debug=smoke", "runs_dir=elsewhere"])
    assert isinstance(config, RunConfig)
    found, overrides = autoencoder_experiment(config)
    assert (found.data.path, found.runs_dir, found.debug) == (str(tmp_path), "elsewhere", "smoke")
    assert overrides == ["runs_dir=elsewhere", "debug=smoke", f"data.path={tmp_path}"]
    digits = load("experiments/digits-latent/dit.yaml")
    assert isinstance(digits, RunConfig)
    assert autoencoder_experiment(digits)[1] == ["runs_dir=runs"]
