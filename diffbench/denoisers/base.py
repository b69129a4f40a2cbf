"""The interface of all denoisers, the record of a published network, and checks of configs and shapes."""

import functools
import inspect
from dataclasses import dataclass, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from diffbench.denoisers.flops import Cost
from diffbench.denoisers.layers import LabelTable


class Denoiser(nn.Module):
    """A network (x, t, y) -> output; only dropout is random, and it knows no schedule, loss or data.

    A subclass takes its config, `image_size` (the side of a square input, or (height, width) where supported) and the
    arguments below. It raises ValueError if the config does not fit the image size. Its `forward` keeps no state, since
    batches may be computed concurrently, and is random only if the config's `dropout` or `drop_path` is above 0.

    Args:
        channels: input channels C.
        num_classes: number of classes, labelled 0..num_classes-1; 0 for an unconditional network.
        null_class: whether label `num_classes` means "no class".
        learn_sigma: whether the output has C more channels for a learned variance.
    """

    shards_blocks = True
    """Whether FSDP may shard each block separately: only the block's own forward uses its parameters."""

    built_from: dict[str, Any]
    """The constructor arguments, including defaults."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Wrap the constructor so that a network records its arguments in `built_from`."""
        super().__init_subclass__(**options)
        init = cls.__init__
        signature = inspect.signature(init)

        @functools.wraps(init)
        def recorded(self: Denoiser, *args: Any, **kwargs: Any) -> None:
            # Record only once, in the outermost constructor that takes an image size.
            if "built_from" not in vars(self) and "image_size" in signature.parameters:
                try:
                    bound = signature.bind_partial(self, *args, **kwargs)
                except TypeError as e:
                    expected = ", ".join(str(p) for p in list(signature.parameters.values())[1:])
                    raise TypeError(f"{cls.__name__}: {e}; call {cls.__name__}({expected})") from None
                bound.apply_defaults()
                names = bound.arguments
                vars(self)["built_from"] = {name: names[name] for name in list(names)[1:]}
                if is_dataclass(config := names.get("config")):
                    check_choices(config)
            init(self, *args, **kwargs)

        cls.__init__ = recorded  # type: ignore[method-assign]

    @property
    def shape(self) -> tuple[int, int, int]:
        """The input shape (C, H, W) that the network was built for."""
        size = self.built_from["image_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return self.channels, height, width

    def __init__(self, channels: int, num_classes: int, null_class: bool, learn_sigma: bool) -> None:
        super().__init__()
        self.channels, self.num_classes, self.null_class = channels, num_classes, null_class
        self.out_channels = 2 * channels if learn_sigma else channels

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the network on noisy images or latents.

        Args:
            x: (B, C, H, W) noisy input.
            t: (B,) times in the units of the diffusion process.
            y: (B,) int64 labels, `num_classes` for "no class"; or (B, num_classes + null_class) float weights that mix
                rows of the label table (a one-hot row equals that label); None for no class.

        Returns:
            (B, C, H, W), or (B, 2C, H, W) with a learned variance.

        Raises:
            ValueError: if the image size is unsupported, labels are missing, or label weights have the wrong shape.
        """
        raise NotImplementedError

    def label_rows(self) -> Tensor | None:
        """Return the label table, (num_classes + null_class, D), or None if the network has none."""
        return next((module.weight for module in self.modules() if isinstance(module, LabelTable)), None)


@dataclass(frozen=True)
class Preset:
    """A published network."""

    config: Any
    shape: dict[str, Any]
    """The constructor arguments besides the config: image_size, channels, num_classes, ..."""
    source: str
    """Paper and table, with the parameter count and GMACs stated there."""
    cost: Cost
    """The exact cost for that input; a test counts it."""


def check_positive(config: Any, *names: str, section: str = "denoiser") -> None:
    """Raise ValueError unless each named field is a positive number, a non-empty list of them, or None."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, list) and not value:
            raise ValueError(f"{section}.{name}: must contain at least one number, got []")
        if any(number <= 0 for number in (value if isinstance(value, list) else [value]) if number is not None):
            raise ValueError(f"{section}.{name}: must be positive, got {value}")


def check_choices(config: Any, section: str = "denoiser") -> None:
    """Raise ValueError for the first Literal field whose value is neither one of its choices nor None."""
    for name, kind in get_type_hints(type(config)).items():
        choices = [c for part in (kind, *get_args(kind)) if get_origin(part) is Literal for c in get_args(part)]
        if choices and (value := getattr(config, name)) not in (*choices, None):
            raise ValueError(f"{section}.{name}: unknown value {value!r}; choose from {', '.join(map(str, choices))}")


def check_sizes(config: Any, *names: str, section: str = "denoiser") -> None:
    """Raise ValueError unless the named numbers are positive and dropout, time features and widths are valid."""
    check_positive(config, *names, section=section)
    if not 0 <= config.dropout < 1:
        raise ValueError(f"{section}.dropout: must lie in [0, 1), got {config.dropout}")
    if getattr(config, "fourier_scale", 16) != 16 and config.time_features != "fourier":
        raise ValueError(f"{section}.fourier_scale: belongs to {section}.time_features=fourier; else leave it at 16")
    base = getattr(config, "model_channels", 0)
    if base % 2 and config.time_features == "fourier":
        raise ValueError(f"{section}.model_channels: must be even with {section}.time_features=fourier, got {base}")
    for factor in getattr(config, "channel_mult", []):
        if not float(base * factor).is_integer():
            raise ValueError(
                f"{section}.channel_mult: {factor} times {section}.model_channels={base} is not an integer"
            )


def check_divides(key: str, divisor: int, number: int, what: str, section: str = "denoiser") -> None:
    """Raise ValueError naming both numbers unless `divisor`, the value of `key`, divides `number`.

    Args:
        key: config key, without its section.
        divisor: value of that key.
        number: number that it must divide.
        what: description of the number, appended to it; or, if it ends in "=", the key whose value the number is.
        section: section of the config.
    """
    if divisor < 1 or number % divisor:
        shown = f"{what}{number}" if what.endswith("=") else f"{number}, {what}"
        raise ValueError(f"{section}.{key}: {divisor} does not divide {shown}")


def check_halves(key: str, levels: int, sides: tuple[int, ...], section: str = "denoiser") -> None:
    """Raise ValueError unless all sides can be halved between `levels` levels, one per entry of the list `key`."""
    factor = 2 ** (levels - 1)
    for side in sides:
        if side % factor:
            raise ValueError(f"{section}.{key}: {levels} levels need image sides divisible by {factor}, got {side}")


def unet_levels(
    config: Any, image_size: int | tuple[int, int], section: str = "denoiser"
) -> tuple[list[int], list[int], int]:
    """Return the width of each level of a U-Net, the resolutions with attention, and the longer side of the image.

    If `attention_resolutions` is None, attention is at resolution 16, if there is such a level.

    Raises:
        ValueError: if the image cannot be halved between all levels, no level has one of the attention resolutions,
            or TMSA is used with an image that is not square.
    """
    widths = [int(config.model_channels * factor) for factor in config.channel_mult]
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    check_halves("channel_mult", len(widths), sides, section)
    if getattr(config, "tmsa", False) and sides[0] != sides[1]:
        raise ValueError(f"{section}.tmsa: needs a square image, got {sides[0]}x{sides[1]}; set it to false")
    longer = max(sides)
    if config.attention_resolutions is None:
        return widths, [16], longer
    resolutions = [longer >> level for level in range(len(widths))]
    for side in config.attention_resolutions:
        if side not in resolutions:
            choices = ", ".join(map(str, resolutions))
            raise ValueError(f"{section}.attention_resolutions: no level has resolution {side}; choose from {choices}")
    return widths, config.attention_resolutions, longer


def check_shape(x: Tensor, channels: int, height: int, width: int) -> None:
    """Raise ValueError naming both shapes unless `x` is (B, channels, height, width)."""
    if x.shape[1:] != (channels, height, width):
        raise ValueError(f"this network takes images of {channels}x{height}x{width}, got {_shape_text(x)}")


def check_sides(x: Tensor, channels: int, divisor: int) -> None:
    """Raise ValueError unless `x` is (B, channels, H, W) and `divisor` divides H and W."""
    if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % divisor or x.shape[3] % divisor:
        raise ValueError(
            f"this network takes images with {channels} channels and sides divisible by {divisor}, got {_shape_text(x)}"
        )


def check_output(out: Tensor, channels: int, like: Tensor) -> None:
    """Raise ValueError unless `out` is (B, channels, H, W), where `like` is the input (B, C, H, W)."""
    expected = like[:, :1].expand(-1, channels, -1, -1)
    if out.shape != expected.shape:
        raise ValueError(
            f"denoiser: this network outputs {_shape_text(out)} where {_shape_text(expected)} is needed; choose another"
        )


def _shape_text(x: Tensor) -> str:
    return "x".join(map(str, x.shape[1:]))
