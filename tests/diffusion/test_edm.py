"""The EDM process and its samplers against the reference, and its noise levels."""

import math

import pytest
import torch
from golden_cases import load
from torch import Tensor

from diffbench.diffusion import EDM, EDMConfig, Flow, FlowConfig, Prediction, heun

CASE = load("edm_process")
ARGUMENTS = CASE.info["arguments"]


def precondition_check(name: str, got: Tensor) -> None:
    """Check a float64 result against the reference's float32 one."""
    CASE.check(name, got.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_preconditioning_and_loss_equal_the_reference(dtype: torch.dtype) -> None:
    process = EDM(EDMConfig(sigma_data=ARGUMENTS["sigma_data"]))
    x0, eps, t, out = (CASE.input(n, dtype) for n in ("x0", "noise", "sigma", "network_output"))
    x_t = process.add_noise(x0, t, eps)
    seen, time = process.inputs(x_t, t)
    precondition_check("network_input", seen)
    precondition_check("c_noise", time)
    precondition_check("denoised", process.convert(out, x_t, t).x0)
    precondition_check("loss", process.losses(out, x0, t, eps))


def test_the_loss_is_the_weighted_error_of_the_image() -> None:
    process = EDM(EDMConfig())
    x0, eps, t, out = (CASE.input(n, torch.float64) for n in ("x0", "noise", "sigma", "network_output"))
    error = (process.convert(out, process.add_noise(x0, t, eps), t).x0 - x0).square().flatten(1).mean(1)
    weight = (t**2 + 0.25) / (0.5 * t) ** 2
    assert (process.losses(out, x0, t, eps) / (weight * error) - 1).abs().max() < 1e-12


def closed_form(x: Tensor, t: Tensor) -> Prediction:
    """Predict with the denoiser whose formula the case states."""
    data, sigma = ARGUMENTS["sigma_data"], t.reshape(-1, 1, 1, 1)
    denoised = data**2 / (data**2 + sigma**2) * x + 0.3 * torch.sin(x) * sigma / (1 + sigma)
    return Prediction(denoised, (x - denoised) / sigma)


def test_noise_levels_and_heun_equal_the_reference() -> None:
    a = ARGUMENTS
    grid = EDM(EDMConfig(sigma_min=a["sigma_min"], sigma_max=a["sigma_max"], rho=a["rho"])).grid(a["num_steps"])
    allowed = CASE.info["tolerances"]
    noise = CASE.input("churn_noise", torch.float64)
    churn = {key: a[key.replace("s_", "S_")] for key in ("s_churn", "s_min", "s_max", "s_noise")}
    start = grid.start(CASE.input("latents", torch.float64))
    for name, got in (
        ("sigmas", grid.points.sigma),
        ("heun", heun(closed_form, start, grid, lambda k: noise[k])),
        ("heun_churn", heun(closed_form, start, grid, lambda k: noise[k], **churn)),
    ):
        want, limit = CASE.tensors[f"out64.{name}"], allowed[f"out64.{name}"]
        assert ((got - want).abs() <= limit["atol"] + limit["rtol"] * want.abs()).all(), name


def test_noise_is_drawn_only_where_it_is_churned() -> None:
    grid, noisy_steps = EDM(EDMConfig()).grid(10), []

    def noise(k: int) -> Tensor:
        noisy_steps.append(k)
        return torch.zeros(1, 1, 2, 2, dtype=torch.float64)

    start = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    heun(closed_form, start, grid, noise)
    assert noisy_steps == []
    heun(closed_form, start, grid, noise, s_churn=5.0, s_min=0.05, s_max=50)
    inside = (grid.points.sigma >= 0.05) & (grid.points.sigma <= 50)
    assert noisy_steps == inside.nonzero().flatten().tolist()
    flow = Flow(FlowConfig()).grid(10)
    with pytest.raises(ValueError, match="s_churn needs the edm process"):
        heun(closed_form, start, flow, noise, s_churn=5.0)


def test_training_levels_are_log_normal() -> None:
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    logs = EDM(EDMConfig()).time(u).log()
    assert (logs.mean().item(), logs.std().item()) == pytest.approx((-1.2, 1.2), abs=1e-3)
    edge = EDM(EDMConfig()).time(torch.tensor([0.0, 1.0]))
    assert bool((edge > 0).all() and edge.isfinite().all())


def test_noise_levels_fall_to_the_smallest_and_end_at_zero() -> None:
    sigma = EDM(EDMConfig()).grid("18").points.sigma
    assert sigma[[0, 17, 18]].tolist() == pytest.approx([80.0, 0.002, 0.0])
    assert bool((sigma.diff() < 0).all())
    assert EDM(EDMConfig()).grid(1).points.sigma.tolist() == pytest.approx([80.0, 0.0])
    for steps in ("0", "ddim25", "10,20", "-3"):
        with pytest.raises(ValueError, match=r"steps must be a number of at least 1 .*, got"):
            EDM(EDMConfig()).grid(steps)


def test_the_network_sees_unit_variance() -> None:
    process = EDM(EDMConfig())
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(4, 1, 200, 200, dtype=torch.float64, generator=generator) for _ in range(2))
    t = torch.tensor([0.002, 0.3, 2.0, 80.0], dtype=torch.float64)
    seen, time = process.inputs(process.add_noise(0.5 * x0, t, eps), t)
    assert (seen.flatten(1).std(1) - 1).abs().max() < 0.02
    assert (process.target(0.5 * x0, t, eps).flatten(1).std(1) - 1).abs().max() < 0.02
    assert time[3].item() == pytest.approx(math.log(80) / 4)


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sigma_min: must lie between 0 and process\.sigma_max=1, got 2"):
        EDMConfig(sigma_min=2, sigma_max=1)
    with pytest.raises(ValueError, match="sigma_data: must be positive, got 0"):
        EDMConfig(sigma_data=0)
