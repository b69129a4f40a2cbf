"""The plan of a study: budgets, sizes, shared runs; every variant of a shipped study takes one training step."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffbench.config.kinds import RunConfig
from diffbench.config.load import change, flatten, load
from diffbench.core.errors import UserError
from diffbench.denoisers import DENOISERS
from diffbench.reports.results import TriedPoint
from diffbench.runs import build
from diffbench.runs.denoiser import DenoiserRun
from diffbench.studies.budget import Probe
from diffbench.studies.config import StopConfig, StudyConfig, TuneConfig, load_study, variants
from diffbench.studies.matching import match_size, size_of
from diffbench.studies.notes import equal_by_construction, notes_of
from diffbench.studies.plan import evaluation_config, planned_trials, training_variants
from diffbench.studies.trials import TrialFile
from diffbench.studies.tuning import extended, tuning_so_far
from diffbench.training.diffusion import DiffusionModule

STUDIES = sorted(p for p in Path("experiments/studies").glob("*.yaml") if p.name[0] != "_")
# The other objectives studies repeat objectives-dit with another backbone.
DIGITS = [p for p in STUDIES if "cifar" not in p.name and ("objectives" not in p.stem or p.stem == "objectives-dit")]


def plan(name: str, **changes: object) -> tuple[StudyConfig, Path]:
    path = Path(f"experiments/studies/{name}.yaml")
    return replace(load_study(path), **changes), path  # type: ignore[arg-type]


def test_equal_flops_give_equal_macs_times_images() -> None:
    study, path = plan("backbones")
    found = training_variants(study, path, {}, lambda config: 1.0)
    assert [g.name for g in found] == ["unet", "dit", "diffit", "ddpmpp", "uvit", "segformer"]
    for group in found:
        images = group.config.trainer.max_steps * group.config.trainer.batch_size
        assert group.flops == 6 * group.cost.macs * images
        assert group.rungs[1][1] == "1.3e+12 training FLOPs"
        assert [n for n, _ in group.rungs] == sorted(n for n, _ in group.rungs) and group.rungs[-1][0] == images
        for (seen, _), flops in zip(group.rungs, study.stop.rungs, strict=True):
            assert abs(seen - flops / (6 * group.cost.macs)) <= group.config.trainer.batch_size / 2 + 1
        assert group.config.optimizer.decay_images is None  # no rung is on the decay towards another
        assert group.residual is not None and abs(group.residual) < 0.1


def test_with_a_single_budget_the_learning_rate_decays_to_the_end_of_the_run() -> None:
    study, path = plan("window")
    (first, *_) = training_variants(study, path, {}, lambda config: 1.0)
    assert first.config.optimizer.decay_images == first.images == 51_200 and first.rungs == [(51_200, "51,200 images")]


def test_a_cooldown_is_the_last_fraction_of_each_budget(tmp_path: Path) -> None:
    study, path = plan("window", stop=StopConfig(images=51_200, cooldown=0.2))
    (first, *_) = training_variants(study, path, {}, lambda config: 1.0)
    assert first.config.optimizer.decay_images == [40_960, 51_200] and first.trained_images == 51_200
    study, path = plan("window", stop=StopConfig(images=[12_800, 51_200], cooldown=0.2))
    (ladder, *_) = training_variants(study, path, {}, lambda config: 1.0)
    assert ladder.config.optimizer.decay_images is None and ladder.trained_images == 51_200 + 2_560
    plain = replace(study, stop=StopConfig(images=[12_800, 51_200]))
    (other, *_) = training_variants(plain, path, {}, lambda config: 1.0)
    assert planned_trials(study, [ladder])[0].folder != planned_trials(plain, [other])[0].folder
    with pytest.raises(ValueError, match=r"stop\.cooldown: must lie between 0\.01 and 0\.9, or be null, got 1"):
        StopConfig(images=1, cooldown=1.0)
    assert load_study("experiments/studies/backbones.yaml", ["stop.cooldown=0.1"]).stop.rungs[0] == 4e11


def test_networks_have_distinct_names_if_an_axis_mixes_training_and_sampling() -> None:
    def names(**axes: Any) -> list[str]:
        study, path = plan("dit-blocks", axes=axes, baseline=None)
        found = training_variants(study, path, {}, lambda config: 1.0)
        assert len({trial.slug for trial in planned_trials(study, found)}) == len(found) * len(study.seeds)
        return [network.name for network in found]

    guided: dict[str, Any] = {"sample.guidance": 2.0}
    deep: dict[str, Any] = {"denoiser.depth": 2}
    recipes = {"plain": {}, "guided": guided, "deep": deep, "deep guided": deep | guided}
    assert names(recipe=recipes) == ["plain", "deep"]
    assert names(recipe={"dit": guided, "plain": {}, "deep": deep}) == ["dit", "deep"]
    both = names(**{"net": {"a": {}, "b": guided, "c": deep}, "sample.steps": ["5", "10"]})
    assert both == ["a, steps=5", "c"]
    narrow, wide = ({"denoiser.hidden_size": n} for n in (32, 48))
    message = "axes: two networks are called 'a, b'; rename the axis values"
    with pytest.raises(UserError, match=message):
        names(x={"a": {}, "b": wide}, y={"a": narrow, "b": deep}, z={"a": {}, "b": deep})


def test_an_explicit_schedule_is_kept() -> None:
    def schedules(**changes: Any) -> list[tuple[object, object]]:
        study, path = plan("window", baseline=None, **changes)
        found = [v.config.optimizer for v in training_variants(study, path, {}, lambda config: 1.0)]
        tuned = tuning_so_far(study, path, lambda config: 1.0, Path("nowhere")).trials
        return [(o.warmup_images, o.decay_images) for o in [*found, *(t.config.optimizer for t in tuned)]]

    one = {"net": {"net": {}}}
    explicit = {"optimizer.warmup_images": 20_480, "optimizer.decay_images": 25_600}
    half = TuneConfig("net", {"optimizer.warmup_images": [1_000, 10_000]}, share=0.5)
    assert schedules(set=explicit, axes=one) == [(20_480, 25_600)]
    assert schedules(axes={"optimizer.warmup_images": [0, 20_480]}) == [(0, 51_200), (20_480, 51_200)]
    assert schedules(axes=one, tune=half) == [(5_120, 51_200), (500, 25_600), (5_000, 25_600)]
    assert schedules(axes=one, set={"optimizer.decay_images": [20_000, 30_000]}, tune=half)[1:] == [
        (500, [10_000, 15_000]),
        (5_000, [10_000, 15_000]),
    ]


def test_an_explicit_warmup_is_kept_in_a_ladder_and_equal_budgets_are_refused() -> None:
    ladder = StopConfig(images=[25_600, 51_200])
    study, path = plan("window", stop=ladder, set={"optimizer.warmup_images": 20_480})
    (first, *_) = training_variants(study, path, {}, lambda config: 1.0)
    assert (first.config.optimizer.warmup_images, first.config.optimizer.decay_images) == (20_480, None)
    study, path = plan("window", stop=StopConfig(images=[64, 65]))
    message = r"window.yaml: stop.images: gives 64, 64 images for window=2; set budgets farther apart"
    with pytest.raises(UserError, match=message):
        training_variants(study, path, {}, lambda config: 1.0)


def test_failed_tuning_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def points(file: TrialFile, primary: str) -> list[TriedPoint]:
        label, tuned = file.values["label"], file.values["tuning"]
        return [TriedPoint(label, tuned, "val/bound", math.inf if label == "b" else tuned["optimizer.lr"])]

    monkeypatch.setattr(TrialFile, "points", points)
    axes = {"net": {"a": {}, "b": {"denoiser.window": 2}}}
    tune = TuneConfig("net", {"optimizer.lr": [1e-3, 2e-3]})
    study, path = plan("window", axes=axes, tune=tune, baseline=None)
    tuning = tuning_so_far(study, path, lambda config: 1.0, Path("nowhere"))
    notes = notes_of(study, training_variants(study, path, tuning.chosen, lambda config: 1.0), tuning)
    assert tuning.failed == {"b": ["optimizer.lr"]}
    (note,) = (note for note in notes if "tuned alike" in note)
    assert note.endswith("Chosen: a optimizer.lr=0.001. Not tuned, since every try failed: b (optimizer.lr).")


def test_seconds_are_converted_to_images_by_the_measured_rate() -> None:
    study, path = plan("window", stop=StopConfig(seconds=12.0), jobs=1)
    rates = {2: 640.0, 4: 320.0, 8: 64.0}
    found = training_variants(study, path, {}, lambda config: rates[config.denoiser.window])
    assert [g.config.trainer.max_images for g in found] == [7680, 3840, 768]


def test_a_rate_is_measured_once_and_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffbench.studies.budget.LEAST_SECONDS", 0.0)
    monkeypatch.setattr("diffbench.studies.budget.LEAST_STEPS", 1)
    config = load("experiments/digits/dit.yaml")
    assert isinstance(config, RunConfig)
    rate = Probe(tmp_path / "rates.json", 1).training_rate(config)
    assert rate > 0
    assert Probe(tmp_path / "rates.json", 1).training_rate(config) == rate


def test_a_rate_is_measured_in_the_precision_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffbench.studies.budget.LEAST_SECONDS", 0.0)
    monkeypatch.setattr("diffbench.studies.budget.LEAST_STEPS", 1)
    seen, step = set(), DiffusionModule.training_step

    def record_autocast(self: DiffusionModule, *rest: Any) -> Any:
        seen.add(torch.is_autocast_enabled("cpu"))
        return step(self, *rest)

    monkeypatch.setattr(DiffusionModule, "training_step", record_autocast)
    for precision in ("bf16-mixed", "32-true"):
        config = load("experiments/digits/dit.yaml", [f"trainer.precision={precision}"])
        assert isinstance(config, RunConfig)
        Probe(tmp_path / "rates.json", 1).training_rate(config)
        assert seen == {precision == "bf16-mixed"}
        seen.clear()


@pytest.mark.parametrize("name", ["unet", "dit", "diffit", "diffit-latent", "ddpmpp", "uvit", "segformer"])
@pytest.mark.parametrize("by", ["parameters", "gmacs"])
def test_the_width_nearest_to_the_target_is_found(name: str, by: str) -> None:
    config = load(f"experiments/digits/{name}.yaml")
    assert isinstance(config, RunConfig)
    data, _ = build.load_data(config)
    target = 1.5 * size_of(config, data, by)  # type: ignore[arg-type]
    found = match_size(config, data, by, target, "width")  # type: ignore[arg-type]
    key = DENOISERS[name].width
    widths = getattr(found.denoiser, key)
    first = widths[0] if isinstance(widths, list) else widths
    sizes = []
    for width in range(max(1, first - 8), first + 9):  # sizes grow with the width, so none outside is closer
        wanted = [width * value // first for value in widths] if isinstance(widths, list) else width
        try:
            sizes.append(size_of(change(config, {"denoiser": {key: wanted}}), data, by))  # type: ignore[arg-type]
        except (UserError, ValueError):
            continue
    assert len(sizes) > 2 and min(sizes) < target < max(sizes)
    best = min(abs(size / target - 1) for size in sizes)
    assert abs(size_of(found, data, by) / target - 1) == pytest.approx(best)  # type: ignore[arg-type]


def test_depth_can_be_matched_too() -> None:
    config = load("experiments/digits/dit.yaml")
    assert isinstance(config, RunConfig)
    data, _ = build.load_data(config)
    target = size_of(change(config, {"denoiser": {"depth": 9}}), data, "parameters")
    assert match_size(config, data, "parameters", target, "depth").denoiser.depth == 9


def folders(study: StudyConfig, path: Path) -> set[Path]:
    """Return the run folders of a study's reported trials."""
    return {trial.folder for trial in planned_trials(study, training_variants(study, path, {}, lambda config: 1.0))}


def test_studies_share_their_baseline_runs() -> None:
    shared = {}
    for name in ("dit-blocks", "patch-size", "guidance", "steps", "ema"):
        study, path = plan(name)
        shared[name] = folders(study, path)
    assert set.intersection(*shared.values()) == shared["guidance"]
    assert len(shared["guidance"]) == 5  # one run per seed, each evaluated twelve times
    study, path = plan("time-token")
    window, other = plan("window")
    both = [folders(s, p) for s, p in ((study, path), (window, other))]
    assert len(both[0] & both[1]) == 5


def test_tuning_tries_the_same_grid_for_each_backbone_with_a_separate_seed() -> None:
    study, path = plan("backbones")
    trials = tuning_so_far(study, path, lambda config: 1.0, Path("nowhere")).trials
    assert [(c.label, c.config.optimizer.lr) for c in trials] == [
        (label, lr)
        for label in ("unet", "dit", "diffit", "ddpmpp", "uvit", "segformer")
        for lr in (2e-3, 4e-3, 8e-3, 1.6e-2)
    ]
    assert {c.config.seed for c in trials} == {1000} and 1000 not in study.seeds
    reported = folders(study, path)
    assert not reported & {c.folder for c in trials}
    shares = {
        c.config.trainer.max_images / g.config.trainer.max_images
        for c, g in zip(trials[::4], training_variants(study, path, {}, lambda config: 1.0), strict=True)
    }
    assert all(abs(share - 0.1) < 0.01 for share in shares)


def tried(**bounds: list[float]) -> list[TriedPoint]:
    """Return tried points: for each label, its values of the bound at the rates 1e-3, 2e-3, ..."""
    return [
        TriedPoint(b, {"lr": 1e-3 * 2**i}, "val/bound", v) for b, values in bounds.items() for i, v in enumerate(values)
    ]


def test_a_grid_grows_at_its_edges_for_all_labels_by_at_most_two_values() -> None:
    grid = {"lr": [1e-3, 2e-3, 4e-3]}
    assert extended(grid, grid, tried(a=[3.0, 2, 3], b=[3.0, 1, 2])) == grid
    assert extended(grid, grid, tried(a=[3.0, 2, 1], b=[3.0, 1, 2])) == {"lr": [1e-3, 2e-3, 4e-3, 8e-3]}
    assert extended(grid, grid, tried(a=[3.0, 2, 1], b=[1.0, 2, 3])) == {"lr": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]}
    longest = {"lr": [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]}
    assert extended(grid, longest, tried(a=[5.0, 4, 3, 2, 1])) == longest
    pair = {"lr": [1e-3, 2e-3]}  # a grid of two values has only edges
    assert extended(pair, pair, tried(a=[2.0, 1])) == pair
    batch = {"lr": [1, 3, 9]}
    points = [replace(t, values={"lr": n}) for t, n in zip(tried(a=[3.0, 2, 1]), batch["lr"], strict=True)]
    assert extended(batch, batch, points) == {"lr": [1, 3, 9, 27]}
    points = [replace(t, values={"lr": n}) for t, n in zip(tried(a=[1.0, 2, 3]), batch["lr"], strict=True)]
    assert extended(batch, batch, points) == batch  # a third of 1 is not a whole number


def test_whole_numbers_of_a_float_key_grow_by_their_ratio() -> None:
    tune = TuneConfig(None, {"sample.guidance": [1, 2, 4], "trainer.batch_size": [32, 64]})
    study, path = plan("dit-blocks", tune=tune, primary="fd")
    grid = tuning_so_far(study, path, lambda config: 1.0, Path("nowhere")).grid
    assert [type(v) for v in grid["sample.guidance"]] == [float] * 3 and grid["trainer.batch_size"] == [32, 64]
    assert all(type(v) is int for v in grid["trainer.batch_size"])
    points = [
        replace(t, values={"sample.guidance": n}) for t, n in zip(tried(a=[1.0, 2, 3]), (1.0, 2.0, 4.0), strict=True)
    ]
    grid = {"sample.guidance": grid["sample.guidance"]}
    assert extended(grid, grid, points) == {"sample.guidance": [0.5, 1, 2, 4]}


def test_tuned_values_apply_to_every_seed() -> None:
    study, path = plan("backbones")
    found = training_variants(study, path, {"dit": {"optimizer.lr": 4e-3}}, lambda config: 1.0)
    shipped = {g.name: load(g.experiment).optimizer.lr for g in found}
    assert all(g.config.optimizer.lr == shipped[g.name] for g in found if g.name != "dit")
    assert [g.config.optimizer.lr for g in found if g.name == "dit"] == [4e-3]
    plain = {g.name: g.evaluations for g in found}
    found = training_variants(study, path, {"dit": {"sample.guidance": 2.0, "average": 0.1}}, lambda config: 1.0)
    assert {g.name: g.evaluations for g in found} == plain | {
        "dit": {"dit": {"sample": {"guidance": 2.0}, "average": 0.1}}
    }


def test_sampling_is_tuned_with_the_sampler_of_each_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    tune, samplers = TuneConfig(None, {"sample.guidance": [1.0, 2.0]}), ["ddim", "dpm_solver"]
    study, path = plan("steps", axes={"sample.sampler": samplers}, tune=tune, primary="fd", baseline=None)
    tune.axis = "sample.sampler"
    evaluations_of: dict[str, Any] = {}

    def points(file: TrialFile, primary: str) -> list[TriedPoint]:
        label, evaluations = file.values["label"], file.values["evaluations"]
        if evaluations:
            evaluations_of[label] = evaluations
        scores = {"sampler=ddim": [1.0, 2.0], "sampler=dpm_solver": [2.0, 1.0]}[label]
        found = [flatten(changes) for changes in evaluations.values()]
        scored = [TriedPoint(label, v, "fd", x) for v, x in zip(found, scores[: len(found)], strict=True)]
        return [TriedPoint(label, file.values["tuning"], "val/bound", 1.0), *scored]

    monkeypatch.setattr(TrialFile, "points", points)
    chosen = tuning_so_far(study, path, lambda config: 1.0, Path("nowhere")).chosen
    assert evaluations_of["sampler=ddim"]["guidance=2"]["sample"] == {"sampler": "ddim", "guidance": 2.0}
    assert evaluations_of["sampler=dpm_solver"]["guidance=1"]["sample"] == {"sampler": "dpm_solver", "guidance": 1.0}
    assert chosen == {"sampler=ddim": {"sample.guidance": 1.0}, "sampler=dpm_solver": {"sample.guidance": 2.0}}
    (network,) = training_variants(study, path, chosen, lambda config: 1.0)
    assert [(e["sample"]["sampler"], e["sample"]["guidance"]) for e in network.evaluations.values()] == [
        ("ddim", 1.0),
        ("dpm_solver", 2.0),
    ]


def test_several_samplings_refuse_a_fixed_sampling_seed() -> None:
    study, path = plan("window", set={"seeds.sample": 7}, samplings=3)
    with pytest.raises(UserError, match=r"window.yaml: seeds.sample conflicts with samplings=3; set only one of them"):
        training_variants(study, path, {}, lambda config: 1.0)


def test_an_average_that_no_run_stores_is_refused() -> None:
    study, path = plan("ema", axes={"average": [0.123]})
    with pytest.raises(UserError, match=r"ema.yaml: average: 0.123 is not one of ema.decays=\[0.05, 0.005, "):
        training_variants(study, path, {}, lambda config: 1.0)


def test_incomparable_variants_are_refused_before_training() -> None:
    def refused(message: str, **changes: object) -> None:
        study, path = plan("window", **changes)
        with pytest.raises(UserError, match=message):
            training_variants(study, path, {}, lambda config: 1.0)

    sizes = "window.yaml: axes: size=8 and size=16 are not comparable: data.size is 8 in one and 16 in the other"
    refused(sizes, axes={"data.size": [8, 16]})
    refused(sizes, axes={"data.size": [8, 16]}, primary="fd")
    refused(r"count=128 and count=256 .*: validation.count is 128 in one", axes={"validation.count": [128, 256]})
    study, path = plan("window", axes={"validation.count": [128, 256]}, primary="fd")
    assert len(training_variants(study, path, {}, lambda config: 1.0)) == 2


def test_variants_equal_by_construction_are_listed() -> None:
    def equal(name: str, **changes: object) -> list[str]:
        study, path = plan(name, **changes)
        return equal_by_construction(training_variants(study, path, {}, lambda config: 1.0))

    message = ": the same by construction (one config, or averages whose decays a warm-up caps alike)"
    assert equal("ema") == []
    capped = {"set": {"ema.decays": [0.999, 0.9, 0.99, 0.9999]}, "axes": {"average": [0.9, 0.99, 0.999, 0.9999]}}
    # At the last of 800 updates the EMA warm-up caps the decay at 800 / 809 = 0.9889.
    assert equal("ema", **capped) == ["average=0.99, average=0.999, average=0.9999" + message]
    twice = {"axes": {"net": {"a": {"denoiser.window": 2}, "b": {"denoiser.window": 2, "denoiser.num_heads": 2}}}}
    assert equal("window", **twice) == ["a, b" + message]


@pytest.mark.parametrize("path", DIGITS, ids=lambda p: p.stem)
def test_every_variant_of_a_shipped_study_takes_one_training_step(path: Path) -> None:
    if path.stem == "foreign":
        pytest.importorskip("diffusers")
    study = load_study(path)
    found = training_variants(study, path, {}, lambda config: 1.0)
    assert sum(len(g.evaluations) for g in found) == len(variants(study))
    assert len(study.seeds) >= 3 and study.question and study.title
    for group in found:
        for changes in group.evaluations.values():
            assert isinstance(evaluation_config(group.config, changes, "study"), RunConfig)
        run = DenoiserRun(Path("unused"), group.config)
        module = run.module()
        images, labels = run.train_set.images[:4], run.train_set.labels[:4]
        batch = {"x0": images / 127.5 - 1, "label": labels, "position": torch.arange(4)}
        loss = module.training_step(batch, 0)
        loss.backward()
        assert torch.isfinite(loss) and any(p.grad is not None and p.grad.any() for p in run.network.parameters())


def test_objectives_studies_share_all_runs_with_the_study_of_all_backbones() -> None:
    def folders(name: str) -> set[Path]:
        study, path = plan(name, seeds=[0])
        return {c.folder for c in planned_trials(study, training_variants(study, path, {}, lambda config: 1.0))}

    parts = {b: folders(f"objectives-{b}") for b in ("dit", "unet", "diffit", "ddpmpp", "uvit", "segformer")}
    assert {len(found) for found in parts.values()} == {28}
    assert set().union(*parts.values()) == folders("objectives")


def test_each_trial_has_its_own_folder_named_by_seed(tmp_path: Path) -> None:
    study, path = plan("window", runs_dir=str(tmp_path))
    trials = planned_trials(study, training_variants(study, path, {}, lambda config: 1.0))
    assert len({c.folder for c in trials}) == len(trials) == 15
    assert {c.folder.name[-3:] for c in trials} == {f"-s{seed}" for seed in range(5)}
