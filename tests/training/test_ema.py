"""EMA of the weights: the seven traps of averaging in Lightning, each with a test that fails without its fix."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from diffbench.config.sections import EMAConfig, OptimizerConfig
from diffbench.data.datamodule import ImageDataModule
from diffbench.data.digits import DigitsConfig, digits
from diffbench.diffusion import DiscreteVP, VPConfig
from diffbench.training.checkpoint import AtomicCheckpointIO
from diffbench.training.diffusion import DiffusionModule
from diffbench.training.ema import EMA


class Tiny(nn.Module):
    """One convolution, and a buffer that must not be averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        self.steps += 1
        return self.conv(x)


def module() -> DiffusionModule:
    torch.manual_seed(0)
    return DiffusionModule(Tiny(), DiscreteVP(VPConfig(100)), OptimizerConfig(lr=0.1))


def fit(ema: EMA | None, lm: DiffusionModule, steps: int, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    train, _ = digits(DigitsConfig())
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        callbacks=[*([ema] if ema else []), *callbacks],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(lm, datamodule=ImageDataModule(train, batch_size=8), **options)
    return trainer


class Weights(L.Callback):
    """A callback that records the raw weights after each step."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.seen.append(pl_module.network.conv.weight.detach().clone())  # type: ignore[union-attr, operator]


def test_averages_follow_their_closed_form_for_several_decays() -> None:  # trap 7: one multi-tensor operation
    lm, ema, weights = module(), EMA(EMAConfig([0.5, 0.9], warmup=False)), Weights()
    start = lm.network.conv.weight.detach().clone()  # type: ignore[union-attr]
    fit(ema, lm, 4, weights)
    for decay in (0.5, 0.9):
        expected = start.double()
        for w in weights.seen:
            expected = decay * expected + (1 - decay) * w.double()
        torch.testing.assert_close(ema.averages[decay][0].double(), expected, rtol=0, atol=1e-6)
    assert ema.updates == 4


def test_warm_up_moves_the_average_from_the_first_step_on() -> None:  # trap 4: initial weights do not linger
    ema = EMA(0.9999)
    assert [ema.config.decay_at(n, 0.9999) for n in (0, 1, 90)] == [1 / 10, 2 / 11, 91 / 100]
    assert ema.config.decay_at(10**6, 0.9999) == 0.9999
    lm, weights = module(), Weights()
    start = lm.network.conv.weight.detach().clone()  # type: ignore[union-attr]
    fit(ema, lm, 1, weights)
    torch.testing.assert_close(ema.averages[0.9999][0], 0.1 * start + 0.9 * weights.seen[0])


def test_averages_are_on_the_training_device() -> None:  # trap 1: setup runs before the module moves there
    ema = EMA([0.9])
    ema.on_train_start(SimpleNamespace(), module().to("meta"))  # type: ignore[arg-type]
    assert {a.device.type for a in ema.averages[0.9]} == {"meta"}


def test_a_checkpoint_contains_raw_weights_and_averages(tmp_path: Path) -> None:  # traps 2 and 5
    lm, ema = module(), EMA([0.9])
    trainer = fit(ema, lm, 3)
    raw = lm.network.conv.weight.detach().clone()  # type: ignore[union-attr]
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(state["state_dict"]["network.conv.weight"], raw)
    average = state["callbacks"]["EMA"]["averages"]["0.9"][0]
    assert torch.equal(average, ema.averages[0.9][0]) and not torch.equal(average, raw)

    resumed = module()  # without the callback, training continues from the raw weights
    weights = Weights()
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        fit(None, resumed, 4, weights, ckpt_path=str(tmp_path / "a.ckpt"))
    whole, all_weights = module(), Weights()
    fit(EMA([0.9]), whole, 4, all_weights)
    assert torch.equal(weights.seen[0], all_weights.seen[3])


def test_training_ends_with_the_raw_weights() -> None:  # trap 5: raw weights survive `fit`
    lm, ema, weights = module(), EMA([0.9]), Weights()
    fit(ema, lm, 3, weights)
    assert torch.equal(lm.network.conv.weight, weights.seen[-1])  # type: ignore[union-attr]


def test_applied_restores_the_raw_weights_after_an_exception() -> None:  # trap 3: averages are never saved as weights
    lm, ema = module(), EMA(EMAConfig([0.5, 0.9], warmup=False))
    fit(ema, lm, 2)
    raw = lm.network.conv.weight.detach().clone()  # type: ignore[union-attr]
    for decay in (None, 0.9):
        with pytest.raises(KeyboardInterrupt), ema.applied(decay):
            assert torch.equal(lm.network.conv.weight, ema.averages[decay or 0.5][0])  # type: ignore[union-attr]
            raise KeyboardInterrupt
        assert torch.equal(lm.network.conv.weight, raw)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"no average with decay 0\.7: choose from 0\.5, 0\.9"), ema.applied(0.7):
        pass


def test_a_failing_evaluation_leaves_raw_weights_in_the_saved_state(tmp_path: Path) -> None:  # trap 3, in training
    lm, ema, weights = module(), EMA([0.9]), Weights()

    class Fails(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            with ema.applied():
                raise RuntimeError("evaluation failed")

        def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "failed.ckpt")

    with pytest.raises(RuntimeError, match="evaluation failed"):
        fit(ema, lm, 2, weights, Fails())
    state = torch.load(tmp_path / "failed.ckpt", weights_only=True)
    assert torch.equal(state["state_dict"]["network.conv.weight"], weights.seen[-1])


def test_only_the_denoiser_is_averaged() -> None:  # trap 6: no copy of metrics or encoders, no averaged buffers
    lm, ema = module(), EMA([0.9])
    lm.encoder = nn.Linear(1000, 1000)
    fit(ema, lm, 2)
    assert [tuple(a.shape) for a in ema.averages[0.9]] == [(1, 1, 3, 3), (1,)]
    assert set(ema.state_dict()) == {"updates", "averages"}
    with ema.applied():
        assert float(lm.network.steps) == 2  # type: ignore[union-attr]


def test_the_average_is_updated_per_optimizer_step_not_per_micro_batch() -> None:
    train, _ = digits(DigitsConfig())
    ema = EMA([0.9])
    data = ImageDataModule(train, batch_size=8)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=3,
        max_epochs=-1,
        accumulate_grad_batches=2,
        callbacks=[ema],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module(), datamodule=data)
    assert ema.updates == 3
