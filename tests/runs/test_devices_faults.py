"""No rank waits forever: a failing rank ends the job with its error; a signal saves once and ends all ranks."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from devices_worker import faulty_worker
from forked import forked

from diffbench.core import distributed
from diffbench.core.distributed import launch
from diffbench.core.files import locked
from diffbench.runs.lifecycle import train
from diffbench.training.checkpoint import newest, pending

ROOT = Path(__file__).parents[2]
DIT = str(ROOT / "experiments" / "digits" / "dit.yaml")
TINY = [
    "trainer.devices=2",
    "trainer.batch_size=16",
    "trainer.max_images=1600",
    "trainer.log_images=80",
    "trainer.checkpoint_images=80",
    "trainer.validate_images=1600",
    "trainer.sample_images=1600",
    "data.held_out=40",
    "denoiser.hidden_size=32",
    "denoiser.depth=1",
    "sample.steps='2'",
    "tag=t",
]
FAILING = """
import os, sys, time
what, rank = sys.argv[1], int(os.environ["RANK"])
if rank == 1:
    if what == "code":
        print("rank 1 says why", file=sys.stderr)
        sys.exit(7)
    if what == "kill":
        os.kill(os.getpid(), 9)
if what == "both":
    print("error: the same", file=sys.stderr)
    sys.exit(2)
if what == "lost" and rank == 0:
    sys.exit(75)
time.sleep(0 if what == "well" else 600)
"""


@pytest.mark.parametrize(
    ("what", "code", "message"),
    [
        ("well", 0, ""),
        ("code", 7, "rank 1 says why\nerror: rank 1 of 3 exited with code 7; the other ranks were stopped\n"),
        ("kill", 137, "error: rank 1 of 3 was killed by SIGKILL; the other ranks were stopped\n"),
    ],
)
def test_a_failing_rank_ends_the_others(what: str, code: int, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    assert launch([sys.executable, "-c", FAILING, what], 3) == code
    assert capfd.readouterr().err == message
    assert time.monotonic() - started < 50


def test_an_error_of_all_ranks_is_printed_once(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch([sys.executable, "-c", FAILING, "both"], 2) == 2
    assert capfd.readouterr().err == "error: the same\n"


def test_a_rank_that_only_lost_its_connection_is_reported_as_such(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffbench.core.distributed.STOP_GRACE_S", 1.0)
    assert launch([sys.executable, "-c", FAILING, "lost"], 2) == 75
    message = "error: rank 0 of 2 lost its connection to the others; the other ranks were stopped\n"
    assert capfd.readouterr().err == message


LISTENING = """
import os, signal, sys, time
folder, deaf = sys.argv[1], sys.argv[2] == "deaf"
def hear(number, frame):
    with open(os.path.join(folder, "heard-" + os.environ["RANK"]), "a") as file:
        file.write(f"{number} ")
    if not deaf:
        time.sleep(0.5)
        os._exit(128 + number)
signal.signal(signal.SIGTERM, hear)
open(os.path.join(folder, "up-" + os.environ["RANK"]), "w").close()
while True:
    time.sleep(1)
"""


@pytest.mark.parametrize(("how", "debounce", "heard"), [("willing", 60.0, "15 "), ("deaf", 0.05, "15 15 ")])
def test_two_signals_at_once_count_as_one_and_a_later_one_is_forwarded(
    how: str,
    debounce: float,
    heard: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("diffbench.core.distributed.SIGNAL_DEBOUNCE_S", debounce)
    monkeypatch.setattr("diffbench.core.distributed.FAILURE_GRACE_S", 0.5)

    def stop_twice() -> None:
        while len(list(tmp_path.glob("up-*"))) < 2:
            time.sleep(0.02)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)

    threading.Thread(target=stop_twice).start()
    assert launch([sys.executable, "-c", LISTENING, str(tmp_path), how], 2) == 128 + signal.SIGTERM
    assert capfd.readouterr().err == ""
    assert [(tmp_path / f"heard-{rank}").read_text() for rank in (0, 1)] == [heard] * 2


def test_ranks_hold_the_lock_and_end_with_their_launcher(tmp_path: Path) -> None:
    rank = (
        "import time; from pathlib import Path; from diffbench.core.distributed import end_with_parent;"
        f" end_with_parent(); Path({str(tmp_path)!r}, 'up').touch(); time.sleep(600)"
    )
    launcher = (
        "import sys; from pathlib import Path; from diffbench.core.files import locked;"
        f" from diffbench.core.distributed import launch\nwith locked(Path({str(tmp_path)!r})) as held:"
        f" launch([sys.executable, '-c', {rank!r}], 2, [held])"
    )
    process = subprocess.Popen([sys.executable, "-c", launcher])
    while not (tmp_path / "up").exists():
        time.sleep(0.05)
    process.kill()
    process.wait()
    with locked(tmp_path, wait=True):  # free once the last rank has ended
        pass


def test_ranks_come_from_torchrun_or_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.rank_and_world() == (0, 1) and distributed.local_rank() == 0
    for name, value in {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.rank_and_world() == (5, 8) and distributed.local_rank() == 1 and distributed.started_by_srun()
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.rank_and_world() == (0, 2) and not distributed.started_by_srun()
    monkeypatch.setenv("RANK", "1")
    assert distributed.rank_and_world()[0] == 1


@pytest.mark.parametrize(("what", "code", "message"), [("raise", 1, "rank 1 meets its end"), ("kill", 137, "SIGKILL")])
def test_training_ends_when_a_rank_fails(
    what: str, code: int, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with forked(faulty_worker(what, 1, 7)), pytest.raises(SystemExit) as end:
        train(DIT, [*TINY, f"runs_dir={tmp_path}"])
    assert end.value.code == code
    error = capfd.readouterr().err
    assert message in error and "gloo" not in error and "rank 1 of 2" in error.splitlines()[-1]
    (run,) = (tmp_path / "digits").iterdir()
    assert [p.name for p in (run / "checkpoints").glob("*.ckpt")] == ["step-5.ckpt"]


def test_a_signal_saves_once_and_one_process_resumes_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with forked(faulty_worker("signal", 1, 7)), pytest.raises(SystemExit) as end:
        train(DIT, [*TINY, f"runs_dir={tmp_path}"])
    assert end.value.code == 128 + signal.SIGTERM
    out, error = capfd.readouterr()
    assert out.count("stopped by SIGTERM") == 1 and "state saved" in out and "error" not in error
    (run,) = (tmp_path / "digits").iterdir()
    saved = sorted(int(p.stem[5:]) for p in (run / "checkpoints").glob("*.ckpt"))
    assert 7 <= saved[-1] < 100
    longer = f"trainer.max_images={16 * (saved[-1] + 2)}"
    assert train(DIT, [*TINY, longer, "trainer.devices=1", f"runs_dir={tmp_path}"]).images_seen == 16 * (saved[-1] + 2)


def test_a_signal_to_one_rank_interrupts_validation_on_all_ranks(tmp_path: Path) -> None:
    argv = [*TINY, "trainer.validate_images=112", "trainer.max_images=160", f"runs_dir={tmp_path}"]
    with forked(faulty_worker("interrupt", 1, 0)), pytest.raises(SystemExit) as end:
        train(DIT, argv)
    assert end.value.code == 128 + signal.SIGTERM
    (run,) = (tmp_path / "digits").iterdir()
    saved = newest(run / "checkpoints")
    assert saved is not None and saved.name == "step-7.ckpt" and pending(saved) == ["ValidationError"]
    train(DIT, argv)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines if "val/bound" in line] == [112, 160]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "ours", "srun"])
def test_the_command_line_works_under_every_launcher(launcher: str, tmp_path: Path) -> None:
    command = ["diffbench", "train", DIT, *TINY, "trainer.max_images=160", f"runs_dir={tmp_path}", "evaluate.count=20"]
    argv = [sys.executable, "-m", *command]
    if launcher == "torchrun":
        argv[1:2] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    if launcher != "srun":
        done = subprocess.run(argv, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        out = done.stdout
    else:  # the environment that srun gives its tasks
        tasks = []
        for rank in "01":
            environment = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": "0", "SLURM_NTASKS": "2"}
            environment |= {
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_NTASKS_PER_NODE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "29413",
            }
            pipe = subprocess.PIPE
            tasks.append(subprocess.Popen(argv, env=os.environ | environment, stdout=pipe, stderr=pipe, text=True))
        outputs = [task.communicate(timeout=900) for task in tasks]
        assert [task.returncode for task in tasks] == [0, 0], outputs
        out = outputs[0][0]
        assert outputs[1][0] == ""
    assert out.count("starting") == 1 and out.count("samples:") == 1
    (run,) = (tmp_path / "digits").iterdir()
    assert len(list(run.glob("events.*"))) == 3  # from training and two evaluations
