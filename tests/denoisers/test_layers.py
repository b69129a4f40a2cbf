"""Layers that the denoisers share: time features, position tables, windows."""

from typing import Any

import pytest
import torch
from golden_cases import load
from small_networks import small

from diffbench.denoisers.layers import (
    from_windows,
    relative_position_index,
    timestep_embedding,
    to_windows,
)
from diffbench.denoisers.positions import sincos_position_table


@pytest.mark.parametrize("call", load("timestep_embedding").info["calls"], ids=lambda c: c["name"])
def test_time_features_equal_the_reference(call: dict[str, Any]) -> None:
    case = load("timestep_embedding")
    t = case.tensors[next(iter(call["inputs"].values()))]
    case.check(call["name"], timestep_embedding(t, **call["args"]))


@pytest.mark.parametrize(("width", "grid"), [(32, 4), (48, 8)])
def test_position_table_equals_the_reference(width: int, grid: int) -> None:
    load("pos_embed_2d").check(f"dim{width}.grid{grid}", sincos_position_table(width, grid, grid))


def test_the_position_table_of_an_oblong_grid_is_part_of_a_square_one() -> None:
    table = sincos_position_table(16, 2, 5)
    assert table.shape == (10, 16)
    assert torch.equal(table[:5], sincos_position_table(16, 5, 5)[:5])  # row 0
    assert torch.equal(table[5:], sincos_position_table(16, 5, 5)[5:10])


@pytest.mark.parametrize("window", [4, 8])
def test_relative_positions_equal_the_reference(window: int) -> None:
    load("relative_position_index").check(f"window{window}", relative_position_index(window))


def test_windows_contain_their_pixels_and_are_reversible() -> None:
    x = torch.arange(2 * 3 * 4 * 8).reshape(2, 3, 4, 8)
    tokens = to_windows(x, 2)
    assert tokens.shape == (16, 4, 3)
    assert torch.equal(from_windows(tokens, 2, 4, 8), x)
    for b, row, col in [(0, 0, 0), (0, 1, 3), (1, 2, 5), (1, 3, 7)]:
        window = b * 8 + row // 2 * 4 + col // 2
        assert torch.equal(tokens[window, row % 2 * 2 + col % 2], x[b, :, row, col])


def test_relative_positions_of_an_oblong_window_have_one_row_per_offset() -> None:
    index = relative_position_index(2, 3)
    assert index.shape == (6, 6)
    assert (index.min(), index.max()) == (0, 14)
    where = [(row, col) for row in range(2) for col in range(3)]
    offsets = {(a[0] - b[0], a[1] - b[1]): set() for a in where for b in where}
    for i, a in enumerate(where):
        for j, b in enumerate(where):
            offsets[a[0] - b[0], a[1] - b[1]].add(int(index[i, j]))
    assert sorted(row for rows in offsets.values() for row in rows) == list(range(15))  # one row per offset


def test_fourier_frequencies_are_saved_and_drawn_once() -> None:
    net = small("diffit", time_features="fourier", fourier_scale=0.01)
    frequencies = net.state_dict()["condition.fourier.frequencies"]
    assert frequencies.shape == (128,)
    assert 0.005 < frequencies.std() < 0.02
    with pytest.raises(ValueError, match=r"^denoiser\.fourier_scale: belongs to denoiser\.time_features=fourier; else"):
        small("unet", fourier_scale=0.01)
