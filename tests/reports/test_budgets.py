"""Ladders of budgets: fits, crossings and ranks with known answers, and reports of runs scored at several budgets."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from made_runs import backbones, make_run, record

from diffbench.reports import ladder
from diffbench.reports.conclusions import conclude, holds_at
from diffbench.reports.html import write
from diffbench.reports.results import Comparison, Trial
from diffbench.runs.lifecycle import open_any

BUDGETS = np.array([1e10, 3e10, 1e11, 3e11, 1e12])
VALUES = {"a": 0.5, "b": 0.9, "c": 0.7}


def test_a_fit_recovers_the_power_law_with_intervals() -> None:
    noise = np.random.default_rng(0).normal(1, 0.003, (5, 1))
    values = noise * (0.5 + 0.2 * (BUDGETS / 1e12) ** -0.4)
    found = ladder.fit(BUDGETS, values)
    assert found is not None
    for estimate, true in ((found.a, 0.5), (found.b, 0.2), (found.c, 0.4)):
        assert estimate.value == pytest.approx(true, rel=0.01)
        assert estimate.interval is not None and estimate.interval[0] <= true * 1.002
        assert estimate.interval[1] >= true * 0.998
    assert found.at(np.array([0.01])) == pytest.approx(values.mean(0)[:1], rel=1e-3)
    assert ladder.fit(BUDGETS[:3], values[:, :3]) is None
    two = ladder.fit(BUDGETS, values[:2])
    assert two is not None and two.a.interval is None


def test_crossings_are_where_the_difference_changes_sign() -> None:
    first = np.log(BUDGETS / 1e11)[None] + np.linspace(-0.2, 0.2, 5)[:, None] + 0.1  # zero at 1e11 exp(-shift)
    (found,) = ladder.crossings(BUDGETS, first, np.zeros_like(first))
    assert found.value == pytest.approx(1e11 * np.exp(-0.1), rel=1e-6)
    assert found.interval is not None
    assert 1e11 * np.exp(-0.3) < found.interval[0] < found.value < found.interval[1] < 1e11 * np.exp(0.1)
    assert ladder.crossings(BUDGETS, first + 10, np.zeros_like(first)) == []
    (at_a_rung,) = ladder.crossings(BUDGETS[:3], np.array([[-1.0, 0.0, 1.0]]), np.zeros((1, 3)))
    assert at_a_rung.value == pytest.approx(3e10)


def test_networks_of_different_sizes_cross_at_equal_flops(tmp_path: Path) -> None:
    trials: dict[int, list[Trial]] = {}
    for width, seed in product((64, 96), range(3)):
        run = open_any(
            make_run(tmp_path / f"{width}-s{seed}", "dit", seed, overrides=[f"denoiser.hidden_size={width}"])
        )
        for images in (24_576, 49_152, 98_304):
            trials.setdefault(images, []).append(Trial(str(width), seed, "complete", run, at=images))
    small, large = (np.array([rung[i].flops for rung in trials.values()], float) for i in (0, 3))
    where = float(np.sqrt(large[0] * small[-1]))
    assert small[0] < large[0] < where < small[-1] < large[-1]
    for t in (t for rung in trials.values() for t in rung):  # both fall linearly in log C, and cross at `where`
        assert t.flops is not None
        t.record = record(0.5 + {"64": 0.2, "96": 0.1}[t.variant] * np.log(where / t.flops), t.seed, t.images)
    rungs = {str(images): rung for images, rung in trials.items()}
    rows = ladder.tables(conclude(Comparison("Sizes", "Which?", trials[98_304], primary="fd", rungs=rungs)))
    found = {row["pair"]: row["FLOPs"] for row in rows["Where variants cross"] if row["metric"] == "Fréchet distance"}
    text = f"{where:.2g}".replace("e+", "e")
    assert found == {"64, 96": f"{text} [{text}, {text}]"}


def test_a_rung_counts_at_most_the_images_its_run_has_seen(tmp_path: Path) -> None:
    run = open_any(make_run(tmp_path / "run", images=24_576))
    assert [Trial("a", 0, "unfinished", run, at=at).images for at in (8192, 98_304, None)] == [8192, 24_576, 24_576]
    assert [Trial("a", 0, status, at=98_304).images for status in ("complete", "not begun")] == [98_304, 0]


def test_the_best_at_a_budget_counts_only_the_variants_it_was_tested_against() -> None:
    made = [Trial(v, s, "complete", None, record(fd + s / 100, s)) for v, fd in VALUES.items() for s in range(3)]
    early = [replace(t) for t in made]
    comparison = Comparison("Ladder", "Which?", made, primary="fd", baseline="b", rungs={"early": early, "late": made})
    c = conclude(comparison)
    assert c.rungs["late"] is c and c.rungs["early"] is not c
    assert c.answer.endswith("a at early (decided against 1 of 1), a at late (decided against 1 of 1).")


def test_rank_correlations_have_intervals_over_seeds() -> None:
    ranks = np.array([[1, 2, 3, 4], [1, 2, 4, 3], [4, 3, 2, 1], [1, 1, 2, 2]])  # columns x variants
    (row, *_) = ladder.kendall(ranks[None])
    assert [tau.value for tau in row] == pytest.approx([1, 2 / 3, -1, 4 / np.sqrt(24)])
    assert row[0].interval is None
    noise = np.random.default_rng(0).normal(size=(6, 4, 4))
    (row, *_) = ladder.kendall(ranks + 0.01 * noise)
    assert row[1].interval == pytest.approx((2 / 3, 2 / 3))
    (row, *_) = ladder.kendall(ranks + 3 * noise)
    assert row[1].interval is not None and row[1].interval[0] < row[1].interval[1] - 0.3


def test_the_report_of_a_ladder_shows_every_budget(tmp_path: Path) -> None:
    """By Fréchet distance the U-Net leads early and falls behind DiffiT after seven twelfths of the run."""
    rungs: dict[str, list[Trial]] = {}
    final = backbones(tmp_path / "runs")
    for step in (2, 4, 8, 12):
        early, images = 0.1 * (12 - step), step * 8192
        fds = {"unet": 1.5, "dit": 1.6 + 0.3 * early, "diffit": 1.0 + early}
        made = {t: record(fds[t.variant] + 0.01 * t.seed, t.seed, images) for t in final}
        rungs[f"{images:,} images"] = [replace(t, at=images, record=r) for t, r in made.items()]
    comparison = Comparison("Ladder", "Which?", rungs["98,304 images"], primary="fd", rungs=rungs)
    write(comparison, tmp_path / "out")
    c = conclude(comparison)
    assert c.answer.startswith("At 98,304 images: diffit (1.020 ± 0.020) has the lowest Fréchet distance")
    assert "The best by budget: unet at 16,384 images (decided against 2 of 2)" in c.answer
    bounds = {budget: rung.trials[0].values["val/bound"] for budget, rung in c.rungs.items()}
    assert bounds["16,384 images"] > bounds["98,304 images"] == final[0].values["val/bound"]
    (unet_diffit,) = (x for x in c.tests if (x.first, x.second) == ("unet", "diffit"))
    assert holds_at(c, unet_diffit) == ["65,536 images", "98,304 images"]
    tables = ladder.tables(c)
    assert [row["budget"] for row in tables["Fréchet distance"]] == list(rungs)
    rows = {(row["pair"], row["metric"]): row["FLOPs"] for row in tables["Where variants cross"]}
    assert final[0].cost is not None
    between = [6 * final[0].cost.macs * 8192 * step for step in (6, 8)]  # the lines are straight in log C
    assert between[0] < float(rows["unet, diffit", "Fréchet distance"].split()[0]) < between[1]
    lacking = {"unet": 0, "diffit": 1}  # each lacks a different seed; the shared seeds are paired
    for rung in c.rungs.values():
        rung.variants = {v: [t for t in ts if t.seed != lacking.get(v)] for v, ts in rung.variants.items()}
    both = [[[rung.by_seed(v, c.name)[seed] for rung in c.rungs.values()] for seed in (2, 3, 4)] for v in lacking]
    budgets = np.array([6 * final[0].cost.macs * 8192 * step for step in (2, 4, 8, 12)])
    (crossing,) = ladder.crossings(budgets, *map(np.array, both))
    rows = {(row["pair"], row["metric"]): row["FLOPs"] for row in ladder.tables(c)["Where variants cross"]}
    assert rows["unet, diffit", "Fréchet distance"] == crossing.text("{:.2g}".format)
    assert tables["Kendall's tau between budgets"][0]["98,304 images"] == "-0.33 [-0.33, -0.33]"
    assert {row["fit"] for row in tables["Fits"]} >= {"dit, validation bound", "diffit, Fréchet distance"}
    assert (tmp_path / "out" / "plots" / "ladder.png").is_file()
    page = (tmp_path / "out" / "report.html").read_text()
    assert c.answer in page and "By budget" in page and "same verdict at" in page


def test_a_metric_may_be_measured_at_the_last_budget_only(tmp_path: Path) -> None:
    final = backbones(tmp_path / "runs")
    scored = [replace(t, at=98_304, record=record(1.0 + t.seed, t.seed, 98_304)) for t in final]
    rungs = {"early": [replace(t, at=16_384, record=None) for t in final], "late": scored}
    write(Comparison("Ladder", "Which?", scored, rungs=rungs), tmp_path / "out")
    assert (tmp_path / "out" / "plots" / "ladder.png").is_file()
