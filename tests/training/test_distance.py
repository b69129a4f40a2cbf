"""Distances in training: averaged weights, restored on exceptions, off the clock; best weights; bit-exact resume."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffbench.cli import main
from diffbench.core import rng
from diffbench.evaluation import reference
from diffbench.evaluation import scorer as scorers
from diffbench.metrics.suite import Suite
from diffbench.runs.denoiser import DenoiserRun
from diffbench.runs.lifecycle import load, train
from diffbench.sampling.sampler import Sampler
from diffbench.training.checkpoint import SaveState
from diffbench.training.distances import FrechetDistance
from diffbench.training.ema import EMA

ROOT = Path(__file__).parents[2]
DIT = str(ROOT / "experiments" / "digits" / "dit.yaml")
TINY = [
    "trainer.batch_size=8",
    "trainer.max_images=160",  # 20 steps
    "trainer.log_images=80",
    "trainer.validate_images=160",
    "trainer.checkpoint_images=40",
    "trainer.sample_images=160",
    "optimizer.warmup_images=0",
    "optimizer.lr=0.01",
    "ema.decays=[0.5]",
    "denoiser.hidden_size=32",
    "denoiser.num_heads=4",
    "denoiser.depth=1",
    "sample.steps='3'",
    "evaluate.every_images=32",
    "evaluate.every_count=20",
    "evaluate.best=fd",
    "tag=d",
]


def series(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


def distances(folder: Path) -> dict[int, float]:
    return {int(m["images"]): m["fd/digits-cnn@20"] for m in series(folder) if "fd/digits-cnn@20" in m}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> DenoiserRun:
    return train(DIT, [*TINY, f"runs_dir={tmp_path_factory.mktemp('unbroken')}"])


def suite_of(run: DenoiserRun) -> Suite:
    extractor = reference.run_extractor(run.config, run.train_set)
    return Suite(scorers.training_measurement(extractor, run.train_set, run.config.evaluate.every_count), brief=True)


def test_distances_are_measured_at_their_interval_and_at_the_end(unbroken: DenoiserRun) -> None:
    assert list(distances(unbroken.folder)) == [32, 64, 96, 128, 160]


def test_the_averaged_weights_are_scored_on_separate_samples(unbroken: DenoiserRun) -> None:
    c, count = unbroken.config, 20
    labels = torch.arange(count) * 10 // count

    def fd(seed: int) -> float:
        suite = suite_of(unbroken)
        suite.update(unbroken.sampler(c.sample)(labels, c.sample.unguided(), seed=seed), torch.arange(count))
        return suite.compute()["fd"]

    last = distances(unbroken.folder)[160]
    assert fd(rng.key(c.seed, "distance")) == pytest.approx(last, rel=1e-4)  # other batch sizes round differently
    assert fd(c.seed) != pytest.approx(last, rel=1e-3)  # the final evaluation draws other samples


def test_the_best_weights_are_kept_and_scored_again(unbroken: DenoiserRun) -> None:
    found = distances(unbroken.folder)
    best = min(found, key=lambda images: found[images])
    end = series(unbroken.folder)[-1]
    assert end["best/images"] == best
    assert end["best/fd/digits-cnn@20"] not in found.values()
    run = load(unbroken.folder)
    run.use_best()
    assert (run.images_seen, run.ema, run.snapshot) == (best, 0.5, "best")
    suite = suite_of(run)
    images = run.sampler(run.config.sample)(
        torch.arange(20) * 10 // 20, run.config.sample.unguided(), seed=rng.key(0, "fresh distance")
    )
    suite.update(images, torch.arange(20))
    assert suite.compute()["fd"] == pytest.approx(end["best/fd/digits-cnn@20"], rel=1e-4)


def test_a_record_of_the_best_weights_names_the_snapshot(unbroken: DenoiserRun, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(unbroken.folder, tmp_path / "run"))
    assert main(["evaluate", str(folder), "snapshot=best", "evaluate.count=20"]) == 0
    record = json.loads((folder / "results.jsonl").read_text().splitlines()[-1])
    assert (record["snapshot"], record["images_seen"]) == ("best", series(folder)[-1]["best/images"])


def test_a_killed_run_ends_with_the_same_distances_and_best_weights(
    unbroken: DenoiserRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_end = SaveState.on_train_batch_end

    class Killed(BaseException):
        pass

    def killed(self: SaveState, trainer: Any, *rest: Any) -> None:
        step_end(self, trainer, *rest)
        if trainer.global_step in (9, 17) and trainer.global_step not in done:
            done.append(trainer.global_step)
            raise Killed

    done: list[int] = []
    monkeypatch.setattr(SaveState, "on_train_batch_end", killed)
    for _ in range(2):  # each time after a distance that no checkpoint contains
        with pytest.raises(Killed):
            train(DIT, [*TINY, f"runs_dir={tmp_path}"])
    run = train(DIT, [*TINY, f"runs_dir={tmp_path}"])
    assert done == [9, 17]
    assert series(run.folder) == series(unbroken.folder)
    ours, theirs = (load_file(r.folder / "best.safetensors") for r in (run, unbroken))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_resume_with_another_metric_selects_the_best_weights_again(
    unbroken: DenoiserRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*TINY, f"runs_dir={tmp_path}", "trainer.max_images=80"]
    train(DIT, [*argv, "evaluate.best=kid"])  # its values are far below those of fd
    run = train(DIT, [*TINY, f"runs_dir={tmp_path}"])
    found = distances(run.folder)
    later = {images: found[images] for images in (96, 128, 160)}
    assert series(run.folder)[-1]["best/images"] == min(later, key=lambda images: later[images])
    assert " were selected with other settings: selecting again by fd/digits-cnn@20\n" in capsys.readouterr().out


def test_no_weight_of_the_extractor_enters_module_or_checkpoint(unbroken: DenoiserRun) -> None:
    state = torch.load(unbroken.folder / "checkpoints" / "step-20.ckpt", weights_only=True)
    names = {f"network.{name}" for name in unbroken.network.state_dict()}
    assert set(state["state_dict"]) == names
    assert set(state["callbacks"]["FrechetDistance"]) == {"best"}


class Stop(Exception):
    pass


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Record the state when the first samples of a distance are drawn; drawing them then fails."""
    seen: list[dict[str, Any]] = []

    def draw(sampler: Sampler, *args: Any, **kwargs: Any) -> None:
        (callback,) = callbacks
        seen.append(
            {
                "weights": [p.detach().clone() for p in sampler.denoiser.parameters()],
                "average": [a.clone() for a in callback.ema.averages[0.5]],
                "running": callback.logger.clock._started is not None,
                "denoiser": sampler.denoiser,
            }
        )
        raise Stop

    callbacks: list[FrechetDistance] = []
    monkeypatch.setattr(Sampler, "__call__", draw)
    monkeypatch.setattr(FrechetDistance, "on_train_start", lambda self, *_: callbacks.append(self))
    before: list[list[torch.Tensor]] = []
    update = EMA.update

    def spied(self: Any) -> None:
        update(self)
        before[:] = [[p.detach().clone() for p in self._parameters]]

    monkeypatch.setattr(EMA, "update", spied)
    with pytest.raises(Stop):
        train(DIT, [*TINY, f"runs_dir={tmp_path}"])
    seen[0]["raw"] = before[0]
    return seen


def test_distances_use_averaged_weights_and_restore_raw_ones_after_an_exception(watched: list[dict[str, Any]]) -> None:
    (seen,) = watched
    assert all(torch.equal(a, b) for a, b in zip(seen["weights"], seen["average"], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen["raw"], seen["average"], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(seen["denoiser"].parameters(), seen["raw"], strict=True))
    assert not seen["running"]  # its time does not count as training


def test_the_cost_of_distances_is_printed_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(DIT, ["debug=smoke", "evaluate.every_images=16", f"runs_dir={tmp_path}"])
    out = capsys.readouterr().out
    printed = out.index("distances with digits-cnn: 20 samples every 16 images, about ")
    assert printed < out.index("100%  images")


def test_missing_or_damaged_best_weights_are_refused(
    unbroken: DenoiserRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(unbroken.folder, tmp_path / "run"))
    (folder / "best.safetensors").write_bytes(b"x")
    assert main(["evaluate", str(folder), "snapshot=best"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {folder}/best.safetensors: damaged (")
    (folder / "best.safetensors").unlink()
    assert main(["evaluate", str(folder), "snapshot=best"]) == 2
    assert capsys.readouterr().err == (
        f"error: {folder}: snapshot: best.safetensors is missing; train with evaluate.best=fd to keep one\n"
    )
