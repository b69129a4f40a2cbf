"""Custom images through the command line: with and without classes, and what is refused before any file is written."""

from pathlib import Path

import pytest
import torch
from own_images import folder, table

from diffbench import load
from diffbench.cli import main
from diffbench.config.load import load as load_config
from diffbench.core.errors import UserError
from diffbench.runs.denoiser import DenoiserRun
from diffbench.runs.lifecycle import train

SMALL = [
    "data.image_size=16",
    "denoiser.hidden_size=16",
    "denoiser.depth=1",
    "denoiser.num_heads=2",
    "trainer.precision=32-true",
    "debug=smoke",
    "tag=t",
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFBENCH_CACHE", str(tmp_path / "cache"))


def command(path: Path, *overrides: str) -> list[str]:
    runs = f"runs_dir={path.parent / 'runs'}"
    return ["train", "experiments/cifar10/dit.yaml", f"data.path={path}", *SMALL, runs, *overrides]


def run_folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "cifar10" / "dit-smoke-t-s0"


def test_a_folder_with_classes_trains_resumes_and_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "pets", {"cat": 20, "dog": 20}, height=20, width=24)
    assert main(command(root)) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "decoding train 36 of 36 images" in printed.out and "validation bound" in printed.out
    assert main(command(root, "trainer.max_images=24")) == 0
    assert "decoding" not in (printed := capsys.readouterr().out) and "resuming at 16 images" in printed
    run = load(run_folder(tmp_path))
    assert run.shape == (3, 16, 16) and run.null_label == 2
    assert run.train_set.class_names == ("cat", "dog")
    assert run.sample_tensor(2, labels=1, guidance=2.0).shape == (2, 3, 16, 16)


def test_class_names_may_be_numbers_other_than_the_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "years", {"1": 20, "1999": 20, "7": 20})
    assert main(command(root)) == 0, capsys.readouterr().err
    assert (run_folder(tmp_path) / "samples" / "final-000000016.png").is_file()


def test_a_folder_without_classes_trains_and_refuses_guidance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder(tmp_path / "flat", {"": 40}, height=16, width=16)
    assert main(command(root, "sample.guidance=1.5")) == 2
    assert "command line: sample.guidance: 1.5 needs classes, and these images have none" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert main(command(root)) == 0
    run = load(run_folder(tmp_path))
    assert (run.train_set.num_classes, run.null_label) == (0, None)
    assert run.sample_tensor(3).shape == (3, 3, 16, 16)
    with pytest.raises(UserError, match=r"^sample\.guidance: 2 needs classes, and .* was trained without"):
        run.sample_tensor(3, guidance=2.0)
    with pytest.raises(ValueError, match="labels: this network was trained without classes; leave them out"):
        run.sample_tensor(3, labels=0)
    # Without classes, label dropout is off and the network ignores labels.
    assert run.module().label_dropout == 0
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([1.0, 2.0])
    assert torch.equal(run.denoiser(x, t, torch.tensor([0, 0])), run.denoiser(x, t, None))


def test_training_on_parquet_files(tmp_path: Path) -> None:
    table(tmp_path / "p" / "train.parquet", list(range(30)), label=[i % 3 for i in range(30)])
    table(tmp_path / "p" / "test.parquet", list(range(30, 36)), label=[i % 3 for i in range(6)])
    run = train("experiments/cifar10/dit.yaml", command(tmp_path / "p")[2:])
    assert isinstance(run, DenoiserRun)
    assert (len(run.train_set), len(run.held_out), run.train_set.num_classes) == (30, 6, 3)


def test_invalid_data_is_a_one_line_error_and_creates_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder(tmp_path / "pets", {"cat": 20, "dog": 20})
    (root / "dog" / "007.png").write_bytes(b"broken")
    assert main(command(root)) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: command line: data.path: ") and printed.count("\n") == 1
    assert "dog/007.png: broken image (no image of a known format)" in printed
    assert main(command(tmp_path / "none")) == 2
    assert "data.path: no file or folder" in capsys.readouterr().err
    assert main(command(root, "data.channels=2")) == 2
    assert "command line: data.channels: must be 1 (grey), 3 (colour) or null, got 2" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert main(command(root, "data.skip_broken=true")) == 0


def test_sizes_that_do_not_fit_are_refused_before_decoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "pets", {"cat": 20, "dog": 20})
    assert main(command(root, "denoiser.patch_size=3")) == 2
    printed = capsys.readouterr()
    assert "denoiser.patch_size: 3 does not divide 16, a side of the image" in printed.err
    assert "decod" not in printed.out and not (tmp_path / "cache" / "images").exists()


def test_an_interrupt_while_decoding_prints_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    root = folder(tmp_path / "flat", {"": 40})
    monkeypatch.setattr("diffbench.core.store.Filling.add", stop)
    assert main(command(root)) == 130
    assert capsys.readouterr().err == "stopped; run the same command again to resume\n"


def test_a_run_whose_data_is_gone_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "flat", {"": 40})
    assert main(command(root)) == 0
    root.rename(tmp_path / "elsewhere")
    capsys.readouterr()
    assert main(["sample", str(run_folder(tmp_path)), "n=2"]) == 0  # needs no images
    assert main(["evaluate", str(run_folder(tmp_path))]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {run_folder(tmp_path)}/config.yaml: data.path: no file or folder {root}")


@pytest.mark.parametrize("name", ["unet", "dit", "diffit"])
def test_the_cifar10_experiments_differ_only_in_the_network(name: str) -> None:
    config = load_config(f"experiments/cifar10/{name}.yaml")
    base = load_config("experiments/cifar10/dit.yaml")
    assert config.data == base.data and config.trainer == base.trainer and config.optimizer == base.optimizer
    assert (config.data.name, config.data.image_size, config.data.flip, config.data.path) == ("cifar10", 32, True, None)
