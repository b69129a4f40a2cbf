"""`diffbench sample`: the files it writes, classes by name, and the error for a network with non-finite output."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_images import folder
from PIL import Image

from diffbench import load
from diffbench.cli import main
from diffbench.core import tensors
from diffbench.data.facts import DataFacts, labels_for
from diffbench.sampling.images import CAPTION_HEIGHT
from diffbench.sampling.sampler import Sampler

Capture = pytest.CaptureFixture[str]
CELL = 8 * 8 + 4
"""Side of a digit in a grid, in pixels."""
STRIP = 8 * 5 + 4
"""Side of a digit in a strip, in pixels."""


@pytest.fixture
def sampled(capsys: Capture) -> Callable[..., list[str]]:
    """Return a function that runs `sample` with two steps and returns the printed lines."""

    def run(*args: str | Path) -> list[str]:
        capsys.readouterr()
        assert main(["sample", *map(str, args), "steps=2"]) == 0
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def refused(capsys: Capture) -> Callable[..., str]:
    """Return a function that expects exit code 2 and one line, and returns the line without `error: `."""

    def run(*args: str | Path) -> str:
        capsys.readouterr()
        assert main([*map(str, args)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1, err
        return err.removeprefix("error: ").rstrip("\n")

    return run


@pytest.mark.parametrize(
    ("suffix", "kind"), [(".png", "PNG"), (".jpg", "JPEG"), (".JPEG", "JPEG"), (".webp", "WEBP"), (".gif", "GIF")]
)
def test_the_suffix_determines_the_format(
    suffix: str, kind: str, sampled: Callable[..., list[str]], smoke_run: Path, tmp_path: Path
) -> None:
    path = tmp_path / f"x{suffix}"
    assert sampled(smoke_run, "n=3", f"out={path}") == [str(path)]
    with Image.open(path) as image:
        assert (image.format, image.size) == (kind, (3 * CELL, CAPTION_HEIGHT + CELL))
        pixels = np.asarray(image.convert("L")).astype(int)
    sampled(smoke_run, "n=3", f"out={tmp_path / 'exact.png'}")
    with Image.open(tmp_path / "exact.png") as image:
        exact = np.asarray(image.convert("L")).astype(int)
    assert abs(pixels - exact).mean() < (4 if kind == "JPEG" else 1e-9)


def test_an_npz_contains_samples_and_labels(sampled: Callable[..., list[str]], smoke_run: Path, tmp_path: Path) -> None:
    sampled(smoke_run, "labels=[3,1,4]", "seed=2", f"out={tmp_path / 'x.npz'}")
    with np.load(tmp_path / "x.npz", allow_pickle=False) as arrays:
        samples, labels = arrays["arr_0"], arrays["arr_1"]
    assert labels.tolist() == [3, 1, 4]
    want = load(smoke_run).sample_tensor(labels=[3, 1, 4], seed=2, steps="2")
    assert np.array_equal(samples, want.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("name", ["x.bmp", "x", "x.gif.txt"])
def test_other_suffixes_are_refused(name: str, refused: Callable[..., str], finished: Path, tmp_path: Path) -> None:
    line = refused("sample", finished, f"out={tmp_path / name}")
    assert line == (
        f"command line: out: {tmp_path / name}: its suffix is not an image format; choose from"
        " .png, .jpg, .jpeg, .webp, .gif, .npz"
    )


def test_grid_strip_and_animation_never_share_a_file(
    sampled: Callable[..., list[str]], refused: Callable[..., str], smoke_run: Path, tmp_path: Path
) -> None:
    args = ["n=2", f"out={tmp_path / 'x.gif'}", "strip=true", "gif=true"]
    names = ["x.gif", "x.strip.png", "x.steps.gif"]
    assert sampled(smoke_run, *args) == [str(tmp_path / name) for name in names]
    frames = {}
    for name in names:
        with Image.open(tmp_path / name) as image:
            frames[name] = (image.format, getattr(image, "n_frames", 1))
    assert frames == {"x.gif": ("GIF", 1), "x.strip.png": ("PNG", 1), "x.steps.gif": ("GIF", 2)}
    before = {name: (tmp_path / name).read_bytes() for name in names}
    (tmp_path / "x.gif").unlink()
    line = refused("sample", smoke_run, *args)
    assert line == f"command line: out: {tmp_path / 'x.strip.png'} already exists; choose another name"
    assert not (tmp_path / "x.gif").exists()
    assert all((tmp_path / name).read_bytes() == before[name] for name in names[1:])


def test_a_grid_may_be_named_like_a_strip(sampled: Callable[..., list[str]], smoke_run: Path, tmp_path: Path) -> None:
    files = sampled(smoke_run, "n=1", f"out={tmp_path / 'x.strip.png'}", "strip=true")
    sizes = []
    for file in files:
        with Image.open(file) as image:
            sizes.append(image.size)
    assert [Path(file).name for file in files] == ["x.strip.png", "x.strip.strip.png"]
    assert sizes == [(CELL, CAPTION_HEIGHT + CELL), (2 * STRIP, 2 * STRIP)]


def test_successive_commands_write_different_files(sampled: Callable[..., list[str]], smoke_run: Path) -> None:
    long = "labels=[" + ",".join("3" * 150) + "]"
    commands = [[long], [long[:-2] + "4]"], ["n=2", "strip=true"], ["n=2", "strip=true"], ["n=2", "seed=1"]]
    (first,) = sampled(smoke_run, *commands[0])
    before = Path(first).stat()
    files = [[first], *(sampled(smoke_run, *args) for args in commands[1:])]
    all_files = [file for found in files for file in found]
    assert len(set(all_files)) == 7 and all(Path(file).is_file() for file in all_files)
    assert all(len(Path(file).name) < 150 for file in all_files)
    assert Path(first).stat() == before


def test_concurrent_commands_write_different_files(
    sampled: Callable[..., list[str]], smoke_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, draw = smoke_run / "samples" / "sample-000000016-n=2-steps=2.png", Sampler.__call__

    def draw_while_another_writes(sampler: Sampler, *args: Any, **options: Any) -> torch.Tensor:
        expected.write_text("another's")
        return draw(sampler, *args, **options)

    monkeypatch.setattr(Sampler, "__call__", draw_while_another_writes)
    assert sampled(smoke_run, "n=2") == [str(expected.with_stem(f"{expected.stem}-2"))]
    assert expected.read_text() == "another's"


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run on a folder of cats and dogs."""
    place = tmp_path_factory.mktemp("pets")
    root = folder(place / "pets", {"cat": 40, "dog": 40}, height=16, width=16)
    args = ["data.image_size=16", "denoiser.hidden_size=16", "denoiser.depth=1", "denoiser.num_heads=2", "tag=t"]
    args += [f"data.path={root}", f"runs_dir={place / 'runs'}", "debug=smoke"]
    assert main(["train", "experiments/cifar10/dit.yaml", *args]) == 0
    return place / "runs" / "cifar10" / "dit-smoke-t-s0"


def test_classes_are_printed_and_selected_by_name(
    pets: Path, sampled: Callable[..., list[str]], refused: Callable[..., str], tmp_path: Path
) -> None:
    for i, labels in enumerate(("[dog,cat,dog]", "[1,0,1]", "[dog,0,1]")):
        line, path = sampled(pets, f"labels={labels}", f"out={tmp_path / str(i)}.npz")
        assert line == "labels: cat 1, dog 2"
        assert np.load(path)["arr_1"].tolist() == [1, 0, 1]
    assert sampled(pets, "labels=dog", "n=3")[0] == "labels: dog 3"
    assert refused("sample", pets, "labels=dgo") == (
        "command line: labels: 'dgo' is not a class; choose from cat, dog; did you mean 'dog'?"
    )
    assert load(pets).sample_tensor(labels=["cat", "dog"], steps="2").shape == (2, 3, 16, 16)


def facts(*names: str) -> DataFacts:
    return DataFacts("x", (3, 8, 8), len(names), names, 10, "")


def test_numeric_class_names_are_matched_as_names() -> None:
    from_one = facts("1", "2", "3")
    assert labels_for(None, [1, 3, "2"], from_one).tolist() == [0, 2, 1]
    with pytest.raises(ValueError, match=r"labels: '0' is not a class; choose from 1, 2, 3"):
        labels_for(None, 0, from_one)
    sorted_as_text = facts("0", "1", "10", "11", "2")
    assert labels_for(2, 2, sorted_as_text).tolist() == [4, 4]
    assert labels_for(None, [7, 8], facts("007", "008")).tolist() == [0, 1]
    assert labels_for(None, torch.tensor([0, 2]), from_one).tolist() == [0, 2]  # a tensor contains numbers
    assert labels_for(None, [1], facts("cat", "dog")).tolist() == [1]
    weights = torch.rand(3, 3)
    assert labels_for(3, weights, from_one) is weights
    with pytest.raises(ValueError, match="labels: 3 labels for n=5 samples"):
        labels_for(5, weights, from_one)
    with pytest.raises(ValueError, match="labels: '2' is not a class; choose from cat, dog"):
        labels_for(None, 2, facts("cat", "dog"))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "heun"])
def test_non_finite_network_output_is_a_one_line_error(
    sampler: str, smoke_run: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    (export,) = smoke_run.glob("ema-*.safetensors")
    state, metadata = tensors.read(export)
    state["final.linear.weight" if "final.linear.weight" in state else list(state)[-1]].fill_(float("nan"))
    tensors.write(export, state, metadata)
    want = f"{smoke_run}: the network's output is not finite at call 1 of the {sampler} sampler, time "
    lines = (smoke_run / "results.jsonl").read_text()
    assert refused("sample", smoke_run, "n=2", "steps=3", f"sampler={sampler}", f"out={tmp_path / 'x.png'}").startswith(
        want
    )
    assert not (tmp_path / "x.png").exists()
    assert refused("attention", smoke_run, "times=2") == f"{smoke_run}: the network's output is not finite"
    args = ["evaluate.count=20", "sample.steps=3", f"sample.sampler={sampler}"]
    assert refused("evaluate", smoke_run, *args).startswith(want)
    assert (smoke_run / "results.jsonl").read_text() == lines
