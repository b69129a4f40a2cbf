"""Scores of reconstructions: closed forms, and PCA against its definition."""

import pytest
import torch
from sklearn.decomposition import PCA

from diffbench.data.registry import DigitsConfig, digits
from diffbench.metrics import reconstruction
from diffbench.metrics.reconstruction import pca_reconstruction, psnr, ssim


def test_psnr_is_the_mean_over_pictures_and_has_an_end() -> None:
    originals = torch.full((3, 1, 4, 4), 100, dtype=torch.uint8)
    images = originals.clone()
    images[0] += 1  # mean squared error 1: 20 log10(255)
    images[1] -= 10
    single = [48.1308036, 28.1308036, 100.0]
    assert [psnr(images[i : i + 1], originals[i : i + 1]) for i in range(3)] == pytest.approx(single)
    assert psnr(images, originals) == pytest.approx(sum(single) / 3)


def test_scores_do_not_depend_on_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    _, held_out = digits(DigitsConfig())
    images, originals = held_out.images[:20].flip(-1), held_out.images[:20]
    whole = psnr(images, originals), ssim(images, originals)
    monkeypatch.setattr(reconstruction, "BATCH", 7)
    assert (psnr(images, originals), ssim(images, originals)) == pytest.approx(whole)
    assert ssim(originals, originals) == pytest.approx(1)
    assert -1 < whole[1] < 0.9


@pytest.mark.parametrize("count", [1437, 40], ids=["more pictures than pixels", "fewer"])
def test_pca_is_sklearns(count: int) -> None:
    train, held_out = digits(DigitsConfig())
    training, images = train.images[:count], held_out.images[:50]
    pca = PCA(16, svd_solver="full").fit(training.flatten(1).double().numpy())
    expected = torch.from_numpy(pca.inverse_transform(pca.transform(images.flatten(1).double().numpy())))
    got = pca_reconstruction(training, images, 16)
    assert (got.flatten(1) - expected.clamp(0, 255)).abs().max() <= 0.5 + 1e-6


def test_large_pictures_are_fitted_to_a_part_and_impossible_numbers_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    train, _ = digits(DigitsConfig())
    monkeypatch.setattr(reconstruction, "MOST", 50)
    assert torch.equal(
        pca_reconstruction(train.images, train.images[:5], 9),
        pca_reconstruction(train.images[::29], train.images[:5], 9),
    )
    with pytest.raises(ValueError, match="51 components of 50 pictures of 64 numbers"):
        pca_reconstruction(train.images, train.images[:5], 51)
