"""Metrics as plain formulas, for comparison."""

from collections.abc import Sequence

import torch
from torch import Tensor


def inception_score(logits: Sequence[Tensor]) -> float:
    """exp of the mean divergence of p(y|x) from p(y) (Salimans et al. 2016), averaged over chunks of logits (N, K).

    The ADM evaluator takes consecutive chunks of 5,000 in file order, and a shorter last chunk counts like the rest.
    """
    scores = []
    for chunk in logits:
        log_p = chunk.double().log_softmax(1)
        p = log_p.exp()
        marginal = p.mean(0)
        scores.append(((p * log_p).sum(1).mean() - torch.special.xlogy(marginal, marginal).sum()).exp())
    return float(torch.stack(scores).mean())
