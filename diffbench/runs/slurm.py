"""Submit commands to SLURM through submitit, one as a job, several as an array.

A job runs the same command without the launcher arguments, in the same folder. Before its time limit it receives a
signal, saves its state, is requeued, and resumes.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffbench.core.errors import UserError
from diffbench.runs.launcher import LauncherConfig, submitit

if TYPE_CHECKING:
    from submitit import SlurmExecutor
    from submitit.helpers import DelayedSubmission

    from diffbench.config.trainer import TrainerConfig

LAUNCHED = ("train", "encode", "evaluate")
"""Commands that can be submitted as they are; a study submits its trials."""
FOLDER = "runs/slurm"
COMMANDS = "commands.jsonl"
"""File in the launcher's folder with a line for each job: its id and its command."""


def launch(words: Sequence[str], launcher: LauncherConfig) -> str:
    """Submit one command, given as the arguments after `diffbench`; return a text on where to find the job.

    The config is checked before submission.
    """
    from diffbench.config.layers import COMMAND_LINE
    from diffbench.config.load import load
    from diffbench.runs.folder import folder_for

    verb, name, folder = words[0], words[0], FOLDER
    if any(word.startswith("restart=") for word in words):
        raise UserError(f"{COMMAND_LINE}: restart: a requeued job would start over each time; leave it out")
    if verb not in LAUNCHED:
        raise UserError(f"{COMMAND_LINE}: launcher=slurm belongs to {', '.join(LAUNCHED)} and study, not to {verb}")
    if verb != "evaluate":
        keys = [word for word in words[2:] if word not in ("evaluate=null", "evaluate=false")]  # not config keys
        config = load(words[1], keys)
        name, folder = folder_for(Path(words[1]), keys, config).name, f"{config.runs_dir}/slurm"
        launcher = sized(launcher, config.trainer)
    launcher = replace(launcher, folder=launcher.folder or folder)
    return summary(submit([words], launcher, name), launcher.folder or folder)


def sized(launcher: LauncherConfig, trainer: "TrainerConfig") -> LauncherConfig:
    """Fill in the nodes, tasks and CPUs that a run's processes need; UserError if the launcher asks for others."""
    nodes = launcher.nodes or trainer.num_nodes
    tasks = launcher.ntasks_per_node or (trainer.devices if nodes > 1 else 1)
    if nodes * tasks > 1 and (nodes, tasks) != (trainer.num_nodes, trainer.devices):
        raise UserError(
            f"launcher: launcher.nodes={nodes} x launcher.ntasks_per_node={tasks} differ from"
            f" trainer.num_nodes={trainer.num_nodes} x trainer.devices={trainer.devices}; leave them out, or make them"
            " equal"
        )
    cpus = launcher.cpus_per_task * (trainer.devices if tasks == nodes == 1 else 1)
    return replace(launcher, nodes=nodes, ntasks_per_node=tasks, cpus_per_task=cpus)


def submit(commands: Sequence[Sequence[str]], launcher: LauncherConfig, name: str = "diffbench") -> list[str]:
    """Submit commands: one as a job, several as an array. A job that fails does not stop the others.

    Commands from the same folder that are already queued or running are not submitted again.

    Args:
        commands: the arguments after `diffbench` of each command.
        launcher: the resources of each job.
        name: name of the job in the queue.

    Returns:
        The job id of each command, such as "12" or "12_3".
    """
    executor = _executor(launcher, name)
    folder = Path(executor.folder)
    ids = queued(folder)
    new = [command for command in dict.fromkeys(map(tuple, commands)) if command not in ids]
    if new:
        works = [Command(command, patience=0.75 * launcher.signal_delay_s) for command in new]
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # submitit also prints what it raises
                jobs = executor.submit_array(works)
        except RuntimeError as e:
            last = (str(e).strip() or "sbatch failed").splitlines()[-1]
            raise UserError(f"launcher: {last.removeprefix('sbatch: error: ')}") from None
        ids |= {command: str(job.job_id) for command, job in zip(new, jobs, strict=True)}
        with (folder / COMMANDS).open("a") as file:
            file.writelines(json.dumps({"job": ids[command], "command": command}) + "\n" for command in new)
    return [ids[tuple(command)] for command in commands]


def queued(folder: str | Path) -> dict[tuple[str, ...], str]:
    """Return the job ids, by command, of commands submitted from a launcher's folder that are queued or running."""
    record = Path(folder) / COMMANDS
    if not record.is_file():
        return {}
    squeue = ["squeue", "--me", "--array", "--noheader", "--format=%i"]
    done = subprocess.run(squeue, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"launcher: {(done.stderr.strip() or 'squeue failed').splitlines()[-1]}")
    active, jobs = set(done.stdout.split()), {}
    for number, line in enumerate(record.read_text().splitlines(), 1):
        try:
            job, command = (json.loads(line)[key] for key in ("job", "command"))
        except (ValueError, LookupError, TypeError):
            raise UserError(f"{record}: line {number} is damaged; remove it") from None
        if job in active:
            jobs[tuple(command)] = job
    return jobs


def summary(jobs: Sequence[str], folder: str | Path) -> str:
    """Describe where to look for jobs and their logs, and how to end them; a resumed job appends to the same log."""
    numbers = ",".join(dict.fromkeys(job.split("_")[0] for job in jobs))
    which = f"job {jobs[0]} is" if len(jobs) == 1 else f"{len(jobs)} jobs are"
    logs = [f"{job}_0_log.out" if len(jobs) == 1 else f"{job.split('_')[0]}_*_log.out" for job in jobs]
    lines = [f"{which} in SLURM's queue", *(f"log:  {Path(folder) / log}" for log in dict.fromkeys(logs))]
    lines += [f"look: squeue --jobs {numbers}", f"end:  scancel {numbers.replace(',', ' ')}   (saves the state)"]
    return "\n".join(lines)


class Command:
    """A command as a SLURM task. submitit pickles it, calls it, and calls `checkpoint` before the time limit.

    `patience` is the number of seconds that saving may take.
    """

    def __init__(self, words: Sequence[str], patience: float) -> None:
        self.words, self.patience = tuple(words), patience
        self._pid: int | None = None

    def __call__(self) -> None:
        """Run the command; exit with its exit code if it fails."""
        command = [sys.executable, "-m", "diffbench", *self.words]
        process = subprocess.Popen(command, preexec_fn=_ignore_warning_signal())
        self._pid = process.pid
        # Not process.wait(): it holds a lock that `checkpoint`, called from a signal handler, would need.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        code = process.wait()
        if code:
            raise SystemExit(code if code > 0 else 128 - code)

    def checkpoint(self) -> "DelayedSubmission":
        """Tell the command to save its state; return the same command for submitit to run in the next job.

        A command that takes longer than `patience` loses the work since its last saved state.
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


def _ignore_warning_signal() -> Callable[[], None]:
    """Return a function for a child process that ignores SLURM's warning signal, which every process of a job gets."""
    from submitit import JobEnvironment

    number = getattr(signal, f"SIG{JobEnvironment.USR_SIG}")

    def ignore() -> None:
        signal.signal(number, signal.SIG_IGN)

    return ignore


def _executor(launcher: LauncherConfig, name: str) -> "SlurmExecutor":
    absent = [program for program in ("sbatch", "srun", "squeue") if shutil.which(program) is None]
    if absent:
        raise UserError(f"launcher: slurm needs {', '.join(absent)}, not found here; submit from a cluster node")
    executor = submitit().SlurmExecutor(launcher.folder or FOLDER, max_num_timeout=launcher.max_num_timeout)
    options = {"job_name": name} | launcher.options
    # Since SLURM 22.05 srun does not inherit --cpus-per-task from the job.
    srun_args = [f"--cpus-per-task={launcher.cpus_per_task}", *options.pop("srun_args", [])]
    more = {"requeue": True} | options.pop("additional_parameters", {})
    executor.update_parameters(
        time=launcher.minutes,
        nodes=launcher.nodes or 1,
        ntasks_per_node=launcher.ntasks_per_node or 1,
        cpus_per_task=launcher.cpus_per_task,
        signal_delay_s=launcher.signal_delay_s,
        srun_args=srun_args,
        stderr_to_stdout=True,
        additional_parameters=more,
        **options,
    )
    return executor
