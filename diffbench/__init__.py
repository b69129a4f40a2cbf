"""diffbench: compare diffusion denoisers that share one diffusion module.

docs/api.md lists the public names, with an example of each.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffbench.data.datamodule import ImageDataModule, LatentDataModule
    from diffbench.denoisers import (
        DDPMpp,
        DDPMppConfig,
        DiffiT,
        DiffiTConfig,
        DiT,
        DiTConfig,
        SegFormer,
        SegFormerConfig,
        UNet,
        UNetConfig,
        UViT,
        UViTConfig,
        from_preset,
    )
    from diffbench.diffusion import EDM, EDMConfig, Flow, FlowConfig, VPConfig
    from diffbench.diffusion import DiscreteVP as VP
    from diffbench.metrics import DensityCoverage, FrechetDistance, KernelDistance, PrecisionRecall
    from diffbench.runs.base import Run
    from diffbench.runs.lifecycle import load, train
    from diffbench.sampling.sampler import sample
    from diffbench.training import EMA, DiffusionModule, SampleGrid, ValidationError

__version__ = "0.1.0"
__all__ = [
    "EDM",
    "EMA",
    "VP",
    "DDPMpp",
    "DDPMppConfig",
    "DensityCoverage",
    "DiT",
    "DiTConfig",
    "DiffiT",
    "DiffiTConfig",
    "DiffusionModule",
    "EDMConfig",
    "Flow",
    "FlowConfig",
    "FrechetDistance",
    "ImageDataModule",
    "KernelDistance",
    "LatentDataModule",
    "PrecisionRecall",
    "Run",
    "SampleGrid",
    "SegFormer",
    "SegFormerConfig",
    "UNet",
    "UNetConfig",
    "UViT",
    "UViTConfig",
    "VPConfig",
    "ValidationError",
    "from_preset",
    "load",
    "sample",
    "train",
]
_NETWORKS = ("DDPMpp", "DiT", "DiffiT", "SegFormer", "UNet", "UViT")
_MODULES = {
    "data.datamodule": ["ImageDataModule", "LatentDataModule"],
    "denoisers": [*_NETWORKS, *(f"{name}Config" for name in _NETWORKS), "from_preset"],
    "diffusion": ["EDM", "EDMConfig", "Flow", "FlowConfig", "VP", "VPConfig"],
    "metrics": ["DensityCoverage", "FrechetDistance", "KernelDistance", "PrecisionRecall"],
    "runs.base": ["Run"],
    "runs.lifecycle": ["load", "train"],
    "sampling.sampler": ["sample"],
    "training": ["EMA", "DiffusionModule", "SampleGrid", "ValidationError"],
}


def __getattr__(name: str) -> Any:
    """Import torch and the modules that need it only once one of their names is used."""
    for path, names in _MODULES.items():
        if name in names:
            module = importlib.import_module(f"diffbench.{path}")
            return getattr(module, "DiscreteVP" if name == "VP" else name)
    raise AttributeError(f"module 'diffbench' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
