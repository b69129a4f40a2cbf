"""A network's operations, recorded once and repeated without Python, for threads that compute at a time."""

import sys
import threading
import warnings
from typing import Any

import torch
from torch import Tensor, nn

PYTHON = (3, 13)
"""The last Python for which torch.jit records; later ones call the network itself."""
SHAPES = 4
"""Shapes of inputs that are recorded of a network: PyTorch keeps each recording, some 10 MB, until the process ends."""
_RECORDING = threading.Lock()


class Recorded:
    """A network that threads call without waiting for Python's lock, with the same values and gradients to the bit.

    Between two operations a thread holds the lock, and another one that waits for it sleeps: of two threads that each
    train the digits' networks on half of a batch, that takes a tenth of the time. So the first call with inputs of a
    shape records the network's operations, and later ones repeat them. Under autocast, with gradient checkpointing, and
    with inputs of more than `SHAPES` shapes, the network itself is called.

    Args:
        network: does the same for all inputs of a shape, and draws no random numbers; its parameters may change in
            place, but not be replaced.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._recorded: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:  # a copy has weights of its own
        return {"_network": self._network, "_recorded": {}}

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None, **others: Tensor) -> Tensor:
        """The network's output, see `Denoiser.forward`."""
        forgets = getattr(self._network, "gradient_checkpointing", False)  # which recorded operations would not
        if forgets or torch.is_autocast_enabled(x.device.type) or sys.version_info[:2] > PYTHON:
            return self._network(x, t, y, **others)
        inputs = {"x": x, "t": t, **({} if y is None else {"y": y}), **others}
        key = tuple((name, value.shape, value.dtype) for name, value in inputs.items())
        with _RECORDING:
            if key not in self._recorded and len(self._recorded) < SHAPES:
                self._recorded[key] = _record(self._network, inputs)
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]  # one by one, as Python runs them
            return self._recorded.get(key, self._network)(**inputs)


def _record(network: nn.Module, inputs: dict[str, Tensor]) -> Any:
    with warnings.catch_warnings():
        # Deprecated for compilers, which take seconds to import and a minute to start.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        # Warns of what Python decides, which here follows from shapes alone.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return torch.jit.trace(network, example_kwarg_inputs=inputs, check_trace=False)
