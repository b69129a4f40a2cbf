"""Evaluation: feature extractors by name, distances as functions, and the same distances as torchmetrics."""

from diffbench.metrics.extractors import digits_cnn, efficientnet, inception
from diffbench.metrics.extractors.base import EXTRACTORS, Extractor, Features, Request, extractor, register

register("digits-cnn", digits_cnn.build, digits_cnn.check)
register("efficientnet-lite0", efficientnet.build, efficientnet.check)
register("inception", inception.build, inception.check)

__all__ = ["EXTRACTORS", "Extractor", "Features", "Request", "extractor", "register"]
