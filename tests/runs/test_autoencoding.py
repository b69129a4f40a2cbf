"""Runs in latent space: the autoencoder's run, and the three stages of a denoiser's."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffbench.autoencoders import io as files
from diffbench.cli import main
from diffbench.core.pixels import from_uint8
from diffbench.runs.autoencoder import AutoencoderRun
from diffbench.runs.lifecycle import load, open_any, train
from diffbench.sampling.images import CAPTION_HEIGHT
from diffbench.training.checkpoint import SaveState

ROOT = Path(__file__).parents[2]
AUTOENCODER = """
kind: autoencoder
data: {name: digits, size: 16, held_out: 40}
network: {latent_channels: 1, block_out_channels: [4, 8], layers_per_block: 1, norm_num_groups: 2}
loss: {reconstruction: l2, perceptual: digits-cnn, perceptual_weight: 0.01}
optimizer: {lr: 3e-3}
ema: {decays: [0.9]}
trainer: {max_images: 320, batch_size: 16, log_images: 64, validate_images: 160, checkpoint_images: 80,
  sample_images: 160}
evaluate: {count: 40}
"""
DENOISER = """
kind: denoiser
data: {name: digits, size: 16, held_out: 40}
autoencoder: PATH
denoiser: {name: dit, patch_size: 4, hidden_size: 16, depth: 1, num_heads: 2}
ema: {decays: [0.9]}
trainer: {max_images: 64, batch_size: 16, log_images: 32, validate_images: 64, checkpoint_images: 64, sample_images: 64}
sample: {steps: "3", guidance: 1.5, clip: false}
evaluate: {count: 20}
"""


def experiments(folder: Path) -> dict[str, str]:
    """Write the two YAML files; return their paths and the folder for runs."""
    place = folder / "latent"
    place.mkdir()
    (place / "autoencoder.yaml").write_text(AUTOENCODER)
    (place / "dit.yaml").write_text(DENOISER.replace("PATH", str(place / "autoencoder.yaml")))
    return {
        "autoencoder": str(place / "autoencoder.yaml"),
        "dit": str(place / "dit.yaml"),
        "runs": str(folder / "runs"),
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], str]:
    """Paths of a denoiser and its autoencoder, trained by one command, and what the command printed."""
    import contextlib
    import io

    paths, out = experiments(tmp_path_factory.mktemp("latent")), io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["train", paths["dit"], f"runs_dir={paths['runs']}"]) == 0
    return paths, out.getvalue()


@pytest.fixture
def runs(trained: tuple[dict[str, str], str], tmp_path: Path) -> tuple[Path, Path]:
    """Copies of the autoencoder's and the denoiser's run that a test may modify; the second refers to the first."""
    paths, _ = trained
    runs = Path(paths["runs"]) / "latent"
    for run in (runs / "autoencoder-s0", runs / "dit-s0"):
        shutil.copytree(run, tmp_path / run.name)
    yaml = tmp_path / "dit-s0" / "config.yaml"
    yaml.write_text(yaml.read_text().replace(str(runs / "autoencoder-s0"), str(tmp_path / "autoencoder-s0")))
    return tmp_path / "autoencoder-s0", tmp_path / "dit-s0"


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_one_command_runs_and_prints_all_stages(trained: tuple[dict[str, str], str]) -> None:
    paths, out = trained
    runs = Path(paths["runs"]) / "latent"
    stages = (
        f"{runs / 'autoencoder-s0'}: training the autoencoder first (autoencoder={paths['autoencoder']})",
        f"{runs / 'autoencoder-s0'}: measuring the scale of the latents of 1,757 images",
        f"{runs / 'dit-s0'}: starting, ",
        f"encoding 1,757 images of digits by autoencoder {runs / 'autoencoder-s0'} into ",
        "encoding 40 images of digits",
        f"{runs / 'autoencoder-s0'}: scoring reconstructions",
        f"{runs / 'dit-s0'}: drawing and scoring samples",
        "reconstruction_fd/digits-cnn-area8@20",
    )
    at = [out.index(line) for line in stages]
    assert at == sorted(at)
    assert f"autoencoder: {runs / 'autoencoder-s0'}\n" in (runs / "dit-s0" / "config.yaml").read_text()


def test_a_second_command_trains_nothing_again(
    trained: tuple[dict[str, str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    paths, _ = trained
    before = sorted(p.stat().st_mtime_ns for p in Path(paths["runs"]).rglob("*.safetensors"))
    assert main(["train", paths["dit"], f"runs_dir={paths['runs']}"]) == 0
    out = capsys.readouterr().out
    assert "dit-s0: complete at 64 images" in out and "trained first" not in out and "encoding" not in out
    assert sorted(p.stat().st_mtime_ns for p in Path(paths["runs"]).rglob("*.safetensors")) == before


def test_encode_prints_which_latents_it_made(
    trained: tuple[dict[str, str], str], runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    paths, _ = trained
    command = ["encode", paths["dit"], f"autoencoder={runs[0]}"]
    assert main([*command, "latent_dtype=float32"]) == 0
    out = capsys.readouterr().out
    assert "encoding 1,757 images" in out
    assert "1,757 latents of digits, 64 numbers each, 0.9 MiB\n40 latents of digits, 64 numbers each, 0.0 MiB\n" in out
    assert main(command) == 0  # the float16 latents exist since the run was trained
    assert capsys.readouterr().out.startswith("1,757 latents of digits, 64 numbers each, 0.4 MiB\n")


def test_samples_and_image_grids_are_decoded(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = runs
    run = load(folder)
    assert run.shape == (1, 8, 8)
    images = run.sample_tensor(4, steps="2")
    assert images.shape == (4, 1, 16, 16) and images.dtype == torch.uint8
    side = 16 * 4 + 4  # enlarged four times, with a border
    for name in ("images-000000064.png", "final-000000064.png"):
        with Image.open(folder / "samples" / name) as grid:
            assert grid.width == 10 * side
    assert main(["sample", str(folder), "n=4", "strip=true", "steps='3'"]) == 0
    image, strip = capsys.readouterr().out.split()
    with Image.open(image) as grid, Image.open(strip) as steps:
        assert grid.size == (4 * side, CAPTION_HEIGHT + side) and steps.height == 4 * 2 * 36


def test_raw_samples_are_latents_even_with_one_channel(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = runs
    command = ["sample", str(folder), "n=4", "raw=true", "sample.clip=false"]
    assert main([*command, f"out={tmp_path / 'x.npz'}"]) == 0
    values = np.load(tmp_path / "x.npz")["arr_0"]
    assert values.dtype == np.float32 and values.shape == (4, 1, 8, 8)
    assert len(np.unique(values)) == values.size  # not bytes
    capsys.readouterr()
    assert main(command) == 2
    assert capsys.readouterr().err == (
        "error: command line: out: 1x8x8 raw values are not an image; set only out=NAME.npz\n"
    )


def test_scores_record_the_autoencoder_and_its_reconstruction_distance(runs: tuple[Path, Path]) -> None:
    autoencoder, denoiser = runs
    for record in records(denoiser):
        assert record["autoencoder"] == files.load(autoencoder / "autoencoder").fingerprint
        assert record["reconstruction_fd/digits-cnn-area8@20"] > 0
    original = load(denoiser).train_set  # reference statistics come from the images themselves
    assert records(denoiser)[0]["data"] == original.fingerprint()


def test_an_autoencoder_run_ends_with_scores_and_normalised_latents(runs: tuple[Path, Path]) -> None:
    folder, _ = runs
    (record,) = records(folder)
    assert record["numbers"] == 64
    assert {"psnr@40", "ssim@40", "reconstruction_fd/digits-cnn-area8@40"} < record.keys()
    run = open_any(folder).use_average()
    assert isinstance(run, AutoencoderRun)
    net = run.trained
    weights = load_file(folder / "ema-0.9.safetensors")
    assert all(torch.equal(weights[k], v) for k, v in net.state_dict().items())
    mean, log_variance = net.encode(from_uint8(run.train_set.images))
    assert net.scaled(mean).mean().item() == pytest.approx(0, abs=1e-4)
    spread = net.scaled(mean).var(correction=0) + log_variance.exp().mean() * net.config.scaling_factor**2
    assert spread.item() == pytest.approx(1, rel=1e-3)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["images"] for m in lines if "val/psnr" in m] == [160, 320]
    with Image.open(folder / "samples" / "images-000000320.png") as grid:
        assert grid.size == (10 * 68, 8 * 68)


def test_evaluate_and_compare_take_any_kind_of_run(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    autoencoder, denoiser = runs
    assert main(["evaluate", str(autoencoder), "evaluate.count=20"]) == 0
    assert "psnr@20" in capsys.readouterr().out
    assert len(records(autoencoder)) == 2
    assert main(["compare", str(autoencoder), str(denoiser)]) == 0
    assert "64 for 256" in capsys.readouterr().out


def test_an_interrupted_autoencoder_ends_like_an_uninterrupted_one(
    trained: tuple[dict[str, str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, _ = trained
    step_end = SaveState.on_train_batch_end

    def send_sigterm(self: SaveState, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        step_end(self, trainer, *rest)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(SaveState, "on_train_batch_end", send_sigterm)
        train(paths["autoencoder"], [f"runs_dir={tmp_path}"])
    folder = tmp_path / "latent" / "autoencoder-s0"
    assert not (folder / "autoencoder").exists()
    train(paths["autoencoder"], [f"runs_dir={tmp_path}"])
    whole = Path(paths["runs"]) / "latent" / "autoencoder-s0"
    ours, theirs = files.load(folder / "autoencoder"), files.load(whole / "autoencoder")
    assert (ours.config, ours.fingerprint) == (theirs.config, theirs.fingerprint)
    assert files.read_notes(folder / "autoencoder") == files.read_notes(whole / "autoencoder")
    series = [
        [
            {k: v for k, v in json.loads(line).items() if "perf" not in k}
            for line in (run / "metrics.jsonl").read_text().splitlines()
        ]
        for run in (folder, whole)
    ]
    assert series[0] == series[1]


def test_a_longer_autoencoder_run_rewrites_its_weights_and_denoisers_keep_their_copy(
    runs: tuple[Path, Path], trained: tuple[dict[str, str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, _ = trained
    own, sample = runs[1] / "autoencoder", load(runs[1]).sample_tensor(1)
    (tmp_path / "latent").mkdir()
    folder = shutil.copytree(runs[0], tmp_path / "latent" / "autoencoder-s0")
    before = files.load(folder / "autoencoder").fingerprint
    train(paths["autoencoder"], [f"runs_dir={tmp_path}", "trainer.max_images=336"])
    after = files.load(folder / "autoencoder").fingerprint
    assert after != before
    shutil.copytree(folder / "autoencoder", runs[0] / "autoencoder", dirs_exist_ok=True)
    assert files.load(own).fingerprint == before
    assert torch.equal(load(runs[1]).sample_tensor(1), sample)
    shutil.rmtree(runs[0])  # a run's folder contains all that it needs
    assert torch.equal(load(runs[1]).sample_tensor(1), sample)


def test_an_autoencoder_of_symlinks_as_in_the_hub_cache_is_copied(
    runs: tuple[Path, Path], trained: tuple[dict[str, str], str], tmp_path: Path
) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in (files.WEIGHTS, files.CONFIG):
        (snapshot / name).symlink_to(runs[0] / "autoencoder" / name)
    train(trained[0]["dit"], [f"autoencoder={snapshot}", f"runs_dir={tmp_path}", "debug=smoke"])
    own = load(tmp_path / "latent" / f"dit-smoke-autoencoder_{str(snapshot).replace('/', '_')}-s0").folder
    assert files.load(own / "autoencoder").fingerprint == files.load(snapshot).fingerprint


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that runs a command, expects exit code 2 and a one-line error, and returns the line."""

    def run(*argv: str | Path) -> str:
        capsys.readouterr()
        assert main([str(a) for a in argv]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err.removeprefix("error: ").rstrip("\n")

    return run


def test_an_untrained_run_is_refused_as_autoencoder(
    refused: Callable[..., str], runs: tuple[Path, Path], tmp_path: Path
) -> None:
    line = refused("evaluate", runs[0], "evaluate.judge=x")
    assert line == (
        "command line: evaluate.judge: has no effect here; allowed: evaluate.count, evaluate.extractor,"
        " evaluate.weights"
    )
    shutil.rmtree(runs[0] / "autoencoder")
    paths = experiments(tmp_path)
    line = refused("train", paths["dit"], f"autoencoder={runs[0]}", f"runs_dir={tmp_path / 'none'}")
    assert "this run has no trained autoencoder; choose a finished run of kind autoencoder" in line
    assert "no such file" in refused("evaluate", runs[0]) or "no such folder" in refused("evaluate", runs[0])


def test_a_changed_autoencoder_experiment_is_refused(
    refused: Callable[..., str], trained: tuple[dict[str, str], str], tmp_path: Path
) -> None:
    paths, _ = trained
    shutil.copytree(Path(paths["runs"]), tmp_path / "runs")
    moved = experiments(tmp_path)
    yaml = Path(moved["autoencoder"])
    yaml.write_text(yaml.read_text().replace("lr: 3e-3", "lr: 1e-3"))
    line = refused("train", moved["dit"], f"runs_dir={tmp_path / 'runs'}")
    assert "this run was made with optimizer.lr=0.003 (now 0.001)" in line
