"""EDM's augmentation: exact flips, known geometry, labels that record the changes, draws by position."""

import math

import pytest
import torch

from diffbench.config.sections import AUGMENT_WIDTH
from diffbench.training import augment as module
from diffbench.training.augment import augment


def images(n: int, side: int = 8) -> torch.Tensor:
    return torch.rand(n, 2, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


def test_at_probability_zero_images_are_only_mirrored_bit_for_bit() -> None:
    x = images(200)
    out, label = augment(x, torch.arange(200), seed=3, probability=0.0)
    assert label.shape == (200, AUGMENT_WIDTH)
    assert (label[:, 1:] == 0).all()
    mirrored = label[:, 0] == 1
    assert 70 < mirrored.sum() < 130
    assert torch.equal(out[mirrored], x[mirrored].flip(3))
    assert torch.equal(out[~mirrored], x[~mirrored])


def test_draws_depend_on_seed_and_position() -> None:
    x, position = images(32), torch.arange(100, 132)
    whole = augment(x, position, 1, 0.5)
    part = augment(x[10:20], position[10:20], 1, 0.5)
    assert torch.equal(part[1], whole[1][10:20])
    assert torch.allclose(part[0], whole[0][10:20], atol=1e-12)
    assert not torch.equal(augment(x, position, 2, 0.5)[1], whole[1])


def test_each_change_has_the_requested_frequency_and_the_published_size() -> None:
    label = augment(torch.zeros(20_000, 1, 2, 2), torch.arange(20_000), 0, 0.12)[1].double()
    changed = label != 0
    share = [0.5, 0.06, 0.12, 0.12, 0.12, 0.12, 0.12, 0.12, 0.12]
    assert changed.double().mean(0).tolist() == pytest.approx(share, abs=0.01)
    for column in (2, 7, 8):  # octaves of scale, and shifts: standard normal where applied
        assert label[changed[:, column], column].std().item() == pytest.approx(1, abs=0.05)
    stretch = label[:, 5:7].square().sum(1)
    assert stretch[stretch > 0].mean().item() == pytest.approx(1, abs=0.08)
    turned = label[changed[:, 4]]
    assert ((turned[:, 3] + 1) ** 2 + turned[:, 4] ** 2).tolist() == pytest.approx([1.0] * len(turned), abs=1e-5)
    assert torch.equal(changed[:, 7], changed[:, 8])


def fixed(monkeypatch: pytest.MonkeyPatch, **drawn: float) -> None:
    """Replace every draw by a given number: changes named in `drawn` happen, the others do not."""
    gates = {"right": "shift", "down": "shift"}
    happening = {f"whether {gates.get(k, k)}" for k in drawn}

    def key(_seed: int, _what: str, name: str) -> str:
        return name

    def uniform(name: str, position: torch.Tensor) -> torch.Tensor:
        default = 0.0 if name in happening else 0.99
        return torch.full((len(position),), drawn.get(name, default), dtype=torch.float64)

    def normal(name: str, position: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.full((len(position), *shape), drawn.get(name, 0.0))

    for name, function in (("key", key), ("uniform", uniform), ("normal", normal)):
        monkeypatch.setattr(module.rng, name, function)


def axis(side: int) -> torch.Tensor:
    return torch.arange(side, dtype=torch.float64) - (side - 1) / 2


def blob(dy: float, dx: float, width: int = 64) -> torch.Tensor:
    """Return an image, 64 pixels high, of a soft dot (dy, dx) pixels from the centre."""
    return torch.exp(-((axis(64)[:, None] - dy) ** 2 + (axis(width)[None] - dx) ** 2) / 18)[None, None]


def centre(x: torch.Tensor) -> list[float]:
    down, right = axis(x.shape[2]), axis(x.shape[3])
    return [float((x[0, 0].sum(1) * down).sum() / x.sum()), float((x[0, 0].sum(0) * right).sum() / x.sum())]


@pytest.mark.parametrize("width", [64, 96])
@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        ({"flip": 0.0}, [-6.0, 10.0]),
        ({"scale": 1.0}, [6 * 2**0.2, 10 * 2**0.2]),
        ({"angle": 0.75}, [-10.0, 6.0]),  # by pi / 2: right becomes up
        ({"stretch": 1.0, "direction": 0.5}, [6 * 2**-0.2, 10 * 2**0.2]),
        ({"down": 0.5}, [6 + 4.0, 10.0]),
        ({"right": 1.0}, [6.0, 10.0]),  # an eighth of the width
    ],
)
def test_each_change_moves_a_dot_as_its_geometry_requires(
    drawn: dict[str, float], expected: list[float], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed(monkeypatch, **drawn)
    out, label = augment(blob(6, 10, width), torch.arange(1), 0, 0.5)
    expected = [expected[0], expected[1] + drawn.get("right", 0) * width / 8]
    assert (label != 0).any()
    found = centre(out)
    if "angle" in drawn:
        assert sorted(map(abs, found)) == pytest.approx([6, 10], abs=0.2)
        assert math.hypot(*found) == pytest.approx(math.hypot(6, 10), abs=0.2)
        assert abs(found[0] * 6 + found[1] * 10) < 3  # at a right angle to where it was
    else:
        assert found == pytest.approx(expected, abs=0.25)
