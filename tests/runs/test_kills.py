"""Killed at any moment, the same command ends to the bit as an unbroken one; and who else may touch the folder."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffbench.cli import main
from diffbench.core.files import locked, sweep
from diffbench.evaluation.records import results
from diffbench.runs.lifecycle import train

DIT = "experiments/digits/dit.yaml"


def killed(what: str, how: str, most: int, folder: Path, share: str = "1/1") -> dict[str, Any]:
    """The report of a series of kills."""
    command = [sys.executable, "tests/kill_runs.py", what, how, str(most), str(folder), share]
    paths = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    print(report)
    return report


def test_killed_twice_in_its_writes(tmp_path: Path) -> None:
    report = killed("train", "writes", 4, tmp_path, "2/2")
    assert (report["kills"], report["unkilled"], report["wrong"]) == (2, [], {})


def test_killed_with_a_checkpoint_before_the_first_line(tmp_path: Path) -> None:
    """Checkpoints first, then validation, grid and distance; the log never comes."""
    report = killed("schedules", "writes", 4, tmp_path, "2/10")
    assert (report["kills"], report["unkilled"], report["wrong"]) == (4, [], {})


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_in_every_order_of_intervals(tmp_path: Path) -> None:
    report = killed("schedules", "writes", 10, tmp_path)
    assert (report["kills"], report["unkilled"], report["wrong"]) == (100, [], {})


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("what", "how", "most"), [("train", "writes", 200), ("score", "writes", 60), ("train", "moments", 20)]
)
def test_killed_again_and_again(what: str, how: str, most: int, tmp_path: Path) -> None:
    report = killed(what, how, most, tmp_path)
    assert report["kills"] == most and report["wrong"] == {}
    assert report["unkilled"] == []
    if how == "moments":
        assert report["kinds"].keys() == {"training", "validation", "distance"}
    else:
        ends = {kind.split()[0] for kind in report["kinds"]}
        assert {"write", "fsync", "replace"} <= ends


def test_a_second_command_on_a_run_names_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "digits" / "dit-smoke-s0"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert main(["train", DIT, "debug=smoke", f"runs_dir={tmp_path}"]) == 2
        said = capsys.readouterr().err
        assert said == f"error: {folder}: another command (pid {other.pid}) is working on this run\n"
        assert [p.name for p in folder.iterdir()] == [".lock"]
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    with locked(folder):  # it goes with the process, however that ends
        assert (folder / ".lock").read_text() == f"{os.getpid()}\n"


HOLD = """
import sys, time
from pathlib import Path
from diffbench.core.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_command_left_is_swept_away(tmp_path: Path) -> None:
    run = train(DIT, ["debug=smoke", f"runs_dir={tmp_path}"])
    for left in ("checkpoints/.step-4.ckpt.staged", "checkpoints/.step-4.ckpt.staged.ab12.tmp", ".config.yaml.x.tmp"):
        (run.folder / left).write_bytes(b"half")
    kept = {p for p in run.folder.rglob("*") if p.name == ".lock" or not p.name.startswith(".")}
    sweep(run.folder)
    assert set(run.folder.rglob("*")) == kept


def test_a_guided_score_that_a_kill_prevented_is_made_up_for(smoke_run: Path) -> None:
    path = smoke_run / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert [json.loads(line)["guidance"] for line in lines] == [1.0, 1.5]
    path.write_text(lines[0] + lines[1][:40])
    runs = smoke_run.parent.parent
    assert main(["train", DIT, "debug=smoke", f"runs_dir={runs}"]) == 0
    newest = {record["guidance"]: record for record in results(smoke_run)}
    before = {record["guidance"]: record for record in map(json.loads, lines)}
    assert newest.keys() == before.keys()
    for guidance, record in newest.items():
        name = "fd/digits-cnn@20"
        assert record[name] == before[guidance][name]
