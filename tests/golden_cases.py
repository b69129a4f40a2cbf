"""Reference numbers in golden/: inputs and outputs of published diffusion code, one pair of files per case.

A case contains tensors `in.<name>`, `out.<name>` (the reference's output) and, where the reference was also run in
float64, `out64.<name>`. Its JSON records how each number was made, by which project and commit, and how far another
implementation may differ. Only data is stored here, no reference code.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Case:
    """A reference case: its tensors by prefixed name, and its description."""

    tensors: dict[str, Tensor]
    info: dict[str, Any]

    def input(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return an input, in `dtype` unless it contains integers."""
        value = self.tensors[f"in.{name}"]
        return value.to(dtype) if value.is_floating_point() else value

    def check(self, name: str, got: Tensor) -> None:
        """Assert that `got` equals the output `name`; float64 is compared with the float64 run if there is one."""
        full, tolerances = f"out64.{name}", "tolerances64"
        if got.dtype != torch.float64 or full not in self.tensors:
            full, tolerances = f"out.{name}", "tolerances"
        want, allowed = self.tensors[full], self.info[tolerances][full]
        assert got.shape == want.shape, f"{full}: shape {tuple(got.shape)}, the reference has {tuple(want.shape)}"
        if allowed.get("exact"):
            assert torch.equal(got, want), f"{full} differs"
            return
        assert got.dtype == want.dtype, f"{full}: {got.dtype}, the reference has {want.dtype}"
        error = (got.double() - want.double()).abs()
        excess = error - (allowed["atol"] + allowed["rtol"] * want.double().abs())
        assert bool((excess <= 0).all()), f"{full}: largest difference {error.max():.3g}, allowed {allowed}"


def load(name: str) -> Case:
    """Load the case `name`."""
    return Case(load_file(GOLDEN / f"{name}.safetensors"), json.loads((GOLDEN / f"{name}.json").read_text()))
