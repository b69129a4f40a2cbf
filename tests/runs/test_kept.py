"""Whatever a run has produced stays unless the user explicitly asks otherwise."""

import shutil
from pathlib import Path

import pytest
import torch

from diffbench import load
from diffbench.cli import main

DIT = "experiments/digits/dit.yaml"


@pytest.fixture
def command(smoke_run: Path) -> list[str]:
    """The command that made the run."""
    return ["train", DIT, "debug=smoke", f"runs_dir={smoke_run.parents[1]}"]


def files(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files in a run folder except its lock."""
    found = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


@pytest.mark.parametrize("gone", [["checkpoints", "ema-0.999.safetensors"], ["checkpoints"]])
def test_without_checkpoints_no_run_starts_over(
    gone: list[str], smoke_run: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(smoke_run / "checkpoints")
    for name in gone[1:]:
        (smoke_run / name).unlink()
        line = (smoke_run / "metrics.jsonl").read_text().splitlines()[-1].replace('"images": 16', '"images": 32')
        with (smoke_run / "metrics.jsonl").open("a") as file:
            file.write(line + "\n")
    before = files(smoke_run)
    capsys.readouterr()
    assert main(command) == 2
    output = capsys.readouterr().err
    kept = "metrics.jsonl up to 32 images" if gone[1:] else "ema-0.999.safetensors"
    assert f"{smoke_run}: has {kept}, but no checkpoint to resume from" in output
    assert "tag=NAME" in output and f"init_from={smoke_run}" in output and "restart=true" in output
    assert files(smoke_run) == before


def test_restart_starts_over_and_keeps_the_earlier_run(
    smoke_run: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(smoke_run)
    smoke_run.with_name(f"{smoke_run.name}.before-1").mkdir()
    assert main([*command, "restart=true"]) == 0
    aside = smoke_run.with_name(f"{smoke_run.name}.before-2")
    assert f"restart: the earlier run is now {aside}" in capsys.readouterr().out
    assert files(aside) == before
    assert torch.equal(load(smoke_run).sample_tensor(2), load(aside).sample_tensor(2))


def test_restart_is_refused_with_several_processes(
    smoke_run: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(smoke_run)
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main([*command, "restart=true"]) == 2
    assert f"restart: not possible with several processes; move {smoke_run} away" in capsys.readouterr().err
    assert files(smoke_run) == before


def test_restart_takes_true_or_false(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "restart=please"]) == 2
    assert capsys.readouterr().err == "error: command line: restart: must be true or false, got 'please'\n"


def test_a_longer_run_keeps_its_averages_until_newer_ones_exist(
    smoke_run: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load(smoke_run)
    assert (before.images_seen, before.complete) == (16, True)

    def fail(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("diffbench.runs.lifecycle.train_here", fail)
        assert main([*command, "trainer.max_images=32"]) == 2
    run = load(smoke_run)
    assert (run.images_seen, run.complete) == (16, False)
    assert torch.equal(run.sample_tensor(2), before.sample_tensor(2))
    assert main([*command, "trainer.max_images=32"]) == 0
    assert (load(smoke_run).images_seen, load(smoke_run).complete) == (32, True)


def test_a_refused_resume_writes_nothing(
    smoke_run: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (smoke_run / "metrics.jsonl").write_bytes(b"")
    before = files(smoke_run)
    capsys.readouterr()
    assert main([*command, "trainer.max_images=32"]) == 2
    assert f"error: {smoke_run}/metrics.jsonl: 0 bytes, shorter than at the checkpoint (" in capsys.readouterr().err
    assert files(smoke_run) == before


def test_changed_sampling_is_scored_without_training_again(
    smoke_run: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    scored = len(load(smoke_run).results)
    assert main(command) == 0 and len(load(smoke_run).results) == scored
    assert main([*command, "sample.steps=3"]) == 0
    output = capsys.readouterr().out
    assert "complete at 16 images" in output and "drawing and scoring samples" in output
    results = load(smoke_run).results
    assert [r["sample"]["steps"] for r in results[scored:]] == ["3", "3"]  # without and with guidance
    assert load(smoke_run).config.sample.steps == "3"
