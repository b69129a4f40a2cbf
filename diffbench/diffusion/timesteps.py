"""Training times: quantiles and strata from uniform u in (0, 1), and importance sampling by the loss."""

import math
from typing import Any

import torch
from torch import Tensor


def normal_quantiles(u: Tensor, mean: float, std: float) -> Tensor:
    """Return quantiles u (B,) of a normal distribution, float64; exp makes them log-normal, sigmoid logit-normal.

    A float32 u may have been rounded to 0 or 1, where quantiles are infinite, so u is clamped to just inside (0, 1).
    """
    least = 2.0**-53
    return mean + std * torch.special.ndtri(u.double().clamp(least, 1 - least))


def stratified(u: Tensor, index: Tensor, total: int) -> Tensor:
    """Move u (B,) into stratum `index` of `total`, so that a batch covers (0, 1) evenly (Kingma et al. 2021, §I.1).

    Args:
        u: (B,) uniform in (0, 1).
        index: (B,) positions of the samples in the global batch, so that the number of ranks does not matter.
        total: size of the global batch.
    """
    return (index + u.double()) / total


class LossAware:
    """Importance sampling of steps by the root mean square of their recent losses (Nichol & Dhariwal 2021, §3.3).

    Sampling is uniform until every step has a full history. The draws depend on past losses, so a run that uses it
    cannot be paired with other runs by seed, and its history belongs in the checkpoint.

    Args:
        steps: T.
        history: number of losses remembered per step.
        uniform: fraction of the draws that stay uniform, so that no step is starved.
    """

    def __init__(self, steps: int, history: int = 10, uniform: float = 0.001) -> None:
        self.uniform = uniform
        self.losses = torch.zeros(steps, history, dtype=torch.float64)
        self.counts = torch.zeros(steps, dtype=torch.int64)

    def probabilities(self) -> Tensor:
        """Return the probability of each step, (T,) float64."""
        steps, history = self.losses.shape
        if bool((self.counts < history).any()):
            return torch.full((steps,), 1 / steps, dtype=torch.float64)
        rms = self.losses.square().mean(1).sqrt()
        return (1 - self.uniform) * rms / rms.sum() + self.uniform / steps

    def time(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Map u (B,), uniform in (0, 1), to steps (B,) int64 and the weights (B,) that keep the mean loss unbiased."""
        p = self.probabilities()
        t = torch.searchsorted(p.cumsum(0), u.double().cpu(), right=True).clamp(max=len(p) - 1)
        return t.to(u.device), (1 / (len(p) * p[t])).to(u.device)

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Record the unweighted losses (B,) of steps t (B,), in the order of the global batch; skip non-finite ones."""
        for step, loss in zip(t.tolist(), losses.double().tolist(), strict=True):
            if not math.isfinite(loss):
                continue
            self.losses[step] = torch.cat([self.losses[step, 1:], torch.tensor([loss], dtype=torch.float64)])
            self.counts[step] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Return the history, for the checkpoint."""
        return {"losses": self.losses.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a history.

        Raises:
            ValueError: if the number of steps or the length of the history differs.
        """
        if state["losses"].shape != self.losses.shape:
            raise ValueError(
                f"the loss history has shape {tuple(state['losses'].shape)} (steps, losses), "
                f"but this run's has {tuple(self.losses.shape)}"
            )
        self.losses, self.counts = state["losses"].clone(), state["counts"].clone()
