"""A conclusion as rows: of quality, of pairs, of cost, of single results. Terminal, page and CSV show the same."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from diffbench.evaluation.records import values as recorded
from diffbench.reports.conclusions import Conclusion, Contest, interval
from diffbench.reports.entries import Entry
from diffbench.reports.runs import SHOWN, ruled, table
from diffbench.reports.wording import better, number, short, spread, title

WIDEST = 6
"""Variants beyond which the terminal's table turns round."""
PAIRS_SHOWN = 12
"""Pairs that the terminal shows."""
OWN = ("seed", "tag", "runs_dir", "format", "kind", "debug")
"""Keys of the config that tell no variants apart."""

Rows = list[dict[str, str]]


def shown(c: Conclusion) -> list[str]:
    """The metrics of tables: the primary one, then those worth a column, by full name."""
    names = dict.fromkeys(name for found in c.summaries.values() for name in found)
    if (
        len(c.variants) > 1
        and len({e.result.folder for e in c.entries if e.result.seed == c.entries[0].result.seed}) == 1
    ):
        names.pop("val/error", None)  # of one network, sampled differently
    told = [n for n in names if short(n) in SHOWN | {"val/error", "fd_held_out", "nearest_train"} and n != c.metric]
    return [n for n in names if n == c.metric] + told


def quality(c: Conclusion) -> Rows:
    """A row for each variant, in their order: complete seeds, then mean ± half of the 95% interval; the floor last."""
    rows = []
    for variant, found in c.variants.items():
        done = sum(e.complete for e in found)
        row = {"variant": variant, "seeds": f"{done}" if done == len(found) else f"{done} of {len(found)}"}
        for name in shown(c):
            if name in c.summaries[variant]:
                row[name] = spread(c.summaries[variant][name], name)
        rows.append(row)
    floor = floors(c)
    return [*rows, {"variant": "real images", "seeds": "", **floor}] if floor else rows


def floors(c: Conclusion) -> dict[str, str]:
    """What as many real images score, by the metrics' full names."""
    found: dict[str, str] = {}
    records = [e.result.record for e in c.entries if e.result.record and e.result.record.get("floor")]
    for name in shown(c):
        record = next((r for r in records if name in recorded(r)), None)
        if record is None:
            continue
        key = short(name).replace("fid", "fd")
        if key == "nearest_train" and "nearest_train_held_out" in record:
            found[name] = number(record["nearest_train_held_out"], name)
        elif isinstance(record["floor"].get(key), int | float):
            found[name] = number(record["floor"][key], name)
    return found


def verdict_of(x: Contest) -> str:
    """Of a pair, in words."""
    words = {"tie": "tie (under 1.3%)" if x.paired.found else "tie", "undecided": "not decided"}
    return words.get(x.verdict) or f"{x.winner} is better"


def pairs(c: Conclusion, contests: Sequence[Contest] | None = None) -> Rows:
    """A row for each pair: difference, its interval, the corrected p-value, verdict, detectable difference."""
    rows = []
    for x in c.contests if contests is None else contests:
        low, high = x.paired.interval or (0.0, 0.0)
        scale = (high - low) / 2 or None
        row = {
            "pair": f"{x.first} - {x.second}",
            "seeds": str(x.paired.n),
            "difference": number(x.paired.mean, c.metric, scale),
            "interval": interval(x.paired, c.metric),
            "p (Holm)": "-" if x.paired.adjusted is None else _p(x.paired.adjusted),
            "verdict": verdict_of(x),
            "detectable": "-" if x.detectable is None else number(x.detectable, c.metric, scale),
        }
        if x.by_image is not None:
            row["by image and noise"] = interval(x.by_image, "val/error")
        rows.append(row)
    return rows


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.0001 else "< 0.0001"


def costs(c: Conclusion) -> Rows:
    """A row for each variant: size, length and speed, of its results so far."""
    rows = []
    for variant, found in c.variants.items():
        row = {"variant": variant}
        cost = next((e.cost for e in found if e.cost is not None), None)
        if cost is not None:
            row |= {"parameters": f"{cost.parameters:,}", "GMACs": f"{cost.gmacs:.4g}"}
        begun = [e for e in found if e.seen is not None and e.seen.images_seen]
        images = [e.seen.images_seen for e in begun if e.seen]
        if images:
            row["images"] = _range([float(i) for i in images], "{:,.0f}")
        spent = [e.flops for e in begun if e.flops is not None]
        if spent:
            row["training FLOPs"] = _range(spent, "{:.3g}").replace("e+", "e")
        timed = [(e.seen.images_seen, e.seen.seconds) for e in begun if e.seen and e.seen.seconds]
        if timed:
            row["seconds"] = _range([s for _, s in timed], "{:,.0f}")
            row["images/s"] = _range([i / s for i, s in timed], "{:,.0f}")
        peak = [e.peak_gb for e in found if e.peak_gb is not None]
        if peak:
            row["peak GPU memory (GiB)"] = f"{max(peak):.2f}"
        drawn = [(e.result.record.get("drawing") or {}) for e in found if e.result.record]
        evaluations = {int(d["network_evaluations"]) for d in drawn if "network_evaluations" in d}
        if evaluations:
            row["network evaluations a sample"] = ", ".join(map(str, sorted(evaluations)))
        rows.append(row)
    return rows


def _range(values: Sequence[float], form: str) -> str:
    ends = dict.fromkeys(form.format(v) for v in (min(values), max(values)))
    return " to ".join(ends)


def missing(c: Conclusion) -> Rows:
    """A row for each result that does not count, with its reason."""
    return [
        {"variant": e.result.variant, "seed": str(e.result.seed), "status": e.result.status, "why": e.result.why or "-"}
        for e in c.entries
        if not e.complete
    ]


def differing(found: Sequence[Entry]) -> list[str]:
    """Keys of the config that are not the same in all runs, apart from seed and place."""
    flats = [e.seen.flat for e in {id(e.seen): e for e in found if e.seen}.values() if e.seen]
    keys = dict.fromkeys(key for flat in flats for key in flat)
    first = flats[0] if flats else {}
    return [k for k in keys if k not in OWN and any(f.get(k) != first.get(k) for f in flats)]


def as_csv(c: Conclusion) -> str:
    """A row for each result: what it is, what it cost, how its config differs, every value under its full name."""
    keys, names = differing(c.entries), dict.fromkeys(name for e in c.entries for name in e.values)
    rows: list[dict[str, Any]] = []
    for e in c.entries:
        record = e.result.record or {}
        sample = record.get("sample") or {}
        row: dict[str, Any] = {
            "variant": e.result.variant,
            "seed": e.result.seed,
            "status": e.result.status,
            "why": e.result.why,
            "folder": e.result.folder,
            "parameters": e.cost.parameters if e.cost else None,
            "macs": e.cost.macs if e.cost else None,
            "images": e.seen.images_seen if e.seen else None,
            "training_flops": e.flops,
            "training_seconds": e.seen.seconds if e.seen else None,
            "peak_gpu_gib": e.peak_gb,
            "sampler": sample.get("sampler"),
            "steps": sample.get("steps"),
            "guidance": record.get("guidance"),
            "network_evaluations": (record.get("drawing") or {}).get("network_evaluations"),
            "sample_seed": sample.get("seed"),
            "ema": record.get("ema"),
            "commit": record.get("commit"),
        }
        row |= {f"config.{k}": e.seen.flat.get(k) if e.seen else None for k in keys}
        rows.append(row | {name: e.values.get(name) for name in names})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["variant"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def lines(rows: Rows) -> str:
    """Rows as text, one a line, under their heads."""
    heads = list(dict.fromkeys(name for row in rows for name in row))
    return ruled([heads, *([row.get(h, "-") for h in heads] for row in rows)])


def for_terminal(c: Conclusion) -> str:
    """Answer, variants, pairs and what is missing, as text."""
    head = {
        "winner": f"WINNER BY {title(c.metric).upper()}",
        "disputed": "MEASURES DISAGREE",
        "partly": "PARTLY DECIDED",
    }
    told = [c.comparison.title, c.comparison.question, "", f"{head.get(c.outcome, c.outcome.upper())}. {c.answer}"]
    if not c.comparison.like_for_like:
        told.append("Not like for like: the variants differ in more than the question.")
    rows, cost = quality(c), {row["variant"]: row for row in costs(c)}
    if len(c.variants) <= WIDEST:
        for row in rows:
            row |= {k: v for k, v in cost.get(row["variant"], {}).items() if k in ("parameters", "GMACs", "seconds")}
        text = table([(row.pop("variant"), row) for row in rows])
    else:
        few = ["variant", "seeds", *shown(c)[:5]]
        best = [*c.ranked()[: 2 * PAIRS_SHOWN], "real images"]
        if len(rows) > 2 * len(best):
            rows = [row for row in rows if row["variant"] in best]
        text = lines([{k: v for k, v in row.items() if k in few} for row in rows])
        if len(rows) < len(c.variants):
            text += f"\nthe best of {len(c.variants):,} variants; the report has all"
    told += ["", text]
    if c.contests:
        chosen = c.contests
        if len(chosen) > PAIRS_SHOWN and (ranked := c.ranked()):
            chosen = [x for x in chosen if ranked[0] in (x.first, x.second)] or chosen
        told += ["", f"{c.metric}, paired by seed ({better(c.metric)}; intervals and p by Holm over {len(c.contests)})"]
        told.append(lines(pairs(c, chosen[: 2 * PAIRS_SHOWN])))
        if len(chosen[: 2 * PAIRS_SHOWN]) < len(c.contests):
            told.append(f"all {len(c.contests)} pairs stand in the report")
    if absent := missing(c):
        told += ["", "not counted", lines(absent[: 2 * PAIRS_SHOWN])]
    return "\n".join(told + [f"note: {note}" for note in [*c.comparison.notes, *c.notes]])
