"""After a kill at any moment, the same command ends bit for bit like an uninterrupted one; and a run is locked."""

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
    """Run a series of kills and return its report."""
    command = [sys.executable, "tests/kill_runs.py", what, how, str(most), str(folder), share]
    paths = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    print(report)
    return report


def test_a_run_killed_in_two_writes_ends_the_same(tmp_path: Path) -> None:
    report = killed("train", "writes", 4, tmp_path, "2/2")
    assert (report["kills"], report["unkilled"], report["wrong"]) == (2, [], {})


def test_a_run_killed_after_a_checkpoint_and_before_the_first_log_line_ends_the_same(tmp_path: Path) -> None:
    """Checkpoints come first, then validation, grid and distance; nothing is ever logged."""
    report = killed("schedules", "writes", 4, tmp_path, "2/10")
    assert (report["kills"], report["unkilled"], report["wrong"]) == (4, [], {})


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_runs_killed_in_every_order_of_intervals_end_the_same(tmp_path: Path) -> None:
    report = killed("schedules", "writes", 10, tmp_path)
    assert (report["kills"], report["unkilled"], report["wrong"]) == (100, [], {})


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("what", "how", "most"), [("train", "writes", 200), ("score", "writes", 60), ("train", "moments", 20)]
)
def test_runs_killed_many_times_end_the_same(what: str, how: str, most: int, tmp_path: Path) -> None:
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
        message = capsys.readouterr().err
        assert message == f"error: {folder}: another command (pid {other.pid}) is working on this run\n"
        assert [p.name for p in folder.iterdir()] == [".lock"]
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    with locked(folder):  # released when the process ends, in whatever way
        assert (folder / ".lock").read_text() == f"{os.getpid()}\n"


HOLD = """
import sys, time
from pathlib import Path
from diffbench.core.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_leftovers_of_a_killed_command_are_removed(tmp_path: Path) -> None:
    run = train(DIT, ["debug=smoke", f"runs_dir={tmp_path}"])
    for left in ("checkpoints/.step-4.ckpt.staged", "checkpoints/.step-4.ckpt.staged.ab12.tmp", ".config.yaml.x.tmp"):
        (run.folder / left).write_bytes(b"half")
    kept = {p for p in run.folder.rglob("*") if p.name == ".lock" or not p.name.startswith(".")}
    sweep(run.folder)
    assert set(run.folder.rglob("*")) == kept


def test_a_guided_score_lost_to_a_kill_is_made_by_the_same_command(smoke_run: Path) -> None:
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
