"""Each backbone runs compiled, in bfloat16, in channels-last order, and on other shapes, with the same result."""

import shutil
from typing import Any

import pytest
import torch
from einops import reduce
from small_networks import CHANNELS, CLASSES, SMALL, inputs, small
from torch import Tensor, nn

from diffbench.denoisers import DENOISERS

EACH = pytest.mark.parametrize("name", DENOISERS)
WITH_CONVOLUTIONS = pytest.mark.parametrize("name", ["unet", "diffit", "ddpmpp"])


def gradients(net: nn.Module, out: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the mean square of an output."""
    net.zero_grad()
    out.float().square().mean().backward()
    return {key: p.grad.clone() for key, p in net.named_parameters() if p.grad is not None}


def close(got: Tensor, want: Tensor, share: float) -> bool:
    """Return whether the difference is at most a share of the norm of the wanted value."""
    return bool((got - want).norm() <= share * want.norm() + 1e-12)


@EACH
def test_compiles_as_one_graph_to_the_same_values(name: str) -> None:
    net, (x, t, y) = small(name), inputs()
    torch.compiler.reset()
    assert torch.equal(torch.compile(net, fullgraph=True, backend="eager")(x, t, y), net(x, t, y))


def test_compiles_without_labels_too() -> None:
    net, (x, t, _) = small("dit"), inputs()
    torch.compiler.reset()
    assert torch.equal(torch.compile(net, fullgraph=True, backend="eager")(x, t), net(x, t))


NEEDS_COMPILER = pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="there is no C++ compiler")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # minutes of compilation for each network, more on a busy machine
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from inductor's own imports
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=NEEDS_COMPILER)])
@EACH
def test_compiled_gradients_are_the_same(name: str, backend: str) -> None:
    net, (x, t, y) = small(name).requires_grad_(True), inputs()
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    want, got = gradients(net, net(x, t, y)), gradients(net, compiled(x, t, y))
    assert got.keys() == want.keys()
    assert all(torch.allclose(got[key], want[key], rtol=1e-3, atol=1e-5) for key in want)


@EACH
def test_bfloat16_autocast_is_near_float32(name: str) -> None:
    net, (x, t, y) = small(name).requires_grad_(True), inputs()
    out = net(x, t, y)
    want = gradients(net, out)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = net(x, t, y)
    got = gradients(net, low)
    assert low.dtype in (torch.bfloat16, torch.float32)
    assert close(low.float(), out, 0.03)
    assert all(bool(g.isfinite().all()) for g in got.values())
    flat = [torch.cat([g[key].flatten() for key in want]) for g in (got, want)]
    assert close(*flat, 0.06)


@WITH_CONVOLUTIONS
def test_channels_last_changes_nothing(name: str) -> None:
    net, (x, t, y) = small(name).double().requires_grad_(True), inputs()
    x = x.double()
    out = net(x, t, y)
    want = gradients(net, out)
    net.to(memory_format=torch.channels_last)
    last = net(x.to(memory_format=torch.channels_last), t, y)
    got = gradients(net, last)
    assert (last - out).abs().max() < 1e-11
    assert all((got[key] - want[key]).abs().max() < 1e-11 for key in want)


@EACH
@pytest.mark.parametrize("batch", [1, 3])
def test_any_batch_size_trains(name: str, batch: int) -> None:
    net, (x, t, y) = small(name).train().requires_grad_(True), inputs(batch)
    out = net(x, t, y)
    assert out.shape == x.shape
    assert all(bool(g.isfinite().all()) for g in gradients(net, out).values())


# Transformers and DiffiT are built for one height and width; U-Nets take any size their levels divide.
OBLONG = [
    ("dit", {"image_size": (4, 8)}),
    ("diffit-latent", {"image_size": (4, 8)}),
    ("diffit", {"image_size": (4, 8)}),
    ("diffit", {"image_size": (4, 8), "window": 2}),
    ("unet", {}),
    ("ddpmpp", {}),
]


@pytest.mark.parametrize(("name", "shape"), OBLONG, ids=str)
def test_networks_take_oblong_images(name: str, shape: dict[str, Any]) -> None:
    net = small(name, **shape).double()
    x, t, y = (
        torch.randn(2, CHANNELS, 4, 8, dtype=torch.float64),
        torch.tensor([3.0, 500.0]),
        torch.tensor([0, CLASSES]),
    )
    out = net(x, t, y)
    assert out.shape == x.shape
    for row, column in [(0, 0), (3, 7), (1, 6)] if name in ("dit", "diffit-latent") else []:
        changed = x.clone()
        changed[:, :, row, column] += 1
        there = reduce((net(changed, t, y) - out).abs(), "b c (h p) (w q) -> h w", "sum", p=2, q=2)
        assert there.argmax() == row // 2 * 4 + column // 2  # the patch of the changed pixel changes most


@pytest.mark.parametrize("name", ["dit", "diffit", "diffit-latent"])
def test_a_square_size_may_be_given_as_height_and_width(name: str) -> None:
    square, again, (x, t, y) = small(name, image_size=(8, 8)), small(name), inputs()
    assert torch.equal(square(x, t, y), again(x, t, y))


def test_every_backbone_has_a_small_network() -> None:
    assert set(SMALL) == set(DENOISERS)
