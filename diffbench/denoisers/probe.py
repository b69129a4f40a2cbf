"""Checks of custom networks by running them, and their cost."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffbench.denoisers import flops
from diffbench.denoisers.base import check_output
from diffbench.denoisers.custom import CustomDenoiser, described
from diffbench.denoisers.layers import both_sides

DRAWS = "this network draws random numbers or keeps state; only dropout in training may, with torch's own generator"


def count(make: Callable[[], nn.Module], channels: int, image_size: int | tuple[int, int]) -> flops.Cost:
    """Count the cost of a custom network; on the CPU if it cannot run without values, e.g. because of `.item()`.

    Raises:
        ValueError: if it cannot be run at all.
    """
    try:
        return flops.count(make, channels, image_size)
    except (Exception, SystemExit):
        x = torch.zeros(1, channels, *both_sides(image_size))
        with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH):  # the counter misses fused attention on a CPU
            return _run(make(), flops.measure, x, torch.zeros(1), torch.zeros(1, dtype=torch.int64))


def probe(network: CustomDenoiser, x: Tensor, t: Tensor, out_channels: int) -> None:
    """Run a network in training and in evaluation mode, twice each, and check its outputs and gradients.

    Its weights are perturbed first, because a zero-initialised output layer would hide faults.

    Args:
        network: must be on the device of x.
        x: (2, C, H, W) input.
        t: (2,) times as passed to the network.
        out_channels: C, or 2C for a learned variance.

    Raises:
        ValueError: if the output is not a finite tensor of the right dtype and shape, an input is changed in place, a
            parameter gets no gradient, evaluation draws random numbers, or a second pass differs from the first.
    """
    last = network.num_classes - (not network.null_class)
    y = torch.tensor([0, last], device=x.device) if network.num_classes else None
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    inputs = {"x": x, "t": t} | ({} if y is None else {"y": y})
    before = {name: value.clone() for name, value in inputs.items()}
    out = _output(network.train(), x, t, y, out_channels)
    for name, value in inputs.items():
        if not torch.equal(value, before[name]):
            raise ValueError(f"denoiser: forward changes its input {name} in place; have it work on a copy")
    if out.requires_grad:
        try:
            out.float().square().sum().backward()
        except Exception as e:
            raise ValueError(f"denoiser: no gradient can be computed ({described(e)})") from None
    named = network.network.named_parameters()
    missing = [name for name, p in named if p.requires_grad and p.grad is None]
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise ValueError(
            f"denoiser: no gradient reaches the parameter {missing[0]}{more}; use it in forward, remove it, or set its"
            " requires_grad to False"
        )
    state = copy.deepcopy(network.state_dict())  # training passes may change buffers
    with torch.no_grad():
        seeded = [_seeded(network.train(), state, x, t, y) for _ in range(2)]
        before_plain = _generators(x.device)
        plain = [_output(network.eval(), x, t, y, out_channels) for _ in range(2)]
        draws = _generators(x.device) != before_plain
    for (first, second), when in ((plain, "in evaluation"), (seeded, "in training with the same torch seed")):
        if not torch.allclose(first, second, rtol=1e-3, atol=1e-4 * float(first.abs().max()), equal_nan=True):
            raise ValueError(f"denoiser: a second forward pass {when} returns another output: {DRAWS}")
    if draws:  # though the two outputs agree within the tolerance
        raise ValueError(f"denoiser: in evaluation {DRAWS}")


def _generators(device: torch.device) -> list[list[int]]:
    """Return the states of torch's own generators that a pass on the device may advance."""
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    return [state.tolist() for state in states]


def _output(network: CustomDenoiser, x: Tensor, t: Tensor, y: Tensor | None, channels: int) -> Tensor:
    """Run a forward pass and return its output, checked.

    Raises:
        ValueError: as in `probe`.
    """
    out = _run(network, nn.Module.__call__, x, t, y)
    if not isinstance(out, Tensor):
        keys = f" with {', '.join(map(str, out))}" if isinstance(out, Mapping) else ""
        when = "" if network.training else " in evaluation"
        kind = f"{type(out).__name__}{keys}{when}"
        raise ValueError(f"denoiser.call.output: forward returns {kind}; name the tensor in it, e.g. sample or 0")
    check_output(out, channels, x)
    weights = next(network.parameters()).dtype
    if not out.is_floating_point() or torch.promote_types(out.dtype, weights) != weights:
        kinds = [str(dtype).removeprefix("torch.") for dtype in (out.dtype, weights)]
        raise ValueError(f"denoiser: forward returns {kinds[0]}, but the parameters are {kinds[1]}; return {kinds[1]}")
    if not out.isfinite().all():
        raise ValueError("denoiser: forward returns values that are not finite")
    return out


def _seeded(network: nn.Module, state: Mapping[str, Any], x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    network.load_state_dict(state)
    torch.manual_seed(0)  # the caller has forked the generator
    return network(x, t, y)


def _run(network: Any, function: Callable[..., Any], x: Tensor, t: Tensor, y: Tensor | None) -> Any:
    """Call function(network, x, t, y) and return its result.

    Raises:
        ValueError: in place of any exception, with a hint if the null label may be the cause.
    """
    try:
        return function(network, x, t, y)
    except (Exception, SystemExit) as e:
        hint, dropped = "", y is not None and network.null_class and int(y.max()) == network.num_classes
        if isinstance(e, IndexError) and network.call.y is not None and dropped:
            hint = (
                f"; label {network.num_classes} means no class: its table needs {network.num_classes + 1} rows, or set"
                " trainer.label_dropout=0"
            )
        shape = "x".join(map(str, x.shape[1:]))
        call = ", ".join(f"{name}: {value}" for name, value in vars(network.call).items())
        raise ValueError(
            f"denoiser.call: forward fails for a {shape} image with {{{call}}} ({described(e)}){hint}"
        ) from None
