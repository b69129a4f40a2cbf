"""Properties of the position-indexed order for any batch size, process layout and start."""

from itertools import islice

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffbench.data.datamodule import PositionDataset, PositionSampler
from diffbench.data.sets import ImageSet

SMALL = st.integers(1, 4)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(micro=SMALL, accumulate=SMALL, world=SMALL, step=st.integers(0, 10**12), steps=SMALL)
def test_every_layout_covers_the_same_positions_once(
    micro: int, accumulate: int, world: int, step: int, steps: int
) -> None:
    batch = micro * accumulate * world
    ranks = [PositionSampler(batch, accumulate, step * batch, rank, world) for rank in range(world)]
    seen = [list(islice(sampler, steps * accumulate)) for sampler in ranks]
    for s in range(steps):  # the positions of an optimizer step, over all ranks and micro-batches
        of_step = [p for rank in seen for part in rank[s * accumulate : (s + 1) * accumulate] for p in part]
        assert sorted(of_step) == list(range((step + s) * batch, (step + s + 1) * batch))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(size=st.integers(1, 50), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**6), cut=st.integers(0, 49))
def test_every_epoch_is_a_permutation_in_whatever_pieces_it_is_read(size: int, seed: int, epoch: int, cut: int) -> None:
    images = torch.arange(size, dtype=torch.uint8).reshape(size, 1, 1, 1)
    data = PositionDataset(ImageSet(images, torch.zeros(size, dtype=torch.int64), 1), seed)
    whole = data.index(epoch * size, size)
    assert whole.sort().values.tolist() == list(range(size))
    cut = min(cut, size - 1)
    parts = [data.index(epoch * size + a, b - a) for a, b in ((0, cut), (cut, size)) if a < b]
    assert torch.equal(torch.cat(parts), whole)
    across = data.index(epoch * size + cut, size)  # spans two epochs
    later = data.index((epoch + 1) * size, size)
    assert torch.equal(across, torch.cat([whole[cut:], later[:cut]]))
