"""The run folder: its name, and whether the config inside agrees with the command."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from diffbench.config import RunConfig, flatten, from_dict, load, to_dict, to_yaml
from diffbench.core.errors import UserError
from diffbench.core.files import write_text

# What may change between two sittings of one run: its length, and what leaves every number as it is.
FREE = {"trainer.max_images", "data.num_workers", "runs_dir", "tag"}


def folder_for(path: Path, overrides: Sequence[str], config: RunConfig) -> Path:
    """runs/<experiment>/<yaml stem>[-<tag>]-s<seed>; overrides of anything but the length make a tag themselves.

    The experiment is the name of the YAML's folder.
    """
    parts = [path.stem, config.tag or _automatic_tag(path, overrides, config), f"s{config.seed}"]
    return Path(config.runs_dir) / path.resolve().parent.name / "-".join(p for p in parts if p)


def _automatic_tag(path: Path, overrides: Sequence[str], config: RunConfig) -> str:
    debug = [f"debug={config.debug}"] if config.debug != "none" else []
    plain = flatten(to_dict(load(path, debug)))
    now = flatten(to_dict(config))
    changed = [k for k in now if k not in FREE | {"seed", "debug"} and plain.get(k) != now[k]]
    changed = [k for k in changed if not (k.startswith(("data.", "denoiser.")) and _name_changed(k, plain, now))]
    words: list[str] = [config.debug] if debug else []
    words += [f"{k.rsplit('.', 1)[-1]}_{_short(now[k])}" for k in changed]
    return "-".join(words)


def _name_changed(key: str, plain: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether the key belongs to another network or data set, whose defaults its name already tells."""
    section, leaf = key.split(".", 1)
    return leaf != "name" and plain.get(f"{section}.name") != now.get(f"{section}.name")


def _short(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return "".join(c if c.isalnum() or c in ".,+" else "_" for c in text)[:40]


def check_same(folder: Path, config: RunConfig) -> bool:
    """Whether the folder holds this run already; writes config.yaml where there is none.

    Raises:
        UserError: if it holds a run that differs in more than its length, naming the keys.
    """
    saved = folder / "config.yaml"
    if not saved.exists():
        write_text(saved, to_yaml(config))
        return False
    before, now = flatten(_read(saved)), flatten(to_dict(config))
    changed = [k for k in sorted(before | now) if k not in FREE and before.get(k) != now.get(k)]
    if changed:
        told = ", ".join(f"{k}={before.get(k)} (now {now.get(k)})" for k in changed[:4])
        raise UserError(f"{saved}: this run was made with {told}: choose another tag=NAME, or move the folder away")
    if before.get("trainer.max_images") != now["trainer.max_images"]:
        print(f"length: {before['trainer.max_images']:,} images before, {now['trainer.max_images']:,} now")
    write_text(saved, to_yaml(config))
    return True


def read_config(folder: Path) -> RunConfig:
    """The config of a run folder.

    Raises:
        UserError: if the folder holds no run.
    """
    saved = folder / "config.yaml"
    if not saved.is_file():
        near = sorted(str(p.parent) for p in folder.parent.glob("*/config.yaml"))
        choices = f"; runs beside it: {', '.join(near)}" if near else ""
        raise UserError(f"{folder}: no run here (config.yaml is missing){choices}")
    return from_dict(_read(saved), str(saved))


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as e:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: the top level must be keys with values")
    return values
