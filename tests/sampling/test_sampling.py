"""Sampling as in a run: every sampler under every process, guidance by config, strips, non-finite output."""

import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffbench.config.sections import SampleConfig
from diffbench.core.errors import UserError
from diffbench.denoisers.classifier import ClassifierConfig, NoisyClassifier
from diffbench.diffusion import EDM, PAIRS, DiscreteVP, EDMConfig, Flow, FlowConfig, Process, VPConfig
from diffbench.sampling.guided import GuidanceModels, gradient_of, guided
from diffbench.sampling.images import Trajectory
from diffbench.sampling.sampler import Sampler, sample

PROCESSES: dict[str, Process] = {
    "vp": DiscreteVP(VPConfig(1000, "cosine")),
    "edm": EDM(EDMConfig()),
    "flow": Flow(FlowConfig()),
}
EVERY_PAIR = [(process, sampler) for process, samplers in PAIRS.items() for sampler in samplers]


class Towards(nn.Module):
    """A denoiser that predicts the grey level of its label, -1 + y / 5, under any process; null is 0."""

    def __init__(self, process: Process, shift: float = 0.0) -> None:
        super().__init__()
        self.process, self.shift = process, nn.Parameter(torch.tensor(shift, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        grey = (torch.where(y == 10, 5.0, y) / 5 - 1 + self.shift).to(x.dtype)[:, None, None, None]
        if isinstance(self.process, EDM):  # x and t arrive scaled for the network
            sigma = (4 * t).exp()[:, None, None, None]
            data = self.process.sigma_data
            total = (sigma**2 + data**2).sqrt()
            x = x * total
            return (grey - (data / total) ** 2 * x) / (sigma * data / total)
        alpha, sigma = self.process.alpha_sigma(t.long() if isinstance(self.process, DiscreteVP) else t, x)
        if isinstance(self.process, Flow):
            return (grey - x) / sigma.clamp(min=1e-9)  # the velocity x0 - eps where alpha = 1 - sigma
        return (x - alpha * grey) / sigma


def greys(process: Process, config: SampleConfig, labels: Tensor, **options: Any) -> Tensor:
    images = Sampler(Towards(process), process, (1, 4, 4), null_label=10, **options)(labels, config)
    assert (images == images[:, :1, :1, :1]).all()
    return images[:, 0, 0, 0]


@pytest.mark.parametrize(("process", "sampler"), EVERY_PAIR)
def test_every_pair_ends_at_the_image_that_the_network_predicts(process: str, sampler: Any) -> None:
    labels, settings = torch.tensor([0, 3, 5, 9]), SampleConfig(sampler, "100")
    images = Sampler(Towards(PROCESSES[process]), PROCESSES[process], (1, 4, 4))(labels, settings).double()
    # Solvers in coordinates other than the noise level leave some noise: a level or two of 255.
    assert (images.mean(dim=(1, 2, 3)) - torch.tensor([0, 77, 128, 230])).abs().max() < 5
    assert images.std(dim=(1, 2, 3)).max() < 8


@pytest.mark.parametrize(("process", "sampler"), EVERY_PAIR)
def test_a_sample_depends_only_on_seed_and_number(process: str, sampler: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 1, 3, padding=1)).double()
    labels = torch.zeros(12).long()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return self.net(x)

    config = SampleConfig(sampler, "6", batch_size=12)

    def draw(size: int, first: int = 0, seed: int = 0) -> Tensor:
        sampler = Sampler(Net(), PROCESSES[process], (1, 8, 8))
        return sampler(labels[first:], replace(config, batch_size=size), first=first, seed=seed)

    whole = draw(12)
    assert len({image.numpy().tobytes() for image in whole}) == 12
    for other in (draw(5), torch.cat([whole[:7], draw(12, first=7)])):
        assert (other == whole).double().mean() >= 0.999
    assert not torch.equal(draw(12, seed=1), whole)


def test_guidance_extrapolates_the_predicted_image() -> None:
    # Label 7 is grey 0.4, null 0: guided by 1.5 it is 0.6, 204 of 255; away from 0.4 - 0.2 it is 0.5.
    process, labels = PROCESSES["vp"], torch.tensor([7])
    plain = SampleConfig("ddim", "10")
    assert greys(process, plain, labels).item() == 179
    assert greys(process, replace(plain, guidance=1.5), labels).item() == 204
    models = GuidanceModels(Towards(process, shift=-0.2))
    assert greys(process, replace(plain, guidance=1.5, weak_model="x"), labels, guidance_models=models).item() == 191


def test_guidance_follows_its_interval_and_power_cosine_schedule() -> None:
    process, labels = PROCESSES["vp"], torch.tensor([7])
    config = SampleConfig("ddim", "10", guidance=1.5)
    never = replace(config, guidance_interval=[1e5, 1e6])
    assert greys(process, never, labels).item() == 179
    assert greys(process, replace(config, guidance_interval=[0.0, 1e9]), labels).item() == 204
    # The last step, at time 0, decides, and there the power-cosine weight is at its largest.
    assert greys(process, replace(config, guidance_schedule="power_cosine"), labels).item() == 204


class Linear(nn.Module):
    """A classifier whose log p(y=1) rises with the image's sum."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        total = self.weight * x.sum(dim=(1, 2, 3))
        return torch.stack([torch.zeros_like(total), total], dim=1)


def test_the_gradient_of_a_classifier_is_that_of_its_log_probability() -> None:
    process = PROCESSES["vp"]
    x, t = torch.full((2, 1, 2, 2), 0.1, dtype=torch.float64), torch.tensor([10, 10])
    found = gradient_of(Linear(), process, torch.tensor([1, 0]))(x, t)
    p = torch.sigmoid(torch.tensor(0.4, dtype=torch.float64))
    assert torch.allclose(found[0], 1 - p) and torch.allclose(found[1], -p)
    # EDM's network sees x / sqrt(sigma^2 + data^2): the chain rule through that scale.
    edm = PROCESSES["edm"]
    sigma = torch.tensor([2.0, 2.0], dtype=torch.float64)
    scale = 1 / (4 + 0.25) ** 0.5
    q = torch.sigmoid(0.4 * torch.tensor(scale, dtype=torch.float64))
    assert torch.allclose(gradient_of(Linear(), edm, torch.tensor([1, 0]))(x, sigma)[0], scale * (1 - q))


def test_a_classifier_moves_samples_towards_its_class() -> None:
    class Gaussian(Towards):
        """The exact denoiser of images whose pixels are normal with standard deviation 0.3."""

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            alpha, sigma = self.process.alpha_sigma(t.long(), x)
            return x * sigma / (alpha**2 * 0.09 + sigma**2)

    process = PROCESSES["vp"]
    config = SampleConfig("ddpm", "50", classifier="x", classifier_scale=0.5)
    net, labels = Gaussian(process), torch.ones(4).long()
    draw: Callable[..., Tensor] = lambda c, m: Sampler(net, process, (1, 4, 4), guidance_models=m)(labels, c).float()  # noqa: E731
    assert (
        draw(config, GuidanceModels(classifier=Linear())).mean() > draw(config.unguided(), GuidanceModels()).mean() + 3
    )
    assert torch.equal(
        draw(replace(config, classifier_scale=0.0), GuidanceModels()), draw(config.unguided(), GuidanceModels())
    )


def test_a_classifier_refuses_a_mixture_of_classes() -> None:
    config, models = SampleConfig(classifier="x"), GuidanceModels(classifier=Linear())
    with pytest.raises(ValueError, match=r"sample\.classifier: guides towards one class, not towards a mixture"):
        guided(lambda x, t, y: None, torch.ones(1, 3), PROCESSES["vp"], config, models=models)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"guidance": 2.0}, "guidance 2.0 needs a network with a null class"),
        ({"guidance": 2.0, "weak_model": "runs/w"}, "sample.weak_model: runs/w was not loaded"),
        ({"classifier": "runs/c"}, "sample.classifier: runs/c was not loaded"),
    ],
)
def test_guidance_without_its_network_is_refused(changes: dict[str, Any], text: str) -> None:
    process = PROCESSES["vp"]
    with pytest.raises(ValueError, match=text):
        guided(lambda x, t, y: None, torch.zeros(1), process, SampleConfig(**changes))  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("process", PROCESSES)
def test_non_finite_output_names_step_and_noise_level(process: str) -> None:
    calls = {"vp": 10, "edm": 9, "flow": 10}[process]  # per batch; a failed batch is drawn again to find the step

    class Broken(Towards):
        calls = 0

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            self.calls += 1
            out = super().forward(x, t, y)
            return out * float("nan") if self.calls in (3, 3 + calls) else out

    config = SampleConfig("ddim", "10") if process == "vp" else SampleConfig("heun", "5")
    text = r"not finite at call 3 of the \w+ sampler, time [\d.e-]+, noise level sigma/alpha [\d.e+]+|ended in values"
    with pytest.raises(UserError, match=text):
        Sampler(Broken(PROCESSES[process]), PROCESSES[process], (1, 4, 4))(torch.zeros(2).long(), config)


def test_an_adaptive_sampler_that_fails_is_reported_in_one_line() -> None:
    process, labels = PROCESSES["flow"], torch.zeros(2).long()

    class Rough(Towards):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return torch.rand_like(x) * 100

    sampler = Sampler(Rough(process), process, (1, 4, 4), name="runs/a")
    with pytest.raises(UserError, match=r"^runs/a: sample\.rtol: dopri5 reached 0\.\d+ of 1 in 1000 steps; loosen"):
        sampler(labels, SampleConfig("dopri5", rtol=1e-9, atol=1e-12))
    sampler.denoiser = Towards(process, shift=float("nan"))
    with pytest.raises(UserError, match=r"^runs/a: the network's output is not finite at call 1 of the dopri5 sampler"):
        sampler(labels, SampleConfig("dopri5"))


def test_latents_are_not_clipped_by_default() -> None:
    class Bright(Towards):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            alpha, sigma = self.process.alpha_sigma(t.long(), x)
            return (x - 2 * alpha) / sigma  # a predicted image of 2 everywhere

    process, labels = PROCESSES["vp"], torch.zeros(1).long()
    for options, want in (({}, 1.0), ({"decode": lambda z: z}, 2.0), ({"raw": True}, 2.0)):
        seen: list[Tensor] = []
        sampler = Sampler(Bright(process), process, (1, 4, 4), **options)
        for settings in (SampleConfig("ddim", "10"), SampleConfig("ddpm", "10")):
            sampler(labels, settings, callback=lambda k, x, x0, seen=seen: seen.append(x0))
        assert (torch.stack(seen) - want).abs().max() < 1e-3


def test_clipped_pixels_are_counted_and_non_finite_ones_refused() -> None:
    process, config, labels = PROCESSES["vp"], SampleConfig("ddim", "10", clip=False), torch.zeros(2).long()
    pixels = torch.tensor([-1.5, -1.002, 0.0, 1.002, 1.5, 2.0]).expand(2, 1, 1, 6)  # less than a level is not counted
    sampler = Sampler(Towards(process), process, (1, 4, 4), decode=lambda x: pixels, name="runs/a")
    assert sampler(labels, config)[0, 0, 0].tolist() == [0, 0, 128, 255, 255, 255]
    assert (sampler.values, sampler.clipped) == (12, 6)
    sampler.decode = lambda x: torch.tensor([float("nan"), float("inf"), 0.0]).expand(2, 1, 1, 3)
    with pytest.raises(UserError, match=r"^runs/a: 4 values of the samples are not finite$"):
        sampler(labels, config)
    assert (sampler.values, sampler.clipped) == (12, 6)


def test_batches_shrink_until_they_fit_and_the_images_stay_the_same() -> None:
    process, sizes = PROCESSES["vp"], []

    class Small(Towards):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            sizes.append(len(x))
            if len(x) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x, t, y)

    labels = torch.arange(10)
    draw: Callable[..., Tensor] = lambda net: Sampler(net, process, (1, 4, 4))(labels, SampleConfig("ddim", "4"))  # noqa: E731
    assert torch.equal(draw(Small(process)), draw(Towards(process)))
    assert sizes[:3] == [10, 5, 3] and set(sizes[3:]) == {3, 1}


def test_batches_drawn_in_parallel_give_the_same_images_as_one_by_one() -> None:
    process, together = PROCESSES["vp"], threading.Barrier(2, timeout=60)

    class Meeting(Towards):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            together.wait()  # passes only if another thread arrives too
            assert not torch.is_grad_enabled()
            return super().forward(x, t, y)

    labels, config, done = torch.arange(10), SampleConfig("ddpm", "4", batch_size=3), list[int]()
    alone = Sampler(Towards(process), process, (1, 4, 4))
    sampler = Sampler(Meeting(process), process, (1, 4, 4), at_once=2)
    want = alone(labels, config, first=5)
    assert torch.equal(sampler(labels, config, first=5, progress=done.append), want)
    assert (done, sampler.values) == ([3, 3, 3, 1], alone.values)
    trajectory = Trajectory(count=3)
    assert torch.equal(sampler(labels, config, first=5, callback=trajectory), want)
    assert len(trajectory.noisy) == 4 and all(len(x) == 3 for x in trajectory.noisy)  # of the first batch


def test_an_error_in_one_batch_ends_the_parallel_ones() -> None:
    process, started, calls = PROCESSES["vp"], threading.Barrier(2, timeout=60), []

    class Broken(Towards):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            if not calls or y[0] == 0:
                started.wait()
            calls.append(int(y[0]))
            if y[0] == 0:
                raise UserError("broken")
            return super().forward(x, t, y)

    sampler = Sampler(Broken(process), process, (1, 4, 4), at_once=2)
    with pytest.raises(UserError, match=r"^broken$"):
        sampler(torch.arange(2), SampleConfig("ddim", "1000", batch_size=1))
    assert calls.count(1) < 1000


def test_an_exception_in_check_ends_sampling() -> None:
    process, checks = PROCESSES["vp"], []

    def check() -> None:
        checks.append(1)
        if len(checks) == 7:
            raise KeyboardInterrupt

    for at_once in (1, 2):
        checks.clear()
        sampler = Sampler(Towards(process), process, (1, 4, 4), at_once=at_once)
        with pytest.raises(KeyboardInterrupt):
            sampler(torch.arange(4), SampleConfig("ddim", "10", batch_size=1), check=check)
        assert len(checks) >= 7


def test_the_trajectory_records_every_step_and_draws_strip_and_animation(tmp_path: Path) -> None:
    process, trajectory = PROCESSES["edm"], Trajectory(count=2)
    sampler = Sampler(Towards(process), process, (1, 4, 4))
    sampler(torch.tensor([0, 9, 5]), SampleConfig("heun", "12"), callback=trajectory)
    assert len(trajectory.noisy) == len(trajectory.predicted) == 12
    strip = trajectory.strip(columns=4)
    # Two samples, two rows each, four columns of 40 pixels and a border of 2 on each side.
    assert strip.shape == (4 * 44, 4 * 44, 3)
    cell = strip[44 + 20 :: 88, 20 + 3 * 44, 0]
    assert cell.tolist() == [0, 230]  # the predicted images of labels 0 and 9 at the last step
    trajectory.save_gif(tmp_path / "steps.gif")
    with Image.open(tmp_path / "steps.gif") as gif:
        assert gif.n_frames == 12  # type: ignore[attr-defined]
        gif.seek(11)
        last = np.asarray(gif.convert("L"))
    assert last.shape == (2 * 68, 2 * 68)
    assert abs(int(last[34, 68 + 34]) - 0) <= 3 and abs(int(last[68 + 34, 68 + 34]) - 230) <= 3


def test_the_callback_sees_only_the_first_batch_and_continues_if_it_is_halved() -> None:
    process, trajectory, calls = PROCESSES["vp"], Trajectory(count=4), [0]

    class Full(Towards):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            calls[0] += 1
            if calls[0] == 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x, t, y)

    sampler = Sampler(Full(process), process, (1, 4, 4))
    sampler(torch.arange(20) % 10, SampleConfig("ddim", "10", batch_size=8), callback=trajectory)
    assert [len(x) for x in trajectory.noisy] == [4] * 10 and trajectory.strip().shape[0] == 8 * 44


def test_invalid_sampling_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"^network: has no parameters"):
        sample(nn.Identity(), PROCESSES["vp"], 2, shape=(1, 4, 4))
    for name in ("edm", "flow"):
        with pytest.raises(
            ValueError, match=r"^sample\.guidance_schedule: power_cosine follows the steps of vp; choose"
        ):
            greys(PROCESSES[name], SampleConfig(guidance=2, guidance_schedule="power_cosine"), torch.arange(2))


def test_batches_on_a_cpu_are_limited_to_what_fits_its_caches() -> None:
    process = PROCESSES["vp"]
    sampler = Sampler(Towards(process), process, (1, 4, 4))
    assert [sampler.batch_size(SampleConfig(batch_size=n)) for n in (100, 250, 500)] == [100, 250, 250]
    sampler.denoiser.to("meta")
    assert sampler.batch_size(SampleConfig(batch_size=500)) == 500


def test_the_classifier_accepts_image_sides_divisible_by_its_divisor() -> None:
    net = NoisyClassifier(ClassifierConfig(16, [1, 2], attention_resolutions=[4], norm_groups=4), 8, 1, 10)
    for side in (8, 16):
        assert net(torch.zeros(3, 1, side, side), torch.zeros(3)).shape == (3, 10)
    with pytest.raises(ValueError, match="divisible by 2, got 1x9x9"):
        net(torch.zeros(3, 1, 9, 9), torch.zeros(3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "bf16"}, "sample.precision: unknown value 'bf16'; choose from 32-true, bf16-mixed"),
        (
            {"variance": "fixed-small"},
            "sample.variance: unknown value 'fixed-small'; choose from fixed_small, fixed_large",
        ),
        ({"sampler": "DDIM"}, "sample.sampler: unknown value 'DDIM'; choose from ddpm, ddim"),
        (
            {"sampler": "ddim", "variance": "fixed_small"},
            "sample.variance: belongs to sample.sampler=ddpm; with ddim leave it at fixed_large",
        ),
    ],
)
def test_settings_from_a_script_are_checked_like_those_from_a_file(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SampleConfig(**settings)
