"""Evaluation of a run: what a record contains, that samples are drawn once, comparisons across protocols, export."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from formulas import inception_score
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffbench.cli import main
from diffbench.core import rng
from diffbench.core.store import Store
from diffbench.data.sets import balanced
from diffbench.evaluation import records
from diffbench.evaluation import reference as references
from diffbench.evaluation import scorer as scorers
from diffbench.metrics import Extractor, Features
from diffbench.metrics.base import Measurement, ReferenceStatistics
from diffbench.metrics.copies import CopyDetector
from diffbench.metrics.frechet import frechet_distance, gaussian
from diffbench.metrics.kernel import kernel_distance
from diffbench.metrics.neighbours import neighbours
from diffbench.runs import drawing, evaluate
from diffbench.runs.lifecycle import load
from diffbench.sampling.images import CAPTION_HEIGHT
from diffbench.sampling.sampler import Sampler

Capture = pytest.CaptureFixture[str]


def newest(folder: Path) -> dict[str, Any]:
    return records.results(folder)[-1]


def test_a_record_contains_values_and_all_that_they_depend_on(smoke_run: Path) -> None:
    run = load(smoke_run)
    (record, guided) = evaluate.evaluate(run, ["evaluate.count=40", "seed=3"])
    assert records.results(smoke_run)[-2:] == [record, guided]
    assert (record["guidance"], guided["guidance"]) == (1.0, 1.5)
    assert record["sample"]["seed"] == 3 and record["sample"]["sampler"] == "ddpm"
    assert record["drawing"]["network_evaluations"] == 2 and guided["drawing"]["network_evaluations"] == 4
    assert (record["images_seen"], record["ema"], record["snapshot"]) == (16, 0.999, "last")
    assert (record["data"], record["data_name"], record["precision"]) == (
        run.train_set.fingerprint(),
        "digits",
        "float32",
    )
    assert record["reference"] == {
        **{"key": record["reference"]["key"], "split": "train", "count": 40},
        "all": False,
    }
    assert record["floor"]["count"] == 40 and record["floor"]["images"].startswith("train: 40 outside the first 40")
    assert {"time", "versions", "device", "commit", "extractor", "scoring_seconds"} <= record.keys()
    assert record["drawing"]["clipped"] == 0.0  # ddpm clamps the predicted image


def test_values_equal_those_of_the_metric_functions(smoke_run: Path) -> None:
    run = load(smoke_run)
    (record, _) = evaluate.evaluate(run, ["evaluate.count=60"])
    samples = Store(smoke_run / record["drawing"]["folder"]).open().arrays["images"]
    labels = torch.arange(60) * 10 // 60
    assert torch.equal(samples, run.sampler(run.config.sample)(labels, run.config.sample.unguided()))
    extractor = references.make_extractor("digits-cnn", None, run.train_set)
    real = run.train_set.images[balanced(run.train_set.labels, 60)]
    (x, logits, _), reference = extractor(samples), extractor(real).pooled
    test = extractor(run.held_out.images[balanced(run.held_out.labels, 60)]).pooled
    assert logits is not None
    detector = CopyDetector(run.train_set.images)
    calibration = detector.calibrate(run.held_out.images.split(100))
    want = {
        "fd/digits-cnn@60": frechet_distance(x, reference),
        "fd_held_out/digits-cnn@60": frechet_distance(x, test),
        "fd_gap/digits-cnn@60": frechet_distance(x, test) - frechet_distance(x, reference),
        "kid/digits-cnn@60": float(kernel_distance(x, reference)),
        "precision/digits-cnn@60": neighbours(x, reference, 3).precision,
        "recall/digits-cnn@60": neighbours(x, reference, 3).recall,
        "density/digits-cnn@60": neighbours(x, reference, 5).density,
        "coverage/digits-cnn@60": neighbours(x, reference, 5).coverage,
        "inception_score/digits-cnn@60": inception_score([logits]),
        "label_accuracy/digits-cnn@60": float((logits.argmax(1) == labels).double().mean()),
        "authenticity@60": float(detector.judge(samples).authentic.double().mean()),
        "copies@60": 0.0,
        "copies_low@60": 0.0,
        "copies_high@60": record["copies_high@60"],
    }
    assert records.values(record) == pytest.approx(want, rel=1e-6)
    assert record["memorisation"] == {"flagged": 0, "count": 60, **dataclasses.asdict(calibration)}
    assert record["authenticity_held_out"] == calibration.authenticity
    others = references.choose_others(references.choose_first(run.train_set, "train", 60))
    others_features = extractor(run.train_set.images[others.index]).pooled
    assert record["floor"]["fd"] == pytest.approx(frechet_distance(others_features, reference))


def test_held_out_images_are_compared_with_as_many_training_images(smoke_run: Path) -> None:
    run = load(smoke_run)
    (record, _) = evaluate.evaluate(run, ["evaluate.count=400"])  # more than the 360 held-out digits
    features = references.make_extractor("digits-cnn", None, run.train_set)
    scorer = scorers.run_scorer(run.config.evaluate, features, run.train_set, run.held_out)
    assert scorer.measurement.references.keys() == {"fd", "fd_held_out"}  # 360 are enough for the smoke run's 20
    samples = drawing.samples_of(
        run, evaluate.change(run.config, {"evaluate": {"count": 400}}), run.config.sample.unguided()
    ).images()
    x, test = features(samples).pooled, features(run.held_out.images).pooled
    counts = run.held_out.labels.bincount()
    assert counts.tolist() != [36] * 10  # training images with the same class counts are compared
    index = [(run.train_set.labels == c).nonzero()[:n, 0] for c, n in enumerate(counts.tolist())]
    alike = features(run.train_set.images[torch.cat(index)]).pooled
    assert record["fd_gap/digits-cnn@400"] == pytest.approx(
        frechet_distance(x, test) - frechet_distance(x, alike), rel=1e-5
    )


def test_samples_are_drawn_once(smoke_run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    before = evaluate.evaluate(load(smoke_run), ["evaluate.count=30"])
    assert "30 samples by ddpm, 2 network evaluations each: about " in capsys.readouterr().out

    def drawn_again(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Sampler, "__call__", drawn_again)
    after = evaluate.evaluate(load(smoke_run), ["evaluate.count=30"])
    assert "samples by" not in capsys.readouterr().out
    assert [records.values(r) for r in before] == [records.values(r) for r in after]
    assert after[0]["drawing"]["drawn"] == 0
    with pytest.raises(AssertionError):
        evaluate.evaluate(load(smoke_run), ["evaluate.count=30", "seed=1"])


def test_a_record_is_found_only_for_the_config_that_made_it(smoke_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load(smoke_run)
    evaluate.evaluate(run, ["evaluate.count=20"])

    def answered(**changes: Any) -> bool:
        sections: dict[str, Any] = {"evaluate": {"count": 20} | changes.pop("evaluate", {})}
        return evaluate.find_record(run, evaluate.change(run.config, sections | changes)) is not None

    assert answered() and answered(evaluate={"extractor": "digits-cnn"})
    with monkeypatch.context() as patch:  # with the packages of another machine
        patch.setattr(references, "suited_extractor", lambda config: "random-cnn")
        assert answered()
    assert not answered(evaluate={"extractor": "random-cnn"}) and not answered(evaluate={"reference": "all"})
    assert not answered(sample={"precision": "bf16-mixed"}) and not answered(evaluate={"weights": "other.pt"})
    evaluate.evaluate(run, ["evaluate.count=20", "sample.precision=bf16-mixed", "evaluate.extractor=random-cnn"])
    how = {"precision": "bf16-mixed"}
    assert answered(sample=how, evaluate={"extractor": "random-cnn"}) and not answered(sample=how)
    assert not answered(evaluate={"extractor": "random-cnn"})


def test_the_record_of_a_custom_extractor_is_found_again(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_features.py").write_text(
        "import torch\n\n\nclass Own(torch.nn.Module):\n"
        "    def forward(self, x):\n        return x.float()[:, 0, 2:4, 2]\n\n\n"
        "def make(request):\n    return Own()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    run, settings = load(smoke_run), {"count": 20, "extractor": "own_features:make"}
    evaluate.evaluate(run, [f"evaluate.{key}={value}" for key, value in settings.items()])
    other = settings | {"extractor": "own_features:mak"}
    assert evaluate.find_record(run, evaluate.change(run.config, {"evaluate": other})) is None
    found = evaluate.find_record(run, evaluate.change(run.config, {"evaluate": settings}))
    assert found is not None and found["extractor"]["asked"] == "own_features:make"


def test_an_average_is_found_however_its_decay_is_typed(smoke_run: Path, capsys: Capture) -> None:
    for typed in (".999", "9.99e-1"):
        (record, _) = evaluate.evaluate(load(smoke_run), ["evaluate.count=20", f"ema={typed}"])
        assert record["ema"] == 0.999
    assert main(["evaluate", str(smoke_run), "ema=best"]) == 2
    assert capsys.readouterr().err == "error: command line: ema: must be a number, got 'best'\n"
    assert main(["evaluate", str(smoke_run), "ema=0.999", "snapshot=best"]) == 2
    assert "command line: ema: snapshot=best fixes the average; leave one" in capsys.readouterr().err


def test_all_training_images_may_be_the_reference(smoke_run: Path) -> None:
    (record, _) = evaluate.evaluate(load(smoke_run), ["evaluate.count=40", "evaluate.reference=all"])
    assert record["reference"]["count"] == 1437
    assert record["floor"]["images"].startswith("held-out: ")  # no training image is left
    (record,) = evaluate.evaluate(
        load(smoke_run), ["evaluate.count=400", "evaluate.reference=all", "sample.guidance=1"]
    )
    assert record["floor"]["count"] == 360 and record["floor"]["images"].startswith("held-out: the first 360, of the")
    assert set(records.values(record)) == set(records.values(newest(smoke_run)))


def test_damaged_or_changed_cached_numbers_are_named(smoke_run: Path, capsys: Capture) -> None:
    evaluate.evaluate(load(smoke_run), ["evaluate.count=20"])
    (path,) = references.reference_folder().glob("digits-cnn-copies-*-360-*")
    whole = path.read_bytes()
    try:
        for content in (b"", whole.replace(b"threshold", b"threshole")):
            path.write_bytes(content)
            capsys.readouterr()
            assert main(["evaluate", str(smoke_run), "evaluate.count=20"]) == 2
            assert capsys.readouterr().err.startswith(f"error: {path}: damaged (")
    finally:
        path.write_bytes(whole)


def test_the_nearest_neighbours_are_saved_as_an_image(smoke_run: Path) -> None:
    (record, _) = evaluate.evaluate(load(smoke_run), ["evaluate.count=20"])
    with Image.open(smoke_run / record["drawing"]["folder"] / "nearest.png") as image:
        cell = 8 * 8 + 4
        assert image.size == (16 * cell, 2 * (CAPTION_HEIGHT + cell))


def test_the_export_is_in_the_adm_evaluators_format(smoke_run: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "samples.npz"
    assert main(["evaluate", str(smoke_run), "evaluate.count=50", f"export={out}"]) == 0
    with np.load(out, allow_pickle=False) as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert images.shape == (50, 8, 8, 1) and images.dtype == np.uint8
    run = load(smoke_run)
    order = rng.permutation(rng.key("order of samples", "export"), 50)
    want = run.sampler(run.config.sample)(
        torch.arange(50) * 10 // 50, run.config.sample
    )  # the guided ones were drawn last
    assert np.array_equal(images[:, :, :, 0], want[order][:, 0].numpy())
    assert np.array_equal(labels, (torch.arange(50) * 10 // 50)[order].numpy())
    assert len(set(labels[:10].tolist())) > 3  # not sorted by class
    capsys.readouterr()
    assert main(["evaluate", str(smoke_run), f"export={out}"]) == 2
    assert capsys.readouterr().err == f"error: {out}: already exists; choose another name\n"
    assert main(["evaluate", str(smoke_run), f"export={out.with_suffix('.png')}"]) == 2
    assert capsys.readouterr().err.startswith("error: command line: export: must end in .npz, got ")


def test_samples_that_are_not_finite_end_in_one_line(
    smoke_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def broken(self: Sampler, x: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x, float("nan"))

    lines = len(records.results(smoke_run))
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "pixels", broken)
        assert main(["evaluate", str(smoke_run), "evaluate.count=21"]) == 2
    assert capsys.readouterr().err == f"error: {smoke_run}: 1344 values of the samples are not finite\n"
    assert len(records.results(smoke_run)) == lines
    assert main(["evaluate", str(smoke_run), "evaluate.count=21"]) == 0  # nothing of the failed attempt was kept
    assert newest(smoke_run)["drawing"]["drawn"] == 21


def test_an_extractor_without_its_weights_stops_training_before_it_starts(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DIFFBENCH_INCEPTION", raising=False)
    argv = ["train", "experiments/digits/dit.yaml", "evaluate.extractor=inception", f"runs_dir={tmp_path / 'runs'}"]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: command line: evaluate.extractor: inception needs a weights file; set evaluate.w")
    assert not (tmp_path / "runs").exists()


def test_compare_refuses_to_mix_protocols(smoke_run: Path, capsys: Capture) -> None:
    other = Path(shutil.copytree(smoke_run, smoke_run.with_name("dit-other-s0")))
    assert main(["evaluate", str(other), "evaluate.count=30"]) == 0
    capsys.readouterr()
    assert main(["compare", str(smoke_run), str(other)]) == 0  # both still have records of 20 samples
    out = capsys.readouterr().out
    assert "fd/digits-cnn@20" in out and "fd/digits-cnn@30" not in out
    lines = (other / "results.jsonl").read_text().splitlines()
    (other / "results.jsonl").write_text("\n".join(lines[2:]) + "\n")
    assert main(["compare", str(smoke_run), str(other)]) == 2
    assert capsys.readouterr().err == (
        f"error: {smoke_run} and {other}: measured differently: reference.count is 20 in one and 30 in the other;"
        " evaluate both with the same keys to compare them\n"
    )
    records = [json.loads(line) | {"data": "0" * 16} for line in lines[:2]]
    (other / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(["compare", str(smoke_run), str(other)]) == 2
    assert capsys.readouterr().err.endswith(f"and {'0' * 16} in the other; compare runs on the same images\n")
    (other / "results.jsonl").unlink()
    assert main(["compare", str(smoke_run), str(other)]) == 0  # nothing to mix


def test_records_of_another_sampler_are_not_mixed(smoke_run: Path, capsys: Capture) -> None:
    other = Path(shutil.copytree(smoke_run, smoke_run.with_name("dit-other-s0")))
    (other / "results.jsonl").unlink()
    assert main(["evaluate", str(other), "sample.sampler=ddim"]) == 0
    capsys.readouterr()
    assert main(["compare", str(smoke_run), str(other)]) == 2
    assert "sample.sampler is ddpm in one and ddim in the other" in capsys.readouterr().err


def test_old_records_are_kept_and_new_ones_are_appended(smoke_run: Path) -> None:
    before = (smoke_run / "results.jsonl").read_text()
    evaluate.evaluate(load(smoke_run), ["evaluate.count=20"])
    after = (smoke_run / "results.jsonl").read_text()
    assert after.startswith(before) and len(after.splitlines()) == len(before.splitlines()) + 2
    assert [json.loads(line)["format"] for line in after.splitlines()] == [1] * 4


@pytest.mark.parametrize(("patience", "expected"), [(1e9, []), (-1.0, [(30, 10), 10, 10])])
def test_slow_scoring_shows_its_progress(monkeypatch: pytest.MonkeyPatch, patience: float, expected: list[Any]) -> None:
    shown: list[Any] = []

    @contextlib.contextmanager
    def progress(what: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
        shown.append((total, done))
        yield shown.append

    monkeypatch.setattr(scorers, "progress", progress)
    monkeypatch.setattr(scorers, "PATIENCE", patience)
    batches = list(scorers.numbered(iter(torch.zeros(30, 1, 2, 2).split(10)), None))
    assert [len(b[0]) for b in scorers.with_progress("scored", batches, 30)] == [10, 10, 10]
    assert shown == expected


def test_chunks_of_the_inception_score_are_those_of_the_exported_file() -> None:
    """If samples stayed sorted by class, a chunk would contain few classes and its score would be too low."""
    count, generator = 6000, torch.Generator().manual_seed(0)
    classes = torch.arange(count) * 10 // count
    logits = 4 * torch.nn.functional.one_hot(classes, 10) + torch.randn(count, 10, generator=generator)
    extractor = Extractor(
        "logits",
        torch.nn.Identity(),
        lambda x: Features(x[:, 0, :2, 0], logits[x[:, 1, 0, 0].long() * 256 + x[:, 2, 0, 0].long()]),
        dim=2,
        weights="",
        licence="",
        classes=10,
    )
    numbers = torch.arange(count)
    images = torch.randint(0, 256, (count, 3, 2, 2), generator=generator).to(torch.uint8)
    images[:, 1], images[:, 2] = (numbers // 256)[:, None, None], (numbers % 256)[:, None, None]
    statistics = ReferenceStatistics(gaussian(torch.randn(9, 2)), torch.zeros(0, 2))
    measurement = Measurement(extractor, {"fd": statistics}, count, by_class=True, permutation=scorers.permutation)
    found = scorers.Scorer(measurement, {}).scores([(numbers, images, None)])["inception_score/logits@6000"]
    order = scorers.permutation(count, "order of samples", "export")
    assert found == pytest.approx(inception_score(logits[order].split(5000)))
    measurement.by_class = False
    plain = scorers.Scorer(measurement, {}).scores([(numbers, images, None)])["inception_score/logits@6000"]
    assert plain == pytest.approx(inception_score(logits.split(5000))) and plain < found - 0.5


def test_other_sampling_settings_get_their_own_tag(smoke_run: Path) -> None:
    def score(*overrides: str) -> dict[str, Any]:
        return evaluate.evaluate(load(smoke_run), ["evaluate.count=20", *overrides])[-1]

    unguided = "sample.guidance=1"
    found = {
        "": score(unguided),
        "sample.sampler=ddim,sample.steps=4/": score(unguided, "sample.sampler=ddim", "sample.steps=4"),
        "guided/sample.guidance=3.0/": score("sample.guidance=3"),
        "seed=7/": score(unguided, "seed=7"),
        "evaluate.reference=all/": score(unguided, "evaluate.reference=all"),
    }
    name, events = "fd/digits-cnn@20", EventAccumulator(str(smoke_run)).Reload()
    for prefix, record in found.items():
        assert records.tag_prefix(record) == prefix
        assert events.Scalars(prefix + name)[-1].value == pytest.approx(record[name])
    assert all(s.value == pytest.approx(found[""][name]) for s in events.Scalars(name))
    assert found[""]["departures"] == {} and found["seed=7/"]["departures"] == {"seed": 7}
    ddim = found["sample.sampler=ddim,sample.steps=4/"]
    assert ddim["departures"] == {"sample.sampler": "ddim", "sample.steps": "4"}
    assert records.settings_of(ddim) == ["sample.sampler=ddim", "sample.steps=4"]
    assert records.settings_of(found["guided/sample.guidance=3.0/"]) == ["guidance 3"]


def test_scores_are_in_tensorboard_too(smoke_run: Path) -> None:
    run = load(smoke_run)
    record = evaluate.evaluate(run, ["evaluate.count=20", "sample.guidance=1", "sample.steps=2"])[0]
    events = EventAccumulator(str(smoke_run)).Reload()
    name = "coverage/digits-cnn@20"
    assert events.Scalars(name)[-1].step == run.images_seen == 16
    assert events.Scalars(name)[-1].value == pytest.approx(record[name])
