"""Scoring folders and npz files of images against runs, folders, npz and statistics; and the verb `reference`."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffbench.cli import main
from diffbench.config.sections import EvaluateConfig
from diffbench.core.errors import UserError
from diffbench.data.digits import DigitsConfig, digits
from diffbench.data.sets import balanced
from diffbench.data.shapes import ShapesConfig, shapes
from diffbench.evaluation import images
from diffbench.evaluation import reference as references
from diffbench.evaluation.records import read, values
from diffbench.metrics.frechet import frechet_distance, gaussian
from diffbench.runs import evaluate_images

TRAIN, TEST = digits(DigitsConfig())
IMAGES, LABELS = TEST.images[:60], TEST.labels[:60]
Capture = pytest.CaptureFixture[str]
CNN = "evaluate.extractor=digits-cnn"


def as_folder(folder: Path, images: Tensor) -> Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(folder / f"{i:05d}.png")
    return folder


def as_npz(path: Path, images: Tensor, **more: Any) -> Path:
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy(), **more)
    return path


@pytest.fixture
def refused(capsys: Capture) -> Callable[..., str]:
    def run(*argv: str | Path) -> str:
        capsys.readouterr()
        assert main([str(a) for a in argv]) == 2
        return capsys.readouterr().err.removeprefix("error: ").rstrip("\n")

    return run


def test_a_folder_and_an_npz_give_the_same_images(tmp_path: Path) -> None:
    folder, npz = (
        images.open_images(as_folder(tmp_path / "a", IMAGES)),
        images.open_images(as_npz(tmp_path / "a.npz", IMAGES, arr_1=LABELS.numpy())),
    )
    for found in (folder, npz):
        assert len(found) == 60 and found.shape == (1, 8, 8)
        assert torch.equal(torch.cat(list(found.batches(7))), IMAGES)
    assert folder.labels is None and npz.labels is not None and torch.equal(npz.labels, LABELS)
    other = images.open_images(as_folder(tmp_path / "b", IMAGES.flip(0)))
    assert len({folder.identity(), npz.identity(), other.identity()}) == 3


def test_images_of_different_shapes_are_named(tmp_path: Path) -> None:
    folder = as_folder(tmp_path / "a", IMAGES[:3])
    Image.new("L", (9, 8)).save(folder / "00002.png")
    with pytest.raises(UserError, match=r"00002\.png: is 9x8 with 1 channels, but 00000\.png is 8x8 with 1 channels"):
        list(images.open_images(folder).batches(10))
    Image.new("RGB", (8, 8)).save(folder / "00002.png")
    with pytest.raises(UserError, match=r"is 8x8 with 3 channels, but"):
        list(images.open_images(folder).batches(10))
    Image.new("RGB", (8, 8), (1, 2, 3)).save(folder / "00000.png")
    mixed = torch.cat(list(images.open_images(folder).batches(10)))  # the first is in colour: grey ones are repeated
    assert mixed.shape == (3, 3, 8, 8) and torch.equal(mixed[1, 0], mixed[1, 2])
    Image.new("I;16", (8, 8), 257 * 100).save(folder / "00001.png")  # scaled to eight bits, as in training
    assert set(torch.cat(list(images.open_images(folder).batches(10)))[1].flatten().tolist()) == {100}
    (folder / "00001.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"00001\.png: broken image \(no image of a known format\)"):
        list(images.open_images(folder).batches(10))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 8, 8, 1), np.float32), "arr_0 must be uint8 (N, H, W, 1 or 3), got float32 (3, 8, 8, 1)"),
        (np.zeros((3, 1, 8, 8), np.uint8), "arr_0 must be uint8 (N, H, W, 1 or 3), got uint8 (3, 1, 8, 8)"),
        (np.zeros((3, 8, 8), np.uint8), "arr_0 must be uint8 (N, H, W, 1 or 3), got uint8 (3, 8, 8)"),
    ],
)
def test_npz_files_with_other_arrays_are_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.savez(tmp_path / "a.npz", arr_0=array)
    with pytest.raises(UserError) as caught:
        images.open_images(tmp_path / "a.npz")
    assert str(caught.value) == f"{tmp_path / 'a.npz'}: {message}"
    np.savez(tmp_path / "b.npz", other=array)
    with pytest.raises(UserError, match=r"b\.npz: contains no array arr_0"):
        images.open_images(tmp_path / "b.npz")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=np.array([{"code": 1}], dtype=object))
    with pytest.raises(UserError, match="arr_0 is damaged, or holds objects instead of numbers"):
        images.open_images(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", mu=np.array([{"code": 1}], dtype=object), sigma=np.zeros((1, 1)))
    with pytest.raises(UserError, match="holds objects instead of numbers"):
        images.read_statistics(tmp_path / "b.npz")


@pytest.mark.parametrize("real", ["folder", "npz", "statistics", "mu and sigma"])
def test_images_are_scored_against_images_or_statistics(tmp_path: Path, real: str, capsys: Capture) -> None:
    samples, against = as_npz(tmp_path / "samples.npz", IMAGES, arr_1=LABELS.numpy()), TRAIN.images[:60]
    extractor = references.make_extractor("digits-cnn", None, TRAIN)
    x, y = extractor(IMAGES).pooled, extractor(against).pooled
    if real == "folder":
        reference = as_folder(tmp_path / "real", against)
    elif real == "npz":
        reference = as_npz(tmp_path / "real.npz", against)
    elif real == "statistics":
        reference = tmp_path / "real.safetensors"
        command = ["reference", str(as_folder(tmp_path / "real", against)), CNN, f"out={reference}"]
        assert main(command) == 0
    else:
        fit, reference = gaussian(y), tmp_path / "mu.npz"
        np.savez(reference, mu=fit.mean.numpy(), sigma=fit.cov.numpy())
    assert main(["evaluate", str(samples), "--against", str(reference), CNN]) == 0
    out = capsys.readouterr().out
    (record,) = read(tmp_path / "samples.npz.results.jsonl")
    found = values(record)
    assert found["fd/digits-cnn@60"] == pytest.approx(frechet_distance(x, y), rel=1e-6)
    assert f"{found['fd/digits-cnn@60']:.6g}" in out
    assert found["label_accuracy/digits-cnn@60"] == 1.0
    assert ("kid/digits-cnn@60" in found) == ("coverage/digits-cnn@60" in found) == (real != "mu and sigma")
    assert record["images"]["count"] == 60
    assert ("note: 60 images against an unknown number" in out) == (real == "mu and sigma")
    assert main(["evaluate", str(samples), "--against", str(reference), CNN]) == 0
    assert len(read(tmp_path / "samples.npz.results.jsonl")) == 2  # appended


def test_exported_samples_score_like_those_of_the_run(smoke_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples.npz"
    assert main(["evaluate", str(smoke_run), "evaluate.count=40", f"export={out}"]) == 0
    assert main(["evaluate", str(out), "--against", str(smoke_run)]) == 0
    own = read(smoke_run / "results.jsonl")[-1]
    (theirs,) = read(tmp_path / "samples.npz.results.jsonl")
    assert values(theirs) == pytest.approx(values(own), rel=1e-6)
    assert theirs["reference"] == {**own["reference"], "formats": {}} and theirs["floor"] == own["floor"]


def test_scores_of_the_current_folder_are_stored_next_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    samples, real = as_folder(tmp_path / "samples", IMAGES), as_folder(tmp_path / "real", TRAIN.images[:60])
    monkeypatch.chdir(samples)
    assert main(["evaluate", ".", "--against", str(real), CNN]) == 0
    scores = tmp_path / "samples.results.jsonl"
    assert len(read(scores)) == 1
    monkeypatch.setattr(evaluate_images.os, "access", lambda *_: False)
    assert refused("evaluate", ".", "--against", real, CNN) == (
        f"{scores}: not writable, but scores are stored next to the images; copy or link them elsewhere"
    )


def test_the_rule_and_copy_detector_of_a_run_apply_only_to_images_of_its_shape() -> None:
    train, held_out = shapes(ShapesConfig(count=200, held_out=100))
    run = cast(Any, SimpleNamespace(folder=Path("run"), train_set=train, held_out=held_out))
    settings = EvaluateConfig(count=40, extractor="random-cnn")
    for shape, kept in (((3, 16, 16), True), ((1, 16, 16), False)):
        extractor = evaluate_images.make_extractor(settings, shape, None)
        source = cast(Any, SimpleNamespace(shape=shape, labels=train.labels[:40]))
        scorer = evaluate_images._run_scorer(settings, extractor, run, source, Path("x"))
        assert (scorer.measurement.rule is not None, scorer.measurement.detector is not None) == (kept, kept)


def test_different_image_counts_are_noted(tmp_path: Path, capsys: Capture) -> None:
    samples, real = as_folder(tmp_path / "samples", IMAGES), as_folder(tmp_path / "real", TRAIN.images[:80])
    assert main(["evaluate", str(samples), "--against", str(real), CNN]) == 0
    assert "note: 60 images against 80 real ones: a Fréchet distance depends on both counts" in capsys.readouterr().out


def test_evaluate_refuses_unusable_images(refused: Callable[..., str], smoke_run: Path, tmp_path: Path) -> None:
    few, many = as_folder(tmp_path / "few", IMAGES[:5]), as_folder(tmp_path / "many", IMAGES)
    assert refused("evaluate", few, "--against", many, CNN) == f"{few}: has 5 images; at least 20 are needed"
    assert refused("evaluate", many, "--against", many).startswith("command line: evaluate.extractor: missing; choose")
    assert refused("evaluate", many, "--against", many, "sample.steps=3").startswith("command line: sample: not for")
    assert refused("evaluate", many, "--against", many, f"{CNN}x").startswith(
        "command line: evaluate.extractor: unknown extractor 'digits-cnnx'; choose from"
    )
    nowhere = tmp_path / "nowhere"
    assert refused("evaluate", nowhere, "--against", many, CNN) == f"{nowhere}: no such file or folder"
    assert refused("evaluate", many, "--against", nowhere, CNN) == f"{nowhere}: no such file or folder"
    (tmp_path / "note.txt").touch()
    line = refused("reference", tmp_path / "note.txt")  # before the extractor, which is missing too
    assert line.startswith(f"{tmp_path / 'note.txt'}: no images here; allowed: a run folder")
    (tmp_path / "empty").mkdir()
    assert refused("evaluate", tmp_path / "empty", "--against", many, CNN).startswith(
        f"{tmp_path / 'empty'}: contains no images"
    )
    np.savez(tmp_path / "mu.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
    line = refused("evaluate", many, "--against", tmp_path / "mu.npz", CNN)
    assert line == f"{tmp_path / 'mu.npz'}: mu has 3 numbers, but digits-cnn gives 64"
    np.savez(tmp_path / "mu.npz", mu=np.zeros(64))
    line = refused("evaluate", many, "--against", tmp_path / "mu.npz", CNN)
    assert line == f"{tmp_path / 'mu.npz'}: contains mu without its counterpart"
    np.savez(tmp_path / "mu.npz", mu=np.zeros(64), sigma=np.zeros((3, 3)))
    assert "sigma is (3, 3), but mu has 64 numbers" in refused("evaluate", many, "--against", tmp_path / "mu.npz", CNN)
    assert refused("evaluate", many, "--against", few, CNN) == f"{few}: has 5 images; at least 6 are needed"
    line = refused("evaluate", many, "--against", many, CNN, "evaluate.weights=x.pt")
    assert line.startswith("command line: evaluate.weights: digits-cnn reads no file; allowed: evaluate.weights=null")
    colour = as_npz(tmp_path / "colour.npz", IMAGES.expand(-1, 3, -1, -1))
    assert refused("evaluate", many, "--against", colour, "evaluate.extractor=test_evaluate_images:make") == (
        f"{colour}: its images have 3 channels, but test_evaluate_images.make was made for the samples' 1"
    )


class Mean(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(3).flatten(1)


def test_statistics_of_another_extractor_are_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    folder, out = as_folder(tmp_path / "real", IMAGES), tmp_path / "real.safetensors"
    other = "evaluate.extractor=test_evaluate_images:make"
    assert main(["reference", str(folder), other, f"out={out}"]) == 0
    line = refused("evaluate", folder, "--against", out, CNN)
    assert line == f"{out}: extractor is 'test_evaluate_images.make', not 'digits-cnn'; build it with this extractor"
    assert main(["evaluate", str(folder), "--against", str(out), other]) == 0
    (record,) = read(tmp_path / "real.results.jsonl")
    assert abs(record["fd/test_evaluate_images.make@60"]) < 1e-6 and record["recall/test_evaluate_images.make@60"] == 1


def make(request: object) -> nn.Module:
    """A custom extractor, named in the config."""
    return Mean()


def test_a_reference_file_is_built(tmp_path: Path, smoke_run: Path, capsys: Capture) -> None:
    assert main(["reference", str(smoke_run), "evaluate.count=100"]) == 0
    out = capsys.readouterr().out
    assert "extractor: digits-cnn\n" in out and "split: train\n" in out and "count: 100\n" in out
    path = Path(out.splitlines()[-1].removeprefix("file: "))
    assert path.parent == references.reference_folder() and path.is_file()
    part = references.choose_first(TRAIN, "train", 100)
    extractor = references.make_extractor("digits-cnn", None, TRAIN)
    assert references.statistics_of(extractor, part)[1] in path.name  # the same file that evaluate reads
    want = gaussian(extractor(TRAIN.images[balanced(TRAIN.labels, 100)]).pooled).cov.trace().item()
    assert references.read(path)[1].fit.cov.trace().item() == pytest.approx(want, rel=1e-9)

    mine = tmp_path / "mine.safetensors"
    assert main(["reference", str(smoke_run), "evaluate.count=100", f"out={mine}"]) == 0
    assert mine.read_bytes() == path.read_bytes()
    capsys.readouterr()
    assert main(["reference", str(smoke_run), f"out={mine}"]) == 2
    assert capsys.readouterr().err == f"error: {mine}: already exists; choose another name\n"
    mine.write_bytes(mine.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"damaged \(its hash differs\); remove it"):
        references.read(mine)


def test_reference_refuses_wrong_arguments(refused: Callable[..., str], tmp_path: Path, smoke_run: Path) -> None:
    assert refused("reference").startswith("command line: the following arguments are required: REAL")
    line = refused("reference", smoke_run, "out=stats.pt")
    assert line == "command line: out: must end in .safetensors, or in .npz for the ADM evaluator, got stats.pt"
    line = refused("reference", smoke_run, f"out={tmp_path / 'adm.npz'}")
    assert line.startswith(f"{tmp_path / 'adm.npz'}: the ADM evaluator reads Inception statistics with a spatial layer")
    assert refused("reference", smoke_run, "evaluate.count=2000").startswith(
        "command line: evaluate.count: must be at most 1437, the number of training images of data.name=digits, got"
    )


def test_settings_come_from_the_run_to_compare_with(smoke_run: Path) -> None:
    run = evaluate_images.run_of(smoke_run)
    assert run is not None and evaluate_images.run_of(smoke_run.parent) is None
    assert evaluate_images.settings_of([], run).extractor == "digits-cnn"
    assert evaluate_images.settings_of(["evaluate.extractor=inception"], run).extractor == "inception"
    assert evaluate_images.settings_of(["evaluate.reference=all"], run).reference == "all"
    assert evaluate_images.settings_of([], run).count == run.config.evaluate.count == 20
    assert evaluate_images.settings_of([], run, 60).count == 60


@pytest.mark.parametrize(
    "labels",
    [
        LABELS.numpy()[:, None],
        np.eye(10)[LABELS.numpy()],
        np.eye(10, dtype=bool)[LABELS.numpy()],
        LABELS.numpy().astype(np.float32),
    ],
    ids=["column", "one-hot", "one-hot bool", "float"],
)
def test_labels_of_an_npz_are_read_in_any_usual_shape(tmp_path: Path, labels: np.ndarray) -> None:
    found = images.open_images(as_npz(tmp_path / "a.npz", IMAGES, arr_1=labels)).labels
    assert found is not None and torch.equal(found, LABELS)


@pytest.mark.parametrize(
    "labels",
    [
        LABELS.numpy()[:59],
        LABELS.numpy() - 1.5,
        -1 - LABELS.numpy(),
        np.ones((60, 10)),
        np.array(["a"] * 60),
        np.zeros((60, 10, 1)),
        np.zeros((60, 0)),
    ],
    ids=["length", "fractions", "negative", "all hot", "names", "3 axes", "no columns"],
)
def test_labels_of_another_kind_are_refused(tmp_path: Path, labels: np.ndarray) -> None:
    path = as_npz(tmp_path / "a.npz", IMAGES, arr_1=labels)
    with pytest.raises(UserError) as caught:
        images.open_images(path)
    assert str(caught.value) == (
        f"{path}: arr_1 is {labels.dtype} {labels.shape}; allowed: the labels of 60 images as whole numbers (60,) or"
        " (60, 1), or one-hot (60, classes)"
    )


def test_labels_that_the_run_does_not_have_are_refused(
    tmp_path: Path, smoke_run: Path, refused: Callable[..., str]
) -> None:
    path = as_npz(tmp_path / "a.npz", IMAGES, arr_1=LABELS.numpy() + 1)
    assert refused("evaluate", path, "--against", smoke_run) == (
        f"{path}: arr_1 has label 10, but {smoke_run} has 10 classes, 0 to 9"
    )


def test_a_lossy_format_against_a_lossless_one_is_noted(tmp_path: Path, capsys: Capture) -> None:
    real, lossy = as_folder(tmp_path / "real", IMAGES), tmp_path / "lossy"
    lossy.mkdir()
    for i, image in enumerate(IMAGES):
        Image.fromarray(image[0].numpy()).save(lossy / f"{i:05d}.png", format="JPEG")  # found from the content
    note = "note: JPEG (lossy) images against PNG (lossless) ones: the compression alone moves every distance\n"
    assert main(["evaluate", str(lossy), "--against", str(real), CNN]) == 0
    assert capsys.readouterr().out.endswith(note)
    (record,) = read(tmp_path / "lossy.results.jsonl")
    assert record["images"]["formats"] == {"JPEG": 60} and record["reference"]["formats"] == {"PNG": 60}
    assert record["compression"] == note.removeprefix("note: ").rstrip()
    assert main(["evaluate", str(real), "--against", str(real), CNN]) == 0
    assert "note" not in capsys.readouterr().out
