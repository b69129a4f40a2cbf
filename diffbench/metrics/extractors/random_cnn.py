"""random-cnn: an untrained convolutional network with fixed weights, which works for any images without a download.

Features of random networks respond to blur, noise, colour and texture, and rank samples far from ImageNet about as well
as trained ones do (Naeem et al. 2020, §5.2). They do not capture objects, so small differences mean little.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from diffbench.metrics.extractors.base import Extractor, Features, Request, state_hash
from diffbench.metrics.extractors.resize import antialiased

SIZE = 32


def build(request: Request) -> Extractor:
    """Make the extractor: means of the last 32 channels over each quarter of an image at 32x32, so 128 features."""
    widths = (3, 32, 64, 64, 32)
    layers: list[nn.Module] = []
    generator = torch.Generator().manual_seed(0)
    for i, (c_in, c_out) in enumerate(pairwise(widths)):
        layer = nn.Conv2d(c_in, c_out, 3, stride=1 + (i > 0), padding=1, bias=False)
        nn.init.normal_(layer.weight, std=(2 / (9 * c_in)) ** 0.5, generator=generator)  # preserves variance (He 2015)
        layers += [layer, nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten()).requires_grad_(False)

    def prepare(images: Tensor) -> Tensor:
        return antialiased(images, SIZE) / 127.5 - 1

    return Extractor(
        name="random-cnn",
        network=network,
        run=lambda x: Features(network(x)),
        dim=128,
        weights=state_hash(network),
        licence="none: random numbers",
        prepare=prepare,
    )
