"""Reference statistics: what their key holds, that they are made once, and that damage or a mismatch is an error."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffbench.core import tensors
from diffbench.core.errors import UserError
from diffbench.data.digits import DigitsConfig, digits
from diffbench.data.sets import ImageSet, balanced
from diffbench.evaluation import reference as references
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
def judge() -> Extractor:
    return plain("flat", Flat(), (1, 8, 8))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "references"


def test_statistics_are_those_of_the_features(judge: Extractor, cache: Path) -> None:
    part = references.first(TRAIN, "train", 300)
    found, key = references.statistics_of(judge, part, keep=7)
    features = judge(TRAIN.images[balanced(TRAIN.labels, 300)]).pooled
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
        "weights": judge.weights,
        "data": TRAIN.fingerprint(),
        "split": "train",
        "which": "the first 300, evenly over the classes",
        "size": [1, 8, 8],
        "count": 300,
        "rows": 7,
    }


def test_they_are_made_once(judge: Extractor, monkeypatch: pytest.MonkeyPatch) -> None:
    part = references.first(TRAIN, "train", 100)
    first, key = references.statistics_of(judge, part)
    monkeypatch.setattr("diffbench.evaluation.reference.reference_statistics", None)
    again, same = references.statistics_of(judge, part)
    assert key == same and torch.equal(first.fit.cov, again.fit.cov) and torch.equal(first.rows, again.rows)


def test_two_commands_at_once_make_them_once(judge: Extractor, monkeypatch: pytest.MonkeyPatch) -> None:
    made, together, original = [], threading.Barrier(2), references.reference_statistics

    def slow(*args: object) -> ReferenceStatistics:
        made.append(1)
        threading.Event().wait(0.3)
        return original(*args)  # type: ignore[arg-type]

    def command() -> None:
        together.wait()
        found.append(references.statistics_of(judge, references.first(TRAIN, "train", 50))[1])

    monkeypatch.setattr("diffbench.evaluation.reference.reference_statistics", slow)
    found: list[str] = []
    threads = [threading.Thread(target=command) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1] and found[0] == found[1]


def test_the_key_holds_all_that_the_numbers_depend_on(judge: Extractor) -> None:
    part = references.first(TRAIN, "train", 100)
    other_weights = plain("flat", Flat(), (1, 8, 8))
    nn.init.zeros_(other_weights.network.linear.bias)  # type: ignore[arg-type]
    other_weights = plain("flat", other_weights.network, (1, 8, 8))
    fewer_pixels = ImageSet(TRAIN.images.clone(), TRAIN.labels, 10)
    fewer_pixels.images[0, 0, 0, 0] = 99
    keys = {
        "as it is": references.statistics_of(judge, part)[1],
        "count": references.statistics_of(judge, references.first(TRAIN, "train", 90))[1],
        "selection": references.statistics_of(judge, references.others(part))[1],
        "split": references.statistics_of(judge, references.first(HELD_OUT, "held-out", 100))[1],
        "one pixel": references.statistics_of(judge, references.first(fewer_pixels, "train", 100))[1],
        "rows": references.statistics_of(judge, part, keep=10)[1],
        "weights": references.statistics_of(other_weights, part)[1],
        "resize": references.statistics_of(plain("flat-aa64", Flat(), (1, 8, 8)), part)[1],
        "all": references.statistics_of(judge, references.everything(TRAIN, "train"))[1],
    }
    assert len(set(keys.values())) == len(keys)


def test_the_version_of_the_code_is_in_the_key(judge: Extractor, monkeypatch: pytest.MonkeyPatch) -> None:
    part = references.first(TRAIN, "train", 100)
    before = references.statistics_of(judge, part)[1]
    monkeypatch.setattr("diffbench.evaluation.reference.VERSION", 2)
    assert references.statistics_of(judge, part)[1] != before


def test_parts_do_not_overlap() -> None:
    mine, rest = references.first(TRAIN, "train", 500), references.others(references.first(TRAIN, "train", 500))
    assert len(mine) == len(rest) == 500
    assert not set(mine.index.tolist()) & set(rest.index.tolist())
    assert (TRAIN.labels[rest.index].bincount() == 50).all()
    assert len(references.others(references.everything(TRAIN, "train"))) == 0


def test_another_key_under_the_same_name_is_an_error(judge: Extractor, cache: Path) -> None:
    part = references.first(TRAIN, "train", 100)
    references.statistics_of(judge, part)
    (path,) = cache.glob("*.safetensors")
    key, reference = references.read(path)
    references.write(path, key | {"split": "held-out"}, reference)
    with pytest.raises(UserError) as caught:
        references.statistics_of(judge, part)
    assert str(caught.value) == f"{path}: split is 'held-out', not 'train'; remove the file"


def test_damage_is_an_error(judge: Extractor, cache: Path) -> None:
    part = references.first(TRAIN, "train", 100)
    references.statistics_of(judge, part)
    (path,) = cache.glob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"damaged \(its hash differs\); remove it"):
        references.statistics_of(judge, part)
    path.write_bytes(whole[:100])
    with pytest.raises(UserError, match=rf"{path}: damaged \(.*; remove it"):
        references.statistics_of(judge, part)
    tensors.write(path, {"mean": torch.zeros(2)}, {"key": json.dumps({"count": 3})})
    with pytest.raises(UserError, match="holds no statistics of real images"):
        references.read(path)
    path.write_bytes(whole)
    assert load_file(path)["mean"].shape == (5,)
    references.statistics_of(judge, part)


def test_an_interrupted_build_leaves_nothing(judge: Extractor, cache: Path) -> None:
    def broken() -> Iterator[Tensor]:
        yield TRAIN.images[:10]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        references.cached_statistics(judge, {"pictures": "x"}, 20, broken)
    assert not list(cache.glob("*.safetensors"))
    with pytest.raises(UserError, match="statistics of real images need at least 2 of them, got 1"):
        references.cached_statistics(judge, {"pictures": "x"}, 1, broken)
    with pytest.raises(ValueError, match="got 10 samples where 20 were announced"):
        references.cached_statistics(judge, {"pictures": "x"}, 20, lambda: iter([TRAIN.images[:10]]))
