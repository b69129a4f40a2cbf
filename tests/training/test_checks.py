"""Sizes that make no valid network are refused in one line that starts with the config key and gives both numbers."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_type_hints

import pytest
import torch
from small_networks import CHANNELS, CLASSES, SIZE, SMALL, inputs, small

from diffbench import VP, DiffusionModule
from diffbench.denoisers import DENOISERS, DDPMppConfig, DiffiTConfig, DiffiTLatentConfig, DiTConfig, UNetConfig, build


def numbers() -> Iterator[tuple[str, str, str]]:
    """Yield (denoiser, key, type as text) of each config key that takes a positive number or a list of them."""
    for name, entry in DENOISERS.items():
        for key, hint in get_type_hints(entry.config).items():
            text = getattr(hint, "__name__", "") if isinstance(hint, type) else str(hint)
            if re.search(r"\b(int|float)\b", text) and key not in ("dropout", "drop_path", "attention_resolutions"):
                yield name, key, text


NUMBERS = list(numbers())


def test_keys_with_numbers_are_found() -> None:
    found = {f"{name}.{key}" for name, key, _ in NUMBERS}
    assert {"dit.depth", "diffit.window", "diffit.token_dim", "unet.channel_mult", "ddpmpp.fourier_scale"} <= found
    assert "unet.tmsa" not in found and "dit.conditioning" not in found


@pytest.mark.parametrize(("name", "key", "kind"), NUMBERS)
def test_zero_and_negative_numbers_are_refused_in_every_key(name: str, key: str, kind: str) -> None:
    config, lists = DENOISERS[name].config, "list" in kind
    for bad in (0, -1):
        for value in [[bad], [8, bad]] if lists else [bad]:
            with pytest.raises(ValueError) as caught:
                config(**{key: value})
            assert str(caught.value) == f"denoiser.{key}: must be positive, got {value}"
    if lists:
        with pytest.raises(ValueError) as caught:
            config(**{key: []})
        assert str(caught.value) == f"denoiser.{key}: must contain at least one number, got []"


@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_a_dropout_outside_0_to_1_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError) as caught:
        DENOISERS[name].config(dropout=value)
    assert str(caught.value) == f"denoiser.dropout: must lie in [0, 1), got {value}"


@pytest.mark.parametrize(
    ("kind", "sizes", "text"),
    [
        (DiTConfig, {"num_heads": 5}, "num_heads: 5 does not divide denoiser.hidden_size=384"),
        (DiTConfig, {"hidden_size": 30, "num_heads": 5}, "hidden_size: must be divisible by 4 for the position table, got 30"),  # noqa: E501
        (DiTConfig, {"hidden_size": 24, "num_heads": 4, "position": "rope"}, "position: rope needs a head width divisible by 4, got 6=denoiser.hidden_size/denoiser.num_heads"),  # noqa: E501
        (DiffiTLatentConfig, {"num_heads": 5}, "num_heads: 5 does not divide denoiser.hidden_size=384"),
        (DiffiTConfig, {"num_heads": 3}, "num_heads: 3 does not divide 128, a width in denoiser.channels"),
        (DiffiTConfig, {"num_heads": 3, "token_dim": 64}, "num_heads: 3 does not divide denoiser.token_dim=64"),
        (DiffiTConfig, {"window": [4, 2]}, "window: must have one entry for each of the 3 stages of denoiser.channels, got 2"),  # noqa: E501
        (DiffiTConfig, {"blocks": [1]}, "blocks: must have one entry for each of the 3 stages of denoiser.channels, got 1"),  # noqa: E501
        (UNetConfig, {"channel_mult": [0.3]}, "channel_mult: 0.3 times denoiser.model_channels=128 is not an integer"),
        (UNetConfig, {"model_channels": 7, "time_features": "fourier"}, "model_channels: must be even with denoiser.time_features=fourier, got 7"),  # noqa: E501
        (DDPMppConfig, {"model_channels": 7, "time_features": "fourier"}, "model_channels: must be even with denoiser.time_features=fourier, got 7"),  # noqa: E501
    ],
)  # fmt: skip
def test_inconsistent_keys_are_refused(kind: type, sizes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as caught:
        kind(**sizes)
    assert str(caught.value) == f"denoiser.{text}"


@pytest.mark.parametrize(
    ("config", "image_size", "text"),
    [
        (DiTConfig(patch_size=3), 8, "patch_size: 3 does not divide 8, a side of the image"),
        (DiTConfig(), (4, 5), "patch_size: 2 does not divide 5, a side of the image"),
        (DiTConfig(mlp_ratio=0.001), 8, "mlp_ratio: 0.001 times a width of 384 is less than one"),
        (DiffiTLatentConfig(patch_size=3), 8, "patch_size: 3 does not divide 8, a side of the image"),
        (DiffiTConfig(), 10, "channels: 3 levels need image sides divisible by 4, got 10"),
        (DiffiTConfig(), (8, 6), "channels: 3 levels need image sides divisible by 4, got 6"),
        (DiffiTConfig(window=3), 32, "window: 3 does not divide 32, a side of stage 1"),
        (DiffiTConfig(window=[4, 8, 3]), 16, "window: 3 does not divide 4, a side of stage 3"),
        (DiffiTConfig(norm_groups=24), 8, "norm_groups: 24 does not divide 128, a stage's width, alone or with its skip"),  # noqa: E501
        (UNetConfig(channel_mult=[1, 1, 1]), 6, "channel_mult: 3 levels need image sides divisible by 4, got 6"),
        (UNetConfig(48), 8, "norm_groups: 32 does not divide 48, a level's width, alone or with its skip"),
        (UNetConfig(num_heads=5), 16, "num_heads: 5 does not divide 128, a width with attention"),
        (UNetConfig(num_head_channels=48), 16, "num_head_channels: 48 does not divide 128, a width with attention"),
        (UNetConfig(num_heads_upsample=3), 16, "num_heads_upsample: 3 does not divide 128, a width with attention"),
        (UNetConfig(attention_resolutions=[8, 5]), 16, "attention_resolutions: no level has resolution 5; choose from 16, 8, 4, 2"),  # noqa: E501
        (DDPMppConfig(), 10, "channel_mult: 3 levels need image sides divisible by 4, got 10"),
        (DDPMppConfig(num_heads=3), 16, "num_heads: 3 does not divide 256, a width with attention"),
        (DDPMppConfig(attention_resolutions=[0]), 32, "attention_resolutions: no level has resolution 0; choose from 32, 16, 8"),  # noqa: E501
        (DDPMppConfig(134, [1, 1]), 8, "model_channels: 32 norm groups (of at least four channels) do not divide 134, a level's width, alone or with its skip"),  # noqa: E501
        (DDPMppConfig(3), 8, "model_channels: 0 norm groups (of at least four channels) do not divide 3, a level's width, alone or with its skip"),  # noqa: E501
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_the_image_are_refused(config: Any, image_size: Any, text: str) -> None:
    name = next(n for n, entry in DENOISERS.items() if entry.config is type(config))
    with torch.device("meta"), pytest.raises(ValueError) as caught:
        build(name, config, image_size=image_size, channels=3)
    assert str(caught.value) == f"denoiser.{text}"


@pytest.mark.parametrize(("size", "layers"), [(8, 1), (16, 4), (32, 4)])
def test_attention_is_at_resolution_16_by_default_if_a_level_has_it(size: int, layers: int) -> None:
    """The middle has one layer; the level at 16 pixels adds one in the encoder and two in the decoder."""
    with torch.device("meta"):
        net = build("unet", UNetConfig(channel_mult=[1, 1], num_res_blocks=1), image_size=size, channels=3)
    assert sum(name.endswith(".attention") for name, _ in net.named_modules()) == layers


@pytest.mark.parametrize("name", ["dit", "diffit", "diffit-latent"])
def test_an_image_of_the_wrong_size_is_refused_with_both_sizes(name: str) -> None:
    with pytest.raises(ValueError, match=r"^this network takes images of 3x8x8, got 3x16x8$"):
        small(name)(torch.zeros(2, CHANNELS, 16, 8), torch.zeros(2))


@pytest.mark.parametrize("name", ["unet", "ddpmpp"])
def test_an_image_that_cannot_be_halved_is_refused_with_its_size(name: str) -> None:
    with pytest.raises(ValueError, match=r"^this network takes images with 3 channels and sides divisible by 2, got 3x16x7$"):  # fmt: skip  # noqa: E501
        small(name)(torch.zeros(2, CHANNELS, 16, 7), torch.zeros(2))
    with pytest.raises(ValueError, match=r"sides divisible by 8, got 3x16x6$"):
        small(name, tmsa=True)(torch.zeros(2, CHANNELS, 16, 6), torch.zeros(2))


@pytest.mark.parametrize("name", ["ddpmpp", "diffit"])
def test_an_augmentation_label_of_the_wrong_width_is_refused(name: str) -> None:
    x, t, y = inputs()
    for config, width in ((None, 0), (9, 9)):
        net = small(name, augment_dim=config)
        with pytest.raises(
            ValueError, match=rf"^denoiser.augment_dim: is {width}, got an augmentation label of width 4$"
        ):
            net(x, t, y, augment=torch.zeros(len(x), 4))


@pytest.mark.parametrize(
    ("name", "changes", "augment", "frozen"),
    [
        ("diffit-latent", {"time_in": "none"}, 0.0, "condition."),
        ("diffit", {"time_in": "none"}, 0.0, "condition."),
        ("diffit", {"time_in": "none", "tmsa": "encoder"}, 0.0, None),
        ("diffit", {"time_in": "none", "tmsa": "encoder", "channels": [8], "blocks": [1]}, 0.0, "condition."),
        ("diffit", {"augment_dim": 9}, 0.0, "condition.augment."),
        ("ddpmpp", {"augment_dim": 9}, 0.0, "embedding.augment."),
        ("ddpmpp", {"augment_dim": 9}, 0.5, None),
    ],
)
def test_parameters_that_get_no_gradient_are_frozen(
    name: str, changes: dict[str, Any], augment: float, frozen: str | None
) -> None:
    """Training on several devices waits for the gradient of every parameter that isn't frozen."""
    shape = {"image_size": SIZE, "channels": CHANNELS, "num_classes": CLASSES}
    net, (x, _, y) = build(name, replace(SMALL[name], **changes), **shape), inputs()
    module = DiffusionModule(net, VP(), augment=augment)
    module.training_step((x, y), 0).backward()
    for key, parameter in net.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad) == key.startswith(frozen or "-"), key


def test_a_network_without_a_null_class_needs_labels() -> None:
    net, (x, t, _) = small("dit", null_class=False), inputs()
    with pytest.raises(ValueError, match=r"^this network has no null class: give labels y in 0\.\.4$"):
        net(x, t)
