"""The latent experiments at published size: they resolve, build on the meta device, and take steps when reduced."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from golden_cases import load as golden
from PIL import Image
from test_importing import saved, words
from test_reference import arguments

from diffbench.autoencoders import KLAutoencoder, KLConfig
from diffbench.autoencoders import io as files
from diffbench.cli import main
from diffbench.config.kinds import AutoencoderConfig, RunConfig
from diffbench.config.load import load as load_config
from diffbench.denoisers import build
from diffbench.denoisers.flops import count
from diffbench.runs.lifecycle import load, train
from diffbench.sampling.images import CAPTION_HEIGHT

PUBLISHED = {
    "dit-xl-2": (675_129_632, 118.6, ["denoiser.hidden_size=16", "denoiser.depth=1", "denoiser.num_heads=2"]),
    "lightningdit-xl-2": (675_223_888, 118.6, ["denoiser.hidden_size=16", "denoiser.depth=1", "denoiser.num_heads=2"]),
    "diffit-xl-2": (561_330_144, 118.5, ["denoiser.hidden_size=16", "denoiser.depth=1", "denoiser.num_heads=2"]),
    "unet": (
        372_620_552,
        57.3,
        [
            "denoiser.model_channels=8",
            "denoiser.num_head_channels=8",
            "denoiser.norm_groups=4",
            "denoiser.num_res_blocks=1",
            "denoiser.attention_resolutions=[4,2]",
        ],
    ),
}


def config(name: str) -> RunConfig:
    found = load_config(f"experiments/imagenet256-latent/{name}.yaml")
    assert isinstance(found, RunConfig)
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_imagenet_networks_have_their_published_sizes(name: str) -> None:
    c = config(name)
    learned = c.process.name == "vp"
    assert (not learned or c.process.variance == "learned_range") and c.trainer.label_dropout > 0
    shape = {"image_size": 32, "channels": 4, "num_classes": 1000, "null_class": True, "learn_sigma": learned}
    cost = count(lambda: build(c.denoiser.name, c.denoiser, **shape), 4, 32)
    parameters, gmacs, _ = PUBLISHED[name]
    assert cost.parameters == parameters
    assert cost.gmacs == pytest.approx(gmacs, abs=0.05)


def test_imagenet_recipes_match_the_papers() -> None:
    dit, diffit = config("dit-xl-2"), config("diffit-xl-2")
    for c in (dit, diffit):
        o, t, s = c.optimizer, c.trainer, c.sample
        assert (o.name, o.betas, o.weight_decay, o.warmup_images, o.decay_images, o.grad_clip_norm) == (
            "adamw", [0.9, 0.999], 0.0, 0, None, None,
        )  # fmt: skip
        assert (c.process.steps, c.process.schedule, c.process.loss) == (1000, "linear", "hybrid")
        assert (c.ema.decays, c.ema.warmup, t.batch_size, t.label_dropout) == ([0.9999], False, 256, 0.1)
        assert (s.sampler, s.steps, s.clip, s.guidance_channels) == ("ddpm", "250", False, 3)
        assert (c.data.image_size, c.data.flip, c.autoencoder) == (256, True, "stabilityai/sd-vae-ft-ema")
    assert (dit.optimizer.lr, dit.trainer.max_images, dit.sample.guidance) == (1e-4, 400_000 * 256, 1.5)
    assert (diffit.optimizer.lr, diffit.sample.guidance_schedule, diffit.sample.guidance) == (3e-4, "power_cosine", 4.4)
    lightning = config("lightningdit-xl-2")
    o, t, p, s = lightning.optimizer, lightning.trainer, lightning.process, lightning.sample
    assert (o.lr, o.betas, t.batch_size, t.max_images) == (2e-4, [0.9, 0.95], 1024, 80_000 * 1024)
    assert (p.name, p.path, p.times, s.sampler, s.steps) == ("flow", "linear", "logit_normal", "euler", "250")


@pytest.fixture(scope="module")
def reduced(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides with a folder of small images and an autoencoder like Stable Diffusion's but narrower."""
    folder = tmp_path_factory.mktemp("reduced")
    shades = torch.randint(0, 256, (30, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for i, image in enumerate(shades):
        path = folder / "pictures" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        files.save(KLAutoencoder(KLConfig(3, 3, 4, [4, 4], 1, 2)), folder / "autoencoder")
    return [
        f"data.path={folder / 'pictures'}",
        "data.image_size=16",
        "data.held_out=6",
        f"autoencoder={folder / 'autoencoder'}",
        "trainer.precision=32-true",
        "debug=smoke",
    ]


@pytest.mark.parametrize("name", PUBLISHED)
def test_imagenet_experiments_take_steps_at_a_reduced_size(name: str, reduced: list[str], tmp_path: Path) -> None:
    small = [*PUBLISHED[name][2], *reduced, f"runs_dir={tmp_path}"]
    run = train(f"experiments/imagenet256-latent/{name}.yaml", small)
    assert (run.images_seen, run.shape) == (16, (4, 8, 8))
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["images"] for m in lines if "train/loss" in m] == [8, 16]
    assert load(run.folder).sample_tensor(2, guidance=2.0).shape == (2, 3, 16, 16)


def test_an_imported_denoiser_with_an_autoencoder_draws_images(reduced: list[str], tmp_path: Path) -> None:
    (autoencoder,) = (word for word in reduced if word.startswith("autoencoder="))
    out = tmp_path / "dit"
    assert (
        main(
            ["import", "dit", str(saved(tmp_path, "dit_a")), str(out), *words(arguments(golden("dit_a"))), autoencoder]
        )
        == 0
    )
    run = load(out)
    assert (run.shape, run.raw) == ((4, 8, 8), False)
    (image,) = run.sample(n=1, steps="2")
    assert (image.size, image.mode) == ((16, 16), "RGB")
    assert main(["sample", str(out), "n=2", "steps=2", f"out={tmp_path / 'two.png'}"]) == 0
    with Image.open(tmp_path / "two.png") as grid:
        assert grid.size == (2 * 68, CAPTION_HEIGHT + 68)


def test_the_cifar10_denoisers_use_the_cifar10_autoencoder() -> None:
    autoencoder = load_config("experiments/cifar10-latent/autoencoder.yaml")
    assert isinstance(autoencoder, AutoencoderConfig)
    assert autoencoder.network.for_channels(3).latent_shape((3, 32, 32)) == (3, 8, 8)
    shape = {"image_size": 8, "channels": 3, "num_classes": 10, "null_class": True, "learn_sigma": False}
    for name in ("unet", "dit", "diffit"):
        c = load_config(f"experiments/cifar10-latent/{name}.yaml")
        assert isinstance(c, RunConfig)
        assert (c.autoencoder, c.data) == ("experiments/cifar10-latent/autoencoder.yaml", autoencoder.data)
        make = partial(build, c.denoiser.name, c.denoiser, **shape)
        assert 0.017 < count(make, 3, 8).gmacs < 0.021
