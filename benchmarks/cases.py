"""The networks that are measured, at which batch, and in which variants."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.settings import BenchConfig
from diffbench.config.kinds import RunConfig
from diffbench.config.layers import COMMAND_LINE, merge, parse_overrides
from diffbench.config.load import from_dict, from_layers, read_layers, to_dict
from diffbench.core.errors import UserError, suggest
from diffbench.denoisers import DENOISERS, PRESETS
from diffbench.denoisers.linear import mkl_holds_back

_LATENT = {"image_size": 32, "channels": 4, "num_classes": 1000, "learn_sigma": True}
OWN: dict[str, dict[str, Any]] = {
    # The size of DiT-S/2 for the other two, at the same input: about 6 GMACs each.
    "DiffiT-S/2": _LATENT | {"name": "diffit-latent", "hidden_size": 384, "depth": 12, "num_heads": 6},
    "ADM-S/32": _LATENT
    | {"name": "unet", "model_channels": 128, "channel_mult": [1, 2, 2], "num_res_blocks": 2}
    | {"attention_resolutions": [16, 8], "num_head_channels": 64},
}
"""Networks that no paper has: a registered denoiser, its keys, and its input."""

DIGITS = tuple(f"experiments/digits/{name}.yaml" for name in ("dit", "diffit", "diffit-latent", "unet", "ddpmpp"))
SHORT = ("DiT-S/2", "DiffiT-S/2", "ADM-S/32", *DIGITS)
LARGE = {"DiT-XL/2": 128, "DiffiT-XL/2": 128, "DDPM++-CIFAR10-cond": 512, "DiffiT-CIFAR10-H1": 512}
"""What a GPU is measured with, and its batch."""

ATTENTION = {"cpu": ("flash", "math"), "cuda": ("flash", "efficient", "cudnn", "math")}
"""Backends of scaled_dot_product_attention that a device has; the first that can takes a call by default."""

CONVOLUTIONAL = ("unet", "ddpmpp", "diffit")

TINY: dict[str, dict[str, Any]] = {
    "dit": {"hidden_size": 32, "depth": 2, "num_heads": 4},
    "diffit-latent": {"hidden_size": 32, "depth": 2, "num_heads": 4},
    "diffit": {"channels": [8, 16], "blocks": [1, 1], "num_heads": 2, "time_dim": 16, "norm_groups": 4},
    "unet": {"model_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "num_heads": 2, "norm_groups": 4}
    | {"num_head_channels": None},
    "ddpmpp": {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1},
    "segformer": {"hidden_sizes": [8, 8, 16], "depths": [1, 1, 1], "num_heads": [1, 1, 2], "decoder_hidden_size": 8}
    | {"time_dim": 16},
    "uvit": {"hidden_size": 32, "depth": 2, "num_heads": 4},
}


@dataclass(frozen=True)
class Variant:
    """A way to run a network: an experiment's keys, and one of our own."""

    name: str = "default"
    overrides: tuple[str, ...] = ()
    attention: str | None = None
    """Of `ATTENTION`, for the whole batch at once; "whole" leaves the backend to torch, None parts and backend."""
    linear_by_mkl: bool = False
    """Whether linear layers stay with MKL where oneDNN is faster."""


def variant(name: str, words: str) -> Variant:
    """A variant of key=value words.

    Raises:
        UserError: for a value of bench.attention that there is not.
    """
    own = [word for word in words.split() if word.startswith("bench.")]
    known = {*ATTENTION["cpu"], *ATTENTION["cuda"], "whole"}
    asked = parse_overrides(own).get("bench", {})
    for key, value in asked.items():
        if key != "attention" or value not in known:
            raise UserError(
                f"variants: bench.{key}={value} is unknown; choose from bench.attention={'|'.join(sorted(known))}"
            )
    return Variant(name, tuple(word for word in words.split() if word not in own), **asked)


def variants(config: BenchConfig, model: str, base: RunConfig, device: str) -> list[Variant]:
    """The default and, where they are asked for, the others.

    Args:
        config: what is measured.
        model: the network's name.
        base: its experiment.
        device: cpu or cuda.
    """
    denoiser, long = base.denoiser.name, config.full or config.gpu
    default = Variant()
    varied = (
        "DiT-S/2",
        "ADM-S/32",
        DIGITS[0],
        *(SHORT if config.full else ()),
        *(LARGE if config.gpu or device == "cuda" else ()),
    )
    if "variants" not in config.chosen_parts or model not in (config.models or varied):
        return [default]
    found = [variant(*(part.strip() for part in said.split(":", 1))) for said in config.variants or ()]
    whole, blocks = (Variant(n, (f"trainer.compile={n.split()[1]}",)) for n in ("compiled model", "compiled block"))
    if denoiser in CONVOLUTIONAL:
        table = [Variant("channels-first", ("trainer.channels_last=false",))]
        table += [blocks, whole] if config.full else [whole] if config.gpu else []
    else:
        # In the short form the attention of the small one stands for that of the large one.
        brief = not long and config.models is None and model == "DiT-S/2"
        backends = () if brief else ATTENTION[device] if long else ("math",)
        table = [Variant(f"attention {name}", (), name) for name in backends]
        table += [blocks, whole] if config.full else [blocks] if config.gpu else []
    other = "32-true" if precision(config, device) == "bf16-mixed" else "bf16-mixed"
    if config.full or model == "DiT-S/2" or (denoiser in CONVOLUTIONAL and config.gpu):
        table.append(Variant("fp32" if other == "32-true" else "bf16", (f"trainer.precision={other}",)))
    plain = device == "cpu" and precision(config, device) == "32-true" and mkl_holds_back()
    if plain and denoiser not in CONVOLUTIONAL and (config.full or model == "DiT-S/2"):
        table.append(Variant("linear by MKL", linear_by_mkl=True))
    if device == "cuda" and denoiser in CONVOLUTIONAL:
        table.append(Variant("tf32", ("trainer.precision=32-true", "trainer.tf32=true")))
    if config.full and denoiser == "diffit":
        table.append(Variant("attention whole", (), "whole"))
    return [default, *found, *table]


def precision(config: BenchConfig, device: str) -> str:
    """What products are computed in unless a variant says otherwise."""
    return config.precision or ("bf16-mixed" if device == "cuda" else "32-true")


def models(config: BenchConfig) -> list[str]:
    """The networks to measure.

    Raises:
        UserError: if one is unknown.
    """
    if config.models is None:
        if config.gpu:
            return list(LARGE)
        return [*dict.fromkeys([*SHORT, *PRESETS])] if config.full else list(SHORT)
    known = [*OWN, *PRESETS]
    for name in config.models:
        if name not in known and not Path(name).suffix == ".yaml":
            raise UserError(f"models: unknown network {name!r}; choose from {', '.join(known)}{suggest(name, known)}")
    return config.models


def run_config(config: BenchConfig, model: str, device: str, overrides: tuple[str, ...] = ()) -> RunConfig:
    """The experiment that a network is measured as, on images that need no data set.

    Raises:
        UserError: if an override is none.
    """
    if Path(model).suffix == ".yaml":
        found = from_layers(read_layers(model))
        if not isinstance(found, RunConfig) or found.autoencoder is not None:
            raise UserError(f"models: {model} is no denoiser's experiment on pictures; name one, or a preset")
        base = to_dict(found)
        if found.data.name == "digits":
            base["data"] = {"name": "none", "channels": 1, "image_size": found.data.size, "num_classes": 10}
    else:
        base = _published(model)
    own = {"trainer": {"accelerator": "gpu" if device == "cuda" else "cpu", "precision": precision(config, device)}}
    if config.batch or config.tiny:
        own["trainer"]["batch_size"] = config.batch or 4  # type: ignore[assignment]
    elif Path(model).suffix != ".yaml":
        own["trainer"]["batch_size"] = LARGE.get(model, 128) if device == "cuda" else 8  # type: ignore[assignment]
    if config.tiny:
        base["denoiser"] |= TINY[base["denoiser"]["name"]]
        if base["data"]["name"] == "none":
            base["data"]["image_size"] = 16 if base["data"]["image_size"] > 8 else 8
    changed = from_layers([(model, merge(base, own)), (COMMAND_LINE, parse_overrides(overrides))])
    assert isinstance(changed, RunConfig)
    return changed


def _published(model: str) -> dict[str, Any]:
    """A preset, or one of `OWN`, under the process that its source trains it under."""
    if model in OWN:
        shape = {key: OWN[model][key] for key in _LATENT}
        denoiser = {key: value for key, value in OWN[model].items() if key not in _LATENT}
    else:
        shape = PRESETS[model].shape
        name = next(name for name, entry in DENOISERS.items() if model in entry.presets)
        denoiser = to_plain(name, model)
    classes = shape.get("num_classes", 0)
    dropped = 0.1 if classes and shape.get("null_class", True) else 0.0
    learned = {"name": "vp", "variance": "learned_range", "loss": "hybrid"}
    plain = {"name": "vp" if model.startswith(("U-ViT", "MiT")) else "edm"}
    found = from_dict(
        {
            "data": {"name": "none", "num_classes": classes} | {k: shape[k] for k in ("image_size", "channels")},
            "denoiser": denoiser,
            "process": learned if shape.get("learn_sigma") else plain,
            "optimizer": {"lr": 1e-4},
            "trainer": {"label_dropout": dropped},
            "sample": {"steps": "250" if shape.get("learn_sigma") else "18"},
        },
        model,
    )
    return to_dict(found)


def to_plain(name: str, preset: str) -> dict[str, Any]:
    """A preset's keys, plain."""
    return {"name": name} | vars(PRESETS[preset].config)
