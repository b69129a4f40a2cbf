"""Intervals, Holm's correction, ties and detectable differences, checked against tables and independent formulas."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from diffbench.metrics.registry import METRICS
from diffbench.reports import statistics as s


def test_the_interval_is_students_t() -> None:
    # Tabulated t for 4 degrees of freedom, two-sided 5%: 2.776.
    found = s.summary([2.0, 4.0, 4.0, 4.0, 6.0])
    assert (found.n, found.mean) == (5, 4.0)
    assert found.sd == pytest.approx(math.sqrt(2))
    assert found.half == pytest.approx(2.776 * math.sqrt(2) / math.sqrt(5), rel=2e-4)


@pytest.mark.parametrize(("values", "sd"), [([3.0], None), ([3.0, 5.0], math.sqrt(2))])
def test_fewer_than_three_values_have_no_interval(values: list[float], sd: float | None) -> None:
    found = s.summary(values)
    assert found.half is None
    assert found.sd == (None if sd is None else pytest.approx(sd))


def test_holm_matches_an_example_worked_out_by_hand() -> None:
    # Four tests: 0.005 <= 0.05/4, 0.01 <= 0.05/3, and 0.03 > 0.05/2, where the procedure stops.
    levels, adjusted = s.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert levels == pytest.approx({"d": 0.0125, "a": 0.05 / 3, "c": 0.025, "b": 0.025})
    assert adjusted == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})


def test_tests_that_cannot_be_computed_still_count_for_holm() -> None:
    assert s.holm({"a": 0.02}, count=3)[1] == {"a": pytest.approx(0.06)}
    found = s.paired({"a": [1.0, 1.1, 0.9], "b": [1.0, 2.0], "c": []})
    assert found["a"].confidence == pytest.approx(1 - 0.05 / 3)
    assert (found["b"].n, found["b"].mean, found["b"].interval, found["b"].found) == (2, 1.5, None, False)
    assert math.isnan(found["c"].mean)


def test_a_paired_test_matches_scipy() -> None:
    first, second = [0.31, 0.36, 0.30, 0.35, 0.33], [0.28, 0.30, 0.29, 0.31, 0.32]
    shared = s.differences(dict(enumerate(first)), {**dict(enumerate(second)), 9: 1.0})
    found = s.paired({"only": shared})["only"]
    expected = stats.ttest_rel(first, second)
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.interval == pytest.approx((interval.low, interval.high))
    assert found.mean == pytest.approx(0.03)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.floats(-3, 3), min_size=3, max_size=5), min_size=1, max_size=6))
def test_a_difference_is_found_exactly_if_the_interval_excludes_zero(rows: list[list[float]]) -> None:
    for row in s.paired(dict(enumerate(rows))).values():
        assert row.interval is not None
        low, high = row.interval
        if abs(row.adjusted - s.ALPHA) > 1e-9:  # type: ignore[operator]
            assert row.found == (low > 0 or high < 0)


def test_constant_differences_are_found_unless_zero() -> None:
    found = s.paired({"zero": [0.0] * 3, "one": [1.0] * 3})
    assert (found["zero"].p, found["zero"].interval) == (1.0, (0.0, 0.0))
    assert (found["one"].found, found["one"].detectable) == (True, 0.0)
    assert s.verdict(found["zero"], True) == "tie"
    assert s.verdict(found["one"], True) == "second" and s.verdict(found["one"], False) == "first"


def test_the_detectable_difference_is_found_with_80_percent_power() -> None:
    # Cohen (1988): a one-sample two-sided t test of n = 10 at 5% finds 0.996 standard deviations with 80% power.
    assert s.detectable(1.0, 10) == pytest.approx(0.996, abs=1e-3)
    assert s.detectable(2.0, 10) == pytest.approx(2 * s.detectable(1.0, 10))
    shift = s.detectable(1.0, 5, 0.05 / 3)
    draws = np.random.default_rng(0).normal(shift, 1, (20_000, 5))
    t = draws.mean(1) / draws.std(1, ddof=1) * math.sqrt(5)
    assert (np.abs(t) > stats.t.isf(0.05 / 6, 4)).mean() == pytest.approx(0.8, abs=0.01)


def test_the_detectable_difference_by_pairs_is_found_with_80_percent_power() -> None:
    draws = np.random.default_rng(3).normal(0, 2.0, (1500, 3, 6))
    least = float(np.sqrt(np.mean([s.detectable_by_pairs(study.tolist()) ** 2 for study in draws])))  # type: ignore[operator]
    assert least == pytest.approx(s.detectable(2.0, 6, 0.05 / 3), rel=0.02)
    for gap, share in ((least, 0.8), (0.3 * least, 0.15)):
        studies = (s.paired({"one": study[0] + gap, "two": study[1], "three": study[2]}) for study in draws)
        found = np.mean([study["one"].found for study in studies])
        assert found == pytest.approx(share, abs=0.03) if gap == least else found < share
    assert s.detectable_by_pairs([]) is None and s.detectable_by_pairs([[1.0, 2.0]]) is None


@pytest.mark.parametrize(("gap", "expected"), [(0.0125, "tie"), (0.0135, "first")])
def test_small_gaps_of_frechet_distances_are_ties(gap: float, expected: str) -> None:
    jitter = (-1e-6, 0.0, 1e-6)
    pair = s.paired({"only": [-gap + j for j in jitter]})["only"]
    assert pair.found
    assert s.verdict(pair, True, tie=METRICS["fd"].tie * 1.0) == expected
    assert s.verdict(pair, True) == "first"


def test_an_untested_pair_is_undecided() -> None:
    assert s.verdict(s.paired({"only": [1.0, 1.0]})["only"], True) == "undecided"


def test_the_rate_of_false_differences_is_at_most_alpha() -> None:
    # No variant differs: of 400 comparisons of four variants (six pairs), about one in twenty may find a difference.
    draws = np.random.default_rng(1).normal(size=(400, 4, 5))
    wrong = 0
    for study in draws:
        rows = {pair: study[pair[0]] - study[pair[1]] for pair in combinations(range(4), 2)}
        wrong += any(p.found for p in s.paired({k: v.tolist() for k, v in rows.items()}).values())
    assert wrong / 400 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 400)


def test_images_are_paired_and_seeds_averaged() -> None:
    first = {0: np.array([[1.0, 2.0]]), 1: np.array([[3.0, 2.0]]), 5: np.array([[9.0, 9.0]])}
    second = {0: np.array([[0.5, 2.0]]), 1: np.array([[1.5, 1.0]])}
    assert s.by_image(first, second).tolist() == [[1.0, 0.5]]


def test_non_finite_values_are_not_tested() -> None:
    found = s.paired({"sound": [1.0, 1.1, 0.9], "astray": [1.0, float("inf"), 0.9]})
    assert found["sound"].interval is not None and found["sound"].p is not None
    assert (found["astray"].n, found["astray"].interval, found["astray"].p) == (0, None, None)
