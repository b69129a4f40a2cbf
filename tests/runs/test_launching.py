"""The launcher's arguments, its refusals, and the script passed to sbatch; no cluster needed."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffbench.cli import main
from diffbench.config.load import load
from diffbench.core.errors import UserError
from diffbench.runs import slurm
from diffbench.runs.folder import folder_for
from diffbench.runs.launcher import LauncherConfig, split
from diffbench.runs.slurm import Command, queued, sized, submit, summary

DIT = "experiments/digits/dit.yaml"
SLURM = ["launcher=slurm", "launcher.time=30", "launcher.partition=debug"]
FAKE = {
    "sbatch": 'n=$(($(cat {0}/count) + 1)); echo $n > {0}/count; echo "Submitted batch job $n"',
    "srun": "exit 9",
    "squeue": "cat {0}/queue",
}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs that answer like SLURM's: job numbers from 8, and an empty queue."""
    pytest.importorskip("submitit")
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "count").write_text("7")
    (folder / "queue").write_text("")
    for name, line in FAKE.items():
        program = folder / name
        program.write_text(f"#!/bin/sh\n{line.format(shlex.quote(str(folder)))}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_launcher_arguments_are_split_off() -> None:
    args = [
        "train",
        DIT,
        "launcher.time=1:30:00",
        "seed=3",
        "launcher=slurm",
        "launcher.gpus_per_node=2",
        "tag=launcher=x",
    ]
    launcher, others = split([*args, "launcher.setup=[module load cuda, 'a; b']", "launcher.mem=16G"])
    assert others == ["train", DIT, "seed=3", "tag=launcher=x"]
    assert launcher == LauncherConfig(
        name="slurm",
        time="1:30:00",
        options={"gpus_per_node": 2, "mem": "16G", "setup": ["module load cuda", "a; b"]},
    )
    assert launcher.minutes == 90
    assert split(["list"]) == (LauncherConfig(), ["list"])
    assert split(["train", DIT, "launcher=local"]) == (LauncherConfig(), ["train", DIT])


@pytest.mark.parametrize(
    ("text", "minutes"), [("1", 1), ("90", 90), ("0:00:01", 1), ("30:00:30", 1801), ("2-01:00:00", 2940)]
)
def test_time_limits_are_converted_to_minutes(text: str, minutes: int) -> None:
    assert split(["launcher=slurm", f"launcher.time={text}", "launcher.signal_delay_s=5"])[0].minutes == minutes


REFUSED = {
    "launcher=slrum": "launcher.name: unknown value 'slrum'; choose from local, slurm; did you mean 'slurm'?",
    "launcher.partition=debug": "launcher.partition: belongs to launcher=slurm, not local",
    "launcher=local launcher.gpus_per_node=1": "launcher.gpus_per_node: belongs to launcher=slurm, not local",
    "launcher=slurm launcher.time=1:30": (
        "launcher.time: '1:30' is not a time limit; write minutes such as 90, HH:MM:SS or D-HH:MM:SS, at least one"
        " minute"
    ),
    "launcher=slurm launcher.time=0": (
        "launcher.time: '0' is not a time limit; write minutes such as 90, HH:MM:SS or D-HH:MM:SS, at least one minute"
    ),
    "launcher=slurm launcher.time=1": "launcher.signal_delay_s: 90 seconds must be less than launcher.time=1",
    "launcher=slurm launcher.max_num_timeout=-1": "launcher.max_num_timeout: must be at least 0, got -1",
    "launcher=slurm launcher.nodes=0": "launcher.nodes: must be at least 1, got 0",
    "launcher=slurm launcher.cpus_per_task=two": "launcher.cpus_per_task: must be a whole number, got 'two'",
    "launcher=slurm launcher.setup='module load cuda'": (
        "launcher.setup: must be a list, such as ['module load cuda'], got 'module load cuda'"
    ),
    "launcher=slurm launcher.additional_parameters=nice": (
        "launcher.additional_parameters: must be keys with values, such as {nice: 10}, got 'nice'"
    ),
    "launcher=slurm launcher.partition=[a,b]": "launcher.partition: must be one value, got ['a', 'b']",
    "launcher=slurm launcher.array_parallelism=few": "launcher.array_parallelism: must be a whole number, got 'few'",
}


@pytest.mark.parametrize("args", REFUSED)
def test_wrong_launcher_arguments_are_refused(args: str) -> None:
    with pytest.raises(UserError) as caught:
        split(["train", DIT, *(arg.strip("'") for arg in shlex.split(args))])
    assert str(caught.value) == f"command line: {REFUSED[args]}"


@pytest.mark.parametrize(
    ("arg", "near"),
    [("partitoin=x", "partition"), ("gpus_per_nodes=1", "gpus_per_node"), ("cpu_per_task=2", "cpus_per_task")],
)
def test_an_unknown_parameter_names_those_of_submitit(arg: str, near: str) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(UserError) as caught:
        split(["train", DIT, "launcher=slurm", f"launcher.{arg}"])
    key = arg.split("=")[0]
    text = str(caught.value)
    assert text.startswith(f"command line: launcher.{key}: unknown key; allowed: name, time, nodes, ntasks_per_node,")
    assert text.endswith(f"; did you mean {near!r}?") and ", partition," in text and "num_gpus" not in text


def test_text_is_taken_as_typed(cluster: Path, tmp_path: Path) -> None:
    args = ["launcher.account=007", "launcher.comment=2024_11_28", "launcher.constraint=a&b", "launcher.qos=1e3"]
    launcher = split([*SLURM, *args, "launcher.exclusive=true", f"launcher.folder={tmp_path}/0010"])[0]
    submit([["list"]], launcher)
    script = (tmp_path / "0010" / "8_submission.sh").read_text()
    for line in ("account=007", "comment=2024_11_28", "constraint='a&b'", "qos=1e3", "exclusive"):
        assert f"#SBATCH --{line}\n" in script
    with pytest.raises(UserError, match=r"launcher\.time: '1_0' is not a time limit"):
        split(["launcher=slurm", "launcher.time=1_0"])


def test_additional_parameters_of_sbatch_and_srun_are_passed_on(cluster: Path, tmp_path: Path) -> None:
    args = ["launcher.additional_parameters={nice: 10}", "launcher.srun_args=[--cpu-bind=none]"]
    submit([["list"]], split([*SLURM, *args, f"launcher.folder={tmp_path}"])[0])
    script = (tmp_path / "8_submission.sh").read_text()
    assert "#SBATCH --nice=10\n" in script and "#SBATCH --requeue\n" in script
    assert " --cpus-per-task=2 --cpu-bind=none " in script


def test_the_script_requests_all_resources(cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = [
        "launcher.gpus_per_node=4",
        "launcher.cpus_per_task=6",
        "launcher.mem=64G",
        "launcher.setup=[module load cuda]",
    ]
    others = ["launcher.account=lab", "launcher.qos=high", "launcher.signal_delay_s=120"]
    processes = ["trainer.num_nodes=2", "trainer.devices=4"]
    args = ["train", DIT, "seed=5", f"runs_dir={tmp_path / 'runs'}", *processes]
    assert main([*args, *SLURM, *more, *others, "launcher.constraint=h200"]) == 0
    folder = tmp_path / "runs" / "slurm"
    assert capsys.readouterr().out == summary(["8"], folder) + "\n"
    script = (folder / "8_submission.sh").read_text().splitlines()
    wanted = {
        "account=lab",
        "constraint=h200",
        "cpus-per-task=6",
        "gpus-per-node=4",
        "job-name=dit-s5",
        "mem=64G",
        "nodes=2",
        "ntasks-per-node=4",
        "open-mode=append",
        f"output={folder}/%j_0_log.out",
        "partition=debug",
        "qos=high",
        "requeue",
        "signal=USR2@120",
        "time=30",
    }
    requested = {line.removeprefix("#SBATCH --") for line in script if line.startswith("#SBATCH")}
    assert requested - {"wckey=submitit"} == wanted
    assert script.index("module load cuda") < next(i for i, line in enumerate(script) if line.startswith("srun "))
    (line,) = [line for line in script if line.startswith("srun ")]
    assert "--cpus-per-task=6" in line and sys.executable in line and "submitit.core._submit" in line
    assert list((tmp_path / "runs").iterdir()) == [folder]  # the job itself makes the run's folder


@pytest.mark.parametrize(
    ("args", "run", "sizes"),
    [
        ([], [], (1, 1, 2)),
        (["launcher.cpus_per_task=3"], ["trainer.devices=4"], (1, 1, 12)),  # one task, which starts its ranks itself
        (["launcher.ntasks_per_node=4"], ["trainer.devices=4"], (1, 4, 2)),
        (["launcher.nodes=2"], ["trainer.devices=4", "trainer.num_nodes=2"], (2, 4, 2)),
    ],
)
def test_a_job_is_as_large_as_the_run(args: list[str], run: list[str], sizes: tuple[int, int, int]) -> None:
    found = sized(split([*SLURM, *args])[0], load(DIT, run).trainer)
    assert (found.nodes, found.ntasks_per_node, found.cpus_per_task) == sizes


def test_a_job_of_another_size_than_the_run_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        sized(split([*SLURM, "launcher.nodes=2"])[0], load(DIT, ["trainer.devices=4"]).trainer)
    assert str(caught.value) == (
        "launcher: launcher.nodes=2 x launcher.ntasks_per_node=4 differ from trainer.num_nodes=1 x"
        " trainer.devices=4; leave them out, or make them equal"
    )


def test_launcher_arguments_do_not_change_the_run(cluster: Path, tmp_path: Path) -> None:
    args = ["train", DIT, "denoiser.depth=2", f"runs_dir={tmp_path}"]
    assert main([args[0], args[1], *SLURM, *args[2:]]) == 0
    (cluster / "queue").write_text("8\n")
    assert queued(tmp_path / "slurm") == {tuple(args): "8"}
    overrides = split([*args, *SLURM])[1][2:]
    config = load(DIT, overrides)
    assert folder_for(Path(DIT), overrides, config) == folder_for(Path(DIT), args[2:], load(DIT, args[2:]))


def test_a_run_without_evaluation_is_submitted(cluster: Path, tmp_path: Path) -> None:
    args = ["train", DIT, "evaluate=null", f"runs_dir={tmp_path}"]
    assert main([*args, *SLURM]) == 0
    (cluster / "queue").write_text("8\n")
    assert queued(tmp_path / "slurm") == {tuple(args): "8"}


def test_an_array_submits_only_what_is_not_queued(cluster: Path, tmp_path: Path) -> None:
    launcher = LauncherConfig(name="slurm", time="30", folder=str(tmp_path / "jobs"), options={"array_parallelism": 2})
    commands = [["train", DIT, f"seed={i}"] for i in range(4)]
    assert queued(tmp_path / "jobs") == {}
    assert submit(commands[:3], launcher, "study") == ["8_0", "8_1", "8_2"]
    script = (tmp_path / "jobs" / "8_submission.sh").read_text()
    assert "#SBATCH --array=0-2%2\n" in script and "#SBATCH --job-name=study\n" in script
    (cluster / "queue").write_text("8_0\n8_2\n11\n")
    assert queued(tmp_path / "jobs") == {tuple(commands[0]): "8_0", tuple(commands[2]): "8_2"}
    assert submit(commands, launcher, "study") == ["8_0", "9_0", "8_2", "9_1"]
    (cluster / "queue").write_text("8_0\n8_2\n9_0\n9_1\n")
    assert submit([*commands, commands[0]], launcher) == ["8_0", "9_0", "8_2", "9_1", "8_0"]
    assert (cluster / "count").read_text() == "9\n"  # nothing was left to submit


def test_a_damaged_line_of_the_job_record_is_named(cluster: Path, tmp_path: Path) -> None:
    submit([["list"]], LauncherConfig(name="slurm", folder=str(tmp_path)))
    with (tmp_path / "commands.jsonl").open("a") as file:
        file.write('{"job": "9", "comm')
    with pytest.raises(UserError) as caught:
        queued(tmp_path)
    assert str(caught.value) == f"{tmp_path}/commands.jsonl: line 2 is damaged; remove it"


def test_the_summary_shows_how_to_watch_and_cancel_jobs() -> None:
    assert summary(["12"], "runs/slurm").splitlines() == [
        "job 12 is in SLURM's queue",
        "log:  runs/slurm/12_0_log.out",
        "look: squeue --jobs 12",
        "end:  scancel 12   (saves the state)",
    ]
    assert summary(["12_0", "12_1", "13_0"], "jobs").splitlines() == [
        "3 jobs are in SLURM's queue",
        "log:  jobs/12_*_log.out",
        "log:  jobs/13_*_log.out",
        "look: squeue --jobs 12,13",
        "end:  scancel 12 13   (saves the state)",
    ]


def test_errors_before_submission_are_one_line(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["train", DIT, f"runs_dir={tmp_path / 'runs'}", *SLURM]

    def refused(*more: str) -> str:
        assert main([*args, *more]) == 2
        return capsys.readouterr().err

    assert refused("denoiser.depht=2").startswith("error: command line: denoiser.depht: unknown key")
    assert not (tmp_path / "runs").exists()
    (cluster / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: debug' >&2\nexit 1\n")
    assert refused() == "error: launcher: invalid partition specified: debug\n"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "submitit", None)
        assert refused() == "error: launcher: slurm needs submitit; pip install 'diffbench[slurm]'\n"
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = "sbatch, srun, squeue, not found here; submit from a cluster node"
    assert refused() == f"error: launcher: slurm needs {missing}\n"
    assert main(["compare", "runs/x", *SLURM]) == 2
    verbs = "launcher=slurm belongs to train, encode, evaluate and study, not to compare"
    assert capsys.readouterr().err == f"error: command line: {verbs}\n"


def test_an_error_of_squeue_is_reported(cluster: Path, tmp_path: Path) -> None:
    launcher = LauncherConfig(name="slurm", folder=str(tmp_path))
    submit([["list"]], launcher)
    (cluster / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: no controller' >&2\nexit 1\n")
    with pytest.raises(UserError) as caught:
        submit([["list"]], launcher)
    assert str(caught.value) == "launcher: slurm_load_jobs error: no controller"


def test_a_task_exits_like_its_command(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("submitit")
    Command(["--version"], patience=1)()
    assert capfd.readouterr().out.startswith("diffbench ")
    with pytest.raises(SystemExit) as caught:
        Command(["trian"], patience=1)()
    assert caught.value.code == 2


CHILD = """
import signal, sys, time
def save(*_):
    print("saved", flush=True)
    if "stubborn" not in sys.argv:
        sys.exit(143)
signal.signal(signal.SIGTERM, save)
print(signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN, flush=True)
while True:
    time.sleep(1)
"""


@pytest.mark.parametrize(("how", "patience", "code"), [("docile", 30, 143), ("stubborn", 3, None)])
def test_checkpoint_makes_the_command_save_and_returns_it(
    how: str, patience: float, code: int | None, tmp_path: Path
) -> None:
    pytest.importorskip("submitit")
    command = Command(["train", DIT], patience)
    out = tmp_path / "out"
    with out.open("w") as file:
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, how], stdout=file, preexec_fn=slurm._ignore_warning_signal()
        )
    while not out.read_text():
        time.sleep(0.01)
    command._pid = child.pid
    again = command.checkpoint()
    assert child.poll() == code
    child.kill()
    child.wait()
    assert out.read_text() == "True\nsaved\n"
    assert (again.function.words, again.function.patience) == (("train", DIT), patience)
    assert again.function is not command and again.args == ()


STUDY = """
kind: study
experiment: experiments/digits/dit.yaml
set: {debug: smoke, denoiser: {hidden_size: 32}}
axes: {denoiser.depth: [1, 2]}
seeds: [0, 1]
stop: {images: 16}
"""


def test_a_study_submits_its_trials(cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "depth.yaml"
    path.write_text(STUDY)
    args = ["study", str(path), f"runs_dir={tmp_path / 'runs'}"]
    folder = tmp_path / "runs" / "studies" / "depth"
    assert main([*args, *SLURM, "launcher.array_parallelism=3", "--dry-run"]) == 0
    assert not (folder / "slurm").exists()
    (cluster / "queue").write_text("8_0\n8_1\n8_2\n8_3\n")
    for _ in range(2):  # the second time they are in the queue already
        assert main([*args, *SLURM, "launcher.array_parallelism=3"]) == 0
        assert summary([f"8_{i}" for i in range(4)], folder / "slurm") in capsys.readouterr().out
    script = (folder / "slurm" / "8_submission.sh").read_text()
    assert "#SBATCH --array=0-3%3\n" in script and "#SBATCH --job-name=depth\n" in script
    submitted = queued(folder / "slurm")
    assert sorted(submitted.values()) == ["8_0", "8_1", "8_2", "8_3"]
    assert {Path(args[1]) for args in submitted} == set((folder / "trials").glob("*.yaml"))
    assert {args[0] for args in submitted} == {"study"}
    assert not (tmp_path / "runs" / "digits").exists()
    assert main([*args, *SLURM, "stop.seconds=5"]) == 2
    err = capsys.readouterr().err
    assert err == f"error: {path}: stop.seconds: is measured on this machine, not SLURM's; choose images or flops\n"


def test_trials_request_what_their_processes_need(
    cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = tmp_path / "devices.yaml", tmp_path / "runs" / "studies" / "devices"
    path.write_text(STUDY.replace("denoiser.depth: [1, 2]", "trainer.devices: [1, 4]"))
    args = ["study", str(path), f"runs_dir={tmp_path / 'runs'}", *SLURM, "launcher.cpus_per_task=3"]
    (cluster / "queue").write_text("8_0\n8_1\n9_0\n9_1\n")
    assert main(args) == 0
    assert summary(["8_0", "8_1", "9_0", "9_1"], folder / "slurm") in capsys.readouterr().out
    for job, devices in ((8, 1), (9, 4)):
        script = (folder / "slurm" / f"{job}_submission.sh").read_text()
        assert f"#SBATCH --cpus-per-task={3 * devices}\n" in script and "#SBATCH --nodes=1\n" in script
        assert "#SBATCH --ntasks-per-node=1\n" in script and "#SBATCH --array=0-1%" in script
        records = [json.loads(line) for line in (folder / "slurm" / "commands.jsonl").read_text().splitlines()]
        mine = [Path(line["command"][1]).read_text() for line in records if line["job"].startswith(f"{job}_")]
        assert len(mine) == 2 and all(f"devices: {devices}\n" in text for text in mine)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["set.trainer.num_nodes=2"], "trainer.num_nodes: 2 is too many, a trial trains on one machine; allowed: 1"),
        (
            ["launcher.nodes=2"],
            "launcher.nodes: a trial is one process, which starts those of trainer.devices; allowed: 1",
        ),
        (
            ["launcher.ntasks_per_node=4"],
            "launcher.ntasks_per_node: a trial is one process, which starts those of trainer.devices; allowed: 1",
        ),
    ],
)
def test_trials_on_several_machines_are_refused(
    args: list[str], message: str, cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "depth.yaml"
    path.write_text(STUDY)
    assert main(["study", str(path), f"runs_dir={tmp_path / 'runs'}", *SLURM, *args]) == 2
    assert capsys.readouterr().err.strip().removeprefix("error: ").removeprefix(f"{path}: ") == message


def test_booleans_of_submitit_are_read_in_any_spelling() -> None:
    args = ["launcher=slurm", "launcher.time=30", "launcher.use_srun=False", "launcher.exclusive=TRUE"]
    options = split([*args, "launcher.comment=no", "launcher.account=007"])[0].options
    assert (options["use_srun"], options["exclusive"], options["comment"]) == (False, True, "no")
    assert str(options["account"]) == "007"
