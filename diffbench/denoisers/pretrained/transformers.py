"""Recipes for DiT, SiT, the latent DiffiT and U-ViT: transformers over patches.

Based on facts about facebookresearch/DiT, willisma/SiT, NVlabs/DiffiT and baofff/U-ViT; uses none of their code.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from diffbench.denoisers.base import Preset
from diffbench.denoisers.diffit_latent import PRESETS as DIFFIT_PRESETS
from diffbench.denoisers.diffit_latent import DiffiTLatent, DiffiTLatentConfig
from diffbench.denoisers.dit import PRESETS as DIT_PRESETS
from diffbench.denoisers.dit import DiT, DiTConfig
from diffbench.denoisers.pretrained.recipe import Blueprint, Recipe, require_values
from diffbench.denoisers.tmsa import TMSA
from diffbench.denoisers.uvit import PRESETS as UVIT_PRESETS
from diffbench.denoisers.uvit import UViT, UViTConfig

_TRANSFORMER = {
    "input_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "num_classes": 1000,
    "learn_sigma": True,
}
_TRANSFORMER_RULES = [
    (r"^position$", "pos_embed"),
    (r"^patch\.", "x_embedder.proj."),
    (r"^condition\.time\.", "t_embedder.mlp."),
    (r"^condition\.label\.", "y_embedder.embedding_table."),
    (r"^(blocks\.\d+)\.mlp\.0\.", r"\1.mlp.fc1."),
    (r"^(blocks\.\d+)\.mlp\.2\.", r"\1.mlp.fc2."),
    (r"^final\.", "final_layer.linear."),
]
_DIT_RULES = [
    *_TRANSFORMER_RULES,
    (r"^(blocks\.\d+)\.(qkv|proj)\.", r"\1.attn.\2."),
    (r"^(blocks\.\d+)\.modulation\.", r"\1.adaLN_modulation."),
    (r"^final_modulation\.", "final_layer.adaLN_modulation."),
]
_DIFFIT_RULES = [
    *_TRANSFORMER_RULES,
    (r"^(blocks\.\d+)\.attention\.qkv_time\.", r"\1.attn.qkv_temb."),
    (r"^(blocks\.\d+)\.attention\.(qkv|proj)\.", r"\1.attn.\2."),
    (r"^(blocks\.\d+)\.attention\.bias$", r"\1.attn.relative_position_bias_table"),
]


def _transformer(arguments: dict[str, Any], denoiser: str, config: type, learn_sigma: bool) -> Blueprint:
    sizes = {key: arguments[key] for key in ("patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio")}
    classes, null = arguments["num_classes"], arguments["class_dropout_prob"] > 0
    if null and classes == 0:  # the only row of its table, "no class", then acts as a class
        classes, null = 1, False
    shape = {
        "image_size": arguments["input_size"],
        "channels": arguments["in_channels"],
        "num_classes": classes,
        "null_class": null,
        "learn_sigma": learn_sigma,
    }
    return Blueprint(denoiser, config(**sizes), shape)


def _sit_shape(name: str, ours: Tensor, arguments: dict[str, Any]) -> tuple[int, ...]:
    doubled = arguments["learn_sigma"] and name.startswith("final.")
    return (2 * ours.shape[0], *ours.shape[1:]) if doubled else tuple(ours.shape)


def _sit_arrange(name: str, theirs: Tensor, _net: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """Drop the rows that make the second half of SiT's doubled output, which SiT never uses."""
    if not arguments["learn_sigma"] or not name.startswith("final."):
        return theirs
    return theirs.unflatten(0, (-1, 2, arguments["in_channels"]))[:, 0]


def _diffit_buffers(net: DiffiTLatent) -> dict[str, Tensor]:
    indices = [module.bias_index for module in net.modules() if isinstance(module, TMSA)]
    return {f"blocks.{i}.attn.relative_position_index": index for i, index in enumerate(indices)}


def _published(preset: Preset) -> dict[str, Any]:
    sizes = ("patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio")
    return {name: getattr(preset.config, name) for name in sizes} | {"input_size": preset.shape["image_size"]}


DIT = Recipe(
    DiT,
    "x_embedder.proj.weight",
    _TRANSFORMER,
    {
        name: _published(p)
        for name, p in DIT_PRESETS.items()
        if name.startswith("DiT-") and p.config.conditioning == "adaln-zero"
    },
    lambda a: _transformer(a, "dit", DiTConfig, a["learn_sigma"]),
    lambda _: _DIT_RULES,
    frozenset({"input_size", "in_channels", "num_classes", "class_dropout_prob", "learn_sigma"}),
    (("num_heads",),),
)
SIT = replace(
    DIT,
    blueprint=lambda a: _transformer(a, "dit", DiTConfig, learn_sigma=False),
    shape=_sit_shape,
    arrange=_sit_arrange,
)
DIFFIT = Recipe(
    DiffiTLatent,
    DIT.anchor,
    _TRANSFORMER | {"depth": 30, "mask_ratio": None, "decode_layer": 4},  # the last two are unused there as well
    {name: _published(preset) for name, preset in DIFFIT_PRESETS.items()},
    lambda a: _transformer(a, "diffit-latent", DiffiTLatentConfig, a["learn_sigma"]),
    lambda _: _DIFFIT_RULES,
    DIT.free,
    buffers=_diffit_buffers,
)


# U-ViT: its label table has `num_classes` rows; if its training drops labels, the last row means "no class".

_UVIT = {
    "img_size": 224,
    "patch_size": 16,
    "in_chans": 3,
    "embed_dim": 768,
    "depth": 12,
    "num_heads": 12,
    "mlp_ratio": 4.0,
    "qkv_bias": False,
    "qk_scale": None,
    "mlp_time_embed": False,
    "num_classes": -1,
    "use_checkpoint": False,
    "conv": True,
    "skip": True,
    "p_uncond": 0.0,  # from the data set's settings
}
_UVIT_RULES = [
    (r"^position$", "pos_embed"),
    (r"\.(qkv|proj)\.", r".attn.\1."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.2\.", ".mlp.fc2."),
    (r"\.join\.", ".skip_linear."),
    (r"^patch\.", "patch_embed.proj."),
    (r"^time\.", "time_embed."),
    (r"^label\.", "label_emb."),
    (r"^encoder\.", "in_blocks."),
    (r"^middle\.0\.", "mid_block."),
    (r"^decoder\.", "out_blocks."),
    (r"^head\.", "decoder_pred."),
    (r"^conv\.", "final_layer."),
]


def _uvit(arguments: dict[str, Any]) -> Blueprint:
    require_values("uvit", arguments, qkv_bias=False, qk_scale=None)
    same = ("patch_size", "depth", "num_heads", "mlp_ratio", "mlp_time_embed", "conv", "skip")
    rows, null = max(0, arguments["num_classes"]), arguments["p_uncond"] > 0
    shape = {
        "image_size": arguments["img_size"],
        "channels": arguments["in_chans"],
        "num_classes": rows - null if rows else 0,
        "null_class": null,
        "learn_sigma": False,
    }
    sizes = {name: arguments[name] for name in same} | {"depth": arguments["depth"] // 2 * 2}  # it rounds down too
    config = UViTConfig(hidden_size=arguments["embed_dim"], **sizes)
    return Blueprint("uvit", config, shape)


def _uvit_published(preset: Preset) -> dict[str, Any]:
    config, shape = preset.config, preset.shape
    classes, null = shape.get("num_classes", 0), shape.get("null_class", True)
    return {
        "img_size": shape["image_size"],
        "patch_size": config.patch_size,
        "in_chans": shape["channels"],
        "embed_dim": config.hidden_size,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "conv": config.conv,
        "num_classes": classes + null if classes else -1,
        "p_uncond": 0.15 if classes and null else 0.0,
    }


UVIT = Recipe(
    UViT,
    "patch_embed.proj.weight",
    _UVIT,
    {name: _uvit_published(preset) for name, preset in UVIT_PRESETS.items()},
    _uvit,
    lambda _: _UVIT_RULES,
    frozenset({"img_size", "in_chans", "num_classes", "p_uncond"}),
    (("num_heads",),),
)
