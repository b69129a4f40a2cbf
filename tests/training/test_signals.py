"""A signal during validation or sampling stops the run at once; a resume repeats that work and ends the same."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffbench.cli import main
from diffbench.evaluation import validation_error
from diffbench.runs.lifecycle import train
from diffbench.sampling.sampler import Sampler
from diffbench.training.checkpoint import newest, pending

Call = Callable[..., Any]
DIT = "experiments/digits/dit.yaml"
TINY = [
    "trainer.batch_size=8",
    "trainer.max_images=96",  # 12 steps
    "trainer.log_images=24",
    "trainer.validate_images=32",
    "trainer.checkpoint_images=80",
    "trainer.sample_images=48",
    "evaluate.every_images=40",
    "evaluate.every_count=20",
    "evaluate.best=fd",
    "ema.decays=[0.5]",
    "data.held_out=40",
    "denoiser.hidden_size=16",
    "denoiser.num_heads=2",
    "denoiser.depth=1",
    "sample.steps='3'",
    "sample.batch_size=10",
    "tag=s",
]


def outcome(run: Path) -> dict[str, Any]:
    """Return everything of a finished run that must not depend on a signal."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {"metrics": [{k: v for k, v in line.items() if k[:5] != "perf/"} for line in lines]}
    found |= {path.name: path.read_bytes() for path in run.glob("samples/images-*.png")}
    for name in ("ema-0.5.safetensors", "best.safetensors"):
        found[name] = {key: value.tolist() for key, value in load_file(run / name).items()}
    state = torch.load(run / "checkpoints" / "step-12.ckpt", weights_only=True)
    return found | {
        "state": {k: v.tolist() for k, v in state["state_dict"].items()},
        "callbacks": set(state["callbacks"]),
    }


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[2])
        return outcome(train(DIT, [*TINY, f"runs_dir={tmp_path_factory.mktemp('unbroken')}"]).folder)


def signalled(patch: pytest.MonkeyPatch, what: str, time: int, numbers: tuple[int, ...]) -> list[str]:
    """Send this process signals right before its `time`-th validation, grid or distance, as `what` says; return a list
    that records those that finish."""
    met, finished = [0], list[str]()

    def interrupts(
        name: str, call: Callable[..., Any], mine: Callable[..., bool] = lambda *_: True
    ) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            if not (name == what and mine(*arguments)):
                return call(*arguments, **options)
            met[0] += 1
            for number in numbers if met[0] == time else ():
                os.kill(os.getpid(), number)
            found = call(*arguments, **options)
            finished.append(name)
            return found

        return run

    patch.setattr(validation_error, "error_sums", interrupts("validation", validation_error.error_sums))
    name, labels = ("grid", 40) if what == "grid" else ("distance", 20)
    patch.setattr(Sampler, "__call__", interrupts(name, Sampler.__call__, lambda _, y, *__: len(y) == labels))
    return finished


@pytest.mark.parametrize(
    ("what", "time", "step", "number", "left"),
    [
        ("validation", 4, 8, signal.SIGINT, ["ValidationError"]),  # each takes two: held-out, then training images
        ("validation", 5, 12, signal.SIGTERM, ["ValidationError", "FrechetDistance", "SampleGrid"]),  # of the last step
        ("distance", 1, 5, signal.SIGTERM, ["FrechetDistance"]),
        ("distance", 4, 12, signal.SIGINT, ["FrechetDistance", "SampleGrid"]),  # of the best weights, with fresh noise
        ("grid", 1, 6, signal.SIGINT, ["SampleGrid"]),
    ],
)
def test_work_interrupted_by_a_signal_is_repeated_after_the_resume(
    what: str,
    time: int,
    step: int,
    number: int,
    left: list[str],
    unbroken: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    argv = [*TINY, f"runs_dir={tmp_path}"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        finished = signalled(patch, what, time, (number, number))  # two at once count as one
        train(DIT, argv)
    assert ended.value.code == 128 + number
    folder = tmp_path / "digits" / "dit-s-s0"
    out, err = capfd.readouterr()
    assert err == f"{folder}: saving the state; a second signal or Ctrl-C stops without saving\n"
    by = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert f"{folder}: stopped by {by} at {8 * step} images, state saved; run the same command again to resume\n" in out
    assert len(finished) == time - 1  # it was not finished before the state was saved
    saved = newest(folder / "checkpoints")
    assert saved == folder / "checkpoints" / f"step-{step}.ckpt"
    assert pending(saved) == left
    assert not (folder / "ema-0.5.safetensors").exists()
    assert outcome(train(DIT, argv).folder) == unbroken


def test_a_second_signal_stops_without_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("diffbench.core.distributed.SIGNAL_DEBOUNCE_S", 0.0)
    signalled(monkeypatch, "validation", 1, (signal.SIGTERM, signal.SIGINT))
    with pytest.raises(SystemExit) as ended:
        main(["train", DIT, *TINY, f"runs_dir={tmp_path}"])
    assert ended.value.code == 130
    folder = tmp_path / "digits" / "dit-s-s0"
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        f"{folder}: saving the state; a second signal or Ctrl-C stops without saving",
        f"{folder}: stopped without saving the state",
    ]
    assert not (folder / "checkpoints").exists()
    assert signal.getsignal(signal.SIGINT) == before
