"""The interface of every denoiser, a published size of one, and the checks of a config that end in one line."""

import functools
import inspect
from dataclasses import dataclass, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from diffbench.denoisers.flops import Cost
from diffbench.denoisers.layers import LabelTable


class Denoiser(nn.Module):
    """A network (x, t, y) -> output; it draws no random numbers but dropout and knows no schedule, loss or data.

    A subclass is built from its config, `image_size` (the side of the input, or height and width where it says so)
    and these arguments, and raises ValueError where config and image do not fit.

    Args:
        channels: C of the input.
        num_classes: classes 0..num_classes-1; 0 for none.
        null_class: whether label `num_classes` means "no class".
        learn_sigma: whether the output carries C more channels for a learned variance.
    """

    shards_blocks = True
    """Whether FSDP may shard each block by itself: nothing uses a block's parameters but its own forward."""

    built_from: dict[str, Any]
    """The arguments that it was made with."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Makes a network keep the arguments that it is made with."""
        super().__init_subclass__(**options)
        init = cls.__init__
        signature = inspect.signature(init)

        @functools.wraps(init)
        def recorded(self: Denoiser, *args: Any, **given: Any) -> None:
            # Not again in a base class, nor in a subclass that chooses the image's size itself.
            if "built_from" not in vars(self) and "image_size" in signature.parameters:
                try:
                    bound = signature.bind_partial(self, *args, **given)
                except TypeError as e:
                    wanted = ", ".join(str(p) for p in list(signature.parameters.values())[1:])
                    raise TypeError(f"{cls.__name__}: {e}; call {cls.__name__}({wanted})") from None
                bound.apply_defaults()
                names = bound.arguments
                vars(self)["built_from"] = {name: names[name] for name in list(names)[1:]}
                if is_dataclass(config := names.get("config")):
                    check_choices(config)
            init(self, *args, **given)

        cls.__init__ = recorded  # type: ignore[method-assign]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the input that it was made for."""
        size = self.built_from["image_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return self.channels, height, width

    def __init__(self, channels: int, num_classes: int, null_class: bool, learn_sigma: bool) -> None:
        super().__init__()
        self.channels, self.num_classes, self.null_class = channels, num_classes, null_class
        self.out_channels = 2 * channels if learn_sigma else channels

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict from a noisy image or latent.

        Args:
            x: (B, C, H, W) noisy input.
            t: (B,) time in the process's units.
            y: (B,) int64 labels, `num_classes` for "no class"; or (B, num_classes + null_class) float weights over the
                rows of the label table, a mixture of classes, of which a one-hot row is a label; None for no class.

        Returns:
            (B, C, H, W), or (B, 2C, H, W) with a learned variance.

        Raises:
            ValueError: if the image has a size that the network does not take, or labels are missing, or weights have
                another shape.
        """
        raise NotImplementedError

    def label_rows(self) -> Tensor | None:
        """Rows of the label table, (num_classes + null_class, D); None for a network without one."""
        return next((module.weight for module in self.modules() if isinstance(module, LabelTable)), None)


@dataclass(frozen=True)
class Preset:
    """A published network."""

    config: Any
    shape: dict[str, Any]
    """The input and output that it was made for: what its class is built from besides the config."""
    source: str
    """Paper and table, with the parameters and GMACs stated there."""
    cost: Cost
    """Its exact size at that input, which a test counts."""


def check_positive(config: Any, *names: str, section: str = "denoiser") -> None:
    """Raise ValueError unless each named number is above 0, and each named list holds only such numbers."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, list) and not value:
            raise ValueError(f"{section}.{name}: must hold at least one number, got []")
        if any(number <= 0 for number in (value if isinstance(value, list) else [value]) if number is not None):
            raise ValueError(f"{section}.{name}: must be positive, got {value}")


def check_choices(config: Any, section: str = "denoiser") -> None:
    """Raise ValueError for the first field whose value is not one of those that its type names."""
    for name, kind in get_type_hints(type(config)).items():
        choices = [c for part in (kind, *get_args(kind)) if get_origin(part) is Literal for c in get_args(part)]
        if choices and (value := getattr(config, name)) not in (*choices, None):
            raise ValueError(f"{section}.{name}: unknown value {value!r}; choose from {', '.join(map(str, choices))}")


def check_sizes(config: Any, *names: str, section: str = "denoiser") -> None:
    """Raise ValueError unless the named numbers are positive and a config's dropout and widths are possible."""
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
        key: of the config, without its section.
        divisor: its value.
        number: what it must divide.
        what: what the number is, written after it; or, ending in "=", the key whose value it is.
        section: of the config.
    """
    if divisor < 1 or number % divisor:
        shown = f"{what}{number}" if what.endswith("=") else f"{number}, {what}"
        raise ValueError(f"{section}.{key}: {divisor} does not divide {shown}")


def check_halves(key: str, levels: int, sides: tuple[int, ...], section: str = "denoiser") -> None:
    """Raise ValueError unless an image can be halved between as many levels as the list `key` has entries."""
    factor = 2 ** (levels - 1)
    for side in sides:
        if side % factor:
            raise ValueError(f"{section}.{key}: {levels} levels need an image whose sides {factor} divides, got {side}")


def unet_levels(
    config: Any, image_size: int | tuple[int, int], section: str = "denoiser"
) -> tuple[list[int], list[int], int]:
    """Width of each level of a U-Net, the resolutions with attention, and the resolution of the image, its longer side.

    Attention of null means 16, where the network has that.

    Raises:
        ValueError: if the levels do not halve the image, a resolution with attention occurs at none of them, or TMSA
            meets an image that is not square.
    """
    widths = [int(config.model_channels * factor) for factor in config.channel_mult]
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    check_halves("channel_mult", len(widths), sides, section)
    if getattr(config, "tmsa", False) and sides[0] != sides[1]:
        raise ValueError(f"{section}.tmsa: needs a square image, got {sides[0]}x{sides[1]}; leave it at false")
    longer = max(sides)
    if config.attention_resolutions is None:
        return widths, [16], longer
    there = [longer >> level for level in range(len(widths))]
    for side in config.attention_resolutions:
        if side not in there:
            choices = ", ".join(map(str, there))
            raise ValueError(
                f"{section}.attention_resolutions: {side} never occurs; the levels are {choices} pixels a side"
            )
    return widths, config.attention_resolutions, longer


def check_shape(x: Tensor, channels: int, height: int, width: int) -> None:
    """Raise ValueError naming both shapes unless `x` is (B, channels, height, width)."""
    if x.shape[1:] != (channels, height, width):
        raise ValueError(f"this network takes images of {channels}x{height}x{width}, got {_times(x)}")


def check_sides(x: Tensor, channels: int, divisor: int) -> None:
    """Raise ValueError naming both unless `x` is (B, channels, H, W) and `divisor` divides H and W."""
    if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % divisor or x.shape[3] % divisor:
        raise ValueError(
            f"this network takes images of {channels} channels and sides divisible by {divisor}, got {_times(x)}"
        )


def check_output(out: Tensor, channels: int, like: Tensor) -> None:
    """Raise ValueError unless an output is (B, channels, H, W) for the input `like` (B, C, H, W)."""
    wanted = like[:, :1].expand(-1, channels, -1, -1)
    if out.shape != wanted.shape:
        raise ValueError(
            f"denoiser: this network puts out {_times(out)} where {_times(wanted)} is needed; choose another"
        )


def _times(x: Tensor) -> str:
    return "x".join(map(str, x.shape[1:]))
