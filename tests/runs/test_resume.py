"""A killed run, started again with the same command, ends bit for bit like an uninterrupted one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffbench.runs.lifecycle import branch, load, train
from diffbench.training.checkpoint import SaveState

ROOT = Path(__file__).parents[2]
TINY = [
    "trainer.batch_size=8",
    "trainer.max_images=320",  # 40 steps
    "trainer.log_images=24",
    "trainer.validate_images=64",
    "trainer.checkpoint_images=40",  # every 5 steps, not aligned with the log
    "trainer.sample_images=160",
    "optimizer.warmup_images=100",
    "optimizer.decay_images=320",
    "ema.decays=[0.9,0.99]",
    "data.held_out=40",
    "sample.steps='3'",
]
CASES = {
    "dit": [
        *("denoiser.hidden_size=32", "denoiser.depth=2", "denoiser.dropout=0.1", "optimizer.name=muon"),
        *("seeds.init=3", "seeds.data=4", "seeds.noise=5"),
    ],
    "unet": [
        "denoiser.model_channels=8",
        "denoiser.dropout=0.1",
        "trainer.accumulate_grad_batches=2",
        "data.num_workers=2",
    ],
    "diffit": [  # micro-batches are split in halves, since there is no dropout
        *("denoiser.channels=[8,16]", "denoiser.time_dim=16"),
        *("trainer.accumulate_grad_batches=2", "trainer.threads=2"),
    ],
    "../foreign/uvit": ["denoiser.args.embed_dim=32"],
    "../foreign/transformer2d": ["denoiser.args.num_layers=2"],  # drops labels itself
}
KILL = """
import os, signal, sys
from diffbench.runs.lifecycle import train
from diffbench.training.checkpoint import SaveState

step_end = SaveState.on_train_batch_end

def killed(self, trainer, *rest):
    step_end(self, trainer, *rest)
    if trainer.global_step == 17:
        os.kill(os.getpid(), signal.SIGKILL)

SaveState.on_train_batch_end = killed
train(sys.argv[1], sys.argv[2:])
"""


def only(folder: Path) -> Path:
    (config,) = folder.glob("*/*/config.yaml")  # SLURM's scripts and logs lie there too
    return config.parent


def state(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "step-40.ckpt", weights_only=True)


def series(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    tags = [t for t in events.Tags()["scalars"] if not t.startswith("perf/")]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Assert equal structure and equal bits."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{i}")
    else:
        assert a == b, where


@pytest.mark.parametrize("model", CASES)
def test_a_run_killed_at_step_17_ends_like_an_unbroken_one(model: str, tmp_path: Path) -> None:
    if "transformer2d" in model:
        pytest.importorskip("diffusers")
    config = str(ROOT / "experiments" / "digits" / f"{model}.yaml")
    overrides = TINY + CASES[model]
    train(config, [*overrides, f"runs_dir={tmp_path / 'unbroken'}"])
    broken = [*overrides, f"runs_dir={tmp_path / 'broken'}"]
    killed = subprocess.run([sys.executable, "-c", KILL, config, *broken], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    run, whole = only(tmp_path / "broken"), only(tmp_path / "unbroken")
    assert sorted(p.name for p in (run / "checkpoints").glob("*.ckpt")) == ["step-10.ckpt", "step-15.ckpt"]
    train(config, broken)

    a, b = state(whole), state(run)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "ImageDataModule"):
        assert_equal(a[part], b[part], part)
    assert_equal(a["callbacks"]["EMA"], b["callbacks"]["EMA"], "EMA")
    assert series(whole) == series(run)
    assert scalars(whole) == scalars(run)
    assert a["callbacks"]["EMA"]["updates"] == 40
    assert a["ImageDataModule"] == {"samples_seen": 320, "data": load(run).train_set.fingerprint()}
    for name in ("ema-0.9.safetensors", "ema-0.99.safetensors"):
        assert_equal(load_file(whole / name), load_file(run / name), name)


def test_a_longer_run_extends_a_finished_one(tmp_path: Path) -> None:
    config = str(ROOT / "experiments" / "digits" / "dit.yaml")
    overrides = [*TINY, *CASES["dit"], "trainer.log_images=8"]
    train(config, [*overrides, f"runs_dir={tmp_path / 'whole'}"])
    short = [*overrides, f"runs_dir={tmp_path / 'extended'}", "trainer.max_images=160"]
    train(config, short)
    train(config, [*short[:-1]])
    whole, extended = only(tmp_path / "whole"), only(tmp_path / "extended")
    assert_equal(state(whole)["state_dict"], state(extended)["state_dict"])
    assert_equal(load_file(whole / "ema-0.9.safetensors"), load_file(extended / "ema-0.9.safetensors"))


def test_a_run_shortened_while_an_evaluation_was_pending_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(ROOT / "experiments" / "digits" / "dit.yaml")
    overrides = [*TINY, *CASES["dit"], f"runs_dir={tmp_path}", "trainer.log_images=8"]
    train(config, overrides)
    monkeypatch.setattr("diffbench.training.checkpoint.pending", lambda checkpoint: ["validation"])
    capsys.readouterr()
    run = train(config, [*overrides, "trainer.max_images=160"])
    assert "complete at 320 images" in capsys.readouterr().out and load(run.folder).complete


def test_a_branch_gets_its_own_wandb_run(tmp_path: Path, smoke_run: Path) -> None:
    (smoke_run / "wandb-id.txt").write_text("abc")
    (smoke_run / "wandb").mkdir()
    branch(smoke_run, tmp_path / "branch", load(smoke_run).config)
    assert {p.name for p in smoke_run.iterdir()} - {p.name for p in (tmp_path / "branch").iterdir()} >= {
        "wandb",
        "wandb-id.txt",
    }


def test_extending_a_run_after_the_decay_prints_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "experiments" / "digits" / "dit.yaml")
    overrides = [*TINY, *CASES["dit"], f"runs_dir={tmp_path}", "trainer.log_images=8"]
    train(config, [*overrides, "trainer.max_images=160"])
    train(config, overrides)
    assert "warning" not in capsys.readouterr().out
    run = train(config, [*overrides, "trainer.max_images=400"]).folder
    assert (
        "warning: the learning rate has decayed at optimizer.decay_images=320: images 321 to 400 get 2e-05, 1% of"
        " optimizer.lr=0.002. A run of 400 images whose rate decays over all of them ends with different weights:"
        " tag=NAME optimizer.decay_images=400\n"
    ) in capsys.readouterr().out
    rates = {line["images"]: line["train/lr"] for line in series(run) if "train/lr" in line}
    assert [rates[images] for images in range(328, 401, 8)] == pytest.approx([2e-5] * 10)


def test_a_run_killed_after_a_checkpoint_and_before_the_first_log_line_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = str(ROOT / "experiments" / "digits" / "dit.yaml")
    overrides = [*TINY, *CASES["dit"], "trainer.log_images=1000", "trainer.validate_images=1000"]
    train(config, [*overrides, f"runs_dir={tmp_path / 'unbroken'}"])
    step_end = SaveState.on_train_batch_end

    class Killed(BaseException):
        pass

    def killed(self: SaveState, trainer: Any, *rest: Any) -> None:
        step_end(self, trainer, *rest)
        if trainer.global_step == 7:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(SaveState, "on_train_batch_end", killed)
        train(config, [*overrides, f"runs_dir={tmp_path / 'broken'}"])
    assert not (only(tmp_path / "broken") / "metrics.jsonl").exists()
    run = train(config, [*overrides, f"runs_dir={tmp_path / 'broken'}"]).folder
    assert series(run) == series(only(tmp_path / "unbroken"))
    assert_equal(state(run)["state_dict"], state(only(tmp_path / "unbroken"))["state_dict"])
