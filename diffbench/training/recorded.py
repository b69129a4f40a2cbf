"""A network traced once and replayed without the Python interpreter, so that threads can run it in parallel."""

import sys
import threading
import warnings
from typing import Any

import torch
from torch import Tensor, nn

PYTHON = (3, 13)
"""Last Python version that torch.jit can trace on; later ones call the network itself."""
SHAPES = 4
"""Input shapes to trace per network, at most: PyTorch keeps each trace, some 10 MB, until the process ends."""
_RECORDING = threading.Lock()


class Recorded:
    """A network that threads call without holding Python's GIL, with bit-identical values and gradients.

    Otherwise a thread holds the GIL between two operations while others sleep, which takes a tenth of the time when two
    threads each train a digits network on half of a batch. So the first call with inputs of a new shape traces the
    network, and later calls replay the trace. The network itself is called under autocast, with gradient checkpointing,
    and for further shapes after the first `SHAPES`.

    Args:
        network: runs the same operations for all inputs of a shape and draws no random numbers; its parameters may be
            changed in place, but not replaced.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._recorded: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:  # a copy has its own weights, which the traces do not use
        return {"_network": self._network, "_recorded": {}}

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None, **others: Tensor) -> Tensor:
        """Return the network's output; see `Denoiser.forward`."""
        checkpointing = getattr(self._network, "gradient_checkpointing", False)  # a trace would keep all activations
        if checkpointing or torch.is_autocast_enabled(x.device.type) or sys.version_info[:2] > PYTHON:
            return self._network(x, t, y, **others)
        inputs = {"x": x, "t": t, **({} if y is None else {"y": y}), **others}
        key = tuple((name, value.shape, value.dtype) for name, value in inputs.items())
        with _RECORDING:
            if key not in self._recorded and len(self._recorded) < SHAPES:
                self._recorded[key] = _record(self._network, inputs)
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]  # one by one, as in Python
            return self._recorded.get(key, self._network)(**inputs)


def _record(network: nn.Module, inputs: dict[str, Tensor]) -> Any:
    with warnings.catch_warnings():
        # torch.jit is deprecated in favour of compilers, which take seconds to import and a minute to start.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        # The tracer warns of Python control flow, which depends only on shapes here.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return torch.jit.trace(network, example_kwarg_inputs=inputs, check_trace=False)
