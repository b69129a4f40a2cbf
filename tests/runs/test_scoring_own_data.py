"""Scoring on custom images: classes of unequal size, fewer images than samples, and a cache that is read-only."""

from pathlib import Path

import pytest
import torch
from own_images import folder
from torch import Tensor, nn

from diffbench.cli import main
from diffbench.config.trainer import TrainerConfig
from diffbench.core.errors import UserError
from diffbench.data.sets import ImageSet
from diffbench.evaluation.records import metrics, results
from diffbench.runs.base import open_run
from diffbench.runs.checks import check_machine
from diffbench.runs.classifier import ClassifierRun
from diffbench.runs.lifecycle import load

SMALL = [
    "data.image_size=8",
    "denoiser.patch_size=4",
    "denoiser.hidden_size=16",
    "denoiser.depth=1",
    "denoiser.num_heads=2",
    "trainer.precision=32-true",
    "debug=smoke",
    "tag=t",
    "evaluate.extractor=test_scoring_own_data:make",
]
Capture = pytest.CaptureFixture[str]


class Mean(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(3).flatten(1)[:, ::4]


def make(request: object) -> nn.Module:
    """A custom extractor, named in the config."""
    return Mean()


def flat(request: object) -> nn.Module:
    """An extractor that gives no features."""
    return nn.Identity()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFBENCH_CACHE", str(tmp_path / "cache"))


def command(path: Path, *overrides: str) -> list[str]:
    runs = f"runs_dir={path.parent / 'runs'}"
    return ["train", "experiments/cifar10/dit.yaml", f"data.path={path}", *SMALL, runs, *overrides]


def run_folder(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "runs" / "cifar10").iterdir()
    return found


def test_classes_with_a_long_tail_are_scored_by_their_frequencies(tmp_path: Path, capsys: Capture) -> None:
    root = folder(tmp_path / "tail", {"many": 80, "some": 40, "few": 4}, height=8, width=8)
    assert main(command(root, "evaluate.count=60")) == 0
    assert "note: samples will not be scored" not in capsys.readouterr().out
    record = results(run_folder(tmp_path))[0]
    run = load(run_folder(tmp_path))
    assert run.train_set.class_names == ("few", "many", "some")
    assert run.train_set.labels.bincount().tolist() == [4, 72, 36]
    assert record["labels"] == "of the classes 2, 39, 19"
    assert record["reference"]["count"] == 60


def test_training_continues_with_fewer_images_than_samples(tmp_path: Path, capsys: Capture) -> None:
    root = folder(tmp_path / "little", {"cat": 20, "dog": 20}, height=8, width=8)
    why = (
        "evaluate.count: must be at most 36, the number of training images of data.name=cifar10, got 500; or compare"
        " with all of them: evaluate.reference=all"
    )
    assert main(command(root, "evaluate.count=500")) == 0
    out = capsys.readouterr().out
    assert f"note: samples will not be scored: {why}\n" in out
    assert "not scored: " in out and "samples: " in out
    run = run_folder(tmp_path)
    assert not results(run)
    assert main(["evaluate", str(run), "evaluate.count=500"]) == 2
    assert capsys.readouterr().err == f"error: command line: {why}\n"
    for way in ("evaluate.count=30", "evaluate.reference=all"):  # both remedies that the message names
        assert main(["evaluate", str(run), "sample.guidance=1", way]) == 0
    assert [r["reference"]["count"] for r in results(run)] == [30, 36]


def test_an_unwritable_cache_is_reported_before_training(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("DIFFBENCH_CACHE", str(tmp_path / "file" / "cache"))
    assert main(["train", "experiments/digits/dit.yaml", "debug=smoke", f"runs_dir={tmp_path / 'runs'}"]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'file' / 'cache'}: the cache is not writable (Not a directory); set DIFFBENCH_CACHE to a"
        " writable folder\n"
    )
    assert not (tmp_path / "runs").exists()
    monkeypatch.setenv("DIFFBENCH_CACHE", str(tmp_path / "new"))
    check_machine(TrainerConfig())


def test_changed_data_is_not_scored(tmp_path: Path, capsys: Capture) -> None:
    root = folder(tmp_path / "own", {"cat": 30, "dog": 30}, height=8, width=8)
    assert main(command(root, "evaluate.count=40", "sample.guidance=1")) == 0
    run = run_folder(tmp_path)
    before = results(run)
    (root / "cat").rename(root / "other")  # this swaps the labels
    capsys.readouterr()
    for argv in (["evaluate", str(run), "evaluate.count=40"], ["evaluate", str(root), "--against", str(run)]):
        assert main(argv) == 2
        assert "other training data" in capsys.readouterr().err
    assert results(run) == before


def test_an_image_set_without_labels_has_no_class_spread() -> None:
    images = ImageSet(torch.zeros(5, 1, 2, 2, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64), 0)
    from diffbench.evaluation import reference

    assert reference.describe_class_spread(images, reference.sample_labels(images, 5)) == "none"


def test_a_custom_classifier_scores_samples_and_reports_its_accuracy(tmp_path: Path, capsys: Capture) -> None:
    runs = f"runs_dir={tmp_path / 'runs'}"
    assert main(["train", "experiments/digits/classifier.yaml", "debug=smoke", runs]) == 0
    judge, run = (tmp_path / "runs" / "digits" / f"{name}-smoke-s0" for name in ("classifier", "dit"))
    dit = ["train", "experiments/digits/dit.yaml", "debug=smoke", "evaluate.count=20", "sample.guidance=1", runs]
    assert main([*dit, f"evaluate.judge={tmp_path}"]) == 2
    assert not run.exists() and "evaluate.judge" in capsys.readouterr().err
    assert main([*dit, "data.size=16", f"evaluate.judge={judge}"]) == 2
    assert "classifies images (1, 8, 8), not (1, 16, 16)" in capsys.readouterr().err
    assert main([*dit, "data.planted={copy of 8: [8]}", f"evaluate.judge={judge}"]) == 2
    assert (
        f"evaluate.judge: {judge} has the classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, not 0, 1, 2," in capsys.readouterr().err
    )
    assert not list((tmp_path / "runs" / "digits").glob("dit*"))
    assert main([*dit, f"evaluate.judge={judge}"]) == 0
    (run,) = (tmp_path / "runs" / "digits").glob("dit*")
    (found,) = results(run)[-1:]
    assert (20 * found["label_accuracy/judge@20"]).is_integer() and found["judge"]["run"] == str(judge)
    level = open_run(judge, [ClassifierRun]).config.validation.log_snr[-1]
    known = [m for m in metrics(judge) if "val/accuracy" in m][-1]
    assert found["judge"]["accuracy"] == pytest.approx(known[f"val/accuracy_log_snr_{level:g}"])
    assert f"{found['judge']['accuracy']:.1%} on held-out images" in capsys.readouterr().out
    for wrong, why in (
        (tmp_path / "none", "no run here"),
        (run, "this is a run of kind denoiser; choose one of kind classifier"),
    ):
        assert main(["evaluate", str(run), "evaluate.count=30", f"evaluate.judge={wrong}"]) == 2
        out, err = capsys.readouterr()
        assert err.startswith(f"error: command line: evaluate.judge: {wrong}: {why}") and "samples by" not in out


def test_guidance_without_classes_is_refused_before_anything_is_drawn(tmp_path: Path, capsys: Capture) -> None:
    root = folder(tmp_path / "own", {"cat": 60}, height=8, width=8) / "cat"
    assert main(command(root, "evaluate.count=40", "sample.guidance=1")) == 0
    run = root.parent / "runs" / "cifar10" / "dit-smoke-t-s0"
    before, line = (
        results(run),
        f"sample.guidance: 2 needs classes, and {run} was trained without; allowed: sample.guid",
    )
    for argv in (["evaluate", str(run), "evaluate.count=30", "sample.guidance=2"], ["sample", str(run), "guidance=2"]):
        capsys.readouterr()
        assert main(argv) == 2
        out, err = capsys.readouterr()
        assert err.startswith(f"error: {line}") and "samples by" not in out
    assert results(run) == before
    with pytest.raises(UserError, match=line):
        load(run).sample(2, guidance=2.0)
    assert main(["evaluate", str(run), "evaluate.count=30", f"sample.weak_model={root}", "sample.guidance=2"]) == 2
    assert capsys.readouterr().err.startswith(f"error: command line: sample.weak_model: {root}: no run here")


def test_a_custom_extractor_that_does_not_fit_is_refused_before_training(tmp_path: Path, capsys: Capture) -> None:
    root = folder(tmp_path / "own", {"cat": 20, "dog": 20}, height=8, width=8)
    assert main(command(root, "evaluate.extractor=test_scoring_own_data:flat")) == 2
    assert capsys.readouterr().err == (
        "error: command line: evaluate.extractor: test_scoring_own_data:flat: must map uint8 images (B, 3, 8, 8) to"
        " features (B, D) (TypeError: two images give (2, 3, 8, 8))\n"
    )
    assert main(["train", "experiments/digits/dit.yaml", "evaluate.weights=x.pt", f"runs_dir={tmp_path / 'runs'}"]) == 2
    assert "evaluate.weights: digits-cnn reads no file; allowed" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
