"""Records of results: appended, complete, and never compared across protocols."""

import copy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from diffbench import __version__
from diffbench.core.errors import UserError
from diffbench.evaluation import records
from diffbench.metrics.extractors.base import plain

RECORD: dict[str, Any] = {
    "format": 1,
    "time": "2026-01-01",
    "images_seen": 100,
    "data": "abc",
    "guidance": 1.0,
    "sample": {"sampler": "ddpm", "steps": "100", "seed": 0, "seconds": 2.5, "batch_size": 500},
    "labels": "evenly over the classes",
    "precision": "float32",
    "extractor": {"name": "digits-cnn", "weights": "123", "licence": "trained here"},
    "reference": {"key": "f00", "split": "train", "count": 500},
    "fd/digits-cnn@500": 0.5,
    "authenticity_held_out": 1.0,
}


def test_values_are_the_keys_with_a_count() -> None:
    assert records.values(RECORD) == {"fd/digits-cnn@500": 0.5}


@pytest.mark.parametrize("key", ["time", "images_seen", "sample.seed", "sample.seconds", "sample.batch_size"])
def test_keys_outside_the_protocol_may_differ(key: str) -> None:
    assert records.difference(RECORD, changed(key)) is None


@pytest.mark.parametrize(
    "key", ["data", "guidance", "sample.steps", "precision", "extractor.weights", "reference.count", "labels", "format"]
)
def test_a_difference_in_protocol_is_named(key: str) -> None:
    before = RECORD[key.split(".")[0]]
    before = before[key.split(".")[1]] if "." in key else before
    assert records.difference(RECORD, changed(key)) == f"{key} is {before} in one and other in the other"
    assert records.difference(RECORD, {}) is not None


def changed(key: str) -> dict[str, Any]:
    record = copy.deepcopy(RECORD)
    section, _, inner = key.partition(".")
    if inner:
        record[section][inner] = "other"
    else:
        record[section] = "other"
    return record


def test_records_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    assert records.read(path) == []
    for value in (1, 2):
        records.append(path, {"a": value})
    assert records.read(path) == [{"a": 1}, {"a": 2}]
    path.write_text('{"a": 1}\n{"a"\n')
    with pytest.raises(UserError, match=f"{path}: line 2 is not JSON; remove that line"):
        records.read(path)


@pytest.mark.parametrize("truncated", ["{", '{"a": 2', '{"a": "\u00e9'])
def test_a_truncated_last_line_is_skipped_and_later_removed(
    truncated: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'{"a": 1}\n' + truncated.encode()[: -1 if ord(truncated[-1]) > 127 else None])
    assert records.read(path) == [{"a": 1}]
    assert capsys.readouterr().out == (
        f"warning: {path}: line 2 was cut short when a command was killed, and is skipped\n"
    )
    records.append(path, {"a": 3})
    assert "its last line was cut short" in capsys.readouterr().out
    assert path.read_text() == '{"a": 1}\n{"a": 3}\n'


def test_the_environment_names_code_machine_and_extractor() -> None:
    extractor = plain("net", torch.nn.Flatten(), (1, 2, 2))
    environment = records.environment(extractor, torch.device("cpu"))
    assert environment["extractor"] == {"name": "net", "weights": extractor.weights, "licence": "not stated"}
    assert environment["versions"]["diffbench"] == __version__ and environment["versions"]["torch"] == torch.__version__
    assert {"numpy", "lightning", "torchmetrics", "python"} <= environment["versions"].keys()
    assert environment["device"].startswith("cpu ")


def test_the_commit_is_that_of_the_clone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
        assert records.commit() in (head.strip(), f"{head.strip()}-dirty")
    records.commit.cache_clear()
    monkeypatch.setattr(
        "diffbench.evaluation.records.__file__", str(tmp_path / "site-packages" / "diffbench" / "records.py")
    )
    assert records.commit() is None
    records.commit.cache_clear()
