"""One, two and four processes train alike (losses, averages, scores, images) and resume each other's runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import forked
from safetensors.torch import load_file

from diffbench.config.load import load as load_config
from diffbench.core.errors import UserError
from diffbench.runs.lifecycle import train

ROOT = Path(__file__).parents[2]
DIT = str(ROOT / "experiments" / "digits" / "dit.yaml")
TINY = [
    "trainer.batch_size=16",
    "trainer.log_images=16",  # every step
    "trainer.validate_images=160",
    "trainer.checkpoint_images=160",
    "trainer.sample_images=160",
    "trainer.precision=64-true",
    "optimizer.lr=0.01",
    "optimizer.warmup_images=320",
    "ema.decays=[0.9,0.99]",
    "data.held_out=41",  # not a multiple of 2 or 4
    "sample.steps='2'",
    "sample.guidance=1",
    "sample.batch_size=16",
    "evaluate.every_images=320",
    "evaluate.every_count=21",
    "evaluate.best=fd",
    "tag=t",
]
SMALL = {
    "dit": ["denoiser.hidden_size=32", "denoiser.depth=2"],
    "unet": ["denoiser.model_channels=8"],
    "diffit": ["denoiser.channels=[8,16]", "denoiser.time_dim=16"],
}
STEP = 16


def trained(folder: Path, steps: int, *more: str, model: str = "dit") -> Path:
    """Train a run for this many steps and return its folder."""
    config = str(ROOT / "experiments" / "digits" / f"{model}.yaml")
    overrides = [*TINY, *SMALL[model], f"runs_dir={folder}", f"trainer.max_images={steps * STEP}", *more]
    with forked():
        return Path(train(config, overrides).folder)


def series(run: Path) -> dict[str, dict[int, float]]:
    """Return metric -> images seen -> value, without speeds."""
    found: dict[str, dict[int, float]] = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        for name, value in line.items():
            if name != "images" and not name.startswith("perf/"):
                assert line["images"] not in found.setdefault(name, {}), name  # written once
                found[name][line["images"]] = value
    return found


def state(run: Path, step: int) -> Any:
    return torch.load(run / "checkpoints" / f"step-{step}.ckpt", weights_only=True)


def shapes(part: Any) -> Any:
    """Return the structure of a state: names, types and shapes."""
    if isinstance(part, torch.Tensor):
        return tuple(part.shape), part.dtype
    if isinstance(part, dict):
        return {name: shapes(value) for name, value in part.items()}
    return [shapes(value) for value in part] if isinstance(part, list | tuple) else type(part)


def assert_alike(run: Path, other: Path, rel: float, distances: float) -> None:
    """Assert equal series, averages and images; distances come from float32 networks and may differ more."""
    a, b = series(run), series(other)
    assert a.keys() == b.keys()
    for name in a:
        assert b[name] == pytest.approx(a[name], rel=distances if name.split("/")[-2] in ("fd", "kid") else rel), name
    for name in ("ema-0.9.safetensors", "ema-0.99.safetensors"):
        mine, theirs = load_file(run / name), load_file(other / name)
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            torch.testing.assert_close(theirs[key], value, rtol=100 * rel, atol=100 * rel)
    for image in sorted((run / "samples").iterdir()):
        assert image.read_bytes() == (other / "samples" / image.name).read_bytes(), image.name


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 60 steps in one process, in two sessions of 20 and 40."""
    folder = tmp_path_factory.mktemp("one")
    trained(folder, 20)
    return trained(folder, 60)


def test_two_processes_match_one_and_their_run_resumes_in_one(one: Path, tmp_path: Path) -> None:
    run = trained(tmp_path, 50, "trainer.devices=2")
    wanted = {name: {at: v for at, v in values.items() if at <= 50 * STEP} for name, values in series(one).items()}
    found = series(run)
    assert len(found["train/loss"]) == 50
    assert found["train/loss"] == pytest.approx(wanted["train/loss"], rel=1e-9)
    assert found["train/grad_norm"] == pytest.approx(wanted["train/grad_norm"], rel=1e-9)
    assert set(wanted) - set(found) == set() and len([name for name in found if name.startswith("val/")]) == 8
    assert "devices: 2" in (run / "config.yaml").read_text()
    trained(tmp_path, 60)
    assert "devices: 1" in (run / "config.yaml").read_text()
    a, b = series(one), series(run)
    assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-9)
    for name in ("ema-0.9.safetensors", "ema-0.99.safetensors"):
        mine, theirs = load_file(one / name), load_file(run / name)
        for key, value in mine.items():
            torch.testing.assert_close(theirs[key], value, rtol=1e-7, atol=1e-7)


def test_two_processes_resume_the_run_of_one(one: Path, tmp_path: Path) -> None:
    trained(tmp_path, 20)
    run = trained(tmp_path, 60, "trainer.devices=2")
    assert_alike(one, run, 1e-9, 1e-4)
    assert shapes(state(one, 60)) == shapes(state(run, 60))
    first, second = (load_file(r / "best.safetensors") for r in (one, run))
    assert first.keys() == second.keys()
    assert len(list(run.glob("events.*"))) == 2  # one per session, written only by the first process


@pytest.mark.slow
@pytest.mark.parametrize(("model", "processes"), [("dit", 4), ("unet", 2), ("diffit", 2)])
def test_more_processes_and_other_networks_in_single_precision(model: str, processes: int, tmp_path: Path) -> None:
    more = ["trainer.precision=32-true", "trainer.accumulate_grad_batches=2", "trainer.time_sampling=stratified"]
    alone = trained(tmp_path / "alone", 50, *more, model=model)
    run = trained(tmp_path / "more", 50, *more, f"trainer.devices={processes}", model=model)
    a, b = series(alone)["train/loss"], series(run)["train/loss"]
    assert len(a) == 50 and b == pytest.approx(a, rel=1e-4)
    a, b = series(alone)["val/bound"], series(run)["val/bound"]
    assert b == pytest.approx(a, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_reduced_precision_matches_in_two_processes(precision: str, tmp_path: Path) -> None:
    """Skipped steps and losses match those of one process, within the precision of 8 or 11 bits."""
    more = [f"trainer.precision={precision}", "trainer.accumulate_grad_batches=2"]
    alone, run = trained(tmp_path / "alone", 30, *more), trained(tmp_path / "two", 30, *more, "trainer.devices=2")
    a, b = series(alone), series(run)
    assert b["train/skipped_steps"] == a["train/skipped_steps"]
    assert b["train/loss"] == pytest.approx(a["train/loss"], rel=0.02)
    assert b["val/bound"] == pytest.approx(a["val/bound"], rel=0.02)


@pytest.mark.slow
def test_loss_aware_sampling_draws_the_same_times_in_two_processes(tmp_path: Path) -> None:
    more = ["trainer.time_sampling=loss_aware", "process.steps=8", "trainer.accumulate_grad_batches=2"]
    more += ["validation.log_snr=[-6,-2,2]"]  # within the range of eight steps
    alone, run = trained(tmp_path / "alone", 50, *more), trained(tmp_path / "two", 50, *more, "trainer.devices=2")
    assert series(run)["train/loss"] == pytest.approx(series(alone)["train/loss"], rel=1e-9)
    histories = [state(r, 50)["loss_history"] for r in (alone, run)]
    assert torch.equal(histories[0]["counts"], histories[1]["counts"]) and int(histories[0]["counts"].min()) >= 10
    torch.testing.assert_close(histories[0]["losses"], histories[1]["losses"], rtol=1e-9, atol=0)


REFUSED = {
    "trainer.devices=3": "trainer.batch_size: 64 must be a multiple of trainer.devices=3 x trainer.num_nodes=1 x"
    " trainer.accumulate_grad_batches=1",
    "trainer.devices=2 trainer.accumulate_grad_batches=64": "trainer.batch_size: 64 must be a multiple of"
    " trainer.devices=2 x",
    "trainer.devices=0": "trainer.devices: must be positive, got 0",
    "trainer.devices=2 trainer.strategy=fsdp trainer.precision=64-true": "trainer.precision: 64-true does not work with"
    " trainer.strategy=fsdp; allowed: 32-true, bf16-mixed",
    "trainer.devices=2 trainer.strategy=fsdp trainer.compile=block": "trainer.compile: block does not work with",
    "trainer.strategy=fsdp": "trainer.strategy: fsdp needs several processes, and there is only one; allowed: auto, or"
    " trainer.devices above 1",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_settings_that_do_not_fit_the_devices_are_refused(overrides: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(DIT, overrides.split())
    assert REFUSED[overrides] in str(caught.value) and "\n" not in str(caught.value)


def test_several_machines_without_torchrun_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trainer\.num_nodes: start processes on several machines with torchrun"):
        train(DIT, ["trainer.num_nodes=2", f"runs_dir={tmp_path}"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("by", ["torchrun", "srun"])
def test_a_wrong_number_of_processes_is_refused(by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"torchrun": ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE")}.get(
        by, ("SLURM_LOCALID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    )
    for name, value in zip(names, "004", strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        train(DIT, ["trainer.devices=2", f"runs_dir={tmp_path}"])
    assert "torchrun or srun started 4 processes, but trainer.devices=2 x trainer.num_nodes=1 are 2" in str(
        caught.value
    )
