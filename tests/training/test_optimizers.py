"""Muon: the parameters it takes, its steps next to AdamW's, and the settings it is refused with."""

import copy

import pytest
import torch
from small_networks import inputs, small
from torch import nn

from diffbench.config.load import load
from diffbench.config.sections import OptimizerConfig
from diffbench.core.errors import UserError
from diffbench.denoisers import DENOISERS
from diffbench.training.optimizers import build_optimizer, hidden_matrices


@pytest.mark.parametrize("name", DENOISERS)
def test_muon_takes_the_matrices_of_blocks_and_adamw_the_rest(name: str) -> None:
    network = small(name)
    muon, adamw = (group["params"] for group in build_optimizer(OptimizerConfig("muon"), network).param_groups)
    assert {id(p) for p in [*muon, *adamw]} == {id(p) for p in network.parameters()}
    assert len(muon) + len(adamw) == len(list(network.parameters()))
    names = {id(p): n for n, p in network.named_parameters()}
    taken = {names[id(p)] for p in muon}
    assert all(p.ndim == 2 for p in muon) and all(n.endswith("weight") for n in taken)
    assert not any(n.startswith(("condition.", "label.", "time.", "patch.", "final", "head.")) for n in taken)
    if name == "dit":
        assert taken == {
            f"blocks.{i}.{n}.weight" for i in range(2) for n in ("qkv", "proj", "mlp.0", "mlp.2", "modulation.1")
        }


def test_steps_equal_those_of_torchs_muon_and_adamw() -> None:
    network = small("dit").requires_grad_(True)
    twin = copy.deepcopy(network)
    ours = build_optimizer(OptimizerConfig("muon", lr=1e-2, weight_decay=0.1, betas=[0.9, 0.95]), network)
    matrices = hidden_matrices(twin)
    others = [p for p in twin.parameters() if all(p is not m for m in matrices)]
    theirs = (
        torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), fused=True),
    )
    for step in range(4):
        for net in (network, twin):
            net.zero_grad()
            net(*inputs()).square().mean().backward()
        ours.step()
        for optimizer in theirs:
            optimizer.step()
        if step == 1:  # saving and loading the state changes nothing
            ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    for a, b in zip(network.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_network_without_hidden_matrices_is_refused() -> None:
    with pytest.raises(UserError, match=r"optimizer\.name: muon needs linear layers in blocks"):
        build_optimizer(OptimizerConfig("muon"), nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Linear(4, 4)))


def test_muon_is_refused_with_sharded_matrices() -> None:
    with pytest.raises(UserError, match=r"optimizer\.name: muon needs whole matrices"):
        load("experiments/digits/dit.yaml", ["optimizer.name=muon", "trainer.strategy=fsdp", "trainer.devices=2"])
