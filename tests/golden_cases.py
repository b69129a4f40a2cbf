"""Reference numbers in golden/: inputs and outputs of published diffusion code, one case a pair of files.

A case holds tensors `in.<name>`, `out.<name>` (as the reference puts them out) and, where the reference was run in
float64 as well, `out64.<name>`. Its JSON says how each number was made, by which project and commit, and how far
another implementation may differ. Only data is stored here, no code of the references.
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
        """An input, in `dtype` unless it holds integers."""
        value = self.tensors[f"in.{name}"]
        return value.to(dtype) if value.is_floating_point() else value

    def check(self, name: str, got: Tensor) -> None:
        """Asserts that `got` equals the output `name`: the float64 run for float64, where there is one."""
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
    """The case `name`."""
    return Case(load_file(GOLDEN / f"{name}.safetensors"), json.loads((GOLDEN / f"{name}.json").read_text()))
