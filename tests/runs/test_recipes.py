"""The papers' recipes and the classifier: every YAML trains and samples; and what they need besides the common loss."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffbench.cli import main
from diffbench.config.load import change, load, to_yaml
from diffbench.config.sections import EMAConfig
from diffbench.core.pixels import from_uint8
from diffbench.data.datamodule import PositionDataset, PositionSampler
from diffbench.data.digits import DigitsConfig, digits
from diffbench.diffusion import DiscreteVP, VPConfig
from diffbench.runs.lifecycle import train
from diffbench.training.diffusion import DiffusionModule

Capture = pytest.CaptureFixture[str]
DIT = "experiments/digits/dit.yaml"
TINY = ["denoiser.hidden_size=16", "denoiser.num_heads=2", "denoiser.depth=1"]
RECIPES = sorted(str(p) for p in Path("experiments/digits-papers").glob("[!_]*.yaml"))


@pytest.mark.parametrize("path", RECIPES)
def test_every_recipe_trains_and_samples(path: str, tmp_path: Path, capsys: Capture) -> None:
    small = ["data.size=8"] if "jit" in path else []  # avoids training an extractor for larger digits
    assert main(["train", path, "debug=smoke", f"runs_dir={tmp_path}", *small]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^label_accuracy/digits-cnn@20 .*%$", out, re.MULTILINE)
    (run,) = (tmp_path / "digits-papers").iterdir()
    assert (run / "samples" / "final-000000016.png").exists()
    assert main(["sample", str(run), "n=3", "steps=3", f"out={tmp_path / 'x.png'}", "strip=true", "gif=true"]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in ("x.png", "x.strip.png", "x.steps.gif")]


LARGE = {
    "dit": ["denoiser.hidden_size=32", "denoiser.num_heads=2", "denoiser.depth=1"],
    "ddpmpp": ["denoiser.model_channels=16", "denoiser.num_blocks=1"],
    "diffit": ["denoiser.channels=[16,16,16]", "denoiser.blocks=[1,1,1]", "denoiser.norm_groups=8"],
    "unet": ["denoiser.model_channels=16", "denoiser.num_res_blocks=1", "denoiser.norm_groups=8"],
}
LARGE |= {
    "uvit": ["denoiser.hidden_size=32", "denoiser.num_heads=2", "denoiser.depth=2"],
    "segformer": ["denoiser.hidden_sizes=[16,32,32]", "denoiser.depths=[1,1,1]", "denoiser.num_heads=[1,2,2]"],
}
LARGE |= {"jit-b-16": [*LARGE["dit"], "data.image_size=32"]}
LARGE |= {"sit": LARGE["dit"], "adm": [*LARGE["unet"], "denoiser.num_head_channels=8"]}


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 colour images of 32x32 in four classes."""
    folder = tmp_path_factory.mktemp("pictures")
    noise = torch.randint(0, 256, (40, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for i, image in enumerate(noise.numpy()):
        path = folder / f"class{i % 4}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


@pytest.mark.parametrize(
    "path",
    sorted(
        str(p)
        for f in ("cifar10*", "imagenet256")
        for p in Path("experiments").glob(f"{f}/[!_]*.yaml")
        if "latent" not in str(p) and p.stem != "classifier"
    ),
)
def test_every_large_recipe_takes_steps_and_samples_at_a_reduced_size(
    path: str, image_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    config = load(path)
    assert config.trainer.max_images >= 25_600_000
    small = [*LARGE[Path(path).stem], "trainer.precision=32-true", f"data.path={image_folder}", f"runs_dir={tmp_path}"]
    assert main(["train", path, "debug=smoke", "evaluate=false", *small]) == 0, capsys.readouterr().err
    (run,) = tmp_path.glob("*/*")
    assert main(["sample", str(run), "n=2", "steps=3", f"out={tmp_path / 'x.png'}"]) == 0


def test_recipes_match_the_papers() -> None:
    recipe = {Path(path).stem: load(path) for path in RECIPES}
    dit, sit, adm = recipe["dit"], recipe["sit"], recipe["adm"]
    assert (dit.process.schedule, dit.process.variance, dit.process.loss) == ("linear", "learned_range", "hybrid")
    assert (dit.optimizer.name, dit.optimizer.weight_decay, dit.optimizer.grad_clip_norm) == ("adamw", 0.0, None)
    assert (dit.optimizer.decay_images, dit.optimizer.warmup_images, dit.ema.decays) == (None, 0, [0.017])
    assert (sit.process.name, sit.process.path, sit.sample.sampler) == ("flow", "linear", "euler_maruyama")
    assert (adm.process.schedule, adm.denoiser.resblock_updown, adm.trainer.label_dropout) == ("cosine", True, 0.0)
    for jit in (recipe["jit"], load("experiments/imagenet256/jit-b-16.yaml")):
        p = jit.process
        assert (p.prediction, p.loss_space, p.times, p.logit_mean, p.logit_std) == (
            "x0", "velocity", "logit_normal", -0.8, 0.8,
        )  # fmt: skip
        assert (jit.optimizer.betas, jit.sample.sampler, jit.sample.steps) == ([0.9, 0.95], "heun", "50")
    for name in ("ddpmpp", "diffit"):
        edm = recipe[name]
        assert (edm.process.name, edm.process.p_mean, edm.process.sigma_data) == ("edm", -1.2, 0.5)
        assert (edm.sample.sampler, edm.sample.steps) == ("heun", "18")
        assert (edm.ema.half_life, edm.trainer.augment) == ([0.0025], 0.12)
    assert recipe["lightningdit"].ema.half_life == [round(6931 / 80_000, 3)]
    # Half-lives are shares of a run: with a fixed decay, a study's shorter runs would still average initial weights.
    assert all(half < 1 for r in recipe.values() for half in r.ema.half_life or [math.inf])


def test_choosing_another_process_also_chooses_its_sampler(tmp_path: Path) -> None:
    for process, sampler in {"edm": "heun", "flow": "euler"}.items():
        config = load(DIT, [f"process.name={process}"])
        assert (config.process.name, config.sample.sampler, config.sample.clip) == (process, sampler, False)
        run = train(DIT, [f"process.name={process}", "debug=smoke", *TINY, f"runs_dir={tmp_path}"])
        assert run.sample_tensor(n=2, steps=3).shape == (2, 1, 8, 8)
        log = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        assert any("val/bound" in line and math.isfinite(line["val/bound"]) for line in log)


REFUSED = {
    "process.name=edm sample.sampler=ddpm": "sample.sampler: sampler ddpm does not suit the edm process: it goes back"
    " through the discrete steps of vp; choose from heun, euler, dpm_solver",
    "process.name=flow sample.steps=ddim10": "sample.steps: 'ddim10' does not fit process.name=flow: steps must be a",
    "process.name=flow trainer.time_sampling=loss_aware": "trainer.time_sampling: loss_aware needs the steps of"
    " process.name=vp, not flow; choose uniform or stratified",
    "process.zero_terminal_snr=true": "process.prediction: eps says nothing about the image where no signal is left;"
    " with process.zero_terminal_snr=true choose v or x0",
    "process.loss_space=v process.weighting=edm": "process.loss_space: v weights the noise levels, and so does"
    " process.weighting=edm; leave one of them at null or none",
    "process.prediction=edm": "process.prediction: unknown value 'edm'; choose from x0, eps, v, velocity",
    "process.name=edm process.prediction=velocty": "choose from edm, x0, eps, v, velocity; did you mean 'velocity'?",
    "process.logit_std=2": "process.logit_std: belongs to process.times=logit_normal; with uniform leave it at 1",
    "process.shift=2 trainer.time_sampling=loss_aware": "trainer.time_sampling: loss_aware replaces",
    "process.name=flow sample.guidance_schedule=power_cosine": "sample.guidance_schedule: power_cosine follows the"
    " steps of process.name=vp, not flow; choose constant",
    "sample.sampler=ddpm sample.s_churn=3": "sample.s_churn: belongs to sample.sampler=heun; with ddpm leave it at 0",
    "sample.sampler=heun sample.s_churn=3": "sample.s_churn: belongs to process.name=edm, not vp; leave it at 0",
    "sample.sampler=ddim sample.rtol=0.1": "sample.rtol: belongs to sample.sampler=dopri5; with ddim leave it at 0.001",
    "sample.guidance_interval=[2,1]": "sample.guidance_interval: must be two rising numbers",
    "sample.guidance_channels=0": "sample.guidance_channels: must be at least 1 or null, got 0",
    "trainer.augment=0.5": "trainer.augment: denoiser.name=dit takes no augmentation label",
    "trainer.augment=2": "trainer.augment: must lie in [0, 1], got 2.0",
    "ema.ramp=0": "ema.ramp: must lie in (0, 1] or be null, got 0.0",
    "ema.half_life=[1000] ema.decays=[0.9]": "ema.decays: [0.9] conflicts with ema.half_life; give one of the two",
    "ema.half_life=[1]": "ema.half_life: ema.decays: must be different numbers between 0 and 1, got [0.0]",
    "sample.guidance=1e39": "sample.guidance: must lie in [0, 1e6], got 1e+39",
    "ema.half_life=[0]": "ema.half_life: must be positive numbers, got [0.0]",
    "kind=classifer": "kind: unknown value 'classifer'; choose from denoiser, classifier",
    "process.name=vpp": "process.name: unknown name 'vpp'; choose from vp, edm, flow; did you mean 'vp'?",
    "process=3": "process: must be a section with keys, got 3; write process.name=vp",
    "sample.s_noise=1.1 sample.sampler=ddim": "sample.s_noise: belongs to sample.sampler=heun; with ddim leave it at 1",
    "sample.s_max=2 sample.sampler=ddim": "sample.s_max: belongs to sample.sampler=heun; with ddim leave it at null",
    "sample.guidance_power=2": "sample.guidance_power: belongs to sample.guidance_schedule=power_cosine; with constant"
    " leave it at 4",
    "process.name=edm sample.s_noise=1.1": "sample.s_noise: acts on the noise of sample.s_churn, which is 0",
    "process.name=flow sample.sampler=euler_maruyama sample.sde_diffusion=constant": "sample.sde_last: mean leaves"
    " noise with sample.sde_diffusion=constant",
    "process.variance=fixed_small": "process.variance: fixed_small is for process.loss=kl, not mse; the sampler's"
    " variance is sample.variance",
    "process.name=flow sample.sampler=dopri5 sample.clip=true": "sample.clip: dopri5 cannot clip the predicted image",
    "sample.weak_model=nowhere": "sample.weak_model: nowhere: no run here (config.yaml is missing)",
}


@pytest.mark.parametrize("argument", REFUSED)
def test_senseless_settings_are_refused_before_a_folder_is_made(argument: str, tmp_path: Path, capsys: Capture) -> None:
    assert main(["train", DIT, *argument.split(), f"runs_dir={tmp_path / 'runs'}"]) == 2
    error = capsys.readouterr().err
    assert REFUSED[argument] in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def module(**options: Any) -> DiffusionModule:
    net = torch.nn.Linear(1, 1)
    return DiffusionModule(net, DiscreteVP(VPConfig()), **options)


def test_stratified_times_cover_the_steps_in_every_batch() -> None:
    data = PositionDataset(digits(DigitsConfig())[0], 0)
    stratified = module(time_sampling="stratified")
    stratified.batch_size = 64
    for positions, _ in zip(PositionSampler(64, start=128), range(3), strict=False):
        batch = data.__getitems__(positions)
        u = stratified.draw({**batch, "x0": from_uint8(batch["image"])})[1]
        t = stratified.process.time(u)
        edges = torch.arange(65) * 1000 / 64
        assert (t.sort().values >= edges[:-1].floor()).all() and (t.sort().values <= edges[1:]).all()


def test_ema_half_lives_and_their_ramp() -> None:
    config = EMAConfig(half_life=[500_000], ramp=0.05).in_steps(512)
    assert config.decays == pytest.approx([0.5 ** (512 / 500_000)], abs=1e-8)
    assert config.in_steps(512) == config
    # After n steps the half-life is 0.05 n steps: after 20, one; long after, the full 500,000 images.
    assert config.decay_at(20, config.decays[0]) == pytest.approx(0.5)
    assert config.decay_at(0, config.decays[0]) == 0
    assert config.decay_at(10**6, config.decays[0]) == config.decays[0]
    assert config.half_life_at(10**9, 512, config.decays[0]) == pytest.approx(500_000, rel=1e-4)


def test_a_saved_half_life_follows_another_batch_size(tmp_path: Path) -> None:
    config = load("experiments/digits/dit.yaml", ["ema.half_life=[5000]", "trainer.batch_size=128"])
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(config))
    for smaller in (load(saved, ["trainer.batch_size=64"]), change(config, {"trainer": {"batch_size": 64}})):
        assert smaller.ema.half_life == [5000] and smaller.ema.decays == [round(0.5 ** (64 / 5000), 8)]


def test_a_half_life_as_a_share_fits_every_length_and_forgets_the_first_weights() -> None:
    config = EMAConfig(half_life=[0.05, 0.2, 500_000]).in_steps(512)
    assert config.decays[:2] == [0.05, 0.2]
    for images in (51_200, 5_120_000):
        assert config.half_life_at(images, 512, 0.05) == pytest.approx(0.05 * images)
    decays = [config.decay_at(n, 0.2) for n in range(1000)]
    weights = [(1 - d) * math.prod(decays[i + 1 :]) for i, d in enumerate(decays)]
    assert sum(weights) == pytest.approx(1)
    assert weights[0] < 1e-8 and weights[499] / weights[999] == pytest.approx(0.5 ** (math.log(2) / 0.2 - 1), rel=0.02)
    assert load(DIT, ["ema.half_life=[0.1]"]).ema.decays == [0.1]  # replaces the YAML's decays; next, the reverse
    assert load("experiments/digits-papers/dit.yaml", ["ema.decays=[0.9]"]).ema == EMAConfig([0.9])


def test_a_loss_aware_run_resumes_exactly_and_is_marked_unpaired(tmp_path: Path, capsys: Capture) -> None:
    small = [*TINY, "process.steps=25", "process.schedule=linear", "sample.steps='5'", "validation.log_snr=[-1,0]"]
    small += ["trainer.time_sampling=loss_aware", "trainer.batch_size=8", "trainer.checkpoint_images=400"]
    small += ["optimizer.warmup_images=0", "optimizer.decay_images=null", "trainer.sample_images=1e9"]
    whole = train(DIT, [*small, "trainer.max_images=800", f"runs_dir={tmp_path / 'whole'}"])
    train(DIT, [*small, "trainer.max_images=400", f"runs_dir={tmp_path / 'parts'}"])
    parts = train(DIT, [*small, "trainer.max_images=800", f"runs_dir={tmp_path / 'parts'}"])
    states = [torch.load(run.folder / "checkpoints" / "step-100.ckpt", weights_only=True) for run in (whole, parts)]
    counts = states[0]["loss_history"]["counts"]
    assert counts.sum() == 800 and (counts >= 10).all()  # so that importance sampling had started
    for name, value in states[0]["loss_history"].items():
        assert torch.equal(value, states[1]["loss_history"][name])
    for name, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][name])
    capsys.readouterr()
    assert main(["compare", str(whole.folder)]) == 0
    assert re.search(r"^pairing +none: its noise levels depend on its losses$", capsys.readouterr().out, re.MULTILINE)


def test_a_classifier_trains_and_guides(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    argv = ["train", "experiments/digits/classifier.yaml", "trainer.max_images=8_000", f"runs_dir={tmp_path}"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    clean = re.search(r"^accuracy_log_snr_6 +([\d.]+)$", out, re.MULTILINE)
    noise = re.search(r"^accuracy_log_snr_-6 +([\d.]+)$", out, re.MULTILINE)
    assert clean and noise and float(clean[1]) > 0.8 > 0.3 > float(noise[1])
    classifier = tmp_path / "digits" / "classifier-s0"
    draws = [f"out={tmp_path / name}.png" for name in "ab"]
    for out_file, scale in zip(draws, (0, 5), strict=True):
        guide = [f"classifier={classifier}", f"classifier_scale={scale}", "guidance=1", "steps=5"]
        assert main(["sample", str(finished), "n=10", out_file, *guide]) == 0
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    capsys.readouterr()
    assert main(argv) == 0
    assert "complete at 8,000 images" in capsys.readouterr().out
    assert main(["sample", str(classifier), "n=2"]) == 2
    assert "this is a run of kind classifier; choose one of kind denoiser" in capsys.readouterr().err
    assert main(["sample", str(finished), "n=2", f"classifier={finished}"]) == 2
    assert "this is a run of kind denoiser; choose one of kind classifier" in capsys.readouterr().err
