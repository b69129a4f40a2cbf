"""Every prediction in every loss space under every process: conversions, weights, training times, and samples."""

import math
from typing import Any, get_args

import pytest
import torch
from mixture import Mixture, normal
from torch import Tensor

from diffbench.diffusion import (
    EDM,
    DiscreteVP,
    EDMConfig,
    Flow,
    FlowConfig,
    Prediction,
    Process,
    VPConfig,
    ddim,
    dopri5,
    euler,
    heun,
    predictor,
)
from diffbench.diffusion.objective import Space
from diffbench.diffusion.process import mean_square, per_sample

SPACES = get_args(Space)
KINDS: dict[str, tuple[Any, Any, dict[str, Any], tuple[str, ...]]] = {
    "vp linear": (DiscreteVP, VPConfig, {}, SPACES),
    "vp cosine": (DiscreteVP, VPConfig, {"schedule": "cosine"}, SPACES),
    "vp without an end": (DiscreteVP, VPConfig, {"zero_terminal_snr": True}, ("x0", "v", "velocity")),
    "edm": (EDM, EDMConfig, {}, ("edm", *SPACES)),
    "flow linear": (Flow, FlowConfig, {}, SPACES),
    "flow gvp": (Flow, FlowConfig, {"path": "gvp"}, SPACES),
}
OUTPUTS = [(kind, prediction) for kind, row in KINDS.items() for prediction in row[3]]
LOW = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
PARTS = (torch.arange(999, dtype=torch.float64) + 1) / 1000


def made(kind: str, **keys: Any) -> Any:
    """Build a process of a kind with some keys."""
    process, config, fixed, _ = KINDS[kind]
    return process(config(**fixed, **keys))


def objectives(kind: str) -> list[dict[str, Any]]:
    """List every loss space and weighting of a kind."""
    spaces = [s for s in SPACES if s in KINDS[kind][3]]
    return [*({"loss_space": s} for s in spaces), *({"weighting": w} for w in ("none", "min_snr", "edm", "sigmoid"))]


def in_space(process: Process, space: str, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Express an image and its noise as the quantity of a loss space."""
    p = process.path(t)
    total = (p.alpha**2 + p.sigma**2).sqrt()
    a, b = {
        "x0": (torch.ones_like(p.alpha), torch.zeros_like(p.alpha)),
        "eps": (torch.zeros_like(p.alpha), torch.ones_like(p.alpha)),
        "v": (-p.sigma / total, p.alpha / total),
        "velocity": (p.alpha_rate, p.sigma_rate),
    }[space]
    return per_sample(a, x0) * x0 + per_sample(b, x0) * eps


@pytest.mark.parametrize(("kind", "prediction"), OUTPUTS)
def test_a_perfect_output_gives_back_image_and_noise(kind: str, prediction: str) -> None:
    process = made(kind, prediction=prediction)
    t = process.time(PARTS)
    p = process.path(t)
    t = t[(p.alpha > 1e-3) & (p.sigma > 1e-3)]  # closer to an end, float64 is too coarse to divide by
    x0, eps = normal(len(t), 1, 2, 2), normal(len(t), 1, 2, 2, seed=1)
    target = process.target(x0, t, eps)
    back = process.convert(target, process.add_noise(x0, t, eps), t)
    assert (back.x0 - x0).abs().max() < 1e-12
    assert (back.eps - eps).abs().max() < 1e-12
    if prediction != "edm":
        assert (in_space(process, prediction, x0, eps, t) - target).abs().max() < 1e-12
    for keys in objectives(kind):
        assert not made(kind, prediction=prediction, **keys).losses(target, x0, t, eps).any()


@pytest.mark.parametrize(("kind", "prediction"), OUTPUTS)
def test_a_loss_is_the_squared_error_in_its_space_up_to_the_clip(kind: str, prediction: str) -> None:
    plain = made(kind, prediction=prediction)
    x0, eps, out = (normal(999, 1, 2, 2, seed=s) for s in range(3))
    t = plain.time(PARTS)
    got = plain.convert(out, plain.add_noise(x0, t, eps), t)
    image, snr = mean_square(got.x0 - x0), plain.log_snr(t).exp()
    for keys in objectives(kind):
        process = made(kind, prediction=prediction, **keys)
        if space := keys.get("loss_space"):
            want = mean_square(in_space(plain, space, *got[:2], t) - in_space(plain, space, x0, eps, t))
        else:
            sigmoid = snr * (2 - snr.log()).sigmoid()
            weight = {"min_snr": snr.clamp(max=5), "edm": snr + 4, "sigmoid": sigmoid}.get(keys["weighting"])
            want = plain.losses(out, x0, t, eps) if weight is None else weight * image
        own, losses = mean_square(out - plain.target(x0, t, eps)), process.losses(out, x0, t, eps)
        clipped = torch.minimum(want, 400 * own)
        assert (clipped == want).float().mean() > 0.3
        assert ((losses - clipped).abs() <= 1e-6 * clipped).all()


def test_the_velocity_loss_of_a_predicted_image_equals_jits() -> None:
    process = made("flow linear", prediction="x0", loss_space="velocity")
    x0, eps, out, t = *(normal(999, 1, 2, 2, seed=s) for s in range(3)), PARTS.reshape(-1, 1, 1, 1)
    z = t * x0 + (1 - t) * eps
    scale = (1 - t).clamp(min=0.05)
    want = mean_square((out - z) / scale - (x0 - z) / scale)
    assert (process.losses(out, x0, PARTS, eps) / want - 1).abs().max() < 1e-9


@LOW
@pytest.mark.parametrize(("kind", "prediction"), OUTPUTS)
def test_values_and_gradients_are_finite_at_both_ends_of_time(kind: str, prediction: str, dtype: torch.dtype) -> None:
    process = made(kind, prediction=prediction)
    grid = process.grid(50)
    extremes = process.time(torch.tensor([0.0, 2.0**-53, 1 - 2.0**-53, 1.0], dtype=torch.float64))
    ends = torch.stack([grid[0].time, grid[50 if kind.startswith("flow") else 49].time]).to(extremes.dtype)
    t = torch.cat([extremes, ends])
    x0, eps, out = (normal(len(t), 1, 4, 4, seed=s).to(dtype) for s in range(3))
    x_t = process.add_noise(x0, t, eps).requires_grad_()
    seen, time = process.inputs(x_t, t)
    prediction_there = process.convert(out, x_t, t)
    (prediction_there.x0.sum() + prediction_there.eps.sum()).backward()  # as the exact likelihood does
    values = [x_t, seen, time, prediction_there.x0, prediction_there.eps, x_t.grad]
    for keys in objectives(kind):
        leaf = out.clone().requires_grad_()
        losses = made(kind, prediction=prediction, **keys).losses(leaf, x0, t, eps)
        losses.sum().backward()
        values += [losses, leaf.grad]
    for value in values:
        assert value.dtype == dtype
        assert bool(value.isfinite().all())


SAMPLED = [o for o in OUTPUTS if o[0] in ("vp cosine", "edm", "flow linear")]


@pytest.mark.parametrize(("kind", "prediction"), SAMPLED)
def test_samplers_reach_the_data_from_every_prediction(kind: str, prediction: str) -> None:
    """The network is the exact denoiser of a Gaussian mixture, converted to the prediction."""
    mixture, process = Mixture(), made(kind, prediction=prediction)
    exact = mixture.denoiser(process)

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        scale = process.path(time).total(process.sigma_data) if kind == "edm" else torch.ones_like(t)
        best = exact(x * per_sample(scale, x), time)
        return process.target(best.x0, time, best.eps)

    def predict(x: Tensor, t: Tensor) -> Prediction:
        nonlocal time
        time = t
        return predictor(process, network)(x, t, t)

    time, noise = torch.empty(0), normal(1_000, 1, 1, 2)
    noise = torch.cat([noise, -noise])
    grid = process.grid(50)
    samples = [heun(predict, grid.start(noise), grid, torch.zeros_like)]  # type: ignore[arg-type]
    if kind.startswith("vp"):
        samples.append(ddim(predict, noise, process.respaced(50), torch.zeros_like, clip=False))  # type: ignore[arg-type]
    if kind.startswith("flow"):
        samples.append(euler(predict, noise, grid, torch.zeros_like))  # type: ignore[arg-type]
        samples.append(dopri5(predict, noise, process.path, torch.zeros_like))  # type: ignore[arg-type]
    for x in samples:
        assert (x.flatten(1).mean(0) - mixture.mean).abs().max() < 0.03
        assert (x.flatten(1).T.cov() - mixture.covariance).abs().max() < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_training_times_follow_their_distribution(kind: str) -> None:
    u, keys = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000, {"prediction": "v"}

    def levels(**more: Any) -> Tensor:
        process = made(kind, **keys, **more)
        return (-0.5 * process.log_snr(process.time(u))).sort().values  # ln(sigma / alpha)

    normal = levels(times="log_normal", p_mean=-0.4, p_std=0.7)
    assert (normal.mean().item(), normal.std().item()) == pytest.approx((-0.4, 0.7), abs=0.01)
    middle = levels(times="logit_normal", logit_mean=0.3, logit_std=0.5)
    even = levels(times="uniform")
    assert middle[10_000] < even[10_000]  # above 0: closer to the image
    moved = levels(times="uniform", shift=3.0)
    inside = slice(2_000, 12_000)
    assert (moved - even - math.log(3))[inside].abs().max() < 0.05
    assert torch.equal(levels(times="uniform", shift=1.0), even)


def test_a_flows_shift_equals_the_papers_in_training_and_sampling() -> None:
    process = made("flow linear", times="logit_normal", shift=3.0)
    plain = made("flow linear", times="logit_normal")
    noise = 1 - plain.time(PARTS)  # the paper's time runs from image to noise
    assert (1 - process.time(PARTS) - 3 * noise / (1 + 2 * noise)).abs().max() < 1e-12
    times, even = process.grid(10).points.time, torch.linspace(1, 0, 11, dtype=torch.float64)
    assert (1 - times - 3 * even / (1 + 2 * even)).abs().max() < 1e-12
    assert times[[0, -1]].tolist() == [0.0, 1.0]
    assert made("flow gvp", shift=3.0).grid(10).points.time[[0, -1]].tolist() == [0.0, 1.0]


def test_a_shift_that_follows_the_image_needs_an_experiment() -> None:
    process = made("flow linear", shift=None)
    for use in (lambda: process.time(PARTS), lambda: process.grid(10)):
        with pytest.raises(
            ValueError, match=r"^process\.shift: null follows the shape of an experiment's images; give a"
        ):
            use()


@pytest.mark.parametrize(
    ("make", "key", "value"),
    [
        (VPConfig, "prediction", "epsilon"),
        (VPConfig, "schedule", "squaredcos"),
        (EDMConfig, "weighting", "min-snr"),
        (FlowConfig, "path", "cosine"),
        (FlowConfig, "loss_space", "score"),
    ],
)
def test_an_unknown_choice_is_refused_in_scripts_too(make: Any, key: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"process.{key}: unknown value '{value}'; choose from "):
        make(**{key: value})
