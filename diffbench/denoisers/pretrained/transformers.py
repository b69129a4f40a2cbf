"""Recipes of DiT, SiT and the latent DiffiT: transformers over patches.

Facts only, of facebookresearch/DiT, willisma/SiT and NVlabs/DiffiT; none of their code stands here.
"""

from typing import Any

from torch import Tensor, nn

from diffbench.denoisers.base import Preset
from diffbench.denoisers.diffit_latent import PRESETS as DIFFIT_PRESETS
from diffbench.denoisers.diffit_latent import DiffiTLatent, DiffiTLatentConfig
from diffbench.denoisers.dit import PRESETS as DIT_PRESETS
from diffbench.denoisers.dit import DiT, DiTConfig
from diffbench.denoisers.pretrained.recipe import Blueprint, Recipe
from diffbench.denoisers.tmsa import TMSA

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
    shape = {
        "image_size": arguments["input_size"],
        "channels": arguments["in_channels"],
        "num_classes": arguments["num_classes"],
        "null_class": arguments["class_dropout_prob"] > 0,
        "learn_sigma": learn_sigma,
    }
    return Blueprint(denoiser, config(**sizes), shape)


def _sit_shape(name: str, ours: Tensor, arguments: dict[str, Any]) -> tuple[int, ...]:
    doubled = arguments["learn_sigma"] and name.startswith("final.")
    return (2 * ours.shape[0], *ours.shape[1:]) if doubled else tuple(ours.shape)


def _sit_arrange(name: str, theirs: Tensor, _net: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """SiT never uses the second half of its doubled output: the rows that make it are left out."""
    if not arguments["learn_sigma"] or not name.startswith("final."):
        return theirs
    return theirs.unflatten(0, (-1, 2, arguments["in_channels"]))[:, 0]


def _diffit_buffers(net: DiffiTLatent) -> dict[str, Tensor]:
    indices = [module.bias_index for module in net.modules() if isinstance(module, TMSA)]
    return {f"blocks.{i}.attn.relative_position_index": index for i, index in enumerate(indices)}


def _published(preset: Preset) -> dict[str, Any]:
    sizes = ("patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio")
    return {name: getattr(preset.config, name) for name in sizes} | {"input_size": preset.shape["image_size"]}


_DIT: dict[str, Any] = {
    "build": DiT,
    "anchor": "x_embedder.proj.weight",
    "defaults": _TRANSFORMER,
    "published": {name: _published(p) for name, p in DIT_PRESETS.items() if p.config.conditioning == "adaln-zero"},
    "rules": lambda _: _DIT_RULES,
    "free": frozenset({"input_size", "in_channels", "num_classes", "class_dropout_prob", "learn_sigma"}),
    "unseen": (("num_heads",),),
}
DIT = Recipe(**_DIT, blueprint=lambda a: _transformer(a, "dit", DiTConfig, a["learn_sigma"]))
SIT = Recipe(
    **_DIT,
    blueprint=lambda a: _transformer(a, "dit", DiTConfig, learn_sigma=False),
    shape=_sit_shape,
    arrange=_sit_arrange,
)
DIFFIT = Recipe(
    DiffiTLatent,
    _DIT["anchor"],
    _TRANSFORMER | {"depth": 30, "mask_ratio": None, "decode_layer": 4},  # the last two are not used there either
    {name: _published(preset) for name, preset in DIFFIT_PRESETS.items()},
    lambda a: _transformer(a, "diffit-latent", DiffiTLatentConfig, a["learn_sigma"]),
    lambda _: _DIFFIT_RULES,
    _DIT["free"],
    buffers=_diffit_buffers,
)
