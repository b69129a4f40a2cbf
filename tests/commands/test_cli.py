"""The command line in one process: the output, files and errors of every command."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import diffbench
from diffbench.cli import VERBS, main
from diffbench.config.layers import experiments
from diffbench.config.load import load as load_config
from diffbench.denoisers import DENOISERS
from diffbench.sampling.images import CAPTION_HEIGHT

ROOT = Path(__file__).parents[2]
DIT = "experiments/digits/dit.yaml"
SMALL = ["denoiser.hidden_size=32", "denoiser.num_heads=4", "denoiser.depth=2"]
Capture = pytest.CaptureFixture[str]


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@pytest.fixture
def refused(capsys: Capture) -> Callable[..., str]:
    """Return a function that expects exit code 2 and one line, and returns the line without `error: `."""

    def run(*argv: str | Path) -> str:
        capsys.readouterr()
        assert main([str(a) for a in argv]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
        return err.removeprefix("error: ").rstrip("\n")

    return run


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_help_lists_the_verbs(argv: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(f"{name} " in out and verb.text.split()[0] in out for name, verb in VERBS.items())


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_command(verb: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "-h"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert VERBS[verb].text in " ".join(out.split())
    assert all(f"diffbench {verb} {args}".rstrip() in out for args in VERBS[verb].examples)
    assert max(map(len, out.splitlines())) <= 80


def test_version_and_running_as_a_module(capsys: Capture) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "diffbench", "--version"], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == f"diffbench {diffbench.__version__}\n"
    done = subprocess.run([sys.executable, "-m", "diffbench", "trian"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_list_names_backbones_presets_and_experiments(capsys: Capture) -> None:
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for name, entry in DENOISERS.items():
        assert f"  {name} " in out and entry.summary in out
        assert all(re.search(rf"  {re.escape(p)} +[\d,]+ parameters +[\d.]+ GMACs", out) for p in entry.presets)
    for path in experiments():
        assert re.search(rf"  {re.escape(path)} +\w+", out), "a YAML begins with a comment on its purpose"


def test_show_prints_the_resolved_config_and_writes_nothing(tmp_path: Path, capsys: Capture) -> None:
    overrides = ["denoiser.depth=2", f"runs_dir={tmp_path / 'runs'}"]
    assert main(["show", DIT, *overrides]) == 0
    values = yaml.safe_load(capsys.readouterr().out)
    assert values["denoiser"]["depth"] == 2
    assert values["optimizer"]["betas"] == [0.9, 0.999]  # includes defaults
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["trian", DIT], f"unknown command 'trian'; choose from {', '.join(VERBS)}; did you mean 'train'?"),
        (["--foo"], f"unknown command '--foo'; choose from {', '.join(VERBS)}"),
        (["train"], "the following arguments are required: CONFIG"),
        (["train", "--config", DIT], "unrecognized arguments: --config; see diffbench --help"),
        (["list", "--all"], "unrecognized arguments: --all; see diffbench --help"),
        (["compare"], "the following arguments are required: RUN [key=value]; see diffbench compare --help"),
        (["show", DIT, "-x"], "'-x' is not an override; write key=value, e.g. trainer.max_images=200_000"),
        (["list", "--mod"], "unrecognized arguments: --mod; see diffbench --help"),
        (["show", DIT, "seed"], "'seed' is not an override; write key=value, e.g. trainer.max_images=200_000"),
    ],
)
def test_a_wrong_command_line_is_refused(refused: Callable[..., str], argv: list[str], line: str) -> None:
    assert refused(*argv).startswith(f"command line: {line}")


FOUND_BEFORE_TRAINING = {
    "denoiser.patch_size=3": "denoiser.patch_size: 3 does not divide 8, a side of the image",
    "denoiser.num_heads=5": "denoiser.num_heads: 5 does not divide denoiser.hidden_size=",
    "denoiser.hidden_size=0": "denoiser.hidden_size: must be positive, got 0",
    "denoiser.depth=-1": "denoiser.depth: must be positive, got -1",
    "denoiser.mlp_ratio=-1": "denoiser.mlp_ratio: must be positive, got -1.0",
    "denoiser.dropout=2": "denoiser.dropout: must lie in [0, 1), got 2.0",
    "evaluate.every_images=100 evaluate.every_count=1e6": "evaluate.every_count: must be at most 1437, the",
    "sample.steps=abc": "sample.steps: must be like 250, ddim25 or 10,15,20, got 'abc'",
    "sample.steps=5000": "sample.steps: '5000' does not fit process.steps=1000",
    "validation.log_snr=[0,50]": "validation.log_snr: log-SNR must lie in ",
    "trainer.batch_size=many": "trainer.batch_size: must be a whole number, got 'many'",
    "init_from=/nowhere": "init_from: /nowhere: no run here (config.yaml is missing); train one first",
    "sedd=1": "sedd: unknown key",
}


@pytest.mark.parametrize("argument", FOUND_BEFORE_TRAINING)
def test_errors_are_found_before_training_and_before_a_folder_is_created(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("training started")

    monkeypatch.setattr("diffbench.runs.lifecycle.train_here", fail)
    line = refused("train", DIT, *argument.split(), f"runs_dir={tmp_path / 'runs'}")
    assert line.startswith(f"command line: {FOUND_BEFORE_TRAINING[argument]}")
    assert not list(tmp_path.iterdir())


def test_errors_are_found_before_lightning_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from diffbench.cli import main\ncode = main(sys.argv[1:]); print(code, 'lightning' in sys.modules)"
    )
    argv = ["train", DIT, "denoiser.patch_size=3", f"runs_dir={tmp_path}"]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=60)
    assert done.stdout == "2 False\n"


def test_a_size_in_the_file_that_an_override_breaks_is_blamed_on_the_command_line(refused: Callable[..., str]) -> None:
    line = refused("train", "experiments/digits/diffit.yaml", "denoiser.channels=[30,60]")
    assert line.startswith("command line: denoiser.norm_groups: 8 does not divide 30")


def test_a_runs_dir_that_is_a_file_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    line = refused("train", DIT, f"runs_dir={file}")
    assert line == f"command line: runs_dir: {file} is a file, not a folder; choose another runs_dir"
    assert file.read_text() == "mine"


@pytest.mark.parametrize("name", DENOISERS)
def test_a_smoke_run_of_every_backbone(name: str, tmp_path: Path, capsys: Capture) -> None:
    argv = ["train", f"experiments/digits/{name}.yaml", "debug=smoke", f"runs_dir={tmp_path}"]
    assert main(argv) == 0
    run = tmp_path / "digits" / f"{name}-smoke-s0"
    out = capsys.readouterr().out
    assert f"{run}: starting, " in out
    for fact in ("parameters", "GMACs", "images seen", "images/s", "validation bound", "fd/digits-cnn@20", "coverage/"):
        assert re.search(rf"^{re.escape(fact)}\S* .*[\d.]+", out, re.MULTILINE), fact
    image = run / "samples" / "final-000000016.png"
    assert f"samples: {image}" in out
    assert size(image)[0] > 100
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name != ".lock"}

    assert main(argv) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{run}: complete at 16 images\n")
    assert f"samples: {image}" in out
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_longer_run_resumes_and_a_shorter_one_changes_nothing(smoke_run: Path, capsys: Capture) -> None:
    argv = ["train", DIT, "debug=smoke", f"runs_dir={smoke_run.parent.parent}"]
    assert main([*argv, "trainer.max_images=24"]) == 0
    out = capsys.readouterr().out
    assert "trainer.max_images: 16 before, 24 now\n" in out
    assert f"{smoke_run}: resuming at 16 images, " in out
    assert "images seen" in out
    assert (smoke_run / "samples" / "final-000000016.png").exists()
    assert (smoke_run / "samples" / "final-000000024.png").exists()
    saved = (smoke_run / "config.yaml").read_text()
    assert main(argv) == 0
    assert f"{smoke_run}: complete at 24 images" in capsys.readouterr().out
    assert (smoke_run / "config.yaml").read_text() == saved
    assert diffbench.load(smoke_run).images_seen == 24


def test_a_lost_export_is_restored(smoke_run: Path, capsys: Capture) -> None:
    (export,) = smoke_run.glob("ema-*.safetensors")
    before = load_file(export)
    export.unlink()
    assert main(["train", DIT, "debug=smoke", f"runs_dir={smoke_run.parent.parent}"]) == 0
    after = load_file(export)
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


def test_another_config_in_the_same_folder_is_refused(refused: Callable[..., str], smoke_run: Path) -> None:
    runs = smoke_run.parent.parent
    shutil.move(smoke_run, smoke_run.with_name("dit-smoke-x-s0"))
    line = refused("train", DIT, "debug=smoke", "tag=x", "optimizer.lr=0.5", f"runs_dir={runs}")
    assert re.search(r"this run was made with optimizer\.lr=\S+ \(now 0\.5\); choose another tag=NAME", line)


def test_init_from_starts_at_the_averaged_weights(
    smoke_run: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, torch.Tensor]] = []

    def spy(run: diffbench.Run, checkpoint: Path | None, start: dict[str, torch.Tensor]) -> None:
        started.append(start)
        raise RuntimeError("far enough")

    monkeypatch.setattr("diffbench.runs.lifecycle.train_here", spy)
    assert main(["train", DIT, "tag=warm", f"init_from={smoke_run}", f"runs_dir={tmp_path}"]) == 1
    assert f"initial weights from {smoke_run}\n" in capsys.readouterr().out
    weights = diffbench.load(smoke_run).denoiser.state_dict()
    assert started[0].keys() == weights.keys()
    assert all(torch.equal(started[0][k], weights[k]) for k in weights)


def test_init_from_another_network_or_an_untrained_run_is_refused(
    refused: Callable[..., str], smoke_run: Path, tmp_path: Path
) -> None:
    runs = f"runs_dir={tmp_path / 'new'}"
    line = refused("train", DIT, "denoiser.depth=1", f"init_from={smoke_run}", runs)
    assert line.startswith(f"command line: init_from: {smoke_run} has a different network: blocks.1.")
    (smoke_run / "checkpoints").rename(tmp_path / "gone")
    for path in smoke_run.glob("ema-*"):
        path.unlink()
    line = refused("train", DIT, f"init_from={smoke_run}", runs)
    assert line == f"command line: init_from: {smoke_run}: no weights yet; train the run first"
    assert not (tmp_path / "new").exists()


def test_overfit_learns_its_batch(tmp_path: Path) -> None:
    settings = [
        "trainer.batch_size=16",
        "trainer.max_images=6400",
        "trainer.log_images=160",
        "optimizer.warmup_images=0",
    ]
    run = diffbench.train(DIT, ["debug=overfit", *settings, *SMALL, "tag=x", f"runs_dir={tmp_path}"])
    assert run.folder == tmp_path / "digits" / "dit-overfit-x-s0"
    losses = [json.loads(line).get("train/loss") for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]


def test_evaluate_appends_records_and_prints_them(smoke_run: Path, capsys: Capture) -> None:
    before = (smoke_run / "results.jsonl").read_text()
    argv = ["sample.sampler=ddim", "sample.steps=3", "sample.guidance=3", "evaluate.count=30", "seed=1"]
    assert main(["evaluate", str(smoke_run), *argv]) == 0
    out = capsys.readouterr().out
    assert "fd/digits-cnn@30" in out and "(guidance 3, sample.sampler=ddim, " in out
    after = (smoke_run / "results.jsonl").read_text()
    assert after.startswith(before)
    new = [json.loads(line) for line in after[len(before) :].splitlines()]
    assert [r["guidance"] for r in new] == [1.0, 3.0]
    assert new[0]["sample"]["steps"] == "3" and new[0]["sample"]["seed"] == 1


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("trainer.max_images=5", "trainer: not for evaluate; allowed: sample.KEY, evaluate.KEY, seed, ema, "),
        (
            "smaple.steps=3",
            "smaple: not for evaluate; allowed: sample.KEY, evaluate.KEY, seed, ema, snapshot, export; did you mean"
            " 'sample'?",
        ),
        ("sample.stesp=3", "sample.stesp: unknown key; allowed: "),
        ("sample.steps=5000", "sample.steps: '5000' does not fit process.steps=1000"),
        ("evaluate.count=5", "evaluate.count: must be at least 20, got 5"),
        (
            "evaluate.every_count=50",
            "evaluate.every_count: has no effect here; allowed: evaluate.count, evaluate.extractor, evaluate.weights,",
        ),
        ("evaluate.count=1e6", "evaluate.count: must be at most "),
        (
            "evaluate.extractor=x",
            "evaluate.extractor: unknown extractor 'x'; choose from digits-cnn, efficientnet-lite0,",
        ),
        ("snapshot=first", "snapshot: must be last or best, got 'first'"),
        ("sample", "'sample' is not an override; write key=value"),
    ],
)
def test_evaluate_refuses_bad_arguments(refused: Callable[..., str], finished: Path, argument: str, line: str) -> None:
    before = (finished / "results.jsonl").read_text()
    assert refused("evaluate", finished, argument).startswith(f"command line: {line}")
    assert (finished / "results.jsonl").read_text() == before


def test_sample_writes_an_image(smoke_run: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["sample", str(smoke_run), "n=12", "labels=3", "guidance=2", "seed=4", "steps=3"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path.parent == smoke_run / "samples"
    cell = 8 * 8 + 4  # 8 pixels, enlarged 8 times, with a border of 2 on each side
    assert size(path) == (10 * cell, 2 * cell + CAPTION_HEIGHT)
    out = tmp_path / "new" / "digits.png"
    assert main(["sample", str(smoke_run), "n=1", "sample.steps=3", f"out={out}"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert size(out) == (cell, cell + CAPTION_HEIGHT)


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("labels=10", "labels: '10' is not a class; choose from 0 to 9"),
        ("labels=-1", "labels: '-1' is not a class; choose from 0 to 9"),
        ("labels=abc", "labels: 'abc' is not a class; choose from 0 to 9"),
        ("labels=[]", "labels: at least one is needed, got none"),
        ("n=0", "n: must be at least 1, got 0"),
        ("n=x", "n: must be a whole number or null, got 'x'"),
        ("guidance=-1", "sample.guidance: must lie in [0, 1e6], got -1.0"),
        ("steps=abc", "sample.steps: must be like 250, ddim25 or 10,15,20, got 'abc'"),
        ("eta=0.5", "sample.eta: belongs to sample.sampler=ddim"),
        ("stesp=3", "stesp: unknown key; allowed: n, labels, seed, out, ema, strip, gif, raw, sampler, "),
        ("trainer.max_images=3", "trainer: unknown key; allowed: n, labels, "),
        ("foo", "'foo' is not an override; write key=value"),
    ],
)
def test_sample_refuses_bad_arguments(refused: Callable[..., str], finished: Path, argument: str, line: str) -> None:
    assert refused("sample", finished, argument).startswith(f"command line: {line}")


def test_sample_overwrites_no_existing_file(refused: Callable[..., str], finished: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.png"
    mine.write_text("mine")
    assert refused("sample", finished, "n=1", f"out={mine}") == (
        f"command line: out: {mine} already exists; choose another name"
    )
    assert mine.read_text() == "mine"


def test_guidance_needs_a_null_class(refused: Callable[..., str], tmp_path: Path, capsys: Capture) -> None:
    overrides = ["trainer.label_dropout=0", "sample.guidance=1", "tag=x", *SMALL, f"runs_dir={tmp_path}"]
    assert main(["train", DIT, "debug=smoke", *overrides]) == 0
    assert "(guidance" not in capsys.readouterr().out
    run = tmp_path / "digits" / "dit-smoke-x-s0"
    expected = "command line: sample.guidance: 2 needs a null class, but trainer.label_dropout=0 trains none"
    assert refused("sample", run, "guidance=2", "n=2").startswith(expected)
    assert refused("evaluate", run, "sample.guidance=2").startswith(expected)


def test_compare_prints_runs_side_by_side(finished: Path, capsys: Capture) -> None:
    assert main(["compare", str(finished), str(finished)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [str(finished)] * 2
    (seen,) = (line.split() for line in lines if line.startswith("images seen"))
    assert seen == ["images", "seen", "16", "16"]


@pytest.mark.parametrize("verb", ["evaluate", "sample", "compare"])
def test_unusable_runs_are_refused(refused: Callable[..., str], smoke_run: Path, tmp_path: Path, verb: str) -> None:
    nowhere = tmp_path / "nowhere"
    assert refused(verb, nowhere) == f"{nowhere}: no run here (config.yaml is missing); train one first"
    sibling = smoke_run.with_name("dit-s0")
    assert refused(verb, sibling) == f"{sibling}: no run here (config.yaml is missing); choose from {smoke_run}"
    (export,) = smoke_run.glob("ema-*.safetensors")
    export.write_bytes(b"broken")
    assert refused(verb, smoke_run).startswith(f"{export}: damaged (")
    export.unlink()
    shutil.rmtree(smoke_run / "checkpoints")
    assert refused(verb, smoke_run) == f"{smoke_run}: no weights yet; train the run first"
    (smoke_run / "config.yaml").write_text("seed: [1")
    assert refused(verb, smoke_run).startswith(f"{smoke_run}/config.yaml: not valid YAML: ")


def test_a_damaged_record_is_named(refused: Callable[..., str], smoke_run: Path) -> None:
    with (smoke_run / "results.jsonl").open("a") as file:
        file.write('{"half": \n')
    assert refused("compare", smoke_run) == f"{smoke_run}/results.jsonl: line 3 is not JSON; remove that line"


def test_an_unforeseen_error_is_still_one_line(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left\non device")

    monkeypatch.setattr("diffbench.runs.lifecycle.train_here", fail)
    argv = ["train", DIT, f"runs_dir={tmp_path}"]
    text, saved = refused(*argv).split("; the trace is in ")
    assert text == "no space left on device" and "no space left\non device" in Path(saved).read_text()
    monkeypatch.setenv("DIFFBENCH_TRACEBACK", "1")
    with pytest.raises(OSError, match="no space left"):
        main(argv)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            ValueError("shapes (3,) and\n(4,)"),
            1,
            "this is a bug in diffbench: ValueError: shapes (3,) and (4,); the trace",
        ),
        (RuntimeError("x"), 1, "this is a bug in diffbench: RuntimeError: x; the trace to report is in "),
        (KeyError("getpwuid(): uid not found: 7"), 1, "this is a bug in diffbench: KeyError: 'getpwuid()"),
        (MemoryError(), 2, "out of memory; lower trainer.batch_size, sample.batch_size or the size of the network"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            2,
            "out of memory; lower",
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "out of memory; lower trainer.batch_size"),
        (PermissionError(13, "Permission denied", "/x/y"), 2, "/x/y: Permission denied"),
    ],
)
def test_bugs_and_user_errors_are_told_apart(
    error: Exception, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("diffbench.commands.show.read_layers", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["show", DIT]) == code
    err = capsys.readouterr().err
    assert err.startswith(f"error: {line}") and err.count("\n") == 1
    assert ("bug" in err) is (code == 1) is (len(list(tmp_path.iterdir())) == 1)
    if code == 1:
        saved = Path(err.rsplit(" is in ", 1)[1].strip()).read_text()
        assert "Traceback (most recent call last):" in saved and saved.rstrip().endswith(str(error))


def test_commands_work_without_home_and_passwd_entry(tmp_path: Path) -> None:
    """Run as a user unknown to the system, as in a container or under cron."""
    unknown_user = "import pwd\ndef gone(*_): raise KeyError('uid not found')\npwd.getpwuid = pwd.getpwnam = gone\n"
    code = f"{unknown_user}import sys\nfrom diffbench.cli import main\nsys.exit(main(sys.argv[1:]))"
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "DIFFBENCH_CACHE": str(tmp_path / "cache")}
    env["MPLCONFIGDIR"] = str(tmp_path)

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *args, f"runs_dir={tmp_path / 'runs'}"]
        return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)

    done = run("train", DIT, "data.name=images", "data.path=~/none")
    assert done.returncode == 2 and done.stderr.startswith("error: command line: data.path: no file or folder ~/none")
    del env["DIFFBENCH_CACHE"]
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    done = run("train", DIT, "data.name=images", f"data.path={tmp_path}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.endswith("no home folder for the cache; set DIFFBENCH_CACHE=FOLDER\n")


def test_load_and_sample_in_python(finished: Path) -> None:
    run = diffbench.load(finished)
    assert run.config == load_config(DIT, ["debug=smoke", f"runs_dir={finished.parent.parent}"])
    assert run.images_seen == 16
    assert not run.denoiser.training
    images = run.sample(n=4, labels=3, guidance=2.0, seed=0)
    assert [(p.size, p.mode) for p in images] == [((8, 8), "L")] * 4
    again = diffbench.load(str(finished)).sample(n=4, labels=3, guidance=2.0, seed=0)
    assert [p.tobytes() for p in images] == [p.tobytes() for p in again]
    other = run.sample(n=4, labels=3, guidance=2.0, seed=1)
    assert [p.tobytes() for p in images] != [p.tobytes() for p in other]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_sample_does_not_depend_on_the_batch_size(finished: Path, sampler: str) -> None:
    run = diffbench.load(finished)
    run.denoiser.double()  # so that kernels for different batch sizes round alike
    draws = [run.sample_tensor(n=7, seed=3, sampler=sampler, steps=5, batch_size=size) for size in (1, 3, 7)]
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])
    assert torch.equal(run.sample_tensor(n=3, seed=3, sampler=sampler, steps=5), draws[0][:3])


def test_labels_in_python_may_be_lists_and_tensors(finished: Path) -> None:
    run = diffbench.load(finished)
    assert run.sample_tensor(labels=[1, 2, 3]).shape == (3, 1, 8, 8)
    assert run.sample_tensor(labels=torch.tensor([1, 2])).dtype == torch.uint8
    assert len(run.sample()) == 16
    assert isinstance(np.asarray(run.sample(n=1)[0]), np.ndarray)
    with pytest.raises(ValueError, match=r"labels: '12' is not a class; choose from 0 to 9"):
        run.sample(labels=[3, 12])
    with pytest.raises(ValueError, match=r"labels: 2 labels for n=3 samples"):
        run.sample(n=3, labels=[1, 2])
    with pytest.raises(ValueError, match="labels: at least one is needed"):
        run.sample(labels=[])


@pytest.mark.parametrize(
    "process",
    [
        ["process.variance=learned_range", "process.loss=hybrid"],
        ["process.variance=learned_range", "process.loss=rescaled_kl"],
        ["process.loss=kl", "process.schedule=scaled_linear", "validation.log_snr=[-4.0,0.0]"],
        ["process.prediction=v", "process.weighting=min_snr", "process.zero_terminal_snr=true"],
    ],
)
def test_every_loss_and_variance_trains_and_samples(process: list[str], tmp_path: Path) -> None:
    run = diffbench.train(DIT, [*SMALL, "debug=smoke", f"runs_dir={tmp_path}", *process])
    series = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["train/loss"]) for line in series if "train/loss" in line)
    assert run.denoiser.final.out_features == (8 if "learned_range" in process[0] else 4)  # type: ignore[union-attr]
    assert len(run.sample(n=2, guidance=1.5)) == 2


def test_another_average_can_be_sampled_and_scored(tmp_path: Path, refused: Callable[..., str]) -> None:
    run = diffbench.train(
        DIT, [*SMALL, "debug=smoke", f"runs_dir={tmp_path}", "ema.decays=[0.9,0.5]", "ema.warmup=false"]
    )
    assert main(["evaluate", str(run.folder), "ema=0.5"]) == 0
    first = json.loads((run.folder / "results.jsonl").read_text().splitlines()[0])
    assert first["ema"] == 0.5 and run.ema == 0.9
    assert main(["sample", str(run.folder), "n=2", "ema=0.5"]) == 0
    averages = [diffbench.load(run.folder, ema=decay).denoiser.state_dict() for decay in (0.9, 0.5)]
    assert not torch.equal(averages[0]["final.weight"], averages[1]["final.weight"])
    expected = f"{run.folder}: ema: no average has decay 0.7; choose from 0.9, 0.5"
    assert refused("evaluate", run.folder, "ema=0.7") == refused("sample", run.folder, "ema=0.7") == expected


def test_custom_modules_in_the_working_folder_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A console script has its own folder first on sys.path, `python -m` the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    assert main(["list", "--models"]) == 0
    assert sys.path[-1] == str(tmp_path)
