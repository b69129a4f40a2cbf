"""Attention maps equal the softmax that a network computes, placed in the image where its windows are."""

from typing import Any

import pytest
import torch
from einops import rearrange
from small_networks import CHANNELS, CLASSES, SIZE, inputs, small
from torch import Tensor, nn

from diffbench.denoisers import DENOISERS
from diffbench.denoisers.attention_maps import AttentionMap, attention_map, record_attention
from diffbench.denoisers.layers import from_windows

PIXELS = [(1, 2), (7, 0), (4, 5)]
LAYERS = {
    "unet": ["encoder.2.attention", "middle.0.attention", "decoder.0.attention", "decoder.1.attention"],
    "dit": ["blocks.0", "blocks.1"],
    "diffit": [f"{place}.0.block.attention" for place in ("encoder.0", "encoder.1", "decoder.0")],
    "diffit-latent": ["blocks.0.attention", "blocks.1.attention"],
    "ddpmpp": ["encoder.2.attention", "decoder.0.attention", "decoder.3.attention"],
    "uvit": ["encoder.0", "middle.0", "decoder.0"],
    "segformer": ["stages.2.blocks.0"],  # the only block whose keys cover every position
}


def recorded(net: nn.Module, pixels: list[tuple[int, int]] = PIXELS) -> list[AttentionMap]:
    x, t, y = inputs(3)
    with record_attention(net, pixels) as maps:
        net(x, t, y)
    return maps


def arguments_of(net: nn.Module, layer: str) -> tuple[Tensor, ...]:
    """Return the arguments that a layer is called with."""
    calls: list[tuple[Tensor, ...]] = []
    x, t, y = inputs(3)
    with net.get_submodule(layer).register_forward_pre_hook(lambda _module, arguments: calls.append(arguments)):
        net(x, t, y)
    return calls[0]


@pytest.mark.parametrize("name", DENOISERS)
def test_every_layer_of_every_backbone_has_a_map(name: str) -> None:
    maps = recorded(small(name))
    assert [found.layer for found in maps] == LAYERS[name]
    for found in maps:
        side = found.weights.shape[-1]
        assert found.weights.shape[:1] + found.weights.shape[2:] == (3, len(PIXELS), side, side)
        assert found.places == tuple((row * side // SIZE, column * side // SIZE) for row, column in PIXELS)
        assert found.elsewhere.shape[-1] == (2 if name == "uvit" else 0)  # class and time are tokens
        total = found.weights.nansum((-1, -2)) + found.elsewhere.sum(-1)
        assert torch.allclose(total, torch.ones(()), atol=1e-5)
        assert found.weights.isnan().any() == (name == "diffit" and side == 8)  # two windows per side


def test_a_map_equals_the_softmax_of_its_window_with_bias_and_time() -> None:
    net = small("diffit", window=2)
    layer = "encoder.0.0.block.attention"
    tokens, time = arguments_of(net, layer)  # 3 samples of 16 windows of 4 tokens
    tmsa = net.get_submodule(layer)
    qkv = tmsa.qkv(tokens) + tmsa.qkv_time(time).repeat_interleave(16, dim=0)[:, None]
    q, k, _ = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=2)
    logits = q @ k.mT / 2 + rearrange(tmsa.bias[tmsa.bias_index], "n m h -> h n m")  # head width 4
    attention = logits.softmax(-1)
    found = next(m for m in recorded(net) if m.layer == layer)
    for i, (row, column) in enumerate(PIXELS):
        window, token = row // 2 * 4 + column // 2, row % 2 * 2 + column % 2
        placed = torch.full((3, 16, 4, 2), torch.nan)
        placed[:, window] = attention.unflatten(0, (3, 16))[:, window, :, token].mT
        want = from_windows(placed.flatten(0, 1), 2, SIZE, SIZE)
        assert torch.allclose(found.weights[:, :, i], want, atol=1e-6, equal_nan=True)
        assert found.weights[0, 0, i].isfinite().sum() == 4


def test_attention_to_time_and_class_tokens_is_separate() -> None:
    net = small("dit", conditioning="in-context")
    (x, _) = arguments_of(net, "blocks.0")
    block = net.blocks[0]
    q, k, _ = rearrange(block.qkv(block.norm1(x)), "b n (three h d) -> three b h n d", three=3, h=4)
    attention = (q @ k.mT / 8**0.5).softmax(-1)
    found = recorded(net)[0]
    assert x.shape[1] == 2 + 16
    for i, (row, column) in enumerate(found.places):
        line = attention[:, :, 2 + row * 4 + column]
        assert torch.allclose(found.elsewhere[:, :, i], line[..., :2], atol=1e-6)
        assert torch.allclose(found.weights[:, :, i].flatten(-2), line[..., 2:], atol=1e-6)
    separate = recorded(small("diffit-latent", time_in="separate"))[0]
    assert separate.elsewhere.shape[-1] == 1
    assert torch.allclose(separate.elsewhere[..., 0] + separate.weights.sum((-1, -2)), torch.ones(()), atol=1e-5)


def test_cross_attention_to_time_and_class_has_no_map() -> None:
    assert [found.layer for found in recorded(small("dit", conditioning="cross-attention"))] == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize(
    ("name", "changes", "shape"),
    [
        ("dit", {"image_size": (4, 8)}, (2, 4)),
        ("diffit", {"image_size": (4, 8), "window": 2}, (4, 8)),
        ("unet", {}, (2, 4)),
    ],
)
def test_oblong_images_have_oblong_maps(name: str, changes: dict[str, Any], shape: tuple[int, int]) -> None:
    net = small(name, **changes)
    x = torch.randn(2, CHANNELS, 4, 8)
    with record_attention(net, [(3, 6)]) as maps:
        net(x, torch.zeros(2), torch.tensor([0, CLASSES]))
    assert maps[0].weights.shape[-2:] == shape
    if name == "diffit":
        inside = maps[0].weights[0, 0, 0].isfinite()
        assert inside.sum() == 4 and bool(inside[2:, 6:].all())


def test_recording_changes_no_output_and_leaves_no_hooks() -> None:
    net, (x, t, y) = small("diffit"), inputs()
    plain = net(x, t, y)
    with record_attention(net, PIXELS) as maps:
        assert torch.equal(net(x, t, y), plain)
        once = len(maps)
        net(x, t, y)
    assert len(maps) == 2 * once
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    net(x, t, y)
    assert len(maps) == 2 * once


def test_a_pixel_outside_the_image_is_refused_and_leaves_no_hooks() -> None:
    net = small("dit")
    for pixel in [(8, 0), (0, 8), (-1, 0)]:
        with pytest.raises(ValueError, match=rf"^tokens: the pixel {pixel[0]},{pixel[1]} is outside the 8x8 image$"):
            recorded(net, [pixel])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_every_argument_of_torchs_attention_is_supported() -> None:
    """Custom networks pass dropout, masks and grouped keys, and use attention that is not over the image."""

    class Net(nn.Module):
        def forward(self, x: Tensor, _t: Tensor, **given: Any) -> Tensor:
            tokens = rearrange(x, "b c h w -> b 1 (h w) c").repeat(1, 2, 1, 1)
            keys = tokens[:, :1] if given.get("enable_gqa") else tokens
            return torch.nn.functional.scaled_dot_product_attention(tokens, keys, keys, **given)

    x, t, _ = inputs(2)
    flat = rearrange(x, "b c h w -> b (h w) c")
    logits = flat @ flat.mT * CHANNELS**-0.5
    mask = torch.rand(SIZE**2, SIZE**2, generator=torch.Generator().manual_seed(0)) < 0.5
    causal = torch.ones(SIZE**2, SIZE**2, dtype=torch.bool).tril()
    row, column = PIXELS[0]
    for given, allowed in (
        ({"dropout_p": 0.0, "attn_mask": None}, None),
        ({"is_causal": True, "dropout_p": 0.0}, causal),
        ({"attn_mask": mask}, mask),
        ({"enable_gqa": True}, None),
    ):
        with record_attention(Net(), PIXELS) as maps:
            Net()(x, t, **given)  # another network is not recorded
            assert not maps
        net = Net()
        with record_attention(net, PIXELS) as maps:
            net(x, t, **given)
        (found,) = maps
        wanted = (logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)).softmax(-1)
        expected = wanted[:, row * SIZE + column].unflatten(-1, (SIZE, SIZE))
        assert torch.allclose(found.weights[:, 0, 0], expected, atol=1e-6), given
    assert attention_map("", x.shape, PIXELS, flat, flat, flat) is None  # (B, N, C), no heads
    assert attention_map("", x.shape, PIXELS, *(torch.zeros(5, 1, 4, 2),) * 3) is None  # not of this batch
