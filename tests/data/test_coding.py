"""Autoencoder training and latent batches: the loss, the noise per position, and encoding and decoding."""

import pytest
import torch
from torch import Tensor

from diffbench.autoencoders import KLAutoencoder, KLConfig, kl, remove_variance_, sample
from diffbench.config.kinds import LossConfig, NetworkConfig
from diffbench.config.sections import OptimizerConfig
from diffbench.core import rng
from diffbench.core.errors import UserError
from diffbench.core.pixels import from_uint8, to_uint8
from diffbench.data import coding
from diffbench.data.datamodule import ImageDataModule, LatentDataModule, PositionDataset
from diffbench.data.digits import DigitsConfig, digits
from diffbench.data.latents import LatentSet
from diffbench.data.sets import ImageSet
from diffbench.diffusion import DiscreteVP, VPConfig
from diffbench.evaluation.validation_error import denoising_error
from diffbench.training.autoencoder import AutoencoderModule


def tiny(scale: float = 1.0, shift: float = 0.0) -> KLAutoencoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = KLAutoencoder(KLConfig(1, 1, 2, [4, 8], 1, 2, scaling_factor=scale, shift_factor=shift))
    return net.eval().requires_grad_(False)


def encode(images: ImageSet, net: KLAutoencoder) -> LatentSet:
    """Encode images without a cache."""
    mean, log_variance = net.encode(from_uint8(images.images))
    scale, shift = net.config.scaling_factor, net.config.shift_factor
    return LatentSet(mean, log_variance, images.labels, images.num_classes, scale, shift)


def module(loss: LossConfig, features: bool = False) -> AutoencoderModule:
    net = tiny().train().requires_grad_(True)
    project = (lambda x: x.flatten(1)[:, :3]) if features else None
    return AutoencoderModule(net, loss, OptimizerConfig(), seed=3, features=project)


def batch(first: int = 0, count: int = 4) -> dict[str, Tensor]:
    data = PositionDataset(digits(DigitsConfig())[0], seed=3)
    rows = data.__getitems__(list(range(first, first + count)))
    return {"x0": from_uint8(rows["image"]), "label": rows["label"], "position": rows["position"]}


@pytest.mark.parametrize("reconstruction", ["l1", "l2"])
def test_the_loss_sums_its_terms_over_an_image(reconstruction: str) -> None:
    whole = module(LossConfig(reconstruction, 0.5, "some", 2.0), features=True)  # type: ignore[arg-type]
    inputs = batch()
    noise = rng.normal(rng.key(3, "posterior"), inputs["position"], (2, 4, 4))
    restored, mean, log_variance = whole.network(inputs["x0"], noise)
    error = restored - inputs["x0"]
    sums = (error.abs() if reconstruction == "l1" else error.square()).flatten(1).sum(1)
    perceptual = error.flatten(1)[:, :3].square().mean(1) * 64
    expected = (sums + 0.5 * kl(mean, log_variance) + 2.0 * perceptual).mean() / 64
    assert whole.training_step(inputs, 0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_plain_autoencoder_decodes_the_mean_and_loses_its_variance() -> None:
    plain, inputs = module(LossConfig("l2", 0.0)), batch()
    restored, _, _ = plain.network(inputs["x0"])
    assert plain.training_step(inputs, 0).item() == pytest.approx((restored - inputs["x0"]).square().mean().item())
    mean, _ = plain.network.encode(inputs["x0"])
    remove_variance_(plain.network)
    after, log_variance = plain.network.encode(inputs["x0"])
    assert torch.equal(after, mean) and set(log_variance.flatten().tolist()) == {-30.0}


def test_the_noise_of_latents_depends_only_on_the_position() -> None:
    one = module(LossConfig("l2", 1e-6))
    apart = [one.training_step(batch(first, 2), 0).item() for first in (0, 2)]
    assert one.training_step(batch(0, 4), 0).item() == pytest.approx(sum(apart) / 2, rel=1e-5)
    moved = batch(0, 4) | {"position": torch.arange(4) + 4}
    assert one.training_step(moved, 0).item() != one.training_step(batch(0, 4), 0).item()


def test_perceptual_extractor_and_features_need_each_other() -> None:
    with pytest.raises(ValueError, match=r"loss\.perceptual: give both an extractor and its features, or neither"):
        module(LossConfig(perceptual="digits-cnn"))


def test_the_key_of_an_invalid_size_is_named() -> None:
    assert NetworkConfig(2, [8], 1, 4).for_channels(3) == KLConfig(3, 3, 2, [8], 1, 4, scaling_factor=1.0)
    with pytest.raises(
        ValueError, match=r"^network\.block_out_channels: norm_num_groups=32 must divide every width, got 8"
    ):
        NetworkConfig(block_out_channels=[8])
    with pytest.raises(ValueError, match=r"^loss\.kl_weight: must be at least 0, got -1"):
        LossConfig(kl_weight=-1)


def test_images_are_coded_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    net, images = tiny(2.0, 0.3), digits(DigitsConfig())[1].images[:30]
    restored, divergence = coding.reconstruct(net, images)
    mean, log_variance = net.encode(from_uint8(images))
    assert torch.equal(restored, to_uint8(net.decode(mean)))
    assert torch.allclose(divergence, kl(mean, log_variance))
    assert torch.equal(to_uint8(coding.decode(net, net.scaled(mean))), restored)
    assert coding.at_once(256, 256) == 8
    monkeypatch.setattr(coding, "PIXELS", 7 * 64)
    assert coding.at_once(8, 8) == 7 and coding.at_once(512, 512) == 1
    assert torch.equal(coding.reconstruct(net, images)[0], restored)
    assert torch.equal(to_uint8(coding.decode(net, net.scaled(mean))), restored)
    pairs = coding.side_by_side(net, images[:4], columns=2)
    assert torch.equal(pairs, torch.cat([images[:2], restored[:2], images[2:4], restored[2:4]]))


def test_an_autoencoder_with_non_finite_output_is_not_scored() -> None:
    net, images = tiny(), digits(DigitsConfig())[1].images[:3]
    next(net.decoder.parameters()).data.fill_(float("nan"))
    with pytest.raises(UserError, match="the autoencoder's output is not finite, in 192 of 192 values"):
        coding.reconstruct(net, images)


def test_the_scale_makes_drawn_latents_standard() -> None:
    net, (train, _) = tiny(), digits(DigitsConfig())
    centre, deviation = coding.spread(net, train.images)
    scaled = encode(train, net)
    scaled = LatentSet(scaled.mean, scaled.log_variance, scaled.labels, 10, 1 / deviation, centre)
    data = latents(scaled, scaled)
    drawn = torch.cat([hooked(data, data.train.gather(index), index)["x0"] for index in torch.arange(1437).split(300)])
    assert drawn.mean().item() == pytest.approx(0, abs=0.01)
    assert drawn.std().item() == pytest.approx(1, abs=0.01)


def latents(train: LatentSet, held_out: LatentSet, seed: int = 5) -> LatentDataModule:
    return LatentDataModule(train, held_out, 8, seed, endless=True)


def hooked(data: LatentDataModule, rows: dict[str, Tensor], position: Tensor) -> dict[str, Tensor]:
    return data.on_after_batch_transfer({**rows, "position": position}, 0)


def test_latents_come_in_the_order_of_their_images() -> None:
    net, (train, held_out) = tiny(2.0, 0.3), digits(DigitsConfig())
    pixels = ImageDataModule(train, held_out, 8, 5, endless=True)
    coded = latents(encode(train, net), encode(held_out, net))
    for _, image_batch, latent_batch in zip(
        range(3), pixels.train_dataloader(), coded.train_dataloader(), strict=False
    ):
        x = pixels.on_after_batch_transfer(image_batch, 0)
        z = coded.on_after_batch_transfer(latent_batch, 0)
        assert (
            x.keys() == z.keys() and torch.equal(x["position"], z["position"]) and torch.equal(x["label"], z["label"])
        )
        mean, log_variance = net.encode(x["x0"])
        noise = rng.normal(rng.key(5, "posterior"), z["position"], (2, 4, 4))
        assert torch.allclose(z["x0"], net.scaled(sample(mean, log_variance, noise)), atol=1e-5)


def test_each_epoch_draws_new_latents_and_no_draw_depends_on_the_batch() -> None:
    net, (train, _) = tiny(), digits(DigitsConfig())
    coded = encode(train.first(8), net)
    data, rows = latents(coded, coded), coded.gather(torch.arange(8))
    first, second = (hooked(data, rows, torch.arange(8) + start)["x0"] for start in (0, 8))
    assert not torch.equal(first, second)
    half = hooked(data, coded.gather(torch.arange(4)), torch.arange(4))["x0"]
    assert torch.equal(half, first[:4])
    other = hooked(latents(coded, coded, seed=6), rows, torch.arange(8))["x0"]
    assert not torch.equal(first, other)


def test_half_precision_moments_are_drawn_in_float32() -> None:
    coded = encode(digits(DigitsConfig())[0].first(8), tiny())
    half = LatentSet(coded.mean.half(), coded.log_variance.half(), coded.labels, 10)
    drawn = hooked(latents(half, half), half.gather(torch.arange(8)), torch.arange(8))["x0"]
    assert drawn.dtype == torch.float32
    assert torch.allclose(
        drawn, hooked(latents(coded, coded), coded.gather(torch.arange(8)), torch.arange(8))["x0"], atol=0.01
    )
    assert half.clean(torch.arange(3)).dtype == torch.float32


class Zero(torch.nn.Module):
    """Predicts that the clean latent is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x)


def test_validation_uses_the_scaled_means() -> None:
    net = tiny(2.0, 0.3)
    held_out = encode(digits(DigitsConfig())[1], net)
    process = DiscreteVP(VPConfig(1000, "cosine", "x0"))
    (error,) = denoising_error(Zero(), process, held_out, [0.0]).values()
    assert error == pytest.approx(net.scaled(held_out.mean).square().mean().item(), rel=1e-5)


def test_larger_digits_are_the_same_digits() -> None:
    small, large = digits(DigitsConfig())[0], digits(DigitsConfig(size=32))[0]
    assert large.images.shape == (1437, 1, 32, 32) and large.images.dtype == torch.uint8
    assert torch.equal(small.labels, large.labels)
    wanted = torch.nn.functional.interpolate(small.images[:9].double(), size=(32, 32), mode="bilinear")
    assert (large.images[:9] - wanted).abs().max() <= 0.5 + 1e-4
    assert large.fingerprint() != small.fingerprint()
    assert isinstance(large.first(5), ImageSet) and len(large.first(5)) == 5
    with pytest.raises(ValueError, match=r"data\.size: must lie in 8 to 512, got 7"):
        DigitsConfig(size=7)
