"""The report as one HTML page that opens offline: the question, the answer, one figure, then everything behind them."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from diffbench.reports.conclusions import Conclusion, confidence
from diffbench.reports.html_style import CSS
from diffbench.reports.style import Picture
from diffbench.reports.tables import WIDEST, Rows, costs, missing, pairs, quality
from diffbench.reports.wording import better, counted, listed, short, title

MOST_OPEN = 15
"""Rows beyond which a table is folded away."""
VERDICTS = {
    "winner": "A winner",
    "disputed": "Measures disagree",
    "tie": "A tie",
    "partly": "Partly decided",
    "not decided": "Not decided",
}


def render(c: Conclusion, pictures: Sequence[Picture]) -> str:
    """The page; pictures stand inside it, the first of them below the answer."""
    first, rest = pictures[:1], pictures[1:]
    missed = missing(c)
    parts = [
        _head(c, first),
        _section("Every variant", _quality(c)),
        _section("Pair by pair", _pairs(c)) if c.contests else "",
        *(_section(p.heading, _figure(p)) for p in rest),
        _section("What it costs", _costs(c)),
        _section("Not counted", _note("These results are missing from all numbers above.") + _table(missed))
        if missed
        else "",
        _section("Notes", _list([*c.comparison.notes, *c.notes])) if c.comparison.notes or c.notes else "",
        _section("How it was measured", _protocol(c)),
        _section("How to read this", _list(_glossary(c))),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
        f"\n<title>{escape(c.comparison.title)}</title>"
        '\n<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n{''.join(parts)}</main>\n</body>\n</html>\n"
    )


def _head(c: Conclusion, first: Sequence[Picture]) -> str:
    warned = (
        ""
        if c.comparison.like_for_like
        else '<p class="warning"><b>Not like for like.</b> The variants differ in more than the question: read'
        " differences as those of whole recipes.</p>"
    )
    done, planned = sum(e.complete for e in c.entries), len(c.entries)
    seeds = len({e.result.seed for e in c.entries})
    state = "" if done == planned else f", {planned - done:,} not complete"
    sizes = f"{counted(len(c.variants), 'variant')}, {counted(seeds, 'seed')}, {counted(planned, 'result')}{state}"
    return (
        f'<header>\n<p class="eyebrow">diffbench · {sizes}</p>\n<h1>{escape(c.comparison.title)}</h1>\n'
        f'<p class="question">{escape(c.comparison.question)}</p>\n{warned}</header>\n'
        f'<section class="answer {c.outcome.replace(" ", "-")}">\n<span class="pill">{VERDICTS[c.outcome]}</span>\n'
        f'<p class="verdict">{escape(c.answer)}</p>\n{"".join(map(_figure, first))}</section>\n'
    )


def _section(heading: str, content: str) -> str:
    return f"<section>\n<h2>{escape(heading)}</h2>\n{content}</section>\n"


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    return (
        f'<figure>\n<img alt="{escape(picture.heading)}" src="data:image/png;base64,{data}">\n'
        f"<figcaption>{escape(picture.caption)}</figcaption>\n</figure>\n"
    )


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>\n'


def _list(items: Iterable[str]) -> str:
    return f"<ul>\n{''.join(f'<li>{escape(item)}</li>{chr(10)}' for item in items)}</ul>\n"


def _table(
    rows: Rows, heads: dict[str, str] | None = None, marked: Sequence[str] = (), sides: dict[str, str] | None = None
) -> str:
    """Rows under their heads, the first column as their names; long tables are folded away.

    `heads` and `sides` hold words for columns and rows, set above their names.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    top = "".join(f"<th>{_head_of(name, heads or {})}</th>" for name in names)
    body = []
    for row in rows:
        cells = "".join(f"<td>{escape(row.get(name) or '–')}</td>" for name in names[1:])
        chosen = ' class="marked"' if row[names[0]] in marked else ""
        body.append(f'<tr{chosen}><th scope="row">{_head_of(row[names[0]], sides or {})}</th>{cells}</tr>\n')
    table = (
        f'<div class="wide"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{"".join(body)}</tbody>\n</table></div>\n'
    )
    if len(rows) <= MOST_OPEN:
        return table
    return f"<details><summary>{len(rows):,} rows</summary>\n{table}</details>\n"


def _head_of(name: str, heads: dict[str, str]) -> str:
    above = heads.get(name)
    return escape(name) if above is None else f"{escape(above)}<small>{escape(name)}</small>"


def _quality(c: Conclusion) -> str:
    rows = quality(c)
    names = dict.fromkeys(name for row in rows for name in row)
    heads = {n: title(n) for n in names if "@" in n or n.startswith("val/")}
    told = (
        f"Mean over complete seeds ± half of the 95% interval of the mean, none below three seeds. The primary metric,"
        f" {title(c.metric)}, stands first ({better(c.metric)})."
    )
    best = c.ranked()[:1] if c.outcome in ("winner", "disputed") else []
    if len(c.variants) > WIDEST:
        return _note(told) + _table(rows, heads, best)
    turned = [{"metric": n} | {row["variant"]: row.get(n, "") for row in rows} for n in names if n != "variant"]
    return _note(told) + _table(turned, {}, [c.metric], {n: title(n) for n in heads})


def _pairs(c: Conclusion) -> str:
    at = confidence(c.contests)
    told = (
        f"First minus second by {title(c.metric)}, seed by seed ({better(c.metric)}). Intervals stand at"
        f" {at or 'no confidence yet'}, so that all {counted(len(c.contests), 'pair')} together claim a false"
        " difference in one comparison of twenty (Holm). Detectable is the smallest true difference that this"
        " comparison would have found with 80% power: nothing smaller is ruled out by a tie."
    )
    if any(x.by_image for x in c.contests):
        told += (
            " By image and noise: validation error paired on every held-out image, which says how sure the difference"
            " is for these trained networks, not for training them anew."
        )
        checked = [x for x in c.contests if x.resampled and x.by_image and x.by_image.interval]
        if checked:
            agree = sum((x.resampled[0] > 0 or x.resampled[1] < 0) == x.by_image.found for x in checked)  # type: ignore[index, union-attr]
            told += f" The bootstrap over images agrees in {agree} of {counted(len(checked), 'pair')}."
    decided = [f"{x.first} - {x.second}" for x in c.contests if x.winner]
    return _note(told) + _table(pairs(c), {}, decided)


def _costs(c: Conclusion) -> str:
    told = (
        "GMACs are 1e9 multiply-accumulates of one forward pass, attention included; training FLOPs are 2 x MACs x 3 x"
        " images. Seconds are of training alone, without validation, sampling and saving."
    )
    return _note(told) + _table(costs(c))


def _protocol(c: Conclusion) -> str:
    records = [e.result.record for e in c.entries if e.result.record]
    seeds = sorted({e.result.seed for e in c.entries})
    facts: dict[str, list[str]] = {"training seeds": [", ".join(map(str, seeds))]}
    runs = [e.seen.flat for e in {id(e.seen): e for e in c.entries if e.seen}.values() if e.seen]
    for label, key in (
        ("data", "data.name"),
        ("process", "process.name"),
        ("noise levels of validation (log-SNR)", "validation.log_snr"),
    ):
        facts[label] = [str(flat[key]) for flat in runs if key in flat]
    for record in records:
        for label, value in _of_record(record):
            if value not in (None, "", "None"):
                facts.setdefault(label, []).append(str(value))
    if not records:
        facts["samples"] = ["none are scored yet"]
    rows = []
    for label, values in facts.items():
        kinds = list(dict.fromkeys(values))
        more = f" and {len(kinds) - 6} more" if len(kinds) > 6 else ""
        if kinds:
            rows.append(f"<dt>{escape(label)}</dt><dd>{escape('; '.join(kinds[:6]) + more)}</dd>\n")
    return f"<dl>\n{''.join(rows)}</dl>\n"


def _of_record(record: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    sample, extractor = record.get("sample") or {}, record.get("extractor") or {}
    reference, floor = record.get("reference") or {}, record.get("floor") or {}
    counts = dict.fromkeys(name.split("@")[1] for name in record if "@" in name)
    yield "images", f"{record.get('data_name', '')} {str(record.get('data', ''))[:12]}".strip()
    yield "samples scored, N", ", ".join(counts)
    yield "compared with", f"{reference.get('count')} real images ({reference.get('split', '')})" if reference else None
    yield "real images against these", f"{floor.get('count')}, {floor.get('images', '')}" if floor else None
    yield "sampler", f"{sample.get('sampler')}, {sample.get('steps')} steps" if sample else None
    yield "guidance", f"{record['guidance']:g}" if "guidance" in record else None
    yield "decay of averaged weights (EMA)", record.get("ema")
    yield "labels", record.get("labels")
    yield "precision of sampling", record.get("precision")
    yield (
        "feature extractor",
        f"{extractor.get('name')}, weights {str(extractor.get('weights'))[:12]}" if extractor else None,
    )
    yield "versions", ", ".join(f"{k} {v}" for k, v in (record.get("versions") or {}).items())
    yield "commit", record.get("commit")
    yield "device", record.get("device")


def _glossary(c: Conclusion) -> list[str]:
    names = {short(name) for found in c.summaries.values() for name in found}
    told = [
        "A seed fixes everything random in a training run. Two variants with one seed see the same images with the same"
        " noise, so they are compared seed by seed.",
        "A tie means that the interval of the difference holds zero, or, for Fréchet distances, that the gap is under"
        " 1.3%, which training anew moves by itself. It does not mean that the variants are equal.",
    ]
    if "val/error" in names:
        told.append(
            "Validation error is the mean squared error of the denoised image on held-out images at fixed noise levels:"
            " one unit for every process and prediction."
        )
    if names & {"fd", "fid", "kid"}:
        told.append(
            "Fréchet and kernel distances compare the features of generated and real images. They depend on the number"
            " of samples and on the extractor, both of which stand in their names; what as many real images score is"
            " the floor."
        )
    if names & {"precision", "recall", "coverage"}:
        told.append(
            "Precision tells how real samples look, recall and coverage how much of the real variety they reach."
        )
    if c.comparison.baseline:
        told.append(
            f"All variants are compared with {listed([c.comparison.baseline])}, the baseline, and not with others."
        )
    return told
