"""Metrics: feature extractors by name, and distances both as functions and as torchmetrics."""

from functools import partial

from diffbench.metrics.extractors import digits_cnn, efficientnet, inception, random_cnn
from diffbench.metrics.extractors.base import (
    EXTRACTORS,
    Entry,
    Extractor,
    Features,
    Request,
    check_channels,
    extractor,
    plain,
)
from diffbench.metrics.frechet import FrechetDistance, gaussian
from diffbench.metrics.kernel import KernelDistance
from diffbench.metrics.neighbours import DensityCoverage, PrecisionRecall

EXTRACTORS["digits-cnn"] = Entry(digits_cnn.build, digits_cnn.check)
EXTRACTORS["efficientnet-lite0"] = Entry(efficientnet.build, efficientnet.check, efficientnet.installed)
EXTRACTORS["random-cnn"] = Entry(random_cnn.build, partial(check_channels, "random-cnn"))
EXTRACTORS["inception"] = Entry(inception.build, inception.check, reads_file=True)

__all__ = [
    "EXTRACTORS",
    "DensityCoverage",
    "Entry",
    "Extractor",
    "Features",
    "FrechetDistance",
    "KernelDistance",
    "PrecisionRecall",
    "Request",
    "extractor",
    "gaussian",
    "plain",
]
