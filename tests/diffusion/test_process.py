"""The variance-preserving process: noising, conversions and the loss against the reference, and their algebra."""

import pytest
import torch
from golden_cases import load
from mixture import normal
from torch import Tensor

from diffbench.diffusion.vp import DiscreteVP, VPConfig

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
PREDICTIONS = pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
SCHEDULE = pytest.mark.parametrize("schedule", ["linear", "cosine"])


def per_sample(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Expand the table entry of each sample over its pixels, as the reference does."""
    return table[t].to(like.dtype).reshape(-1, 1, 1, 1).expand_as(like)


@BOTH
def test_noising_equals_the_reference(dtype: torch.dtype) -> None:
    case, process = load("q_process"), DiscreteVP(VPConfig())
    x0, t, eps = case.input("x_start", dtype), case.input("t"), case.input("noise", dtype)
    case.check("q_sample", process.add_noise(x0, t, eps))
    alpha, sigma = process.alpha_sigma(t, x0)
    case.check("q_mean_variance.mean", alpha * x0)
    case.check("q_mean_variance.variance", sigma.square().expand_as(x0))
    case.check("q_mean_variance.log_variance", sigma.square().log().expand_as(x0))


@BOTH
def test_conversions_equal_the_reference(dtype: torch.dtype) -> None:
    case = load("q_process")
    x0, x_t, t, eps = (case.input(n, dtype) for n in ("x_start", "x_t", "t", "eps"))
    case.check("predict_xstart_from_eps", DiscreteVP(VPConfig(prediction="eps")).convert(eps, x_t, t).x0)
    case.check("predict_eps_from_xstart", DiscreteVP(VPConfig(prediction="x0")).convert(x0, x_t, t).eps)


@BOTH
def test_posterior_equals_the_reference(dtype: torch.dtype) -> None:
    case, tables = load("q_process"), DiscreteVP(VPConfig()).tables
    x0, x_t, t = case.input("x_start", dtype), case.input("x_t", dtype), case.input("t")
    means = [tables.posterior_mean(int(i), a, b) for i, a, b in zip(t, x0, x_t, strict=True)]
    case.check("q_posterior.mean", torch.stack(means))
    case.check("q_posterior.variance", per_sample(tables.posterior_variance, t, x0))
    log_variance = per_sample(tables.posterior_log_variance_clipped, t, x0)
    case.check("q_posterior.log_variance_clipped", log_variance)


@BOTH
def test_loss_and_its_gradient_equal_the_reference(dtype: torch.dtype) -> None:
    case, process = load("loss_mse_fixed"), DiscreteVP(VPConfig())
    out = case.input("model_out", dtype).requires_grad_()
    losses = process.losses(out, case.input("x_start", dtype), case.input("t"), case.input("noise", dtype))
    losses.sum().backward()
    assert out.grad is not None
    case.check("loss", losses.detach())
    case.check("mse", losses.detach())
    case.check("grad_model_out", out.grad)


@PREDICTIONS
def test_a_perfect_output_gives_back_image_and_noise(prediction: str) -> None:
    process = DiscreteVP(VPConfig(prediction=prediction))  # type: ignore[arg-type]
    t = torch.tensor([0, 1, 250, 999])
    x0, eps = normal(4, 3, 4, 4), normal(4, 3, 4, 4, seed=1)
    target = process.target(x0, t, eps)
    back = process.convert(target, process.add_noise(x0, t, eps), t)
    assert (back.x0 - x0).abs().max() < 1e-12
    assert (back.eps - eps).abs().max() < 1e-12
    assert torch.equal(process.losses(target, x0, t, eps), torch.zeros(4, dtype=torch.float64))


@PREDICTIONS
def test_any_output_converts_to_a_pair_that_makes_up_the_noisy_image(prediction: str) -> None:
    process = DiscreteVP(VPConfig(prediction=prediction))  # type: ignore[arg-type]
    t = torch.tensor([0, 40, 600, 999])
    x_t, out = normal(4, 2, 3, 3), normal(4, 2, 3, 3, seed=1)
    pair = process.convert(out, x_t, t)
    alpha, sigma = process.alpha_sigma(t, x_t)
    assert (alpha * pair.x0 + sigma * pair.eps - x_t).abs().max() < 1e-12


def test_targets_match_their_names() -> None:
    x0, eps, t = normal(2, 1, 2, 2), normal(2, 1, 2, 2, seed=1), torch.tensor([3, 700])
    assert torch.equal(DiscreteVP(VPConfig(prediction="eps")).target(x0, t, eps), eps)
    assert torch.equal(DiscreteVP(VPConfig(prediction="x0")).target(x0, t, eps), x0)
    process = DiscreteVP(VPConfig(prediction="v"))
    bar = process.tables.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    assert (process.target(x0, t, eps) - (bar.sqrt() * eps - (1 - bar).sqrt() * x0)).abs().max() < 1e-13


def test_the_loss_is_a_mean_over_each_sample() -> None:
    process = DiscreteVP(VPConfig(prediction="x0"))
    x0 = torch.zeros(2, 1, 2, 2)
    out = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 2.0]]).reshape(2, 1, 2, 2)
    assert process.losses(out, x0, torch.tensor([5, 6]), x0).tolist() == [7.5, 1.0]


@SCHEDULE
def test_variances_of_signal_and_noise_add_up_to_one(schedule: str) -> None:
    process = DiscreteVP(VPConfig(schedule=schedule))  # type: ignore[arg-type]
    t = torch.cat([torch.arange(1000.0), torch.linspace(0, 999, 777)])
    alpha, sigma = process.alpha_sigma(t, torch.empty(1, dtype=torch.float64))
    assert (alpha**2 + sigma**2 - 1).abs().max() < 1e-14
    whole = alpha[:1000] ** 2
    assert (whole / process.tables.alphas_cumprod - 1).abs().max() < 1e-12
    assert bool((whole.diff() < 0).all())


@SCHEDULE
def test_time_and_log_snr_are_inverses(schedule: str) -> None:
    process = DiscreteVP(VPConfig(schedule=schedule))  # type: ignore[arg-type]
    whole = torch.arange(1000)
    between = torch.tensor([0.25, 0.5, 17.125, 498.9, 998.999], dtype=torch.float64)
    for t in (whole, whole.double(), between):
        assert (process.time_at(process.log_snr(t)) - t).abs().max() < 1e-9
    levels = torch.linspace(-6, 6, 49, dtype=torch.float64)
    assert (process.log_snr(process.time_at(levels)) - levels).abs().max() < 1e-9


def test_log_snr_is_linear_between_steps() -> None:
    process = DiscreteVP(VPConfig())
    low, high = process.log_snr(torch.tensor([10, 11]))
    assert process.log_snr(torch.tensor([10.25])).item() == pytest.approx(0.75 * low.item() + 0.25 * high.item())
    bar = process.tables.alphas_cumprod[10]
    assert low.item() == pytest.approx((bar / (1 - bar)).log().item())
    assert torch.equal(process.log_snr(torch.tensor([999.0])), process.log_snr(torch.tensor([999])))


def test_levels_that_the_process_never_reaches_are_refused() -> None:
    process = DiscreteVP(VPConfig())
    ends = process.log_snr(torch.tensor([0, 999]))
    assert process.time_at(ends).tolist() == [0.0, 999.0]
    for level in (ends[0] + 0.01, ends[1] - 0.01):
        with pytest.raises(ValueError, match=r"log-SNR must lie in -10\.\d\d to 9\.21 for this process, got \["):
            process.time_at(torch.stack([ends.mean(), level]))


def test_training_times_cover_every_step_equally() -> None:
    process = DiscreteVP(VPConfig(steps=10, schedule="cosine"))
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert process.time(u).bincount().tolist() == [100] * 10
    edge = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    assert process.time(edge).tolist() == [0, 9]
    assert process.time(torch.tensor([1.0])).tolist() == [9]  # rounded up from below one in float32


def test_a_process_needs_two_steps() -> None:
    with pytest.raises(ValueError, match=r"process\.steps: must be at least 2, got 1"):
        VPConfig(steps=1)


def test_a_linear_process_too_short_to_keep_any_signal_is_refused() -> None:
    with pytest.raises(ValueError, match=r"process\.steps: must be above 20 with the linear schedule, got 20"):
        VPConfig(steps=20)
    process = DiscreteVP(VPConfig(steps=21))
    assert bool(process.log_snr(torch.arange(21)).isfinite().all())
    assert process.tables.alphas_cumprod[-1].item() > 0
