"""The benchmark's arithmetic on given times, its order of measurement, and its output lines."""

import math
import time
from pathlib import Path

import pytest
import torch

from benchmarks import report, timing
from benchmarks.steps import Products, against
from benchmarks.timing import Work, peak_memory, time_alternately
from diffbench.core.errors import UserError

CPU = torch.device("cpu")
ROW = {"part": "models", "name": "DiT-S/2", "variant": "default", "work": "train", "batch": 8}


def test_spread_has_median_low_and_high() -> None:
    assert timing.spread([3.0, 1.0, 2.0, 10.0]) == {"median": 2.5, "low": 1.0, "high": 10.0, "n": 4}
    assert Work("a", list, times=[3.0, 1.0, 2.0, 10.0]).ms(0.5) == {
        "ms": 1250,
        "ms_low": 500,
        "ms_high": 5000,
        "rounds": 4,
    }


def test_ratios_are_taken_round_by_round() -> None:
    # Halving the machine's speed in the second round changes both times alike, so the ratio has no spread.
    ratio = timing.ratio([1.2, 2.4, 1.2], [1.0, 2.0, 1.0])
    assert (ratio["low"], ratio["median"], ratio["high"]) == (1.2, 1.2, 1.2)
    with pytest.raises(ValueError, match="shorter"):
        timing.ratio([1.0, 2.0], [1.0])


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_slope_of_a_power_law_is_its_exponent(power: float) -> None:
    sizes = [8, 16, 32, 64]
    assert timing.slope(sizes, [3 * s**power for s in sizes]) == pytest.approx(power)


def test_the_peak_is_the_fastest_product_by_its_median() -> None:
    products = Products("32-true", CPU, tiny=True)
    assert [work.name for work in products.works] == [
        f"{way} {size}" for size in ("128x128x128", "256x128x128") for way in ("mm", "convolution")
    ]
    for work, seconds in zip(products.works, (4e-3, 2e-3, 2e-3, 9e-3), strict=True):
        work.times += [seconds, seconds, 1.0]
    peak = products.peak()
    assert peak["product"] == "mm 256x128x128"
    assert peak["flops_per_s"] == peak["mm_flops_per_s"] == 2 * 256 * 128 * 128 / 2e-3
    found = against(peak["flops_per_s"] / 4, peak | {"mm_flops_per_s": peak["flops_per_s"] / 2})
    assert (found["share"], found["mm_share"]) == (0.25, 0.5)


def test_works_alternate_in_both_orders() -> None:
    called: list[str] = []
    works = [Work(name, lambda name=name: called.append(name)) for name in "ab"]  # type: ignore[misc]
    time_alternately(works, CPU, rounds=3, once=True)
    assert "".join(called) == "abab" + "ab" + "ba" + "ab"  # twice to warm up
    assert [len(work.times) for work in works] == [3, 3]
    assert all(t > 0 for work in works for t in work.times)


def test_work_is_prepared_before_each_measurement_and_repeated_within_it() -> None:
    called: list[str] = []
    time_alternately([Work("a", lambda: called.append("a"), lambda: called.append("p"))], CPU, rounds=2)
    assert called.count("p") == 4
    assert called.count("a") > 20  # short work is called often within a measurement


def test_only_the_first_round_starts_after_the_deadline() -> None:
    (work,) = time_alternately([Work("a", list)], CPU, rounds=5, once=True, deadline=time.monotonic() - 1)
    assert len(work.times) == 1


def test_peak_memory_counts_tensors_alive_at_the_same_time() -> None:
    with peak_memory(CPU) as peak:
        first = torch.empty(2**18)
        del first
        kept = [torch.empty(2**18), torch.empty(2**17)]
    assert len(kept) == 2
    assert peak() == 4 * (2**18 + 2**17)


def test_only_the_same_measurements_are_compared_to_a_baseline() -> None:
    now = [ROW | {"ms": 8.0}, ROW | {"work": "forward", "ms": 3.0}, {"part": "models", "name": "x", "skipped": "why"}]
    before = [ROW | {"ms": 10.0}, ROW | {"work": "forward", "batch": 4, "ms": 3.0}]
    (line,) = report.compared(now, before)
    assert line.startswith("models   DiT-S/2 train ") and line.endswith(
        "8.00 ms                        x0.800 of the baseline"
    )


def test_lines_state_the_reason_for_skipping_the_growth_and_the_share_of_peak() -> None:
    skipped = report.line(ROW | {"skipped": "out of memory"})
    assert skipped == "models   DiT-S/2 train" + " " * 39 + " skipped: out of memory"
    slopes = {"part": "growth", "name": "DiT", "variant": "depth", "time_slope": 1.0, "memory_slope": None}
    assert report.line(slopes).endswith("time ~ size^1.00, memory ~ size^-")
    speed = ROW | {"ms": 1.0, "flops_per_s": 1.2e11, "share": 0.6}
    assert report.line(speed | {"mm_share": 0.6}).endswith("120 GFLOP/s  60.0%")
    assert report.line(speed | {"mm_share": 1.2}).endswith("120 GFLOP/s  60.0% (120% of mm)")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2, "rows": []}', '{"format": 1, "rows": 3}'])
def test_a_baseline_that_is_not_a_report_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        report.load(path)
    assert str(refused.value) == f"baseline: {path}: not a benchmark report; give the JSON of an earlier benchmark"


def test_a_saved_report_is_loaded_unchanged(tmp_path: Path) -> None:
    saved = {"format": report.FORMAT, "rows": [ROW | {"ms": math.pi}]}
    report.save(saved, tmp_path / "a.json")
    assert report.load(tmp_path / "a.json") == saved
