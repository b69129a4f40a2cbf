"""Variance components checked against known truth: unbiased, summing to the total, with intervals that cover it."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_runs import backbones, record

from diffbench.reports.html import write
from diffbench.reports.results import Comparison
from diffbench.reports.tables import for_terminal
from diffbench.reports.variance import components, table
from diffbench.studies.comparison import comparison_of_csv


def drawn(
    training: float, sampling: float, n: int = 10, k: int = 5, studies: int = 1000, seed: int = 0
) -> list[np.ndarray]:
    """Draw the scores of many studies whose components have the given standard deviations."""
    draw = np.random.default_rng(seed).normal
    return list(5 + training * draw(size=(studies, n, 1)) + sampling * draw(size=(studies, n, k)))


@pytest.mark.parametrize(("training", "sampling"), [(3.2, 1.0), (1.0, 1.0), (0.3, 1.0)])
def test_components_are_unbiased_sum_to_the_total_and_intervals_cover_the_truth(
    training: float, sampling: float
) -> None:
    found = [components(values) for values in drawn(training, sampling)]
    truth = {"training": training**2, "sampling": sampling**2, "ratio": training / sampling}
    truth["total"] = truth["training"] + truth["sampling"]
    for name, true in truth.items():
        estimates = [getattr(c, name) for c in found]
        if name != "ratio":
            # A small component is biased upwards because it is cut off at zero; the total is not.
            loose = 0.3 if training < sampling and name == "training" else 0.05
            assert np.mean([e.value for e in estimates]) == pytest.approx(true, rel=loose)
        covered = np.mean([e.interval[0] <= true <= e.interval[1] for e in estimates])
        assert 0.93 <= covered <= 0.98, (name, covered)
    for c in found[:20]:
        assert c.sampling and c.training.value + c.sampling.value == pytest.approx(c.total.value)
    single = np.mean([values[:, 0].var(ddof=1) for values in drawn(training, sampling)])  # one score per network
    assert np.mean([c.total.value for c in found]) == pytest.approx(single, rel=0.05)


def test_components_match_a_table_worked_out_by_hand() -> None:
    # Row means 2, 4, 9; mean squares 3 * 13 = 39 between (2 df) and 18 / 6 within (6 df).
    found = components(np.array([[1.0, 2, 3], [3, 4, 5], [7, 8, 12]]))
    within = (2 + 2 + 14) / 6
    assert found.sampling and found.sampling.value == pytest.approx(within)
    assert found.training.value == pytest.approx((39 - within) / 3)
    assert found.ratio and found.ratio.value == pytest.approx(math.sqrt((39 - within) / 3 / within))
    none = components(np.array([[1.0, 5], [5, 1], [1, 5]]))  # identical row means
    assert (
        none.training.value == 0 and none.sampling and none.sampling.value == pytest.approx(np.var([1, 5] * 3, ddof=1))
    )
    same = components(np.array([[1.0, 1], [2, 2], [4, 4]]))
    assert same.ratio and same.ratio.value == math.inf and same.total.value == same.training.value
    two = components(np.array([[1.0, 2], [3, 4]]))
    assert two.total.interval is None
    alone = components(np.array([[1.0], [2], [4]]))
    assert alone.sampling is None and alone.training == alone.total and alone.total.value == pytest.approx(7 / 3)


def test_the_report_of_networks_sampled_several_times_shows_the_components(tmp_path: Path) -> None:
    made, (training, sampling) = [], np.random.default_rng(0).normal(size=(2, 50))
    for i, t in enumerate(backbones(tmp_path / "runs")):
        scores = 20 + 0.6 * training[i] + 0.2 * sampling[3 * i : 3 * i + 3]
        first, *more = [record(float(fd), t.seed + 1_000_000 * k, t.images) for k, fd in enumerate(scores)]
        made.append(replace(t, record=first, more=more))
    c = write(Comparison("Lottery", "How much is luck?", made, primary="fd"), tmp_path / "out")
    seeds = len({t.seed for t in made})
    rows = {row["variant"]: row for row in table(c)}
    row, bound = rows["dit, Fréchet distance"], rows["dit, validation bound"]
    assert row["seeds"] == f"{seeds} x 3" and bound["seeds"] == f"{seeds} x 1" and "sampling" not in bound
    dit = [[r[c.name] for r in t.records] for t in made if t.variant == "dit"]
    ratio = components(np.array(dit)).ratio
    assert ratio and float(row["training / sampling"].split()[0]) == pytest.approx(ratio.value, rel=0.06)
    assert c.summaries["dit"][c.name].mean == pytest.approx(np.mean(dit))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Where the scatter comes from" in page and row["training"] in page and "moves it 3.2 times" in page
    assert c.luck.startswith(f"With {seeds} seeds, a difference in Fréchet distance below ") and c.luck in page
    assert row["total"] in for_terminal(c)
    again = comparison_of_csv(tmp_path / "out" / "report.csv", Path("experiments/studies/lottery.yaml"))
    assert [t.values[c.name] for t in again.trials] == [t.values[c.name] for t in made]
    assert [len(t.more) for t in again.trials] == [2] * len(made)
