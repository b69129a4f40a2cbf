"""Linear layers computed by oneDNN equal those by MKL up to rounding, and oneDNN is used only where it is faster."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import inputs, small
from test_reference import inputs as golden_inputs
from test_reference import network as golden_network
from test_reference import output
from test_resume import CASES, TINY, assert_equal
from torch import Tensor, nn

from diffbench.denoisers import linear
from diffbench.denoisers.linear import Linear, mkl_is_slow
from diffbench.runs.lifecycle import train

DIT = "experiments/digits/dit.yaml"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Record the shapes that linear layers convolve, with oneDNN switched on for every size and processor."""
    monkeypatch.setattr(linear, "LEAST", 1)
    monkeypatch.setattr(linear, "ROWS", 1)
    monkeypatch.setattr(linear, "BY_ONEDNN", True)
    shapes: list[tuple[int, ...]] = []
    convolve = nn.functional.conv2d

    def noted(x: Tensor, *rest: Any) -> Tensor:
        shapes.append(tuple(x.shape))
        return convolve(x, *rest)

    monkeypatch.setattr(linear.nn.functional, "conv2d", noted)
    return shapes


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 64, 96), (64, 96), (2, 3, 8, 96), (96,), (2, 3, 5, 96), (0, 96)], ids=str)
def test_outputs_and_gradients_match_float64(shape: tuple[int, ...], bias: bool, calls: list[tuple[int, ...]]) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = Linear(96, 160, bias=bias)
    exact = nn.Linear(96, 160, bias=bias, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    assert list(layer.state_dict()) == ["weight", "bias"][: 1 + bias]
    x = torch.randn(*shape, generator=generator)
    push = torch.randn(*shape[:-1], 160, generator=generator)
    found, wanted = [], []
    for module, results, dtype in ((layer, found, torch.float32), (exact, wanted, torch.float64)):
        given = x.detach().to(dtype).requires_grad_()
        out = module(given)
        out.backward(push.to(dtype))
        results += [out.detach(), given.grad, *(p.grad for p in module.parameters())]
    rows = x.numel() // 96
    assert calls == ([] if rows % 16 or not rows else [(16, 96, 1, rows // 16)])
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape and a.is_contiguous()
        assert not b.numel() or (a - b).abs().max() < 1e-6 * max(1, b.abs().max())


def test_tokens_of_any_memory_layout_are_accepted(calls: list[tuple[int, ...]]) -> None:
    layer = Linear(24, 40)
    x = torch.randn(3, 24, 32).transpose(1, 2)
    assert (layer(x) - nn.functional.linear(x, layer.weight, layer.bias)).abs().max() < 1e-6
    assert calls == [(16, 24, 1, 6)]


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="MKL is not there, whose work oneDNN takes")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("sizes", [(2048, 384, 1536), (256, 384, 384), (32, 96, 160)], ids=str)
def test_onednn_is_chosen_for_any_number_of_threads(sizes: tuple[int, int, int], threads: int) -> None:
    rows, inner, outer = sizes
    pixels = torch.empty(linear.BATCH, inner, 1, rows // linear.BATCH)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        weight, none = torch.empty(outer, inner, 1, 1), ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
        chosen = torch._C._select_conv_backend(pixels, weight, None, *none)  # type: ignore[attr-defined]
    finally:
        torch.set_num_threads(before)
    assert chosen.name == "Mkldnn"


def test_unsuitable_layers_and_inputs_stay_with_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "BY_ONEDNN", True)
    monkeypatch.setattr(linear.nn.functional, "conv2d", None)  # calling it would fail
    layer = Linear(512, 1024)

    def same(layer: nn.Linear, x: Tensor) -> None:
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))

    same(layer, torch.randn(240, 512))  # few rows
    same(layer, torch.randn(257, 512))  # not a multiple of 16
    same(Linear(256, 256), torch.randn(496, 256))  # 512 rows would have 2^25 products
    same(layer.double(), torch.randn(256, 512).double())
    with torch.autocast("cpu", torch.bfloat16):
        same(layer.float(), torch.randn(256, 512))
    for taken in (layer, Linear(256, 256)):
        with pytest.raises(TypeError):
            taken(torch.randn(512, taken.in_features))


@pytest.mark.parametrize("name", ["dit", "diffit-latent", "diffit", "unet", "ddpmpp", "uvit", "segformer"])
def test_every_backbone_equals_mkl(name: str, calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, t, y) = small(name).requires_grad_(True), inputs()
    assert not any(type(module) is nn.Linear for module in net.modules())
    with monkeypatch.context() as patch:
        patch.setattr(linear, "BY_ONEDNN", False)
        want = net(x, t, y)
        want.square().mean().backward()
    gradients = [p.grad for p in net.parameters()]
    net.zero_grad()
    out = net(x, t, y)
    out.square().mean().backward()
    assert calls and (out - want).abs().max() < 1e-5
    for p, gradient in zip(net.parameters(), gradients, strict=True):
        assert (p.grad is None) == (gradient is None)
        assert gradient is None or (p.grad - gradient).abs().max() < 1e-5  # type: ignore[operator]


@pytest.mark.parametrize("name", ["dit_a", "diffit_a", "diffit_b", "diffit_c", "uvit_a"])
def test_outputs_equal_the_published_ones(name: str, calls: list[tuple[int, ...]]) -> None:
    net, case = golden_network(name, torch.float32)
    case.check(output(case), net(*golden_inputs(case, case.info["calls"][0], torch.float32)).detach())
    assert calls


@pytest.mark.parametrize(
    ("vendor", "capability", "slow"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_mkl_is_slow_on_amd_with_avx512(
    vendor: str, capability: str, slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(linear, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert mkl_is_slow() is slow
    monkeypatch.setattr(linear, "CPUINFO", tmp_path / "none")
    assert not mkl_is_slow()


def test_a_run_ends_with_the_same_weights_and_resumes_bit_for_bit(
    tmp_path: Path, calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_dit = [*CASES["dit"], "optimizer.name=adamw"]  # Muon would amplify rounding differences

    def state(folder: str, *changes: str) -> dict[str, Any]:
        args = [*TINY, *plain_dit, "sample.steps='2'", f"runs_dir={tmp_path / folder}", *changes]
        train(DIT, [*args, "trainer.max_images=40"])
        (run,) = (tmp_path / folder / "digits").iterdir()
        found: dict[str, Any] = torch.load(run / "checkpoints" / "step-5.ckpt", weights_only=True)
        return found

    args = [*TINY, *plain_dit, "sample.steps='2'", f"runs_dir={tmp_path / 'twice'}", "trainer.max_images=16"]
    once, _ = state("once"), train(DIT, args)
    assert calls
    twice = state("twice")
    monkeypatch.setattr(linear, "BY_ONEDNN", False)
    plain = state("plain")
    for part in ("state_dict", "optimizer_states"):
        assert_equal(once[part], twice[part], part)
    assert all((value - plain["state_dict"][key]).abs().max() < 1e-5 for key, value in once["state_dict"].items())
