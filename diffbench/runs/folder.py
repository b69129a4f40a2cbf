"""The run folder: its name, and whether the config inside agrees with the command."""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from diffbench.config.kinds import KINDS, BaseConfig, RunConfig
from diffbench.config.layers import PATHS, parse_overrides, read_yaml
from diffbench.config.load import flatten, from_dict, load, to_dict, to_yaml
from diffbench.core.errors import UserError
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
IN_TRAINING = ("every_images", "every_count", "best")
"""Keys of `evaluate` that a complete run keeps."""


def is_free(key: str) -> bool:
    """True if a key changes neither the weights (but for rounding on other devices) nor what validation measures.

    Such a key may change when a run resumes, and is not part of its name.
    """
    return key in FREE or key.split(".")[0] in FREE_SECTIONS


LONGEST_TAG = 100
PLANTED = "data.planted."
"""Before the names of planted classes, which may hold any characters."""
SAVED = "config.yaml"
"""The resolved config of a run, in its folder."""


def folder_for(path: Path, overrides: Sequence[str], config: BaseConfig) -> Path:
    """runs/<experiment>/<yaml stem>[-<debug>][-<tag>]-s<seed>; overrides that change what is trained make a tag.

    The experiment is the name of the YAML's folder.
    """
    debug = "" if config.debug == "none" else config.debug
    parts = [path.stem, debug, config.tag or _automatic_tag(path, overrides, config), f"s{config.seed}"]
    return Path(config.runs_dir) / path.resolve().parent.name / "-".join(p for p in parts if p)


def _automatic_tag(path: Path, overrides: Sequence[str], config: BaseConfig) -> str:
    given, now = flatten(parse_overrides(_needed(path, overrides, config))), flatten(to_dict(config))
    chosen = [k for k in given if k.endswith((".name", ".preset"))]
    words = []
    for key in [*sorted(chosen), *(k for k in now if k in given and k not in chosen)]:
        value = now.get(key, given[key])
        if not is_free(key) and key not in ("seed", "debug") and (key in now or value is not None):
            named = key == "data.path" and value
            words.append(_text(Path(value).name) if named else f"{_text(_leaf(key, now))}_{_text(value)}")
    return short("-".join(words))


def _needed(path: Path, overrides: Sequence[str], config: BaseConfig) -> list[str]:
    """The overrides without those that change nothing, such as an image size that the images would get anyway."""
    kept = list(overrides)
    for word in overrides:
        rest = list(kept)
        rest.remove(word)
        with contextlib.suppress(UserError):  # the YAML is not valid without it
            kept = rest if load(path, rest) == config else kept
    return kept


def reference_curves(path: Path, overrides: Sequence[str], config: BaseConfig) -> Path | None:
    """The curves beside an experiment's YAML, where nothing else changes what is trained, nor over how many images a
    logged loss is the mean; see `evaluation.curves`."""
    found = path.resolve().parent / "curves" / f"{path.stem}.csv"
    if config.debug != "none" or not found.is_file():
        return None
    alike = config.trainer.log_images == load(path).trainer.log_images
    return found if alike and not _automatic_tag(path, overrides, config) else None


def _leaf(key: str, known: dict[str, Any]) -> str:
    """A key without its section where that is enough to tell it."""
    leaf = key.removeprefix(PLANTED) if key.startswith(PLANTED) else key.rsplit(".", 1)[-1]
    return leaf if sum(k.rsplit(".", 1)[-1] == leaf for k in known) < 2 else key


def _text(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return "".join(c if c.isalnum() or c in ".,+-" else "_" for c in text)


def short(tag: str) -> str:
    """The tag, or its start and a hash of it all where it is too long for a file name."""
    if len(tag.encode()) <= LONGEST_TAG:
        return tag
    digest = hashlib.sha256(tag.encode()).hexdigest()[:8]
    return f"{tag.encode()[: LONGEST_TAG - 9].decode(errors='ignore')}+{digest}"


def check_place(folder: Path) -> None:
    """Raise ValueError where a run cannot be written: a file is in the way, or the folder is not writable."""
    there = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    if not there.is_dir():
        raise ValueError(f"runs_dir: {there} is a file, not a folder; choose another runs_dir")
    if not os.access(there, os.W_OK):
        raise ValueError(f"runs_dir: {there} may not be written to; choose another runs_dir")


def refuse_links(folder: Path) -> None:
    """Raise UserError for a link that leaves a run folder: one from elsewhere could name any file of this machine."""
    real = os.path.realpath(folder)
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            if os.path.islink(path) and os.path.commonpath([real, os.path.realpath(path)]) != real:
                raise UserError(f"{path}: is a link that leaves the run folder; put the file itself there")


def has_checkpoint(folder: Path) -> bool:
    return any(folder.glob("checkpoints/step-*.ckpt"))


def check_same(folder: Path, config: BaseConfig) -> bool:
    """True if the folder holds this run already; a new folder gets its config.yaml.

    Raises:
        UserError: if it holds a run that differs in more than its length, naming the keys, or other files.
    """
    saved = folder / SAVED
    if not saved.exists():
        others = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        if others:
            raise UserError(f"{folder}: holds {others[0]} but no config.yaml; move the folder away")
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
    """Whether a key's values are equal, or spell one path in two ways, as pets and pets/."""
    paths = PATHS.search(key) and isinstance(before, str) and isinstance(now, str)
    return before == now or bool(paths and all(map(os.path.exists, (before, now))) and os.path.samefile(before, now))


def check_resumable(folder: Path, config: BaseConfig) -> None:
    """Refuse to begin a run anew that has lost its checkpoints after its first one.

    Raises:
        UserError: naming what there is and what can be done.
    """
    if has_checkpoint(folder):
        return
    t, logged = config.trainer, max((line["images"] for line in records.metrics(folder)), default=0)
    first = -(-t.checkpoint_images // t.batch_size) * t.batch_size  # while it is written, training may go on
    found = [path.name for path in sorted(folder.glob("ema-*.safetensors"))]
    if logged > 2 * first:
        found.append(f"metrics.jsonl up to {logged:,} images")
    if found:
        raise UserError(
            f"{folder}: holds {', '.join(found)}, but no checkpoint to resume from; bring checkpoints/ back, or train"
            f" elsewhere with tag=NAME (from these averages: tag=NAME init_from={folder}), or begin anew with"
            " restart=true, which keeps what there is under another name"
        )


def set_aside(folder: Path) -> Path:
    """Gives a run folder another name, beside it; returns that."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.before-{number}")).exists():
        number += 1
    return folder.rename(aside)


def update_config(folder: Path, config: BaseConfig, complete: bool = False) -> None:
    """Writes the config of a run that goes on, or of one that is complete, which keeps what was done in training."""
    before, now = read_config(folder), config
    if complete:
        now = replace(now, trainer=replace(now.trainer, max_images=before.trainer.max_images))
        if isinstance(now, RunConfig) and isinstance(before, RunConfig):
            kept = {key: getattr(before.evaluate, key) for key in IN_TRAINING}
            if changed := [f"evaluate.{key}" for key in IN_TRAINING if getattr(now.evaluate, key) != kept[key]]:
                print(
                    f"note: {', '.join(changed)}: without effect, since training is over; diffbench evaluate scores"
                    " what it left"
                )
            now = replace(now, evaluate=replace(now.evaluate, **kept))
    elif before.trainer.max_images != now.trainer.max_images:
        print(f"length: {before.trainer.max_images:,} images before, {now.trainer.max_images:,} now")
    if now != before:
        write_text(folder / SAVED, to_yaml(now))


def read_config(folder: Path) -> BaseConfig:
    """The checked config of a run folder; UserError if there is none, or it is damaged."""
    saved = _config_file(folder)
    return from_dict(read_yaml(saved), str(saved))


def read_values(folder: Path) -> dict[str, Any]:
    """The config of a run folder as plain values, checked only where it looks damaged: that takes ten times as long."""
    saved = _config_file(folder)
    try:
        values = yaml.load(saved.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if values["kind"] in KINDS and values["ema"]["decays"] and values["trainer"]["batch_size"]:
            return dict(values)
    except (yaml.YAMLError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return to_dict(read_config(folder))


def _config_file(folder: Path) -> Path:
    saved = folder / SAVED
    if not saved.is_file():
        near = sorted(str(p.parent) for p in (*folder.parent.glob(f"*/{SAVED}"), *folder.glob(f"*/{SAVED}")))
        choices = f"; choose from {', '.join(near)}" if near else "; train one first"
        raise UserError(f"{folder}: no run here ({SAVED} is missing){choices}")
    refuse_links(folder)
    return saved
