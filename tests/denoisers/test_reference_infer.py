"""Constructor arguments, inferred from the shapes of the weights or given; the weight sets in a checkpoint."""

from typing import Any

import pytest
import torch
from golden_cases import load
from test_reference import CASES, arguments, weights
from torch import Tensor

from diffbench.denoisers import PRESETS
from diffbench.denoisers.pretrained.checkpoint import weight_sets
from diffbench.denoisers.pretrained.convert import RECIPES, describe, infer, shapes


def shapes_of(source: str, args: dict[str, Any]) -> dict[str, Tensor]:
    """Return a reference's state dict on the meta device."""
    return {key: torch.empty(shape, device="meta") for key, shape in shapes(source, args).items()}


@pytest.mark.parametrize("name", CASES)
def test_inferred_arguments_describe_the_golden_cases(name: str) -> None:
    case, source = load(name), name.split("_")[0]
    args = arguments(case)
    assert describe(source, infer(source, weights(case), args)) == describe(source, args)


def _dit(depth: int, width: int, heads: int, patch: int, side: int = 32) -> dict[str, Any]:
    return {"depth": depth, "hidden_size": width, "num_heads": heads, "patch_size": patch, "input_size": side}


def _adm(size: int, width: int, blocks: int, mult: list[float], **heads: Any) -> dict[str, Any]:
    flags = {"in_channels": 3, "out_channels": 6, "num_classes": 1000, "use_scale_shift_norm": True}
    flags |= {"resblock_updown": True, "attention_resolutions": [size // 32, size // 16, size // 8]}
    return flags | heads | {"image_size": size, "model_channels": width, "num_res_blocks": blocks, "channel_mult": mult}


def _uvit(width: int, depth: int, heads: int, patch: int, side: int, channels: int, rows: int) -> dict[str, Any]:
    args = {"embed_dim": width, "depth": depth, "num_heads": heads, "patch_size": patch, "img_size": side}
    return args | {"in_chans": channels, "num_classes": rows, "conv": width < 1152, "p_uncond": 0.1 * (rows == 1001)}


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
    **{
        name: ("uvit", _uvit(*sizes))
        for name, sizes in {
            "U-ViT-S/2": (512, 12, 8, 2, 32, 3, -1),
            "U-ViT-M/4": (768, 16, 12, 4, 64, 3, 1000),
            "U-ViT-L/2": (1024, 20, 16, 2, 32, 4, 1001),
            "U-ViT-H/2": (1152, 28, 16, 2, 32, 4, 1001),
        }.items()
    },
    "ADM-512": ("adm", _adm(512, 256, 2, _MULT[512], num_head_channels=64)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_need_no_argument(name: str) -> None:
    source, args = PUBLISHED[name]
    found = infer(source, shapes_of(source, args), {})
    plan = describe(source, found)
    assert plan == describe(source, args)
    ours = PRESETS[name]
    if source != "adm":
        assert plan.config == ours.config
    assert {key: plan.shape[key] for key in ours.shape} == ours.shape


def test_dit_and_sit_list_published_networks_only() -> None:
    for source in ("dit", "sit"):
        assert len(RECIPES[source].published) == 13
        assert all(name.startswith("DiT-") for name in RECIPES[source].published)


@pytest.mark.parametrize(
    ("channel_mult", "side", "label_dim", "augment_dim"), [([2, 2, 2], 32, 10, 9), ([1, 2, 2, 2], 64, 0, 0)]
)
def test_published_ddpmpp_is_inferred(channel_mult: list[int], side: int, label_dim: int, augment_dim: int) -> None:
    args = {"img_resolution": side, "in_channels": 3, "out_channels": 3, "channel_mult": channel_mult}
    args |= {"label_dim": label_dim, "augment_dim": augment_dim}
    given = {} if augment_dim else {"augment_dim": 0}
    assert describe("ddpmpp", infer("ddpmpp", shapes_of("ddpmpp", args), given)) == describe("ddpmpp", args)


def test_sit_is_read_as_dit() -> None:
    case = load("dit_a")
    found = infer("sit", weights(case), arguments(case))
    assert (found["depth"], found["learn_sigma"], found["class_dropout_prob"]) == (2, True, 0.1)


@pytest.mark.parametrize(
    ("rows", "given", "found"),
    [
        (1001, {}, (1000, 0.1)),
        (1000, {}, (1000, 0.0)),  # trained without label dropout: the last row is a class
        (11, {"num_classes": 10}, (10, 0.1)),
        (11, {"num_classes": 11}, (11, 0.0)),
        (11, {"num_classes": 11, "class_dropout_prob": 0.0}, (11, 0.0)),
    ],
    ids=str,
)
def test_the_last_label_is_the_null_class_only_where_the_number_of_classes_says_so(
    rows: int, given: dict[str, Any], found: tuple[int, float]
) -> None:
    state = shapes_of("dit", _dit(12, 384, 6, 2))
    state["y_embedder.embedding_table.weight"] = torch.empty(rows, 384, device="meta")
    read = infer("dit", state, given)
    assert (read["num_classes"], read["class_dropout_prob"]) == found
    assert describe("dit", read).shape["null_class"] is (found[1] > 0)


def test_a_label_table_of_unpublished_length_needs_arguments() -> None:
    state = shapes_of("dit", _dit(12, 384, 6, 2) | {"num_classes": 10})
    with pytest.raises(ValueError) as caught:
        infer("dit", state, {})
    assert str(caught.value).startswith(
        "dit: the shapes do not match DiT-S/2 (1 of 132 differ: y_embedder.embedding_table.weight is"
        " [11, 384], not [1001, 384]); give the constructor's arguments as arguments.NAME=VALUE, with NAME one of"
        " input_size, "
    )


def test_heads_are_never_taken_from_a_network_of_another_size() -> None:
    args = _dit(2, 48, 3, 2) | {"num_classes": 10}
    given = {key: value for key, value in args.items() if key != "num_heads"}
    with pytest.raises(ValueError, match=r"^arguments\.num_heads: no shape reveals it; give it as arguments\.num_head"):
        infer("dit", shapes_of("dit", args), given)
    assert infer("dit", shapes_of("dit", args), args)["num_heads"] == 3


@pytest.mark.parametrize(
    ("name", "given", "text"),
    [
        ("dit_a", {"depht": 2}, "dit: unknown argument depht; known: input_size, "),
        ("dit_a", {"num_heads": 3, "depth": 4}, "dit: the shapes do not match the given arguments ("),
        ("diffit_a", {"num_heads": 4}, "diffit: the shapes do not match the given arguments (3"),
        ("adm_a", {}, "adm: the shapes do not match ADM-"),
        (
            "adm_a",
            {"image_size": 8, "num_heads": 2},
            "arguments.use_new_attention_order: no shape reveals it; ",
        ),
        ("ddpmpp_b", {"label_dim": 4, "img_resolution": 16}, "ddpmpp: the argument in_channels is missing"),
    ],
)
def test_arguments_that_do_not_fit_are_named(name: str, given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as caught:
        infer(name.split("_")[0], weights(load(name)), given)
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.module."])
@pytest.mark.parametrize("name", ["dit_a", "adm_a", "ddpmpp_a"])
def test_prefixes_added_by_wrappers_are_removed(name: str, prefix: str) -> None:
    plain = weights(load(name))
    wrapped = {prefix + key: value for key, value in plain.items()}
    chosen, sets = weight_sets(name.split("_")[0], wrapped | ({"sigma": torch.ones(1)} if prefix else {}))
    assert chosen == prefix.rstrip(".") and sets[chosen].keys() == plain.keys()


def test_weights_of_another_source_are_recognised() -> None:
    dit, adm = weights(load("dit_a")), weights(load("adm_a"))
    with pytest.raises(ValueError, match=r"^adm: no input_blocks\.0\.0\.weight among 32 names; .* look like dit$"):
        weight_sets("adm", dit)
    with pytest.raises(
        ValueError, match=r"^ddpmpp: no map_layer0\.weight among 128 names; these weights look like adm$"
    ):
        weight_sets("ddpmpp", adm)
    with pytest.raises(ValueError, match=r"^weights: choose one set with weights=KEY: a, b$"):
        weight_sets("dit", {f"{place}.{key}": value for place in "ab" for key, value in dit.items()})


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def checkpoints(raw: dict[str, Tensor], mean: dict[str, Tensor]) -> dict[str, tuple[dict[str, Any], str]]:
    """Return checkpoints in the layouts of common training code, each with the name of the average inside."""
    counter = torch.ones(1)
    dotless = {f"model_ema.diffusion_model{key.replace('.', '')}": value for key, value in mean.items()}
    moments = {"state": {0: {"exp_avg": counter, "exp_avg_sq": counter}, 1: {"exp_avg": counter}}}
    return {
        "DiT": ({"model": raw, "ema": mean, "opt": moments}, "ema"),
        "model_ema": ({"model": raw, "model_ema": mean}, "model_ema"),
        "timm": ({"state_dict": raw, "state_dict_ema": mean}, "state_dict_ema"),
        "average alone": (mean, ""),
        "DataParallel": ({"model": under("module.", raw), "ema": under("module.", mean)}, "ema.module"),
        "compile": (under("_orig_mod.", raw) | under("ema._orig_mod.", mean), "ema._orig_mod"),
        "Lightning": ({"state_dict": under("net.", raw) | under("net_ema.", mean)}, "state_dict.net_ema"),
        "WeightAveraging": (
            {"current_model_state": under("net.", raw), "state_dict": under("net.", mean), "averaging_state": {}},
            "state_dict.net",
        ),
        "ema-pytorch": (
            {"model": raw, "ema": under("online_model.", raw) | under("ema_model.", mean) | {"step": counter}},
            "ema.ema_model",
        ),
        "swa_utils": (
            {"model": raw, "swa_model": under("module.", mean) | {"n_averaged": counter}},
            "swa_model.module",
        ),
        "latent diffusion": (
            {"state_dict": under("model.diffusion_model.", raw) | dotless | {"model_ema.num_updates": counter}},
            "state_dict.model_ema",
        ),
    }


LAYOUTS = list(checkpoints({}, {}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_average_is_found(layout: str) -> None:
    mean = weights(load("dit_a"))
    raw = {key: torch.zeros_like(value) for key, value in mean.items()}
    checkpoint, name = checkpoints(raw, mean)[layout]
    chosen, sets = weight_sets("dit", checkpoint)
    assert chosen == name
    assert sets[chosen].keys() == mean.keys() and all(torch.equal(sets[chosen][key], mean[key]) for key in mean)


def test_weights_are_chosen_by_name() -> None:
    mean = weights(load("dit_a"))
    raw = {key: torch.zeros_like(value) for key, value in mean.items()}
    two = {"model": raw, "ema_0.999": raw, "ema_0.9999": mean}
    with pytest.raises(ValueError, match=r"^weights: choose one set with weights=KEY: model, ema_0\.999, ema_0\.9999$"):
        weight_sets("dit", two)
    assert [weight_sets("dit", two, key)[0] for key in ("ema_0.9999", "model")] == ["ema_0.9999", "model"]
    with pytest.raises(ValueError, match=r"weights=KEY: model, "):
        weight_sets("dit", two, "nothing")
    nested = {"state_dict": under("net.", raw) | under("net_ema.", mean)}
    assert weight_sets("dit", nested, "net")[0] == "state_dict.net"
    assert weight_sets("dit", {"model": mean, "opt": {"exp_avg": {"0": mean["pos_embed"]}}})[0] == "model"


@pytest.mark.parametrize("place", ["shadow_params", "averages"])
def test_an_average_without_names_is_not_silently_skipped(place: str) -> None:
    raw = weights(load("dit_a"))
    checkpoint = {"model": raw, "ema": {"decay": 0.999, place: list(raw.values())}}
    with pytest.raises(ValueError, match=r"^weights: ema is an average that cannot be read: .* weights=KEY: model$"):
        weight_sets("dit", checkpoint)
    assert weight_sets("dit", checkpoint, "model")[0] == "model"
