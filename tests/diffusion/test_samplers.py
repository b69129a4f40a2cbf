"""Samplers and guidance: parity with the reference, exact results for Gaussian data, and their contract."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from golden_cases import Case, load
from torch import Tensor

from diffbench.diffusion import DiscreteVP, Prediction, Tables, VPConfig, classifier_free, ddim, ddpm
from diffbench.diffusion.process import Predict

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
CLIP = pytest.mark.parametrize("clip", [True, False], ids=["clip", "noclip"])
PROCESS = DiscreteVP(VPConfig())


class Steps:
    """A callback that records the sample and the predicted image of each step."""

    def __init__(self) -> None:
        self.samples: list[Tensor] = []
        self.images: list[Tensor] = []

    def __call__(self, k: int, x: Tensor, x0: Tensor) -> None:
        assert k == len(self.samples)
        self.samples.append(x)
        self.images.append(x0)


def ending_at(tables: Tables, t: int) -> Tables:
    """Return the tables of steps t - 1 and t alone, so that a sampler's first step is step t of the whole process."""
    return Tables(**{f.name: getattr(tables, f.name)[max(t - 1, 0) : t + 1] for f in fields(tables)})


def first_steps(
    case: Case, dtype: torch.dtype, sampler: Callable[..., Tensor], **options: Any
) -> tuple[Tensor, Tensor]:
    """Return samples and predicted images after one step, each from its own time, with constant network outputs."""
    samples, images = [], []
    for i, t in enumerate(case.input("t").tolist()):
        x, out, noise = (case.input(n, dtype)[i : i + 1] for n in ("x", "model_out", "noise"))

        def predict(x: Tensor, time: Tensor, out: Tensor = out) -> Prediction:
            return PROCESS.convert(out, x, time)

        def drawn(k: int, noise: Tensor = noise) -> Tensor:
            return noise

        steps = Steps()
        sampler(predict, x, ending_at(PROCESS.tables, t), drawn, callback=steps, **options)
        samples.append(steps.samples[0])
        images.append(steps.images[0])
    return torch.cat(samples), torch.cat(images)


@BOTH
@CLIP
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_an_ancestral_step_equals_the_reference(variance: str, clip: bool, dtype: torch.dtype) -> None:
    case, prefix = load(f"p_step_{variance}"), "clip" if clip else "noclip"
    sample, image = first_steps(case, dtype, ddpm, variance=variance, clip=clip)
    case.check(f"{prefix}.pred_xstart", image)
    case.check(f"{prefix}.sample", sample)
    t, x = case.input("t"), case.input("x", dtype)
    means = [PROCESS.tables.posterior_mean(int(i), a, b) for i, a, b in zip(t, image, x, strict=True)]
    case.check(f"{prefix}.mean", torch.stack(means))
    log_variance = PROCESS.tables.log_variances(variance)
    # The first small variance is zero; only its logarithm is clipped.
    plain = PROCESS.tables.posterior_variance if variance == "fixed_small" else log_variance.exp()
    for name, table in (("log_variance", log_variance), ("variance", plain)):
        case.check(f"{prefix}.{name}", table[t].to(dtype).reshape(-1, 1, 1, 1).expand_as(x))


@BOTH
@CLIP
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_a_ddim_step_equals_the_reference(eta: float, clip: bool, dtype: torch.dtype) -> None:
    case = load("ddim_step")
    prefix = f"{'clip' if clip else 'noclip'}.eta{'05' if eta else '0'}"
    sample, image = first_steps(case, dtype, ddim, eta=eta, clip=clip)
    case.check(f"{prefix}.pred_xstart", image)
    case.check(f"{prefix}.sample", sample)


@BOTH
@CLIP
@pytest.mark.parametrize("run", ["ancestral", "ddim_eta0", "ddim_eta05"])
def test_whole_runs_equal_the_reference(run: str, clip: bool, dtype: torch.dtype) -> None:
    case = load(f"trajectory_10_{'clip' if clip else 'noclip'}")
    call = next(c for c in case.info["calls"] if c["name"] == run)
    model = call["model"]
    assert (model["f"], model["g"]) == ("identity", "sin")
    tables = PROCESS.tables.respaced(case.info["constructor"]["args"]["use_timesteps"]["section_counts"])
    noise = case.input("noise", dtype)

    def predict(x: Tensor, t: Tensor) -> Prediction:
        shift = model["b"] * torch.sin(t.to(dtype) / model["c"])
        return PROCESS.convert(model["a"] * x + shift.reshape(-1, 1, 1, 1), x, t)

    steps = Steps()
    start, options = case.input("start_noise", dtype), {"clip": clip, "callback": steps}
    if run == "ancestral":
        last = ddpm(predict, start, tables, lambda k: noise[k], **options)  # type: ignore[arg-type]
    else:
        last = ddim(predict, start, tables, lambda k: noise[k], eta=call["args"]["eta"], **options)  # type: ignore[arg-type]
    case.check(f"{run}.samples", torch.stack(steps.samples))
    case.check(f"{run}.pred_xstarts", torch.stack(steps.images))
    assert torch.equal(last, steps.samples[-1])


MEAN, STD = 0.4, 0.3


def exact(process: DiscreteVP) -> Predict:
    """Return the optimal denoiser of images whose pixels are normal with MEAN and STD."""

    def predict(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = process.alpha_sigma(t, x)
        x0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)
        return Prediction(x0, (x - alpha * x0) / sigma)

    return predict


@pytest.mark.parametrize("steps", ["200", "ddim200"])
@pytest.mark.parametrize("sampler", ["ddpm fixed_small", "ddpm fixed_large", "ddim 0", "ddim 1"])
def test_samples_of_gaussian_data_have_its_mean_and_spread(sampler: str, steps: str) -> None:
    process = DiscreteVP(VPConfig(schedule="cosine"))
    generator = torch.Generator().manual_seed(0)

    def noise(k: int = 0) -> Tensor:
        return torch.randn(1, 1, 100, 200, dtype=torch.float64, generator=generator)

    kind, option = sampler.split()
    arguments = (exact(process), noise(), process.tables.respaced(steps), noise)
    if kind == "ddpm":
        x = ddpm(*arguments, variance=option, clip=False)  # type: ignore[arg-type]
    else:
        x = ddim(*arguments, eta=float(option), clip=False)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert x.std().item() == pytest.approx(STD, rel=0.04)


def test_noise_is_drawn_only_where_it_is_used() -> None:
    tables = PROCESS.tables.respaced(5)
    noisy_steps: list[int] = []

    def noise(k: int) -> Tensor:
        noisy_steps.append(k)
        return torch.zeros(2, 1, 1, 1)

    start = torch.zeros(2, 1, 1, 1)
    ddim(exact(PROCESS), start, tables, noise)
    assert noisy_steps == []
    ddim(exact(PROCESS), start, tables, noise, eta=0.5)
    assert noisy_steps == [0, 1, 2, 3]
    ddpm(exact(PROCESS), start, tables, noise)
    assert noisy_steps == [0, 1, 2, 3] * 2


def test_ddim_with_eta_one_is_ddpm_with_the_small_variance() -> None:
    tables = PROCESS.tables.respaced(20)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(21, 3, 1, 2, 2, dtype=torch.float64, generator=generator)
    a = ddim(exact(PROCESS), noise[20], tables, lambda k: noise[k], eta=1.0, clip=False)
    b = ddpm(exact(PROCESS), noise[20], tables, lambda k: noise[k], variance="fixed_small", clip=False)
    assert (a - b).abs().max() < 1e-10


def test_networks_see_the_times_of_the_whole_process() -> None:
    seen: list[list[int]] = []

    def predict(x: Tensor, t: Tensor) -> Prediction:
        seen.append(t.tolist())
        return Prediction(x, x)

    ddim(predict, torch.zeros(2, 1, 1, 1), PROCESS.tables.respaced("ddim4"), torch.zeros_like)  # type: ignore[arg-type]
    assert seen == [[750, 750], [500, 500], [250, 250], [0, 0]]


class Labelled:
    """A predictor that depends on the label and records its batch sizes."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Prediction:
        self.batches.append(len(x))
        out = torch.sin(x + 0.3 * y.reshape(-1, 1, 1, 1)) * 0.5
        return PROCESS.convert(out, x, t)


def guidance_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, 1, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([800, 20, 300]), torch.tensor([1, 4, 9])


def test_guidance_of_weight_one_equals_no_guidance_at_no_cost() -> None:
    x, _, y = guidance_inputs(torch.float32)
    tables, net = PROCESS.tables.respaced(10), Labelled()
    plain = ddim(lambda x, t: net(x, t, y), x, tables, torch.zeros_like)  # type: ignore[arg-type]
    guided = ddim(classifier_free(net, y, 10, 1.0), x, tables, torch.zeros_like)  # type: ignore[arg-type]
    assert torch.equal(plain, guided)
    assert net.batches == [3] * 20


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.5, 7.5])
def test_guidance_is_unconditional_plus_weight_times_the_difference(weight: float) -> None:
    (x, t, y), net = guidance_inputs(), Labelled()
    guided = classifier_free(net, y, 10, weight)(x, t)
    assert net.batches == [6]
    with_class, without = net(x, t, y), net(x, t, torch.full_like(y, 10))
    assert (with_class.eps - without.eps).abs().max() > 0.1
    for got, c, u in zip(guided[:2], with_class[:2], without[:2], strict=True):
        assert (got - (u + weight * (c - u))).abs().max() < 1e-11


def test_guided_image_and_noise_still_make_up_the_noisy_image() -> None:
    x, t, y = guidance_inputs()
    guided = classifier_free(Labelled(), y, 10, 3.0)(x, t)
    alpha, sigma = PROCESS.alpha_sigma(t, x)
    assert (alpha * guided.x0 + sigma * guided.eps - x).abs().max() < 1e-12
