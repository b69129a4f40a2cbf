"""Recipes for ADM's U-Net and DDPM++.

Based on facts about openai/guided-diffusion and NVlabs/edm; uses none of their code.
"""

from typing import Any

import torch
from torch import Tensor, nn

from diffbench.denoisers.ddpmpp import Block, DDPMpp, DDPMppConfig
from diffbench.denoisers.layers import PixelAttention
from diffbench.denoisers.pretrained.recipe import (
    REQUIRED,
    Blueprint,
    Recipe,
    Rules,
    at,
    has_learned_variance,
    require_values,
)
from diffbench.denoisers.unet import ResBlock, Stage, UNet, UNetConfig

# ADM: our layers are in one flat list, the reference's are nested; its legacy attention has the heads outermost.

_ADM = {
    "image_size": REQUIRED,
    "in_channels": REQUIRED,
    "model_channels": REQUIRED,
    "out_channels": REQUIRED,
    "num_res_blocks": REQUIRED,
    "attention_resolutions": REQUIRED,
    "dropout": 0,
    "channel_mult": (1, 2, 4, 8),
    "conv_resample": True,
    "dims": 2,
    "num_classes": None,
    "use_checkpoint": False,
    "use_fp16": False,
    "num_heads": 1,
    "num_head_channels": -1,
    "num_heads_upsample": -1,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "use_new_attention_order": False,
}
_ADM_LEAVES = [
    (r"\.norm1\.", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.condition\.", ".emb_layers.1."),
    (r"\.norm2\.", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.skip\.", ".skip_connection."),
    (r"\.proj\.", ".proj_out."),
]


def _adm_blueprint(arguments: dict[str, Any]) -> Blueprint:
    require_values("adm", arguments, dims=2)
    head_channels, heads_up = arguments["num_head_channels"], arguments["num_heads_upsample"]
    side, factors = arguments["image_size"], [2**level for level in range(len(arguments["channel_mult"]))]
    config = UNetConfig(
        model_channels=arguments["model_channels"],
        channel_mult=list(arguments["channel_mult"]),
        num_res_blocks=arguments["num_res_blocks"],
        # Downsampling factors in the reference, resolutions here.
        attention_resolutions=[side // factor for factor in factors if factor in arguments["attention_resolutions"]],
        num_heads=arguments["num_heads"],
        num_head_channels=None if head_channels == -1 else head_channels,
        dropout=arguments["dropout"],
        use_scale_shift_norm=arguments["use_scale_shift_norm"],
        resblock_updown=arguments["resblock_updown"],
        conv_resample=arguments["conv_resample"],
        num_heads_upsample=None if heads_up == -1 else heads_up,
    )
    shape = {
        "image_size": side,
        "channels": arguments["in_channels"],
        "num_classes": arguments["num_classes"] or 0,
        "null_class": False,
        "learn_sigma": has_learned_variance("adm", arguments["in_channels"], arguments["out_channels"]),
    }
    return Blueprint("unet", config, shape)


def _adm_rules(net: UNet) -> Rules:
    places = {"stem": "input_blocks.0.0", "condition.time": "time_embed", "condition.label": "label_emb"}
    places |= {"out": "out.2", "out_norm": "out.0"}  # in this order: the second makes names that the first would match
    places |= {
        "middle.0.res": "middle_block.0",
        "middle.0.attention": "middle_block.1",
        "middle.1.res": "middle_block.2",
    }
    for i, layer in enumerate(net.encoder):
        if isinstance(layer, Stage):
            places |= {
                f"encoder.{i}.res": f"input_blocks.{i + 1}.0",
                f"encoder.{i}.attention": f"input_blocks.{i + 1}.1",
            }
        else:
            block = isinstance(layer, ResBlock)
            places[f"encoder.{i}" if block else f"encoder.{i}.conv"] = f"input_blocks.{i + 1}.0" + (
                "" if block else ".op"
            )
    number, slot = -1, 0
    for i, layer in enumerate(net.decoder):
        if isinstance(layer, Stage):
            number, slot = number + 1, 1 if layer.attention is None else 2
            places |= {
                f"decoder.{i}.res": f"output_blocks.{number}.0",
                f"decoder.{i}.attention": f"output_blocks.{number}.1",
            }
        else:
            places[f"decoder.{i}"] = f"output_blocks.{number}.{slot}"
    return at(places) + _ADM_LEAVES


def _adm_shape(name: str, ours: Tensor, _arguments: dict[str, Any]) -> tuple[int, ...]:
    """Return the reference's shape; its 1x1 convolutions in attention are one-dimensional."""
    return tuple(ours.shape[:3] if name.endswith(("qkv.weight", "proj.weight")) else ours.shape)


def _adm_arrange(name: str, theirs: Tensor, net: UNet, arguments: dict[str, Any]) -> Tensor:
    if arguments["use_new_attention_order"] or ".qkv." not in name:
        return theirs
    attention = net.get_submodule(name.split(".qkv.")[0])
    assert isinstance(attention, PixelAttention)
    return theirs.unflatten(0, (attention.heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def _adm_published(
    size: int, width: int, blocks: int, multipliers: list[float], num_classes: int | None = 1000, **flags: Any
) -> dict[str, Any]:
    return {
        "image_size": size,
        "in_channels": 3,
        "model_channels": width,
        "out_channels": 6,
        "num_res_blocks": blocks,
        "attention_resolutions": [size // 32, size // 16, size // 8],
        "channel_mult": multipliers,
        "num_classes": num_classes,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
    } | flags


_NEW: dict[str, Any] = {"num_head_channels": 64, "use_new_attention_order": True, "dropout": 0.1}
ADM = Recipe(
    UNet,
    "input_blocks.0.0.weight",
    _ADM,
    {
        "ADM-64": _adm_published(64, 192, 3, [1, 2, 3, 4], **_NEW),
        "ADM-128": _adm_published(128, 256, 2, [1, 1, 2, 3, 4], num_heads=4),
        "ADM-256": _adm_published(256, 256, 2, [1, 1, 2, 2, 4, 4], num_head_channels=64),
        "ADM-256-uncond": _adm_published(256, 256, 2, [1, 1, 2, 2, 4, 4], None, num_head_channels=64),
        "ADM-512": _adm_published(512, 256, 2, [0.5, 1, 1, 2, 2, 4, 4], num_head_channels=64),
    },
    _adm_blueprint,
    _adm_rules,
    frozenset({"in_channels", "out_channels", "num_classes", "dropout"}),
    (("image_size",), ("num_heads", "num_head_channels"), ("use_new_attention_order",)),
    shape=_adm_shape,
    arrange=_adm_arrange,
)


# DDPM++: EDM's SongUNet names its blocks by resolution; in its qkv, the index over q, k and v varies fastest.

_SONG = {
    "img_resolution": REQUIRED,
    "in_channels": REQUIRED,
    "out_channels": REQUIRED,
    "label_dim": 0,
    "augment_dim": 0,
    "model_channels": 128,
    "channel_mult": [1, 2, 2, 2],
    "channel_mult_emb": 4,
    "num_blocks": 4,
    "attn_resolutions": [16],
    "dropout": 0.10,
    "label_dropout": 0,
    "embedding_type": "positional",
    "channel_mult_noise": 1,
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": [1, 1],
}
_SONG_LEAVES = [
    (r"\.norm1\.", ".norm0."),
    (r"\.conv1\.", ".conv0."),
    (r"\.condition\.", ".affine."),
    (r"\.norm2\.", ".norm1."),
    (r"\.conv2\.", ".conv1."),
    (r"\.attention\.norm\.", ".norm2."),
    (r"\.attention\.", "."),
]


def _song_blueprint(arguments: dict[str, Any]) -> Blueprint:
    standard = {"encoder_type": "standard", "decoder_type": "standard", "resample_filter": [1, 1]}
    require_values("ddpmpp", arguments, embedding_type="positional", channel_mult_noise=1, **standard)
    sides = [arguments["img_resolution"] >> level for level in range(len(arguments["channel_mult"]))]
    config = DDPMppConfig(
        model_channels=arguments["model_channels"],
        channel_mult=list(arguments["channel_mult"]),
        num_blocks=arguments["num_blocks"],
        attention_resolutions=[side for side in sides if side in arguments["attn_resolutions"]],
        dropout=arguments["dropout"],
        augment_dim=arguments["augment_dim"] or None,
        embedding_mult=arguments["channel_mult_emb"],
    )
    shape = {
        "image_size": arguments["img_resolution"],
        "channels": arguments["in_channels"],
        "num_classes": arguments["label_dim"],
        "null_class": arguments["label_dropout"] > 0,
        "learn_sigma": has_learned_variance("ddpmpp", arguments["in_channels"], arguments["out_channels"]),
    }
    return Blueprint("ddpmpp", config, shape)


def _song_places(net: DDPMpp) -> dict[str, str]:
    """Map our blocks, in order, to the reference's names, which consist of resolution and number."""
    side = net.side
    places, name, number = {}, "", 0
    for half, blocks in {"enc": net.encoder, "dec": net.decoder}.items():
        for i, block in enumerate(blocks):
            assert isinstance(block, Block)
            if block.direction is not None:
                side = side // 2 if block.direction == "down" else side * 2
                name, number = block.direction, 0
            elif half == "dec" and not block.joins:
                name, number = f"in{0 if i == 0 else 1}", 0
            else:
                name, number = f"block{number}", number + 1
            places[f"{half}oder.{i}"] = f"{half}.{side}x{side}_{name}"
    return places


def _song_rules(net: DDPMpp) -> Rules:
    side = f"{net.side}x{net.side}"
    places = {"stem": f"enc.{side}_conv", "out_norm": f"dec.{side}_aux_norm", "out": f"dec.{side}_aux_conv"}
    places |= {"embedding.label": "map_label", "embedding.augment": "map_augment"}
    places |= {"embedding.layer1": "map_layer0", "embedding.layer2": "map_layer1"} | _song_places(net)
    return at(places) + _SONG_LEAVES


def _song_buffers(net: DDPMpp) -> dict[str, Tensor]:
    """Return the filters that the reference's resampling layers save as buffers: the mean of 2x2 pixels."""
    places, box = _song_places(net), torch.full((1, 1, 2, 2), 0.25)
    resampled = [place for place in places.values() if place.endswith(("_down", "_up"))]
    return {f"{place}.{layer}.resample_filter": box for place in resampled for layer in ("conv0", "skip")}


def _song_arrange(name: str, theirs: Tensor, _net: nn.Module, _arguments: dict[str, Any]) -> Tensor:
    return theirs.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1) if ".qkv." in name else theirs


_RGB = {"in_channels": 3, "out_channels": 3}
_CIFAR10 = _RGB | {"img_resolution": 32, "channel_mult": [2, 2, 2], "augment_dim": 9}
DDPMPP = Recipe(
    DDPMpp,
    "map_layer0.weight",
    _SONG,
    {
        "DDPM++-CIFAR10": _CIFAR10,
        "DDPM++-CIFAR10-cond": _CIFAR10 | {"label_dim": 10},
        "DDPM++-FFHQ64": _RGB | {"img_resolution": 64, "augment_dim": 9},
    },
    _song_blueprint,
    _song_rules,
    frozenset({"in_channels", "out_channels", "label_dim", "label_dropout", "augment_dim", "dropout"}),
    arrange=_song_arrange,
    buffers=_song_buffers,
    buffers_optional=True,
)
