"""Which sampler suits which process."""

from collections.abc import Callable

from torch import Tensor

from diffbench.diffusion.adaptive import dopri5
from diffbench.diffusion.ode import dpm_solver, euler, euler_maruyama, heun
from diffbench.diffusion.samplers import ddim, ddpm

ON_TABLES: dict[str, Callable[..., Tensor]] = {"ddpm": ddpm, "ddim": ddim}
"""Samplers that walk the respaced tables of a discrete process."""

ON_GRID: dict[str, Callable[..., Tensor]] = {
    "euler": euler,
    "heun": heun,
    "dpm_solver": dpm_solver,
    "euler_maruyama": euler_maruyama,
}
"""Samplers that walk a grid of points; `euler_maruyama` walks `sde_grid`."""

ON_PATH: dict[str, Callable[..., Tensor]] = {"dopri5": dopri5}
"""Samplers that choose their own points of a continuous path, and so take no number of steps."""

PAIRS = {
    "vp": ("ddpm", "ddim", "euler", "heun", "dpm_solver"),
    "edm": ("heun", "euler", "dpm_solver"),
    "flow": ("euler", "heun", "dopri5", "euler_maruyama"),
}
"""Process -> the samplers that make sense for it, the usual one first."""

_REASONS = {
    "ddpm": "it walks back the discrete steps of vp",
    "ddim": "it walks back the discrete steps of vp, as euler does in continuous time",
    "dpm_solver": "its steps in log-SNR are infinite at the ends of a flow",
    "dopri5": "it needs the rate at the path's very end, which a flow alone has",
    "euler_maruyama": "it solves the SDE of a flow",
}


def check_pair(process: str, sampler: str) -> None:
    """Whether a sampler suits a process.

    Raises:
        ValueError: if it does not, saying why and what does; or if there is no such process or sampler.
    """
    if process not in PAIRS:
        raise ValueError(f"no process {process!r}; choose from {', '.join(PAIRS)}")
    if sampler in PAIRS[process]:
        return
    known = {*ON_TABLES, *ON_GRID, *ON_PATH}
    reason = f"does not suit the {process} process: {_REASONS[sampler]}" if sampler in known else "is unknown"
    raise ValueError(f"sampler {sampler} {reason}; choose from {', '.join(PAIRS[process])}")
