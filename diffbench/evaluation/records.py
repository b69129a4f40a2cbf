"""Evaluation records in results.jsonl: values with their protocol, and whether two records are comparable."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffbench.config.load import flatten
from diffbench.core.errors import UserError
from diffbench.core.files import room_for

if TYPE_CHECKING:
    from diffbench.metrics import Extractor

FORMAT = 1
PROTOCOL = (
    *("format", "data", "autoencoder", "sample", "guidance", "labels", "precision", "extractor", "reference", "judge"),
)
"""Parts of a record that must agree for its values to be comparable with another's. The weights that were scored, the
seed, the time and the machine are not part of the protocol."""
LOOSE = (
    *("sample.seed", "sample.seconds", "sample.batch_size", "extractor.asked", "extractor.file", "extractor.licence"),
    *("reference.all", "judge.run", "judge.accuracy"),
)
"""Keys of those parts that may differ."""


def environment(extractor: "Extractor | None", device: torch.device) -> dict[str, Any]:
    """Return a record's entries about the code, the machine and the extractor."""
    described = extractor and {"name": extractor.name, "weights": extractor.weights, "licence": extractor.licence}
    return {
        "format": FORMAT,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "extractor": described,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} {platform.machine()}",
        "platform": platform.platform(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
    }


def compares_with_all(record: Mapping[str, Any], count: int) -> bool:
    """Return whether a record of `count` samples compares with all training images; inferred for older records."""
    reference = record["reference"]
    return bool(reference.get("all", reference["count"] != count))


@cache
def processor() -> str:
    """Return the name and vector instruction set of the CPU, which determine the order of additions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return f"{next(named, platform.processor())} ({torch.backends.cpu.get_cpu_capability()})"


@cache
def versions() -> dict[str, str]:
    """Return the versions of everything that can change the last digits of a result."""
    named = {name: metadata.version(name) for name in ("diffbench", "lightning", "numpy", "torchmetrics")}
    return {**named, "torch": torch.__version__, "python": platform.python_version()}


@cache
def commit() -> str | None:
    """Return the commit of the code, with "-dirty" if files differ from it; None outside a git clone."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Append a record to a file, after removing a last line that was cut short by a kill."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        raise UserError(f"{path}: is a link; records are only appended to regular files; remove the link")
    data = (json.dumps(record) + "\n").encode()
    with room_for(path, len(data)), path.open("ab+") as file:
        file.seek(0)
        before = file.read()
        whole = len(before) if before.endswith(b"\n") else before.rfind(b"\n") + 1
        if whole < len(before):
            print(f"warning: {path}: its last line was cut short when a command was killed, and is dropped", flush=True)
            file.truncate(whole)
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            file.truncate(whole)
            raise


def results(folder: Path) -> list[dict[str, Any]]:
    return read(folder / "results.jsonl")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return read(folder / "metrics.jsonl")


def read(path: Path) -> list[dict[str, Any]]:
    """Read the records of a file, or none if it does not exist; skip a last line that was cut short by a kill.

    Raises:
        UserError: if any other line is not JSON, naming it.
    """
    found = []
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            print(f"warning: {path}: line {number} was cut short when a command was killed, and is skipped", flush=True)
            continue
        try:
            found.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path}: line {number} is not JSON; remove that line") from None
    return found


def values(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the measured values of a record: the entries whose names contain a sample count."""
    return {name: value for name, value in record.items() if "@" in name}


def settings_of(record: Mapping[str, Any]) -> list[str]:
    """Describe how a record's samples were drawn: guidance, and departures from the run's config."""
    sample, departures = record.get("sample") or {}, dict(record.get("departures") or {})
    departures.pop("sample.guidance", None)
    parts = [] if record.get("guidance", 1) == 1 else [f"guidance {record['guidance']:g}"]
    if sample.get("classifier") and sample.get("classifier_scale"):
        parts.append(f"classifier {sample['classifier_scale']:g}")
    return parts + [f"{key}={value}" for key, value in departures.items()]


def tag_prefix(record: Mapping[str, Any]) -> str:
    """Return the prefix of a record's values in TensorBoard, so that no tag mixes different sampling settings."""
    departures = record.get("departures") or {}
    guided = settings_of({**record, "departures": {}})
    parts = ["guided"] * bool(guided) + [",".join(f"{key}={value}" for key, value in departures.items())]
    return "".join(f"{part}/" for part in parts if part)


def protocol(record: Mapping[str, Any]) -> dict[str, Any]:
    flat = flatten({part: record.get(part) for part in PROTOCOL})
    return {key: value for key, value in flat.items() if key not in LOOSE}


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str | None:
    """Describe the first difference between the protocols of two records; None if they agree."""
    one, other = protocol(a), protocol(b)
    for key in sorted(one | other):
        if one.get(key) != other.get(key):
            return f"{key} is {one.get(key)} in one and {other.get(key)} in the other"
    return None
