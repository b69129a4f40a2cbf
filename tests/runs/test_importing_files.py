"""The checkpoints that `diffbench import` reads, and those that it refuses in a line."""

import argparse
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import load
from safetensors.torch import save_file
from test_importing import saved
from test_reference import weights
from torch import Tensor

import diffbench
from diffbench.cli import main
from diffbench.runs.importing import import_reference

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def refused(tmp_path: Path, capsys: Capture) -> Callable[..., str]:
    """An import that must end with one line and leave nothing; returns the line."""

    def run(*argv: Any) -> str:
        before = sorted(tmp_path.iterdir())
        assert main(["import", *map(str, argv)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert sorted(tmp_path.iterdir()) == before
        return err.removeprefix("error: ").rstrip("\n")

    return run


Wrap = Callable[[Path, dict[str, Tensor]], Path]


def _plain(folder: Path, state: dict[str, Tensor]) -> Path:
    torch.save(state, folder / "w.pt")
    return folder / "w.pt"


def _training(folder: Path, state: dict[str, Tensor]) -> Path:
    zeros = {key: torch.zeros_like(value) for key, value in state.items()}
    opt = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]}
    torch.save({"model": zeros, "ema": state, "opt": opt, "args": argparse.Namespace(lr=1e-4)}, folder / "w.pt")
    return folder / "w.pt"


def _lightning(folder: Path, state: dict[str, Tensor]) -> Path:
    torch.save({"state_dict": {f"model.{k}": v for k, v in state.items()}, "epoch": 3}, folder / "w.ckpt")
    return folder / "w.ckpt"


def _old(folder: Path, state: dict[str, Tensor]) -> Path:
    torch.save(state, folder / "w.pth", _use_new_zipfile_serialization=False)
    return folder / "w.pth"


def _safetensors(folder: Path, state: dict[str, Tensor]) -> Path:
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "w.safetensors")
    return folder / "w.safetensors"


@pytest.mark.parametrize("wrap", [_plain, _training, _lightning, _old, _safetensors])
def test_the_files_that_people_have(wrap: Wrap, tmp_path: Path) -> None:
    state = weights(load("diffit_b"))
    import_reference("diffit", wrap(tmp_path, state), tmp_path / "out")
    found = diffbench.load(tmp_path / "out").denoiser.state_dict()
    assert torch.equal(found["patch.weight"], state["x_embedder.proj.weight"])


class Network:
    """Stands for what EDM pickles: an object of a class with code."""


def test_files_that_are_not_read(tmp_path: Path, refused: Callable[..., str]) -> None:
    out, pkl, cut, text, folder = (tmp_path / name for name in ("out", "edm.pkl", "cut.pt", "text.pt", "folder"))
    pkl.write_bytes(pickle.dumps({"ema": Network()}))
    cut.write_bytes(saved(tmp_path, "dit_a").read_bytes()[:5000])
    text.write_text("not weights")
    (tmp_path / "text.safetensors").write_text("not weights")
    folder.mkdir()
    torch.save({"epoch": 3, "note": "none"}, tmp_path / "empty.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"ema": Network()}, tmp_path / "net.pt")
    for code in (pkl, tmp_path / "net.pt"):
        assert refused("ddpmpp", code, out) == (
            f"{code}: holds pickled code, which is never run; where it was made, export plain weights with"
            " torch.save(net.state_dict(), 'weights.pt'), in EDM's repository of"
            " net = pickle.load(open('network.pkl', 'rb'))['ema']"
        )
    for damaged in (cut, text, tmp_path / "text.safetensors"):
        assert refused("dit", damaged, out) == f"{damaged}: damaged, or no checkpoint"
    assert refused("dit", folder, out) == f"{folder}: is a folder, not a checkpoint"
    assert refused("dit", tmp_path / "no.pt", out) == f"{tmp_path / 'no.pt'}: no such file"
    nowhere = "no state dict, neither itself nor under ema, model, state_dict; it holds"
    assert refused("dit", tmp_path / "empty.pt", out) == f"{tmp_path / 'empty.pt'}: {nowhere} epoch, note"
    assert refused("dit", tmp_path / "list.pt", out) == f"{tmp_path / 'list.pt'}: {nowhere} list"


HEADS = "arguments.num_heads=3"
UNFIT = [
    (
        "dit",
        [],
        "CKPT: arguments.num_heads: the weights do not say it, and 48 is no published width (384, 768, 1024, 1",
    ),
    ("dit", ["arguments.num_heads=5"], "CKPT: denoiser.num_heads: 5 does not divide denoiser.hidden_size=48"),
    ("dit", [HEADS, "arguments.depth=3"], "CKPT: arguments.depth: 3 is given, the weights of dit say 2"),
    ("dit", [HEADS, "arguments.depht=2"], "CKPT: dit: unknown argument depht; known: input_size, patch_size, "),
    ("dit", ["arguments=3"], "command line: arguments: must be given by name, as arguments.num_heads=16"),
    ("adm", [], "CKPT: adm: no input_blocks.0.0.weight among 32 names; these weights look like dit"),
    ("dit", [HEADS, "sample.stepps=2"], "command line: sample.stepps: unknown key; allowed: sampler, steps, "),
    ("dit", [HEADS, "denoiser.depth=3"], "NOT blocks.2.mlp.0.bias is absent there, (192,) here, 10 differ in all"),
    ("dit", [HEADS, "data.name=digits"], "import dit: autoencoder: stabilityai/sd-vae-ft-ema: not cached, and "),
    (
        "dit",
        [HEADS, "data.name=digits", "autoencoder=null"],
        "NOT final.bias is (32,) there, (8,) here, 3 differ in all",
    ),
    ("vit", [], "command line: unknown source 'vit'; choose from dit, sit, diffit, adm, ddpmpp; did you mean 'sit'?"),
]


@pytest.mark.parametrize(("source", "words", "line"), UNFIT)
def test_what_does_not_fit_is_named(
    source: str, words: list[str], line: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    path = saved(tmp_path, "dit_a")
    line = line.replace("NOT", "command line: the config asks for another network than CKPT holds:")
    assert refused(source, path, tmp_path / "out", *words).startswith(line.replace("CKPT", str(path)))


def test_a_folder_that_exists_is_left_alone(tmp_path: Path, refused: Callable[..., str]) -> None:
    path, out = saved(tmp_path, "diffit_b"), tmp_path / "out"
    out.mkdir()
    assert refused("diffit", path, out) == f"{out}: exists already; choose another folder"
    assert list(out.iterdir()) == []


def test_weights_of_another_network_in_a_run_folder_are_told(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    import_reference("diffit", saved(tmp_path, "diffit_b"), out)
    file = out / "config.yaml"
    file.write_text(file.read_text().replace("depth: 2", "depth: 1"))
    assert main(["sample", str(out), "n=1"]) == 2
    assert capsys.readouterr().err.startswith(
        f"error: {out}: holds the weights of another network than its config.yaml says: blocks.1.attention.bias is"
        " (49, 2) there, absent here"
    )
