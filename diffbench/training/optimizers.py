"""The optimizers that `optimizer.name` selects."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Adam, AdamW, Muon, Optimizer

from diffbench.config.sections import OptimizerConfig
from diffbench.core.errors import UserError


def build_optimizer(settings: OptimizerConfig, network: nn.Module) -> Optimizer:
    """Build the optimizer of a network; UserError for Muon on a network without linear layers in blocks."""
    lr, betas, weight_decay = settings.lr, (settings.betas[0], settings.betas[1]), settings.weight_decay
    if settings.name == "muon":
        return MuonAdamW(network, lr, betas, weight_decay)
    kind = AdamW if settings.name == "adamw" else Adam
    return kind(network.parameters(), lr=lr, betas=betas, weight_decay=weight_decay, fused=True)


def hidden_matrices(network: nn.Module) -> list[nn.Parameter]:
    """Return the weights of linear layers inside blocks: those in a ModuleList's or Sequential's submodules."""
    lists = [m for m in network.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    blocks = [block for m in lists for block in m if not isinstance(block, nn.Linear)]
    inside = {id(layer.weight) for b in blocks for layer in b.modules() if isinstance(layer, nn.Linear)}
    return [p for p in network.parameters() if id(p) in inside]


class MuonAdamW(Optimizer):
    """Muon (Jordan et al. 2024) for the matrices of the hidden layers, AdamW for all other parameters.

    Muon's updates are scaled to the root mean square of AdamW's (Liu et al. 2025, "Muon is Scalable for LLM Training",
    eq. 4), so both share one learning rate and weight decay. torch's Muon accepts only matrices, so convolutions use
    AdamW. `betas` are AdamW's; Muon's momentum is 0.95.
    """

    def __init__(self, network: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        matrices = hidden_matrices(network)
        if not matrices:
            raise UserError(
                "optimizer.name: muon needs linear layers in blocks, which this network lacks; choose adamw"
            )
        known = {id(p) for p in matrices}
        others = [p for p in network.parameters() if id(p) not in known]
        muon = Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.parts = (muon, AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay, fused=True))
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state  # loading a checkpoint replaces both
            part.step()
        return loss
