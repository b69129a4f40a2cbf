"""Constructor arguments read from the shapes of weights: of the golden cases, and of every published size."""

from typing import Any

import pytest
import torch
from golden_cases import load
from test_reference import CASES, arguments, weights
from torch import Tensor

from diffbench.denoisers import PRESETS
from diffbench.denoisers.pretrained.convert import RECIPES, describe, reference_names
from diffbench.denoisers.pretrained.infer import infer, unwrapped

# What the weights of an unpublished size do not say.
UNSAID = {
    "dit": ("num_heads",),
    "adm": ("image_size", "num_heads", "num_head_channels", "use_new_attention_order"),
}


def shapes_of(source: str, args: dict[str, Any]) -> dict[str, Tensor]:
    """A reference's state dict without values."""
    recipe, plan = RECIPES[source], describe(source, args)
    with torch.device("meta"):
        net = recipe.build(plan.config, **plan.shape)
        ours, names = net.state_dict(), reference_names(source, net)
        complete = recipe.defaults | args
        return {key: torch.empty(recipe.shape(name, ours[name], complete)) for key, name in names.items()}


@pytest.mark.parametrize("name", CASES)
def test_arguments_of_the_golden_cases(name: str) -> None:
    case, source = load(name), name.split("_")[0]
    made = arguments(case)
    given = {key: made[key] for key in UNSAID.get(source, ()) if made[key] != -1}
    given |= {"dropout": made["dropout"]} if "dropout" in made else {}
    assert describe(source, infer(source, weights(case), given)) == describe(source, made)


def _dit(depth: int, width: int, heads: int, patch: int, side: int = 32) -> dict[str, Any]:
    return {"depth": depth, "hidden_size": width, "num_heads": heads, "patch_size": patch, "input_size": side}


def _adm(size: int, width: int, blocks: int, mult: list[float], **heads: Any) -> dict[str, Any]:
    flags = {"in_channels": 3, "out_channels": 6, "num_classes": 1000, "use_scale_shift_norm": True}
    flags |= {"resblock_updown": True, "attention_resolutions": [size // 32, size // 16, size // 8]}
    return flags | heads | {"image_size": size, "model_channels": width, "num_res_blocks": blocks, "channel_mult": mult}


SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
_MULT = {256: [1, 1, 2, 2, 4, 4], 512: [0.5, 1, 1, 2, 2, 4, 4]}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"DiT-{s}/{p}": ("dit", _dit(*sizes, p)) for s, sizes in SIZES.items() for p in (2, 4, 8)},
    "DiT-XL/2-512": ("dit", _dit(28, 1152, 16, 2, 64)),
    "DiffiT-XL/2": ("diffit", {"depth": 28}),
    "DiffiT-XL/2-depth30": ("diffit", {}),
    "DiffiT-XL/2-512": ("diffit", {"depth": 28, "input_size": 64}),
    "ADM-64": ("adm", _adm(64, 192, 3, [1, 2, 3, 4], num_head_channels=64, use_new_attention_order=True, dropout=0.1)),
    "ADM-128": ("adm", _adm(128, 256, 2, [1, 1, 2, 3, 4], num_heads=4)),
    "ADM-256": ("adm", _adm(256, 256, 2, _MULT[256], num_head_channels=64)),
    "ADM-256-uncond": ("adm", _adm(256, 256, 2, _MULT[256], num_head_channels=64) | {"num_classes": None}),
    "ADM-512": ("adm", _adm(512, 256, 2, _MULT[512], num_head_channels=64)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_need_no_argument(name: str) -> None:
    source, made = PUBLISHED[name]
    found = infer(source, shapes_of(source, made), {})
    plan = describe(source, found)
    assert plan == describe(source, made)
    ours = PRESETS[name]
    if source != "adm":
        assert plan.config == ours.config
    assert {key: plan.shape[key] for key in ours.shape} == ours.shape


@pytest.mark.parametrize(
    ("channel_mult", "side", "label_dim", "augment_dim"), [([2, 2, 2], 32, 10, 9), ([1, 2, 2, 2], 64, 0, 0)]
)
def test_published_ddpmpp(channel_mult: list[int], side: int, label_dim: int, augment_dim: int) -> None:
    made = {"img_resolution": side, "in_channels": 3, "out_channels": 3, "channel_mult": channel_mult}
    made |= {"label_dim": label_dim, "augment_dim": augment_dim}
    assert describe("ddpmpp", infer("ddpmpp", shapes_of("ddpmpp", made), {})) == describe("ddpmpp", made)


@pytest.mark.parametrize(
    "changes",
    [
        {"resblock_updown": False},
        {"resblock_updown": False, "conv_resample": False},
        {"channel_mult": [2], "attention_resolutions": [1]},
        {"use_scale_shift_norm": False, "num_classes": None, "out_channels": 3},
    ],
    ids=str,
)
def test_the_layers_of_adm_say_how_it_resamples(changes: dict[str, Any]) -> None:
    made = _adm(32, 32, 2, [1, 2, 2], num_heads=2) | {"attention_resolutions": [2]} | changes
    given = {"image_size": 32, "num_heads": 2, "use_new_attention_order": False}
    found = infer("adm", shapes_of("adm", made), given)
    unknowable = {"resblock_updown": False} if made["channel_mult"] == [2] else {}
    assert describe("adm", found) == describe("adm", made | unknowable)


def test_sit_is_read_as_dit() -> None:
    case = load("dit_a")
    found = infer("sit", weights(case), {"num_heads": 3})
    assert (found["depth"], found["learn_sigma"], found["class_dropout_prob"]) == (2, True, 0.1)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, (10, 0.1)),
        ({"num_classes": 10}, (10, 0.1)),
        ({"num_classes": 11}, (11, 0.0)),
        ({"class_dropout_prob": 0.0}, (11, 0.0)),
    ],
    ids=str,
)
def test_the_last_label_is_the_null_class_unless_told_otherwise(
    given: dict[str, Any], found: tuple[int, float]
) -> None:
    read = infer("dit", weights(load("dit_a")), given | {"num_heads": 3})
    assert (read["num_classes"], read["class_dropout_prob"]) == found


@pytest.mark.parametrize(
    ("name", "given", "text"),
    [
        ("dit_a", {}, "arguments.num_heads: the weights do not say it, and 48 is no published width (384, 768, 1024, 1152); give it as arguments.num_heads=8"),  # noqa: E501
        ("dit_a", {"num_heads": 3, "depth": 4}, "arguments.depth: 4 is given, the weights of dit say 2"),
        ("dit_a", {"num_heads": 3, "num_classes": 1000}, "arguments.num_classes: 1000 is given, the weights of dit hold 11 labels"),  # noqa: E501
        ("diffit_a", {"num_heads": 4}, "arguments.num_heads: 4 is given, the weights of diffit say 3"),
        ("adm_a", {}, "arguments.image_size: the weights do not say image_size, use_new_attention_order, num_heads, and are of no published size; give arguments.image_size=VALUE arguments.use_new_attention_order=VALUE arguments.num_heads=VALUE"),  # noqa: E501
        ("adm_a", {"image_size": 8, "num_heads": 2}, "arguments.use_new_attention_order: the weights do not say use_new_attention_order, and are of no published size; give arguments.use_new_attention_order=VALUE"),  # noqa: E501
        ("ddpmpp_b", {"label_dim": 4}, "arguments.label_dim: 4 is given, the weights of ddpmpp say 5"),
    ],
)  # fmt: skip
def test_what_the_weights_do_not_say_or_deny_is_named(name: str, given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as caught:
        infer(name.split("_")[0], weights(load(name)), given)
    assert str(caught.value) == text


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.module."])
@pytest.mark.parametrize("name", ["dit_a", "adm_a", "ddpmpp_a"])
def test_what_wrappers_put_before_the_names_goes(name: str, prefix: str) -> None:
    plain = weights(load(name))
    wrapped = {prefix + key: value for key, value in plain.items()}
    found = unwrapped(name.split("_")[0], wrapped | ({"sigma": torch.ones(1)} if prefix else {}))
    assert found.keys() == plain.keys()


def test_weights_of_another_source_are_told() -> None:
    dit, adm = weights(load("dit_a")), weights(load("adm_a"))
    with pytest.raises(ValueError, match=r"^adm: no input_blocks\.0\.0\.weight among 32 names; .* look like dit$"):
        unwrapped("adm", dit)
    with pytest.raises(
        ValueError, match=r"^ddpmpp: no map_layer0\.weight among 128 names; these weights look like adm$"
    ):
        unwrapped("ddpmpp", adm)
    with pytest.raises(ValueError, match=r"^dit: there are 2 networks here: a\.x_embedder.proj.weight, b\.x_embedder"):
        unwrapped("dit", {f"{place}.{key}": value for place in "ab" for key, value in dit.items()})
    with pytest.raises(ValueError, match=r"^diffit: no blocks\.0\.attn\.relative_position_bias_table among 32 names$"):
        infer("diffit", dit, {})
    with pytest.raises(ValueError, match=r"^dit: no pos_embed among 31 names$"):
        infer("dit", {key: value for key, value in dit.items() if key != "pos_embed"}, {})


def test_a_weight_of_another_shape_is_named() -> None:
    state = {"x_embedder.proj.weight": torch.zeros(8, 3, 2, 2), "pos_embed": torch.zeros(4)}
    with pytest.raises(ValueError, match=r"^dit: pos_embed has shape \(4,\), as in no such network$"):
        infer("dit", state, {})
    with pytest.raises(ValueError, match=r"^ddpmpp: map_layer0.weight has shape \(4,\), as in no such network$"):
        infer("ddpmpp", {"map_layer0.weight": torch.zeros(4)}, {})
