"""Every command and every line of Python in the README and in docs/ runs (at a small size)."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from own_images import folder as own_folder

from diffbench.cli import main
from diffbench.runs.lifecycle import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {
    path.relative_to(ROOT): path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
SHELL = list(
    dict.fromkeys(
        line.split("#")[0].strip()
        for text in PAGES.values()
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    )
)
SMALL = ["trainer.max_images=128", "sample.steps='2'", "evaluate.count=20"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the experiments and short runs of dit and unet under the README's names."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "experiments").symlink_to(ROOT / "experiments")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for model in ("dit", "unet"):
            train(f"experiments/digits/{model}.yaml", ["trainer.max_images=128"])
        own_folder(folder / "pets", {"cat": 30, "dog": 30}, height=16, width=16)
        (code,) = re.findall(r"```python\n(.*?)```", PAGES[Path("docs/evaluation.md")], re.DOTALL)
        (folder / "features.py").write_text(code)
    return folder


def test_the_readme_shows_commands_to_run() -> None:
    assert "make train MODEL=diffit" in SHELL and "make test" in SHELL
    assert len([c for c in SHELL if c.startswith("diffbench ")]) >= 8


@pytest.mark.parametrize("command", [c for c in SHELL if c.startswith("make ")])
def test_make_commands_are_valid(command: str) -> None:
    """Make knows the target and its variables; what the recipes call is tested below and in test_cli."""
    done = subprocess.run(
        ["make", "-n", "-o", ".venv/.installed", *shlex.split(command)[1:], "RUNS=runs/digits/dit-s0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "python -m" in done.stdout or "docker " in done.stdout


@pytest.mark.parametrize("command", [c for c in SHELL if c.startswith("diffbench ")])
def test_diffbench_commands_run(command: str, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clone)
    verb, *rest = shlex.split(command)[1:]
    quick = ["images=4", "steps=2", "sample.steps=2"]
    small = {"train": SMALL, "evaluate": SMALL[1:], "sample": ["steps=3"], "explain": quick}.get(verb, [])
    overrides = small[:1] if "classifier" in command else small  # a classifier has no sampling keys
    if "shapes" in command:
        overrides = [*overrides, "data.count=500", "data.held_out=100"]
    if "latent" in command:  # so that the autoencoder trains only two steps too
        overrides = ["debug=smoke"]
    assert main([verb, *rest, *overrides]) == 0


def test_python_lines_run(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clone)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(code.replace("seed=0)", 'seed=0, steps="2")'), names)
    assert len(names["images"]) == 16  # type: ignore[arg-type]


def test_linked_images_and_pages_exist() -> None:
    for page, text in PAGES.items():
        for path in re.findall(r"!?\[[^]]*\]\(([^)]+)\)", text):
            assert (ROOT / page.parent / path).is_file(), f"{page}: {path}"


def test_named_files_exist() -> None:
    named = re.compile(r"(?:diffbench|benchmarks|tests|experiments|docs|docker)/[\w./-]*\.(?:py|yaml|md|png)")
    for page, text in PAGES.items():
        for path in named.findall(text):
            mine = path.startswith("experiments/mine/")  # written by the reader
            assert mine or (ROOT / path).is_file(), f"{page}: {path}"


def test_the_study_of_custom_images_is_valid(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffbench.studies.config import load_study
    from diffbench.studies.plan import training_variants

    monkeypatch.chdir(clone)
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGES[Path("docs/data.md")], re.DOTALL)
    path = clone / "pets.yaml"
    path.write_text(block)
    found = training_variants(load_study(path), path, {}, lambda config: 1.0)
    assert [(g.name, g.config.denoiser.name, g.config.data.path) for g in found] == [
        ("dit", "dit", "pets"),
        ("unet", "unet", "pets"),
    ]


def test_the_study_in_the_docs_is_valid(tmp_path: Path) -> None:
    from diffbench.studies.config import load_study
    from diffbench.studies.plan import training_variants

    (block,) = re.findall(r"```yaml\n(.*?)```", PAGES[Path("docs/studies.md")], re.DOTALL)
    path = tmp_path / "study.yaml"
    path.write_text(block)
    found = training_variants(load_study(path), path, {}, lambda config: 1.0)
    assert [g.name for g in found] == ["window=2", "window=4", "window=8"]
    assert all(g.residual is not None for g in found)
