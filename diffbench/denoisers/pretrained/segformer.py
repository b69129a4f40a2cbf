"""Conversion of the published SegFormer, encoder and decoder, from any of three naming schemes of its weights.

Based on facts about NVlabs/SegFormer and huggingface/transformers; uses none of their code.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffbench.denoisers.pretrained.recipe import check_values
from diffbench.denoisers.segformer import SegFormer, SegFormerConfig

# transformers' names and defaults, but for norm_eps, which is ours: 1e-5 in transformers, 1e-6 in NVlabs' code.
_DEFAULTS: dict[str, Any] = {
    "num_channels": 3,
    "num_encoder_blocks": 4,
    "depths": [2, 2, 2, 2],
    "sr_ratios": [8, 4, 2, 1],
    "hidden_sizes": [32, 64, 160, 256],
    "patch_sizes": [7, 3, 3, 3],
    "strides": [4, 2, 2, 2],
    "num_attention_heads": [1, 2, 5, 8],
    "mlp_ratios": [4, 4, 4, 4],
    "hidden_act": "gelu",
    "decoder_hidden_size": 256,
    "num_labels": 150,
    "norm_eps": None,
}


def _stage(rest: str) -> Any:
    """Return a replacement that lowers the stage by 1: NVlabs counts stages from 1."""
    return lambda match: f"stages.{int(match[1]) - 1}.{rest}."


_RULES: list[tuple[str, Any]] = [
    (r"^(backbone|segformer)\.", ""),
    (r"^(encoder|decode_head)\.", ""),
    (r"^patch_embed(\d+)\.", _stage("patch_embeddings")),
    (r"^block(\d+)\.", _stage("blocks")),
    (r"^norm(\d+)\.", _stage("layer_norm")),
    (r"^linear_c(\d+)\.", lambda match: f"project.{int(match[1]) - 1}."),
    (r"^patch_embeddings\.(\d+)\.", r"stages.\1.patch_embeddings."),
    (r"^block\.(\d+)\.", r"stages.\1.blocks."),
    (r"^layer_norm\.(\d+)\.", r"stages.\1.layer_norm."),
    (r"^(linear_c|linear_projections)\.(\d+)\.", r"project.\2."),
    (r"^(project\.\d+)\.proj\.", r"\1."),
    (r"\.patch_embeddings\.proj\.", ".patch."),
    (r"\.patch_embeddings\.(layer_norm|norm)\.", ".patch_norm."),
    (r"\.(layer_norm_1|layernorm_before)\.", ".norm1."),
    (r"\.(layer_norm_2|layernorm_after)\.", ".norm2."),
    (r"\.(attn|attention|attention\.self)\.(query|q_proj|q)\.", ".q."),
    (r"\.(attention|attention\.self)\.(key|k_proj)\.", ".k."),
    (r"\.(attention|attention\.self)\.(value|v_proj)\.", ".v."),
    (r"\.attn\.kv\.", ".kv."),
    (r"\.(attn\.sr|attention\.self\.sr|attention\.sequence_reduction\.sequence_reduction)\.", ".reduce."),
    (r"\.(attn\.norm|attention\.self\.layer_norm|attention\.sequence_reduction\.layer_norm)\.", ".reduce_norm."),
    (r"\.(attn\.proj|attention\.output\.dense|attention\.o_proj)\.", ".proj."),
    (r"\.mlp\.(dense|fc)([12])\.", r".fc\2."),
    (r"\.mlp\.dwconv\.dwconv\.", ".depthwise."),
    (r"^(stages\.\d+)\.layer_norm\.", r"\1.norm."),
    (r"^(linear_fuse\.bn|batch_norm)\.", "norm."),
    (r"^linear_fuse\.(conv\.)?", "fuse."),
    (r"^(classifier|linear_pred)\.", "final."),
]
UNUSED = re.compile(r"num_batches_tracked$|^(decode_head\.)?conv_seg\.")
"""Tensors that affect no output: a counter, and a layer of NVlabs' head that is never called."""


def read(arguments: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> SegFormer:
    """Build our network, unconditional and with SegFormer's own head, and load published weights.

    Args:
        arguments: arguments of transformers' SegformerConfig; missing ones take its defaults.
        state_dict: weights under the names of transformers 4 or 5, or NVlabs'.

    Returns:
        A float32 network in eval mode; its forward(x, t, y) ignores t and y, and `features(x)` gives the stages' maps.

    Raises:
        ValueError: if an argument or a key is unknown or missing, or a shape differs; the message names it.
    """
    for name in arguments:
        if name not in _DEFAULTS:
            raise ValueError(f"segformer: unknown argument {name}; known: {', '.join(_DEFAULTS)}")
    a = {**_DEFAULTS, **arguments}
    if a["hidden_act"] != "gelu":
        raise ValueError(f"segformer: hidden_act={a['hidden_act']!r} has no counterpart here, only 'gelu'")
    eps = 1e-6 if any(re.match(r"(backbone\.)?patch_embed1\.", key) for key in state_dict) else 1e-5
    same = ("hidden_sizes", "depths", "sr_ratios", "mlp_ratios", "strides", "patch_sizes")
    lists: dict[str, Any] = {key: list(a[key][: a["num_encoder_blocks"]]) for key in same}
    config = SegFormerConfig(
        **lists,
        num_heads=list(a["num_attention_heads"][: a["num_encoder_blocks"]]),
        decoder_hidden_size=a["decoder_hidden_size"],
        conditioning="none",
        head="logits",
        input_skip=False,
        norm_eps=eps if a["norm_eps"] is None else a["norm_eps"],
    )
    with torch.random.fork_rng(devices=[]):
        net = SegFormer(config, 32, a["num_channels"], a["num_labels"])
    wanted = net.state_dict()
    counter = {"norm.num_batches_tracked": wanted["norm.num_batches_tracked"]}
    found = counter | _joined({_renamed(key): value for key, value in state_dict.items() if not UNUSED.search(key)})
    for name in sorted(found | wanted):
        if name not in found or name not in wanted:
            raise ValueError(f"segformer: {name} (our name) is {'missing' if name in wanted else 'unexpected'}")
        if found[name].shape != wanted[name].shape:
            actual, expected = list(found[name].shape), list(wanted[name].shape)
            raise ValueError(f"segformer: {name} has shape {actual}, but these arguments make {expected}")
        if wanted[name].is_floating_point():
            check_values("segformer", name, found[name])
    net.load_state_dict(found)
    return net.eval()


def _renamed(key: str) -> str:
    for pattern, replacement in _RULES:
        key = re.sub(pattern, replacement, key)
    return key


def _joined(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join keys and values into one layer, and turn 1x1 convolutions into linear layers."""
    for key in [name for name in weights if re.search(r"\.k\.(weight|bias)$", name)]:
        value = key.replace(".k.", ".v.")
        if value in weights:
            weights[key.replace(".k.", ".kv.")] = torch.cat([weights.pop(key), weights.pop(value)])
    return {name: v.flatten(1) if name in ("fuse.weight", "final.weight") else v for name, v in weights.items()}
