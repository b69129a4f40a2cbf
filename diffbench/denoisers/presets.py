"""Published networks by name: their config, the input that they were made for, and what the source says of them."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from torch import nn

from diffbench.denoisers.ddpmpp import DDPMpp, DDPMppConfig
from diffbench.denoisers.diffit import DiffiT, DiffiTConfig
from diffbench.denoisers.diffit_latent import DiffiTLatent, DiffiTLatentConfig
from diffbench.denoisers.dit import DiT, DiTConfig
from diffbench.denoisers.flops import Cost, count
from diffbench.denoisers.unet import UNet, UNetConfig


@dataclass(frozen=True)
class Preset:
    """A published network."""

    build: type[nn.Module]
    config: Any
    source: str
    """Paper and table, with the parameters and GMACs that stand there."""
    shape: dict[str, Any] = field(default_factory=dict)
    """The input and output that it was made for: keyword arguments of `build` besides the config."""

    def make(self) -> nn.Module:
        """The network at its own shape."""
        return self.build(self.config, **self.shape)


def _latent(side: int = 32) -> dict[str, Any]:
    return {"image_size": side, "channels": 4, "num_classes": 1000, "learn_sigma": True}


def _adm(size: int, num_classes: int = 1000) -> dict[str, Any]:
    return {
        "image_size": size,
        "channels": 3,
        "num_classes": num_classes,
        "null_class": False,
        "learn_sigma": True,
    }


def _image(size: int) -> dict[str, Any]:
    return {"image_size": size, "channels": 3}


# Table 1 of DiT: depth, width, heads; Table 4: parameters and Gflops with patches of 2, 4 and 8.
_DIT = {
    "S": ((12, 384, 6), {2: "33M, 6.06", 4: "33M, 1.41", 8: "33M, 0.36"}),
    "B": ((12, 768, 12), {2: "130M, 23.01", 4: "130M, 5.56", 8: "131M, 1.42"}),
    "L": ((24, 1024, 16), {2: "458M, 80.71", 4: "458M, 19.70", 8: "459M, 5.01"}),
    "XL": ((28, 1152, 16), {2: "675M, 118.64", 4: "675M, 29.05", 8: "676M, 7.39"}),
}
DIT: dict[str, Preset] = {
    f"DiT-{size}/{patch}": Preset(DiT, DiTConfig(patch, width, depth, heads), f"DiT, Table 4: {said}", _latent())
    for size, ((depth, width, heads), row) in _DIT.items()
    for patch, said in row.items()
}
DIT["DiT-XL/2-512"] = Preset(DiT, DIT["DiT-XL/2"].config, "DiT at 512x512: 675M, 524.60", _latent(64))
_WAYS = {"in-context": "449M, 119.37", "cross-attention": "598M, 137.62", "adaln": "600M, 118.56"}
DIT |= {
    f"DiT-XL/2-{way}": Preset(DiT, replace(DIT["DiT-XL/2"].config, conditioning=way), f"DiT, §3.2: {said}", _latent())
    for way, said in _WAYS.items()
}


def _diffit(depth: int) -> DiffiTLatentConfig:
    return DiffiTLatentConfig(patch_size=2, hidden_size=1152, depth=depth, num_heads=16)


DIFFIT_LATENT = {
    name: Preset(DiffiTLatent, _diffit(depth), source, _latent(side))
    for name, depth, side, source in (
        ("DiffiT-XL/2", 28, 32, "DiffiT, Table 9: 561M, 114 without attention's products"),
        ("DiffiT-XL/2-depth30", 30, 32, "DiffiT, §H.2: depth 30"),
        ("DiffiT-XL/2-512", 28, 64, "DiffiT at 512x512"),
    )
}

_ADM: dict[str, Any] = {"attention_resolutions": [32, 16, 8], "resblock_updown": True}
_ADM64 = UNetConfig(192, [1, 2, 3, 4], 3, num_head_channels=64, dropout=0.1, **_ADM)
_ADM128 = UNetConfig(256, [1, 1, 2, 3, 4], num_heads=4, **_ADM)
_ADM256 = UNetConfig(256, [1, 1, 2, 2, 4, 4], num_head_channels=64, **_ADM)
_ADM512 = UNetConfig(256, [0.5, 1, 1, 2, 2, 4, 4], num_head_channels=64, **_ADM)
ADM = {
    "ADM-64": Preset(UNet, _ADM64, "ADM's code: 295,904,454, 109.7", _adm(64)),
    "ADM-128": Preset(UNet, _ADM128, "ADM's code: 421,529,606, 306.9", _adm(128)),
    "ADM-256": Preset(UNet, _ADM256, "ADM's code: 553,838,086; DiT, Table 6: 1120", _adm(256)),
    "ADM-256-uncond": Preset(UNet, _ADM256, "ADM's code: 552,814,086", _adm(256, num_classes=0)),
    "ADM-512": Preset(UNet, _ADM512, "ADM's code: 558,997,638; DiT, Table 6: 1983", _adm(512)),
}

_CIFAR10 = DDPMppConfig(channel_mult=[2, 2, 2], dropout=0.13, augment_dim=9)
DDPMPP = {
    "DDPM++-CIFAR10": Preset(DDPMpp, _CIFAR10, "EDM's code: 55,733,891, 21.19", _image(32)),
    "DDPM++-CIFAR10-cond": Preset(DDPMpp, _CIFAR10, "EDM's code: 55,735,299", _image(32) | {"num_classes": 10}),
    "DDPM++-FFHQ64": Preset(
        DDPMpp,
        DDPMppConfig(channel_mult=[1, 2, 2, 2], dropout=0.05, augment_dim=9),
        "EDM's code: 61,805,571, 41.87",
        _image(64),
    ),
}

# The paper contradicts itself: four blocks a stage (§H.1), or 2,2,2 and 1,2,2,2 (§I.1). Dropout is EDM's, whose
# training it "strictly followed"; heads are ours. It states no sizes for image space.
_FFHQ = [128, 256, 256, 256]
DIFFIT = {
    "DiffiT-CIFAR10-H1": Preset(
        DiffiT, DiffiTConfig(blocks=[4, 4, 4], dropout=0.13), "DiffiT, §H.1: 4 blocks a stage", _image(32)
    ),
    "DiffiT-CIFAR10-I1": Preset(
        DiffiT, DiffiTConfig(blocks=[2, 2, 2], dropout=0.13), "DiffiT, §I.1: 2 blocks a stage", _image(32)
    ),
    "DiffiT-FFHQ64-H1": Preset(
        DiffiT, DiffiTConfig(_FFHQ, [4, 4, 4, 4], 8, dropout=0.05), "DiffiT, §H.1: 4 blocks a stage", _image(64)
    ),
    "DiffiT-FFHQ64-I1": Preset(
        DiffiT, DiffiTConfig(_FFHQ, [1, 2, 2, 2], 8, dropout=0.05), "DiffiT, §I.1: 1, 2, 2, 2 blocks", _image(64)
    ),
}

PRESETS = DIT | DIFFIT_LATENT | DIFFIT | ADM | DDPMPP


def sizes() -> Iterator[tuple[str, str, Cost]]:
    """Name, source and cost of each preset at its own input, one by one (a few seconds in all, once; no memory)."""
    for name, preset in PRESETS.items():
        yield name, preset.source, _cost(name)


@cache
def _cost(name: str) -> Cost:
    preset = PRESETS[name]
    return count(preset.make, preset.shape["channels"], preset.shape["image_size"])
