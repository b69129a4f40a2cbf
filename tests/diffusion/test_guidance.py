"""Guidance: schedule and channels of the published code against the reference, and when guidance costs nothing."""

from collections.abc import Callable

import pytest
import torch
from golden_cases import load
from mixture import Mixture, normal
from torch import Tensor

from diffbench.diffusion import (
    EDM,
    DiscreteVP,
    EDMConfig,
    Flow,
    FlowConfig,
    Prediction,
    VPConfig,
    autoguidance,
    classifier_free,
    classifier_guidance,
    ddim,
    heun,
    interval,
    power_cosine,
    predictor,
)

PROCESS = DiscreteVP(VPConfig())
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


class Net:
    """A labelled predictor that records its batch sizes; a different `shift` makes a different model."""

    def __init__(self, shift: float = 0.0, learned: bool = False) -> None:
        self.batches: list[int] = []
        self.shift = shift
        self.process = DiscreteVP(VPConfig(variance="learned_range", loss="hybrid")) if learned else PROCESS
        self.learned = learned

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Prediction:
        self.batches.append(len(x))
        out = torch.sin(x + self.shift + 0.3 * y.to(x.dtype).reshape(-1, 1, 1, 1)) * 0.5
        return self.process.convert(torch.cat([out, out / 2], dim=1) if self.learned else out, x, t)


def inputs(channels: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return x (3, C, 4, 4), times and labels; 10 is the null label."""
    return normal(3, channels, 4, 4), torch.tensor([800, 20, 300]), torch.tensor([1, 4, 9])


@pytest.mark.parametrize(
    ("call", "weight"), [("cfg0", power_cosine(4.4)), ("cfg1", power_cosine(2.2, power=1.5, steps=500))]
)
def test_the_power_cosine_schedule_equals_the_reference(call: str, weight: Callable[[Tensor], Tensor]) -> None:
    case = load("diffit_a")
    want = next(c for c in case.info["calls"] if c["name"] == call)["effective_scale_per_sample"]
    assert weight(case.input("cfg_t")[:2]).tolist() == pytest.approx(want, abs=1e-12)


def test_the_power_cosine_schedule_starts_at_one_and_ends_at_full_weight() -> None:
    weight = power_cosine(4.4)
    values = weight(torch.tensor([999, 500, 250, 100, 50, 0]))
    assert values.tolist() == pytest.approx([1.00, 1.03, 1.77, 3.50, 4.12, 4.40], abs=6e-3)


@BOTH
def test_guided_outputs_equal_the_reference(dtype: torch.dtype) -> None:
    # The case contains the conditional output (cfg2) and two guided ones: the first gives the null output, from which
    # the second must follow.
    case = load("diffit_a")
    x, t = case.input("cfg_x", torch.float64)[:2], case.input("cfg_t")[:2]
    conditional = case.tensors["out64.cfg2"][:2]
    scale = torch.tensor(case.info["calls"][1]["effective_scale_per_sample"], dtype=torch.float64).reshape(2, 1, 1, 1)
    null = conditional.clone()
    null[:, :3] = (case.tensors["out64.cfg0"][:2, :3] - scale * conditional[:, :3]) / (1 - scale)
    null[:, 3:] = normal(2, 5, 8, 8)  # must have no influence
    process = DiscreteVP(VPConfig(variance="learned_range", loss="hybrid"))
    outputs = torch.cat([conditional, null]).to(dtype)

    def predict(x: Tensor, t: Tensor, y: Tensor) -> Prediction:
        assert y.tolist() == [3, 7, 10, 10]
        return process.convert(outputs, x, t)

    guided = classifier_free(predict, torch.tensor([3, 7]), 10, power_cosine(2.2, power=1.5, steps=500), channels=3)
    prediction = guided(x.to(dtype), t)
    assert prediction.variance is not None
    got = torch.cat([prediction.eps, 2 * prediction.variance - 1], dim=1)
    want = case.tensors["out64.cfg1" if dtype == torch.float64 else "out.cfg1"][:2]
    # The null output is recovered to float64 rounding; the tolerance of the case is wider.
    assert (got - want).abs().max() < (1e-12 if dtype == torch.float64 else 5e-6)
    # Image and noise still make up the noisy image.
    alpha, sigma = process.alpha_sigma(t, x)
    assert (alpha * prediction.x0.double() + sigma * prediction.eps.double() - x).abs().max() < (
        1e-12 if dtype == torch.float64 else 1e-5
    )


@pytest.mark.parametrize("weight", [1.0, 1, lambda t: torch.ones(len(t)), power_cosine(1.0)])
def test_guidance_of_weight_one_is_bit_identical_to_none_at_no_cost(weight: float) -> None:
    x, _, y = inputs()
    x = x.float()
    tables, net, weak = PROCESS.tables.respaced(10), Net(), Net(shift=1.0)
    plain = ddim(lambda x, t: net(x, t, y), x, tables, torch.zeros_like)  # type: ignore[arg-type]
    for guided in (classifier_free(net, y, 10, weight), autoguidance(net, weak, y, weight)):
        assert torch.equal(plain, ddim(guided, x, tables, torch.zeros_like))  # type: ignore[arg-type]
    assert net.batches == [3] * 30
    assert weak.batches == []


def test_samples_of_weight_one_are_not_changed() -> None:
    (x, t, y), net = inputs(), Net()
    weights = torch.tensor([1.0, 3.0, 0.5])
    guided = classifier_free(net, y, 10, lambda t: weights)(x, t)
    plain = net(x, t, y)
    assert torch.equal(guided.eps[0], plain.eps[0])
    assert torch.equal(guided.x0[0], plain.x0[0])
    for i in (1, 2):
        null = net(x, t, torch.full_like(y, 10)).eps[i]
        assert (guided.eps[i] - (null + weights[i] * (plain.eps[i] - null))).abs().max() < 1e-12


def test_label_weights_are_guided_like_labels() -> None:
    (x, t, y), seen = inputs(), []

    def predict(x: Tensor, t: Tensor, y: Tensor) -> Prediction:
        seen.append(y)
        return Prediction(x * y.argmax(1)[:, None, None, None], x)

    weights = torch.nn.functional.one_hot(y, 11).double()
    guided = classifier_free(predict, weights, 10, 2.0)(x, t)
    assert torch.equal(seen[0], torch.cat([weights, torch.eye(11).double()[10].expand(len(y), -1)]))
    assert torch.allclose(guided.x0, x * (2 * y - 10)[:, None, None, None])


def test_unguided_channels_equal_the_conditional_model() -> None:
    (x, t, y), net = inputs(channels=4), Net(learned=True)
    plain = net(x, t, y)
    everywhere, three = (classifier_free(net, y, 10, 4.0, channels=c)(x, t) for c in (None, 3))
    for whole, part, untouched in zip(everywhere[:2], three[:2], plain[:2], strict=True):
        assert torch.equal(part[:, :3], whole[:, :3])
        assert torch.equal(part[:, 3:], untouched[:, 3:])
        assert not torch.equal(whole[:, 3:], untouched[:, 3:])
    assert plain.variance is not None
    for guided in (everywhere, three):
        assert guided.variance is not None
        assert torch.equal(guided.variance, plain.variance)


def test_autoguidance_moves_away_from_the_weaker_model() -> None:
    (x, t, y), net, weak = inputs(), Net(), Net(shift=0.4)
    guided = autoguidance(net, weak, y, 2.0)(x, t)
    strong, other = net(x, t, y), weak(x, t, y)
    assert (guided.eps - (2 * strong.eps - other.eps)).abs().max() < 1e-12
    assert (guided.x0 - (2 * strong.x0 - other.x0)).abs().max() < 1e-10


@pytest.mark.parametrize("process", [PROCESS, EDM(EDMConfig()), Flow(FlowConfig())], ids=lambda p: p.name)
def test_a_perfect_classifier_at_scale_one_makes_the_model_conditional(process: DiscreteVP | EDM | Flow) -> None:
    mixture, t = Mixture((1, 2, 2)), process.time(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    x = process.add_noise(mixture.draw(3), t, normal(3, 1, 2, 2))

    def gradient(x: Tensor, t: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(mixture.log_shares(process, x, t)[:, 1].sum(), x)
        return slope

    plain = mixture.denoiser(process)
    got, want = classifier_guidance(plain, gradient, process, 1.0)(x, t), mixture.only(1).denoiser(process)(x, t)
    assert (got.x0 - want.x0).abs().max() < 1e-10
    assert (got.eps - want.eps).abs().max() < 1e-10
    start = process.grid(5)[0].time.expand(3)  # for a flow: pure noise
    assert bool(classifier_guidance(plain, gradient, process, 1.0)(x, start).x0.isfinite().all())
    assert classifier_guidance(plain, gradient, process, 0.0) is plain


def test_an_interval_guides_only_between_its_levels() -> None:
    process, evaluations = EDM(EDMConfig()), []

    def predict(x: Tensor, t: Tensor, y: Tensor) -> Prediction:
        evaluations.append((float(t[0]), len(x)))
        return process.convert(torch.sin(x), x, t)

    grid = process.grid(18)
    guided = classifier_free(predict, torch.tensor([1, 2]), 10, interval(process, 2.0, 0.19, 1.61))
    heun(guided, grid.start(normal(2, 1, 2, 2)), grid, torch.zeros_like)  # type: ignore[arg-type]
    assert len(evaluations) == 35
    assert {4} == {n for sigma, n in evaluations if 0.19 < sigma <= 1.61}
    assert {2} == {n for sigma, n in evaluations if not 0.19 < sigma <= 1.61}
    both = interval(PROCESS, power_cosine(4.4), 0.5, 2.0)(torch.tensor([0, 300, 999]))  # type: ignore[operator]
    assert both.tolist() == pytest.approx([1.0, power_cosine(4.4)(torch.tensor([300])).item(), 1.0])  # type: ignore[operator]
    ends = interval(process, 2.0, 0.5, 2.0)(torch.tensor([0.5, 2.0]))  # type: ignore[operator]
    assert ends.tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="must satisfy 0 <= low < high, got 2 to 1"):
        interval(process, 2.0, 2, 1)


@pytest.mark.parametrize("process", [PROCESS, EDM(EDMConfig()), Flow(FlowConfig())], ids=lambda p: p.name)
def test_a_network_gets_the_scaled_inputs_of_its_process(process: DiscreteVP | EDM | Flow) -> None:
    x, y = normal(2, 1, 3, 3).float(), torch.tensor([1, 2])
    t = process.time(torch.tensor([0.3, 0.6], dtype=torch.float64))
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append((x, t, y))
        return torch.cos(x)

    got = predictor(process, network)(x, t, y)
    scaled, time = process.inputs(x, t)
    assert torch.equal(seen[0][0], scaled)
    assert torch.equal(seen[0][1], time) and time.dtype == torch.float32
    assert torch.equal(got.x0, process.convert(torch.cos(scaled), x, t).x0)
    for times in (t, t[:1].expand(2)):  # samplers keep times on the CPU
        elsewhere = predictor(process, network)(x.to("meta"), times, y.to("meta"))
        assert elsewhere.x0.device.type == seen[-1][1].device.type == "meta"
        assert elsewhere.eps.shape == x.shape
