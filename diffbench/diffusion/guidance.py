"""Guidance: wrap a labelled predictor into the `predict(x, t)` that samplers take.

A weight is a number, or a function from times t (B,) to one weight per sample. Where it is 1 for every sample, the
second prediction is skipped. Samplers pass times on the CPU, so inspecting them costs no synchronisation.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffbench.diffusion.process import LabelledPredict, Predict, Prediction, Process, divisor, per_sample

Weight = float | Callable[[Tensor], Tensor]


def classifier_free(
    predict: LabelledPredict, y: Tensor, null_label: int, weight: Weight, channels: int | None = None
) -> Predict:
    """Apply classifier-free guidance (Ho & Salimans 2022): unconditional + weight (conditional - unconditional).

    Args:
        predict: (x, t, y) -> Prediction.
        y: (B,) labels of the samples, or (B, labels) weights over the labels.
        null_label: the label that means "no class".
        weight: 1 is the plain conditional model.
        channels: number of channels to guide, None for all; the rest come from the conditional model. The DiT and
            DiffiT releases guide three of the four latent channels. A learned variance is always the conditional one.

    Returns:
        predict(x, t), which runs both predictions as one batch of 2B.
    """
    if weight == 1:
        return lambda x, t: predict(x, t, y)
    labels = torch.cat([y, null_labels(y, null_label)])

    def guided(x: Tensor, t: Tensor) -> Prediction:
        w = _at(weight, t)
        if w is None:
            return predict(x, t, y)
        both = predict(torch.cat([x, x]), torch.cat([t, t]), labels)
        (x0, x0_null), (eps, eps_null) = both.x0.chunk(2), both.eps.chunk(2)
        variance = None if both.variance is None else both.variance[: len(x)]
        return _extrapolate(Prediction(x0, eps, variance), Prediction(x0_null, eps_null), w, channels)

    return guided


def null_labels(y: Tensor, null_label: int) -> Tensor:
    """Return the null label in the form of `y`: (B,) labels, or (B, labels) weights."""
    if not y.is_floating_point():
        return torch.full_like(y, null_label)
    return torch.zeros_like(y).index_fill(1, torch.tensor(null_label, device=y.device), 1)


def autoguidance(
    predict: LabelledPredict, weak: LabelledPredict, y: Tensor, weight: Weight, channels: int | None = None
) -> Predict:
    """Guide away from a weaker model of the same labels, smaller or trained for less time (Karras et al. 2024).

    Args:
        predict: (x, t, y) -> Prediction of the model.
        weak: (x, t, y) -> Prediction of the weaker model, under the same process.
        y: (B,) labels of the samples.
        weight: 1 is the plain model.
        channels: number of channels to guide, None for all.
    """

    def guided(x: Tensor, t: Tensor) -> Prediction:
        w = _at(weight, t)
        strong = predict(x, t, y)
        return strong if w is None else _extrapolate(strong, weak(x, t, y), w, channels)

    return guided


def classifier_guidance(
    predict: Predict, gradient: Callable[[Tensor, Tensor], Tensor], process: Process, scale: float
) -> Predict:
    """Guide by a classifier of noisy images (Dhariwal & Nichol 2021, Algorithm 2): eps - scale sigma gradient.

    Args:
        predict: (x, t) -> Prediction.
        gradient: (x, t) -> gradient of log p(y | x_t) with respect to x_t, (B, C, H, W), for the wanted labels.
        process: the process whose noise the classifier was trained on.
        scale: 0 turns guidance off and computes no gradient; 1 is Bayes' rule.
    """
    if scale == 0:
        return predict

    def guided(x: Tensor, t: Tensor) -> Prediction:
        prediction, towards = predict(x, t), scale * gradient(x, t)
        alpha, sigma = process.alpha_sigma(t.to(x.device), x)
        x0, eps = prediction.x0 + sigma**2 / divisor(alpha) * towards, prediction.eps - sigma * towards
        return Prediction(x0, eps, prediction.variance)

    return guided


def power_cosine(largest: float, power: float = 4.0, steps: int = 1000) -> Weight:
    """Return DiffiT's weight over the steps t of a discrete process (§5.8; Gao et al. 2023); 1 at the noisy end.

    w(t) = 1 + (largest - 1) (1 - cos(pi (1 - t / steps)^power)) / 2.
    """

    def weight(t: Tensor) -> Tensor:
        progress = (1 - t.double() / steps) ** power
        return 1 + (largest - 1) * 0.5 * (1 - (math.pi * progress).cos())

    return weight


def interval(process: Process, weight: Weight, low: float, high: float) -> Weight:
    """Restrict guidance to low < sigma / alpha <= high (Kynkäänniemi et al. 2024); elsewhere the weight is 1."""
    if not 0 <= low < high:
        raise ValueError(f"the guidance interval must satisfy 0 <= low < high, got {low} to {high}")

    def limited(t: Tensor) -> Tensor:
        level = (-0.5 * process.log_snr(t)).exp()
        inside = (level > low) & (level <= high)
        return torch.where(inside, weight(t) if callable(weight) else weight, 1.0)

    return limited


def _at(weight: Weight, t: Tensor) -> float | Tensor | None:
    """Return the weight at times t (B,): a number if all samples share it, else one per sample; None if all are 1."""
    if callable(weight):
        values = weight(t)
        if not bool((values == values[0]).all()):
            return values
        weight = float(values[0])
    return None if weight == 1 else weight


def _extrapolate(strong: Prediction, weak: Prediction, weight: float | Tensor, channels: int | None) -> Prediction:
    def guide(a: Tensor, b: Tensor) -> Tensor:
        w = per_sample(weight.to(a.device), a) if isinstance(weight, Tensor) else weight
        if channels is None or channels >= a.shape[1]:
            return torch.lerp(b, a, w)
        return torch.cat([torch.lerp(b[:, :channels], a[:, :channels], w), a[:, channels:]], dim=1)

    return Prediction(guide(strong.x0, weak.x0), guide(strong.eps, weak.eps), strong.variance)
