"""The arithmetic of the benchmark on given times, its order of measuring, and what it counts."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import relu, scaled_dot_product_attention

from benchmarks import figures, show
from benchmarks.clock import Work, in_turns, peak_memory
from benchmarks.loop import idle
from benchmarks.machine import check_quiet
from benchmarks.roofline import roofline
from diffbench.core.errors import UserError

CPU = torch.device("cpu")
ROW = {"part": "models", "name": "DiT-S/2", "variant": "default", "work": "train", "batch": 8}


def test_spread_is_median_and_ends() -> None:
    found = figures.spread([3.0, 1.0, 2.0, 10.0])
    assert (found.median, found.low, found.high, found.n) == (2.5, 1.0, 10.0, 4)
    assert found.relative == 3.6
    assert found.scaled(1e3).median == 2500
    with pytest.raises(ValueError, match="no measurements: a median needs at least one"):
        figures.spread([])


def test_a_training_step_counts_three_passes_of_two_operations_a_mac() -> None:
    assert figures.flops(6.06e9, 8, figures.PASSES["train"]) == pytest.approx(2 * 3 * 8 * 6.06e9)
    assert figures.PASSES == {"forward": 1, "train": 3, "sample": 1}
    assert figures.share(150e9, 200e9) == 0.75
    with pytest.raises(ValueError, match="peak: must be positive, got 0"):
        figures.share(1.0, 0)


def test_ratios_and_differences_are_taken_pair_by_pair() -> None:
    # A machine twice as slow in the second round changes both alike: no ratio of medians would be as narrow.
    ratio = figures.ratio([1.2, 2.4, 1.2], [1.0, 2.0, 1.0])
    assert (ratio.low, ratio.median, ratio.high) == (1.2, 1.2, 1.2)
    assert figures.differences([1.5, 2.5], [1.0, 1.5]).median == 0.75
    with pytest.raises(ValueError, match="shorter"):
        figures.ratio([1.0, 2.0], [1.0])


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_slope_of_a_power_is_its_exponent(power: float) -> None:
    sizes = [8, 16, 32, 64]
    assert figures.slope(sizes, [3 * s**power for s in sizes]) == pytest.approx(power)
    with pytest.raises(ValueError, match="a slope needs two positive sizes and values"):
        figures.slope([8, 8], [1.0, 2.0])


def test_what_intervals_cover_counts_overlaps_once() -> None:
    kernels = [(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.0)]
    assert figures.covered(kernels) == 4.0
    assert idle(kernels) == pytest.approx(2 / 6)
    assert idle(kernels, after=0.5) == pytest.approx(2 / 3)
    assert (idle([]), figures.covered([])) == (1.0, 0.0)


def test_changes_since_a_baseline_are_of_the_same_measurements() -> None:
    now = [ROW | {"ms": 8.0}, ROW | {"work": "forward", "ms": 3.0}, {"part": "models", "name": "x", "skipped": "why"}]
    before = [ROW | {"ms": 10.0}, ROW | {"work": "forward", "batch": 4, "ms": 3.0}]
    assert figures.changes(now, before) == {figures.key_of(ROW): 0.8}
    (line,) = show.compared(now, before)
    assert line.startswith("models   DiT-S/2 train ") and line.endswith(
        "8.00 ms                        x0.800 of the baseline"
    )


def test_works_take_turns_in_both_orders() -> None:
    called: list[str] = []
    works = [Work(name, lambda name=name: called.append(name)) for name in "ab"]  # type: ignore[misc]
    in_turns(works, CPU, rounds=3, once=True)
    assert "".join(called) == "abab" + "ab" + "ba" + "ab"  # twice to warm up
    assert [len(work.times) for work in works] == [3, 3]
    assert all(t > 0 for work in works for t in work.times)


def test_a_work_is_prepared_before_each_measurement_and_repeated_within_it() -> None:
    called: list[str] = []
    in_turns([Work("a", lambda: called.append("a"), lambda: called.append("p"))], CPU, rounds=2)
    assert called.count("p") == 4
    assert called.count("a") > 20  # so short a work is called often in a measurement


def test_peak_memory_is_what_lives_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with peak_memory(CPU) as peak:
        first = torch.empty(2**18)
        del first
        kept = [torch.empty(2**18), torch.empty(2**17)]
    assert len(kept) == 2
    assert peak() == 4 * (2**18 + 2**17)
    assert capfd.readouterr().err == ""


def test_the_roofline_of_a_product_and_of_what_only_moves_bytes() -> None:
    a, b = torch.ones(64, 32), torch.ones(32, 16)
    product, moved = 2 * 64 * 32 * 16, 4 * (64 * 32 + 32 * 16 + 64 * 16)
    found = roofline(lambda: a @ b, product_rate=1e9, copy_rate=1e3)
    assert (found.flops, found.bytes) == (product, moved)
    assert found.operators == found.products == pytest.approx(moved / 1e3)
    fast = roofline(lambda: a @ b, product_rate=1e3, copy_rate=1e9)
    assert fast.products == pytest.approx(product / 1e3)
    through = roofline(lambda: relu(a.view(32, 64)), 1e9, 1e3)  # a view moves nothing
    assert (through.flops, through.products) == (0, 0.0)
    assert through.operators == pytest.approx(2 * a.nbytes / 1e3)


def test_the_roofline_counts_attention_on_a_cpu_too() -> None:
    q = torch.ones(2, 3, 16, 8, requires_grad=True)
    forward = 2 * 2 * 2 * 3 * 16 * 16 * 8  # two products
    found = roofline(lambda: scaled_dot_product_attention(q, q, q), 1.0, 1.0)
    assert found.flops == forward
    both = roofline(lambda: scaled_dot_product_attention(q, q, q).sum().backward(), 1.0, 1.0)
    assert both.flops == pytest.approx(3.5 * forward)  # the backward pass computes the scores once more


def test_a_busy_machine_is_refused_unless_forced() -> None:
    check_quiet(force=False, load=0.5)
    check_quiet(force=True, load=9.0)
    with pytest.raises(UserError) as refused:
        check_quiet(force=False, load=0.51)
    assert str(refused.value).startswith(
        "force: the load average is 0.51, above 0.5: other processes would be measured"
    )


def test_a_line_says_why_something_was_skipped_and_what_grew() -> None:
    assert (
        show.line(ROW | {"skipped": "out of memory"}) == "models   DiT-S/2 train" + " " * 39 + " skipped: out of memory"
    )
    slopes = {"part": "growth", "name": "DiT", "variant": "depth", "time_slope": 1.0, "memory_slope": None}
    assert show.line(slopes).endswith("time ~ size^1.00, memory ~ size^-")
    speed = ROW | {"ms": 1.0, "flops_per_s": 1.2e11, "share": 0.6}
    assert show.line(speed | {"mm_share": 0.6}).endswith("120 GFLOP/s  60.0%")
    assert show.line(speed | {"mm_share": 1.2}).endswith("120 GFLOP/s  60.0% (120% of mm)")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2, "rows": []}', '{"format": 1, "rows": 3}'])
def test_a_baseline_that_is_no_report_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        show.load(path)
    assert str(refused.value) == f"baseline: {path}: no report of diffbench bench; name a JSON that it wrote"


def test_a_report_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    report = {"format": show.FORMAT, "rows": [ROW | {"ms": math.pi}]}
    show.save(report, tmp_path / "a.json")
    assert show.load(tmp_path / "a.json") == report
