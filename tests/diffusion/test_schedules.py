"""Schedules and respacing against the reference tables."""

from typing import Any

import pytest
import torch
from golden_cases import load
from torch import Tensor

from diffbench.diffusion.schedules import SCHEDULES, Tables, space_timesteps

TABLES = [
    "tables_linear_T1000",
    "tables_cosine_T1000",
    "tables_linear_T200",
    "tables_linear_T1000_spaced_250",
    "tables_cosine_T1000_spaced_ddim25",
]
SPACING = load("space_timesteps").info["calls"]


def build(arguments: dict[str, Any]) -> Tables:
    """Build the tables that a case's constructor describes."""
    betas = arguments["betas"]
    tables = Tables.from_betas(SCHEDULES[betas["schedule_name"]](betas["num_diffusion_timesteps"]))
    spacing = arguments.get("use_timesteps")
    return tables.respaced(spacing["section_counts"]) if spacing else tables


def derived(tables: Tables) -> dict[str, Tensor]:
    """Compute the functions of alphas_cumprod that the reference stores as separate tables."""
    bar = tables.alphas_cumprod
    return {
        "alphas_cumprod_next": torch.cat([bar[1:], bar.new_zeros(1)]),
        "sqrt_alphas_cumprod": bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - bar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - bar).log(),
        "sqrt_recip_alphas_cumprod": (1 / bar).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / bar - 1).sqrt(),
        "timestep_map": tables.time,
    }


def request(arguments: dict[str, Any]) -> tuple[int, str]:
    """Convert a case's arguments to ours: counts are comma-separated text."""
    counts = arguments["section_counts"]
    text = counts if isinstance(counts, str) else ",".join(str(count) for count in counts)
    return arguments["num_timesteps"], text


@pytest.mark.parametrize("name", TABLES)
def test_tables_equal_the_reference(name: str) -> None:
    case = load(name)
    tables = build(case.info["constructor"]["args"])
    names = case.info["calls"][0]["outputs"]
    assert len(names) >= 13
    for output in names:
        case.check(output, getattr(tables, output) if hasattr(tables, output) else derived(tables)[output])


@pytest.mark.parametrize("call", [c for c in SPACING if "raises" not in c], ids=lambda c: str(c["args"]))
def test_kept_steps_equal_the_reference(call: dict[str, Any]) -> None:
    load("space_timesteps").check(call["name"], space_timesteps(*request(call["args"])))


@pytest.mark.parametrize("call", [c for c in SPACING if "raises" in c], ids=lambda c: str(c["args"]))
def test_requests_that_the_reference_refuses_are_refused(call: dict[str, Any]) -> None:
    total, counts = request(call["args"])
    with pytest.raises(ValueError, match=f"{total}.*|{counts}"):
        space_timesteps(total, counts)


def test_fractional_strides_are_summed_before_rounding() -> None:
    # 250 of 1000: the stride is 999/249, which is not a binary fraction.
    assert space_timesteps(1000, 250)[[0, 1, 2, 124, 125, 249]].tolist() == [0, 4, 8, 497, 502, 999]
    # With a stride of 2.5 every other step falls half-way and is rounded to the even number.
    assert space_timesteps(11, 5).tolist() == [0, 2, 5, 8, 10]


def test_every_possible_count_is_met_and_includes_both_ends() -> None:
    for total in (2, 7, 30, 57, 100):
        for count in range(2, total + 1):
            kept = space_timesteps(total, count)
            assert len(kept) == count
            assert (kept[0].item(), kept[-1].item()) == (0, total - 1)
            assert 0 <= (kept.diff().max() - kept.diff().min()).item() <= 1
            assert kept.diff().min() >= 1


def test_a_number_and_its_text_give_the_same_steps() -> None:
    assert torch.equal(space_timesteps(1000, 10), space_timesteps(1000, "10"))
    assert space_timesteps(1000, "ddim10").tolist() == list(range(0, 1000, 100))


@pytest.mark.parametrize(
    ("total", "counts", "text"),
    [
        (1000, "0", "'0'"),
        (1000, 0, "'0'"),
        (1000, "-5", "'-5'"),
        (1000, "", "''"),
        (1000, "ten", "'ten'"),
        (1000, "ddim", "'ddim'"),
        (1000, "10,,20", "'10,,20'"),
        (1000, "2.5", "'2.5'"),
        (1000, "ddim600", "exactly 600 of 1000"),
        (10, "20", "20 of 10 steps"),
        (30, "10,11,10", "11 of 10 steps"),
    ],
)
def test_impossible_requests_are_refused(total: int, counts: str | int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        space_timesteps(total, counts)


@pytest.mark.parametrize("betas", [[0.0, 0.5], [0.5, 1.5], [-0.1, 0.5], [float("nan"), 0.5]])
def test_betas_outside_their_range_are_refused(betas: list[float]) -> None:
    with pytest.raises(ValueError, match=r"betas must lie in \(0, 1\]"):
        Tables.from_betas(torch.tensor(betas))


def test_respacing_to_every_step_changes_nothing() -> None:
    tables = Tables.from_betas(SCHEDULES["cosine"](100))
    same = tables.respaced(100)
    assert torch.equal(same.time, tables.time)
    assert (same.betas - tables.betas).abs().max() < 1e-12
    assert (same.alphas_cumprod - tables.alphas_cumprod).abs().max() < 1e-14


def test_respacing_twice_keeps_the_original_times() -> None:
    tables = Tables.from_betas(SCHEDULES["linear"](1000))
    twice = tables.respaced(100).respaced("ddim10")
    assert torch.equal(twice.time, tables.respaced(100).time[::10])
    assert (twice.alphas_cumprod - tables.alphas_cumprod[twice.time]).abs().max() < 1e-14


def test_a_process_of_one_step_is_valid() -> None:
    one = Tables.from_betas(SCHEDULES["linear"](1000)).respaced(1)
    assert len(one) == 1
    assert all(bool(torch.isfinite(v).all()) for v in (one.posterior_log_variance_clipped, one.posterior_mean_coef1))
    assert one.posterior_mean_coef1.item() == 1.0  # with no noise left to keep, the mean is the image
    assert one.posterior_mean_coef2.item() == 0.0


def test_tables_stay_float64_when_they_move() -> None:
    moved = Tables.from_betas(SCHEDULES["linear"](20)).to("cpu")
    assert moved.betas.dtype == torch.float64
    assert moved.time.dtype == torch.int64
