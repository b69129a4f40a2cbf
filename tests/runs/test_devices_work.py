"""Several processes encode, draw and score to the same bytes as one."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from forked import forked

from diffbench.autoencoders import KLAutoencoder, KLConfig
from diffbench.autoencoders import io as files
from diffbench.cli import main
from diffbench.core import distributed, store
from diffbench.evaluation import samples
from diffbench.runs import drawing, evaluate
from diffbench.runs.lifecycle import load

ROOT = Path(__file__).parents[2]


def content(folder: Path) -> dict[str, str]:
    """Return the names and hashes of all files except locks."""
    found = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def test_two_processes_encode_the_same_latents_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        files.save(KLAutoencoder(KLConfig(1, 1, 2, [4, 8], 1, 2)), tmp_path / "autoencoder")
    monkeypatch.setattr(store, "CHUNK_BYTES", 8_000)  # dozens of chunks
    argv = ["encode", str(ROOT / "experiments/digits/dit.yaml"), f"autoencoder={tmp_path / 'autoencoder'}"]
    for name, more in (("one", []), ("two", ["trainer.devices=2"])):
        monkeypatch.setenv("DIFFBENCH_CACHE", str(tmp_path / name))
        with forked():
            assert main([*argv, *more]) == 0
    one, two = content(tmp_path / "one"), content(tmp_path / "two")
    latents = [name for name in one if name.startswith("latents/")]
    assert len(latents) >= 8  # a training and a held-out part
    assert {name: two[name] for name in latents if "manifest" not in name} == {
        name: one[name] for name in latents if "manifest" not in name
    }


def test_two_processes_get_the_same_scores_as_one(smoke_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "SIZE", 16)
    monkeypatch.setattr(drawing, "SIZE", 16)
    run, found = load(smoke_run), []
    for devices in (1, 2):
        run.config.trainer.devices = devices
        with forked():
            records = evaluate.evaluate(run, ["evaluate.count=50"])
        place = run.folder / records[0]["drawing"]["folder"]
        found.append((records, content(place)))
        assert records[0]["drawing"]["drawn"] == 50
        if devices == 1:
            for path in place.iterdir():
                path.unlink()
    (one, drawn), (two, drawn_by_two) = found
    assert drawn == drawn_by_two and len(json.loads((place / "manifest.json").read_text())["chunks"]) == 4
    for mine, theirs in zip(one, two, strict=True):
        values = {name: value for name, value in mine.items() if "@" in name}
        assert values and values == {name: theirs[name] for name in values}


def test_one_process_needs_no_communication() -> None:
    assert distributed.world_size() == 1 and distributed.rank() == 0
    assert distributed.rank_slice(5).tolist() == [0, 1, 2, 3, 4]
    value = torch.tensor([1.5])
    assert distributed.all_reduce_sum(value) is value and value.tolist() == [1.5]
    assert distributed.all_gather_rows(value) is value and distributed.all_reduce_max([2.0, -1.0]) == [2.0, -1.0]
