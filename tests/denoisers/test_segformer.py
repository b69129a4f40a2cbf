"""SegFormer: parity with the published network under each project's weight names, and its additions as a denoiser."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import Case, load
from small_networks import inputs, small
from test_reference import arguments, weights
from torch import Tensor

from diffbench.cli import main
from diffbench.denoisers import SegFormerConfig, build, from_reference
from diffbench.denoisers.segformer import Block

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


@pytest.fixture(scope="module")
def case() -> Case:
    return load("segformer_a")


def check(case: Case, net: Any, x: Tensor, prefix: str = "") -> None:
    with torch.no_grad():
        for i, found in enumerate(net.features(x), start=1):
            case.check(f"{prefix}stage{i}", found)
        case.check(f"{prefix}logits", net(x, torch.zeros(len(x)), None))


@BOTH
def test_features_and_logits_equal_the_reference(case: Case, dtype: torch.dtype) -> None:
    check(case, from_reference("segformer", arguments(case), weights(case)).to(dtype), case.input("x", dtype))


def test_logits_equal_the_reference_with_the_norm_eps_of_nvlabs(case: Case) -> None:
    net = from_reference("segformer", arguments(case) | {"norm_eps": 1e-6}, weights(case)).double()
    with torch.no_grad():
        case.check("original_eps.logits", net(case.input("x", torch.float64), torch.zeros(1)))


def b0_weights(case: Case) -> dict[str, Tensor]:
    """Compute B0's weights from exact integers."""
    fill, found = case.info["b0_fill"], {}
    modulus = fill["M"]
    for k, (name, shape, kind, scale) in enumerate(fill["tensors"], start=1):
        i = torch.arange(torch.Size(shape).numel(), dtype=torch.int64)
        mixed = 48271 * (i * i % modulus) + 16807 * i + 69621 * k + 7919 * fill["salt"]
        u = (mixed % modulus).double() / modulus - 0.5
        spread = (scale or 0.0) * 12**0.5 * u
        value = {"weight": spread, "bias": spread, "one": 1 + spread, "var": 1 + u}
        found[name] = torch.zeros(shape, dtype=torch.int64) if kind == "int" else value[kind].float().reshape(shape)
    return found


@BOTH
def test_b0_equals_the_reference_at_full_size(case: Case, dtype: torch.dtype) -> None:
    state = b0_weights(case)
    first = state["segformer.encoder.patch_embeddings.0.proj.weight"].flatten()[:4].double()
    stated = case.info["b0_fill"]["check"]["first four values of segformer.encoder.patch_embeddings.0.proj.weight"]
    assert torch.allclose(first, torch.tensor(stated, dtype=torch.float64))
    net = from_reference("segformer", case.info["calls"][2]["constructor"]["args"], state).to(dtype)
    check(case, net, case.input("b0_x", dtype), "b0.")


def as_nvlabs(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights as in mmsegmentation's files, and add the layer that is never called."""
    rules = [
        (r"^segformer\.encoder\.patch_embeddings\.(\d)\.proj", lambda m: f"backbone.patch_embed{int(m[1]) + 1}.proj"),
        (
            r"^segformer\.encoder\.patch_embeddings\.(\d)\.layer_norm",
            lambda m: f"backbone.patch_embed{int(m[1]) + 1}.norm",
        ),
        (r"^segformer\.encoder\.block\.(\d)", lambda m: f"backbone.block{int(m[1]) + 1}"),
        (r"^segformer\.encoder\.layer_norm\.(\d)", lambda m: f"backbone.norm{int(m[1]) + 1}"),
        (r"layer_norm_(\d)", r"norm\1"),
        (r"attention\.self\.(query|sr)", lambda m: "attn." + {"query": "q", "sr": "sr"}[m[1]]),
        (r"attention\.self\.layer_norm", "attn.norm"),
        (r"attention\.output\.dense", "attn.proj"),
        (r"mlp\.dense", "mlp.fc"),
        (r"decode_head\.linear_c\.(\d)", lambda m: f"decode_head.linear_c{int(m[1]) + 1}"),
        (r"linear_fuse", "linear_fuse.conv"),
        (r"batch_norm", "linear_fuse.bn"),
        (r"classifier", "linear_pred"),
    ]
    renamed: dict[str, Tensor] = {"decode_head.conv_seg.weight": torch.zeros(7, 128, 1, 1)}
    for key, value in state.items():
        if ".key." in key:
            value = torch.cat([value, state[key.replace(".key.", ".value.")]])
            key = key.replace("attention.self.key", "attn.kv")
        elif ".value." in key:
            continue
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


@pytest.mark.parametrize("names", ["transformers 5", "NVlabs"])
def test_the_weight_names_of_every_project_are_read(case: Case, names: str) -> None:
    state = weights(case)
    if names == "NVlabs":
        theirs = as_nvlabs(state)
    else:
        theirs = {}
        for key, value in state.items():
            for pattern, replacement in case.info["key_names"]["transformers 5"]["pairs"]:
                key = re.sub(pattern, replacement, key)
            theirs[key] = value
    assert set(theirs) - set(state)
    net = from_reference("segformer", arguments(case), theirs).double()
    with torch.no_grad():
        found = net(case.input("x", torch.float64), torch.zeros(1))
    case.check("original_eps.logits" if names == "NVlabs" else "logits", found)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"decode_head.classifier.bias": None}, r"segformer: final.bias \(our name\) is missing"),
        ({"decode_head.extra": torch.zeros(1)}, r"segformer: extra \(our name\) is unexpected"),
        (
            {"decode_head.classifier.bias": torch.full((7,), torch.nan)},
            "segformer: final.bias holds 7 values that are not",
        ),
        ({"decode_head.classifier.bias": torch.zeros(6)}, r"segformer: final.bias has shape \[6\], .* make \[7\]"),
    ],
)
def test_a_key_that_does_not_fit_is_named(case: Case, changes: dict[str, Tensor | None], text: str) -> None:
    state = {key: value for key, value in (weights(case) | changes).items() if value is not None}
    with pytest.raises(ValueError, match=text):
        from_reference("segformer", arguments(case), state)
    with pytest.raises(ValueError, match="segformer: unknown argument depht; known: num_channels, "):
        from_reference("segformer", {"depht": 1}, state)


@pytest.mark.parametrize("conditioning", ["adaln-zero", "adaln", "add", "none"])
@pytest.mark.parametrize("head", ["unpatchify", "bilinear"])
def test_every_conditioning_works_with_every_head(conditioning: str, head: str) -> None:
    net = small("segformer", conditioning=conditioning, head=head, input_skip=conditioning != "none", strides=[2, 1, 2])
    x, t, y = inputs()
    out = net(x, t, y)
    assert out.shape == x.shape
    moved = (net(x, t.flip(0), y) - out).abs().amax(dim=(1, 2, 3)).min()
    assert moved == 0 if conditioning == "none" else moved > 1e-4


def test_the_input_is_added_to_the_mean_alone_with_a_conditional_gain() -> None:
    net, (x, t, y) = small("segformer", learn_sigma=True, strides=[2, 1, 2]), inputs()
    with torch.no_grad():
        out = net(x, t, y)
        net.gain.weight.zero_()
        net.gain.bias.copy_(torch.arange(12.0))  # in a patch the channels change fastest
        plain = net(x, t, y)
        net.gain.bias.zero_()
        without = net(x, t, y)
    assert torch.equal(out[:, 3:], without[:, 3:])
    gain = torch.arange(12.0).reshape(2, 2, 3).permute(2, 0, 1).repeat(1, 4, 4)
    assert torch.allclose(plain[:, :3] - without[:, :3], x * gain, atol=1e-5)


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError) as caught:
        build("segformer", SegFormerConfig(), image_size=10, channels=3)
    assert str(caught.value) == (
        "denoiser.strides: [1, 2, 2] and denoiser.sr_ratios=[4, 2, 1] need image sides divisible by 4, got 10"
    )
    for changes, text in (
        ({"depths": [1, 1]}, "denoiser.depths: must have one entry for each of the 3 stages of denoiser.hidden_sizes"),
        (
            {"conditioning": "none"},
            "denoiser.input_skip: needs denoiser.conditioning, which is none; change one of them",
        ),
        ({"num_heads": [5, 6, 10]}, "denoiser.num_heads: 5 does not divide 192, a width in denoiser.hidden_sizes"),
        ({"drop_path": 1.0}, r"denoiser.drop_path: must lie in \[0, 1\), got 1.0"),
    ):
        with pytest.raises(ValueError, match=text):
            SegFormerConfig(**changes)


def test_branches_are_dropped_per_sample_and_only_in_training() -> None:
    net, (x, t, y) = small("segformer", drop_path=0.5), inputs()
    blocks = [module for module in net.modules() if isinstance(module, Block)]
    assert [block.drop for block in blocks] == [0.0, 0.25, 0.5]
    assert torch.equal(net(x, t, y), net(x, t, y))
    net.train()
    torch.manual_seed(0)
    assert not torch.equal(net(x, t, y), net(x, t, y))
    kept = blocks[2]._dropped(torch.ones(1000, 2, 3))
    assert set(kept.unique().tolist()) == {0.0, 2.0} and 0.4 < (kept[:, 0, 0] > 0).float().mean() < 0.6


def test_a_network_that_outputs_logits_is_not_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "experiments/digits/segformer.yaml", f"runs_dir={tmp_path}"]
    assert main([*argv, "denoiser.head=logits"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith("denoiser: this network outputs 10x8x8 where 1x8x8 is needed; choose another"), line
    assert not list(tmp_path.iterdir())
