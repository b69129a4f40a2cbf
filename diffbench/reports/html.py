"""The report of a comparison: a self-contained HTML page, a CSV, and plots."""

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from diffbench.core.files import write_text
from diffbench.metrics.registry import metric_of
from diffbench.reports import ladder, tables, tuning, variance
from diffbench.reports.conclusions import Conclusion, conclude
from diffbench.reports.figures import Plot
from diffbench.reports.pairs import PairedTest
from diffbench.reports.plots import draw
from diffbench.reports.record import embed
from diffbench.reports.results import Comparison
from diffbench.reports.text import counted, percent, title_and_unit, transposed

MOST_OPEN = 15
"""Largest number of rows of a table that is shown expanded."""


def write(comparison: Comparison, folder: Path) -> Conclusion:
    """Write report.html, report.csv and plots/*.png into a folder, replacing earlier ones, and return the conclusion.

    Works on an unfinished study, and on runs without evaluations.

    Raises:
        UserError: if trials were measured differently, or a file is damaged.
    """
    conclusion = conclude(comparison)
    save(conclusion, folder)
    return conclusion


def save(c: Conclusion, folder: Path) -> None:
    """Write the files of `write` for a conclusion already drawn."""
    plots = draw(c, folder / "plots")
    write_text(folder / "report.csv", tables.as_csv(c))
    write_text(folder / "report.html", embed(render(c, plots), c))


def render(c: Conclusion, plots: Sequence[Plot]) -> str:
    """Return the page as HTML with the plots embedded, the first of them below the answer."""
    environment = Environment(
        loader=PackageLoader("diffbench", "reports"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    rows = tables.quality(c)
    environment.filters["base64"] = lambda path: base64.b64encode(path.read_bytes()).decode()
    return environment.get_template("report.html.j2").render(
        c=c,
        plots=plots,
        verdict=tables.VERDICTS[c.outcome],
        seeds=sorted({t.seed for t in c.trials}),
        tables=tables,
        quality=rows if len(c.variants) > tables.WIDEST else transposed(rows, "metric"),
        tuning=tuning.table(c),
        variance=variance.table(c),
        published_ratio=variance.PUBLISHED_RATIO,
        ladder=ladder.tables(c),
        titles={name: title for name in c.metrics if (title := title_and_unit(name)) != name},
        best=c.ranked()[:1] if c.outcome in ("winner", "disputed") else [],
        decided=[f"{x.first} - {x.second}" for x in c.tests if x.winner],
        confidence=_confidence(c.tests),
        protocol=_protocol(c),
        metric_notes=dict.fromkeys(note for name in c.metrics if (note := metric_of(name).note)),
        counted=counted,
        most_open=MOST_OPEN,
    )


def _confidence(tests: Sequence[PairedTest]) -> str:
    """Format the range of confidence levels of the intervals: 95%, or 95% to 98.3%."""
    levels = sorted({x.paired.confidence for x in tests if x.paired.confidence is not None})
    return " to ".join(dict.fromkeys(percent(level) for level in (levels[0], levels[-1]))) if levels else ""


def _protocol(c: Conclusion) -> dict[str, str]:
    """Return facts about the measurement as label -> the distinct values of all trials, joined."""
    facts: dict[str, list[str]] = {}
    flats = [run.flat for run in {id(t.run): t.run for t in c.trials}.values() if run]
    for label, key in (
        ("data", "data.name"),
        ("process", "process.name"),
        ("noise levels of validation (log-SNR)", "validation.log_snr"),
    ):
        facts[label] = [str(flat[key]) for flat in flats if key in flat]
    records = [t.record for t in c.trials if t.record]
    for record in records:
        for label, value in _measured(record):
            if value not in (None, "", "None"):
                facts.setdefault(label, []).append(str(value))
    if not records:
        facts["samples"] = ["none are scored yet"]
    kinds = {label: list(dict.fromkeys(values)) for label, values in facts.items() if values}
    return {
        label: "; ".join(values[:6]) + (f" and {len(values) - 6} more" if len(values) > 6 else "")
        for label, values in kinds.items()
    }


def _measured(record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    sample, extractor = record.get("sample") or {}, record.get("extractor") or {}
    reference, floor = record.get("reference") or {}, record.get("floor") or {}
    counts = dict.fromkeys(name.split("@")[1] for name in record if "@" in name and not name.startswith("planted"))
    yield "images", f"{record.get('data_name', '')} {str(record.get('data', ''))[:12]}".strip()
    yield "samples scored, N", ", ".join(counts)
    yield "compared with", f"{reference.get('count')} real images ({reference.get('split', '')})" if reference else None
    yield "real images against these", f"{floor.get('count')}, {floor.get('images', '')}" if floor else None
    yield "sampler", f"{sample.get('sampler')}, {sample.get('steps')} steps" if sample else None
    yield "guidance", f"{record['guidance']:g}" if "guidance" in record else None
    yield "averaged weights (ema: decay, or half-life as a share)", record.get("ema")
    yield "labels", record.get("labels")
    yield "precision of sampling", record.get("precision")
    weights = str(extractor.get("weights"))[:12]
    yield "feature extractor", f"{extractor.get('name')}, weights {weights}" if extractor else None
    if judge := record.get("judge"):
        yield "judge of labels", f"{judge['run']}, {judge['accuracy']:.1%} of held-out images right"
    yield "versions", ", ".join(f"{k} {v}" for k, v in (record.get("versions") or {}).items())
    yield "commit", record.get("commit")
    yield "device", record.get("device")
    yield "platform", record.get("platform")
    yield "processor", record.get("processor")
    yield "threads", record.get("threads")
