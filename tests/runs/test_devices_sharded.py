"""A network sharded over processes (FSDP) trains, saves, resumes and exports like an unsharded one."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_devices import STEP, series, shapes, state, trained


def assert_equal_averages(run: Path, other: Path) -> None:
    """Assert equal averages, up to Adam, which takes full steps even where a gradient is only rounding error."""
    for name in ("ema-0.9.safetensors", "ema-0.99.safetensors"):
        mine, theirs = load_file(run / name), load_file(other / name)
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert theirs[key].shape == value.shape
            assert value.ndim < 2 or float((theirs[key] - value).norm() / value.norm().clamp(min=0.1)) < 0.02, key


def train_sharded(folder: Path, model: str, *overrides: str) -> tuple[Path, Path]:
    """Train 40 steps in one process, and again with steps 10 to 30 sharded over two; return both run folders."""
    more = ["trainer.precision=32-true", "optimizer.lr=0.002", *overrides]
    alone = trained(folder / "alone", 40, *more, model=model)
    trained(folder / "shared", 10, *more, model=model)
    run = trained(folder / "shared", 30, *more, "trainer.devices=2", "trainer.strategy=fsdp", model=model)
    whole = load_file(run / "ema-0.9.safetensors")
    saved = state(run, 30)
    names = [name.removeprefix("network.") for name in saved["state_dict"]]
    assert sorted(whole) == sorted(names)
    averages = saved["callbacks"]["EMA"]["averages"]["0.9"]
    assert [a.shape for a in averages] == [a.shape for a in state(alone, 40)["callbacks"]["EMA"]["averages"]["0.9"]]
    trained(folder / "shared", 40, *more, model=model)
    return alone, run


def test_a_run_moves_from_one_process_to_shards_and_back(tmp_path: Path) -> None:
    alone, run = train_sharded(tmp_path, "diffit", "optimizer.grad_clip_norm=1")
    a, b = series(alone), series(run)
    for name in ("train/loss", "train/grad_norm", "val/bound"):
        assert {at: b[name][at] for at in a[name]} == pytest.approx(a[name], rel=1e-4), name
    fd, best = "fd/digits-cnn@21", b["best/images"]
    assert {at: b[fd][at] for at in a[fd]} == pytest.approx(a[fd], rel=1e-2)
    if best[40 * STEP] == best[30 * STEP]:  # otherwise the last step was better
        assert b[f"best/{fd}"][40 * STEP] == pytest.approx(b[f"best/{fd}"][30 * STEP], rel=1e-2)
    assert load_file(run / "best.safetensors").keys() == load_file(alone / "best.safetensors").keys()
    assert shapes(state(alone, 40)) == shapes(state(run, 40))
    assert_equal_averages(alone, run)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["unet", "dit"])
def test_other_networks_can_be_sharded_too(model: str, tmp_path: Path) -> None:
    alone, run = train_sharded(tmp_path, model)
    assert series(run)["train/loss"] == pytest.approx(series(alone)["train/loss"], rel=1e-3)
    assert_equal_averages(alone, run)
