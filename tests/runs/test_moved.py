"""A run works without its images and its autoencoder's run; other images in their place are noticed."""

import shutil
from pathlib import Path

import pytest
import torch
from own_images import folder

from diffbench import load
from diffbench.cli import main
from diffbench.data.facts import DataFacts

ROOT = Path(__file__).parents[2]
SMALL = ["data.image_size=16", "denoiser.hidden_size=16", "denoiser.depth=1", "denoiser.num_heads=2", "tag=t"]
SMALL += ["trainer.precision=32-true", "debug=smoke"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of cats and dogs and a run trained on it, set aside; each test gets a copy in the original place."""
    place = tmp_path_factory.mktemp("moved") / "here"
    root = folder(place / "pets", {"cat": 40, "dog": 40}, height=16, width=16)
    args = [f"data.path={root}", *SMALL, f"runs_dir={place / 'runs'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFBENCH_CACHE", str(place / "cache"))
        assert main(["train", str(ROOT / "experiments/cifar10/dit.yaml"), *args]) == 0
    return place.rename(place.with_name("kept"))


@pytest.fixture
def trained(kept: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The image folder and the run folder."""
    place = kept.with_name("here")
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(kept, place)
    monkeypatch.setenv("DIFFBENCH_CACHE", str(place / "cache"))
    return place / "pets", place / "runs" / "cifar10" / "dit-smoke-t-s0"


def test_the_run_folder_describes_its_images(trained: tuple[Path, Path]) -> None:
    facts = DataFacts.read(trained[1] / "data.json")
    assert (facts.shape, facts.num_classes, facts.class_names) == ((3, 16, 16), 2, ("cat", "dog"))
    assert facts == DataFacts.of(load(trained[1]).train_set)


def test_a_run_samples_elsewhere_without_its_images(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, run = trained
    here = load(run).sample_tensor(2, seed=3)
    there = Path(shutil.copytree(run, tmp_path / "another" / "disk"))
    shutil.rmtree(root)
    shutil.rmtree(root.with_name("cache"))
    shutil.rmtree(run)
    assert torch.equal(load(there).sample_tensor(2, seed=3), here)
    out = tmp_path / "drawn.png"
    assert main(["sample", str(there), "n=2", f"out={out}"]) == 0 and out.is_file()
    assert main(["compare", str(there)]) == 0
    assert main(["attention", str(there), "times=2", f"out={tmp_path / 'attention.png'}"]) == 0
    assert "using a generated sample instead of a held-out image" in capsys.readouterr().out
    capsys.readouterr()
    assert main(["evaluate", str(there)]) == 2
    message = capsys.readouterr().err
    assert str(root) in message and message.count("\n") == 1


def test_sampling_decodes_no_images(trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    root, run = trained
    (root / "cat" / "000.png").touch()
    capsys.readouterr()
    assert main(["sample", str(run), "n=2"]) == 0
    assert "decoding" not in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["evaluate", "train"])
def test_swapped_labels_are_noticed(verb: str, trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    root, run = trained
    (root / "cat").rename(root / "x")
    (root / "dog").rename(root / "cat")
    (root / "x").rename(root / "dog")
    args = ["experiments/cifar10/dit.yaml", f"data.path={root}", *SMALL, f"runs_dir={run.parents[1]}"]
    args += ["trainer.max_images=32"]
    before = (run / "config.yaml").read_text()
    capsys.readouterr()
    assert main(["evaluate", str(run)] if verb == "evaluate" else ["train", *args]) == 2
    assert "data: the run was started with other training data" in capsys.readouterr().err
    assert (run / "config.yaml").read_text() == before and list(run.glob("ema-*.safetensors"))


def test_renamed_classes_are_noticed(trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    root, run = trained
    (root / "dog").rename(root / "fox")
    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 2
    assert "classes cat, dog, now cat, fox" in capsys.readouterr().err
