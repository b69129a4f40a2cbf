"""Any command line or YAML succeeds or gives a one-line error with exit code 2, without traceback or run folder."""

import contextlib
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffbench.cli import VERBS, main
from diffbench.config.load import flatten, load, to_dict

ROOT = Path(__file__).parents[2]
DIT = str(ROOT / "experiments/digits/dit.yaml")
STUDY = ROOT / "experiments/studies/backbones.yaml"
KEYS = sorted(flatten(to_dict(load(DIT))))
STUDY_KEYS = ["axes", "seeds", "stop", "match", "tune", "primary", "baseline", "set", "title", "experiment", "jobs"]

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
numbers = st.one_of(st.integers(-3, 70), st.integers(-(2**70), 2**70), st.floats(), st.just(1e18))
scalars = st.one_of(numbers, st.booleans(), st.none(), text, st.sampled_from(["dit", "unet", "edm", "ddim", "null"]))
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(text, v, max_size=3), max_leaves=5)
keys = st.sampled_from(KEYS) | st.sampled_from(["denoiser.preset", "process.name", "data.name", "kind"]) | text
overrides = st.tuples(keys, values).map(lambda kv: f"{kv[0]}={_written(kv[1])}") | text


def _written(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()


def ends_well(*argv: str) -> int:
    """Run a command, check that it succeeds or gives an expected one-line error, and return its exit code."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(list(argv))
    except SystemExit as e:  # --help and --version
        code = int(e.code or 0)
    errors = err.getvalue()
    assert code in (0, 2), (argv, code, errors)  # 1 would be a bug
    if code == 2:
        assert errors.startswith("error: ") and len(errors.splitlines()) == 1, (argv, errors)
    return code


QUIET = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
SHORT = settings(max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=QUIET)
LONG = settings(max_examples=520, deadline=None, derandomize=False, database=None, suppress_health_check=QUIET)


def try_all(case: tuple[Any, dict[str, Any]], profile: settings) -> None:
    """Call the function of a case with values drawn from its strategies."""
    function, strategies = case
    profile(given(**strategies)(function))()


def any_override(words: list[str]) -> None:
    ends_well("show", DIT, *words)


def any_yaml(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.yaml"
        path.write_bytes(content)
        ends_well("show", str(path))
        ends_well("study", str(path), "--dry-run", f"runs_dir={folder}/runs")


def any_study(changes: dict[str, Any]) -> None:
    """Only load the study: planning it would build networks of any requested size."""
    from diffbench.core.errors import UserError
    from diffbench.studies.config import load_study

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.yaml"
        path.write_text(yaml.safe_dump({"base": os.path.relpath(STUDY, folder), **changes}))
        with contextlib.suppress(UserError):
            load_study(path)


def any_words(words: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        ends_well(*words)
        assert not [p for p in Path(folder).rglob("config.yaml")]


trees = values.map(lambda v: yaml.safe_dump(v).encode()) | st.binary(max_size=60) | text.map(str.encode)
rooted = st.dictionaries(st.sampled_from(sorted({k.split(".")[0] for k in KEYS})) | text, values, max_size=4)
configs = rooted.map(lambda d: yaml.safe_dump({**d, "base": DIT}).encode())
study_changes = st.dictionaries(st.sampled_from(STUDY_KEYS) | text, values, max_size=3)
verbs = st.sampled_from([v for v in VERBS if v != "list"]) | text
command_lines = st.tuples(verbs, st.lists(text | overrides | st.sampled_from(["--against", "build", "-x"]), max_size=4))

CASES: dict[str, Any] = {
    "overrides": (any_override, {"words": st.lists(overrides, max_size=3)}),
    "yaml": (any_yaml, {"content": trees | configs}),
    "study": (any_study, {"changes": study_changes}),
    "words": (any_words, {"words": command_lines.map(lambda c: [c[0], *c[1]])}),
}


@pytest.mark.parametrize("what", CASES)
def test_sixty_random_inputs(what: str) -> None:
    try_all(CASES[what], SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("what", CASES)
def test_two_thousand_random_inputs(what: str) -> None:
    try_all(CASES[what], LONG)
