"""Files for the ADM evaluator are written completely or not at all; its numbers match independent formulas."""

import os
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

from diffbench.core.errors import UserError
from diffbench.evaluation import images
from diffbench.evaluation.records import values
from diffbench.metrics import Extractor, Features
from diffbench.metrics.base import Measurement
from diffbench.metrics.extractors.base import state_hash
from diffbench.metrics.registry import metric_name
from diffbench.metrics.suite import Suite, reference_statistics
from diffbench.runs.evaluate_images import evaluate_images, load_reference

IMAGES = torch.randint(0, 256, (90, 3, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
SAMPLES, REAL = IMAGES[:50], (IMAGES[50:].float() * 0.7).to(torch.uint8)


class Net(nn.Module):
    """A small network with the three outputs of the published one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pooled, self.logits, self.spatial = nn.Linear(48, 6), nn.Linear(6, 5), nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Features:
        pooled = self.pooled(x.flatten(1) / 255)
        return Features(pooled, 3 * self.logits(pooled), self.spatial(x.flatten(1) / 255))


@pytest.fixture
def extractor() -> Extractor:
    net = Net()
    return Extractor("inception-tf1", net, net, 6, state_hash(net), "none", classes=5, spatial=4, published=True)


@pytest.fixture
def files(extractor: Extractor, tmp_path: Path) -> tuple[Path, Path]:
    samples, reference = tmp_path / "samples.npz", tmp_path / "reference.npz"
    np.savez(samples, arr_0=SAMPLES.permute(0, 2, 3, 1).numpy())
    images.write_adm_reference(reference, extractor, reference_statistics(extractor, [REAL], 40, 40), list(REAL))
    return samples, reference


def test_a_reference_file_contains_all_that_the_evaluator_reads(files: tuple[Path, Path], extractor: Extractor) -> None:
    with np.load(files[1], allow_pickle=False) as arrays:
        assert set(arrays) == {"arr_0", "mu", "sigma", "mu_s", "sigma_s"}
        assert np.array_equal(arrays["arr_0"], REAL.permute(0, 2, 3, 1).numpy())
        features = extractor(REAL)
        assert np.allclose(arrays["mu"], features.pooled.double().numpy().mean(0))
        assert np.allclose(arrays["sigma"], np.cov(features.pooled.double().numpy(), rowvar=False))
        assert features.spatial is not None
        assert np.allclose(arrays["sigma_s"], np.cov(features.spatial.double().numpy(), rowvar=False))
    fits = images.read_statistics(files[1])
    assert fits is not None and fits[1] is not None and len(fits[1].mean) == 4


def test_nothing_is_written_for_another_extractor_or_over_an_existing_file(
    files: tuple[Path, Path], extractor: Extractor, tmp_path: Path
) -> None:
    found = reference_statistics(extractor, [REAL], 40, 40)
    with pytest.raises(UserError, match="already exists; choose another name"):
        images.write_adm_reference(files[1], extractor, found, list(REAL))
    found.spatial = None
    with pytest.raises(UserError, match="reads Inception statistics with a spatial layer, not those of inception-tf1"):
        images.write_adm_reference(tmp_path / "new.npz", extractor, found, list(REAL))
    assert not (tmp_path / "new.npz").exists()


def test_numbers_match_independent_formulas(files: tuple[Path, Path], extractor: Extractor) -> None:
    (x, logits, spatial), (y, _, real_spatial) = extractor(SAMPLES), extractor(REAL)
    assert logits is not None and spatial is not None and real_spatial is not None

    def fid(a: Tensor, b: Tensor) -> float:
        (m1, s1), (m2, s2) = ((t.double().numpy().mean(0), np.cov(t.double().numpy(), rowvar=False)) for t in (a, b))
        return float(((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real))

    def inside(points: Tensor, balls: Tensor) -> float:
        radius = NearestNeighbors(n_neighbors=4).fit(balls).kneighbors(balls)[0][:, -1]
        return float((torch.cdist(points.double(), balls.double()).numpy() <= radius).any(1).mean())

    p = logits.double().softmax(1)
    want = {
        "inception_score": float((p * (p.log() - p.mean(0).log())).sum(1).mean().exp()),
        "fid": fid(x, y),
        "sfid": fid(spatial, real_spatial),
        "precision": inside(x, y),
        "recall": inside(y, x),
    }
    samples = images.open_images(files[0])
    reference, _ = load_reference(extractor, files[1])
    suite = Suite(Measurement(extractor, {"fd": reference}, len(samples)))
    suite.update(next(samples.batches(50)), torch.arange(50))
    found = {metric_name(name, extractor, 50).split("/")[0]: value for name, value in suite.compute().items()}
    assert {name: found[name] for name in want} == pytest.approx(want, rel=1e-6)
    assert 0 < want["precision"] < 1


PUBLISHED = {
    "inception_score": (215.8370361328125, 0.5),
    "fid": (3.9425574129223264, 0.02),
    "sfid": (6.140433703346162, 0.05),
    "precision": (0.8265, 0.005),
    "recall": (0.5309, 0.005),
}
"""The numbers in the evaluator's README for its two files, and how far another implementation may be off."""


@pytest.mark.slow
def test_the_published_numbers_are_reproduced() -> None:
    """Needs the files admnet_guided_upsampled_imagenet256.npz and VIRTUAL_imagenet256_labeled.npz in $DIFFBENCH_ADM."""
    folder = os.environ.get("DIFFBENCH_ADM")
    if folder is None:
        pytest.skip("set DIFFBENCH_ADM to the folder of the two files, and DIFFBENCH_INCEPTION to the weights")
    samples, reference = Path(folder, "admnet_guided_upsampled_imagenet256.npz"), "VIRTUAL_imagenet256_labeled.npz"
    record = evaluate_images(samples, Path(folder, reference), ["evaluate.extractor=inception"])
    found = {name.split("/")[0]: value for name, value in values(record).items()}
    for name, (want, allowed) in PUBLISHED.items():
        assert found[name] == pytest.approx(want, abs=allowed), name
