"""Distances checked against independent formulas, and the digits classifier whose features they use."""

import numpy as np
import pytest
import scipy.linalg
import torch
from formulas import inception_score
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from diffbench.data.digits import DigitsConfig, digits
from diffbench.evaluation import reference as references
from diffbench.metrics.base import Gaussian, squared_distances
from diffbench.metrics.extractors.digits_cnn import DigitsCNN, train_digits_cnn
from diffbench.metrics.frechet import frechet, frechet_distance, frechet_infinity, gaussian
from diffbench.metrics.kernel import kernel_distance
from diffbench.metrics.neighbours import neighbours


def features(count: int, width: int, seed: int) -> Tensor:
    """Return correlated float32 features with a random mean."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator)
    return torch.randn(count, width, generator=generator) @ mix + torch.randn(width, generator=generator)


def test_gaussian_returns_mean_and_unbiased_covariance() -> None:
    x = features(50, 6, 0)
    n, mean, cov = gaussian(x)
    assert n == 50
    assert mean.dtype == cov.dtype == torch.float64
    assert np.allclose(mean, x.double().numpy().mean(0), rtol=0, atol=1e-12)
    assert np.allclose(cov, np.cov(x.double().numpy(), rowvar=False), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        gaussian(x[:1])
    assert gaussian(x[:, :1]).cov.shape == (1, 1)


@pytest.mark.parametrize(("count", "width"), [(200, 8), (500, 32)])
def test_frechet_distance_equals_the_formula_with_a_matrix_root(count: int, width: int) -> None:
    a, b = features(count, width, 0), features(2 * count, width, 1)
    (m1, s1), (m2, s2) = ((x.double().numpy().mean(0), np.cov(x.double().numpy(), rowvar=False)) for x in (a, b))
    root = scipy.linalg.sqrtm(s1 @ s2).real
    want = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-10)


def test_frechet_distance_of_a_set_to_itself_is_zero() -> None:
    x = features(300, 16, 0)
    assert abs(frechet_distance(x, x)) < 1e-9 * x.var(0).sum().item()
    assert abs(frechet_distance(x, x.flip(0))) < 1e-9 * x.var(0).sum().item()


def test_frechet_distance_of_known_gaussians() -> None:
    x = features(100, 4, 0).double()
    assert frechet_distance(x, x + 3) == pytest.approx(4 * 9)
    assert frechet_distance(x, 2 * x) == pytest.approx((x.mean(0).square().sum() + gaussian(x).cov.trace()).item())


def test_frechet_distance_with_fewer_samples_than_features() -> None:
    a, b = features(10, 32, 0), features(12, 32, 1)
    assert abs(frechet_distance(a, a)) < 1e-5 * a.var(0).sum().item()  # the root of a rounding error
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
    dead = torch.cat([a[:, :5], torch.zeros(10, 1)], dim=1)
    assert frechet_distance(dead, dead + torch.tensor([0.0] * 5 + [2.0])) == pytest.approx(4, abs=1e-5)


def test_frechet_of_commuting_gaussians_is_the_sum_over_their_axes() -> None:
    a = Gaussian(9, torch.zeros(3).double(), torch.tensor([1.0, 4.0, 9.0]).double().diag())
    b = Gaussian(9, torch.tensor([1.0, 0.0, 2.0]).double(), torch.tensor([4.0, 4.0, 0.0]).double().diag())
    assert frechet(a, b).item() == pytest.approx(5 + (1 - 2) ** 2 + 0 + 3**2)


def test_frechet_infinity_extrapolates_a_line_to_zero() -> None:
    drawn = features(32_000, 32, 0)
    x, reference = drawn[:12_000], gaussian(drawn[12_000:])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    counts = np.linspace(5000, 12_000, 15).astype(int)
    distances = [frechet(gaussian(x[order[:c]]), reference).item() for c in counts]
    want = np.polyfit(1 / counts, distances, 1)[1]
    assert frechet_infinity(x, reference, order) == pytest.approx(want, rel=1e-6)
    assert abs(want) < 0.5 * distances[0]  # both are samples of one distribution: most of the distance is bias


def test_frechet_infinity_is_refused_for_too_few_samples() -> None:
    x = features(4_999, 2, 0)
    with pytest.raises(ValueError, match=r"fd_infinity needs at least 5,000 samples.*got 4,999"):
        frechet_infinity(x, gaussian(x), torch.arange(4_999))
    exact = features(5_000, 2, 0)
    assert frechet_infinity(exact, gaussian(exact), torch.arange(5_000)) < 0.01


def test_kernel_distance_equals_the_double_sum() -> None:
    x, y = features(9, 5, 0).double().numpy(), features(7, 5, 1).double().numpy()

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (a @ b / 5 + 1) ** 3

    xx = [kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    yy = [kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j]
    xy = [kernel(a, b) for a in x for b in y]
    want = np.mean(xx) + np.mean(yy) - 2 * np.mean(xy)
    assert kernel_distance(torch.from_numpy(x), torch.from_numpy(y)).item() == pytest.approx(want, rel=1e-12)
    with pytest.raises(ValueError, match="at least 2 samples on either side, got 1 and 7"):
        kernel_distance(torch.from_numpy(x[:1]), torch.from_numpy(y))


def test_kernel_distance_is_unbiased() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [
        kernel_distance(*torch.randn(2, 20, 4, generator=generator, dtype=torch.float64)).item() for _ in range(400)
    ]
    assert abs(np.mean(draws)) < 3 * np.std(draws) / 20  # mean zero between samples of one distribution
    assert min(draws) < 0 < max(draws)


def test_inception_score_of_confident_and_uniform_predictions() -> None:
    confident = 50.0 * torch.eye(4).repeat(3, 1)
    assert inception_score([confident]) == pytest.approx(4)  # four classes, each predicted with certainty
    assert inception_score([torch.zeros(12, 4)]) == pytest.approx(1)
    assert inception_score([confident[:4], confident[:1]]) == pytest.approx((4 + 1) / 2)  # chunks have equal weight
    logits = features(30, 4, 0)
    p = logits.double().softmax(1).numpy()
    want = np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())
    assert inception_score([logits]) == pytest.approx(want, rel=1e-12)


def by_scikit_learn(x: Tensor, ref: Tensor, k: int) -> tuple[float, float, float, float]:
    """Compute precision, recall, density and coverage with scikit-learn's exact neighbours."""
    a, b = x.double().numpy(), ref.double().numpy()
    radius_a, radius_b = (NearestNeighbors(n_neighbors=k + 1).fit(s).kneighbors(s)[0][:, -1] for s in (a, b))
    d = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    return (
        (d <= radius_b).any(1).mean(),
        (d <= radius_a[:, None]).any(0).mean(),
        (d < radius_b).sum() / (k * len(a)),
        (d.min(0) < radius_b).mean(),
    )


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("width", [2, 16])
def test_neighbours_match_scikit_learn(width: int, k: int) -> None:
    drawn = features(210, width, 0)
    reference, samples = drawn[:150], drawn[150:] * 1.4
    found = neighbours(samples, reference, k, chunk=37)
    assert found == pytest.approx(by_scikit_learn(samples, reference, k), abs=1e-12)
    assert all(0 < share < 1 for share in (found.precision, found.recall, found.coverage))


def test_neighbours_detect_copies_and_missing_images() -> None:
    reference = features(200, 8, 0)
    assert neighbours(reference, reference, 3)[:2] == (1, 1)
    copies = neighbours(reference[:10].repeat(20, 1), reference, 3)
    assert copies.precision == 1  # each copy lies in a ball: precision does not reveal that only ten images remain
    assert copies.recall == pytest.approx(10 / 200)  # the samples' own balls have shrunk to points
    assert copies.coverage < 0.4
    with pytest.raises(ValueError, match="k=3 neighbours need more than 3 samples, got 3 and 200"):
        neighbours(reference[:3], reference, 3)


def test_squared_distances_of_equal_points_are_zero() -> None:
    x = features(50, 64, 0).double() + 100
    d = squared_distances(x, x.clone())
    assert (d.diagonal() == 0).all()
    assert torch.allclose(d, (x[:, None] - x[None]).square().sum(-1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("k", [1, 5, 10])
@pytest.mark.parametrize("width", [2, 16])
def test_coverage_matches_scikit_learn(width: int, k: int) -> None:
    reference, samples = features(150, width, 0), features(90, width, 0)[:60] * 0.8
    search = NearestNeighbors(n_neighbors=k + 1).fit(reference.double())
    radius = search.kneighbors(reference.double())[0][:, -1]  # the first neighbour is the point itself
    nearest = NearestNeighbors(n_neighbors=1).fit(samples.double()).kneighbors(reference.double())[0][:, 0]
    want = (nearest < radius).mean()
    assert neighbours(samples, reference, k).coverage == pytest.approx(want, abs=1e-12)
    assert 0 < want < 1


def test_coverage_of_points_on_a_line() -> None:
    reference = torch.arange(10.0)[:, None]
    assert neighbours(reference, reference, k=1).coverage == 1.0
    assert neighbours(reference + 1000, reference, k=1).coverage == 0.0
    # 4 and 5 lie within distance 1 of 4.25; the ends of the line are no further from their neighbours than the rest.
    assert neighbours(torch.tensor([[4.25], [4.25]]), reference, k=1).coverage == pytest.approx(0.2)
    # A sample exactly at the distance of the nearest neighbour does not cover the point.
    assert neighbours(torch.tensor([[4.0], [4.0]]), reference, k=1).coverage == pytest.approx(0.1)


def test_digits_cnn_classifies_held_out_digits() -> None:
    train, test = digits(DigitsConfig())
    net = references.make_extractor("digits-cnn", None, train).network
    assert isinstance(net, DigitsCNN)
    assert (net(test.images).argmax(1) == test.labels).double().mean() >= 0.97
    assert net.features(test.images[:3]).shape == (3, net.num_features)
    assert sum(p.numel() for p in net.parameters()) == 72_842
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())
    # The distance in its feature space tells digits from noise.
    reference = net.features(train.images)
    noise = torch.randint(0, 256, test.images.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    digit_distance = frechet_distance(net.features(test.images), reference)
    assert frechet_distance(net.features(noise), reference) > 20 * digit_distance > 0


def test_training_digits_cnn_is_deterministic_and_leaves_the_generator_alone() -> None:
    train, _ = digits(DigitsConfig())
    before = torch.get_rng_state()
    first = train_digits_cnn(train.images, train.labels, epochs=2).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    second = train_digits_cnn(train.images, train.labels, epochs=2).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    longer = train_digits_cnn(train.images, train.labels, epochs=3).state_dict()
    assert not torch.equal(first["head.weight"], longer["head.weight"])
