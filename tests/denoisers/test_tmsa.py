"""Time-dependent attention: what DiffiT's three temporal projections can and cannot do."""

from typing import Any

import pytest
import torch
from torch import Tensor

from diffbench.denoisers.tmsa import TMSA


def tmsa() -> tuple[TMSA, Tensor, Tensor]:
    """Return a float64 TMSA without zero parameters, tokens of 3 windows in each of 2 samples, and two times."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = TMSA(dim=8, num_heads=2, window=2, time_dim=6).double()
        for p in net.parameters():
            p.data += 0.3 * torch.randn_like(p)
        return net, torch.randn(6, 4, 8, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)


def test_time_in_the_keys_of_tmsa_has_no_effect() -> None:
    """The softmax cancels what is the same for every key, so a third of the time projection is unused."""
    net, tokens, time = tmsa()
    out = net(tokens, time)
    out.square().sum().backward()
    for p in (net.qkv_time.weight, net.qkv_time.bias):
        assert p.grad is not None
        query, key, value = p.grad.chunk(3)
        assert query.abs().max() > 1e-3
        assert value.abs().max() > 1e-3
        assert key.abs().max() < 1e-10 * query.abs().max()
    with torch.no_grad():
        net.qkv_time.weight[8:16] = 5 * torch.randn(8, 6, dtype=torch.float64)
        net.qkv_time.bias[8:16] = 5.0
        assert (net(tokens, time) - out).abs().max() < 1e-10
        net.qkv_time.weight[:8] += 1.0
        assert (net(tokens, time) - out).abs().max() > 1e-2


def test_time_in_the_values_of_tmsa_shifts_every_token_equally() -> None:
    net, tokens, time = tmsa()
    with torch.no_grad():
        out = net(tokens, time)
        weight = net.qkv_time.weight[16:].clone()
        net.qkv_time.weight[16:] = 0
        shift = (out - net(tokens, time)).reshape(2, 3, 4, 8)
    want = time @ weight.T @ net.proj.weight.T
    assert (shift - want[:, None, None]).abs().max() < 1e-12


def test_all_windows_of_a_sample_get_its_time() -> None:
    net, tokens, time = tmsa()
    with torch.no_grad():
        both, second = net(tokens, time), net(tokens[3:], time[1:])
    assert (both[3:] - second).abs().max() < 1e-12


def test_the_full_form_of_tmsa_equals_the_fused_two_terms() -> None:
    """Time adds q_t.k_j to the logits of key j, the same for every query, and W_o v_t to every token."""
    net, tokens, time = tmsa()
    with torch.no_grad():
        full = net(tokens, time)
        q, k, v = net.qkv(tokens).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        q_time, _, v_time = net.qkv_time(time.repeat_interleave(3, dim=0)).unflatten(-1, (3, 2, 4)).permute(1, 0, 2, 3)
        per_key = torch.einsum("bhd,bhmd->bhm", q_time, k)[:, :, None]
        logits = (torch.einsum("bhnd,bhmd->bhnm", q, k) + per_key) / 2 + net.bias[net.bias_index].permute(2, 0, 1)
        h = torch.einsum("bhnm,bhmd->bnhd", logits.softmax(-1), v) + v_time[:, None]
        assert (net.proj(h.flatten(2)) - full).abs().max() < 1e-13


@pytest.mark.parametrize(("without_keys", "same"), [("qv", "qkv"), ("q", "qk"), ("v", "kv")])
def test_time_parts_without_keys_equal_those_with_keys(without_keys: Any, same: Any) -> None:
    full, tokens, time = tmsa()
    nets = [TMSA(8, 2, 2, 6, parts).double() for parts in (without_keys, same)]
    rows = {"q": slice(0, 8), "k": slice(8, 16), "v": slice(16, 24)}
    for net, parts in zip(nets, (without_keys, same), strict=True):
        chosen = {
            f"qkv_time.{name}": torch.cat([p[rows[part]] for part in parts])
            for name, p in full.qkv_time.named_parameters()
        }
        net.load_state_dict(full.state_dict() | chosen)
    with torch.no_grad():
        assert (nets[0](tokens, time) - nets[1](tokens, time)).abs().max() < 1e-13
        assert (nets[0](tokens, time) - nets[0](tokens, 0 * time)).abs().max() > 1e-2
