"""Commands that run elsewhere: `launcher=slurm` hands a command, or an array of them, to SLURM through submitit.

The words `launcher=...` and `launcher.KEY=...` are no part of a run: the job runs the same command without them, in the
same folder. Before its time limit a job is told to save its state, goes back into the queue, and resumes from there.
"""

import contextlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffbench.core.errors import UserError

if TYPE_CHECKING:
    import submitit

    from diffbench.config.sections import TrainerConfig

LAUNCHED = ("train", "encode", "evaluate")
"""Commands that can be handed over as they are; a study hands over its cells."""
FOLDER = "runs/slurm"
COMMANDS = "commands.jsonl"
"""In the launcher's folder: one line per job, with its id and its command."""


@dataclass
class LauncherConfig:
    """Where a command runs, and what it asks of SLURM there."""

    name: Literal["local", "slurm"] = "local"
    """`launcher=slurm` on the command line. local: here and now, as without it."""
    partition: str | None = None
    """null: the cluster's own choice; so for account, qos, constraint and memory."""
    time: str = "60"
    """Limit of one sitting: minutes, HH:MM:SS or D-HH:MM:SS; a run that needs more goes on in the next sitting."""
    gpus: int = 0
    """Per node."""
    cpus: int = 2
    """Per process."""
    memory: str | None = None
    """Per node, as 16G."""
    nodes: int | None = None
    """null: as many as trainer.num_nodes."""
    tasks: int | None = None
    """Processes per node; null: trainer.devices on each of several nodes; on one node a single one, which starts the
    others itself and has `cpus` for each."""
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    setup: list[str] = field(default_factory=list)
    """Lines of shell ahead of the command, as [module load cuda]."""
    lead: int = 90
    """How many seconds before the limit, at least, a run is told to save its state; SLURM may be a minute early."""
    requeues: int = 100
    """How many sittings may end at the limit before the job counts as failed."""
    parallel: int = 256
    """How many jobs of an array run at once."""
    folder: str | None = None
    """Where scripts and logs go, on a disk that the nodes share; null: slurm/ in the run's runs_dir."""

    def __post_init__(self) -> None:
        least = {"gpus": 0, "requeues": 0, "cpus": 1, "nodes": 1, "tasks": 1, "lead": 1, "parallel": 1}
        for key, low in least.items():
            value = getattr(self, key)
            if value is not None and value < low:
                raise ValueError(f"launcher.{key}: must be at least {low}, got {value}")
        for key in ("partition", "account", "qos", "constraint"):
            value = getattr(self, key)
            if value is not None and not re.fullmatch(r"[^\s-]\S*", value):
                raise ValueError(f"launcher.{key}: {value!r} is no name; allowed: one word")
        if self.memory is not None and not re.fullmatch(r"[1-9]\d*[KMGT]", self.memory):
            raise ValueError(f"launcher.memory: {self.memory!r} is no size; write a number and a unit, as 16G or 800M")
        if self.lead >= 60 * self.minutes:
            raise ValueError(f"launcher.lead: {self.lead} seconds must be less than launcher.time={self.time}")

    @property
    def minutes(self) -> int:
        """The limit in minutes, rounded up."""
        found = re.fullmatch(r"(\d+)|(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", self.time)
        plain, *parts = (int(part or 0) for part in found.groups()) if found else (0, 0, 0, 0, 0)
        days, hours, minutes, seconds = parts
        total = plain or (days * 24 + hours) * 60 + minutes + math.ceil(seconds / 60)
        if total < 1:
            raise ValueError(
                f"launcher.time: {self.time!r} is no limit; write minutes as 90, or HH:MM:SS, or D-HH:MM:SS, a minute"
                " or more"
            )
        return total


def split(words: Sequence[str]) -> tuple[LauncherConfig, list[str]]:
    """Takes the launcher's words out of a command's.

    Returns:
        What they ask for, and the other words in their order.

    Raises:
        UserError: for a word that asks for what is not there.
    """
    own = [word for word in words if re.match(r"launcher(\.\w+)*=", word)]
    others = [word for word in words if word not in own]
    if not own:
        return LauncherConfig(), others
    from diffbench.config.layers import COMMAND_LINE, located, parse_overrides
    from diffbench.config.load import build

    given = parse_overrides([re.sub(r"^launcher=", "launcher.name=", word) for word in own])["launcher"]
    if times := [word.removeprefix("launcher.time=") for word in own if word.startswith("launcher.time=")]:
        given["time"] = times[-1]  # as written: YAML reads 1:30 as 90
    with located([(COMMAND_LINE, {"launcher": given})]):
        launcher: LauncherConfig = build(LauncherConfig, given, "launcher.")
        idle = [key for key in given if key != "name"] if launcher.name == "local" else []
        if idle:
            raise ValueError(f"launcher.{idle[0]}: belongs to launcher=slurm, not {launcher.name}")
    return launcher, others


def launch(words: Sequence[str], launcher: LauncherConfig) -> str:
    """Hands one command to SLURM; returns where it is to be seen.

    Args:
        words: what follows `diffbench`, without the launcher's words.
        launcher: what it gets.

    Raises:
        UserError: for what `submit` refuses, and for what is wrong with the config, which the queue need not find out.
    """
    from diffbench.config.layers import COMMAND_LINE
    from diffbench.config.load import load
    from diffbench.runs.folder import folder_for

    verb, name, folder = words[0], words[0], FOLDER
    if any(word.startswith("restart=") for word in words):
        raise UserError(f"{COMMAND_LINE}: restart: a job that SLURM requeues would begin anew each time; leave it out")
    if verb not in LAUNCHED:
        raise UserError(f"{COMMAND_LINE}: launcher=slurm belongs to {', '.join(LAUNCHED)} and study, not to {verb}")
    if verb != "evaluate":
        config = load(words[1], words[2:])
        name, folder = folder_for(Path(words[1]), words[2:], config).name, f"{config.runs_dir}/slurm"
        launcher = sized(launcher, config.trainer)
    launcher = replace(launcher, folder=launcher.folder or folder)
    return told(submit([words], launcher, name), launcher.folder or folder)


def sized(launcher: LauncherConfig, trainer: "TrainerConfig") -> LauncherConfig:
    """With the nodes, tasks and cpus that a run's processes need, where the launcher's words leave them open.

    Raises:
        UserError: where they ask for other numbers than the run.
    """
    nodes = launcher.nodes or trainer.num_nodes
    tasks = launcher.tasks or (trainer.devices if nodes > 1 else 1)
    if nodes * tasks > 1 and (nodes, tasks) != (trainer.num_nodes, trainer.devices):
        raise UserError(
            f"launcher: launcher.nodes={nodes} x launcher.tasks={tasks} are not the processes of trainer.num_nodes="
            f"{trainer.num_nodes} x trainer.devices={trainer.devices}; leave them out, or make them equal"
        )
    alone = tasks == 1 and nodes == 1
    return replace(launcher, nodes=nodes, tasks=tasks, cpus=launcher.cpus * (trainer.devices if alone else 1))


def submit(commands: Sequence[Sequence[str]], launcher: LauncherConfig, name: str = "diffbench") -> list[str]:
    """Hands commands to SLURM: one as a job, several as an array. A job that fails stops no other.

    Commands that wait or run there already, from the same folder, are not handed over again.

    Args:
        commands: each the words after `diffbench`.
        launcher: what each of them gets.
        name: of the job in the queue.

    Returns:
        The job id of each command, as "12" or "12_3".

    Raises:
        UserError: if there is no SLURM, no submitit, or sbatch refuses.
    """
    executor = _executor(launcher, name)
    folder = Path(executor.folder)
    ids = queued(folder)
    new = [command for command in dict.fromkeys(map(tuple, commands)) if command not in ids]
    if new:
        told = io.StringIO()
        try:
            with contextlib.redirect_stderr(told):  # submitit prints what it raises
                jobs = executor.submit_array([Command(command, patience=0.75 * launcher.lead) for command in new])
        except RuntimeError as e:
            last = (str(e).strip() or "sbatch failed").splitlines()[-1]
            raise UserError(f"launcher: {last.removeprefix('sbatch: error: ')}") from None
        ids |= {command: str(job.job_id) for command, job in zip(new, jobs, strict=True)}
        with (folder / COMMANDS).open("a") as file:
            file.writelines(json.dumps({"job": ids[command], "command": command}) + "\n" for command in new)
    return [ids[tuple(command)] for command in commands]


def queued(folder: str | Path) -> dict[tuple[str, ...], str]:
    """The commands handed over from a launcher's folder that wait or run now, and their job ids.

    Raises:
        UserError: if SLURM does not answer.
    """
    record = Path(folder) / COMMANDS
    if not record.is_file():
        return {}
    asked = ["squeue", "--me", "--array", "--noheader", "--format=%i"]
    done = subprocess.run(asked, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"launcher: {(done.stderr.strip() or 'squeue failed').splitlines()[-1]}")
    there = set(done.stdout.split())
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    return {tuple(line["command"]): line["job"] for line in lines if line["job"] in there}


def told(jobs: Sequence[str], folder: str | Path) -> str:
    """Where jobs are to be seen and to be ended, and their logs: all sittings of a job in one file."""
    numbers = ",".join(dict.fromkeys(job.split("_")[0] for job in jobs))
    which = f"job {jobs[0]} is" if len(jobs) == 1 else f"{len(jobs)} jobs are"
    logs = [f"{job}_0_log.out" if len(jobs) == 1 else f"{job.split('_')[0]}_*_log.out" for job in jobs]
    lines = [f"{which} in SLURM's queue", *(f"log:  {Path(folder) / log}" for log in dict.fromkeys(logs))]
    lines += [f"look: squeue --jobs {numbers}", f"end:  scancel {numbers.replace(',', ' ')}   (saves the state)"]
    return "\n".join(lines)


class Command:
    """A command as a SLURM task: submitit pickles it, calls it, and asks it for a checkpoint before the time limit.

    Args:
        words: what follows `diffbench`.
        patience: seconds that a checkpoint may take.
    """

    def __init__(self, words: Sequence[str], patience: float) -> None:
        self.words, self.patience = tuple(words), patience
        self._pid: int | None = None

    def __call__(self) -> None:
        """Runs the command; a failure is this process's, with the same exit code."""
        process = subprocess.Popen([sys.executable, "-m", "diffbench", *self.words], preexec_fn=_deaf())
        self._pid = process.pid
        # Not process.wait(): its lock would be held when a signal's handler comes to wait as well.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        code = process.wait()
        if code:
            raise SystemExit(code if code > 0 else 128 - code)

    def checkpoint(self) -> "submitit.helpers.DelayedSubmission":
        """Has the command save its state, and returns what submitit runs in the next sitting: the same command.

        A command that takes too long over it loses what came after its last state on disk.
        """
        from submitit.helpers import DelayedSubmission

        end = time.monotonic() + self.patience
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(self._pid, signal.SIGTERM)
                while not os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
                    if time.monotonic() > end:
                        break
                    time.sleep(0.1)
        return DelayedSubmission(Command(self.words, self.patience))


def _deaf() -> Callable[[], None]:
    """Makes a child ignore the signal of a limit that comes near: SLURM sends it to every process of a job."""
    from submitit import JobEnvironment

    number = getattr(signal, f"SIG{JobEnvironment.USR_SIG}")

    def ignore() -> None:
        signal.signal(number, signal.SIG_IGN)

    return ignore


def _executor(launcher: LauncherConfig, name: str) -> "submitit.SlurmExecutor":
    absent = [program for program in ("sbatch", "srun", "squeue") if shutil.which(program) is None]
    if absent:
        raise UserError(f"launcher: slurm needs {', '.join(absent)}, not found here; submit from a node of the cluster")
    try:
        import submitit
    except ImportError:
        raise UserError("launcher: slurm needs submitit; pip install 'diffbench[slurm]'") from None
    executor = submitit.SlurmExecutor(launcher.folder or FOLDER, max_num_timeout=launcher.requeues)
    asked: dict[str, Any] = {key: getattr(launcher, key) for key in ("partition", "account", "qos", "constraint")}
    asked |= {"mem": launcher.memory, "gpus_per_node": launcher.gpus or None, "setup": launcher.setup or None}
    executor.update_parameters(
        job_name=name,
        time=launcher.minutes,
        nodes=launcher.nodes or 1,
        ntasks_per_node=launcher.tasks or 1,
        cpus_per_task=launcher.cpus,
        srun_args=[f"--cpus-per-task={launcher.cpus}"],  # since SLURM 22.05 a step does not take it from its job
        array_parallelism=launcher.parallel,
        signal_delay_s=launcher.lead,
        stderr_to_stdout=True,
        additional_parameters={"requeue": True},
        **{key: value for key, value in asked.items() if value is not None},
    )
    return executor
