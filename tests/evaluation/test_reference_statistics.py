"""Reference statistics: what their key depends on, that they are computed once, and that damage is an error."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffbench.config.sections import EvaluateConfig
from diffbench.core import tensors
from diffbench.core.errors import UserError
from diffbench.data.digits import DigitsConfig, digits
from diffbench.data.sets import ImageSet, balanced
from diffbench.evaluation import reference as references
from diffbench.evaluation import scorer as scorers
from diffbench.metrics import Extractor
from diffbench.metrics.base import ReferenceStatistics
from diffbench.metrics.extractors.base import plain
from diffbench.metrics.frechet import gaussian

TRAIN, HELD_OUT = digits(DigitsConfig())


class Flat(nn.Module):
    def __init__(self, dim: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(64, dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1).float() / 255)


@pytest.fixture
def extractor() -> Extractor:
    return plain("flat", Flat(), (1, 8, 8))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "references"


def test_statistics_are_those_of_the_features(extractor: Extractor, cache: Path) -> None:
    part = references.choose_first(TRAIN, "train", 300)
    found, key = references.statistics_of(extractor, part, keep=7)
    features = extractor(TRAIN.images[balanced(TRAIN.labels, 300)]).pooled
    want = gaussian(features)
    assert (found.fit.n, found.spatial) == (300, None)
    assert torch.allclose(found.fit.mean, want.mean, atol=1e-9) and torch.allclose(found.fit.cov, want.cov, atol=1e-9)
    assert torch.equal(found.rows, features[torch.arange(7) * 300 // 7])
    (path,) = cache.glob("*.safetensors")
    assert path.name == f"flat-300-{key}.safetensors"
    assert references.read(path)[0] == {
        "format": 1,
        "version": 1,
        "extractor": "flat",
        "weights": extractor.weights,
        "data": TRAIN.fingerprint(),
        "split": "train",
        "which": "the first 300, evenly over the classes",
        "size": [1, 8, 8],
        "count": 300,
        "rows": 7,
    }


def test_statistics_are_computed_once(extractor: Extractor, monkeypatch: pytest.MonkeyPatch) -> None:
    part = references.choose_first(TRAIN, "train", 100)
    first, key = references.statistics_of(extractor, part)
    monkeypatch.setattr("diffbench.evaluation.reference.reference_statistics", None)
    again, same = references.statistics_of(extractor, part)
    assert key == same and torch.equal(first.fit.cov, again.fit.cov) and torch.equal(first.rows, again.rows)


def test_concurrent_commands_compute_statistics_once(extractor: Extractor, monkeypatch: pytest.MonkeyPatch) -> None:
    made, barrier, original = [], threading.Barrier(2), references.reference_statistics

    def slow(*args: object) -> ReferenceStatistics:
        made.append(1)
        threading.Event().wait(0.3)
        return original(*args)  # type: ignore[arg-type]

    def command() -> None:
        barrier.wait()
        found.append(references.statistics_of(extractor, references.choose_first(TRAIN, "train", 50))[1])

    monkeypatch.setattr("diffbench.evaluation.reference.reference_statistics", slow)
    found: list[str] = []
    threads = [threading.Thread(target=command) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1] and found[0] == found[1]


def test_the_key_depends_on_everything_the_statistics_depend_on(extractor: Extractor) -> None:
    part = references.choose_first(TRAIN, "train", 100)
    other_weights = plain("flat", Flat(), (1, 8, 8))
    nn.init.zeros_(other_weights.network.linear.bias)  # type: ignore[arg-type]
    other_weights = plain("flat", other_weights.network, (1, 8, 8))
    fewer_pixels = ImageSet(TRAIN.images.clone(), TRAIN.labels, 10)
    fewer_pixels.images[0, 0, 0, 0] = 99
    keys = {
        "as it is": references.statistics_of(extractor, part)[1],
        "count": references.statistics_of(extractor, references.choose_first(TRAIN, "train", 90))[1],
        "selection": references.statistics_of(extractor, references.choose_others(part))[1],
        "split": references.statistics_of(extractor, references.choose_first(HELD_OUT, "held-out", 100))[1],
        "one pixel": references.statistics_of(extractor, references.choose_first(fewer_pixels, "train", 100))[1],
        "rows": references.statistics_of(extractor, part, keep=10)[1],
        "weights": references.statistics_of(other_weights, part)[1],
        "resize": references.statistics_of(plain("flat-aa64", Flat(), (1, 8, 8)), part)[1],
        "all": references.statistics_of(extractor, references.choose_all(TRAIN, "train"))[1],
    }
    assert len(set(keys.values())) == len(keys)


def test_the_selection_names_the_classes_unless_it_has_all_evenly() -> None:
    half, all_ten = (
        references.choose_per_class(TRAIN, "train", torch.tensor(counts)) for counts in ([2] * 5, [1] * 10)
    )
    assert half.which == "the first 10, of the classes 2, 2, 2, 2, 2, 0, 0, 0, 0, 0"
    assert all_ten.which == "the first 10, evenly over the classes"


def test_the_key_depends_on_the_version_of_the_code(extractor: Extractor, monkeypatch: pytest.MonkeyPatch) -> None:
    part = references.choose_first(TRAIN, "train", 100)
    before = references.statistics_of(extractor, part)[1]
    monkeypatch.setattr("diffbench.evaluation.reference.VERSION", 2)
    assert references.statistics_of(extractor, part)[1] != before


def test_selections_do_not_overlap() -> None:
    first, rest = (
        references.choose_first(TRAIN, "train", 500),
        references.choose_others(references.choose_first(TRAIN, "train", 500)),
    )
    assert len(first) == len(rest) == 500
    assert not set(first.index.tolist()) & set(rest.index.tolist())
    assert (TRAIN.labels[rest.index].bincount() == 50).all()
    assert len(references.choose_others(references.choose_all(TRAIN, "train"))) == 0
    few = references.choose_others(references.choose_first(TRAIN, "train", 1000))
    assert (len(few), few.which) == (437, "437 outside the first 1000, evenly over the classes")


def test_a_damaged_file_is_an_error(extractor: Extractor, cache: Path) -> None:
    part = references.choose_first(TRAIN, "train", 100)
    references.statistics_of(extractor, part)
    (path,) = cache.glob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"damaged \(its hash differs\); remove it"):
        references.statistics_of(extractor, part)
    path.write_bytes(whole[:100])
    with pytest.raises(UserError, match=rf"{path}: damaged \(.*; remove it"):
        references.statistics_of(extractor, part)
    tensors.write(path, {"mean": torch.zeros(2)}, {"key": json.dumps({"count": 3})})
    with pytest.raises(UserError, match="contains no statistics of real images"):
        references.read(path)
    path.write_bytes(whole)
    assert load_file(path)["mean"].shape == (5,)
    references.statistics_of(extractor, part)


def test_an_interrupted_build_leaves_no_file(extractor: Extractor, cache: Path) -> None:
    def broken() -> Iterator[Tensor]:
        yield TRAIN.images[:10]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        references.cached_statistics(extractor, {"pictures": "x"}, 20, broken)
    assert not list(cache.glob("*.safetensors"))
    with pytest.raises(UserError, match="statistics need at least 2 real images, got 1"):
        references.cached_statistics(extractor, {"pictures": "x"}, 1, broken)
    with pytest.raises(ValueError, match="got 10 samples, expected 20"):
        references.cached_statistics(extractor, {"pictures": "x"}, 20, lambda: iter([TRAIN.images[:10]]))


def two_classes(dark: int, light: int, seed: int) -> ImageSet:
    """Return noisy images around two grey levels, sorted by class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(2).repeat_interleave(torch.tensor([dark, light]))
    pixels = 60 + 120 * labels[:, None, None, None] + 15 * torch.randn(dark + light, 1, 8, 8, generator=generator)
    return ImageSet(pixels.clamp(0, 255).to(torch.uint8), labels, 2)


def test_samples_have_the_class_frequencies_of_their_reference() -> None:
    rare = two_classes(900, 60, 0)
    assert references.class_counts(rare.labels, 480).tolist() == [450, 30]
    assert references.sample_labels(rare, 96).bincount().tolist() == [90, 6]
    assert references.choose_first(rare, "train", 96).labels.bincount().tolist() == [90, 6]
    assert references.choose_first(rare, "train", 96).which == "the first 96, of the classes 90, 6"
    assert references.class_counts(TRAIN.labels, 500).tolist() == [50] * 10  # nearly balanced classes count as balanced
    assert references.class_counts(TRAIN.labels, 1437).tolist() == TRAIN.labels.bincount().tolist()
    assert references.class_counts(TRAIN.labels, 5000).tolist() == [500] * 10  # more than all images: drawn evenly
    assert references.class_counts(rare.labels, 9600).tolist() == [9000, 600]
    assert references.sample_labels(ImageSet(rare.images, 0 * rare.labels, 0), 40).tolist() == [0] * 40
    tail = torch.arange(3).repeat_interleave(torch.tensor([400, 200, 3]))
    assert references.class_counts(tail, 100).tolist() == [66, 33, 1]


def scores(extractor: Extractor, fresh: ImageSet, **settings: Any) -> dict[str, float]:
    train, held_out = two_classes(900, 60, 0), two_classes(90, 6, 1)
    config = EvaluateConfig(count=len(fresh), **settings)
    scorer = scorers.run_scorer(config, extractor, train, held_out)
    assert scorer.floor is not None
    found = scorer.scores(scorers.numbered(iter(fresh.images.split(100)), fresh.labels))
    return {name.split("/")[0]: value for name, value in found.items()} | {"real": scorer.floor["fd"]}


@pytest.mark.parametrize("reference", ["same", "all"])
def test_fresh_real_images_of_unbalanced_classes_show_no_gap(extractor: Extractor, reference: str) -> None:
    fair = scores(extractor, two_classes(450, 30, 2), reference=reference)
    even = scores(extractor, two_classes(240, 240, 2), reference=reference)
    assert even["fd"] > 0.03  # the distance due to class frequencies alone
    assert abs(fair["fd"]) < 0.01 * even["fd"]
    for found in (fair, even):  # both terms of the gap have the same class frequencies, so that these cancel out
        assert abs(found["fd_gap"]) < 0.02 * even["fd"]
    assert abs(fair["real"]) < 0.02 * even["fd"]
