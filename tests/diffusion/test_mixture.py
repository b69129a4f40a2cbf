"""Processes and samplers on data whose exact denoiser is known: properties that no reference covers."""

import itertools
import math
from functools import cache
from typing import Any

import pytest
import torch
from mixture import Mixture, normal
from torch import Tensor

from diffbench.diffusion import (
    EDM,
    PAIRS,
    SAMPLERS,
    DiscreteVP,
    EDMConfig,
    Flow,
    FlowConfig,
    Grid,
    Predict,
    Prediction,
    Process,
    VPConfig,
    check_pair,
    dopri5,
    heun,
)

MIXTURE = Mixture()
# Steps of the discrete processes: 1024 intervals, which halve evenly.
PROCESSES: dict[str, Process] = {
    "vp": DiscreteVP(VPConfig(steps=1025)),
    "vp cosine": DiscreteVP(VPConfig(steps=1025, schedule="cosine")),
    "edm": EDM(EDMConfig()),
    "flow": Flow(FlowConfig()),
    "flow gvp": Flow(FlowConfig(path="gvp")),
}
RUNS = [(p, s) for p in PROCESSES for s in PAIRS[p.split()[0]]]
NOISY: list[tuple[str, str, dict[str, Any]]] = [
    *((p, "ddpm", {"variance": "fixed_small"}) for p in ("vp", "vp cosine")),
    *((p, "ddim", {"eta": 1.0}) for p in ("vp", "vp cosine")),
    ("edm", "heun", {"s_churn": 20.0}),
    *((p, "euler_maruyama", {"last": last}) for p in ("flow", "flow gvp") for last in ("tweedie", "euler")),
    ("flow", "euler_maruyama", {"diffusion": "constant", "strength": 0.3}),
]


def run(process: Process, sampler: str, steps: int, noise: Tensor, predict: Predict, **options: Any) -> Tensor:
    """Return a sampler's result; its noise is keyed by the step."""

    def fresh(k: int) -> Tensor:
        return normal(*noise.shape, seed=100 + k)

    if sampler in ("ddpm", "ddim"):
        assert isinstance(process, DiscreteVP)
        return SAMPLERS[sampler](predict, noise, process.tables.respaced(steps), fresh, clip=False, **options)
    if sampler == "dopri5":
        assert isinstance(process, Flow)
        return dopri5(predict, noise, process.path, fresh, **options)
    if sampler == "euler_maruyama":
        assert isinstance(process, Flow)
        grid = process.sde_grid(steps)
    else:
        grid = process.grid(steps)
    return SAMPLERS[sampler](predict, grid.start(noise), grid, fresh, **options)


def moment_errors(name: str, sampler: str, **options: Any) -> tuple[float, float]:
    """Return the largest error of the mean and of the covariance of 10,000 samples of 100 steps."""
    process = PROCESSES[name]
    noise = normal(5_000, 1, 1, 2)
    x = run(process, sampler, 100, torch.cat([noise, -noise]), MIXTURE.denoiser(process), **options).flatten(1)
    errors = x.mean(0) - MIXTURE.mean, x.T.cov() - MIXTURE.covariance
    return float(errors[0].abs().max()), float(errors[1].abs().max())


@pytest.mark.parametrize(("name", "sampler", "options"), [*((p, s, {}) for p, s in RUNS), *NOISY], ids=str)
def test_samples_have_the_mixtures_moments(name: str, sampler: str, options: dict[str, Any]) -> None:
    mean, covariance = moment_errors(name, sampler, **options)
    assert mean < 0.02
    assert covariance < 0.03


@cache
def converged(name: str) -> Tensor:
    """Return samples after very many steps."""
    process = PROCESSES[name]
    steps = 1025 if name.startswith("vp") else 2048
    return run(process, "heun", steps, normal(100, 1, 1, 2), MIXTURE.denoiser(process))


@pytest.mark.parametrize(("name", "sampler"), [r for r in RUNS if r[1] not in ("ddpm", "euler_maruyama", "dopri5")])
def test_deterministic_samplers_converge_with_their_order(name: str, sampler: str) -> None:
    process, noise = PROCESSES[name], normal(100, 1, 1, 2)
    predict, extra = MIXTURE.denoiser(process), int(name.startswith("vp"))  # n intervals have n + 1 discrete steps
    off = [run(process, sampler, n + extra, noise, predict) - converged(name) for n in (64, 128, 256)]
    errors = [d.square().mean().sqrt() for d in off]
    want = 1 if sampler in ("euler", "ddim") else 2
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(want, abs=0.3)


@cache
def vp_samples() -> tuple[Grid, Tensor, Tensor]:
    """Return the grid of a discrete process of many steps, states at its first point, and their images by the ODE."""
    process = DiscreteVP(VPConfig(steps=2000))
    grid = process.grid(2000)
    x = grid.start(normal(100, 1, 1, 2))
    return grid, x, heun(MIXTURE.denoiser(process), x, grid, torch.zeros_like)  # type: ignore[arg-type]


@pytest.mark.parametrize("other", ["edm", "flow", "flow gvp"])
def test_processes_agree_if_they_start_at_the_same_noise(other: str) -> None:
    grid, x, want = vp_samples()
    level = float(grid[0].sigma / grid[0].alpha)
    process: Process = PROCESSES[other] if other != "edm" else EDM(EDMConfig(sigma_max=level))
    theirs = process.grid(512)
    if isinstance(process, Flow):
        start = float(process.time_at(torch.tensor(-2 * math.log(level), dtype=torch.float64)))
        theirs = Grid(process.path(torch.linspace(start, 1, 513, dtype=torch.float64)), open_end=False)
    scaled = x / grid[0].alpha * theirs[0].alpha
    assert float(theirs[0].sigma / theirs[0].alpha) == pytest.approx(level)
    got = heun(MIXTURE.denoiser(process), scaled, theirs, torch.zeros_like)  # type: ignore[arg-type]
    assert (got - want).square().mean().sqrt() < 1e-3


@pytest.mark.parametrize(("name", "calls"), [("vp", 19), ("edm", 19), ("flow", 20)])
def test_heun_evaluates_the_network_at_the_end_where_it_can(name: str, calls: int) -> None:
    times = []

    def counted(x: Tensor, t: Tensor) -> Prediction:
        times.append(float(t[0]))
        return MIXTURE.denoiser(PROCESSES[name])(x, t)

    run(PROCESSES[name], "heun", 10, normal(2, 1, 1, 2), counted)
    assert len(times) == calls
    assert times[-1] == {"vp": 0.0, "edm": pytest.approx(0.002), "flow": 1.0}[name]


@pytest.mark.parametrize("sampler", PAIRS["vp"])
def test_samplers_can_start_where_no_signal_is_left(sampler: str) -> None:
    process = DiscreteVP(VPConfig(prediction="v", zero_terminal_snr=True))
    noise = normal(4_000, 1, 1, 2)
    x = run(process, sampler, 100, noise, MIXTURE.denoiser(process)).flatten(1)
    assert (x.mean(0) - MIXTURE.mean).abs().max() < 0.04
    if sampler in ("ddpm", "ddim"):
        clipped = SAMPLERS[sampler](MIXTURE.denoiser(process), noise, process.tables.respaced(10), lambda k: noise)
        assert bool(clipped.isfinite().all())


@pytest.mark.parametrize("name", ["flow", "flow gvp"])
def test_adaptive_steps_keep_their_tolerance_with_fewer_calls(name: str) -> None:
    calls = []

    def counted(x: Tensor, t: Tensor) -> Prediction:
        calls.append(len(x))
        return MIXTURE.denoiser(PROCESSES[name])(x, t)

    errors = []
    for tolerance in (1e-3, 1e-5, 1e-7):
        calls.clear()
        x = run(PROCESSES[name], "dopri5", 0, normal(100, 1, 1, 2), counted, rtol=tolerance, atol=tolerance)
        errors.append(float((x - converged(name)).square().mean().sqrt()))
        assert len(calls) < {1e-3: 100, 1e-5: 200, 1e-7: 400}[tolerance]
    assert errors[0] < 1e-2
    assert errors[1] < 1e-4
    assert errors[2] < 1e-6


def test_adaptive_steps_do_not_couple_samples() -> None:
    process, noise = PROCESSES["flow"], normal(6, 1, 1, 2)
    noise[3] *= 100  # a stiff neighbour
    predict = MIXTURE.denoiser(process)
    together = run(process, "dopri5", 0, noise, predict)
    for i in range(6):
        assert (run(process, "dopri5", 0, noise[i : i + 1], predict) - together[i]).abs().max() < 1e-12


def test_adaptive_steps_that_reach_their_limit_are_refused() -> None:
    process = PROCESSES["flow"]
    with pytest.raises(RuntimeError, match=r"reached 0\.\d+ of 1 in 3 steps; loosen rtol=1e-09$"):
        run(process, "dopri5", 0, normal(2, 1, 1, 2), MIXTURE.denoiser(process), rtol=1e-9, limit=3)


@pytest.mark.parametrize("name", PROCESSES)
def test_log_snr_and_time_are_inverses(name: str) -> None:
    process = PROCESSES[name]
    levels = torch.linspace(-6, 6, 25, dtype=torch.float64)
    t = process.time_at(levels)
    assert (process.log_snr(t) - levels).abs().max() < 1e-9
    alpha, sigma = process.alpha_sigma(t, torch.empty(1, dtype=torch.float64))
    assert (2 * (alpha / sigma).log() - levels).abs().max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "sampler"), RUNS)
def test_samplers_stay_finite_and_keep_their_dtype(name: str, sampler: str, dtype: torch.dtype) -> None:
    process = PROCESSES[name]

    def predict(x: Tensor, t: Tensor) -> Prediction:
        seen, time = process.inputs(x, t)
        return process.convert(torch.tanh(seen) * time.reshape(-1, 1, 1, 1).cos(), x, t)

    noise = normal(4, 1, 2, 2).to(dtype)
    if sampler == "dopri5":
        x = dopri5(predict, noise, process.path, lambda k: noise, rtol=0.1, atol=0.1)  # type: ignore[attr-defined]
        assert x.dtype == dtype and bool(x.isfinite().all())
        return
    grid = process.sde_grid(6) if sampler == "euler_maruyama" else process.grid(6)  # type: ignore[attr-defined]
    if sampler in ("ddpm", "ddim"):
        x = SAMPLERS[sampler](predict, noise, process.tables.respaced(6), lambda k: noise)  # type: ignore[attr-defined]
    else:
        x = SAMPLERS[sampler](predict, grid.start(noise), grid, lambda k: noise, clip=True)
    assert x.dtype == dtype
    assert bool(x.isfinite().all())


def test_each_pair_is_either_listed_or_refused_with_a_reason() -> None:
    for process, samplers in PAIRS.items():
        for sampler in SAMPLERS:
            if sampler in samplers:
                check_pair(process, sampler)
                continue
            with pytest.raises(ValueError, match=f"{sampler} does not suit the {process} process: .*; choose from"):
                check_pair(process, sampler)
    with pytest.raises(ValueError, match="sampler plms is unknown; choose from ddpm, ddim, euler"):
        check_pair("vp", "plms")
    with pytest.raises(ValueError, match="no process 've'; choose from vp, edm, flow"):
        check_pair("ve", "ddim")
