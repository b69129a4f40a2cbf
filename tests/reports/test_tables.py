"""Tables of runs: rows come from the metric registry, and scores sampled differently from the config are marked."""

from pathlib import Path
from typing import Any

import pytest
from made_runs import make_run, record, save_record

from diffbench.cli import main
from diffbench.metrics.registry import METRICS, Metric
from diffbench.reports.conclusions import conclude
from diffbench.reports.export import exported
from diffbench.reports.html import render
from diffbench.reports.results import Comparison, Trial
from diffbench.reports.runs import run_facts
from diffbench.reports.tables import real_scores
from diffbench.reports.text import as_text, markdown, transposed
from diffbench.runs.lifecycle import open_any


def with_departures(made: dict[str, Any], **departures: Any) -> dict[str, Any]:
    """Return the record with departures: sampling settings that differ from the config of its run."""
    return made | {"departures": {f"sample.{key}": value for key, value in departures.items()}}


def test_scores_of_two_protocols_have_separate_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "dit-s0")
    save_record(folder, record(0.5))
    save_record(folder, with_departures(record(0.7, steps="5", guidance=3.0), steps="5", guidance=3.0))
    facts = run_facts(open_any(folder))
    assert facts["fd/digits-cnn@500"] == "0.500 (real 0.181)"
    assert facts["fd/digits-cnn@500 (guidance 3, sample.steps=5)"] == "0.700 (real 0.181)"
    save_record(folder, with_departures(record(0.9, steps="4", sampler="ddim"), sampler="ddim", steps="4"))
    facts = run_facts(open_any(folder))
    assert "fd/digits-cnn@500" not in facts
    assert facts["fd/digits-cnn@500 (sample.sampler=ddim, sample.steps=4)"] == "0.900 (real 0.181)"
    assert main(["list", str(tmp_path)]) == 0
    assert "fd/digits-cnn@500 0.9 (sample.sampler=ddim, sample.steps=4)" in capsys.readouterr().out


def test_a_floor_of_fewer_images_states_its_count_and_is_not_reported(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "dit-s0")
    made = record(0.5, judge={"run": "judge", "accuracy": 0.9}) | {"label_accuracy/judge@500": 0.8}
    made["floor"] |= {"count": 360, "label_accuracy": 0.7}
    save_record(folder, made)
    facts = run_facts(open_any(folder))
    assert facts["fd/digits-cnn@500"] == "0.500 (real 0.181 of 360)"
    assert facts["authenticity@500"] == "52.5% (real 56.0%)"
    found = real_scores(conclude(Comparison("One", "?", [Trial("dit", 0, "complete", open_any(folder), made)])))
    assert found == {"label_accuracy/judge@500": 0.9, "authenticity@500": 0.56}


def test_runs_of_one_protocol_share_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [make_run(tmp_path / f"s{n}", seed=n, overrides=[f"sample.steps={n}0"]) for n in (5, 2)]
    save_record(folders[0], record(0.5, 5))
    save_record(folders[1], with_departures(record(0.6, 2), steps="50"))
    assert main(["compare", *map(str, folders), f"out={tmp_path / 'out'}"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fd/")]
    assert rows[0].split() == ["fd/digits-cnn@500", "0.500", "(real", "0.181)", "0.600", "(real", "0.181)"]


def test_a_metric_needs_only_its_registry_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "sharpness", Metric("sharpness", "edge sharpness", "higher", digits=1, note="Sharp."))
    trials = []
    for seed in range(3):
        folder = make_run(tmp_path / f"s{seed}", seed=seed)
        made = record(0.5, seed) | {"sharpness/digits-cnn@500": 2.25 + seed}
        save_record(folder, made)
        trials.append(Trial("dit", seed, "complete", open_any(folder), made))
    facts = run_facts(open_any(folder))
    assert facts["sharpness/digits-cnn@500"] == "4.2"
    page = render(conclude(Comparison("One", "How sharp?", trials, primary="sharpness")), [])
    assert "edge sharpness<small>sharpness/digits-cnn@500</small>" in page and "<li>Sharp.</li>" in page
    assert "edge sharpness, stands first (higher is better)" in page.replace("\n", " ")


def test_a_dagger_marks_every_variant_not_shown_to_be_worse() -> None:
    def marked(seeds: int, **options: Any) -> list[str]:
        means, noise = {"base": 1.0, "a": 0.7, "b": 0.71}, [0.05, -0.04, 0.03, -0.02, 0.01]
        trials = [
            Trial(v, s, "complete", None, record(mean + noise[(s + i) % 5], s))
            for i, (v, mean) in enumerate(means.items())
            for s in range(seeds)
        ]
        c = conclude(Comparison("Made", "Which?", trials, primary="fd", **options))
        assert c.ranked()[0] == "a"
        table = [line.split(" | ") for line in exported(c, ".md").split("\n\n")[1].splitlines()]
        (row,) = (line for line in table if line[0].startswith("| fd/"))
        return [name for name, cell in zip(table[0], row, strict=True) if "†" in cell]

    assert marked(5) == ["b"]
    assert marked(5, baseline="base") == ["b"]  # tests against the baseline only
    assert marked(1) == ["base", "b"]


def test_the_primary_metric_may_be_named_with_its_extractor() -> None:
    trials = [Trial("a", 0, "complete", None, record(0.5))]
    options = (Comparison("Made", "Which?", trials, primary=name) for name in ("fd", "fd/digits-cnn", "fd/other"))
    assert [conclude(one).name for one in options] == ["fd/digits-cnn@500", "fd/digits-cnn@500", "fd/other"]


def test_variants_named_like_the_header_and_cells_with_line_breaks() -> None:
    rows = transposed([{"variant": "query", "lr": "1"}, {"variant": "key", "lr": "2"}], "key")
    assert rows == [{"(key)": "lr", "query": "1", "key": "2"}]
    assert markdown([["a", "b"], ["one\ntwo\n", "x|y"]]) == "| a | b |\n|---|---|\n| one two | x\\|y |\n"


def test_text_is_aligned_with_dashes_for_missing_values() -> None:
    rows = transposed([{"run": "a", "x": "1", "long name": "2"}, {"run": "b", "x": "30"}])
    assert as_text(rows) == "           a   b\n----------------\nx          1  30\nlong name  2   -"
