"""LightningDiT's options in a DiT block: rotary positions, RMS norms, normalised queries and keys, a gated MLP."""

from typing import Any

import pytest
import torch
from small_networks import CLASSES, inputs, small
from torch import Tensor
from torch.nn.functional import layer_norm, linear, rms_norm, scaled_dot_product_attention, silu

from diffbench.denoisers import DiTConfig
from diffbench.denoisers.dit import DiTBlock, SwiGLU
from diffbench.denoisers.positions import RotaryPosition

LIGHTNING = {"qk_norm": True, "mlp": "swiglu", "position": "rope", "norm": "rms"}


def rotated(x: Tensor, height: int, width: int) -> Tensor:
    """Rotate pairs of features of (B, heads, N, d), as complex numbers, by row and column."""
    d = x.shape[-1]
    frequency = 10_000.0 ** -(torch.arange(0, d // 2, 2, dtype=torch.float64) / (d // 2))
    angles = [torch.cat([row * frequency, col * frequency]) for row in range(height) for col in range(width)]
    turn = torch.polar(torch.ones(len(angles), d // 2, dtype=torch.float64), torch.stack(angles))
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


def test_rotary_positions_rotate_feature_pairs_and_leave_extra_tokens() -> None:
    x = torch.randn(2, 3, 2 + 4 * 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = RotaryPosition(8, (4, 6)).double()(x)
    assert torch.equal(out[:, :, :2], x[:, :, :2])
    assert (out[:, :, 2:] - rotated(x[:, :, 2:].contiguous(), 4, 6)).abs().max() < 1e-6
    one = RotaryPosition(8, (4, 6)).double()(x[:, :, :1].expand(-1, -1, 24, -1))
    products = (one[0, 0] @ one[0, 0].T).reshape(4, 6, 4, 6)
    assert (products[0, 0, 1, 2] - products[2, 3, 3, 5]).abs() < 1e-6  # only the distance matters
    assert (products[0, 0, 1, 2] - products[0, 0, 2, 1]).abs() > 1e-3


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_a_block_follows_its_formulas(norm: Any) -> None:
    torch.manual_seed(0)
    block = DiTBlock(DiTConfig(2, 24, 1, 3, **LIGHTNING | {"norm": norm}), (2, 3)).double()
    for p in block.parameters():
        p.data += 0.3 * torch.randn_like(p)
    w = dict(block.named_parameters())
    x, c = torch.randn(2, 6, 24, dtype=torch.float64), torch.randn(2, 24, dtype=torch.float64)

    def normed(h: Tensor, name: str) -> Tensor:
        weight, bias = w.get(f"{name}.weight"), w.get(f"{name}.bias")
        d = h.shape[-1:]
        return rms_norm(h, d, weight, 1e-6) if norm == "rms" else layer_norm(h, d, weight, bias, 1e-6)

    def layer(h: Tensor, name: str) -> Tensor:
        return linear(h, w[f"{name}.weight"], w[f"{name}.bias"])

    shift1, scale1, gate1, shift2, scale2, gate2 = layer(silu(c), "modulation.1")[:, None].chunk(6, dim=-1)
    q, k, v = layer(normed(x, "norm1") * (1 + scale1) + shift1, "qkv").unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    q, k = (rotated(normed(h.contiguous(), name), 2, 3) for h, name in ((q, "q_norm"), (k, "k_norm")))
    h = x + gate1 * layer(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), "proj")
    gate, value = layer(normed(h, "norm2") * (1 + scale2) + shift2, "mlp.inner").chunk(2, dim=-1)
    h = h + gate2 * layer(silu(gate) * value, "mlp.outer")
    assert (block(x, c) - h).abs().max() < 1e-6 * h.abs().max()  # the rotations are kept in float32
    assert {name.split(".")[0] for name in w} == (
        {"qkv", "proj", "q_norm", "k_norm", "mlp", "modulation"} | ({"norm1", "norm2"} if norm == "rms" else set())
    )


@pytest.mark.parametrize("key", LIGHTNING)
@pytest.mark.parametrize("conditioning", ["adaln-zero", "in-context", "cross-attention"])
def test_each_option_works_with_each_conditioning(key: str, conditioning: str) -> None:
    changes = {key: LIGHTNING[key], "conditioning": conditioning}
    x, t, y = inputs()
    net = small("dit", **changes)
    out = net(x, t, y)
    assert small("dit", shaken=False, **changes)(x, t, y).abs().max() == 0
    assert (out - small("dit", conditioning=conditioning)(x, t, y)).abs().max() > 1e-3
    assert (net(x[1:2], t[1:2], y[1:2]) - out[1:2]).abs().max() < 1e-5
    assert torch.equal(net(x, t), net(x, t, torch.full_like(y, CLASSES)))


def test_a_gated_mlp_has_as_many_weights_as_a_plain_one() -> None:
    assert SwiGLU(64, 4.0).outer.in_features == 170  # two thirds of 256, rounded down
    assert SwiGLU(1152, 4.0).outer.in_features == 3072
    with pytest.raises(
        ValueError, match=r"^denoiser\.mlp_ratio: two thirds of 0\.02 times a width of 64 is less than one$"
    ):
        SwiGLU(64, 0.02)


def test_all_options_together_compile_and_run_in_bfloat16() -> None:
    net, (x, t, y) = small("dit", **LIGHTNING), inputs()
    torch.compiler.reset()
    out = net(x, t, y)
    assert torch.equal(torch.compile(net, fullgraph=True, backend="eager")(x, t, y), out)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = net(x, t, y).float()
    true = net.bfloat16()(x.bfloat16(), t, y).float()
    assert max((low - out).norm() for low in (mixed, true)) < 0.05 * out.norm()
