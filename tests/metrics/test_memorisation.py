"""Copies of training images: planted copies are found, other images are not, and the interval covers the true share."""

from functools import cache

import pytest
import torch
from scipy.stats import binomtest

from benchmarks.planted import draws
from diffbench.data.digits import DigitsConfig, digits
from diffbench.data.sets import ImageSet
from diffbench.data.shapes import ShapesConfig, shapes
from diffbench.metrics.copies import CopyDetector
from diffbench.metrics.memorisation import Memorisation, share_of_copies

SETS = {
    "digits": lambda: digits(DigitsConfig()),
    "shapes16": lambda: shapes(ShapesConfig(count=4000, held_out=1000)),
}


@cache
def sets(name: str) -> tuple[ImageSet, ImageSet]:
    return SETS[name]()


@pytest.mark.parametrize("name", SETS)
def test_one_percent_of_planted_copies_is_found_in_19_of_20_draws(name: str) -> None:
    found = draws(*sets(name), [0.01], seed=3)[0.01]
    assert sum(d.passed for d in found) >= 19
    assert sum(d.covered for d in found) >= 19
    for kind in ("exact", "flipped"):
        flagged, planted = (sum(n) for n in zip(*(d.found([kind]) for d in found), strict=True))
        assert flagged == planted > 0


def test_the_interval_covers_the_planted_share() -> None:
    for share, found in draws(*sets("digits"), [0, 0.05, 0.2], seed=4).items():
        assert sum(d.covered for d in found) >= 19
        assert sum(d.share.value for d in found) / len(found) == pytest.approx(share, abs=0.01)


def test_flips_change_nothing_and_distances_are_those_of_the_components() -> None:
    train, test = sets("digits")
    detector, images = CopyDetector(train.images), test.images[:50]
    for plain, flipped in zip(detector.judge(images), detector.judge(images.flip(3)), strict=True):
        assert torch.allclose(plain.double(), flipped.double(), rtol=1e-4)
    both = [torch.cdist(detector._project(x), detector.points) for x in (images, images.flip(3))]
    distance = torch.minimum(*both).sort(stable=True)
    near = detector.judge(images).nearest
    assert torch.equal(near, distance.indices[:, 0])
    own = [torch.cdist(detector._project(x), detector.points) for x in (train.images, train.images.flip(3))]
    among = torch.minimum(*own).fill_diagonal_(torch.inf).amin(1)
    ratio = distance.values[:, 0] / among[distance.indices[:, :5]].median(1).values.maximum(distance.values[:, 1])
    assert torch.allclose(detector.judge(images).ratio, ratio, atol=0.01)
    assert torch.equal(detector.judge(images).authentic, distance.values[:, 0] > among[near])


def test_a_duplicated_training_image_is_found_but_not_one_with_many_duplicates() -> None:
    train, test = sets("digits")
    many = train.images[:10].repeat_interleave(8, 0)
    detector = CopyDetector(torch.cat([train.images[10:], train.images[50:60], many]))
    threshold = detector.calibrate(test.images.split(100)).threshold
    assert (detector.judge(train.images[50:60]).ratio < threshold).sum() >= 9
    assert (detector.judge(train.images[:10]).ratio > 0.9).all()


def test_large_images_are_downsampled_and_identical_images_are_not_copies() -> None:
    x = torch.randint(0, 256, (40, 1, 80, 50), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    detector = CopyDetector(x)
    assert detector._parts(x)[0].shape == (40, 32 * 16)
    assert (detector.judge(x).ratio < 0.1).all() and detector.judge(x).nearest.tolist() == list(range(40))
    same = CopyDetector(x[:1].expand(30, -1, -1, -1))
    assert same.judge(x[:1]).ratio.item() == pytest.approx(1, abs=0.1)
    with pytest.raises(ValueError, match="copy detection needs at least 20 training images, got 5"):
        CopyDetector(x[:5])


@pytest.mark.parametrize(("flagged", "count", "false", "real"), [(0, 50, 0, 40), (7, 500, 2, 360), (50, 50, 1, 40)])
def test_the_share_of_copies_corrects_for_false_alarms(flagged: int, count: int, false: int, real: int) -> None:
    share = share_of_copies(flagged, count, false, real)
    p, f = (binomtest(k, n).proportion_ci(0.975, "exact") for k, n in ((flagged, count), (false, real)))
    assert share.value == pytest.approx((flagged / count - false / real) / (1 - false / real))
    assert share.low == pytest.approx(max(0, (p.low - f.high) / (1 - f.high)))
    assert share.high == pytest.approx((p.high - f.low) / (1 - f.low))


def test_scores_of_a_mixture_of_copies_and_held_out_images() -> None:
    train, test = sets("digits")
    detector = CopyDetector(train.images)
    detector.calibration = detector.calibrate(test.images[:180].split(100))
    metric = Memorisation(detector, 200)
    images = torch.cat([train.images[:20], test.images[180:]])
    for index in torch.arange(200).split(64):
        metric.update(images[index], index)
    found = metric.compute()
    assert found["copies"] == pytest.approx(0.1, abs=0.015) and found["copies_low"] < 0.1 < found["copies_high"]
    assert 0.4 < found["authenticity"] < 0.6 and detector.calibration.authenticity == pytest.approx(0.56, abs=0.05)
    assert 20 <= metric.flagged() <= 23
