"""The arguments `launcher=slurm` and `launcher.KEY=VALUE` of a command; they are not part of a run's config."""

import importlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from diffbench.core.errors import UserError, check_at_least, suggest


@dataclass
class LauncherConfig:
    """Place where a command runs, and the resources that it requests from SLURM.

    Keys are the parameters of `submitit.SlurmExecutor`, which are sbatch's options: partition, account, mem,
    gpus_per_node, setup, ... Those with a default or a check of our own are fields.
    """

    name: Literal["local", "slurm"] = "local"
    """`launcher=slurm` on the command line; local (the default) runs the command here and now."""
    time: str = "60"
    """Time limit: minutes, HH:MM:SS or D-HH:MM:SS; a run that needs more resumes in the next job."""
    nodes: int | None = None
    """null: trainer.num_nodes."""
    ntasks_per_node: int | None = None
    """null: trainer.devices on each of several nodes; on one node a single task, which starts the ranks itself and gets
    `cpus_per_task` for each."""
    cpus_per_task: int = 2
    signal_delay_s: int = 90
    """Seconds before the time limit at which a run is told to save its state; SLURM may do so a minute earlier."""
    max_num_timeout: int = 100
    """Number of times that a job may reach its limit and resume before it counts as failed."""
    folder: str | None = None
    """Folder for scripts and logs, on a disk shared by the nodes; null: slurm/ in the run's runs_dir."""
    options: dict[str, Any] = field(default_factory=dict)
    """Other parameters of submitit, passed through."""

    def __post_init__(self) -> None:
        check_at_least(self, "launcher", max_num_timeout=0, cpus_per_task=1)
        check_at_least(self, "launcher", nodes=1, ntasks_per_node=1, signal_delay_s=1)
        if self.signal_delay_s >= 60 * self.minutes:
            raise ValueError(
                f"launcher.signal_delay_s: {self.signal_delay_s} seconds must be less than launcher.time={self.time}"
            )

    @property
    def minutes(self) -> int:
        """The time limit in minutes, rounded up."""
        match = re.fullmatch(r"(\d+)|(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", self.time)
        plain, days, hours, minutes, seconds = (int(part or 0) for part in match.groups()) if match else (0,) * 5
        total = plain or (days * 24 + hours) * 60 + minutes + math.ceil(seconds / 60)
        if total < 1:
            raise ValueError(
                f"launcher.time: {self.time!r} is not a time limit; write minutes such as 90, HH:MM:SS or D-HH:MM:SS,"
                " at least one minute"
            )
        return total


def split(words: Sequence[str]) -> tuple[LauncherConfig, list[str]]:
    """Split the arguments of a command into the launcher's settings and the other arguments, in order."""
    own = [word for word in words if re.match(r"launcher(\.\w+)*=", word)]
    others = [word for word in words if word not in own]
    if not own:
        return LauncherConfig(), others
    from diffbench.config.layers import COMMAND_LINE, located, parse_overrides
    from diffbench.config.load import build

    given = parse_overrides([re.sub(r"^launcher=", "launcher.name=", word) for word in own])["launcher"]
    ours = [f.name for f in fields(LauncherConfig) if f.name != "options"]
    options = {key: value for key, value in given.items() if key not in ours}
    with located([(COMMAND_LINE, {"launcher": given})]):
        checked = {key: value for key, value in given.items() if key in ours}
        launcher: LauncherConfig = build(LauncherConfig, checked, "launcher.")
        if launcher.name == "local" and (idle := [key for key in given if key != "name"]):
            raise ValueError(f"launcher.{idle[0]}: belongs to launcher=slurm, not local")
        launcher.options = _checked(options, ours)
    return launcher, others


def _checked(options: dict[str, Any], ours: Sequence[str]) -> dict[str, Any]:
    """Return the parameters of submitit that are not null; ValueError for an unknown one or a wrong type."""
    if not options:
        return {}
    from diffbench.config.documents import untyped

    known = [*ours, *sorted(submitit().SlurmExecutor._valid_parameters() - {*ours, "stderr_to_stdout", "num_gpus"})]
    kinds: dict[str, tuple[type, str]] = {
        **dict.fromkeys(("setup", "teardown", "srun_args"), (list, "a list, such as ['module load cuda']")),
        "additional_parameters": (dict, "keys with values, such as {nice: 10}"),
        "array_parallelism": (int, "a whole number"),
    }
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"launcher.{key}: unknown key; allowed: {', '.join(known)}{suggest(key, known)}")
        kind, wanted = kinds.get(key, (object, "one value"))
        if not isinstance(value, kind) or (kind is object and isinstance(value, list | dict)):
            raise ValueError(f"launcher.{key}: must be {wanted}, got {value!r}")
    return {key: untyped(value) for key, value in options.items() if value is not None}


def submitit() -> Any:
    """Import submitit; UserError if it is not installed."""
    try:
        return importlib.import_module("submitit")
    except ImportError:
        raise UserError("launcher: slurm needs submitit; pip install 'diffbench[slurm]'") from None
