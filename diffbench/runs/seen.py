"""A run folder as tables and reports see it: each file read once, no network built but to count it, no weights read."""

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from diffbench.config.kinds import RunConfig
from diffbench.config.load import flatten, from_dict, to_dict
from diffbench.core.errors import UserError
from diffbench.denoisers.flops import Cost
from diffbench.evaluation import records
from diffbench.runs.base import Trained
from diffbench.runs.build import cost_of, load_data
from diffbench.runs.folder import read_config, refuse_links
from diffbench.runs.lifecycle import KINDS
from diffbench.runs.weights import export_path, images_told

_costs: dict[str, Cost] = {}
_configs: dict[str, Any] = {}


@dataclass(eq=False)
class Seen:
    """A run folder.

    Attributes:
        folder: where it lies.
        values: its resolved config, as config.yaml holds it.
        images_seen: of its weights.
        ema: decay of the average that records are chosen by.
        snapshot: "last" or "best", likewise.
    """

    folder: Path
    values: dict[str, Any]
    images_seen: int
    ema: float
    snapshot: str = "last"
    known_cost: Cost | None = field(default=None, repr=False)

    @property
    def kind(self) -> str:
        """Of the run."""
        return str(self.values["kind"])

    @cached_property
    def flat(self) -> dict[str, Any]:
        """The config under dotted keys."""
        return flatten(self.values)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return records.metrics(self.folder)

    @cached_property
    def results(self) -> list[dict[str, Any]]:
        """The records of results.jsonl, oldest first."""
        return records.results(self.folder)

    @cached_property
    def cost(self) -> Cost:
        """Parameters and multiply-accumulates, counted once for each network.

        Raises:
            UserError: if its data or autoencoder are not at hand.
        """
        return self.known_cost or _cost(self.values, self.folder)

    @cached_property
    def timeline(self) -> list[tuple[int, float]]:
        """(images, seconds of training until then) of each line that says how fast training was."""
        # The series holds images and images/s of each interval: their quotients sum to the seconds of training.
        found, total, before = [], 0.0, 0
        for m in self.metrics:
            if "perf/images_per_s" in m:
                total += (m["images"] - before) / max(1e-9, m["perf/images_per_s"])
                before = m["images"]
                found.append((before, total))
        return found

    @property
    def seconds(self) -> float:
        """Of training; 0 where nothing was logged."""
        return self.timeline[-1][1] if self.timeline else 0.0

    def last(self, name: str) -> float | None:
        """The newest value of a metric."""
        return next((m[name] for m in reversed(self.metrics) if name in m), None)


def seen(run: Trained[Any] | Seen) -> Seen:
    """A loaded run as tables see it."""
    if isinstance(run, Seen):
        return run
    return Seen(run.folder, to_dict(run.config), run.images_seen, run.ema, run.snapshot, run.cost)


def look(folder: str | Path) -> Seen:
    """A run folder with weights.

    Raises:
        UserError: if it holds no run, no weights yet, or a damaged export of them.
    """
    found = begun(folder)
    if found is None:
        read_config(Path(folder))  # says what is missing
        raise UserError(f"{folder}: no run here")
    if not found.images_seen and not export_path(found.folder, found.ema).is_file():
        raise UserError(f"{folder}: no weights yet; train the run first")
    return found


def begun(folder: str | Path) -> Seen | None:
    """A run folder that may have no weights yet; None where there is no run."""
    folder = Path(folder)
    saved = folder / "config.yaml"
    if not saved.is_file():
        return None
    refuse_links(folder)
    values = _quickly(saved) or to_dict(read_config(folder))
    found = Seen(folder, values, 0, values["ema"]["decays"][0])
    export = export_path(folder, found.ema)
    if export.is_file():
        try:
            with safe_open(export, "np") as file:
                found.images_seen = images_told(export, file.metadata() or {})
        except SafetensorError as e:
            raise UserError(f"{export}: damaged ({e}); remove it to use the newest checkpoint") from None
    else:
        steps = [int(n) for p in folder.glob("checkpoints/step-*.ckpt") if (n := p.stem[5:]).isdecimal()]
        found.images_seen = max(steps, default=0) * int(values["trainer"]["batch_size"])
    return found


def _quickly(path: Path) -> dict[str, Any] | None:
    """A resolved config without its checks, which take ten times as long; None where it needs them."""
    try:
        rest, seed = path.read_text(), None
        if found := re.search(r"^seed: (\d+)\n", rest, re.MULTILINE):  # apart from which many runs are alike
            rest, seed = rest[: found.start()] + rest[found.end() :], int(found[1])
        if rest not in _configs:
            _configs[rest] = yaml.load(rest, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        values = _configs[rest]
        whole = values["kind"] in KINDS and values["ema"]["decays"] and values["trainer"]["batch_size"]
        return {**values, "seed": seed} if whole and seed is not None else None
    except (yaml.YAMLError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _cost(values: dict[str, Any], folder: Path) -> Cost:
    passing = ("seed", "tag", "runs_dir", "debug", "optimizer", "ema", "trainer", "validation", "sample", "evaluate")
    sizes = {key: value for key, value in values.items() if key not in passing}
    signature = json.dumps([sizes, values["trainer"].get("label_dropout")], sort_keys=True)
    if signature not in _costs:
        config = from_dict(values, str(folder / "config.yaml"))
        if isinstance(config, RunConfig):
            _costs[signature] = cost_of(config, load_data(config)[0])
        else:
            _costs[signature] = KINDS[config.kind](folder, config).cost
    return _costs[signature]
