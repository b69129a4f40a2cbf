"""What makes a network impossible, said in one line that begins with the config's key and names both numbers."""

from typing import Any

from torch import Tensor


def check_positive(config: Any, *names: str, section: str = "denoiser") -> None:
    """Raises ValueError unless each named number is above 0, and each named list holds such numbers alone."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, list) and not value:
            raise ValueError(f"{section}.{name}: must hold at least one number, got []")
        if any(number <= 0 for number in (value if isinstance(value, list) else [value]) if number is not None):
            raise ValueError(f"{section}.{name}: must be positive, got {value}")


def check_dropout(dropout: float, section: str = "denoiser") -> None:
    """Raises ValueError unless a share of dropped values is one."""
    if not 0 <= dropout < 1:
        raise ValueError(f"{section}.dropout: must lie in [0, 1), got {dropout}")


def check_features(kind: str, number: int, section: str = "denoiser") -> None:
    """Raises ValueError for an odd number of Fourier features, which come in pairs."""
    if kind == "fourier" and number % 2:
        raise ValueError(f"{section}.model_channels: must be even with {section}.time_features=fourier, got {number}")


def check_widths(base: int, factors: list[float], section: str = "denoiser") -> None:
    """Raises ValueError unless each multiple of the base width is a whole number."""
    for factor in factors:
        if not float(base * factor).is_integer():
            raise ValueError(
                f"{section}.channel_mult: {factor} times {section}.model_channels={base} is no whole width"
            )


def check_divides(key: str, divisor: int, number: int, what: str, section: str = "denoiser") -> None:
    """Raises ValueError naming both numbers unless `divisor`, the value of `key`, divides `number`.

    Args:
        key: of the config, without its section.
        divisor: its value.
        number: what it must divide.
        what: says of the number what it is, after a comma; or, ending in "=", whose value it is.
        section: of the config.
    """
    if divisor < 1 or number % divisor:
        shown = f"{what}{number}" if what.endswith("=") else f"{number}, {what}"
        raise ValueError(f"{section}.{key}: {divisor} does not divide {shown}")


def check_halves(key: str, levels: int, sides: tuple[int, ...], section: str = "denoiser") -> None:
    """Raises ValueError unless an image can be halved between as many levels as the list `key` has entries."""
    for side in sides:
        if side % 2 ** (levels - 1):
            raise ValueError(
                f"{section}.{key}: {levels} levels need an image whose sides {2 ** (levels - 1)} divides, got {side}"
            )


def check_occurs(key: str, wanted: list[int], side: int, levels: int, section: str = "denoiser") -> None:
    """Raises ValueError for a resolution that an image of this side never has at any level."""
    there = [side >> level for level in range(levels)]
    for resolution in wanted:
        if resolution not in there:
            choices = ", ".join(map(str, there))
            raise ValueError(f"{section}.{key}: {resolution} never occurs; the levels are {choices} pixels a side")


def check_shape(x: Tensor, channels: int, height: int, width: int) -> None:
    """Raises ValueError naming both shapes unless `x` is (B, channels, height, width)."""
    if x.shape[1:] != (channels, height, width):
        raise ValueError(f"this network takes images of {channels}x{height}x{width}, got {_times(x)}")


def check_sides(x: Tensor, channels: int, divisor: int) -> None:
    """Raises ValueError naming both unless `x` is (B, channels, H, W) and `divisor` divides H and W."""
    if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % divisor or x.shape[3] % divisor:
        raise ValueError(
            f"this network takes images of {channels} channels and sides divisible by {divisor}, got {_times(x)}"
        )


def _times(x: Tensor) -> str:
    return "x".join(map(str, x.shape[1:]))
