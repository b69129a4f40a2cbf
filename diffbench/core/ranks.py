"""Which of a job's processes this one is, told by the environment that torchrun, srun or our own launcher made."""

import os


def place() -> tuple[int, int]:
    """(rank, number of ranks) in the whole job; (0, 1) for a process that was started alone."""
    here = os.environ
    if "TORCHELASTIC_RUN_ID" in here:  # torchrun, also inside a SLURM job; our launcher speaks the same language
        return int(here["RANK"]), int(here["WORLD_SIZE"])
    if by_srun():
        return int(here["SLURM_PROCID"]), int(here["SLURM_STEP_NUM_TASKS"])
    return 0, 1


def local() -> int:
    """Which of the ranks on this machine this is."""
    return int(os.environ["SLURM_LOCALID" if by_srun() else "LOCAL_RANK"]) if place()[1] > 1 else 0


def by_srun() -> bool:
    """Whether srun started several tasks. (A batch script and an interactive shell are no such step.)"""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "TORCHELASTIC_RUN_ID" not in os.environ


def leads() -> bool:
    """Whether this process does what a job does once: hold the folder, check it, and say what happens."""
    return place()[0] == 0
