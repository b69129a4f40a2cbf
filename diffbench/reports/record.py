"""The record inside a report's page: all that it takes to rebuild its cells, and a hash of it and of what is shown."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch

from diffbench.core.errors import UserError
from diffbench.core.files import digest, finite
from diffbench.evaluation import records
from diffbench.reports.conclusions import Conclusion
from diffbench.reports.tables import SEED_BY_SEED
from diffbench.reports.text import number
from diffbench.runs.base import DATA_FACTS

FORMAT = 1
_ELEMENT = '<script type="application/json" id="record">'
Place = tuple[str, str, str]
"""Where a text stands in a page: heading, row, column; empty outside tables."""


@dataclass(frozen=True)
class Change:
    """Something that a page says now and its record does not, or the other way round."""

    where: str
    recorded: str
    found: str


# Writing.


def embed(page: str, c: Conclusion) -> str:
    """The page with the record of its complete cells and of its own texts."""
    made: dict[str, Any] = {
        "format": FORMAT,
        "title": c.comparison.title,
        "command": c.comparison.command,
        "primary": c.name,
        "made": records.surroundings(None, torch.device("cpu")),
        "configs": [],
        "data": {},
        "cells": {},
    }
    for budget, trials in (c.comparison.rungs or {"": c.trials}).items():
        for t in trials:
            if t.run is None or not t.complete or not t.recipe:
                continue
            cell = made["cells"].setdefault(f"{t.variant}/{t.seed}", {"values": {}})
            cell["values"][budget] = t.values
            record = {k: v for k, v in (t.record or {}).items() if "@" not in k}
            cell |= {"variant": t.variant, "seed": t.seed, "images": t.images, "seconds": t.seconds, "record": record}
            cell |= {"recipe": {k: v for k, v in t.recipe.items() if k != "folder"}}
            if (t.run.folder / DATA_FACTS).is_file():
                made["data"][t.run.facts.fingerprint] = asdict(t.run.facts)
                cell["data"] = t.run.facts.fingerprint
    made = json.loads(json.dumps(finite(made)))
    for cell in made["cells"].values():
        cell["sha256"] = digest(cell)
        config = cell["recipe"].pop("config")
        seed = config.pop("seed")
        if config not in made["configs"]:
            made["configs"].append(config)
        cell["recipe"]["config"] = {"number": made["configs"].index(config), "seed": seed}
    made["shown"] = _texts(page)
    made["sha256"] = digest(made)
    text = json.dumps(made, ensure_ascii=False).replace("<", "\\u003c")
    return page.replace("</body>", f"{_ELEMENT}{text}</script>\n</body>")


class _Reader(HTMLParser):
    """Collects the visible texts of a page with their places, and hashes of its images."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Place, str]] = []
        self.text, self.heading, self.row, self.columns, self.column = "", "", "", [""], 0
        self.silent, self.in_head = False, False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _INLINE:
            self.text += " "
            return
        self._end()
        self.silent |= tag in ("script", "style")
        if tag == "img":
            source = dict(attrs).get("src") or ""
            self.found.append(((self.heading, "", ""), f"image {hashlib.sha256(source.encode()).hexdigest()[:16]}"))
        elif tag == "table":
            self.columns = []
        elif tag == "thead":
            self.in_head = True
        elif tag == "tr":
            self.row, self.column = "", 0

    def handle_endtag(self, tag: str) -> None:
        if tag in _INLINE:
            return
        text = self._end()
        self.silent &= tag not in ("script", "style")
        if tag in ("h1", "h2", "h3"):
            self.heading = text
        elif tag == "thead":
            self.in_head = False
        elif tag == "table":
            self.row, self.columns = "", [""]
        elif tag in ("th", "td"):
            if self.in_head:
                self.columns.append(text)
            elif not self.column:
                self.row = text
            self.column += 1

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.text += data

    def _end(self) -> str:
        text, self.text = " ".join(self.text.split()), ""
        if text:
            column = self.columns[min(self.column, len(self.columns) - 1)] if self.row and self.columns else ""
            self.found.append(((self.heading, self.row, column), text))
        return text


_INLINE = ("b", "small", "sub", "sup", "code")


def _texts(page: str) -> list[list[str]]:
    reader = _Reader()
    reader.feed(page)
    reader.close()
    return [[*place, text] for place, text in reader.found]


# Reading.


def read(path: Path) -> tuple[dict[str, Any], list[Change]]:
    """The record of a page, each cell with its config, and where page and record have been changed since.

    Raises:
        UserError: if the file is not a report.
    """
    try:
        page = path.read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not a report ({getattr(e, 'strerror', None) or 'not a text'})") from None
    found = re.findall(f"{re.escape(_ELEMENT)}(.*?)</script>\n?", page, re.DOTALL)
    if not found:
        raise UserError(f"{path}: not a report of diffbench study or compare; give the report.html of one")
    try:
        record = json.loads(found[-1])
        held, said = digest({k: v for k, v in record.items() if k != "sha256"}), record["sha256"]
        shown = record["shown"]
        if record["format"] != FORMAT:
            raise UserError(f"{path}: a report of format {record['format']}; this diffbench reads {FORMAT}")
        changes = _shown_changes(shown, _texts(page.replace(f"{_ELEMENT}{found[-1]}</script>\n", "")))
        for name, cell in record["cells"].items():
            config = cell["recipe"]["config"]
            cell["recipe"]["config"] = record["configs"][config["number"]] | {"seed": config["seed"]}
            own = cell.pop("sha256")
            if (now := digest(cell)) != own:
                changes.append(Change(f"record of {name}: hash", own[:16], now[:16]))
            changes += _cell_changes(name, cell, shown)
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{path}: its record cannot be read ({e!r}); get the report again") from None
    if held != said and not changes:
        changes.append(Change("record: hash", said[:16], held[:16]))
    return record, changes


def _shown_changes(before: list[list[str]], now: list[list[str]]) -> list[Change]:
    """What a page shows differently from what it showed when it was written."""
    old, new = [tuple(x) for x in before], [tuple(x) for x in now]
    changes = []
    for tag, a, b, x, y in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        for i in range(max(b - a, y - x) if tag != "equal" else 0):
            was = old[a + i] if a + i < b else None
            is_ = new[x + i] if x + i < y else None
            place = ", ".join(part for part in (was or is_ or ())[:3] if part)
            changes.append(Change(f"page: {place or 'top'}", was[3] if was else "-", is_[3] if is_ else "-"))
    return changes


def _cell_changes(name: str, cell: dict[str, Any], shown: list[list[str]]) -> list[Change]:
    """Where the table of single seeds shows another value than the record of a cell holds."""
    values = list(cell["values"].values())[-1]
    changes = []
    for heading, row, column, text in shown:
        key = column.rpartition(" ")[2]
        if (heading, row) == (SEED_BY_SEED, name) and key in values and text != row:
            value = values[key]
            expected = "-" if value is None else number(value, key)
            if text != expected:
                changes.append(Change(f"page: {heading}, {name}, {key}", expected, text))
    return changes
