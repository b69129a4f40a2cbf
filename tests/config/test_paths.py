"""Paths in a YAML file are found from any working folder, and text values are kept as typed."""

import shutil
from pathlib import Path

import pytest
import yaml

from diffbench.config.documents import dump
from diffbench.config.layers import read_yaml, resolve_path, search_folders
from diffbench.config.load import load, to_yaml
from diffbench.core.errors import UserError
from diffbench.studies.config import load_study, variants
from diffbench.studies.plan import training_variants

ROOT = Path(__file__).parents[2]
DIT = ROOT / "experiments/digits/dit.yaml"
STUDY = "kind: study\nexperiment: {}\nseeds: [0]\nruns_dir: runs\n"


def never(*_: object) -> float:
    raise AssertionError


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def test_a_study_is_read_from_another_folder(elsewhere: Path) -> None:
    path = ROOT / "experiments/studies/backbones-cifar10.yaml"
    study = load_study(path)
    assert study.experiment == str(ROOT / "experiments/cifar10/dit.yaml")
    assert [str(v.trained["experiment"]) for v in variants(study)] == [
        str(ROOT / f"experiments/cifar10/{name}.yaml") for name in ("unet", "dit", "diffit")
    ]


def test_paths_found_from_the_working_folder_are_unchanged() -> None:
    assert load_study("experiments/studies/backbones.yaml").experiment == "experiments/digits/dit.yaml"
    latent = load("experiments/digits-latent/dit.yaml")
    assert latent.autoencoder == "experiments/digits-latent/autoencoder.yaml"
    assert load("experiments/imagenet256-latent/dit-xl-2.yaml").autoencoder == "stabilityai/sd-vae-ft-ema"


def test_paths_are_looked_up_next_to_the_file_then_in_its_repository(elsewhere: Path) -> None:
    repository = elsewhere / "mine"
    (repository / ".git").mkdir(parents=True)
    (repository / "studies").mkdir()
    (repository / "data").mkdir()
    shutil.copy(DIT.parent / "_base.yaml", repository)
    file = repository / "studies/a.yaml"
    assert search_folders(file) == [file.parent, repository, Path.cwd(), ROOT]
    assert resolve_path("data", file) == str(repository / "data")
    (file.parent / "data").mkdir()
    assert resolve_path("data", file) == str(file.parent / "data")
    assert resolve_path("../data", file) == str(repository / "data")
    assert resolve_path("some/name", file) == "some/name"
    Path("data").mkdir()
    assert resolve_path("data", Path("b.yaml")) == "data"
    assert resolve_path(str(elsewhere), file) == str(elsewhere)


def test_keys_with_paths_are_resolved(elsewhere: Path) -> None:
    for name in ("images", "vae", "weak"):
        (elsewhere / name).mkdir()
    values = {"base": str(DIT), "data": {"name": "images", "path": "images"}, "init_from": "weak"}
    path = elsewhere / "a.yaml"
    path.write_text(
        yaml.safe_dump(values | {"autoencoder": "vae", "sample": {"weak_model": "weak"}, "runs_dir": "vae"})
    )
    config = load(path)
    assert (config.data.path, config.autoencoder) == (str(elsewhere / "images"), str(elsewhere / "vae"))
    assert config.init_from == config.sample.weak_model == str(elsewhere / "weak")
    assert config.runs_dir == "vae"  # output paths are relative to the working folder
    assert load(path, ["data.path=images"]).data.path == "images"  # and so are paths on the command line


def test_the_error_for_a_missing_experiment_lists_the_folders_searched(elsewhere: Path) -> None:
    path = elsewhere / "study.yaml"
    path.write_text(STUDY.format("experiments/digits/dti.yaml"))
    with pytest.raises(UserError) as caught:
        training_variants(load_study(path), path, {}, never)
    assert str(caught.value) == (
        f"{path}: experiment: experiments/digits/dti.yaml: no such file; looked in {elsewhere}, {Path.cwd()}, {ROOT}"
    )


def test_axes_keep_the_text_of_their_values(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(STUDY.format(DIT) + "axes: {init_from: [007, 7, 2024_11_28, on, 'a #2'], n: {010: {tag: 1e3}}}\n")
    study, typed = load_study(path), ["007", "7", "2024_11_28", "on", "a #2"]
    assert [v.name for v in variants(study)] == [f"init_from={text}, 010" for text in typed]
    found = training_variants(study, path, {}, never)
    assert [(g.config.init_from, g.config.tag) for g in found] == [(text, "1e3") for text in typed]


def test_a_key_set_twice_in_a_study_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(STUDY.format(DIT) + "axes: {a: {b: {optimizer.lr: 1, optimizer: {lr: 2}}}}\n")
    with pytest.raises(UserError) as caught:
        load_study(path)
    assert str(caught.value) == f"{path}: optimizer.lr: set twice in one section of the study"


def test_text_in_nested_keys_is_kept_as_typed(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    sample = "{steps: 0050, weak_model: 1e3, classifier: .5}"
    text = f"tag: 2024_11_28\ninit_from: 0x1F\nsample: {sample}\nseed: 1_0\n"
    path.write_text(f"base: {DIT}\n{text}")
    config = load(path)
    assert (config.tag, config.init_from, config.seed) == ("2024_11_28", "0x1F", 10)
    assert (config.sample.steps, config.sample.weak_model, config.sample.classifier) == ("0050", "1e3", ".5")
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(config))
    assert load(saved) == config


def test_dumped_values_are_read_back(tmp_path: Path) -> None:
    text = "a: [007, 1e-4, '1e5', \"007\", on, 'null', null, 0x10, .inf, 2024-01-01, 1:30, ~, true, 'true', .5, 1.]\n"
    path = tmp_path / "a.yaml"
    path.write_text(text)
    values = read_yaml(path)
    path.write_text(dump(values))
    assert (again := read_yaml(path)) == values
    assert [(type(v), str(v)) for v in again["a"]] == [(type(v), str(v)) for v in values["a"]]
