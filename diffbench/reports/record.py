"""The record in a report page: everything needed to rebuild its cells, with hashes of it and of the text shown."""

import hashlib
import json
import re
from dataclasses import asdict
from difflib import SequenceMatcher
from html import unescape
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from diffbench.core.errors import UserError
from diffbench.core.files import digest, finite
from diffbench.evaluation import records
from diffbench.reports.conclusions import Conclusion
from diffbench.reports.text import Rows
from diffbench.runs.base import DATA_FACTS

FORMAT = 1
_ELEMENT = '<script type="application/json" id="record">'


def embed(page: str, c: Conclusion) -> str:
    """Return the page with a record of its complete cells and of its own text embedded."""
    made: dict[str, Any] = {
        "format": FORMAT,
        "title": c.comparison.title,
        "command": c.comparison.command,
        "primary": c.name,
        "made": records.environment(None, torch.device("cpu")),
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


def _texts(page: str) -> list[list[str]]:
    """Return [heading, row, column, text] for all that a page shows; row and column are empty outside tables."""
    found: list[list[str]] = []
    heading, row, heads, column = "", "", [""], 0
    page = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL)
    page = re.sub(r"</?(b|small|sub|sup|code)\b[^>]*>", " ", page)
    for tag, following in re.findall(r"<(/?\w+[^>]*)>([^<]*)", page):
        name, text = tag.split()[0], " ".join(unescape(following).split())
        if name == "img":
            text = f"image {hashlib.sha256(tag.encode()).hexdigest()[:16]}"
        elif name in ("table", "/table"):
            row, heads = "", []
        elif name == "tr":
            row, column = "", -1
        elif name in ("th", "td"):
            column += 1
            if name == "th" and "scope" in tag:
                row = text
            elif name == "th":
                heads.append(text)
        if text:
            found.append([heading, row, heads[column] if row and 0 < column < len(heads) else "", text])
        heading = text if name in ("h1", "h2", "h3") else heading
    return found


def read(path: Path) -> tuple[dict[str, Any], Rows]:
    """Read the record of a page, with the config of each cell, and list where page or record was changed since.

    Raises:
        UserError: if the file is not a report, or its record cannot be read.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file")
    try:
        page = path.read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not a report ({getattr(e, 'strerror', None) or 'not a text file'})") from None
    found = re.findall(f"{re.escape(_ELEMENT)}(.*?)</script>\n?", page, re.DOTALL)
    if not found:
        raise UserError(f"{path}: not a report of diffbench study or compare; give the report.html of one")
    try:
        record = json.loads(found[-1])
        actual, recorded = digest({k: v for k, v in record.items() if k != "sha256"}), record["sha256"]
        if record["format"] != FORMAT:
            raise UserError(f"{path}: a report of format {record['format']}; this diffbench reads {FORMAT}")
        changes = _shown_changes(record["shown"], _texts(page.replace(f"{_ELEMENT}{found[-1]}</script>\n", "")))
        for name, cell in record["cells"].items():
            config = cell["recipe"]["config"]
            cell["recipe"]["config"] = record["configs"][config["number"]] | {"seed": config["seed"]}
            own = cell.pop("sha256")
            if (now := digest(cell)) != own:
                changes.append(_change(f"record of {name}: hash", own[:16], now[:16]))
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{path}: its record cannot be read ({e!r}); get the report again") from None
    if actual != recorded and not changes:
        changes.append(_change("record: hash", recorded[:16], actual[:16]))
    return record, changes


def _shown_changes(before: list[list[str]], now: list[list[str]]) -> Rows:
    old, new = [tuple(x) for x in before], [tuple(x) for x in now]
    changes = []
    for tag, a, b, x, y in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        for was, found in zip_longest(old[a:b], new[x:y]) if tag != "equal" else ():
            place = ", ".join(filter(None, (was or found)[:3])) or "top"
            changes.append(_change(f"page: {place}", was[3] if was else "-", found[3] if found else "-"))
    return changes


def _change(where: str, recorded: str, found: str) -> dict[str, str]:
    return {"where": where, "recorded": recorded, "found": found}
