"""Non-finite steps are skipped without a trace, counted, and end training after too many in a row."""

import json
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffbench.config.load import load as load_config
from diffbench.core import tensors
from diffbench.core.errors import UserError
from diffbench.runs.denoiser import DenoiserRun
from diffbench.runs.lifecycle import train
from diffbench.training.diffusion import DiffusionModule
from diffbench.training.ema import EMA
from diffbench.training.nan_guard import NonFiniteGuard, Outcome, decide

DIT = "experiments/digits/dit.yaml"
TINY = [
    "trainer.batch_size=8",
    "trainer.max_images=64",  # 8 steps
    "trainer.log_images=16",
    "trainer.checkpoint_images=64",
    "trainer.validate_images=64",
    "trainer.sample_images=64",
    "ema.decays=[0.9]",
    "data.held_out=40",
    "sample.steps='2'",
    "denoiser.hidden_size=16",
    "denoiser.depth=1",
    "denoiser.num_heads=2",
]


def broken(patch: pytest.MonkeyPatch, at: set[int], how: str) -> list[list[Tensor]]:
    """Break the loss or only the gradient at these steps; return a list that gets weights, state, averages of each."""
    step_of, seen = DiffusionModule.training_step, []

    def spoilt(self: DiffusionModule, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = step_of(self, batch, batch_idx)
        if self.trainer.global_step + 1 not in at:
            return loss
        if how == "loss":
            return loss * float("inf")
        first = next(self.network.parameters())
        return loss + (first * 0).sum().sqrt()  # 0, with a gradient of 0 / 0

    def end(self: EMA, trainer: Any, module: Any, *rest: Any) -> None:
        ema_end(self, trainer, module, *rest)
        state = [t for s in trainer.optimizers[0].state.values() for t in s.values()]
        seen.append([t.detach().clone() for t in (*module.network.parameters(), *state, *self.averages[0.9])])

    ema_end = EMA.on_train_batch_end
    patch.setattr(DiffusionModule, "training_step", spoilt)
    patch.setattr(EMA, "on_train_batch_end", end)
    return seen


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("how", "precision", "optimizer"),
    [
        ("loss", "32-true", "adamw"),
        ("gradient", "32-true", "muon"),
        ("loss", "bf16-mixed", "adamw"),
    ],
)
def test_a_skipped_step_changes_nothing(
    how: str, precision: str, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = broken(monkeypatch, {3, 4, 6}, how)
    run = train(DIT, [*TINY, f"trainer.precision={precision}", f"optimizer.name={optimizer}", f"runs_dir={tmp_path}"])
    same = [all(torch.equal(a, b) for a, b in zip(x, y, strict=True)) for x, y in pairwise(seen)]
    assert same == [False, True, True, False, True, False, False]  # between steps 1 and 2, 2 and 3, ...
    logged = [line for line in lines(run.folder) if "train/skipped_steps" in line]
    assert [line["train/skipped_steps"] for line in logged] == [0, 2, 3, 3]
    # The mean ignores non-finite losses; a line without any finite loss has no loss.
    assert ["train/loss" in line for line in logged] == [True, how == "gradient", True, True]
    assert ["train/grad_norm" in line for line in logged] == [True, False, False, True]
    state = torch.load(run.folder / "checkpoints" / "step-8.ckpt", weights_only=True)
    assert state["callbacks"]["NonFiniteGuard"] == {"skipped": 3, "row": 0}
    assert state["callbacks"]["EMA"]["updates"] == 5 and state["global_step"] == 8
    assert {float(s["step"]) for s in state["optimizer_states"][0]["state"].values() if "step" in s} == {5.0}


def test_too_many_skipped_steps_end_training_reproducibly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [
        *TINY,
        f"runs_dir={tmp_path}",
        "trainer.max_skipped=3",
        "trainer.accumulate_grad_batches=2",
        "optimizer.lr=1e38",
    ]
    with pytest.raises(UserError) as caught:
        train(DIT, argv)
    (folder,) = (tmp_path / "digits").iterdir()
    (path,) = folder.glob("nonfinite-*.safetensors")
    step = int(path.stem.removeprefix("nonfinite-")) // 8
    text = str(caught.value)
    assert text.startswith(f"{folder}: loss or gradient of 3 steps in a row was not finite, last at step {step} ")
    assert f"batch and weights are saved in {path}" in text and "\n" not in text
    saved = load_file(path)
    assert saved["position"].tolist() == list(range(8 * step - 8, 8 * step))
    assert saved["x0"].shape == (8, 1, 8, 8) and saved["label"].shape == (8,)
    low, high = saved["time"].min(), saved["time"].max()
    assert f"times {low:g} to {high:g}, log-SNR " in text
    notes = {"step": str(step), "images": str(8 * step), "seed": "0", "micro_batches": "2"}
    assert tensors.read(path)[1] == notes
    module = DenoiserRun(folder, load_config(DIT, argv)).module()  # as README says
    module.network.load_state_dict({k.removeprefix("network."): v for k, v in saved.items() if "network." in k})
    parts = [{k: saved[k].chunk(2)[i] for k in ("x0", "position", "label")} for i in range(2)]
    assert not all(module.training_step(part, i).isfinite() for i, part in enumerate(parts))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: damaged \("):
        tensors.read(path)


def test_tied_weights_are_saved_too(tmp_path: Path) -> None:
    net = nn.Module()
    net.a, net.b = nn.Linear(3, 3), nn.Linear(3, 3)
    net.b.weight = net.a.weight
    guard, module = NonFiniteGuard(tmp_path, 1, 1), SimpleNamespace(network=net, seed=0)
    guard.row = 1
    guard._save(0, 1, 8, [{"x0": torch.zeros(2), "position": torch.arange(2)}], module)
    saved, _ = tensors.read(tmp_path / "nonfinite-000000008.safetensors")
    assert torch.equal(saved["network.b.weight"], net.a.weight) and torch.equal(saved["network.a.bias"], net.a.bias)


def test_fp16_finds_its_loss_scale_and_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scale = torch.amp.GradScaler.__init__

    def too_large(self: Any, device: str = "cpu", *_: Any, **__: Any) -> None:
        scale(self, device, init_scale=2.0**40)

    monkeypatch.setattr(torch.amp.GradScaler, "__init__", too_large)
    argv = [*TINY, "trainer.precision=16-mixed", "trainer.max_skipped=2", f"runs_dir={tmp_path}"]
    run = train(DIT, [*argv, "trainer.max_images=400", "trainer.checkpoint_images=400"])
    state = torch.load(run.folder / "checkpoints" / "step-50.ckpt", weights_only=True)
    skipped = state["callbacks"]["NonFiniteGuard"]["skipped"]
    assert skipped > 2  # more than allowed in a row, but caused by the loss scale
    assert state["MixedPrecision"]["scale"] == 2.0 ** (40 - skipped)
    assert state["callbacks"]["EMA"]["updates"] == 50 - skipped
    logged = [line for line in lines(run.folder) if "train/loss" in line]
    assert logged[-1]["train/loss"] < logged[0]["train/loss"]
    assert logged[-1]["train/grad_norm"] < 100  # unscaled


def test_fp16_stops_if_no_loss_scale_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, set(range(100)), "gradient")
    argv = [*TINY, "trainer.precision=16-mixed", "trainer.max_skipped=2", "trainer.max_images=400"]
    with pytest.raises(UserError, match=r"gradient of 2 steps in a row was not finite, last at step 19 "):
        train(DIT, [*argv, f"runs_dir={tmp_path}"])  # 2**16 is halved 17 times to be below 1


def arguments_on(device: str) -> tuple[Any, torch.optim.Optimizer, torch.nn.Parameter]:
    """Return a trainer for `decide`, a fused optimizer, and its only weight."""
    weight = torch.nn.Parameter(torch.zeros(2, device=device))
    strategy = SimpleNamespace(reduce=lambda tensor, reduce_op: tensor)
    trainer = SimpleNamespace(strategy=strategy, precision_plugin=None)
    return trainer, torch.optim.AdamW([weight], fused=True), weight


def test_non_finite_losses_and_gradients_are_skipped() -> None:
    trainer, optimizer, weight = arguments_on("cpu")
    inf, nan = torch.inf, torch.nan
    cases = ((2.0, 1.0, False), (nan, 1.0, True), (2.0, inf, True), (2.0, nan, True), (-inf, inf, True))
    for loss, norm, skipped in cases:
        weight.grad = torch.ones(2)
        outcome = decide(trainer, optimizer, torch.tensor(loss), torch.tensor(norm))
        assert isinstance(outcome, Outcome) and outcome.skipped is outcome.diverged is skipped
        assert (weight.grad is None) is skipped and not hasattr(optimizer, "found_inf")  # a CPU knows at once


def test_off_the_cpu_the_fused_optimizer_gets_found_inf_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device tensors have no values, so waiting for one would fail."""
    monkeypatch.setattr("diffbench.training.nan_guard.Outcome", lambda skipped: skipped)
    trainer, optimizer, weight = arguments_on("meta")
    weight.grad = torch.ones_like(weight)
    outcome: Any = decide(trainer, optimizer, torch.ones((), device="meta"), torch.ones((), device="meta"))
    assert optimizer.found_inf is outcome and outcome.is_meta and weight.grad is not None  # type: ignore[attr-defined]
