"""Training times: from u, uniform in (0, 1), to quantiles and strata, and importance sampling by the loss."""

import math
from typing import Any

import torch
from torch import Tensor


def normal_quantiles(u: Tensor, mean: float, std: float) -> Tensor:
    """Quantiles u (B,) of a normal distribution, float64; exp and sigmoid make them log-normal and logit-normal.

    A float32 u can be rounded to 0 or 1, where they are infinite: it is kept just inside.
    """
    least = 2.0**-53
    return mean + std * torch.special.ndtri(u.double().clamp(least, 1 - least))


def stratified(u: Tensor, index: Tensor, total: int) -> Tensor:
    """u (B,) moved into stratum `index` of `total`, so that a batch covers (0, 1) evenly (Kingma et al. 2021, §I.1).

    Args:
        u: (B,) uniform in (0, 1).
        index: (B,) the sample's place in the global batch, so that the layout of processes changes nothing.
        total: samples of the global batch.
    """
    return (index + u.double()) / total


class LossAware:
    """Importance sampling of steps by the root mean square of their last losses (Nichol & Dhariwal 2021, §3.3).

    Uniform until every step has a full history. What it draws depends on the past, so a run that uses it is not paired
    with others; its history belongs in the checkpoint.

    Args:
        steps: T.
        history: losses remembered of each step.
        uniform: share of the draws that stay uniform, so that no step is forgotten.
    """

    def __init__(self, steps: int, history: int = 10, uniform: float = 0.001) -> None:
        self.uniform = uniform
        self.losses = torch.zeros(steps, history, dtype=torch.float64)
        self.counts = torch.zeros(steps, dtype=torch.int64)

    def probabilities(self) -> Tensor:
        """(T,) float64, of each step."""
        steps, history = self.losses.shape
        if bool((self.counts < history).any()):
            return torch.full((steps,), 1 / steps, dtype=torch.float64)
        size = self.losses.square().mean(1).sqrt()
        return (1 - self.uniform) * size / size.sum() + self.uniform / steps

    def time(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Steps (B,) int64 for u (B,) uniform in (0, 1), and the weights (B,) that keep the mean loss unbiased."""
        p = self.probabilities()
        t = torch.searchsorted(p.cumsum(0), u.double().cpu(), right=True).clamp(max=len(p) - 1)
        return t.to(u.device), (1 / (len(p) * p[t])).to(u.device)

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Remember the unweighted losses (B,) of steps t (B,), of the global batch and in its order; no NaN."""
        for step, loss in zip(t.tolist(), losses.double().tolist(), strict=True):
            if not math.isfinite(loss):
                continue
            self.losses[step] = torch.cat([self.losses[step, 1:], torch.tensor([loss], dtype=torch.float64)])
            self.counts[step] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """The history, for the checkpoint."""
        return {"losses": self.losses.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a history.

        Raises:
            ValueError: if it is of another number of steps or another length.
        """
        if state["losses"].shape != self.losses.shape:
            raise ValueError(
                f"the loss history is of {tuple(state['losses'].shape)} steps and losses, "
                f"this run's of {tuple(self.losses.shape)}"
            )
        self.losses, self.counts = state["losses"].clone(), state["counts"].clone()
