"""The variational bound against the reference, and the exact likelihood against the closed form."""

import math

import pytest
import torch
from golden_cases import load
from mixture import Mixture
from torch import Tensor

from diffbench.diffusion import (
    EDM,
    DiscreteVP,
    EDMConfig,
    Flow,
    FlowConfig,
    Grid,
    Prediction,
    Process,
    VPConfig,
    exact_log_likelihood,
    variational_bound,
)

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


@BOTH
@pytest.mark.parametrize("clip", [True, False], ids=["clip", "noclip"])
def test_the_whole_bound_equals_the_reference(clip: bool, dtype: torch.dtype) -> None:
    case = load("bpd_loop")
    call = next(c for c in case.info["calls"] if c["args"]["clip_denoised"] == clip)
    model, noise = call["model"], case.input("noise", dtype)
    assert (model["f"], model["g"]) == ("identity", "sin")
    process = DiscreteVP(VPConfig(variance="learned_range", loss="hybrid"))

    def predict(x: Tensor, t: Tensor) -> Prediction:
        shift = model["b"] * torch.sin(t.to(dtype) / model["c"])
        eps = model["a"] * x + shift.reshape(-1, 1, 1, 1)
        return process.convert(torch.cat([eps, model["d"] * torch.sin(x)], dim=1), x, t)

    tables = process.tables.respaced(case.info["constructor"]["args"]["use_timesteps"]["section_counts"])
    x0 = case.input("x_start", dtype)
    bound = variational_bound(predict, x0, tables, lambda k: noise[k], variance="learned_range", clip=clip)
    prefix = "clip" if clip else "noclip"
    for name, got in (
        ("total_bpd", bound.total),
        ("prior_bpd", bound.prior),
        ("vb", bound.terms),
        ("xstart_mse", bound.x0_error),
        ("mse", bound.eps_error),
    ):
        case.check(f"{prefix}.{name}", got)


MIXTURE = Mixture((1, 2, 2))
PROCESSES: dict[str, tuple[Process, int]] = {
    "vp": (DiscreteVP(VPConfig()), 1000),
    "vp cosine": (DiscreteVP(VPConfig(schedule="cosine")), 500),
    "edm": (EDM(EDMConfig()), 256),
    "flow": (Flow(FlowConfig()), 128),
    "flow gvp": (Flow(FlowConfig(path="gvp")), 128),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_the_exact_likelihood_equals_the_mixtures_density(name: str) -> None:
    process, steps = PROCESSES[name]
    x0 = MIXTURE.draw(10)
    # Probes along each axis, scaled so that their estimates average to the exact divergence.
    axes = 2 * torch.eye(4, dtype=torch.float64).reshape(4, 1, 2, 2)
    images, probes = x0.repeat_interleave(4, 0), axes.repeat(10, 1, 1, 1)
    got = exact_log_likelihood(MIXTURE.denoiser(process), images, process.grid(steps), probes).reshape(10, 4).mean(1)
    assert ((got - MIXTURE.log_density(x0)) / 4).abs().max() < 0.01


@pytest.mark.parametrize("name", ["vp cosine", "edm", "flow"])
def test_hutchinsons_estimate_agrees_within_its_error(name: str) -> None:
    process = PROCESSES[name][0]
    x0, count = MIXTURE.draw(10), 64
    images = x0.repeat_interleave(count, 0)
    signs = torch.randint(2, images.shape, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    got = exact_log_likelihood(MIXTURE.denoiser(process), images, process.grid(128), signs)
    off = (got.reshape(10, count) - MIXTURE.log_density(x0)[:, None]) / 4
    assert (off.mean() / (off.std() / off.numel() ** 0.5)).abs() < 3
    assert off.mean().abs() < 0.01


def test_a_path_that_starts_at_a_noisy_image_gives_the_density_there() -> None:
    # The image is scaled by the first point's alpha, so its density is that of the scaled image times alpha^dimensions.
    process, x0 = Flow(FlowConfig()), MIXTURE.draw(10)
    grid = Grid(process.path(torch.linspace(0, 0.8, 129, dtype=torch.float64)), open_end=False)
    axes = 2 * torch.eye(4, dtype=torch.float64).reshape(4, 1, 2, 2)
    images, probes = x0.repeat_interleave(4, 0), axes.repeat(10, 1, 1, 1)
    got = exact_log_likelihood(MIXTURE.denoiser(process), images, grid, probes).reshape(10, 4).mean(1)
    want = MIXTURE.log_density(0.8 * x0, alpha=0.8, sigma=0.2) + 4 * math.log(0.8)
    assert ((got - want) / 4).abs().max() < 1e-3


def test_likelihoods_keep_no_autograd_graph() -> None:
    process, grid = PROCESSES["flow"][0], PROCESSES["flow"][0].grid(4)
    x0 = MIXTURE.draw(2)
    assert not exact_log_likelihood(MIXTURE.denoiser(process), x0, grid, torch.ones_like(x0)).requires_grad


def test_reversed_grids_start_where_the_network_is_defined() -> None:
    flow, edm = Flow(FlowConfig()).grid(4).reversed(), EDM(EDMConfig()).grid(4).reversed()
    assert flow.points.time.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert edm.points.sigma[[0, -1]].tolist() == pytest.approx([0.002, 80.0])
    vp = DiscreteVP(VPConfig()).grid(4).reversed()
    assert vp.points.time.tolist() == [0, 333, 666, 999]
