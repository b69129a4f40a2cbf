"""Guidance wraps a labelled predictor into the `predict(x, t)` that samplers take."""

from collections.abc import Callable

import torch
from torch import Tensor

from diffbench.diffusion.process import Prediction
from diffbench.diffusion.samplers import Predict

LabelledPredict = Callable[[Tensor, Tensor, Tensor], Prediction]


def classifier_free(predict: LabelledPredict, y: Tensor, null_label: int, weight: float) -> Predict:
    """Classifier-free guidance (Ho & Salimans 2022): unconditional + weight (conditional - unconditional).

    Args:
        predict: (x, t, y) -> Prediction.
        y: (B,) labels of the samples.
        null_label: the label that means "no class".
        weight: 1 is the plain conditional model, whose unconditional half is then not computed.

    Returns:
        predict(x, t); both halves run as one batch of 2B.
    """
    if weight == 1:
        return lambda x, t: predict(x, t, y)
    labels = torch.cat([y, torch.full_like(y, null_label)])

    def guided(x: Tensor, t: Tensor) -> Prediction:
        both = predict(torch.cat([x, x]), torch.cat([t, t]), labels)
        x0, x0_null = both.x0.chunk(2)
        eps, eps_null = both.eps.chunk(2)
        return Prediction(torch.lerp(x0_null, x0, weight), torch.lerp(eps_null, eps, weight))

    return guided
