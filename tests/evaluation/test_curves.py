"""Reference curves: bands over seeds, their file, and the warning when a run leaves them."""

import math
from pathlib import Path

import made_runs
import pytest

from diffbench.cli import main
from diffbench.config.load import load
from diffbench.core.errors import UserError
from diffbench.evaluation.curves import Band, bands_of, read_curves, write_curves
from diffbench.runs.folder import reference_curves
from diffbench.training.logger import mark_between, verdict

LINES = [
    [{"images": 64, "train/loss": 1.0 + d}, {"images": 128, "train/loss": 0.5 + d, "val/bound": 2.0 - d}]
    for d in (-0.1, 0.0, 0.1)
]
HALF = 9.924843 * 0.1 * (4 / 3) ** 0.5  # t(0.995, 2), standard deviation, and a fourth run against the mean of three


def test_a_band_contains_a_further_run_with_99_percent_probability() -> None:
    bands = bands_of(LINES, ["train/loss", "val/bound", "val/absent"])
    assert list(bands) == ["train/loss", "val/bound"]
    assert bands["train/loss"].images == [64, 128] and bands["val/bound"].images == [128]
    assert bands["train/loss"].low == pytest.approx([1 - HALF, 0.5 - HALF], rel=1e-4)
    assert bands["val/bound"].high == pytest.approx([2 + HALF])
    broken = [[*LINES[i], {"images": 192, "train/loss": value}] for i, value in enumerate((0.1, math.nan, 0.2))]
    assert bands_of(broken, ["train/loss"])["train/loss"].images == [64, 128]
    with pytest.raises(ValueError, match="at least 3 runs, got 2"):
        bands_of(LINES[:2], ["train/loss"])


def test_a_file_is_read_back_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "curves" / "x.csv"
    bands = {"train/loss": Band([64, 128], [1, 0.5], [2, 1.5]), "val/bound": Band([128], [0.25], [0.75])}
    write_curves(path, bands)
    assert path.read_text().splitlines()[:2] == [
        "images,train/loss low,train/loss high,val/bound low,val/bound high",
        "64,1,2,,",
    ]
    assert read_curves(path) == bands
    assert bands["train/loss"].at(96) == (0.75, 1.75) and bands["train/loss"].at(129) is None
    path.write_text("images,train/loss low,train/loss high\n64,low,2\n")
    with pytest.raises(UserError, match=r"x\.csv: damaged"):
        read_curves(path)
    assert read_curves(tmp_path / "none.csv") == {}


def test_the_verdict_warns_outside_the_band() -> None:
    bands = {"train/loss": Band([0, 100], [1, 1], [2, 2]), "val/bound": Band([0, 100], [0.12, 0.12], [0.14, 0.14])}
    lines = [{"images": 20, "train/loss": 1.5}, {"images": 10, "val/bound": 0.31}, {"images": 20, "train/lr": 1}]
    (warning,) = verdict(lines, bands)
    assert warning == (
        "warning: at 20 images: validation bound 0.31, band 0.12 to 0.14: something is wrong; see docs/health.md"
    )
    (fine,) = verdict(lines[:1], bands)
    assert fine == "at 20 images: like healthy runs: train/loss 1.5, band 1 to 2"
    assert verdict([], bands) == []
    marks = [mark_between(before, before + 100, 1000) for before in range(0, 1000, 100)]
    assert marks == [None, 0.2, None, None, 0.5, None, None, None, None, None]


def test_only_a_run_with_the_shipped_config_is_compared_to_the_curves(tmp_path: Path) -> None:
    path = tmp_path / "dit.yaml"
    path.write_text(f"base: {Path('experiments/digits/dit.yaml').resolve()}\n")
    assert reference_curves(path, [], load(path)) is None
    write_curves(tmp_path / "curves" / "dit.csv", {"train/loss": Band([0], [1], [2])})
    for overrides, expected in (([], True), (["seed=3", "sample.steps=50"], True), (["optimizer.lr=1"], False)):
        assert (reference_curves(path, overrides, load(path, overrides)) is not None) == expected
    changed = ["trainer.log_images=640"]  # losses averaged over other intervals scatter differently
    assert reference_curves(path, changed, load(path, changed)) is None
    assert reference_curves(path, ["debug=smoke"], load(path, ["debug=smoke"])) is None


def test_bands_over_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [str(made_runs.make_run(tmp_path / "digits" / f"dit-s{s}", "dit", s, 0.1 + 0.01 * s)) for s in range(3)]
    other = made_runs.make_run(tmp_path / "digits" / "other-s3", "dit", 3, overrides=["denoiser.depth=2"])
    again = made_runs.make_run(tmp_path / "again" / "dit-s0", "dit", 0, 0.1)
    assert main(["curves", *runs, str(again)]) == 2
    assert "two of these runs have the same seed; a band needs different ones" in capsys.readouterr().err
    assert main(["curves", *runs[:2]]) == 2
    assert "2 runs; a band needs at least 3" in capsys.readouterr().err
    assert main(["curves", *runs, str(other)]) == 2
    assert "differ in denoiser.depth; only the seed may" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main(["curves", *runs]) == 0
    assert capsys.readouterr().out.endswith("experiments/digits/curves/dit.csv: band of 3 runs\n")
    assert "val/bound" in read_curves(tmp_path / "experiments/digits/curves/dit.csv")


@pytest.mark.parametrize("path", sorted(Path("experiments").glob("*/curves/*.csv")), ids=lambda path: path.stem)
def test_shipped_curves_reach_the_end_of_their_experiment(path: Path) -> None:
    yaml = path.parents[1] / f"{path.stem}.yaml"
    config = load(yaml)
    bands = read_curves(path)
    end = config.trainer.max_images
    assert reference_curves(yaml, [], config) == path.resolve()
    assert list(bands) == ["train/loss", "val/bound"]
    for band in bands.values():
        assert band.images[-1] == end and all(low < high for low, high in zip(band.low, band.high, strict=True))
    assert len(bands["val/bound"].images) == -(-end // config.trainer.validate_images)
    middles = [(low + high) / 2 for low, high in zip(bands["val/bound"].low, bands["val/bound"].high, strict=True)]
    assert middles[-1] < middles[0]  # the loss falls, though some runs overfit late


def test_every_denoiser_on_the_digits_has_curves() -> None:
    experiments = {p.stem for p in Path("experiments/digits").glob("[!_]*.yaml")} - {"classifier"}
    assert {p.stem for p in Path("experiments/digits/curves").glob("*.csv")} == experiments
