"""The study command: every trial runs in its own process, failures stop no other trial, and repeating it resumes."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from made_runs import make_run, record

from diffbench.cli import main
from diffbench.evaluation import records
from diffbench.runs.lifecycle import open_any, train_in
from diffbench.studies.comparison import comparison_of_study
from diffbench.studies.config import load_study
from diffbench.studies.plan import TrainingVariant
from diffbench.studies.runner import folder_of_study, run_study
from diffbench.studies.trials import TrialFile, recipe_of

TINY = {
    "kind": "study",
    "experiment": "experiments/digits/dit.yaml",
    "title": "Tiny",
    "question": "Does it run?",
    "set": {
        "denoiser": {"depth": 1, "hidden_size": 32},
        "trainer.batch_size": 8,
        "sample": {"steps": "2", "guidance": 1.0},
        "evaluate.count": 20,
        "validation.count": 20,
    },
    "seeds": [0],
    "jobs": 2,
    "stop": {"images": 32},
}


def written(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | {"runs_dir": str(tmp_path / "runs")} | changes, sort_keys=False))
    return path


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run trials in the test process, one after the other, since starting a process takes seconds."""

    class Ended:
        returncode = 0

        def poll(self) -> int:
            return 0

    def start(file: TrialFile, jobs: int) -> Ended:
        file.run()
        file.log.touch()
        return Ended()

    monkeypatch.setattr("diffbench.studies.runner._start", start)
    monkeypatch.setattr("diffbench.studies.runner._terminate", lambda running: None)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run a study of two networks, one of which fails to train, each sampled in two ways; return its YAML."""
    tmp_path = tmp_path_factory.mktemp("study")
    axes = {
        "rate": {"sound": {"optimizer.lr": 1e-3}, "absurd": {"optimizer.lr": 1e30, "trainer.max_skipped": 1}},
        "sample.steps": ["2", "3"],
    }
    path = written(tmp_path, axes=axes)
    assert main(["study", str(path)]) == 1  # incomplete
    return path


def test_a_failed_trial_is_reported_and_stops_no_other(done: Path) -> None:
    folder = done.parent / "runs" / "studies" / "tiny"
    found = comparison_of_study(folder)
    statuses = {r.variant: r.status for r in found.trials}
    assert statuses == {
        "sound, steps=2": "complete",
        "sound, steps=3": "complete",
        "absurd, steps=2": "failed",
        "absurd, steps=3": "failed",
    }
    whys = {r.why for r in found.trials if r.status == "failed"}
    assert len(whys) == 1 and next(iter(whys)).startswith("exit code 2: error: ")
    steps = [r.record["sample"]["steps"] for r in found.trials if r.record]
    assert steps == ["2", "3"]
    assert len({r.run.folder for r in found.trials}) == 2  # both ways of sampling share a run
    page = (folder / "report.html").read_text()
    assert "Tiny" in page and "absurd" in page
    assert (folder / "report.csv").read_text().count("sound") == 2


def test_the_same_command_skips_complete_trials(
    done: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = done.parent / "runs" / "studies" / "tiny"
    before = {p: p.stat().st_mtime_ns for p in (done.parent / "runs" / "trials").rglob("*.safetensors")}
    started: list[Path] = []

    class Ended:
        returncode = 2

        def poll(self) -> int:
            return 2

    def start(file: TrialFile, jobs: int) -> Ended:
        started.append(file.path)
        return Ended()

    monkeypatch.setattr("diffbench.studies.runner._start", start)
    assert run_study(done) == folder
    assert [p.stem for p in started] == ["absurd_s0"]
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert "1 of 2 trials are already complete" in capfd.readouterr().out


def test_compare_takes_a_study_by_its_yaml_or_folder(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = done.parent / "runs" / "studies" / "tiny"
    outputs = []
    for what in (done, folder):
        assert main(["compare", str(what), "primary=fd"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and "absurd" in outputs[0] and str(folder / "report.html") in outputs[0]


def test_a_damaged_run_is_reported(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound = next(p for p in done.parent.glob("runs/trials/*/ema-*.safetensors"))
    before = sound.read_bytes()
    sound.write_bytes(b"broken")
    try:
        assert main(["compare", str(done)]) == 0
        assert f"{sound}: damaged (" in capsys.readouterr().out
    finally:
        sound.write_bytes(before)


def test_two_studies_with_the_same_name_do_not_share_a_folder(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (done.parent / "other").mkdir()
    other = done.parent / "other" / done.name
    other.write_text(done.read_text())
    assert main(["study", str(other), "--dry-run"]) == 2
    folder = done.parent / "runs" / "studies" / "tiny"
    message = f"error: {folder}: belongs to the study {done}; give one of the two YAMLs another name or runs_dir\n"
    assert capsys.readouterr().err == message


def test_a_new_seed_adds_trials_and_keeps_the_study(done: Path) -> None:
    study = folder_of_study(done, ["seeds=[0,1]", "jobs=1"], load_study(done))
    assert study.name == "tiny"
    assert folder_of_study(done, ["stop.images=64"], load_study(done)).name == "tiny-stop.images=64"


def test_running_part_of_a_changed_study_leaves_no_file_of_the_earlier_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(folder: Path, plan: list[TrainingVariant], *rest: object) -> bool:
        return bool([TrialFile.of(folder, trial, order).write() for order, trial in enumerate(plan)])

    monkeypatch.setattr("diffbench.studies.runner._run", run)
    folder = run_study(written(tmp_path, axes={"denoiser.depth": [1, 2, 3]}))
    run_study(written(tmp_path, axes={"denoiser.depth": [1, 2]}, stop={"images": [32, 64]}), only={"depth=1"})
    assert sorted(p.name for p in (folder / "trials").glob("*.yaml")) == ["depth=1_s0.yaml", "depth=2_s0.yaml"]
    found = comparison_of_study(folder)
    assert list(found.rungs) == ["32 images", "64 images"]
    assert [[(t.variant, t.images) for t in rung] for rung in found.rungs.values()] == 2 * [
        [("depth=1", 0), ("depth=2", 0)]
    ]


def test_a_recipe_has_the_evaluate_settings_of_the_record_not_of_the_run(tmp_path: Path) -> None:
    run = open_any(make_run(tmp_path / "dit", overrides=["evaluate.extractor=digits-cnn"]))

    def evaluate_settings(**changes: Any) -> dict[str, Any]:
        return recipe_of(run, record(0.5, **changes), "dit")["evaluations"]["dit"]["evaluate"]

    usual = {"count": 500, "reference": "same"}
    assert evaluate_settings() == usual
    other = {"name": "random-cnn-abc", "asked": "random-cnn", "file": None}
    more = {"extractor": other, "judge": {"run": "judge-s0", "accuracy": 0.9}, "fd_infinity/random-cnn@500": 0.4}
    assert evaluate_settings(**more) == usual | {"extractor": "random-cnn", "judge": "judge-s0", "infinity": True}


def test_a_dry_run_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, axes={"denoiser.depth": [1, 2]}, match={"by": "parameters", "to": "depth=1"})
    assert main(["study", str(path), "--dry-run", "seeds=[3,4]"]) == 0
    out = capsys.readouterr().out
    assert "2 networks x 2 seeds = 4 runs, 4 evaluations" in out
    assert "off parameters" in out and "hidden_size=" in out
    assert not list(tmp_path.glob("runs/trials/*"))


def test_tuning_grows_the_grid_and_chooses_training_by_the_bound_and_sampling_by_the_primary(
    in_process: None, tmp_path: Path
) -> None:
    grid = {"optimizer.lr": [3e-5, 3e-4, 3e-3], "sample.guidance": [1.0, 4.0]}
    tune = {"grid": grid, "share": 0.5}
    path = written(tmp_path, axes={"net": {"dit": {}}}, tune=tune, stop={"images": 320}, primary="fd")
    assert main(["study", str(path)]) == 0
    folder = tmp_path / "runs" / "studies" / "tiny"
    files = [TrialFile(file) for file in sorted((folder / "trials").glob("tuning*.yaml"))]
    bounds = {f.values["tuning"]["optimizer.lr"]: open_any(f.folder).last("val/bound") for f in files}
    assert {f.values["seed"] for f in files} == {1000}
    assert {f.values["config"]["trainer"]["max_images"] for f in files} == {160}
    assert len(bounds) > 3 and {3e-5, 3e-4, 3e-3, 3e-2} <= bounds.keys()  # the best value was at the edge of the grid
    best = min(bounds, key=lambda lr: bounds[lr] or 0.0)
    (sampled,) = (f for f in files if f.values["evaluations"])
    assert sampled.values["tuning"] == {"optimizer.lr": best}
    fds = {t.variant: t.values["fd/digits-cnn@20"] for t in sampled.trials()}
    assert fds.keys() == {"guidance=1", "guidance=4"}
    guidance = 1.0 if fds["guidance=1"] < fds["guidance=4"] else 4.0
    reported = TrialFile(folder / "trials" / "dit_s0.yaml")
    assert reported.values["config"]["optimizer"]["lr"] == best
    assert reported.values["config"]["sample"]["guidance"] == 1.0  # tuned only for evaluations
    assert reported.values["evaluations"] == {"dit": {"sample": {"guidance": guidance}}}
    (note,) = (n for n in json.loads((folder / "notes.json").read_text()) if n.startswith("Each net was tuned alike"))
    assert (
        f"Chosen: dit optimizer.lr={best}, sample.guidance={guidance}" in note and "optimizer.lr grew for all" in note
    )
    assert reported.complete and not reported.failure
    found = comparison_of_study(folder)
    assert [r.seed for r in found.trials] == [0] and len(found.tried) == len(bounds) + 2
    assert (folder / "plots" / "tuning.png").is_file()
    page = (folder / "report.html").read_text()
    assert "How it was tuned" in page and f"{bounds[best]:.4g}"[:5] in page


def test_one_run_passes_every_rung_and_is_scored_at_each(in_process: None, tmp_path: Path) -> None:
    path = written(tmp_path, axes={"net": {"dit": {}}}, stop={"images": [32, 96]})
    assert main(["study", str(path)]) == 0
    folder = tmp_path / "runs" / "studies" / "tiny"
    (run,) = (tmp_path / "runs" / "trials").glob("digits*")
    assert [r["images_seen"] for r in records.results(run)] == [32, 96]
    losses = [m["images"] for m in records.metrics(run) if "train/loss" in m]
    assert losses == sorted(set(losses)) and losses[-1] == 96  # no step is repeated
    found = comparison_of_study(folder)
    assert list(found.rungs) == ["32 images", "96 images"]
    first, last = (rung[0] for rung in found.rungs.values())
    assert (first.images, last.images) == (32, 96) and first.values["val/bound"] != last.values["val/bound"]
    file = TrialFile(folder / "trials" / "dit_s0.yaml")
    assert file.complete and file.config.optimizer.decay_images is None
    before = (run / "metrics.jsonl").read_bytes()
    file.run()  # as after a kill: nothing remains to be done
    assert (run / "metrics.jsonl").read_bytes() == before
    path.write_text(path.read_text() + "samplings: 2\n")
    assert main(["study", str(path)]) == 1
    early, late = (rung[0] for rung in comparison_of_study(folder).rungs.values())
    assert (early.status, late.status) == ("failed", "complete")
    assert early.why == "trained past 32 images before this sampling was requested"


def test_each_rung_cools_down_in_a_branch_equal_to_a_run_of_that_length(in_process: None, tmp_path: Path) -> None:
    stop = {"images": [32, 96], "cooldown": 0.25}
    path = written(tmp_path, axes={"net": {"dit": {}}}, stop=stop)
    assert main(["study", str(path)]) == 0
    trunk, *branches = sorted((tmp_path / "runs" / "trials").glob("digits*"))
    assert [b.name for b in branches] == [f"{trunk.name}-to-32", f"{trunk.name}-to-96"]
    file = TrialFile(tmp_path / "runs/studies/tiny/trials/dit_s0.yaml")
    assert file.complete and [b.optimizer.decay_images for b in file.lengths] == [[24, 32], [72, 96]]
    assert records.results(trunk) == [] and open_any(trunk).images_seen == 64  # a step before the last decay
    for branch, config in zip(branches, file.lengths, strict=True):
        assert [r["images_seen"] for r in records.results(branch)] == [config.trainer.max_images]
        steps = [m["images"] for m in records.metrics(branch) if "train/loss" in m]
        assert steps == sorted(set(steps)) and steps[-1] == config.trainer.max_images
        alone = train_in(tmp_path / f"alone-{branch.name}", config)
        for name, weight in open_any(branch).use_average().network.state_dict().items():
            assert torch.equal(weight, alone.network.state_dict()[name]), name
        resumed = (branch / "metrics.jsonl").read_text().count("\n")
        assert resumed >= (alone.folder / "metrics.jsonl").read_text().count("\n")
    found = comparison_of_study(tmp_path / "runs" / "studies" / "tiny")
    assert [rung[0].images for rung in found.rungs.values()] == [32, 96]
    assert any("over the last 25% of each a branch of it" in note for note in found.notes)
    before = (branches[0] / "metrics.jsonl").read_bytes()
    shutil.rmtree(trunk)
    file.run()  # branches are complete runs: nothing remains to be done
    assert (branches[0] / "metrics.jsonl").read_bytes() == before and not trunk.exists()


def test_the_reported_cell_of_a_branch_is_reproduced(in_process: None, tmp_path: Path) -> None:
    path = written(tmp_path, axes={"net": {"dit": {}}}, stop={"images": [32, 64], "cooldown": 0.5})
    assert main(["study", str(path)]) == 0
    report = tmp_path / "runs/studies/tiny/report.html"
    assert main(["reproduce", str(report), "all", f"out={tmp_path / 'again'}"]) == 0


def test_a_network_is_trained_once_and_sampled_with_several_seeds(in_process: None, tmp_path: Path) -> None:
    path = written(tmp_path, axes={"seeds.init": [5], "seeds.sample": [7, 8]})
    assert main(["study", str(path)]) == 0
    (run,) = (tmp_path / "runs" / "trials").glob("digits*")  # sampling seeds share one run
    assert [r["sample"]["seed"] for r in records.results(run)] == [7, 8]
    path = written(tmp_path, axes={"seeds.init": [5]}, samplings=3, seeds=[0, 1])
    assert main(["study", str(path)]) == 0
    found = comparison_of_study(tmp_path / "runs" / "studies" / "tiny").trials
    assert [[r["sample"]["seed"] for r in t.records] for t in found] == [
        [0, 1_000_000, 2_000_000],
        [1, 1_000_001, 2_000_001],
    ]
    assert len({t.run.folder for t in found if t.run}) == 2 and run in {t.run.folder for t in found if t.run}
    fd = "fd/digits-cnn@20"
    for trial in found:
        each = [r[fd] for r in trial.records]
        assert len(set(each)) == 3 and trial.values[fd] == pytest.approx(sum(each) / 3)
    rows = list(csv.DictReader((tmp_path / "runs/studies/tiny/report.csv").read_text().splitlines()))
    assert [float(r[fd]) for r in rows] == [r[fd] for t in found for r in t.records]
    assert [r["sample_seed"] for r in rows[:3]] == ["0", "1000000", "2000000"]


def test_other_experiments_are_refused_as_studies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "experiments/digits/dit.yaml"]) == 2
    assert "kind: must be study, got 'denoiser'" in capsys.readouterr().err
    assert main(["study", str(written(tmp_path, experiment="experiments/digits/classifier.yaml", set={}))]) == 2
    assert "experiment: experiments/digits/classifier.yaml is not a denoiser experiment" in capsys.readouterr().err


def test_a_study_runs_from_any_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = Path("experiments/studies/backbones.yaml").resolve()
    (tmp_path / "own").mkdir()
    path = written(tmp_path / "own", experiment="dit-own.yaml", set={}, axes={"denoiser.depth": [1]}, runs_dir="runs")
    (path.parent / "dit-own.yaml").write_text(f"base: {Path('experiments/digits/dit.yaml').resolve()}\n")
    monkeypatch.chdir(tmp_path)
    assert main(["study", str(path), "--dry-run", "seeds=[3]"]) == 0
    assert "1 networks x 1 seeds = 1 runs" in capsys.readouterr().out
    plan = load_study(shipped)
    assert all(Path(keys["experiment"]).is_file() for keys in plan.axes["backbone"].values())
    (path.parent / "dit-own.yaml").unlink()
    assert main(["study", str(path), "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert f"{path}: experiment: dit-own.yaml: no such file; looked in {path.parent}, " in err and str(tmp_path) in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"primary": "accuracy"}, "primary: accuracy does not rank variants; choose from val/bound, fd, "),
        ({"axes": {"evaluate.count": [20, 5000]}}, "evaluate.count: must be at most 1437"),
        ({"set": {"data.name": "images", "data.path": "/nowhere"}}, "tiny.yaml: data.path: no file or folder /nowhere"),
        ({"axes": {"denoiser.num_heads": [1, 3]}}, "denoiser.num_heads"),
    ],
)
def test_impossible_studies_are_refused_before_training(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", str(written(tmp_path, **changes))]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "networks x" not in captured.out
    assert not (tmp_path / "runs" / "trials").exists()
