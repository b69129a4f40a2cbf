"""Whatever can be checked without images is checked before the first is decoded and before anything is written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffbench.cli import main

DIT, CLASSIFIER = "experiments/digits/dit.yaml", "experiments/digits/classifier.yaml"
AUTOENCODER = "experiments/digits-latent/autoencoder.yaml"
Refused = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """A function that trains what must be refused before images are read, and returns the line without `error: `."""

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("images were read")

    for module in ("checks", "build", "base"):
        monkeypatch.setattr(f"diffbench.runs.{module}.load_data", read)

    def run(path: str, *overrides: str) -> str:
        assert main(["train", path, f"runs_dir={tmp_path / 'runs'}", *overrides]) == 2
        assert not (tmp_path / "runs").exists()
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err.removeprefix("error: ").rstrip("\n")

    return run


@pytest.mark.parametrize(
    ("path", "overrides", "line"),
    [
        (DIT, "denoiser.patch_size=3", "command line: denoiser.patch_size: 3 does not divide 8, a side of the image"),
        (CLASSIFIER, "classifier.norm_groups=7", "command line: classifier.norm_groups: 7 does not divide"),
        (
            AUTOENCODER,
            "network.block_out_channels=[32,32,32,32,32,32,32]",
            "command line: network.block_out_channels: ",
        ),
        (AUTOENCODER, "loss.perceptual=incption", "command line: loss.perceptual: unknown extractor 'incption'"),
        (DIT, "init_from=/nowhere", "command line: init_from: /nowhere: no run here"),
        (DIT, "sample.weak_model=/nowhere", "command line: sample.weak_model: /nowhere: no run here"),
        (DIT, "sample.classifier=/nowhere", "command line: sample.classifier: /nowhere: no run here"),
        (DIT, "evaluate.extractor=inception evaluate.weights=/nowhere", "command line: evaluate.extractor: inception"),
        (DIT, "evaluate.extractor=incption", "command line: evaluate.extractor: unknown"),
    ],
)
def test_refused_before_images_are_read(path: str, overrides: str, line: str, refused: Refused) -> None:
    assert refused(path, *overrides.split()).startswith(line)


@pytest.mark.parametrize("path", [DIT, CLASSIFIER, AUTOENCODER])
def test_an_unwritable_cache_or_runs_dir_is_refused(
    path: str, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    assert (
        refused(path, f"runs_dir={file}")
        == f"command line: runs_dir: {file} is a file, not a folder; choose another runs_dir"
    )
    monkeypatch.setenv("DIFFBENCH_CACHE", str(file / "cache"))
    assert refused(path).startswith(f"{file / 'cache'}: the cache is not writable (")
