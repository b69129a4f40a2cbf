"""Custom networks: any `package.module:Class` or function, its arguments, and how its forward is called."""

import copy
import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_type_hints

import torch
from torch import Tensor, nn

from diffbench.denoisers.base import Denoiser
from diffbench.denoisers.layers import labels_or_null
from diffbench.denoisers.source import Source, load

LEVELS = 1e-4, 1e4
"""Range to which the noise levels passed to a network are clamped; a process may end at 0 or infinity."""


@dataclass
class CallConfig:
    """The call of forward: the position or name of the argument that takes each input; null: no such input."""

    x: int | str = 0
    """The noisy image (B, C, H, W)."""
    t: int | str | None = 1
    """The time (B,)."""
    y: int | str | None = 2
    """The labels (B,) int64; null for a network without labels."""
    t_as: Literal["time", "step", "noise_level", "log_snr"] = "time"
    """The form of t: the process's own time, that time rounded to int64, sigma / alpha, or log(alpha^2 / sigma^2)."""
    output: int | str | None = None
    """The index or name of the output in the value that forward returns; null: the value itself."""

    def __post_init__(self) -> None:
        given = [target for target in (self.x, self.t, self.y) if target is not None]
        if len(set(given)) < len(given):
            raise ValueError("denoiser.call: x, t and y must go to different positions or names")
        places = sorted(target for target in given if isinstance(target, int))
        if places != list(range(len(places))):
            raise ValueError(
                f"denoiser.call: positions must count from 0 without a gap, got {', '.join(map(str, places))};"
                " pass a later argument by name"
            )


@dataclass(frozen=True)
class Factory:
    """The class or function that builds a network.

    Attributes:
        name: package.module:Class, or package.module:function.
        make: the class or function.
        parameters: its parameters by name.
        source: its module.
        config: the parameter that takes a config dataclass, and that dataclass; None if it takes plain arguments.
    """

    name: str
    make: Callable[..., Any]
    parameters: Mapping[str, inspect.Parameter]
    source: Source
    config: tuple[str, type] | None


SHAPE = ("image_size", "channels", "num_classes", "null_class", "learn_sigma")
"""Arguments that are passed to a network if its signature names them."""


@dataclass
class CustomConfig:
    """Config of a custom network."""

    factory: ClassVar[Factory]
    args: Any = field(default_factory=dict)
    """Arguments of the class or function, besides those in `SHAPE`."""
    call: CallConfig = field(default_factory=CallConfig)
    width: str | None = None
    """Argument that widens the network, a number or a list that is scaled as a whole; studies match sizes with it."""
    depth: str | None = None
    """Argument that deepens it."""
    code: str | None = None
    """Hash of the source, filled in automatically; null for an installed module."""

    def __post_init__(self) -> None:
        self.code = self.factory.source.digest
        plain = self.factory.config is None
        if plain:
            self.args = {name: _plain(value) for name, value in self.args.items()}
            self._check_arguments()
        known = list(self.args if plain else [f.name for f in dataclasses.fields(self.args)])
        for key in ("width", "depth"):
            name = getattr(self, key)
            parameter = self.factory.parameters.get(name) if plain else None
            if name is None or name in known:
                continue
            if parameter is None or parameter.default is parameter.empty:
                choices = [*known, *([] if not plain else self.factory.parameters)]
                raise ValueError(f"denoiser.{key}: no argument {name!r}; choose from {_listed(choices, name)}")
            default = parameter.default
            self.args[name] = list(default) if isinstance(default, tuple) else default

    def _check_arguments(self) -> None:
        named, maker = self.factory.parameters, self.factory.name
        takes_any = any(p.kind is p.VAR_KEYWORD for p in named.values())
        names = [p.name for p in named.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        for name in self.args:
            if name not in names and not takes_any:
                raise ValueError(
                    f"denoiser.args.{name}: {maker} takes no such argument; allowed: {_listed(names, name)}"
                )
        for name in names:
            if named[name].default is inspect.Parameter.empty and name not in (*self.args, *SHAPE):
                raise ValueError(f"denoiser.args.{name}: missing; {maker} needs it")


def section(name: str, code: str | None, folders: Sequence[Path]) -> type[CustomConfig]:
    """Return the dataclass of the section `denoiser` for a custom network.

    Args:
        name: package.module:Class, or package.module:function.
        code: required hash of its source; None accepts any.
        folders: folders to search before the installed modules.

    Raises:
        ValueError: if it does not exist or cannot be imported; the message begins with the key.
    """
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", name):
        raise ValueError(f"denoiser.name: {name!r} is not a name; write package.module:Class")
    module, _, attribute = name.partition(":")
    try:
        found = load(module, code, folders)
    except ValueError as e:
        raise ValueError(f"denoiser.name: {e}") from None
    return _section(name, attribute, found)


@cache
def _section(name: str, attribute: str, found: Source) -> type[CustomConfig]:
    module = found.module
    make = getattr(module, attribute, None)
    if make is None:
        near = [n for n, value in vars(module).items() if isinstance(value, type) and issubclass(value, nn.Module)]
        raise ValueError(f"denoiser.name: {module.__name__} has no {attribute}; choose from {_listed(near, attribute)}")
    wrong_class = isinstance(make, type) and not issubclass(make, nn.Module)
    if not callable(make) or wrong_class or isinstance(make, nn.Module):
        raise ValueError(f"denoiser.name: {name} is neither a torch.nn.Module class nor a function that returns one")
    factory = Factory(name, make, _parameters(make), found, _config(make, module, attribute))
    kind = dict[str, Any] if factory.config is None else factory.config[1]
    args: Any = field(default_factory=dict if factory.config is None else factory.config[1])
    config: Any = dataclasses.make_dataclass("CustomConfig", [("args", kind, args)], bases=(CustomConfig,))
    config.factory = factory
    return config


def _parameters(make: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    for evaluated in (True, False):
        try:
            return inspect.signature(make, eval_str=evaluated).parameters
        except Exception:  # annotations cannot be evaluated, or there is no signature
            continue
    return {}


def _config(make: Any, module: Any, attribute: str) -> tuple[str, type] | None:
    """Return name and type of the parameter that takes a config: annotated with a dataclass (or None), or named
    `config` in a module with a `<Class>Config`.

    Raises:
        ValueError: if the types of its fields cannot be resolved.
    """
    for name, parameter in _parameters(make).items():
        kind = parameter.annotation
        kind = next((option for option in get_args(kind) if dataclasses.is_dataclass(option)), kind)
        if isinstance(kind, str) or (kind is parameter.empty and name == "config"):
            kind = getattr(module, kind if isinstance(kind, str) else f"{attribute}Config", None)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            _check_types(kind)
            return name, kind
    return None


def _check_types(kind: type) -> None:
    try:
        hints = get_type_hints(kind)
    except Exception as e:
        raise ValueError(f"denoiser.name: the types of {kind.__name__} cannot be read ({described(e)})") from None
    for hint in hints.values():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            _check_types(hint)


class CustomDenoiser(Denoiser):
    """A custom network behind the interface of `Denoiser`.

    Args:
        noise_level: (B,) times as passed to the network -> (B,) sigma / alpha; needed for some `call.t_as`.
    """

    shards_blocks = False  # one block may use another's parameters

    def __init__(
        self,
        config: CustomConfig,
        image_size: int | tuple[int, int],
        channels: int,
        num_classes: int = 0,
        null_class: bool = True,
        learn_sigma: bool = False,
        noise_level: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(channels, num_classes, null_class, learn_sigma)
        self.call, self.noise_level = config.call, noise_level
        shape = dict(zip(SHAPE, (image_size, channels, num_classes, null_class, learn_sigma), strict=True))
        self.network = _network(config, shape)

    def label_rows(self) -> Tensor | None:
        """See `Denoiser.label_rows`; concatenates, along the width, all tables with one row per label."""
        tables = [table.weight for table in self._tables()]
        return torch.cat(tables, dim=1) if tables else None

    def _tables(self) -> list[nn.Embedding]:
        rows = self.num_classes + self.null_class
        return [m for m in self.network.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == rows > 1]

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """See `Denoiser.forward`; label weights mix the rows of every table with one row per label."""
        y = labels_or_null(y, len(t), self.num_classes, self.null_class, t.device) if self.num_classes else None
        if y is None or not y.is_floating_point():
            return self._output(x, t, y)
        if not (tables := self._tables()):
            raise ValueError(f"this network has no table of {y.shape[1]} label embeddings: give labels, not weights")
        used: list[nn.Module] = []
        with ExitStack() as stack:
            for table in tables:
                stack.enter_context(table.register_forward_hook(partial(_mixture, y, used)))
            out = self._output(x, t, y.argmax(1))
        if not used:
            raise ValueError("this network does not look up labels unchanged: give labels, not weights")
        return out

    def _output(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        call = self.call
        given = [(target, value) for target, value in ((call.x, x), (call.t, self._time(t)), (call.y, y))]
        places = sorted((target, i) for i, (target, _) in enumerate(given) if isinstance(target, int))
        names = {target: value for target, value in given if isinstance(target, str)}
        out = self.network(*(given[i][1] for _, i in places), **names)
        if call.output is None:
            return out
        if isinstance(call.output, int) or isinstance(out, Mapping):
            return out[call.output]
        return getattr(out, call.output)

    def _time(self, t: Tensor) -> Tensor:
        if self.call.t_as == "time":
            return t
        if self.call.t_as == "step":
            return t.round().long()
        if self.noise_level is None:
            raise ValueError(f"denoiser.call.t_as: {self.call.t_as} needs the process's noise levels")
        level = self.noise_level(t).clamp(*LEVELS)
        return (level if self.call.t_as == "noise_level" else -2 * level.log()).to(t.dtype)


def _mixture(weights: Tensor, used: list[nn.Module], table: nn.Embedding, args: tuple[Tensor], rows: Tensor) -> Tensor:
    """Replace a table's rows for labels, (B, D) or (B, tokens, D), by a mixture; a forward hook, see `LabelTable`.

    Rows of anything but the sample's own label, such as another table's positions, stay unchanged.
    """
    labels = weights.argmax(1).view(-1, *[1] * (rows.ndim - 2))
    if not args or len(args[0]) != len(labels) or not (matches := args[0] == labels).any():
        return rows
    used.append(table)
    indices = torch.arange(table.num_embeddings, device=weights.device).expand_as(weights)
    mixture = nn.functional.embedding_bag(
        indices, table.weight, per_sample_weights=weights.to(table.weight.dtype), mode="sum"
    )
    return torch.where(matches[..., None], mixture.view(*labels.shape, -1), rows)


def _network(config: CustomConfig, shape: Mapping[str, Any]) -> nn.Module:
    """Build the network; on the meta device too if its constructor reads values, e.g. with `.item()`."""
    factory = config.factory
    kwargs = {name: value for name, value in shape.items() if name in factory.parameters}
    args = copy.deepcopy(config.args)
    kwargs |= args if factory.config is None else {factory.config[0]: args}
    try:
        try:
            network = factory.make(**kwargs)
        except Exception:
            if torch.get_default_device().type != "meta":
                raise
            with torch.device("cpu"):
                network = factory.make(**kwargs).to("meta")
    except (Exception, SystemExit) as e:
        raise ValueError(f"denoiser.args: {factory.name} cannot be built ({described(e)})") from None
    if not isinstance(network, nn.Module):
        kind = type(network).__name__
        raise ValueError(f"denoiser.name: {factory.name} returns a value of type {kind}, not a torch.nn.Module")
    _check_parameters(network)
    return network


def _check_parameters(network: nn.Module) -> None:
    """Check that there are parameters to train, all float32 or all float64, as times and noise need that precision.

    Raises:
        ValueError: if not; the message names the parameter.
    """
    named = list(network.named_parameters())
    if not any(parameter.requires_grad for _, parameter in named):
        raise ValueError("denoiser.name: this network has no parameters to train")
    for name, parameter in named:
        if isinstance(parameter, nn.UninitializedParameter):
            raise ValueError(
                f"denoiser.name: the parameter {name} has no shape before the first pass; specify its layer's sizes"
            )
        if parameter.dtype not in (torch.float32, torch.float64) or parameter.dtype != named[0][1].dtype:
            kinds = " and ".join(dict.fromkeys(str(p.dtype).removeprefix("torch.") for _, p in named))
            raise ValueError(
                f"denoiser.name: parameters are of type {kinds} ({name}); make all float32 or all float64, and"
                " choose lower precision with trainer.precision"
            )


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _plain(value: Any) -> Any:
    """Convert a config value to what Python code expects: plain numbers, and "true" or "false" in any case to bool."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    kinds = [kind for kind in (bool, int, float) if isinstance(value, kind)]
    return kinds[0](value) if kinds else value


def _listed(choices: Sequence[str], name: Any) -> str:
    nearest = difflib.get_close_matches(str(name), choices, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"{', '.join(choices) or 'none'}{hint}"
