"""`diffbench list FOLDER`: one line for each run below the folder, in whatever state."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_runs import make_run

from diffbench.cli import main
from diffbench.runs import build


def list_runs(capsys: pytest.CaptureFixture[str], *folders: Path) -> list[list[str]]:
    """Run `list` and return the columns of each line."""
    assert main(["list", *map(str, folders)]) == 0
    return [[part for part in line.split("  ") if part] for line in capsys.readouterr().out.splitlines()]


def test_each_run_has_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = make_run(tmp_path / "digits" / "dit-s0", error=0.1)
    record = {"images_seen": 98_304, "ema": 0.999, "guidance": 1.0, "fd/digits-cnn@500": 0.83, "precision@500": 0.9}
    record["ema"] = float(next(done.glob("ema-*.safetensors")).stem[4:])
    (done / "results.jsonl").write_text(json.dumps(record) + "\n")
    stopped = make_run(tmp_path / "digits" / "unet-s1", "unet", seed=1, error=0.2)
    next(stopped.glob("ema-*.safetensors")).unlink()
    (stopped / "checkpoints").mkdir()
    (stopped / "checkpoints" / "step-100.ckpt").touch()
    broken = make_run(tmp_path / "other" / "dit-s2")
    next(broken.glob("ema-*.safetensors")).write_bytes(b"no tensors")
    for path in (*done.iterdir(), *stopped.iterdir()):
        os.utime(path, (0, 0))
    head, *rows = list_runs(capsys, tmp_path, tmp_path / "digits")
    assert [part.strip() for part in head] == [
        "run", "images", "of", "validation bound", "newest score", "last change",
    ]  # fmt: skip
    assert [part.strip() for part in rows[0]][:5] == [str(done), "98,304", "98,304", "0.1000", "fd/digits-cnn@500 0.83"]
    assert rows[0][5].strip().startswith("1970-01-01")
    assert [part.strip() for part in rows[1]][:5] == [str(stopped), "6,400", "98,304", "0.2000", "-"]
    assert rows[2][0].strip() == str(broken)
    assert rows[2][-1].strip().startswith(f"{next(broken.glob('ema-*'))}: damaged (")
    assert len(rows) == 3  # each run once, though both given folders contain it
    (tmp_path / "far" / "loop").parent.mkdir()
    (tmp_path / "far" / "loop").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "linked").symlink_to(done)
    _, (linked, *_) = list_runs(capsys, tmp_path / "far")
    assert linked.strip() == str(tmp_path / "far" / "linked")


def test_a_folder_without_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: no run folder here or below (none has a config.yaml)\n"
    assert main(["list", str(tmp_path / "runz")]) == 2
    hint = "no such folder; train first, or name a folder that contains runs"
    assert capsys.readouterr().err == f"error: {tmp_path / 'runz'}: {hint}\n"


def test_listing_runs_builds_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(4):
        make_run(tmp_path / f"dit-s{seed}", seed=seed)
    monkeypatch.setattr(build, "cost_of", lambda *_: pytest.fail("a network was built"))
    assert len(list_runs(capsys, tmp_path)) == 5


def test_a_closed_pipe_ends_the_command_quietly() -> None:
    command = [sys.executable, "-m", "diffbench", "show", "experiments/digits/dit.yaml"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_refused_resume_leaves_the_list_unchanged(smoke_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (before,) = list_runs(capsys, smoke_run.parent)[1:]
    assert [part.strip() for part in before][1:3] == ["16", "16"]
    facts = json.loads((smoke_run / "data.json").read_text())
    (smoke_run / "data.json").write_text(json.dumps(facts | {"fingerprint": "of other images"}))
    runs = f"runs_dir={smoke_run.parent.parent}"
    assert main(["train", "experiments/digits/dit.yaml", "debug=smoke", runs, "trainer.max_images=32"]) == 2
    assert "other training data" in capsys.readouterr().err
    assert list_runs(capsys, smoke_run.parent)[1:] == [before]
