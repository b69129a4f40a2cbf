"""The checks of a network from outside, by running it, and its cost."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffbench.denoisers import flops
from diffbench.denoisers.base import check_output
from diffbench.denoisers.foreign import Foreign, described
from diffbench.denoisers.layers import both_sides


def count(make: Callable[[], nn.Module], channels: int, image_size: int | tuple[int, int]) -> flops.Cost:
    """The cost of a network from outside; on the CPU where it cannot run without values, as one that calls `.item()`.

    Raises:
        ValueError: if it cannot run at all.
    """
    try:
        return flops.count(make, channels, image_size)
    except Exception:
        x = torch.zeros(1, channels, *both_sides(image_size))
        with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH):  # fused attention is not counted on a CPU
            return _run(make(), flops.measure, x, torch.zeros(1), torch.zeros(1, dtype=torch.int64))


def probe(network: Foreign, x: Tensor, t: Tensor, out_channels: int) -> None:
    """Runs a network in training mode and in evaluation, twice each, and checks its output and gradients.

    Its weights are changed, so that an output layer of zeros hides nothing.

    Args:
        network: on the device of x.
        x: (2, C, H, W).
        t: (2,) times as the network gets them.
        out_channels: C, or 2C for a learned variance.

    Raises:
        ValueError: for an output of another kind or shape, an input changed in place, a parameter without a gradient,
            or a second pass that differs from the first.
    """
    last = network.num_classes - (not network.null_class)
    y = torch.tensor([0, last], device=x.device) if network.num_classes else None
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    inputs = {"x": x, "t": t} | ({} if y is None else {"y": y})
    before = {name: value.clone() for name, value in inputs.items()}
    out = _run(network.train(), nn.Module.__call__, x, t, y)
    if not isinstance(out, Tensor):
        held = f" with {', '.join(map(str, out))}" if isinstance(out, Mapping) else ""
        kind = f"{type(out).__name__}{held}"
        raise ValueError(f"denoiser.call.output: forward returns {kind}; name the tensor in it, as sample or 0")
    check_output(out, out_channels, x)
    for name, value in inputs.items():
        if not torch.equal(value, before[name]):
            raise ValueError(f"denoiser: forward changes its input {name} in place; have it work on a copy")
    if not out.isfinite().all():
        raise ValueError("denoiser: forward gives values that are not finite")
    if out.requires_grad:
        out.float().square().sum().backward()
    named = network.network.named_parameters()
    missing = [name for name, p in named if p.requires_grad and p.grad is None]
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise ValueError(
            f"denoiser: no gradient reaches the parameter {missing[0]}{more}; use it in forward, remove it, or set its"
            " requires_grad to False"
        )
    state = copy.deepcopy(network.state_dict())  # passes in training may change buffers
    with torch.no_grad():
        seeded = [_seeded(network.train(), state, x, t, y) for _ in range(2)]
        plain = [network.eval()(x, t, y) for _ in range(2)]
    for (first, second), when in ((plain, "in evaluation"), (seeded, "in training with the same torch seed")):
        if not torch.allclose(first, second, rtol=1e-3, atol=1e-4 * float(first.abs().max()), equal_nan=True):
            raise ValueError(
                f"denoiser: a second forward pass {when} gives another output: this network draws random numbers or"
                " keeps a state; only dropout in training may, by torch's own generator"
            )


def _seeded(network: nn.Module, state: Mapping[str, Any], x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    network.load_state_dict(state)
    torch.manual_seed(0)  # in the caller's fork
    out: Tensor = network(x, t, y)
    return out


def _run(network: Any, how: Callable[..., Any], x: Tensor, t: Tensor, y: Tensor | None) -> Any:
    """how(network, x, t, y).

    Raises:
        ValueError: for whatever that raises, with a hint where the null label may be the reason.
    """
    try:
        return how(network, x, t, y)
    except Exception as e:
        hint = ""
        if isinstance(e, IndexError) and network.num_classes and network.null_class:
            hint = (
                f"; label {network.num_classes} means no class: its table needs {network.num_classes + 1} rows, or set"
                " trainer.label_dropout=0"
            )
        shape = "x".join(map(str, x.shape[1:]))
        call = ", ".join(f"{name}: {value}" for name, value in vars(network.call).items())
        raise ValueError(
            f"denoiser.call: forward fails at an image of {shape} with {{{call}}} ({described(e)}){hint}"
        ) from None
