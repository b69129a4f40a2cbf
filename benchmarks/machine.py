"""The machine that a report speaks of, and whether it is quiet enough to be measured."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from diffbench import __version__
from diffbench.core.errors import UserError

BUSY = 0.5
"""Load average above which times mean little: another process on two cores makes 0.3 ms take 20 to 32."""


def check_quiet(force: bool, load: float | None = None) -> None:
    """Refuses a machine at work.

    Args:
        force: measure all the same.
        load: average number of running processes over the last minute; by default what the system says.

    Raises:
        UserError: if the load is above `BUSY`.
    """
    load = os.getloadavg()[0] if load is None else load
    if load > BUSY and not force:
        raise UserError(
            f"force: the load average is {load:.2f}, above {BUSY}: other processes would be measured too; wait, or set"
            " force=true, which the report will say"
        )


def facts(device: torch.device) -> dict[str, Any]:
    """What a reader of the numbers has to know of the machine."""
    told: dict[str, Any] = {
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": round(os.getloadavg()[0], 2),
        "device": device.type,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "lightning", "torchmetrics", "numpy", "triton")},
        "diffbench": __version__,
        "commit": commit(),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        told |= {"gpu": card.name, "gpu_memory_bytes": card.total_memory, "cuda": torch.version.cuda}
        told["float32_matmul_precision"] = torch.get_float32_matmul_precision()
    return told


def free_bytes(device: torch.device) -> int:
    """Memory that networks may still take."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def commit() -> str | None:
    """The commit of the code at work, with a plus where files differ from it; None outside of a repository."""
    here = Path(__file__).parent
    try:
        said = [
            subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--", str(here.parent)])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return said[0] + ("+" if said[1] else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
