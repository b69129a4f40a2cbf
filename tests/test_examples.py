"""The scripts in examples/ and the examples in docs/api.md run, at a small size."""

import re
import runpy
import sys
from pathlib import Path

import pytest

import diffbench
from diffbench.cli import main

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *args])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_the_scripts_are_short() -> None:
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert len(scripts) == 4 and all(len(path.read_text().splitlines()) < 50 for path in scripts)


@pytest.mark.filterwarnings("ignore")
def test_own_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("own_network.py", tmp_path, monkeypatch, "12")
    assert "test/bound" in capsys.readouterr().out
    assert list(tmp_path.rglob("epoch=*.ckpt"))


def test_published_dit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("published_dit.py", tmp_path, monkeypatch, "2")
    text = capsys.readouterr().out
    assert "32,963,360 parameters, input (4, 32, 32), classes 1000" in text and "latents (2, 4, 32, 32)" in text


def test_own_distance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("own_distance.py", tmp_path, monkeypatch)
    real, flipped = (float(line.split(": ")[1]) for line in capsys.readouterr().out.splitlines())
    assert 0 < 10 * real < flipped


def test_own_sampler(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("own_sampler.py", tmp_path, monkeypatch, str(finished), "5")
    assert re.search(r"Euler \d+\.\d\d, own \d+\.\d\d", capsys.readouterr().out) and (tmp_path / "own.png").is_file()


API = (ROOT / "docs" / "api.md").read_text()


def test_the_api_page_lists_every_public_name() -> None:
    listed = set(re.findall(r"`(\w+)(?:\([^`]*)?`", API))
    assert set(diffbench.__all__) <= listed
    for name in diffbench.__all__:
        assert getattr(diffbench, name) is not None


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The namespace that the examples share, and a run for them to load."""
    folder = tmp_path_factory.mktemp("api")
    (folder / "experiments").symlink_to(ROOT / "experiments")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "experiments/digits/dit.yaml", "debug=smoke", "tag=api"]) == 0
    return {"folder": folder}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(API.count("```python")))
def test_examples_of_the_api_page(number: int, names: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(str(names["folder"]))
    code = re.findall(r"```python\n(.*?)```", API, re.DOTALL)[number]
    exec(code, names)
