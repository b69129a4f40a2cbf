"""Fréchet distance of your own images as a torchmetric: python examples/own_distance.py [INCEPTION WEIGHTS].

With the weights of the published Inception network (pt_inception-2015-12-05-6726825d.pth), this is the FID. Without
them, the features come from a random projection; any network that maps images to features will do.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from diffbench.metrics import Extractor, FrechetDistance, Request, extractor, gaussian, plain


class Projection(nn.Module):
    """64 random features of images (B, 1, 8, 8) uint8."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images / 255)


def features_of(weights: str | None) -> Extractor:
    if weights:
        return extractor("inception", Request((1, 8, 8), weights))
    return plain("projection", Projection(), (1, 8, 8))


images = torch.tensor(load_digits().images * 15, dtype=torch.uint8)[:, None]  # uint8 (N, 1, 8, 8)
real, others = images[::2], images[1::2]
extract = features_of(sys.argv[1] if sys.argv[1:] else None)
for name, generated in {"as many real images": others, "the same, upside down": others.flip(2)}.items():
    metric = FrechetDistance(gaussian(extract(real).pooled))
    for batch in generated.split(100):
        metric.update(extract(batch).pooled)
    print(f"{'FID' if extract.published else 'Fréchet distance'} of {name}: {float(metric.compute()):.4f}")
