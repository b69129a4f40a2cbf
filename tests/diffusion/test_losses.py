"""The losses of the discrete process, its reverse steps and the terms of its bound against the reference."""

from typing import Any

import pytest
import torch
from golden_cases import Case, load
from mixture import normal
from torch import Tensor

from diffbench.diffusion import DiscreteVP, VPConfig, ddpm
from diffbench.diffusion.likelihood import bound_term, discrete_log_likelihood, prior_term
from diffbench.diffusion.process import Prediction
from diffbench.diffusion.schedules import Tables, at

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
CLIP = pytest.mark.parametrize("clip", [True, False], ids=["clip", "noclip"])
LOSSES = {"MSE": "hybrid", "RESCALED_MSE": "rescaled_hybrid", "KL": "kl", "RESCALED_KL": "rescaled_kl"}


def process_of(case: Case) -> DiscreteVP:
    """Build the process that a case's constructor describes."""
    arguments = case.info["constructor"]["args"]
    variance, loss = arguments["model_var_type"].lower(), LOSSES[arguments["loss_type"]]
    if loss.endswith("hybrid") and variance != "learned_range":
        loss = "kl" if variance == "fixed_small" else "mse"
    return DiscreteVP(
        VPConfig(
            steps=arguments["betas"]["num_diffusion_timesteps"],
            schedule=arguments["betas"]["schedule_name"],
            prediction={"EPSILON": "eps", "START_X": "x0"}[arguments["model_mean_type"]],  # type: ignore[arg-type]
            variance=variance,
            loss=loss,  # type: ignore[arg-type]
        )
    )


def log_variance_of(process: DiscreteVP, t: Tensor, prediction: Prediction) -> Tensor:
    """Return the (B, C, H, W) log-variance of the reverse steps t."""
    if process.config.variance == "learned_range":
        return process.tables.learned_log_variance(t, prediction.variance)
    table = process.tables.log_variances(process.config.variance)
    return at(table, t, prediction.x0).expand_as(prediction.x0)


@BOTH
@pytest.mark.parametrize("name", ["loss_mse_fixed", "loss_hybrid_mse", "loss_hybrid_rescaled_mse", "loss_rescaled_kl"])
def test_losses_and_their_gradients_equal_the_reference(name: str, dtype: torch.dtype) -> None:
    case = load(name)
    process = process_of(case)
    out = case.input("model_out", dtype).requires_grad_()
    x0, t, eps = case.input("x_start", dtype), case.input("t"), case.input("noise", dtype)
    losses = process.losses(out, x0, t, eps)
    losses.sum().backward()
    assert out.grad is not None
    case.check("loss", losses.detach())
    case.check("grad_model_out", out.grad)
    if "mse" in case.info["calls"][0]["outputs"]:
        mse = (out[:, :3] - eps).square().flatten(1).mean(1).detach()
        case.check("mse", mse)
        if process.config.loss != "mse":
            case.check("vb", losses.detach() - mse)


@BOTH
@CLIP
@pytest.mark.parametrize("name", ["fixed_small", "fixed_large", "learned_range", "xstart"])
def test_reverse_steps_equal_the_reference(name: str, clip: bool, dtype: torch.dtype) -> None:
    case, prefix = load(f"p_step_{name}"), "clip" if clip else "noclip"
    process = process_of(case)
    x, t, out, noise = (case.input(n, dtype) for n in ("x", "t", "model_out", "noise"))
    prediction = process.convert(out, x, t)
    if clip:
        prediction = prediction._replace(x0=prediction.x0.clamp(-1, 1))
    mean = process.tables.posterior_mean(t, prediction.x0, x)
    log_variance = log_variance_of(process, t, prediction)
    case.check(f"{prefix}.pred_xstart", prediction.x0)
    case.check(f"{prefix}.mean", mean)
    case.check(f"{prefix}.log_variance", log_variance)
    # The first small variance is zero; only its logarithm is clipped.
    plain = at(process.tables.posterior_variance, t, x).expand_as(x)
    small = process.config.variance == "fixed_small"
    case.check(f"{prefix}.variance", plain if small else log_variance.exp())
    moved = (t > 0).reshape(-1, 1, 1, 1) * (0.5 * log_variance).exp() * noise
    case.check(f"{prefix}.sample", mean + moved)


@BOTH
@CLIP
def test_the_sampler_uses_the_learned_variance(clip: bool, dtype: torch.dtype) -> None:
    case, prefix = load("p_step_learned_range"), "clip" if clip else "noclip"
    process, samples = process_of(case), []
    for i, t in enumerate(case.input("t").tolist()):
        x, out, noise = (case.input(n, dtype)[i : i + 1] for n in ("x", "model_out", "noise"))
        tables = process.tables
        two = Tables(**{k: v[max(t - 1, 0) : t + 1] for k, v in vars(tables).items()})
        steps: list[Tensor] = []

        def predict(x: Tensor, time: Tensor, out: Tensor = out) -> Prediction:
            return process.convert(out, x, time)

        def keep(k: int, x: Tensor, x0: Tensor, steps: list[Tensor] = steps) -> None:
            steps.append(x)

        ddpm(predict, x, two, lambda k, n=noise: n, variance="learned_range", clip=clip, callback=keep)  # type: ignore[misc]
        samples.append(steps[0])
    case.check(f"{prefix}.sample", torch.cat(samples))


@BOTH
@CLIP
@pytest.mark.parametrize("name", ["fixed_small", "learned_range"])
def test_terms_of_the_bound_equal_the_reference(name: str, clip: bool, dtype: torch.dtype) -> None:
    case, prefix = load(f"vb_terms_{name}"), "clip" if clip else "noclip"
    process = process_of(case)
    x0, x_t, t, out = (case.input(n, dtype) for n in ("x_start", "x_t", "t", "model_out"))
    prediction = process.convert(out, x_t, t)
    if clip:
        prediction = prediction._replace(x0=prediction.x0.clamp(-1, 1))
    log_variance = log_variance_of(process, t, prediction)
    case.check(f"{prefix}.pred_xstart", prediction.x0)
    case.check(f"{prefix}.vb", bound_term(process.tables, t, x0, x_t, prediction, log_variance))
    case.check("prior_bpd", prior_term(process.tables, x0))


@BOTH
def test_the_image_from_the_previous_one_equals_the_reference(dtype: torch.dtype) -> None:
    case, tables = load("q_process"), DiscreteVP(VPConfig()).tables
    x_t, previous, t = case.input("x_t", dtype), case.input("eps", dtype), case.input("t")
    share = 1 / tables.posterior_mean_coef1
    x0 = at(share, t, x_t) * previous - at(tables.posterior_mean_coef2 * share, t, x_t) * x_t
    case.check("predict_xstart_from_xprev", x0)
    assert (tables.posterior_mean(t, x0, x_t) - previous).abs().max() < (1e-4 if dtype == torch.float32 else 1e-12)


def test_level_probabilities_sum_to_one() -> None:
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, std in ((0.0, 0.1), (-0.95, 0.3), (1.2, 0.5), (0.3, 0.05)):
        log_std = torch.tensor(std, dtype=torch.float64).log()
        total = discrete_log_likelihood(levels, torch.tensor(mean, dtype=torch.float64), log_std).exp().sum()
        assert total.item() == pytest.approx(1, abs=1e-9)


HYBRID: dict[str, Any] = {"variance": "learned_range", "loss": "hybrid"}


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_the_bound_trains_the_variance_alone(prediction: Any) -> None:
    hybrid = DiscreteVP(VPConfig(prediction=prediction, **HYBRID))
    plain = DiscreteVP(VPConfig(prediction=prediction))
    t, x0, eps = torch.tensor([0, 3, 500, 999]), normal(4, 2, 3, 3).clamp(-1, 1), normal(4, 2, 3, 3, seed=1)
    out = normal(4, 4, 3, 3, seed=2).requires_grad_()
    hybrid.losses(out, x0, t, eps).sum().backward()
    mean = out.detach()[:, :2].requires_grad_()
    plain.losses(mean, x0, t, eps).sum().backward()
    assert out.grad is not None and mean.grad is not None
    assert torch.equal(out.grad[:, :2], mean.grad)
    assert bool((out.grad[1:, 2:] != 0).all())  # in step 0 a level of probability 0 has no gradient


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_min_snr_weights_the_error_of_the_image(prediction: Any) -> None:
    process = DiscreteVP(VPConfig(prediction=prediction, weighting="min_snr"))
    t, x0, eps = torch.tensor([0, 60, 400, 999]), normal(4, 2, 3, 3), normal(4, 2, 3, 3, seed=1)
    out = normal(4, 2, 3, 3, seed=2)
    x_t = process.add_noise(x0, t, eps)
    error = (process.convert(out, x_t, t).x0 - x0).square().flatten(1).mean(1)
    want = process.log_snr(t).exp().clamp(max=5.0) * error
    assert (process.losses(out, x0, t, eps) / want - 1).abs().max() < 1e-9


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "scaled_linear"])
def test_zero_terminal_snr_leaves_no_signal_at_the_end(schedule: Any, prediction: Any) -> None:
    process = DiscreteVP(VPConfig(schedule=schedule, prediction=prediction, zero_terminal_snr=True, **HYBRID))
    plain = DiscreteVP(VPConfig(schedule=schedule))
    alpha, sigma = process.alpha_sigma(torch.tensor([0, 999]), torch.empty(1, dtype=torch.float64))
    assert (alpha.flatten()[1].item(), sigma.flatten()[1].item()) == (0.0, 1.0)
    assert process.tables.alphas_cumprod[0].item() == pytest.approx(plain.tables.alphas_cumprod[0].item(), abs=1e-12)
    assert process.tables.alphas_cumprod[-1].item() == 0.0
    t = torch.tensor([999, 998, 0])
    x0, eps, out = normal(3, 1, 2, 2).clamp(-1, 1), normal(3, 1, 2, 2, seed=1), normal(3, 2, 2, 2, seed=2)
    for time in (t, t.double(), t.double() - torch.tensor([0.5, 0.5, 0.0])):
        assert bool(process.add_noise(x0, time, eps).isfinite().all())
    assert bool(process.losses(out, x0, t, eps).isfinite().all())
    assert bool(process.log_snr(torch.tensor([998.0, 998.5, 999.0])).isfinite().all())


def test_eps_is_refused_where_no_signal_is_left() -> None:
    with pytest.raises(ValueError, match="eps says nothing about the image"):
        VPConfig(zero_terminal_snr=True)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"variance": "learned_range"}, "would leave a learned variance untrained; choose hybrid"),
        ({"loss": "hybrid"}, "process.loss: hybrid trains a learned variance; set process.variance=learned_range"),
        ({"loss": "rescaled_hybrid"}, "process.loss: rescaled_hybrid trains a learned variance"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma: must be positive"),
        ({"min_snr_gamma": 5.0}, "min_snr_gamma: belongs to process.weighting=min_snr; with none leave it at null"),
        ({"p_mean": 0.0}, "p_mean: belongs to process.times=log_normal; with uniform leave it at -1.2"),
        ({"loss_space": "v", "weighting": "edm"}, "loss_space: v weights the noise levels, and so does .*=edm"),
        ({"weighting": "min_snr", "loss": "kl"}, "loss: kl weights the noise levels itself"),
        ({"loss_space": "eps", "prediction": "v", "zero_terminal_snr": True}, "loss_space: eps says nothing"),
        ({"schedule": "given"}, "must have process.steps=1000 values with schedule given .* got 0 with schedule given"),
        ({"betas": [0.1, 0.2]}, "none with any other, got 2 with schedule linear"),
        ({"schedule": "scaled_linear", "steps": 12}, "above 12 with the scaled_linear schedule, got 12"),
    ],
)
def test_contradictory_settings_are_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        VPConfig(**arguments)


def test_given_betas_define_the_process() -> None:
    process = DiscreteVP(VPConfig(steps=3, schedule="given", betas=[0.1, 0.2, 0.5]))
    assert process.tables.alphas_cumprod.tolist() == pytest.approx([0.9, 0.72, 0.36])
    with pytest.raises(ValueError, match=r"betas must lie in \(0, 1\]"):
        DiscreteVP(VPConfig(steps=2, schedule="given", betas=[0.1, 1.5]))


def test_scaled_linear_betas_are_those_of_latent_diffusion() -> None:
    betas = DiscreteVP(VPConfig(schedule="scaled_linear")).tables.betas
    assert betas[[0, -1]].tolist() == pytest.approx([8.5e-4, 0.012])
    assert betas.sqrt().diff().std() < 1e-12


def test_a_network_that_does_not_fit_the_variance_is_refused() -> None:
    learned, fixed = DiscreteVP(VPConfig(**HYBRID)), DiscreteVP(VPConfig())
    x, t = normal(2, 3, 2, 2), torch.tensor([5, 6])
    with pytest.raises(ValueError, match=r"learned_range needs a network of 6 output channels for 3 .* got 3"):
        learned.convert(x, x, t)
    with pytest.raises(ValueError, match=r"fixed_large needs a network of 3 output channels for 3 .* got 6"):
        fixed.convert(torch.cat([x, x], dim=1), x, t)
    with pytest.raises(ValueError, match="needs a network that was trained to predict its variance"):
        ddpm(lambda x, t: fixed.convert(x, x, t), x, fixed.tables, lambda k: x, variance="learned_range")


def test_a_learned_variance_follows_the_respacing() -> None:
    process = DiscreteVP(VPConfig(**HYBRID))
    tables = process.tables.respaced(10)
    x, out = normal(1, 1, 2, 2), torch.cat([normal(1, 1, 2, 2), torch.ones(1, 1, 2, 2, dtype=torch.float64)], dim=1)
    prediction = process.convert(out, x, tables.time[5:6])
    assert torch.allclose(tables.learned_log_variance(5, prediction.variance), tables.betas[5].log())


@pytest.mark.parametrize("loss", ["hybrid", "rescaled_kl"])
def test_a_learned_variance_learns_from_outputs_in_bfloat16(loss: Any) -> None:
    """Its bounds differ by 0.02 at most steps and lie near -9, where bfloat16 numbers are 0.06 apart."""
    process = DiscreteVP(VPConfig(variance="learned_range", loss=loss))
    draw = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(100, 1, 4, 4, generator=draw) for _ in range(2))
    out, t = torch.randn(100, 2, 4, 4, generator=draw).bfloat16(), torch.arange(0, 1000, 10)

    def gradients(dtype: torch.dtype) -> Tensor:
        given = out.to(dtype).requires_grad_()
        process.losses(given, x0, t, eps).sum().backward()
        assert given.grad is not None
        return given.grad[:, 1].double()

    wanted = gradients(torch.float32)
    assert (gradients(torch.bfloat16) - wanted).norm() < 0.01 * wanted.norm()
    assert (gradients(torch.bfloat16) != 0).double().mean() > 0.99
