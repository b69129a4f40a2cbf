"""Conversion between bytes and [-1, 1]: values outside the range never wrap around."""

import torch

from diffbench.core.pixels import from_uint8, to_uint8


def test_trap_6_bytes_survive_a_round_trip_and_other_values_never_wrap() -> None:
    levels = torch.arange(256).to(torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)
    assert to_uint8(torch.tensor([-1.004, 1.004, -9.0, 9.0])).tolist() == [0, 255, 0, 255]


def test_non_finite_values_become_bytes() -> None:
    x = torch.tensor([-1.5, -1.002, 0.0, 1.002, 1.5, 2.0, float("nan"), float("inf")])
    assert to_uint8(x).tolist() == [0, 0, 128, 255, 255, 255, 0, 255]
