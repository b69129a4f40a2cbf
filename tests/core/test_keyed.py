"""Keyed random numbers: published test vectors, independence of batch and order, and distributions."""

import math

import pytest
import torch
from torch import Tensor

from diffbench.core import rng

N = 200_000
ONES = 0xFFFFFFFF
KEY = 13527713158724147111
WORDS = [[128387594, 606793134], [2958628629, 1508585690]]
ORDER = [6, 5, 3, 4, 0, 1, 7, 2]


def words_of(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_matches_the_published_vectors(counter: str, key: str, want: str) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in words_of(counter))
    low, high = words_of(key)
    assert [int(w) for w in rng.philox((c0, c1, c2, c3), high << 32 | low)] == words_of(want)


def test_words_are_philox_of_block_and_position() -> None:
    key, want = 0x299F31D0A4093822, []
    for block in range(3):
        c0, c1, c2, c3 = (torch.tensor([v]) for v in (block, 0, 5, 7))
        want += [int(word) for word in rng.philox((c0, c1, c2, c3), key)]
    assert rng.words(key, torch.tensor([7 << 32 | 5]), 10)[0].tolist() == want[:10]


def test_all_64_bits_of_key_and_position_are_used() -> None:
    position = torch.tensor([0])
    plain = rng.words(0, position, 4)
    for bit in (0, 31, 32, 63):
        assert not torch.equal(rng.words(1 << bit, position, 4), plain)
    for bit in (0, 31, 32, 62):
        assert not torch.equal(rng.words(0, torch.tensor([1 << bit]), 4), plain)


def test_different_parts_give_different_keys() -> None:
    keys = [
        rng.key(0, "noise"),
        rng.key(2**32, "noise"),
        rng.key(2**64, "noise"),
        rng.key("0", "noise"),
        rng.key(0, "time"),
        rng.key(0, "order", 1),
        rng.key(1, "order", 0),
        rng.key(0, "order", 10),
        rng.key(0, "order", 1, 0),
        rng.key(0),
    ]
    assert len(set(keys)) == len(keys)
    assert all(0 <= k < 2**64 for k in keys)
    assert rng.key(0, "noise") == rng.key(0, "noise")


def test_keys_and_numbers_never_change() -> None:
    # Runs are resumed and compared across versions, so these values are part of the format.
    assert rng.key(0, "noise") == KEY
    assert rng.words(rng.key(0, "noise"), torch.tensor([0, 1]), 2).tolist() == WORDS
    assert rng.permutation(rng.key(0, "order", 0), 8).tolist() == ORDER


@pytest.mark.parametrize("shape", [(1,), (3,), (7, 5), (3, 8, 8), (1, 5, 7), (2, 1, 31)])
def test_numbers_do_not_depend_on_the_batch(shape: tuple[int, ...]) -> None:
    key, positions = rng.key(3, "noise"), torch.arange(37) * 1_000_003
    whole, u = rng.normal(key, positions, shape), rng.uniform(key, positions)
    for batch in (1, 2, 3, 5, 8, 16, 36):
        parts = positions.split(batch)
        assert torch.equal(torch.cat([rng.normal(key, p, shape) for p in parts]), whole)
        assert torch.equal(torch.cat([rng.uniform(key, p) for p in parts]), u)
    order = rng.permutation(1, 37)
    assert torch.equal(rng.normal(key, positions[order], shape), whole[order])


def test_normal_is_contiguous_float32_of_the_requested_shape() -> None:
    x = rng.normal(0, torch.arange(5), (3, 5, 7))
    assert (x.shape, x.dtype, x.is_contiguous()) == ((5, 3, 5, 7), torch.float32, True)
    assert rng.uniform(0, torch.arange(5)).dtype == torch.float64
    assert rng.normal(0, torch.arange(0), (2, 2)).shape == (0, 2, 2)


@pytest.mark.parametrize(("word", "low", "high"), [(0, 0.0, 1e-15), (ONES, 1 - 1e-15, 1.0)])
def test_uniform_stays_inside_the_open_interval(
    monkeypatch: pytest.MonkeyPatch, word: int, low: float, high: float
) -> None:
    monkeypatch.setattr(rng, "philox", lambda *_: [torch.full((1, 1), word).numpy().view("uint64")] * 4)
    assert low < rng.uniform(0, torch.arange(1)).item() < high


def test_normal_is_finite_for_every_word(monkeypatch: pytest.MonkeyPatch) -> None:
    edge = torch.tensor([0, 1, ONES - 1, ONES])
    pairs = torch.cartesian_prod(edge, edge)
    monkeypatch.setattr(rng, "words", lambda *_: pairs)
    x = rng.normal(0, torch.arange(len(pairs)), (2,))
    assert bool(x.isfinite().all())
    assert x.abs().max().item() == pytest.approx(math.sqrt(64 * math.log(2)), rel=1e-6)


def moments(x: Tensor) -> tuple[float, float, float, float]:
    """Return mean, variance, skewness and kurtosis."""
    x = x.double()
    centred = x - x.mean()
    variance = centred.square().mean()
    third, fourth = (((centred**p).mean() / variance ** (p / 2)).item() for p in (3, 4))
    return x.mean().item(), variance.item(), third, fourth


# Bounds are five standard errors of the statistic.
@pytest.mark.parametrize("across", ["positions", "pixels"])
def test_normal_numbers_are_normally_distributed(across: str) -> None:
    count = N if across == "positions" else 2
    x = rng.normal(rng.key(0, "noise"), torch.arange(count), (N * 2 // count,)).flatten()
    error = 5 / math.sqrt(x.numel())
    mean, variance, skewness, kurtosis = moments(x)
    assert abs(mean) < error
    assert abs(variance - 1) < error * math.sqrt(2)
    assert abs(skewness) < error * math.sqrt(6)
    assert abs(kurtosis - 3) < error * math.sqrt(24)
    for level, share in ((0.0, 0.5), (1.0, 0.158655), (2.0, 0.022750), (3.0, 0.001350)):
        assert abs((x > level).double().mean().item() - share) < error * math.sqrt(share * (1 - share))


def test_uniforms_match_the_words_of_each_key() -> None:
    keys, positions = (rng.key(0, "time"), 2**64 - 1, 0), torch.tensor([0, 5, 2**33 + 1, 2**62])
    rows = rng.uniforms(keys, positions)
    assert rows.shape == (3, 4) and rows.dtype == torch.float64
    for key, row in zip(keys, rows, strict=True):
        w = rng.words(key, positions, 2)
        assert torch.equal(row, ((w[:, 0] >> 6 << 26 | w[:, 1] >> 6).double() + 0.5) * 2.0**-52)


def test_uniform_numbers_are_uniformly_distributed() -> None:
    u = rng.uniform(rng.key(0, "time"), torch.arange(N))
    error = 5 / math.sqrt(N)
    mean, variance, _, kurtosis = moments(u)
    assert abs(mean - 0.5) < error * math.sqrt(1 / 12)
    assert abs(variance - 1 / 12) < error * math.sqrt(1 / 180)
    assert abs(kurtosis - 1.8) < 0.02
    expected = N / 100
    chi_square = ((u * 100).long().bincount(minlength=100) - expected).square().sum().item() / expected
    assert abs(chi_square - 99) < 5 * math.sqrt(2 * 99)


def test_neighbouring_numbers_are_uncorrelated() -> None:
    x = rng.normal(rng.key(0, "noise"), torch.arange(N // 4), (4,)).double()
    other = rng.normal(rng.key(1, "noise"), torch.arange(N // 4), (4,)).double()
    error = 5 / math.sqrt(N // 4)
    correlation = x.T.corrcoef() - torch.eye(4, dtype=torch.float64)
    assert correlation.abs().max() < error  # within a sample
    assert (x[1:] * x[:-1]).mean(0).abs().max() < error  # from one position to the next
    assert (x * other).mean(0).abs().max() < error  # from one seed to the next
    assert (x[:, 0].square() - 1).mul(x[:, 1].square() - 1).mean().abs() < 2 * error  # a Box-Muller pair


@pytest.mark.parametrize("n", [1, 2, 10, 1437])
def test_a_permutation_contains_every_number_once(n: int) -> None:
    order = rng.permutation(rng.key(0, "order", 0), n)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(n))


def test_permutations_differ_by_seed_and_epoch() -> None:
    orders = {
        tuple(rng.permutation(rng.key(seed, "order", epoch), 100).tolist())
        for seed in (0, 1, 2**32)
        for epoch in (0, 1, 2)
    }
    assert len(orders) == 9


def test_every_number_is_equally_likely_in_every_place() -> None:
    firsts = torch.stack([rng.permutation(rng.key(0, "order", e), 5) for e in range(2000)])
    for place in range(5):
        counts = firsts[:, place].bincount(minlength=5)
        assert (counts - 400).abs().max() < 5 * math.sqrt(2000 * 0.2 * 0.8)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    rng.normal(0, torch.arange(9), (3, 3))
    rng.uniform(0, torch.arange(9))
    rng.permutation(0, 9)
    assert torch.equal(torch.get_rng_state(), before)
