"""The constructor arguments of a published network, read from the names and shapes of its weights.

What they do not say (the heads of DiT and ADM, the side of ADM's image) is known for the published sizes.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


class Shapes(dict[str, tuple[int, ...]]):
    """Shapes of weights by name, which knows what it was asked for last."""

    asked: str = ""

    def __getitem__(self, key: str) -> tuple[int, ...]:
        self.asked = key
        return super().__getitem__(key)


ANCHORS = {
    "dit": "x_embedder.proj.weight",
    "sit": "x_embedder.proj.weight",
    "diffit": "x_embedder.proj.weight",
    "adm": "input_blocks.0.0.weight",
    "ddpmpp": "map_layer0.weight",
}
"""A name that each source's weights hold; what stands before it, as in "module.", stands before all."""

# Width -> heads of DiT (Table 1).
_DIT_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
# Base width, blocks a level, multipliers -> what the flags of ADM's releases say besides.
_NEW: dict[str, Any] = {"num_head_channels": 64, "use_new_attention_order": True}
_OLD: dict[str, Any] = {"num_head_channels": 64, "use_new_attention_order": False}
_ADM: dict[tuple[int, int, tuple[float, ...]], dict[str, Any]] = {
    (192, 3, (1, 2, 3, 4)): {"image_size": 64, "dropout": 0.1, **_NEW},
    (256, 2, (1, 1, 2, 3, 4)): {"image_size": 128, "num_heads": 4, "use_new_attention_order": False},
    (256, 2, (1, 1, 2, 2, 4, 4)): {"image_size": 256, **_OLD},
    (256, 2, (0.5, 1, 1, 2, 2, 4, 4)): {"image_size": 512, **_OLD},
}


def unwrapped(source: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without what wrappers put before their names, as in "module." or "model.".

    Raises:
        ValueError: if they are not of this source, naming which they look like.
    """
    anchor = ANCHORS[source]
    found = [key for key in state_dict if key == anchor or key.endswith(f".{anchor}")]
    if len(found) == 1:
        prefix = found[0].removesuffix(anchor)
        return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    if found:
        raise ValueError(f"{source}: there are {len(found)} networks here: {', '.join(found)}")
    others = [name for name, key in ANCHORS.items() if any(k.endswith(key) for k in state_dict)]
    near = f"; these weights look like {others[0]}" if others else ""
    raise ValueError(f"{source}: no {anchor} among {len(state_dict)} names{near}")


def infer(source: str, state_dict: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor arguments, under the reference's names, of a network with these weights.

    Args:
        source: "dit", "sit", "diffit", "adm" or "ddpmpp".
        state_dict: weights under the reference's own names.
        given: arguments that the caller knows; they must agree with the weights.

    Raises:
        ValueError: if the weights do not say an argument that is not given, naming it, or say another value; or if
            they lack what every network of the source has.
    """
    shapes = Shapes({key: tuple(value.shape) for key, value in state_dict.items()})
    try:
        found = _SOURCES[source](shapes, dict(given))
    except KeyError as e:
        raise ValueError(f"{source}: no {e.args[0]} among {len(shapes)} names") from None
    except (IndexError, ZeroDivisionError):
        raise ValueError(f"{source}: {shapes.asked} has shape {shapes[shapes.asked]}, as in no such network") from None
    for name, value in given.items():
        said = found.get(name, value)
        if (list(said) if isinstance(said, tuple) else said) != (list(value) if isinstance(value, tuple) else value):
            raise ValueError(f"arguments.{name}: {value} is given, the weights of {source} say {said}")
    return found | dict(given)


def _transformer(source: str) -> Callable[[Shapes, dict[str, Any]], dict[str, Any]]:
    def arguments(shapes: Shapes, given: dict[str, Any]) -> dict[str, Any]:
        hidden, channels, patch = (shapes["x_embedder.proj.weight"][i] for i in range(3))
        tokens = shapes["pos_embed"][1]
        if math.isqrt(tokens) ** 2 != tokens:
            raise ValueError(f"{source}: pos_embed has {tokens} tokens, which make no square")
        found = {
            "input_size": math.isqrt(tokens) * patch,
            "patch_size": patch,
            "in_channels": channels,
            "hidden_size": hidden,
            "depth": _count(shapes, r"blocks\.(\d+)\."),
            "mlp_ratio": shapes["blocks.0.mlp.fc1.weight"][0] / hidden,
            "learn_sigma": shapes["final_layer.linear.weight"][0] == 2 * patch * patch * channels,
            **_classes(source, shapes["y_embedder.embedding_table.weight"][0], given),
        }
        if source == "diffit":
            return found | {"num_heads": shapes["blocks.0.attn.relative_position_bias_table"][1]}
        if "num_heads" in given:
            return found
        if hidden not in _DIT_HEADS:
            raise ValueError(
                f"arguments.num_heads: the weights do not say it, and {hidden} is no published width"
                f" ({', '.join(map(str, _DIT_HEADS))}); give it as arguments.num_heads=8"
            )
        return found | {"num_heads": _DIT_HEADS[hidden]}

    return arguments


def _classes(source: str, rows: int, given: dict[str, Any]) -> dict[str, Any]:
    """Classes and label dropout of a table of labels: its last row is the null class unless told otherwise."""
    dropped = given.get("class_dropout_prob", 0.1)
    classes = given.get("num_classes", rows - (dropped > 0))
    if classes not in (rows, rows - 1):
        raise ValueError(f"arguments.num_classes: {classes} is given, the weights of {source} hold {rows} labels")
    null = classes == rows - 1
    return {"num_classes": classes, "class_dropout_prob": (dropped or 0.1) if null else 0.0}


def _adm(shapes: Shapes, given: dict[str, Any]) -> dict[str, Any]:
    model = shapes["time_embed.0.weight"][1]
    ups = [key for key in shapes if re.match(r"output_blocks\.\d+\.[12]\.(conv\.weight|in_layers\.0\.weight)", key)]
    downs = [key for key in shapes if re.match(r"input_blocks\.\d+\.0\.op\.weight", key)]
    inputs = {int(m[1]) for key in shapes if (m := re.match(r"input_blocks\.(\d+)\.", key))}
    outputs = _count(shapes, r"output_blocks\.(\d+)\.")
    absent = [i for i in range(max(inputs)) if i not in inputs]  # resampling without weights
    # A level of the decoder ends with the first upsampler; one of the encoder, with what has no weights.
    blocks = min(int(key.split(".")[1]) for key in ups) if ups else absent[0] - 1 if absent else outputs - 1
    if outputs % (blocks + 1):
        raise ValueError(f"adm: {outputs} output blocks are no whole levels of {blocks + 1}")
    first = [1 + level * (blocks + 1) for level in range(outputs // (blocks + 1))]
    widths = [shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0] for i in first]
    mults = [width // model if width % model == 0 else width / model for width in widths]
    found = {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "model_channels": model,
        "out_channels": shapes["out.2.weight"][0],
        "num_res_blocks": blocks,
        "attention_resolutions": [2**n for n, i in enumerate(first) if f"input_blocks.{i}.1.qkv.weight" in shapes],
        "channel_mult": mults,
        "conv_resample": bool(ups or downs or len(first) == 1),
        "num_classes": shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None,
        "use_scale_shift_norm": shapes["input_blocks.1.0.emb_layers.1.weight"][0] == 2 * widths[0],
        "resblock_updown": any("in_layers" in key for key in ups),
    }
    known = _ADM.get((model, blocks, tuple(mults)), {})
    unsaid = [name for name in ("image_size", "use_new_attention_order") if name not in known | given]
    if not {"num_heads", "num_head_channels"} & set(known | given):
        unsaid.append("num_heads")
    if unsaid:
        raise ValueError(
            f"arguments.{unsaid[0]}: the weights do not say {', '.join(unsaid)}, and are of no published size;"
            f" give {' '.join(f'arguments.{name}=VALUE' for name in unsaid)}"
        )
    if "num_heads" in given:
        known = {name: value for name, value in known.items() if name != "num_head_channels"}
    return {name: value for name, value in known.items() if name not in given} | found


def _song(shapes: Shapes, _given: dict[str, Any]) -> dict[str, Any]:
    emb, noise = (shapes["map_layer0.weight"][i] for i in range(2))
    sides = sorted({int(m[1]) for key in shapes if (m := re.match(r"enc\.(\d+)x\1_block", key))}, reverse=True)
    if not sides:
        raise KeyError("enc.32x32_block0")
    stem, side = shapes[f"enc.{sides[0]}x{sides[0]}_conv.weight"], sides[0]
    return {
        "img_resolution": side,
        "in_channels": stem[1],
        "out_channels": shapes[f"dec.{side}x{side}_aux_conv.weight"][0],
        "label_dim": shapes.get("map_label.weight", (0, 0))[1],
        "augment_dim": shapes.get("map_augment.weight", (0, 0))[1],
        "model_channels": stem[0],
        "channel_mult": [shapes[f"enc.{s}x{s}_block0.conv1.weight"][0] // stem[0] for s in sides],
        "channel_mult_emb": emb // stem[0],
        "channel_mult_noise": noise // stem[0],
        "num_blocks": _count(shapes, rf"enc\.{side}x{side}_block(\d+)\."),
        "attn_resolutions": [s for s in sides if f"enc.{s}x{s}_block0.qkv.weight" in shapes],
        "embedding_type": "fourier" if "map_noise.freqs" in shapes else "positional",
        "encoder_type": "residual" if any("_aux_residual" in key for key in shapes) else "standard",
    }


def _count(shapes: Shapes, pattern: str) -> int:
    """One more than the largest number that the pattern finds in a name."""
    numbers = [int(m[1]) for key in shapes if (m := re.match(pattern, key))]
    if not numbers:
        raise KeyError(pattern.replace("\\", "").replace("(d+)", "0"))
    return 1 + max(numbers)


_SOURCES: dict[str, Callable[[Shapes, dict[str, Any]], dict[str, Any]]] = {
    "dit": _transformer("dit"),
    "sit": _transformer("sit"),
    "diffit": _transformer("diffit"),
    "adm": _adm,
    "ddpmpp": _song,
}
