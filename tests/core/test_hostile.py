"""Hostile files and names run no code, reach nothing outside the folder, and are refused in one line."""

import ast
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffbench.cli import main
from diffbench.commands.compare import report_folder
from diffbench.core import tensors
from diffbench.core.errors import UserError
from diffbench.core.files import locked, sha256
from diffbench.evaluation import records

PACKAGE = Path(__file__).parents[2] / "diffbench"
DIT = "experiments/digits/dit.yaml"
PIXELS = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), dtype=np.uint8)
Capture = pytest.CaptureFixture[str]
Refused = Callable[..., str]


class Payload:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def refused(capsys: Capture, tmp_path: Path) -> Refused:
    """Return a function that expects exit code 2 and one line, with the payload not run, and returns that line."""

    def run(*argv: str | Path) -> str:
        capsys.readouterr()
        assert main([str(a) for a in argv]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and "the trace" not in err, err
        assert not (tmp_path / "ran").exists()
        return err.removeprefix("error: ").rstrip("\n")

    return run


def calls() -> list[tuple[str, str, ast.Call]]:
    """Return (module, name of the callee, call) for every call in the package."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                found.append((str(path.relative_to(PACKAGE)), ast.unparse(node.func), node))
    return found


def constant(call: ast.Call, name: str) -> object:
    return next((k.value.value for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


def test_every_load_in_the_package_is_safe() -> None:
    loads = [(module, call) for module, name, call in calls() if name == "torch.load"]
    assert len(loads) >= 4
    assert [module for module, call in loads if constant(call, "weights_only") is not True] == []
    arrays = [(module, call) for module, name, call in calls() if name in ("np.load", "numpy.load")]
    assert arrays and [module for module, call in arrays if constant(call, "allow_pickle") is not False] == []
    yamls = [(module, call) for module, name, call in calls() if name.startswith("yaml.") and "load" in name]
    assert yamls and all("SafeLoader" in ast.unparse(call) for _, call in yamls)
    executing = {
        "eval",
        "exec",
        "torch.jit.load",
        "compile",
        "os.system",
        "pickle.load",
        "pickle.loads",
        "joblib.load",
        "os.popen",
    }
    assert [(module, name) for module, name, _ in calls() if name in executing] == []
    shells = [module for module, _, call in calls() if constant(call, "shell") is True]
    assert shells == []


def poison(run: Path, state: object) -> Path:
    """Replace the checkpoints of a run by `state`, with matching checksums, and remove its exports."""
    for path in run.glob("checkpoints/step-*.ckpt"):
        torch.save(state, path)
        path.with_name(path.name + ".sha256").write_text(f"{sha256(path)}  {path.name}\n")
    for path in run.glob("ema-*.safetensors"):
        path.unlink()
    return run


def test_a_checkpoint_with_code_is_refused(smoke_run: Path, tmp_path: Path, refused: Refused) -> None:
    run = poison(smoke_run, {"callbacks": Payload(tmp_path / "ran"), "state_dict": {}})
    (run / "checkpoints" / "step-x.ckpt").write_bytes(b"no number")
    line = f"{run / 'checkpoints' / 'step-2.ckpt'}: damaged, or holds pickled code, which is never run; remove it"
    assert refused("sample", run, "n=1") == line
    assert refused("evaluate", run) == line
    train = ("train", DIT, "debug=smoke", f"runs_dir={run.parent.parent}")
    assert refused(*train) == line
    assert refused(*train, "trainer.max_images=32") == line  # resumes
    started = refused("train", DIT, "debug=smoke", "tag=x", f"init_from={run}", f"runs_dir={tmp_path / 'new'}")
    assert started == f"command line: init_from: {line}"
    assert not (tmp_path / "new").exists()


OTHERS = [
    ({}, "contains no averages of training; remove it"),
    ([1, 2], "holds a list, not a training state; remove it"),
    ({"callbacks": {}}, "contains no averages of training; remove it"),
    ({"callbacks": {"EMA": {"averages": {"0.999": [torch.zeros(1)]}}}}, "contains no averages of training; remove it"),
]


@pytest.mark.parametrize(("state", "wrong"), OTHERS, ids=["empty", "list", "no average", "another's"])
def test_foreign_checkpoints_are_refused(state: object, wrong: str, smoke_run: Path, refused: Refused) -> None:
    run = poison(smoke_run, state)
    path = run / "checkpoints" / "step-2.ckpt"
    assert refused("sample", run, "n=1") == f"{path}: {wrong}"
    train = refused("train", DIT, "debug=smoke", f"runs_dir={run.parent.parent}", "trainer.max_images=32")
    missing = "is not a training checkpoint (state_dict is missing); remove it"
    assert train == f"{path}: {wrong if isinstance(state, list) else missing}"


def test_pickled_or_mislabelled_weights_are_refused(smoke_run: Path, tmp_path: Path, refused: Refused) -> None:
    (export,) = smoke_run.glob("ema-*.safetensors")
    export.write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    assert refused("sample", smoke_run).startswith(f"{export}: damaged (")
    assert refused("compare", smoke_run).startswith(f"{export}: damaged (")
    tensors.write(export, {"x": torch.zeros(1)}, {"images": "many"})
    for verb in ("sample", "compare"):
        assert refused(verb, smoke_run) == f"{export}: damaged (images='many'); remove it to use the newest checkpoint"


def test_published_weights_with_code_are_refused(tmp_path: Path, refused: Refused) -> None:
    path, payload = tmp_path / "w.pt", Payload(tmp_path / "ran")
    for write in (lambda: path.write_bytes(pickle.dumps({"ema": payload})), lambda: torch.save({"ema": payload}, path)):
        write()
        for source in ("dit", "ddpmpp"):
            line = refused("import", source, path, tmp_path / "out")
            assert line.startswith(f"{path}: contains pickled code, which is never run; export plain")
        weights = ("evaluate.extractor=inception", f"evaluate.weights={path}")
        np.savez(tmp_path / "pixels.npz", arr_0=PIXELS)
        scored = refused("evaluate", tmp_path / "pixels.npz", "--against", tmp_path / "pixels.npz", *weights)
        assert "evaluate.weights: " in scored
    assert not (tmp_path / "out").exists()


def test_arrays_with_code_are_refused(tmp_path: Path, refused: Refused) -> None:
    code = np.array([Payload(tmp_path / "ran")] * 30, dtype=object)
    good, bad = tmp_path / "good.npz", tmp_path / "bad.npz"
    np.savez(good, arr_0=PIXELS)
    ask = "evaluate.extractor=digits-cnn"
    for arrays, line in [
        ({"arr_0": code}, "arr_0 is damaged, or holds objects instead of numbers (Object arrays cannot"),
        (
            {"arr_0": PIXELS, "arr_1": code},
            "arr_1 is damaged, or holds objects instead of numbers (Object",
        ),
    ]:
        np.savez(bad, **arrays)
        assert refused("evaluate", bad, "--against", good, ask).startswith(f"{bad}: {line}")
    d = 64
    for arrays, line in [
        ({"mu": code, "sigma": code}, "mu is damaged, or holds objects instead of numbers"),
        ({"mu": np.float64(1), "sigma": np.eye(d)}, "mu must be numbers (D) or (D, D), got float64 ()"),
        ({"mu": np.array(["a"]), "sigma": np.eye(d)}, "mu must be numbers"),
        ({"mu": np.full(d, np.nan), "sigma": np.eye(d)}, "mu contains numbers that are not finite"),
    ]:
        np.savez(bad, **arrays)
        assert refused("evaluate", good, "--against", bad, ask).startswith(f"{bad}: {line}")


@pytest.mark.parametrize("shape", ["(30, 8, 8, 1)", "(-30, 8, 8, 1)", "(10**9, 8, 8, 1)", "(9999999999, 8, 8, 3)"])
def test_an_array_with_a_false_shape_is_refused(shape: str, tmp_path: Path, refused: Refused) -> None:
    head = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode() + b"0" * 9)
    line = refused("evaluate", tmp_path / "a.npz", "--against", tmp_path / "a.npz", "evaluate.extractor=digits-cnn")
    assert line.startswith(f"{tmp_path / 'a.npz'}: arr_0 ")


@pytest.mark.parametrize("verb", ["show", "train", "study"])
def test_yaml_tags_run_nothing(verb: str, tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "a.yaml"
    for tag in ("!!python/object/apply:os.mkdir", "!!python/name:os.mkdir", "!!python/object/new:os.mkdir"):
        path.write_text(f"tag: {tag} ['{tmp_path / 'ran'}']\n")
        assert refused(verb, path).startswith(f"{path}: not valid YAML: could not determine a constructor for the tag")
    if verb != "study":
        line = refused(verb, DIT, f"tag=!!python/object/apply:os.mkdir ['{tmp_path / 'ran'}']")
        assert line.startswith('command line: tag: "!!python/object/apply:os.mkdir ')
    path.write_text("a: " + "{a: " * 900 + "1" + "}" * 900)
    assert refused(verb, path) == f"{path}: not valid YAML: nested too deeply"


@pytest.mark.parametrize("name", ["../x", "/x", "..", "a/b", "a\nb", "<script>", ".x", "-x", "a\0", "", "a" * 101])
def test_a_tag_that_is_a_path_is_refused(name: str, tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"base: {Path(DIT).resolve()}\ntag: {json.dumps(name)}\nruns_dir: {tmp_path / 'runs'}\n")
    assert refused("train", path).startswith(f"{path}: tag: ")
    assert not (tmp_path / "runs").exists()


def test_an_impossible_runs_dir_is_refused(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f'base: {Path(DIT).resolve()}\nruns_dir: "a\\0b"\n')
    assert refused("train", path).startswith(f"{path}: runs_dir: must be text")
    long = tmp_path / ("a" * 300)
    assert refused("train", DIT, f"runs_dir={long}").endswith("File name too long")


@pytest.mark.parametrize(
    "name", ["results.jsonl", "checkpoints/step-2.ckpt", "samples", "ema-0.999.safetensors", ".lock"]
)
def test_a_link_that_leaves_a_run_folder_is_not_followed(
    name: str, smoke_run: Path, tmp_path: Path, refused: Refused
) -> None:
    outside, link = tmp_path / "outside", smoke_run / name
    if name == "samples":
        outside.mkdir()
        link.rename(tmp_path / "away")
    else:
        outside.write_text("mine")
        link.unlink(missing_ok=True)
    link.symlink_to(outside)
    line = f"{link}: is a link that leaves the run folder; replace it by the file itself"
    for verb in ("sample", "evaluate", "compare"):
        assert refused(verb, smoke_run) == line
    assert refused("train", DIT, "debug=smoke", f"runs_dir={smoke_run.parent.parent}") == line
    assert list(outside.iterdir()) == [] if outside.is_dir() else outside.read_text() == "mine"


def test_records_and_locks_that_are_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    for name in ("a.results.jsonl", ".lock"):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match=r"a\.results\.jsonl: is a link"):
        records.append(tmp_path / "a.results.jsonl", {"a": 1})
    with pytest.raises(UserError, match=r"\.lock: cannot lock this folder"), locked(tmp_path):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_foreign_run_does_not_determine_the_report_folder(smoke_run: Path, tmp_path: Path) -> None:
    from diffbench.runs.lifecycle import open_any

    here = open_any(smoke_run)
    here.values["runs_dir"] = str(smoke_run.parent.parent)
    assert report_folder(None, [here]).is_relative_to(smoke_run.parent.parent / "reports")
    for elsewhere in (str(tmp_path.parent), "../../..", "/etc"):
        here.values["runs_dir"] = elsewhere
        inside = Path(elsewhere).resolve() in smoke_run.resolve().parents
        assert inside or report_folder(None, [here]).is_relative_to("runs/reports")


def test_huge_images_are_refused_undecoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(30):
        Image.new("L", (40, 40)).save(folder / f"{i:02}.png")
    for limit in (1500, 100):  # where Pillow warns, and where it raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        line = refused("evaluate", folder, "--against", folder, "evaluate.extractor=digits-cnn")
        assert line.startswith(f"{folder / '00.png'}: broken image (")
        yaml = ("data.name=images", f"data.path={folder}", f"runs_dir={tmp_path / 'runs'}")
        assert "broken image" in refused("train", DIT, *yaml)
    (folder / "00.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # would start Ghostscript
    line = refused("evaluate", folder, "--against", folder, "evaluate.extractor=digits-cnn")
    assert line.startswith(f"{folder / '00.png'}: broken image (no image of a known format")
    assert not (tmp_path / "runs").exists()
