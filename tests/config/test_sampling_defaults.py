"""Sampling defaults follow from process and space, and steps that do not start in noise are refused."""

import pytest

from diffbench.config.kinds import RunConfig
from diffbench.config.load import change, load
from diffbench.core.errors import UserError

PIXELS, LATENT = "experiments/digits/dit.yaml", "experiments/digits-latent/dit.yaml"
LATE = {"1": 0, "ddim1": 0, "1,1": 500, "1,1,1": 667, "10,1": 500, "ddim2": 500}
"""Map from `sample.steps` to the step, of 1000, at which sampling would start."""


def config(path: str, *overrides: str) -> RunConfig:
    found = load(path, list(overrides))
    assert isinstance(found, RunConfig)
    return found


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "heun", "dpm_solver"])
def test_only_pixels_are_clipped_and_only_by_ddpm_and_ddim(sampler: str) -> None:
    args = [f"sample.sampler={sampler}", "sample.clip=null"]
    assert config(PIXELS, *args).sample.clip is (sampler in ("ddpm", "ddim"))
    assert config(LATENT, *args).sample.clip is False
    values = ["data.name=none", "data.channels=4", "data.image_size=8", "evaluate.every_images=null"]
    assert config(PIXELS, *values, *args).sample.clip is False  # neither grey nor colour, so not pixels
    assert config(LATENT, *args[:1], "sample.clip=true").sample.clip is True


def test_changing_the_sampler_of_a_run_updates_a_default_clip() -> None:
    run = config(PIXELS)
    assert run.sample.clip is True
    assert change(run, {"sample": {"sampler": "dpm_solver"}}).sample.clip is False
    assert change(config(PIXELS, "sample.sampler=heun"), {"sample": {"sampler": "ddim"}}).sample.clip is True
    assert change(config(PIXELS, "sample.clip=false"), {"sample": {"sampler": "ddim"}}).sample.clip is False  # explicit
    assert change(run, {"sample": {"sampler": "heun", "clip": True}}).sample.clip is True
    assert change(run, {"sample": {"steps": "50"}}).sample.clip is True


@pytest.mark.parametrize("steps", LATE)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler", "heun", "dpm_solver"])
def test_steps_that_do_not_start_in_noise_are_refused(sampler: str, steps: str) -> None:
    with pytest.raises(UserError) as caught:
        config(PIXELS, f"sample.sampler={sampler}", f"sample.steps='{steps}'")
    assert str(caught.value) == (
        f"command line: sample.steps: {steps!r} does not fit process.steps=1000: sampling would begin at step"
        f" {LATE[steps]} of 999, where the image still shows through the noise; take at least 2 steps, in the last"
        " section too, or at least ddim4"
    )


@pytest.mark.parametrize("steps", ["2", "250", "1000", "10,15,20", "1,1,2", "ddim4", "ddim25", "ddim250"])
def test_published_steps_are_accepted(steps: str) -> None:
    assert config(PIXELS, f"sample.steps='{steps}'").sample.steps == steps


@pytest.mark.parametrize(("path", "unit"), [(PIXELS, 0.5), (LATENT, 1.0)])
def test_sigma_data_of_edm_defaults_to_the_standard_deviation_of_the_data(path: str, unit: float) -> None:
    args = ["process.name=edm", "sample.sampler=heun", "sample.steps='18'"]
    assert config(path, *args).process.sigma_data == unit
    assert config(path, *args, "process.sigma_data=0.7").process.sigma_data == 0.7
    assert (
        config(path, "process.variance=fixed_large", "process.loss=mse", "process.weighting=edm").process.sigma_data
        == unit
    )
    assert config(path, "process.variance=fixed_large", "process.loss=mse").process.sigma_data is None


def test_a_null_shift_follows_the_image_size() -> None:
    assert [config(PIXELS, f"data.size={size}", "process.shift=null").process.shift for size in (8, 32)] == [
        1 / 8,
        1 / 2,
    ]
    with pytest.raises(
        UserError, match=r"process\.shift: null takes it from the image shape; with an autoencoder give a number"
    ):
        config(LATENT, "process.shift=null")
