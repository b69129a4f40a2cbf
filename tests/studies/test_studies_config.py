"""The keys that a study's YAML may have, and the meaning of its axes."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from diffbench.core.errors import UserError
from diffbench.studies.config import load_study, nest_keys, variants
from diffbench.studies.runner import folder_of_study

PLAIN = {"kind": "study", "experiment": "experiments/digits/dit.yaml", "axes": {"denoiser.depth": [2, 3]}}


def written(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(PLAIN | changes, sort_keys=False))
    return path


def test_axes_combine_with_the_last_one_fastest(tmp_path: Path) -> None:
    axes = {"net": {"small": {"denoiser.depth": 1}, "large": None}, "sample.steps": ["5", "10"]}
    found = variants(load_study(written(tmp_path, axes=axes)))
    names = ["small, steps=5", "small, steps=10", "large, steps=5", "large, steps=10"]
    assert [v.name for v in found] == names
    assert [v.trained for v in found] == [{"denoiser": {"depth": 1}}] * 2 + [{}] * 2
    assert [v.sampled for v in found] == [{"sample": {"steps": s}} for s in ("5", "10", "5", "10")]
    assert found[0].at == {"net": "small", "sample.steps": "steps=5"}


def test_dotted_and_nested_keys_are_the_same() -> None:
    assert nest_keys({"a.b": 1, "a": {"c": 2}, "d": {"e.f": 3}}) == {"a": {"b": 1, "c": 2}, "d": {"e": {"f": 3}}}


def test_a_later_budget_replaces_an_earlier_one(tmp_path: Path) -> None:
    study = load_study(written(tmp_path, stop={"images": 100}), ["stop.flops=1e9", "seeds=[7]"])
    assert (study.stop.images, study.stop.flops, study.seeds) == (None, 1e9, [7])


def test_dotted_keys_of_a_base_are_overridden_by_nested_ones(tmp_path: Path) -> None:
    base = written(tmp_path, set={"sample.steps": "50", "sample.guidance": 1.0})
    assert load_study(base, ["set.sample.steps=20"]).set == {"sample": {"steps": 20, "guidance": 1.0}}
    (tmp_path / "child.yaml").write_text("base: study.yaml\nset: {sample: {steps: '20'}}\n")
    assert load_study(tmp_path / "child.yaml").set == {"sample": {"steps": "20", "guidance": 1.0}}


def test_an_override_replaces_one_key_of_a_grid(tmp_path: Path) -> None:
    path = written(tmp_path, tune={"grid": {"optimizer.lr": [1e-3, 2e-3], "ema.half_life": [0.05, 0.1]}})
    tune = load_study(path, ["tune.grid.optimizer.lr=[4e-3]"]).tune
    assert tune is not None and tune.grid == {"optimizer.lr": [4e-3], "ema.half_life": [0.05, 0.1]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "denoiser"}, "kind: must be study, got 'denoiser'"),
        ({"axis": {}}, "axis: unknown key; allowed: "),
        (
            {"experiment": ""},
            "experiment: missing; name the YAML of an experiment, such as experiments/digits/dit.yaml",
        ),
        (
            {"axes": {"denoiser.depth": 3}},
            "axes.denoiser.depth: must be a list of values or a section of variants, got 3",
        ),
        ({"axes": {"net": {"a": 3}}}, "axes.net.a: must be a section of keys, or empty, got 3"),
        (
            {"axes": {"net": {"a<b>": None}}},
            "axes.net: 'a<b>' is not a name; allowed: up to 60 letters, digits and ._+:()=/-",
        ),
        ({"axes": {"denoiser.depth": [2, 2]}}, "axes: two variants are called 'depth=2'; give them different names"),
        ({"stop": {"images": 5, "flops": 1.0}}, "stop: must set one of images, flops and seconds, got images, flops"),
        ({"stop": {"seconds": -1}}, "stop.seconds: must be a positive number or a rising list, got [-1]"),
        (
            {"stop": {"seconds": 5}, "jobs": 2},
            "jobs: must be 1 with stop.seconds, since parallel runs distort timing, got 2",
        ),
        ({"samplings": 0}, "samplings: must be at least 1, got 0"),
        (
            {"samplings": 2, "seeds": [0, 1_000_000]},
            "seeds: must be below 1,000,000 with samplings=2, got 1000000",
        ),
        (
            {"samplings": 2, "axes": {"seeds.sample": [0, 1]}},
            "axes: seeds.sample conflicts with samplings=2; set only one of them",
        ),
        ({"seeds": [1, 1]}, "seeds: must be distinct whole numbers of at least 0, got [1, 1]"),
        (
            {"match": {"by": "gmacs"}},
            "match.to: must be null if match.by=none, else a variant or a number; match.by=gmacs",
        ),
        (
            {"match": {"by": "gmacs", "to": "depth=4"}},
            "match.to: no variant 'depth=4'; choose from depth=2, depth=3; did you mean 'depth=3'?",
        ),
        (
            {"baseline": "depth3"},
            "baseline: no variant 'depth3'; choose from depth=2, depth=3; did you mean 'depth=3'?",
        ),
        ({"match": {"by": "gmacs", "to": 0}}, "match.to: must be positive, got 0"),
        (
            {"set": {"trainer": {"max_images": 9}}},
            "trainer.max_images: not allowed in set, axes or tune.grid; stop says when training ends",
        ),
        ({"axes": {"seed": [1, 2]}}, "seed: not allowed in set, axes or tune.grid; seeds lists them"),
        (
            {"set": {"optimizer.decay_images": 9}, "stop": {"images": [64, 128]}},
            "optimizer.decay_images: not allowed in set, axes or tune.grid; the learning rate of a ladder is constant",
        ),
        ({"set": {"a.b": 1, "a": {"b": 2}}}, "a.b: set twice in one section of the study"),
        ({"tune": {"grid": {}}}, "tune.grid: must name keys and the values to try, such as optimizer.lr: [1e-3, 2e-3]"),
        (
            {"tune": {"grid": {"optimizer.lr": 1e-3}}},
            "tune.grid.optimizer.lr: must be a list of values to try, got 0.001",
        ),
        (
            {"tune": {"grid": {"optimizer.lr": [1e-3]}, "seed": 2}, "seeds": [1, 2]},
            "tune.seed: 2 is a reported seed (seeds=[1, 2]); choose another",
        ),
        (
            {"tune": {"grid": {"optimizer.lr": [1e-3]}, "axis": "net"}},
            "tune.axis: must be one of the axes denoiser.depth, got net",
        ),
    ],
)
def test_an_invalid_study_is_refused_by_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = written(tmp_path, **changes)
    with pytest.raises(UserError) as e:
        load_study(path)
    assert str(e.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize("axes", [("seeds.sample", "denoiser.depth"), ("denoiser.depth", "seeds.sample")])
def test_a_sampling_seed_combines_with_any_axis(tmp_path: Path, axes: tuple[str, str]) -> None:
    study = load_study(written(tmp_path, axes={axis: [1, 2] for axis in axes}))
    found = [(v.trained, v.sampled) for v in variants(study)]
    assert len(found) == 4 and all("seeds" not in trained for trained, _ in found)
    assert {(t["denoiser"]["depth"], s["seeds"]["sample"]) for t, s in found} == {(1, 1), (1, 2), (2, 1), (2, 2)}


def test_variants_that_would_share_a_file_name_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, axes={"x": {"a/b": {"denoiser.depth": 2}, "a b": {"denoiser.depth": 3}}})
    with pytest.raises(UserError, match="axes: 'a/b' and 'a b' would share a file name; give them different names"):
        load_study(path)


def test_studies_with_different_long_overrides_have_different_folders(tmp_path: Path) -> None:
    path = written(tmp_path)
    args = [
        "set.denoiser.depth=4",
        "set.trainer.batch_size=64",
        f"stop.images={51_200}",
        "set.optimizer.warmup_images=7",
    ]
    folders = set()
    for rate in (0.001, 0.004):
        overrides = [*args, f"set.optimizer.lr={rate}"]
        folders.add(folder_of_study(path, overrides, load_study(path, overrides)))
    assert len(folders) == 2 and all(len(folder.name) <= 120 for folder in folders)
