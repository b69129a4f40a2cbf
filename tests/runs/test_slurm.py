"""Commands on a real one-node SLURM: a run, an array, and a run that reaches its time limit."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_one_node
from test_resume import CASES, TINY, assert_equal, only, scalars, series, state

from diffbench.cli import main
from diffbench.runs.launcher import LauncherConfig
from diffbench.runs.lifecycle import train
from diffbench.runs.slurm import queued, submit, summary

DIT = "experiments/digits/dit.yaml"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(slurm_one_node.missing()), reason=str(slurm_one_node.missing())),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """A node of two cores and a pretend GPU; its folder has a short name because socket paths are limited."""
    pytest.importorskip("submitit")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    with slurm_one_node.one_node(folder) as environment:
        yield environment
    shutil.rmtree(folder)


@pytest.fixture
def node(cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name, value in cluster.items():
        monkeypatch.setenv(name, value)
    return cluster


def ended(job: str, environment: dict[str, str], seconds: float) -> dict[str, str]:
    """Wait for a job to end and return what SLURM reports about it."""
    deadline = time.monotonic() + seconds
    while True:
        text = slurm_one_node.run(["scontrol", "--oneliner", "show", "job", job], environment)
        facts = dict(word.split("=", 1) for word in text.split() if "=" in word)
        if facts.get("JobState") in ENDED:
            return facts
        assert time.monotonic() < deadline, text
        time.sleep(0.5)


def test_a_run_goes_through_the_queue(
    node: dict[str, str], finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    args = ["train", DIT, "debug=smoke", f"runs_dir={tmp_path}"]
    options = [
        "partition=other",
        "time=0:05:00",
        "gpus_per_node=1",
        "cpus_per_task=1",
        "mem=2G",
        "setup=['export OMP_NUM_THREADS=1']",
    ]
    assert main([*args, "launcher=slurm", *(f"launcher.{word}" for word in options)]) == 0
    out, err = capfd.readouterr()
    folder = tmp_path / "slurm"
    (job,) = queued(folder).values()
    assert (out, err) == (summary([job], folder) + "\n", "")
    facts = ended(job, node, 500)
    log = (folder / f"{job}_0_log.out").read_text()
    assert (facts["JobState"], facts["JobName"]) == ("COMPLETED", "dit-smoke-s0"), log
    assert (facts["Partition"], facts["TimeLimit"], facts["NumCPUs"]) == ("other", "00:05:00", "1")
    assert (facts["TresPerNode"], facts["MinMemoryNode"], facts["Requeue"]) == ("gres:gpu:1", "2G", "1")
    assert queued(folder) == {}
    run = only(tmp_path)
    assert run.name == finished.name == "dit-smoke-s0"
    assert series(run) == series(finished)
    assert f"samples: {run}/samples/final-" in log


def test_the_tasks_of_a_job_are_the_ranks_of_a_run(
    node: dict[str, str], finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    args = ["train", DIT, "debug=smoke", "trainer.devices=2", f"runs_dir={tmp_path}"]
    options = ["ntasks_per_node=2", "cpus_per_task=1", "time=5", "setup=['export OMP_NUM_THREADS=1']"]
    assert main([*args, "launcher=slurm", *(f"launcher.{word}" for word in options)]) == 0
    ((_, job),) = queued(tmp_path / "slurm").items()
    facts = ended(job, node, 500)
    logs = {rank: (tmp_path / "slurm" / f"{job}_{rank}_log.out").read_text() for rank in range(2)}
    assert (facts["JobState"], facts["NumTasks"]) == ("COMPLETED", "2"), logs
    run = only(tmp_path)
    assert f"samples: {run}/samples/final-" in logs[0] and "samples:" not in logs[1]
    one, two = ({key: value for line in series(r) for key, value in line.items()} for r in (finished, run))
    for name in ("train/loss", "val/bound"):
        assert two[name] == pytest.approx(one[name], rel=1e-3)


def test_a_failing_command_does_not_stop_the_others(node: dict[str, str], tmp_path: Path) -> None:
    launcher = LauncherConfig("slurm", "5", cpus_per_task=1, folder=str(tmp_path), options={"array_parallelism": 1})
    commands = [["show", DIT], ["show", DIT, "denoiser.depht=2"], ["show", DIT, "seed=3"]]
    jobs = submit(commands, launcher, "three")
    first = jobs[0].split("_")[0]
    assert jobs == [f"{first}_{i}" for i in range(3)]
    assert submit(commands[1:], launcher) == jobs[1:]  # they are queued already
    facts = [ended(job, node, 300) for job in jobs]
    assert [f["JobState"] for f in facts] == ["COMPLETED", "FAILED", "COMPLETED"]
    assert [f["ExitCode"] for f in facts] == ["0:0", "2:0", "0:0"]
    assert [f["JobName"] for f in facts] == ["three"] * 3
    logs = [(tmp_path / f"{job}_0_log.out").read_text() for job in jobs]
    assert "seed: 0" in logs[0] and "seed: 3" in logs[2]
    assert "error: command line: denoiser.depht: unknown key" in logs[1] and "Traceback" not in logs[1]
    again = submit(commands[1:2], launcher)  # no longer queued: submitted again, alone, so not as an array
    assert again[0].isdigit() and int(again[0]) > int(first)


LINGER = """
import sys

if sys.orig_argv[1:4] == ["-m", "diffbench", "train"]:
    import time
    from diffbench.training.checkpoint import SaveState, all_steps

    step_end = SaveState.on_train_batch_end

    def lingering(self, trainer, *rest):
        while trainer.global_step == 17 and not self.stop.number and not all_steps(self.folder):
            time.sleep(0.1)
        step_end(self, trainer, *rest)

    SaveState.on_train_batch_end = lingering
"""


def test_a_run_that_reaches_its_time_limit_resumes(
    node: dict[str, str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is 180 s and SLURM warns after 140 to 170 s; by then the run waits at step 17 for the warning."""
    args = [DIT, *TINY, *CASES["dit"], "data.held_out=360"]  # as in `finished`, to reuse its cached extractor
    args += ["trainer.checkpoint_images=320"]  # no checkpoint but the one saved at the warning
    train(args[0], [*args[1:], f"runs_dir={tmp_path / 'unbroken'}"])
    (tmp_path / "sitecustomize.py").write_text(LINGER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path.cwd()}")
    broken = ["train", *args, f"runs_dir={tmp_path / 'broken'}"]
    launcher = LauncherConfig("slurm", "3", cpus_per_task=1, signal_delay_s=10, folder=str(tmp_path / "jobs"))
    (job,) = submit([broken], launcher)
    facts = ended(job, node, 500)
    log = (tmp_path / "jobs" / f"{job}_0_log.out").read_text()
    assert facts["JobState"] == "COMPLETED" and int(facts["Restarts"]) >= 1, log
    assert "stopped by SIGTERM at 136 images, state saved" in log
    assert "resuming at 136 images" in log
    a, b = only(tmp_path / "unbroken"), only(tmp_path / "broken")
    assert a.name == b.name
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "ImageDataModule"):
        assert_equal(state(a)[part], state(b)[part], part)
    assert_equal(state(a)["callbacks"]["EMA"], state(b)["callbacks"]["EMA"], "EMA")
    assert series(a) == series(b)
    curves, more = scalars(a), scalars(b)  # the job's command scores the run as well
    assert curves == {tag: more[tag] for tag in curves}
