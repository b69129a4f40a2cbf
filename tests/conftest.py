"""Fixtures for all tests: a separate cache, the repository as working directory, and one finished smoke run."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background job; tested commands inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        yield


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished smoke run of dit, which no test may modify."""
    from diffbench.cli import main

    runs = tmp_path_factory.mktemp("finished")
    assert main(["train", str(ROOT / "experiments/digits/dit.yaml"), "debug=smoke", f"runs_dir={runs}"]) == 0
    return runs / "digits" / "dit-smoke-s0"


@pytest.fixture
def smoke_run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished smoke run that a test may modify."""
    return Path(shutil.copytree(finished, tmp_path / "copied" / "digits" / finished.name))
