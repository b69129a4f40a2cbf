"""Scores of reconstructions, checked against closed forms."""

import pytest
import torch

from diffbench.data.digits import DigitsConfig, digits
from diffbench.metrics import reconstruction
from diffbench.metrics.reconstruction import psnr, ssim


def test_psnr_is_the_mean_over_images_and_is_capped() -> None:
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
