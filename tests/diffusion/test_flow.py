"""Flow matching against the reference, its paths, and the SDE's last step; the distribution of training times."""

import math

import pytest
import torch
from golden_cases import load
from mixture import normal
from torch import Tensor

from diffbench.diffusion import DiscreteVP, Flow, FlowConfig, LossAware, Prediction, VPConfig, euler, euler_maruyama
from diffbench.diffusion import stratified as stratify
from diffbench.diffusion.timesteps import normal_quantiles

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
PATHS = pytest.mark.parametrize("path", ["linear", "gvp"])


@BOTH
def test_path_velocity_and_loss_equal_the_reference(dtype: torch.dtype) -> None:
    case, process = load("sit_linear_velocity"), Flow(FlowConfig())
    # The reference goes from noise, its x0, to data, its x1.
    eps, x0, t, out = (case.input(n, dtype) for n in ("x0", "x1", "t", "model_out"))
    case.check("xt", process.add_noise(x0, t, eps))
    case.check("ut", process.target(x0, t, eps))
    case.check("loss", process.losses(out, x0, t, eps))
    doubled = torch.cat([out, out + 1], dim=1)
    assert torch.equal(process.losses(doubled, x0, t, eps), process.losses(out, x0, t, eps))
    assert torch.equal(process.convert(doubled, eps, t).x0, process.convert(out, eps, t).x0)


@BOTH
def test_eulers_trajectory_equals_the_reference(dtype: torch.dtype) -> None:
    case, process = load("sit_linear_velocity"), Flow(FlowConfig())
    call = next(c for c in case.info["calls"] if c["name"] == "euler10")
    model = call["model"]
    assert (model["f"], model["g"]) == ("identity", "sin")

    def predict(x: Tensor, t: Tensor) -> Prediction:
        shift = model["b"] * torch.sin(t.to(dtype) / model["c"])
        return process.convert(model["a"] * x + shift.reshape(-1, 1, 1, 1), x, t)

    grid = process.grid(call["args"]["num_steps"] - 1)
    trajectory = [case.input("start_noise", dtype)]
    euler(predict, trajectory[0], grid, torch.zeros_like, callback=lambda k, x, x0: trajectory.append(x))  # type: ignore[arg-type]
    case.check("euler10.times", grid.points.time.to(dtype))
    case.check("euler10.trajectory", torch.stack(trajectory))


@PATHS
def test_rates_are_the_derivatives_of_the_path(path: str) -> None:
    process = Flow(FlowConfig(path=path))  # type: ignore[arg-type]
    t, h = torch.linspace(0.01, 0.99, 50, dtype=torch.float64), 1e-5
    here, above, below = process.path(t), process.path(t + h), process.path(t - h)
    assert ((above.alpha - below.alpha) / (2 * h) - here.alpha_rate).abs().max() < 1e-9
    assert ((above.sigma - below.sigma) / (2 * h) - here.sigma_rate).abs().max() < 1e-9
    ends = process.path(torch.tensor([0.0, 1.0]))
    assert ends.alpha.tolist() == [0.0, 1.0]
    assert ends.sigma.tolist() == [1.0, 0.0]
    if path == "gvp":
        assert (here.alpha**2 + here.sigma**2 - 1).abs().max() < 1e-14


@PATHS
def test_the_velocity_is_the_rate_along_the_path(path: str) -> None:
    process = Flow(FlowConfig(path=path))  # type: ignore[arg-type]
    x0, eps, velocity = normal(6, 2, 3, 3), normal(6, 2, 3, 3, seed=1), normal(6, 2, 3, 3, seed=2)
    times = torch.linspace(0, 1, 6, dtype=torch.float64)
    grid = process.grid(5)
    assert torch.equal(grid.points.time, times)
    for i in range(6):
        point, t = grid[i], times[i : i + 1]
        x = process.add_noise(x0[i : i + 1], t, eps[i : i + 1])
        assert (point.rate(process.convert(velocity[i : i + 1], x, t)) - velocity[i : i + 1]).abs().max() < 1e-12


@PATHS
def test_the_sdes_last_step_is_in_the_flows_time_whatever_the_shift(path: str) -> None:
    plain, shifted = (Flow(FlowConfig(path=path, shift=s)) for s in (1.0, 4.0))  # type: ignore[arg-type]
    even, times = plain.sde_grid(11, last=0.1).points.time, shifted.sde_grid(11, last=0.1).points.time
    assert torch.equal(even[:-1], torch.linspace(0, 0.9, 11, dtype=torch.float64))
    assert times[[0, -2, -1]].tolist() == pytest.approx([0.0, 0.9, 1.0], abs=1e-12)
    steps = plain.time_at(shifted.log_snr(times[:-1]) + 2 * math.log(4)).diff()  # before the shift they are even
    assert (steps - steps[0]).abs().max() < 1e-12


@pytest.mark.parametrize("last", ["mean", "tweedie", "euler"])
def test_the_sde_ends_with_one_step_without_noise(last: str) -> None:
    process = Flow(FlowConfig())
    grid = process.sde_grid(11, last=0.04)
    times = grid.points.time
    assert len(grid) == 11
    assert times[-2:].tolist() == pytest.approx([0.96, 1.0])
    assert (times[:-1].diff() - 0.096).abs().max() < 1e-15
    noisy_steps, states = [], []

    def noise(k: int) -> Tensor:
        noisy_steps.append(k)
        return normal(2, 1, 2, 2, seed=k)

    def predict(x: Tensor, t: Tensor) -> Prediction:
        return process.convert(0.5 - x, x, t)

    start = normal(2, 1, 2, 2, seed=50)
    x = euler_maruyama(predict, start, grid, noise, last=last, callback=lambda k, x, x0: states.append(x))  # type: ignore[arg-type]
    assert noisy_steps == list(range(10))
    before = states[-2]
    velocity, score = 0.5 - before, -(before - 0.96 * (0.5 - before)) / 0.04  # -eps / sigma, where eps = x - t v
    want = {
        "mean": before + 0.04 * (velocity + 0.04 * score),
        "tweedie": before + 0.04 * velocity,
        "euler": before + 0.04 * velocity,
    }[last]
    assert (x - want).abs().max() < 1e-12
    # One step of the SDE: x + (v + D s) dt + sqrt(2 D dt) z with D = sigma; at t = 0 that is 1, and s = -x.
    first = start + 0.096 * (0.5 - start - start) + math.sqrt(2 * 0.096) * normal(2, 1, 2, 2, seed=0)
    assert (states[0] - first).abs().max() < 1e-12


def test_an_sde_of_strength_zero_equals_the_ode() -> None:
    process = Flow(FlowConfig(path="gvp"))

    def predict(x: Tensor, t: Tensor) -> Prediction:
        return process.convert(torch.sin(x), x, t)

    x, grid = normal(3, 1, 2, 2), process.sde_grid(20)
    ode = euler(predict, x, grid, torch.zeros_like)  # type: ignore[arg-type]
    sde = euler_maruyama(predict, x, grid, torch.ones_like, strength=0.0)  # type: ignore[arg-type]
    assert (ode - sde).abs().max() < 1e-14


def test_invalid_settings_are_refused() -> None:
    process = Flow(FlowConfig())
    with pytest.raises(ValueError, match="the last step must lie between 0 and 1, got 0"):
        process.sde_grid(10, last=0)
    with pytest.raises(ValueError, match=r"at least 2 .*, got '1'"):
        process.sde_grid(1)
    with pytest.raises(ValueError, match="logit_std: must be positive"):
        FlowConfig(logit_std=0)


QUANTILES = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000


def test_training_times_follow_the_chosen_distribution() -> None:
    assert torch.equal(Flow(FlowConfig()).time(QUANTILES), QUANTILES)
    logits = Flow(FlowConfig(times="logit_normal", logit_mean=0.5, logit_std=2.0)).time(QUANTILES).logit()
    assert (logits.mean().item(), logits.std().item()) == pytest.approx((0.5, 2.0), abs=1e-3)
    for spread, middle in ((torch.exp, 1.0), (torch.sigmoid, 0.5)):
        assert bool((spread(normal_quantiles(QUANTILES, 0.3, 0.8)).diff() > 0).all())
        assert spread(normal_quantiles(torch.tensor([0.5]), 0.0, 1.0)).item() == middle


def test_strata_cover_the_unit_interval_evenly_in_any_batch_layout() -> None:
    u, index = normal(64).sigmoid(), torch.arange(64)
    whole = stratify(u, index, 64)
    assert torch.equal((whole * 64).floor(), index.double())
    halves = [stratify(u[part], index[part], 64) for part in (slice(0, 32), slice(32, 64))]
    assert torch.equal(whole, torch.cat(halves))
    process = DiscreteVP(VPConfig(steps=64))
    assert process.time(whole).tolist() == list(range(64))


def test_the_loss_aware_sampler_is_uniform_until_it_knows_every_step() -> None:
    sampler = LossAware(4, history=2)
    t, weight = sampler.time(QUANTILES)
    assert t.bincount().tolist() == [50_000] * 4
    edges = torch.tensor([0.0, 0.25, 0.5, 0.75])
    assert sampler.time(edges)[0].tolist() == [0, 1, 2, 3]
    assert torch.equal(weight, torch.ones_like(weight))
    sampler.update(torch.tensor([0, 0, 1, 1, 2, 2, 3]), torch.ones(7))
    assert torch.equal(sampler.probabilities(), torch.full((4,), 0.25, dtype=torch.float64))


def test_the_loss_aware_sampler_follows_the_latest_losses() -> None:
    sampler = LossAware(3, history=2, uniform=0.001)
    sampler.update(torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([9.0, 9.0, 9.0, 1.0, 2.0, 3.0]))
    sampler.update(torch.tensor([0, 1, 2]), torch.tensor([1.0, 2.0, 5.0]))
    sizes = torch.tensor([1.0, 2.0, math.sqrt((9 + 25) / 2)], dtype=torch.float64)
    want = 0.999 * sizes / sizes.sum() + 0.001 / 3
    assert (sampler.probabilities() - want).abs().max() < 1e-15
    t, weight = sampler.time(QUANTILES)
    assert (t.bincount() / len(t) - want).abs().max() < 1e-4
    assert (weight - 1 / (3 * want[t])).abs().max() < 1e-12
    assert weight.mean().item() == pytest.approx(1, abs=1e-4)  # so the weighted loss is unbiased
    assert sampler.time(torch.tensor([1.0]))[0].tolist() == [2]


def test_the_loss_history_survives_a_checkpoint() -> None:
    one, other = LossAware(3, history=1), LossAware(3, history=1)
    one.update(torch.tensor([0, 1, 2]), torch.tensor([1.0, 2.0, 3.0]))
    state = one.state_dict()
    other.load_state_dict(state)
    one.update(torch.tensor([0]), torch.tensor([7.0]))
    other.update(torch.tensor([0]), torch.tensor([7.0]))
    assert state["losses"].flatten().tolist() == [1.0, 2.0, 3.0]
    assert state["counts"].tolist() == [1, 1, 1]
    assert torch.equal(one.probabilities(), other.probabilities())
    with pytest.raises(ValueError, match=r"history has shape \(3, 1\) .*, but this run's has \(4, 1\)"):
        LossAware(4, history=1).load_state_dict(state)
