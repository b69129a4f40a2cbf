"""`diffbench import` turns published checkpoints into run folders, bit for bit equal, that sample as released."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import load
from safetensors import safe_open
from test_reference import arguments, weights
from test_reference_infer import shapes_of

import diffbench
from diffbench.autoencoders import KLAutoencoder, KLConfig
from diffbench.autoencoders import io as files
from diffbench.cli import main
from diffbench.config.kinds import RunConfig
from diffbench.core.files import sha256
from diffbench.denoisers import from_reference
from diffbench.denoisers.pretrained.convert import RECIPES, describe
from diffbench.runs.importing import import_reference

CASES = [("dit", "dit_a"), ("dit", "dit_b"), ("sit", "dit_a"), ("diffit", "diffit_a"), ("diffit", "diffit_c")]
CASES += [("adm", "adm_a"), ("adm", "adm_b_legacy"), ("adm", "adm_b_neworder")]
CASES += [("ddpmpp", "ddpmpp_a"), ("ddpmpp", "ddpmpp_b"), ("uvit", "uvit_a")]
Capture = pytest.CaptureFixture[str]


def words(args: dict[str, Any]) -> list[str]:
    """Return the constructor's arguments as command-line overrides, without an autoencoder."""
    return ["autoencoder=null", *(f"arguments.{key}={json.dumps(value)}" for key, value in args.items())]


def saved(tmp_path: Path, name: str) -> Path:
    path = tmp_path / f"{name}.pt"
    torch.save({"model": {}, "ema": weights(load(name))}, path)
    return path


@pytest.mark.parametrize(("source", "name"), CASES)
def test_an_imported_run_equals_the_reference(source: str, name: str, tmp_path: Path, capsys: Capture) -> None:
    case, out = load(name), tmp_path / "runs" / name
    path = saved(tmp_path, name)
    assert main(["import", source, str(path), str(out), "trainer.channels_last=false", *words(arguments(case))]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: ")
    run, want = diffbench.load(out), from_reference(source, arguments(case), weights(case))
    assert all(torch.equal(a, b) for a, b in zip(run.denoiser.parameters(), want.parameters(), strict=True))
    generator = torch.Generator().manual_seed(0)
    classes = run.train_set.num_classes
    x, t = torch.randn(3, *run.shape, generator=generator), torch.tensor([0.1, 0.5, 0.9])
    y = torch.tensor([0, 1, 2]) if classes else None
    with torch.no_grad():
        assert torch.equal(run.denoiser(x, t, y), want(x, t, y))
    samples = run.sample_tensor(n=2, steps="2")
    assert samples.shape == (2, *run.shape)
    assert samples.dtype == (torch.uint8 if run.shape[0] in (1, 3) else torch.float32)
    with safe_open(out / "ema-0.9999.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["source"], metadata["checkpoint"], metadata["sha256"]) == (source, path.name, sha256(path))
    assert sorted(p.name for p in out.iterdir()) == ["config.yaml", "ema-0.9999.safetensors"]


def config(source: str, args: dict[str, Any], tmp_path: Path) -> RunConfig:
    """Import a network with these arguments and return the run's config."""
    recipe, plan = RECIPES["dit" if source == "sit" else source], describe(source, args)
    net = recipe.build(plan.config, **plan.shape)
    state = {key: torch.zeros(value.shape) for key, value in shapes_of(source, args).items()} | recipe.buffers(net)
    torch.save(state, tmp_path / "w.pt")
    return import_reference(source, tmp_path / "w.pt", tmp_path / "out", words(args)[1:])[0]


TINY_DIT = {"hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 10}
TINY_ADM = {"in_channels": 3, "out_channels": 6, "model_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 1]}
TINY_ADM |= {"attention_resolutions": [2], "num_heads": 2, "use_new_attention_order": False}


def test_dit_samples_as_released(tmp_path: Path) -> None:
    c = config("dit", TINY_DIT, tmp_path)
    assert (c.process.name, c.process.steps, c.process.schedule, c.process.variance) == (
        "vp",
        1000,
        "linear",
        "learned_range",
    )
    s = c.sample
    assert (s.sampler, s.steps, s.guidance, s.guidance_channels, s.clip) == ("ddpm", "250", 4.0, 3, False)
    assert (c.data.channels, c.data.image_size, c.data.num_classes) == (4, 32, 10)
    assert c.trainer.label_dropout == 0.1


def test_sit_samples_as_released(tmp_path: Path) -> None:
    c = config("sit", TINY_DIT, tmp_path)
    assert (c.process.name, c.process.path, c.sample.sampler) == ("flow", "linear", "euler_maruyama")
    assert (c.sample.steps, c.sample.guidance, c.sample.guidance_channels) == ("250", 4.0, 3)


@pytest.mark.parametrize(
    ("side", "schedule", "weight"), [(16, "power_cosine", 4.4), (32, "power_cosine", 4.4), (64, "constant", 1.49)]
)
def test_guidance_of_diffit_follows_its_size(tmp_path: Path, side: int, schedule: str, weight: float) -> None:
    s = config("diffit", TINY_DIT | {"input_size": side, "patch_size": 8}, tmp_path).sample
    assert (s.guidance_schedule, s.guidance, s.guidance_power, s.guidance_channels) == (schedule, weight, 4.0, 3)


@pytest.mark.parametrize(("side", "schedule"), [(64, "cosine"), (32, "linear")])
def test_adm_at_64_has_a_cosine_schedule_and_no_null_class(tmp_path: Path, side: int, schedule: str) -> None:
    c = config("adm", TINY_ADM | {"image_size": side, "num_classes": 4}, tmp_path)
    assert (c.process.schedule, c.process.variance, c.sample.clip) == (schedule, "learned_range", True)
    assert (c.sample.guidance, c.trainer.label_dropout) == (1.0, 0.0)


@pytest.mark.parametrize(("side", "steps"), [(32, "18"), (64, "40")])
def test_ddpmpp_samples_by_the_heun_steps_of_edm(tmp_path: Path, side: int, steps: str) -> None:
    args = {"img_resolution": side, "in_channels": 3, "out_channels": 3, "model_channels": 16, "num_blocks": 1}
    c = config("ddpmpp", args | {"channel_mult": [1, 1]}, tmp_path)
    assert (c.process.name, c.sample.sampler, c.sample.steps, c.sample.guidance) == ("edm", "heun", steps, 1.0)


@pytest.mark.parametrize(
    ("channels", "rows", "p_uncond", "schedule", "guidance"),
    [(4, 11, 0.15, "scaled_linear", 1.4), (4, 11, 0.0, "scaled_linear", 1.0), (3, -1, 0.0, "linear", 1.0)],
)
def test_uvit_is_guided_where_its_training_dropped_labels(
    channels: int, rows: int, p_uncond: float, schedule: str, guidance: float, tmp_path: Path
) -> None:
    args = {"img_size": 8, "patch_size": 2, "in_chans": channels, "embed_dim": 16, "depth": 2, "num_heads": 2}
    c = config("uvit", args | {"num_classes": rows, "p_uncond": p_uncond}, tmp_path)
    assert (c.process.schedule, c.process.prediction, c.sample.sampler) == (schedule, "eps", "dpm_solver")
    assert (c.sample.guidance, c.data.num_classes) == (guidance, max(rows, 0) - (p_uncond > 0))


@pytest.mark.parametrize(("side", "guidance"), [(32, 1.4), (64, 1.7)])
def test_guidance_of_uvit_follows_its_size(side: int, guidance: float, tmp_path: Path) -> None:
    args = {"img_size": side, "patch_size": 8, "in_chans": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    assert config("uvit", args | {"num_classes": 11, "p_uncond": 0.1}, tmp_path).sample.guidance == guidance


def test_guidance_of_imported_adm_is_refused_in_one_line(tmp_path: Path, capsys: Capture) -> None:
    path = saved(tmp_path, "adm_b_legacy")
    assert main(["import", "adm", str(path), str(tmp_path / "adm"), *words(arguments(load("adm_b_legacy")))]) == 0
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "adm"), "n=1", "steps=2", "guidance=2"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: command line: sample.guidance: 2 needs a null class") and "sample.classifier" in line
    assert main(["sample", str(tmp_path / "adm"), "n=1", "steps=2"]) == 0


def test_latents_are_decoded_or_written_raw(tmp_path: Path, capsys: Capture) -> None:
    path, out, file = saved(tmp_path, "dit_a"), tmp_path / "dit", tmp_path / "samples.npz"
    assert main(["import", "dit", str(path), str(out), *words(arguments(load("dit_a")))[1:]]) == 0
    run = diffbench.load(out)
    assert run.config.autoencoder == "stabilityai/sd-vae-ft-ema"
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffbench.sampling.sampler.Sampler.__call__", None)  # found missing before anything is drawn
        assert main(["sample", str(out), "n=2", "steps=2"]) == 2
    assert capsys.readouterr().err.startswith("error: autoencoder: stabilityai/sd-vae-ft-ema: not cached")
    assert main(["sample", str(out), "n=2", "steps=2", "raw=true"]) == 2
    assert capsys.readouterr().err == (
        "error: command line: out: 4x8x8 raw values are not an image; set only out=NAME.npz\n"
    )
    assert main(["sample", str(out), "n=2", "steps=2", "raw=true", f"out={file}"]) == 0
    values = np.load(file)["arr_0"]
    assert values.dtype == np.float32 and values.shape == (2, 4, 8, 8)
    run.config = replace(run.config, autoencoder=None)
    assert np.array_equal(values, run.sample_tensor(n=2, steps="2").numpy())
    with pytest.raises(ValueError, match="4 channels are not an image; use sample_tensor"):
        run.sample(n=1, steps="2")


def test_an_autoencoder_decodes_imported_latents(tmp_path: Path, capsys: Capture) -> None:
    path, out = saved(tmp_path, "dit_a"), tmp_path / "dit"
    with torch.random.fork_rng(devices=[]):
        files.save(KLAutoencoder(KLConfig(3, 3, 4, [4, 4], 1, 2)), tmp_path / "autoencoder")
    argv = [*words(arguments(load("dit_a")))[1:], f"autoencoder={tmp_path / 'autoencoder'}"]
    assert main(["import", "dit", str(path), str(out), *argv]) == 0
    assert main(["sample", str(out), "n=2", "steps=2", f"out={tmp_path / 'p.npz'}"]) == 0
    images = np.load(tmp_path / "p.npz")["arr_0"]
    assert images.dtype == np.uint8 and images.shape == (2, 16, 16, 3)


DIGITS: dict[str, Any] = {"input_size": 8, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2}
DIGITS |= {"learn_sigma": False, "num_classes": 10}


def digits_checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    state = {key: 0.02 * torch.randn(v.shape) for key, v in shapes_of("dit", DIGITS).items()}
    torch.save(state, tmp_path / "digits.pt")
    return tmp_path / "digits.pt"


def test_an_imported_run_is_scored_on_the_data_it_names(tmp_path: Path, capsys: Capture) -> None:
    path, out = digits_checkpoint(tmp_path), tmp_path / "digits"
    changes = [*words(DIGITS), "data.name=digits", "sample.steps=2", "evaluate.count=20", "sample.guidance=1"]
    assert main(["import", "dit", str(path), str(out), *changes]) == 0
    assert main(["evaluate", str(out)]) == 0
    assert "fd/digits-cnn@20" in capsys.readouterr().out
    assert main(["sample", str(out), "n=2", f"out={tmp_path / 'p.npz'}"]) == 0
    images = np.load(tmp_path / "p.npz")["arr_0"]
    assert images.dtype == np.uint8 and images.shape == (2, 8, 8, 1)
    capsys.readouterr()
    assert main(["sample", str(out), "n=2", "raw=true"]) == 2
    assert capsys.readouterr().err == "error: command line: raw: this network denoises images; leave it at false\n"


def test_without_images_nothing_is_scored_or_trained(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "digits"
    assert main(["import", "dit", str(digits_checkpoint(tmp_path)), str(out), *words(DIGITS)]) == 0
    assert main(["compare", str(out)]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(out)]) == 2
    assert capsys.readouterr().err == (
        f"error: {out}: data.name: none has no images to compare samples with; choose the data set that has them\n"
    )
    assert main(["train", str(out / "config.yaml"), f"runs_dir={tmp_path / 'runs'}"]) == 2
    assert "data.name: none has no images to train on; choose another" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_training_starts_from_an_imported_network(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "digits"
    assert main(["import", "dit", str(digits_checkpoint(tmp_path)), str(out), *words(DIGITS)]) == 0
    sizes = ["denoiser.hidden_size=16", "denoiser.depth=1", "denoiser.num_heads=2"]
    argv = ["train", "experiments/digits/dit.yaml", "debug=smoke", f"runs_dir={tmp_path / 'runs'}", *sizes]
    assert main([*argv, f"init_from={out}"]) == 0
    assert f"initial weights from {out}" in capsys.readouterr().out
