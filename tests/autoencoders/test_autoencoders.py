"""The KL autoencoder: parity with the reference, closed forms, files, and the hub without a network."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import Case, load
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffbench.autoencoders import KLAutoencoder, KLConfig, kl, sample
from diffbench.autoencoders import io as files

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
TINY = KLConfig(1, 1, 2, [8, 16], layers_per_block=1, norm_num_groups=4, scaling_factor=0.5, shift_factor=0.25)


def tiny(config: KLConfig = TINY) -> KLAutoencoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return KLAutoencoder(config).eval().requires_grad_(False)


def golden_weights(case: Case) -> dict[str, Tensor]:
    return {name.removeprefix("param."): v for name, v in case.tensors.items() if name.startswith("param.")}


@pytest.fixture(scope="module")
def golden_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the golden case as diffusers would have saved it."""
    folder, case = tmp_path_factory.mktemp("golden"), load("autoencoder_a")
    save_file(golden_weights(case), folder / files.WEIGHTS)
    (folder / files.CONFIG).write_text(json.dumps({"_class_name": "AutoencoderKL", **case.info["constructor"]["args"]}))
    return folder


@BOTH
def test_outputs_equal_the_reference(golden_folder: Path, dtype: torch.dtype) -> None:
    case, net = load("autoencoder_a"), files.load(golden_folder).to(dtype)
    mean, log_variance = net.encode(case.input("x", dtype))
    case.check("mean", mean)
    case.check("logvar", log_variance)
    case.check("decoded", net.decode(case.input("z", dtype)))


def test_the_default_has_stable_diffusions_number_of_parameters() -> None:
    with torch.device("meta"):
        net = KLAutoencoder(KLConfig())
    assert sum(p.numel() for p in net.parameters()) == 83_653_863
    assert (net.config.factor, len(net.state_dict())) == (8, 248)
    mean, log_variance = net.encode(torch.zeros(1, 3, 64, 64, device="meta"))
    assert mean.shape == log_variance.shape == (1, 4, 8, 8)
    assert net.decode(mean).shape == (1, 3, 64, 64)


def test_reading_checks_every_key_and_shape(golden_folder: Path, tmp_path: Path) -> None:
    weights, config = load_file(golden_folder / files.WEIGHTS), (golden_folder / files.CONFIG).read_text()
    (tmp_path / files.CONFIG).write_text(config)
    path = tmp_path / files.WEIGHTS

    def refused(tensors: dict[str, Tensor], message: str) -> None:
        save_file(tensors, path)
        with pytest.raises(ValueError, match=message):
            files.load(tmp_path)

    with pytest.raises(ValueError, match=rf"{path}: no such file"):
        files.load(tmp_path)
    key = "decoder.up_blocks.0.upsamplers.0.conv.bias"
    refused({k: v for k, v in weights.items() if k != key}, f"{path}: 1 keys missing: {key}")
    refused(weights | {"loss.logvar": torch.zeros(())}, f"{path}: 1 keys unexpected: loss.logvar")
    refused(weights | {key: torch.zeros(7)}, rf"{key} has shape \[7\], but config.json makes \[32\]")
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not valid safetensors"):
        files.load(tmp_path)
    path.unlink()
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model.bin is a pickle, which is not opened"):
        files.load(tmp_path)


@pytest.mark.parametrize("shape", ["linear", "convolution"])
def test_old_attention_names_are_read(golden_folder: Path, tmp_path: Path, shape: str) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights: dict[str, Tensor] = {}
    for key, tensor in load_file(golden_folder / files.WEIGHTS).items():
        new = next((name for name in old if f".{name}." in key), None)
        if new and shape == "convolution" and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        weights[key.replace(f".{new}.", f".{old[new]}.") if new else key] = tensor.contiguous()
    assert sum("proj_attn" in key for key in weights) == 4
    save_file(weights, tmp_path / files.WEIGHTS)
    (tmp_path / files.CONFIG).write_text((golden_folder / files.CONFIG).read_text())
    ours, theirs = files.load(tmp_path).state_dict(), files.load(golden_folder).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_saved_autoencoder_loads_again(tmp_path: Path) -> None:
    net = tiny()
    files.save(net, tmp_path / "deep" / "er")
    again = files.load(tmp_path / "deep" / "er")
    assert again.config == TINY
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))
    assert sorted(p.name for p in (tmp_path / "deep" / "er").iterdir()) == [files.CONFIG, files.WEIGHTS]
    assert not any(p.requires_grad for p in again.parameters()) and not again.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "VQModel"}, '_class_name: must be "AutoencoderKL"'),
        ({"act_fn": "gelu"}, 'act_fn: must be "silu"'),
        ({"latents_mean": [0.0]}, "latents_mean: must be null"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "down_block_types: must name DownEncoderBlock2D"),
        ({"attn_scales": []}, "attn_scales: unknown key; allowed: "),
        ({"norm_num_groups": 3}, "block_out_channels: norm_num_groups=3 must divide every width, got 16"),
        ({"block_out_channels": 5}, "block_out_channels: must be a list of widths, got 5"),
        ({"scaling_factor": 0}, "scaling_factor: must be positive, got 0"),
        ({"latent_channels": 0}, "latent_channels: must be at least 1, got 0"),
    ],
)
def test_a_config_of_another_network_is_refused(
    golden_folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    values = json.loads((golden_folder / files.CONFIG).read_text()) | change
    (tmp_path / files.CONFIG).write_text(json.dumps(values))
    with pytest.raises(ValueError) as raised:
        files.load(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path / files.CONFIG}: {message}")


def test_damaged_or_missing_weights_have_no_notes(golden_folder: Path, tmp_path: Path) -> None:
    files.save(files.load(golden_folder), tmp_path, {"images": "7"})
    assert files.read_notes(tmp_path)["images"] == "7"
    weights = tmp_path / files.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:100])
    assert files.read_notes(tmp_path) == {}
    weights.unlink()
    assert files.read_notes(tmp_path) == {}


def test_a_config_without_a_scale_gets_the_published_one(tmp_path: Path) -> None:
    (tmp_path / files.CONFIG).write_text('{"block_out_channels": [32], "shift_factor": null}')
    assert files.read_config(tmp_path) == KLConfig(block_out_channels=[32], layers_per_block=1)
    assert files.read_config(tmp_path).scaling_factor == 0.18215
    (tmp_path / files.CONFIG).write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not valid JSON"):
        files.read_config(tmp_path)


def test_diffusers_reads_our_files_and_we_read_its_files(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = tiny(dataclasses.replace(TINY, use_quant_conv=False, mid_block_add_attention=False))
    files.save(ours, tmp_path / "ours")
    theirs, report = diffusers.AutoencoderKL.from_pretrained(
        tmp_path / "ours", output_loading_info=True, local_files_only=True, low_cpu_mem_usage=False
    )
    assert not any(report.values())
    assert (theirs.config.scaling_factor, theirs.config.shift_factor) == (0.5, 0.25)
    moments = theirs.encode(x).latent_dist
    mean, log_variance = ours.encode(x)
    assert torch.allclose(mean, moments.mean, atol=1e-6) and torch.allclose(log_variance, moments.logvar, atol=1e-6)
    assert torch.allclose(kl(mean, log_variance), moments.kl(), rtol=1e-5)

    blocks = (("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3, (4, 8, 12))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = diffusers.AutoencoderKL(1, 2, *blocks, 2, latent_channels=3, norm_num_groups=2).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = files.load(tmp_path / "theirs")
    assert ours.config == KLConfig(1, 2, 3, [4, 8, 12], norm_num_groups=2)
    mean, log_variance = ours.encode(x)
    with torch.no_grad():
        moments = theirs.encode(x).latent_dist
        decoded = theirs.decode(mean).sample
    assert torch.allclose(mean, moments.mean, atol=1e-6) and torch.allclose(log_variance, moments.logvar, atol=1e-6)
    assert torch.allclose(ours.decode(mean), decoded, atol=1e-5)


def test_the_default_state_dict_has_the_keys_and_shapes_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    blocks = (["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4)
    with torch.device("meta"):
        ours, theirs = KLAutoencoder(KLConfig()), diffusers.AutoencoderKL(3, 3, *blocks, (128, 256, 512, 512), 2)
    shapes = [{key: tuple(v.shape) for key, v in net.state_dict().items()} for net in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_the_hub_is_not_contacted_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name = "stabilityai/sd-vae-ft-ema"
    with pytest.raises(ValueError) as raised:
        files.load(name)
    assert str(raised.value) == (
        f"{name}: not cached, and HF_HUB_OFFLINE is set; run `hf download {name} config.json"
        " diffusion_pytorch_model.safetensors` with internet access, or give a folder with both files"
    )
    assert capsys.readouterr().out == ""
    for wrong in ("nowhere", "runs/digits-latent/autoencoder-s0", "diffbench/nowhere"):
        with pytest.raises(ValueError, match=f"{wrong}: no such folder; give a folder with config.json"):
            files.load(wrong)


def test_a_failed_download_gives_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(name: str, file: str, local_files_only: bool) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        raise LocalEntryNotFoundError("no route to the hub\nand more")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fails)
    with pytest.raises(ValueError, match=r"^a/b: not cached, and the download failed \(no route to the hub\); run"):
        files.load("a/b")
    assert capsys.readouterr().out == (
        "downloading a/b from the hub, once (as `hf download a/b config.json"
        " diffusion_pytorch_model.safetensors` would)\n"
    )


def test_a_cached_hub_name_is_read_without_a_network(
    golden_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def cached(name: str, file: str, local_files_only: bool) -> str:
        assert (name, local_files_only) == ("some/where", True)
        return str(golden_folder / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", cached)
    assert files.load("some/where").config.block_out_channels == [16, 32]


def test_kl_equals_the_integral() -> None:
    """E[log q - log p] over a fine grid, for a Gaussian far from the standard one."""
    mean, log_variance = torch.tensor([[0.7]]).double(), torch.tensor([[-1.2]]).double()
    q = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    z = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    difference = q.log_prob(z) - torch.distributions.Normal(0.0, 1.0).log_prob(z)
    assert kl(mean, log_variance).item() == pytest.approx(torch.trapezoid(q.log_prob(z).exp() * difference, z).item())
    assert kl(torch.zeros(3, 2, 4, 4), torch.zeros(3, 2, 4, 4)).tolist() == [0, 0, 0]
    assert kl(torch.ones(2, 3), torch.zeros(2, 3)).tolist() == [1.5, 1.5]


def test_a_draw_has_the_moments_and_passes_gradients() -> None:
    noise = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).double()
    mean = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    log_variance = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    z = sample(mean, log_variance, noise)
    assert z.mean().item() == pytest.approx(2, abs=0.01)
    assert z.var().item() == pytest.approx(torch.tensor(-1.0).exp().item(), rel=0.02)
    z.sum().backward()
    assert mean.grad is not None and mean.grad.item() == len(noise)
    assert log_variance.grad is not None and log_variance.grad.item() == pytest.approx(
        float((z - 2).sum().detach()) / 2
    )


def test_scaling_is_reversible_and_extreme_moments_are_clamped() -> None:
    net = tiny()
    z = torch.tensor([0.25, 2.25])
    assert net.scaled(z).tolist() == [0.0, 1.0]
    assert net.unscaled(net.scaled(z)).tolist() == z.tolist()
    assert net.quant_conv is not None
    with torch.no_grad():
        net.quant_conv.bias[2], net.quant_conv.bias[3] = -100, 100
    _, log_variance = net.encode(torch.zeros(1, 1, 8, 8))
    assert (float(log_variance.min()), float(log_variance.max())) == (-30, 20)


def test_reconstruction_comes_from_the_mean_or_from_a_draw() -> None:
    net, x = tiny(), torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)
    noise = torch.ones(2, 2, 4, 4)
    from_mean, mean, log_variance = net(x)
    drawn, _, _ = net(x, noise)
    assert torch.equal(from_mean, net.decode(mean))
    assert torch.equal(drawn, net.decode(sample(mean, log_variance, noise)))
    assert not torch.equal(drawn, from_mean)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 9, 8), (1, 8, 8)])
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="this autoencoder takes 1 channels and sides divisible by 2"):
        tiny().encode(torch.zeros(shape))
