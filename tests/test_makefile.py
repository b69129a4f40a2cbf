"""The Makefile: what its help says, and what its recipes would run."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from diffbench.config.layers import experiments

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Install nothing: make treats the stamp as up to date.
    command = ["make", "--no-print-directory", "--assume-old=.venv/.installed", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def recipes() -> list[str]:
    (phony,) = re.findall(r"^\.PHONY: (help .*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return phony.split()


@pytest.mark.parametrize("arguments", [[], ["help"]])
def test_help_lists_every_target_and_variable(arguments: list[str]) -> None:
    done = make(*arguments)
    assert done.returncode == 0
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("  make ")] == recipes()
    for text in ("MODEL=dit", "DATA=digits", "SEED=0", "SEEDS=0", 'ARGS=""', "PYTHON=", "RUN=runs/digits/dit-s0"):
        assert text in done.stdout
    models = "MODEL with DATA=digits: classifier ddpmpp diffit diffit-latent dit segformer unet uvit"
    assert models in done.stdout.splitlines()


DRY = {
    "help": "Variables (current values): ",
    "setup": "",
    "train": "-m diffbench train experiments/digits/dit.yaml seed=$seed",
    "ablation": "-m diffbench study experiments/studies/backbones.yaml",
    "evaluate": "-m diffbench evaluate runs/digits/dit-s0",
    "sample": "-m diffbench sample runs/digits/dit-s0",
    "compare": "-m diffbench compare runs/digits/dit-s0",
    "findings": "-m diffbench findings",
    "bench": "-m benchmarks baseline=old.json",
    "bench-gpu": "-m benchmarks gpu=true baseline=old.json",
    "tensorboard": "-m tensorboard.main --host localhost --logdir runs",
    "test": "-m pytest",
    "test-all": "-m pytest -n auto --dist loadfile --no-loadscope-reorder -m 'not gpu' --cov=diffbench",
    "test-gpu": "-m pytest -m gpu -rs",
    "docker-build": "docker build --file docker/Dockerfile --target cpu --tag diffbench:cpu .",
    "docker-train": "diffbench:cpu train experiments/digits/dit.yaml seed=0",
    "lint": "-m ruff check . &&",
    "types": "-m mypy",
    "format": "-m ruff check --fix .",
    "clean": "rm -rf .venv .mypy_cache",
}


@pytest.mark.parametrize("target", DRY)
def test_every_target_prints_what_it_would_run(target: str) -> None:
    assert list(DRY) == recipes()
    done = make("-n", target, "BASELINE=old.json", "RUNS=runs/digits/dit-s0")
    assert done.returncode == 0, done.stderr
    assert DRY[target] in done.stdout


def test_targets_name_files_that_exist() -> None:
    text = "".join(make("-n", target, "RUNS=x").stdout for target in DRY)
    for path in ("experiments/digits/dit.yaml", "experiments/studies/backbones.yaml", "docker/Dockerfile"):
        assert path in text and (ROOT / path).is_file()
    for module in ("diffbench", "benchmarks"):
        assert f"-m {module} " in text and (ROOT / module / "__main__.py").is_file()
    assert " find diffbench benchmarks tests " in f" {text}".replace("\n", " ")


def test_the_docker_image_and_ci_refer_to_what_exists() -> None:
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    assert re.findall(r"^FROM base AS (\w+)$", dockerfile, re.MULTILINE) == ["cpu", "cuda"]
    assert "pyproject.toml docker/requirements.py docker/wheels*" in dockerfile
    included = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert {"diffbench", "benchmarks", "experiments", "tests", "docs", "docker", "Makefile", "pyproject.toml"} <= {
        *included
    }
    assert all((ROOT / path).exists() for path in included)
    command = [sys.executable, str(ROOT / "docker" / "requirements.py"), str(ROOT / "pyproject.toml")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert any(line.startswith("torch>=") for line in printed) and any(
        line.startswith("lightning>=") for line in printed
    )
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    targets = re.findall(r"run: make ([\w-]+)", workflow)
    assert targets == ["test", "lint", "types"] and {*targets} <= {*recipes()}


def test_the_wheel_contains_only_the_package() -> None:
    from setuptools import find_packages

    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    packages = find_packages(str(ROOT), include=found["include"])
    assert {"diffbench", "diffbench.core", "diffbench.commands"} <= {*packages}
    assert {name.split(".")[0] for name in packages} == {"diffbench"}


def test_an_unknown_model_lists_the_choices_and_runs_nothing() -> None:
    done = make("train", "MODEL=ditt")
    assert done.returncode == 2
    assert done.stdout == ""
    first, second, *_ = done.stderr.splitlines()
    assert first.startswith("error: no experiments/digits/ditt.yaml; with DATA=digits, MODEL is one of: classifier ")
    named = {"digits": first.split(": ")[-1].split(), "": second.split(": ")[-1].split()}
    for path in experiments(ROOT / "experiments"):
        kind, model = Path(path).parent.name, Path(path).stem
        assert kind == "studies" or (kind in named[""] and (kind != "digits" or model in named["digits"]))
    assert make("train", "DATA=digit").stderr.startswith("error: no experiments/digit/dit.yaml; with DATA=digit, MODEL")


def test_train_passes_on_model_seed_and_arguments() -> None:
    done = make("-n", "train", "MODEL=unet", "SEED=1", "ARGS=denoiser.num_res_blocks=2 tag=x")
    assert done.returncode == 0, done.stderr
    assert "for seed in 1; do" in done.stdout
    assert "-m diffbench train experiments/digits/unet.yaml seed=$seed denoiser.num_res_blocks=2 tag=x" in done.stdout


def test_custom_images_use_the_experiments_in_own() -> None:
    done = make("-n", "train", "MODEL=unet", "ARGS=data.path=pets")
    assert "train experiments/own/unet.yaml seed=$seed data.path=pets" in done.stdout


def test_each_seed_gets_its_own_command() -> None:
    (loop,) = (line for line in make("-n", "train", "SEEDS=0,1,2").stdout.splitlines() if "for seed in" in line)
    command = re.sub(r"\S+/python -m diffbench", "echo", loop.lstrip("@"))
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"train experiments/digits/dit.yaml seed={i}" for i in (0, 1, 2)]


def test_the_run_folder_follows_from_model_data_and_seed() -> None:
    done = make("-n", "sample", "MODEL=diffit", "SEED=2", "ARGS=n=4 labels=3")
    assert "-m diffbench sample runs/digits/diffit-s2 n=4 labels=3" in done.stdout
    assert "-m diffbench evaluate runs/x" in make("-n", "evaluate", "RUN=runs/x").stdout
    assert "-m diffbench compare runs/x runs/y" in make("-n", "compare", "RUNS=runs/x runs/y").stdout


def test_compare_without_runs_is_an_error() -> None:
    done = make("compare", "DATA=nothing")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "error: no runs under runs/nothing: train one first"


def test_tensorboard_listens_on_localhost_unless_host_is_set() -> None:
    assert "-m tensorboard.main --host localhost --logdir runs" in make("-n", "tensorboard").stdout
    assert "-m tensorboard.main --host 0.0.0.0 --logdir runs" in make("-n", "tensorboard", "HOST=0.0.0.0").stdout


def test_an_old_python_is_refused(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    command = ["make", "-f", str(ROOT / "Makefile"), "setup", f"PYTHON={old}"]
    (tmp_path / "pyproject.toml").touch()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: Python 3.11 or newer is needed: set PYTHON=")
    assert not (tmp_path / ".venv").exists()


def test_clean_leaves_runs_alone() -> None:
    done = make("-n", "clean")
    assert done.returncode == 0
    assert ".venv" in done.stdout
    assert "runs" not in done.stdout
