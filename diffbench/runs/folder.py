"""The run folder: its name, and whether its config.yaml agrees with the command."""

import contextlib
import hashlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from diffbench.config.keys import IN_TRAINING
from diffbench.config.kinds import KINDS, BaseConfig, RunConfig
from diffbench.config.layers import PATHS, parse_overrides, read_yaml
from diffbench.config.load import flatten, from_dict, load, to_dict, to_yaml
from diffbench.core.errors import UserError, suggest
from diffbench.core.files import write_text
from diffbench.evaluation import records

FREE_SECTIONS = {"sample", "evaluate"}
FREE = {
    "runs_dir",
    "tag",
    "seeds.sample",
    "data.num_workers",
    "trainer.max_images",
    "trainer.log_images",
    "trainer.validate_images",
    "trainer.checkpoint_images",
    "trainer.sample_images",
    "trainer.logger",
    "trainer.accelerator",
    "trainer.threads",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.timeout_s",
    "trainer.max_skipped",
    "trainer.data_on_device",
    "trainer.async_checkpoints",
    "trainer.compile",
}


def is_free(key: str) -> bool:
    """True if a key changes neither the weights (except rounding on other devices) nor what validation measures.

    Such a key may change when a run resumes, and is not part of the folder's name.
    """
    return key in FREE or key.split(".")[0] in FREE_SECTIONS


LONGEST_TAG = 100
PLANTED = "data.planted."
"""Prefix of planted classes, whose names may contain any character."""
CONFIG_FILE = "config.yaml"
"""File in the run folder with the resolved config."""


def folder_for(path: Path, overrides: Sequence[str], config: BaseConfig) -> Path:
    """Return runs/<experiment>/<yaml stem>[-<debug>][-<tag>]-s<seed>.

    The experiment is the name of the YAML's folder. Overrides that change what is trained make a tag.
    """
    debug = "" if config.debug == "none" else config.debug
    parts = [path.stem, debug, config.tag or _automatic_tag(path, overrides, config), f"s{config.seed}"]
    return Path(config.runs_dir) / path.resolve().parent.name / "-".join(p for p in parts if p)


def _automatic_tag(path: Path, overrides: Sequence[str], config: BaseConfig) -> str:
    given, now = flatten(parse_overrides(_needed(path, overrides, config))), flatten(to_dict(config))
    names_first = sorted(k for k in given if k.endswith((".name", ".preset")))
    parts = []
    for key in [*names_first, *(k for k in now if k in given and k not in names_first)]:
        value = now.get(key, given[key])
        if not is_free(key) and key not in ("seed", "debug") and (key in now or value is not None):
            is_path = key == "data.path" and value
            parts.append(_text(Path(value).name) if is_path else f"{_text(_leaf(key, now))}_{_text(value)}")
    return short("-".join(parts))


def _needed(path: Path, overrides: Sequence[str], config: BaseConfig) -> list[str]:
    """Return the overrides that change the config; an image size equal to the default, for example, does not."""
    kept = list(overrides)
    for override in overrides:
        rest = list(kept)
        rest.remove(override)
        with contextlib.suppress(UserError):  # the YAML is not valid without this override
            kept = rest if load(path, rest) == config else kept
    return kept


def reference_curves(path: Path, overrides: Sequence[str], config: BaseConfig) -> Path | None:
    """Return the file of reference curves next to an experiment's YAML, or None; see `evaluation.curves`.

    Curves apply only where the overrides change neither what is trained nor how many images a logged loss averages.
    """
    curves = path.resolve().parent / "curves" / f"{path.stem}.csv"
    if config.debug != "none" or not curves.is_file():
        return None
    same_log = config.trainer.log_images == load(path).trainer.log_images
    return curves if same_log and not _automatic_tag(path, overrides, config) else None


def _leaf(key: str, known: dict[str, Any]) -> str:
    """Return a key without its section if that is unambiguous."""
    leaf = key.removeprefix(PLANTED) if key.startswith(PLANTED) else key.rsplit(".", 1)[-1]
    return leaf if sum(k.rsplit(".", 1)[-1] == leaf for k in known) < 2 else key


def _text(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return "".join(c if c.isalnum() or c in ".,+-" else "_" for c in text)


def short(tag: str) -> str:
    """Return the tag, cut and ended with a hash if it is too long for a file name."""
    if len(tag.encode()) <= LONGEST_TAG:
        return tag
    digest = hashlib.sha256(tag.encode()).hexdigest()[:8]
    return f"{tag.encode()[: LONGEST_TAG - 9].decode(errors='ignore')}+{digest}"


def check_place(folder: Path) -> None:
    """Raise ValueError if a run cannot be written: a file is in the way, or the folder is not writable."""
    existing = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    if not existing.is_dir():
        raise ValueError(f"runs_dir: {existing} is a file, not a folder; choose another runs_dir")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"runs_dir: {existing} is not writable; choose another runs_dir")


def refuse_links(folder: Path) -> None:
    """Raise UserError for a link that leaves a run folder: in a copied folder it could point at any file here."""
    real = os.path.realpath(folder)
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            if os.path.islink(path) and os.path.commonpath([real, os.path.realpath(path)]) != real:
                raise UserError(f"{path}: is a link that leaves the run folder; replace it by the file itself")


def has_checkpoint(folder: Path) -> bool:
    return any(folder.glob("checkpoints/step-*.ckpt"))


def claim_folder(folder: Path, config: BaseConfig) -> bool:
    """True if the folder already holds this run; a new folder gets its config.yaml.

    Raises:
        UserError: if it holds other files, or a run that differs in more than free keys; names the keys.
    """
    saved = folder / CONFIG_FILE
    if not saved.exists():
        others = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        if others:
            raise UserError(f"{folder}: contains {others[0]} but no config.yaml; move the folder away")
        write_text(saved, to_yaml(config))
        return False
    before, now = flatten(to_dict(read_config(folder))), flatten(to_dict(config))
    changed = [k for k in sorted(before | now) if not is_free(k) and not _same(k, before.get(k), now.get(k))]
    if changed:
        shown = ", ".join(f"{k}={before.get(k)} (now {now.get(k)})" for k in changed[:4])
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise UserError(
            f"{saved}: this run was made with {shown}{more}; choose another tag=NAME, or move the folder away"
        )
    return True


def _same(key: str, before: Any, now: Any) -> bool:
    """True if a key's values are equal, or are two spellings of one path, such as pets and pets/."""
    paths = PATHS.search(key) and isinstance(before, str) and isinstance(now, str)
    return before == now or bool(paths and all(map(os.path.exists, (before, now))) and os.path.samefile(before, now))


def check_resumable(folder: Path, config: BaseConfig) -> None:
    """Raise UserError if a run has lost its checkpoints, instead of starting it over; lists what can be done."""
    if has_checkpoint(folder):
        return
    t, logged = config.trainer, max((line["images"] for line in records.metrics(folder)), default=0)
    first = -(-t.checkpoint_images // t.batch_size) * t.batch_size  # training continues while the first is written
    left = [path.name for path in sorted(folder.glob("ema-*.safetensors"))]
    if logged > 2 * first:
        left.append(f"metrics.jsonl up to {logged:,} images")
    if left:
        raise UserError(
            f"{folder}: has {', '.join(left)}, but no checkpoint to resume from; restore checkpoints/, or train"
            f" elsewhere with tag=NAME (from these averages: tag=NAME init_from={folder}), or start over with"
            " restart=true, which renames the existing folder"
        )


def set_aside(folder: Path) -> Path:
    """Rename a run folder to NAME.before-1, or the next free number; return the new path."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.before-{number}")).exists():
        number += 1
    return folder.rename(aside)


def update_config(folder: Path, config: BaseConfig, complete: bool = False) -> None:
    """Write the config of a resumed run; a complete one keeps the values that acted in training."""
    before, now = read_config(folder), config
    if complete:
        now = replace(now, trainer=replace(now.trainer, max_images=before.trainer.max_images))
        if isinstance(now, RunConfig) and isinstance(before, RunConfig):
            kept = {key: getattr(before.evaluate, key) for key in IN_TRAINING}
            if changed := [f"evaluate.{key}" for key in IN_TRAINING if getattr(now.evaluate, key) != kept[key]]:
                print(f"note: {', '.join(changed)}: no effect, since training is complete; use diffbench evaluate")
            now = replace(now, evaluate=replace(now.evaluate, **kept))
    elif before.trainer.max_images != now.trainer.max_images:
        print(f"trainer.max_images: {before.trainer.max_images:,} before, {now.trainer.max_images:,} now")
    if now != before:
        write_text(folder / CONFIG_FILE, to_yaml(now))


def read_config(folder: Path) -> BaseConfig:
    """Read and check the config of a run folder; UserError if it is missing or damaged."""
    saved = _config_file(folder)
    return from_dict(read_yaml(saved), str(saved))


def read_values(folder: Path) -> dict[str, Any]:
    """Read the config of a run folder as plain values; checked only if it looks damaged: ten times slower."""
    saved = _config_file(folder)
    try:
        values = yaml.load(saved.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if values["kind"] in KINDS and values["ema"]["decays"] and values["trainer"]["batch_size"]:
            return dict(values)
    except (yaml.YAMLError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return to_dict(read_config(folder))


def _config_file(folder: Path) -> Path:
    saved = folder / CONFIG_FILE
    if not saved.is_file():
        if folder.is_file():
            raise UserError(f"{folder}: is a file, not a run folder")
        places = (folder.parent.glob("*"), folder.glob("*"), folder.glob("*/*"))
        near = sorted({str(p) for p in itertools.chain(*places) if (p / CONFIG_FILE).is_file()})
        choices = f"; choose from {', '.join(near)}" if near else "; train one first"
        choices += suggest(str(folder), near) if len(near) > 1 else ""
        raise UserError(f"{folder}: no run here ({CONFIG_FILE} is missing){choices}")
    refuse_links(folder)
    return saved
