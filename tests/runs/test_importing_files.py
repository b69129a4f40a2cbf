"""The checkpoints that `diffbench import` reads, and those it refuses in one line."""

import argparse
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import load
from safetensors import safe_open
from safetensors.torch import save_file
from test_importing import saved, words
from test_reference import arguments, weights
from torch import Tensor

import diffbench
from diffbench.cli import main
from diffbench.runs.importing import import_reference

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def refused(tmp_path: Path, capsys: Capture) -> Callable[..., str]:
    """A function that runs an import, expects a one-line error and no new file, and returns the line."""

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
    torch.save(
        {
            "model": zeros,
            "ema": state,
            "opt": opt,
            "args": argparse.Namespace(lr=1e-4),
            "best": np.float64(3.1),
            "at": folder,
        },
        folder / "w.pt",
    )
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
def test_common_checkpoint_files_are_read(wrap: Wrap, tmp_path: Path) -> None:
    state = weights(load("diffit_b"))
    import_reference("diffit", wrap(tmp_path, state), tmp_path / "out", words(arguments(load("diffit_b"))))
    found = diffbench.load(tmp_path / "out").denoiser.state_dict()
    assert torch.equal(found["patch.weight"], state["x_embedder.proj.weight"])


class Network:
    """A stand-in for what EDM pickles: an object of a class with code."""


def test_unreadable_files_are_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
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
            f"{code}: contains pickled code, which is never run; export plain weights where it was made, with"
            " torch.save(net.state_dict(), 'weights.pt'); in EDM's repository,"
            " net = pickle.load(open('network.pkl', 'rb'))['ema']"
        )
    for damaged in (cut, text, tmp_path / "text.safetensors"):
        assert refused("dit", damaged, out) == f"{damaged}: damaged, or not a checkpoint"
    assert refused("dit", folder, out) == f"{folder}: is a folder, not a checkpoint"
    assert refused("dit", tmp_path / "no.pt", out) == f"{tmp_path / 'no.pt'}: no such file"
    assert refused("dit", tmp_path / "empty.pt", out).startswith(f"{tmp_path / 'empty.pt'}: dit: no x_embedder.proj.w")
    assert refused("dit", tmp_path / "list.pt", out) == f"{tmp_path / 'list.pt'}: contains a list, not a state dict"


GIVEN = words(arguments(load("dit_a")))[1:]
UNFIT = [
    ("dit", [], "CKPT: dit: the shapes do not match DiT-"),
    ("dit", ["arguments.num_heads=5"], "CKPT: denoiser.num_heads: 5 does not divide denoiser.hidden_size=1152"),
    ("dit", [*GIVEN, "arguments.depth=3"], "CKPT: dit: the shapes do not match the given arguments (10"),
    ("dit", [*GIVEN, "arguments.depht=2"], "CKPT: dit: unknown argument depht; known: input_size, patch_size, "),
    ("dit", ["arguments=3"], "command line: arguments: must be given by name, such as arguments.num_heads=16"),
    ("dit", [*GIVEN, "arguments.hidden_size=abc"], "command line: arguments: no network of dit has these (TypeError: "),
    (
        "dit",
        [*GIVEN, "arguments.num_classes=-2"],
        "command line: arguments: no network of dit has these (RuntimeError: ",
    ),
    ("dit", [*GIVEN, "arguments.learn_sigma=maybe"], "CKPT: dit: learn_sigma='maybe' must be true or false"),
    ("adm", [], "CKPT: adm: no input_blocks.0.0.weight among 32 names; these weights look like dit"),
    ("dit", [*GIVEN, "sample.stepps=2"], "command line: sample.stepps: unknown key; allowed: sampler, steps, "),
    ("dit", [*GIVEN, "denoiser.depth=3"], "NOT blocks.2.mlp.0.bias is absent there, (192,) here, 10 differ in all"),
    ("dit", [*GIVEN, "data.name=digits"], "import dit: autoencoder: stabilityai/sd-vae-ft-ema: not cached, and "),
    (
        "dit",
        [*GIVEN, "data.name=digits", "autoencoder=null"],
        "NOT final.bias is (32,) there, (8,) here, 3 differ in all",
    ),
    (
        "vit",
        [],
        "command line: unknown source 'vit'; choose from dit, sit, diffit, adm, ddpmpp, uvit; did you mean 'uvit'?",
    ),
]


@pytest.mark.parametrize(("source", "given", "line"), UNFIT)
def test_weights_and_arguments_that_do_not_fit_are_refused(
    source: str, given: list[str], line: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    path = saved(tmp_path, "dit_a")
    line = line.replace("NOT", "command line: the config's network does not fit the weights of CKPT:")
    assert refused(source, path, tmp_path / "out", *given).startswith(line.replace("CKPT", str(path)))


def test_a_folder_that_exists_is_left_alone(tmp_path: Path, refused: Callable[..., str]) -> None:
    path, out = saved(tmp_path, "diffit_b"), tmp_path / "out"
    out.mkdir()
    assert refused("diffit", path, out) == f"{out}: already exists; choose another folder"
    assert list(out.iterdir()) == []


def test_weights_of_another_network_in_a_run_folder_are_refused(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    import_reference("diffit", saved(tmp_path, "diffit_b"), out, words(arguments(load("diffit_b"))))
    file = out / "config.yaml"
    file.write_text(file.read_text().replace("depth: 2", "depth: 1"))
    assert main(["sample", str(out), "n=1"]) == 2
    assert capsys.readouterr().err.startswith(
        f"error: {out}: the weights do not fit the network in its config.yaml: blocks.1.attention.bias is"
        " (49, 2) there, absent here"
    )


def test_averaged_weights_are_the_default_and_are_named(tmp_path: Path, capsys: Capture) -> None:
    mean = weights(load("dit_a"))
    raw = {key: torch.zeros_like(value) for key, value in mean.items()}
    torch.save({"model": raw, "model_ema": mean}, tmp_path / "w.pt")
    for key, wanted, taken in (([], mean, "model_ema"), (["weights=model"], raw, "model")):
        out = tmp_path / taken
        assert main(["import", "dit", str(tmp_path / "w.pt"), str(out), *GIVEN, *key]) == 0
        other = "model" if taken == "model_ema" else "model_ema"
        assert f"\nweights: {taken}; the file also has {other}\n" in capsys.readouterr().out
        found = diffbench.load(out).denoiser.state_dict()["patch.weight"]
        assert torch.equal(found, wanted["x_embedder.proj.weight"])
        with safe_open(out / "ema-0.9999.safetensors", "pt") as file:
            assert file.metadata()["weights"] == taken


def test_unexpected_names_are_refused_unless_ignored(tmp_path: Path, refused: Callable[..., str]) -> None:
    path, out = tmp_path / "w.pt", tmp_path / "out"
    torch.save(weights(load("dit_a")) | {"step": torch.ones(1), "decay": torch.ones(1)}, path)
    assert refused("dit", path, out, *GIVEN) == (
        f"{path}: dit: of the 32 keys that these arguments make, 2 unexpected: decay, step;"
        " skip names with ignore=[NAME]"
    )
    assert refused("dit", path, out, *GIVEN, "ignore=[stepp]") == (
        f"{path}: ignore: stepp is not a name among these weights; did you mean 'step'?"
    )
    import_reference("dit", path, out, [*GIVEN, "ignore=[step,decay]"])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.nan, "holds 1 values that are not finite, out of 144"),
        (torch.inf, "holds 1 values that are not finite, out of 144"),
        (torch.int8, "holds int8, not floating-point weights"),
        (torch.float8_e4m3fn, "holds float8_e4m3fn, not floating-point weights"),
        (None, "holds sparse_coo, not floating-point weights"),
    ],
)
def test_broken_weights_are_refused(
    value: float | torch.dtype | None, text: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    state, key = weights(load("dit_a")), "blocks.1.attn.qkv.bias"
    if isinstance(value, float):
        state[key] = state[key].index_fill(0, torch.tensor(3), value)
    else:
        state[key] = state[key].to_sparse() if value is None else state[key].to(value)
    torch.save({"ema": state}, tmp_path / "w.pt")
    assert refused("dit", tmp_path / "w.pt", tmp_path / "out", *GIVEN) == f"{tmp_path / 'w.pt'}: dit: {key} {text}"


def test_a_network_trained_without_label_dropout_is_not_guided(tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = arguments(load("dit_a")) | {"num_classes": 11, "class_dropout_prob": 0.0}
    config, _ = import_reference("dit", saved(tmp_path, "dit_a"), out, words(made))
    assert (config.data.num_classes, config.trainer.label_dropout, config.sample.guidance) == (11, 0.0, 1.0)
