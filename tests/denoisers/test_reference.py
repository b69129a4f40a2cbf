"""Published weights read into our networks: equal outputs in float32 and float64, and every mismatch named."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from golden_cases import Case, load
from torch import Tensor, nn

from diffbench.denoisers import from_reference
from diffbench.denoisers.pretrained.convert import describe

CASES = [
    "dit_a",
    "dit_b",
    "diffit_a",
    "diffit_b",
    "diffit_c",
    "adm_a",
    "adm_b_legacy",
    "adm_b_neworder",
    "ddpmpp_a",
    "ddpmpp_b",
    "uvit_a",
]
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def weights(case: Case) -> dict[str, Tensor]:
    return {name.removeprefix("param."): v for name, v in case.tensors.items() if name.startswith("param.")}


def arguments(case: Case) -> dict[str, Any]:
    return dict(case.info["constructor"]["args"])


def network(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Case]:
    case = load(name)
    net = from_reference(name.split("_")[0], arguments(case), weights(case))
    return net.to(dtype).requires_grad_(False), case


def inputs(case: Case, call: Mapping[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return x, t and y of a call, whatever names the reference gives them."""
    by_name = {key: value.removeprefix("in.") for key, value in call["inputs"].items()}
    times = next(by_name[key] for key in ("t", "timesteps", "noise_labels") if key in by_name)
    labels = {"y": by_name.get("y"), "class_labels": "labels"}.get("class_labels" if "class_labels" in by_name else "y")
    return case.input(by_name["x"], dtype), case.input(times, dtype), case.input(labels) if labels else None


def output(case: Case) -> str:
    """Return the name of the first call's output."""
    name: str = case.info["calls"][0]["outputs"]["return"]
    return name.removeprefix("out.")


@BOTH
@pytest.mark.parametrize("name", CASES)
def test_outputs_equal_the_reference(name: str, dtype: torch.dtype) -> None:
    net, case = network(name, dtype)
    x, t, y = inputs(case, case.info["calls"][0], dtype)
    out, name = net(x, t, y), output(case)
    case.check(name, out)
    at_t0 = case.info["tolerances64"][f"out64.{name}"].get("at_t0") if dtype == torch.float64 else None
    for i in at_t0["samples"] if at_t0 else []:
        want = case.tensors[f"out64.{name}"][i]
        assert bool(((out[i] - want).abs() <= at_t0["atol"] + at_t0["rtol"] * want.abs()).all())


def test_the_parity_table_stays_within_rounding() -> None:
    """Print the largest differences from the references: `pytest tests/denoisers/test_reference.py -k table -rP`."""
    print(f"{'case':<16} {'float32':>8} {'float64':>8} {'largest output':>15}")
    for name in CASES:
        errors = []
        for dtype, prefix in ((torch.float32, "out."), (torch.float64, "out64.")):
            net, case = network(name, dtype)
            want = case.tensors[prefix + output(case)]
            errors.append(float((net(*inputs(case, case.info["calls"][0], dtype)) - want).abs().max()))
        print(f"{name:<16} {errors[0]:>8.1e} {errors[1]:>8.1e} {want.abs().max():>15.2f}")
        assert errors[0] < 1e-5
        embedded_in_float32 = name.startswith(("ddpmpp", "uvit"))  # the reference's time embedding
        assert errors[1] < (1e-7 if embedded_in_float32 else 1e-14)


GUIDED = [(name, call["name"]) for name in CASES[:5] for call in load(name).info["calls"][1:]]


@BOTH
@pytest.mark.parametrize(("name", "output"), GUIDED)
def test_guided_outputs_equal_the_reference(name: str, output: str, dtype: torch.dtype) -> None:
    """Guidance on the first three channels: constant for DiT and large DiffiT, power-cosine for small DiffiT."""
    net, case = network(name, dtype)
    call = next(c for c in case.info["calls"] if c["name"] == output)
    x, t, y = inputs(case, call, dtype)
    settings = call["args"]
    if "cfg_scale" not in settings:
        case.check(output, net(x, t, y))
        return
    half = len(x) // 2
    conditional, null = net(torch.cat([x[:half], x[:half]]), t, y).chunk(2)
    scale = torch.full((half,), settings["cfg_scale"], dtype=torch.float64)
    if name.startswith("diffit") and x.shape[-1] <= 32:
        phase = (1 - t[:half].double() / settings.get("diffusion_steps", 1000)) ** settings.get("scale_pow", 4.0)
        scale = 1 + (settings["cfg_scale"] - 1) * (1 - torch.cos(math.pi * phase)) / 2
        assert torch.allclose(scale, torch.tensor(call["effective_scale_per_sample"], dtype=torch.float64))
    scale = scale.to(dtype)[:, None, None, None]
    guided = (null + scale * (conditional - null))[:, :3]
    case.check(output, torch.cat([torch.cat([guided, part[:, 3:]], dim=1) for part in (conditional, null)]))


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_sit_outputs_the_first_half_of_dit(learn_sigma: bool) -> None:
    dit, case = network("dit_a" if learn_sigma else "dit_b")
    sit = from_reference("sit", arguments(case), weights(case))
    x, y, t = case.input("x"), case.input("y"), torch.tensor([0.0, 0.37, 1.0])
    out, both = sit(x, t, y), dit(x, t, y)
    assert out.shape == x.shape
    assert (out - both[:, : x.shape[1]]).abs().max() < 1e-6


def test_without_classes_the_one_row_of_the_label_table_is_added() -> None:
    net, case = network("dit_a")
    x, t, key = case.input("x"), case.input("t"), "y_embedder.embedding_table.weight"
    state = weights(case)
    alone = from_reference("dit", arguments(case) | {"num_classes": 0}, state | {key: state[key][3:4]})
    y = torch.zeros(len(x), dtype=torch.int64)
    assert (alone(x, t, y) - net(x, t, y + 3)).abs().max() < 1e-6


def test_omitted_arguments_take_the_reference_defaults() -> None:
    assert describe("dit", {}).config.depth == 28
    latent = describe("diffit", {})
    assert (latent.denoiser, latent.config.depth, latent.config.head_silu) == ("diffit-latent", 30, True)
    assert latent.shape["null_class"] and not describe("dit", {"class_dropout_prob": 0.0}).shape["null_class"]
    assert describe("sit", {}).shape["learn_sigma"] is False


def test_adm_flags_reach_the_config() -> None:
    flags = {"image_size": 32, "in_channels": 3, "model_channels": 32, "out_channels": 6, "num_res_blocks": 1}
    flags |= {"attention_resolutions": [2, 4], "num_classes": 7, "conv_resample": False, "num_heads_upsample": 4}
    plan = describe("adm", flags)
    assert plan.config.attention_resolutions == [16, 8]
    assert (plan.config.conv_resample, plan.config.num_heads, plan.config.num_heads_upsample) == (False, 1, 4)
    assert plan.shape["learn_sigma"] and not plan.shape["null_class"]


def test_an_imported_network_without_null_class_needs_labels() -> None:
    net, case = network("adm_b_legacy")
    with pytest.raises(ValueError, match=r"no null class: give labels y in 0\.\.9"):
        net(case.input("x"), case.input("timesteps"))


def test_reading_changes_neither_the_random_state_nor_the_given_weights() -> None:
    case = load("adm_a")
    given = weights(case)
    assert next(iter(given.values())).dtype == torch.float16
    before, state = {key: value.clone() for key, value in given.items()}, torch.get_rng_state()
    net = from_reference("adm", arguments(case), given)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in given.items())
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert not net.training


KEYS = {
    "dit_a": "blocks.1.adaLN_modulation.1.weight",
    "diffit_a": "blocks.1.attn.qkv_temb.bias",
    "adm_b_legacy": "output_blocks.2.2.emb_layers.1.weight",
    "ddpmpp_b": "dec.16x16_block2.qkv.weight",
}


@pytest.mark.parametrize(("name", "key"), KEYS.items())
def test_a_missing_unexpected_or_misshapen_key_is_named(name: str, key: str) -> None:
    case, source = load(name), name.split("_")[0]
    good = weights(case)
    with pytest.raises(ValueError, match=rf"of the {len(good)} keys .*, 1 missing: {key}$"):
        from_reference(source, arguments(case), {k: v for k, v in good.items() if k != key})
    with pytest.raises(ValueError, match=rf"of the {len(good)} keys .*, 1 unexpected: blocks\.0\.foo$"):
        from_reference(source, arguments(case), good | {"blocks.0.foo": torch.zeros(1)})
    wrong = good[key][:-1]
    shapes = rf"{key} has shape \[{', '.join(map(str, wrong.shape))}\], .* make \[{good[key].shape[0]}\b"
    with pytest.raises(ValueError, match=shapes):
        from_reference(source, arguments(case), good | {key: wrong})


def test_a_state_dict_of_another_model_is_refused_with_counts_of_keys() -> None:
    case = load("dit_a")
    with pytest.raises(ValueError, match=r"^diffit: of the 34 keys .* 8 missing: .*, \.\.\.; 6 unexpected: .*adaLN"):
        from_reference("diffit", arguments(case), weights(case))
    with pytest.raises(ValueError, match=r"^dit: pos_embed has shape \[1, 16, 48\], but these .* make \[1, 64, 48\]"):
        from_reference("dit", arguments(case) | {"input_size": 16}, weights(case))


def test_index_buffers_are_compared_not_trusted() -> None:
    case, key = load("diffit_a"), "blocks.1.attn.relative_position_index"
    good = weights(case)
    tampered = good[key].clone()
    tampered[0, 1] += 1
    for index in (tampered, tampered[:-1]):
        with pytest.raises(ValueError, match=f"buffer {key} differs"):
            from_reference("diffit", arguments(case), good | {key: index})
    with pytest.raises(ValueError, match=f"1 missing: {key}"):
        from_reference("diffit", arguments(case), {k: v for k, v in good.items() if k != key})


def test_an_odd_depth_of_uvit_is_rounded_down_as_in_its_code() -> None:
    case = load("uvit_a")
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 500.0]), torch.tensor([1, 10])
    four, five = (from_reference("uvit", arguments(case) | {"depth": n}, weights(case))(x, t, y) for n in (4, 5))
    assert torch.equal(four, five)


def test_standard_resampling_filters_are_accepted_and_others_refused() -> None:
    case = load("ddpmpp_a")
    keys = [f"{at}.{layer}.resample_filter" for at in ("enc.8x8_down", "dec.16x16_up") for layer in ("conv0", "skip")]
    box = {key: torch.full((1, 1, 2, 2), 0.25) for key in keys}
    from_reference("ddpmpp", arguments(case), weights(case) | box)
    with pytest.raises(ValueError, match=f"buffer {keys[2]} differs"):
        from_reference("ddpmpp", arguments(case), weights(case) | box | {keys[2]: torch.rand(1, 1, 2, 2)})


def test_an_unknown_source_is_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match=r"^unknown source 'mit'; choose from dit, .*, uvit, segformer$"):
        from_reference("mit", {}, {})


@pytest.mark.parametrize(
    ("source", "changes", "text"),
    [
        ("dit", {"depht": 2}, "dit: unknown argument depht; known: input_size, "),
        ("adm", {}, "adm: the argument image_size is missing"),
        ("ddpmpp", {}, "ddpmpp: the argument img_resolution is missing"),
        ("vit", {}, "unknown source 'vit'; choose from dit, sit, diffit, adm, ddpmpp, uvit$"),
    ],
)
def test_arguments_that_do_not_fit_are_named(source: str, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        describe(source, changes)


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("adm_a", {"dims": 3}, "dims=3 has no counterpart here, only 2"),
        ("adm_a", {"out_channels": 4}, "out_channels=4 is neither in_channels=3 nor twice that"),
        ("ddpmpp_a", {"encoder_type": "residual"}, "encoder_type='residual' has no counterpart here, only 'standard'"),
        ("ddpmpp_a", {"resample_filter": [1, 3, 3, 1]}, "resample_filter=.* has no counterpart here"),
    ],
)
def test_architectures_without_a_counterpart_are_refused(name: str, changes: dict[str, Any], text: str) -> None:
    case = load(name)
    with pytest.raises(ValueError, match=text):
        from_reference(name.split("_")[0], arguments(case) | changes, weights(case))


def test_the_augmentation_label_of_ddpmpp_enters_the_embedding() -> None:
    net, case = network("ddpmpp_a")
    x, t, _ = inputs(case, case.info["calls"][0], torch.float32)
    zeros = torch.zeros(len(x), 9)
    assert torch.equal(net(x, t, augment=zeros), net(x, t))
    assert (net(x, t, augment=zeros + 1) - net(x, t)).abs().max() > 1e-3
