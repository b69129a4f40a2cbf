"""Weights & Biases as a logger, tested with a fake `wandb` package."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffbench.cli import main
from diffbench.runs.lifecycle import train
from diffbench.training.wandb_log import WandbLog

DIT = "experiments/digits/dit.yaml"


class Recorder:
    """A fake of the run that `wandb.init` returns; it records the calls it receives."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.finished = False

    def define_metric(self, *_: Any, **__: Any) -> None:
        pass

    def log(self, values: dict[str, Any]) -> None:
        self.lines.append(values)

    def finish(self) -> None:
        self.finished = True


class Wandb(SimpleNamespace):
    """A fake of the parts of the package that we use; with `down` its server does not respond."""

    def __init__(self, key: str | None = None, down: bool = False) -> None:
        super().__init__(api=SimpleNamespace(api_key=key), Error=RuntimeError, Image=lambda image: image.shape)
        self.starts: list[dict[str, Any]] = []
        self.run, self.down = Recorder(), down
        self.__spec__ = SimpleNamespace()

    def init(self, **settings: Any) -> Recorder:
        self.starts.append(settings)
        if self.down and settings["mode"] != "offline":
            raise RuntimeError("no route\nto host")
        return self.run


def test_a_run_is_logged_to_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    args = ["debug=smoke", "trainer.logger=[wandb]", f"runs_dir={tmp_path}"]
    train(DIT, args)  # without the evaluation
    folder = tmp_path / "digits" / "dit-smoke-s0"
    (start,) = fake.starts
    assert start["mode"] == "offline" and start["name"] == "digits/dit-smoke-s0" and start["resume"] == "allow"
    assert start["config"]["denoiser"]["name"] == "dit" and start["id"] == (folder / "wandb-id.txt").read_text()
    losses = {line["images"]: line["train/loss"] for line in fake.run.lines if "train/loss" in line}
    assert list(losses) == [8, 16] and fake.run.finished
    assert any("val/bound" in line for line in fake.run.lines)
    assert any(line.get("samples/ema", ())[-1:] == (3,) for line in fake.run.lines)
    assert not list(folder.glob("events.*"))


@pytest.mark.parametrize(("key", "mode"), [("secret", "online"), (None, "offline")])
def test_wandb_is_online_only_with_an_api_key(
    key: str | None, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Wandb(key)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    WandbLog(tmp_path, {})
    WandbLog(tmp_path, {})
    assert [start["mode"] for start in fake.starts] == [mode, mode]
    assert len({start["id"] for start in fake.starts}) == 1  # a resumed run continues under the same id


def test_a_wandb_server_that_does_not_respond_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Wandb("secret", down=True)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    WandbLog(tmp_path, {})
    assert [start["mode"] for start in fake.starts] == ["online", "offline"]
    assert "warning: W&B does not respond" in capsys.readouterr().out


def test_a_missing_wandb_package_is_reported_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["train", DIT, "trainer.logger=[tensorboard,wandb]", f"runs_dir={tmp_path}"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: command line: trainer.logger: wandb is not installed; `pip install"
    )
    assert not list(tmp_path.iterdir())
