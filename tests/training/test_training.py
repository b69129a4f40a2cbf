"""Paired randomness, learning rate by images, validation, samples by number, checkpoints, signals."""

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffbench.config.sections import OptimizerConfig, SampleConfig
from diffbench.core import rng
from diffbench.core.errors import UserError
from diffbench.core.pixels import from_uint8
from diffbench.core.tensors import read_state
from diffbench.data.datamodule import PositionDataset, PositionSampler
from diffbench.data.digits import DigitsConfig, digits
from diffbench.denoisers import DENOISERS, build
from diffbench.diffusion import DiscreteVP, VPConfig
from diffbench.evaluation.validation_error import denoising_error
from diffbench.runs.lifecycle import train
from diffbench.sampling.images import CAPTION_HEIGHT, class_columns, grid
from diffbench.sampling.sampler import Sampler
from diffbench.training.checkpoint import AtomicCheckpointIO, SaveState, newest, verified
from diffbench.training.diffusion import DiffusionModule
from diffbench.training.module import TrainingModule, lr_factor

ROOT = Path(__file__).parents[2]
DIGITS = {"image_size": 8, "channels": 1, "num_classes": 10}
SMALL: dict[str, dict[str, Any]] = {
    "unet": {"model_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 8},
    "dit": {"hidden_size": 32, "depth": 2, "num_heads": 2},
    "diffit": {"channels": [8, 16], "blocks": [1, 1], "num_heads": 2, "time_dim": 16, "norm_groups": 8},
}


def small(name: str) -> nn.Module:
    torch.manual_seed(1)
    net = build(name, DENOISERS[name].config(**SMALL[name]), **DIGITS)
    for p in net.parameters():  # the last layers start at zero: make every weight count
        nn.init.normal_(p, std=0.1)
    return net


def module(name: str = "dit", seed: int = 0, **options: Any) -> DiffusionModule:
    process = DiscreteVP(VPConfig(1000, "cosine"))
    options = {"label_dropout": 0.1, "null_label": 10} | options
    return DiffusionModule(small(name), process, seed=seed, **options)


def batches(seed: int, steps: int, batch_size: int = 64) -> list[dict[str, Tensor]]:
    data = PositionDataset(digits(DigitsConfig())[0], seed)
    positions = iter(PositionSampler(batch_size))
    loaded = [data.__getitems__(next(positions)) for _ in range(steps)]
    return [{**batch, "x0": from_uint8(batch["image"])} for batch in loaded]


def test_two_backbones_see_the_same_images_times_noise_and_dropped_labels() -> None:
    dropped = 0
    for batch in batches(seed=3, steps=30):
        a, b = module("unet", seed=3).draw(batch), module("diffit", seed=3).draw(batch)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        dropped += int((a[3] == 10).sum())
    assert 0.07 < dropped / (30 * 64) < 0.13


def test_another_seed_changes_order_times_noise_and_labels() -> None:
    (first,), (second,) = batches(0, 1), batches(1, 1)
    assert not torch.equal(first["image"], second["image"])
    a, b = module(seed=0).draw(first), module(seed=1).draw(first)
    assert torch.equal(a[0], b[0])
    assert not any(torch.equal(x, y) for x, y in zip(a[1:], b[1:], strict=True))


def test_draws_do_not_depend_on_the_batch() -> None:
    whole = module().draw(batches(0, 1, 64)[0])
    parts = [module().draw(b) for b in batches(0, 4, 16)]
    for i, x in enumerate(whole):
        assert torch.equal(x, torch.cat([p[i] for p in parts]))


def test_label_weights_are_dropped_like_labels() -> None:
    batch = batches(0, 1)[0]
    weights = torch.nn.functional.one_hot(batch["label"], 11).float()
    labels, mixed = (
        module(label_dropout=0.5).draw(batch)[3],
        module(label_dropout=0.5).draw(batch | {"label": weights})[3],
    )
    assert torch.equal(mixed.argmax(1), labels)
    assert torch.equal(mixed.sum(1), torch.ones(64))
    assert 0 < (labels == 10).sum() < 64


def test_label_dropout_needs_a_null_class() -> None:
    net = build("dit", DENOISERS["dit"].config(**SMALL["dit"]), **DIGITS, null_class=False)
    with pytest.raises(ValueError, match=r"trainer\.label_dropout needs a denoiser with a null class"):
        DiffusionModule(net, DiscreteVP(VPConfig()), label_dropout=0.1)
    batch = batches(0, 1)[0]
    assert torch.equal(DiffusionModule(net, DiscreteVP(VPConfig())).draw(batch)[3], batch["label"])  # type: ignore[arg-type]
    assert module(null_label=None).null_label == 10  # taken from the network


def test_learning_rate_follows_images() -> None:
    constant = OptimizerConfig(warmup_images=1000)
    assert [lr_factor(constant, n) for n in (100, 1000, 10**9)] == [0.1, 1.0, 1.0]
    decayed = OptimizerConfig(warmup_images=1000, decay_images=3000, final_lr=0.1)
    assert [lr_factor(decayed, n) for n in (500, 1000, 3000, 9000)] == pytest.approx([0.5, 1.0, 0.1, 0.1])
    assert lr_factor(decayed, 2000) == pytest.approx(0.1 + 0.9 * 0.5)
    late = OptimizerConfig(warmup_images=1000, decay_images=[2000, 3000], final_lr=0.1)
    assert [lr_factor(late, n) for n in (500, 1000, 2000, 2500, 3000)] == pytest.approx([0.5, 1.0, 1.0, 0.55, 0.1])
    for bad in ([500, 3000], [3000, 3000], [1000]):
        with pytest.raises(ValueError, match=r"decay_images: .* must be \[begin, end\], rising from .*=1000"):
            OptimizerConfig(warmup_images=1000, decay_images=bad)


def test_the_step_that_reaches_a_multiple_is_due() -> None:
    module = TrainingModule(nn.Linear(1, 1))

    def is_due(step: int, every: int) -> bool:
        module.images_before, module.images_seen = 8 * step - 8, 8 * step
        return module.is_due(every)

    assert [step for step in range(1, 13) if is_due(step, 24)] == [3, 6, 9, 12]
    assert [step for step in range(1, 9) if is_due(step, 20)] == [3, 5, 8]


class Exact(nn.Module):
    """The optimal denoiser of N(0, 1) data, x0 = alpha x_t; its output is eps, x0 or v."""

    def __init__(self, process: DiscreteVP) -> None:
        super().__init__()
        self.process = process
        self.unused = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        alpha, sigma = self.process.alpha_sigma(t, x)
        outputs = {"x0": alpha * x, "eps": sigma * x, "v": torch.zeros_like(x)}
        return outputs[self.process.config.prediction]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_validation_error_is_the_same_for_every_process_and_prediction(schedule: Any, prediction: Any) -> None:
    process = DiscreteVP(VPConfig(1000, schedule, prediction))
    _, held_out = digits(DigitsConfig())
    errors = denoising_error(Exact(process), process, held_out, [-4.0, 0.0, 5.0])
    x0 = from_uint8(held_out.images).double()
    for level, error in errors.items():
        eps = rng.normal(rng.key("validation", str(level)), torch.arange(len(x0)), (1, 8, 8)).double()
        alpha, sigma = math.sqrt(1 / (1 + math.exp(-level))), math.sqrt(1 / (1 + math.exp(level)))
        expected = math.exp(level) * (alpha * (alpha * x0 + sigma * eps) - x0).square().mean()
        assert error == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_sample_does_not_depend_on_its_batch(name: str, sampler: Any) -> None:
    net, process = small(name), DiscreteVP(VPConfig(1000, "cosine"))
    labels = torch.arange(30) % 10

    def draw(batch_size: int, first: int = 0) -> Tensor:
        config = SampleConfig(sampler, "10", guidance=2.0, eta=0.5 if sampler == "ddim" else 0.0, batch_size=batch_size)
        return Sampler(net, process, (1, 8, 8), null_label=10)(labels[first:], config, first=first)

    whole = draw(30)
    assert whole.float().std() > 1
    for other in (draw(7), torch.cat([whole[:20], draw(30, first=20)])):
        assert (other == whole).double().mean() >= 0.999


def test_guidance_without_a_null_class_is_refused() -> None:
    process = DiscreteVP(VPConfig())
    with pytest.raises(ValueError, match=r"guidance 2\.0 needs a network with a null class"):
        Sampler(small("dit"), process, (1, 8, 8))(torch.zeros(1).long(), SampleConfig(guidance=2.0))


def test_grid_places_images_in_rows() -> None:
    images = torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
    canvas = grid(images, columns=2, scale=3)
    assert canvas.shape == (2 * (2 * 3 + 4), 2 * (2 * 3 + 4), 3)
    assert [int(canvas[y, x, 0]) for y, x in ((2, 2), (2, 12), (12, 2), (12, 12))] == [0, 1, 2, 128]


def test_captions_are_above_columns_or_above_each_image() -> None:
    images = torch.full((6, 1, 4, 4), 200, dtype=torch.uint8)
    plain = grid(images, columns=3, scale=10)
    columns = grid(images, columns=3, scale=10, captions=["cat", "an endless name", "dog"] * 2)
    assert columns.shape == (plain.shape[0] + CAPTION_HEIGHT, *plain.shape[1:])
    assert (columns[CAPTION_HEIGHT:] == plain).all()
    text = columns[:CAPTION_HEIGHT].min(axis=(0, 2)).reshape(3, 44)  # darkest pixel of each column of pixels
    assert (text.min(axis=1) < 100).all() and (text[:, [0, -1]] == 255).all()  # each cell has a text that stays inside
    each = grid(images, columns=3, scale=10, captions=list("abcdef"))
    assert each.shape[0] == plain.shape[0] + 2 * CAPTION_HEIGHT
    assert [class_columns(n) for n in (0, 1, 2, 10, 100)] == [8, 8, 2, 10, 16]


def save(folder: Path, step: int) -> Path:
    path = folder / f"step-{step}.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": step, "w": torch.arange(step)}, path)
    return path


def test_the_newest_intact_checkpoint_is_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert newest(tmp_path) is None
    old, new = save(tmp_path, 9), save(tmp_path, 10)
    assert newest(tmp_path) == new and verified(old)
    assert read_state(new)["w"].tolist() == list(range(10))
    data = bytearray(new.read_bytes())
    data[len(data) // 2] ^= 1
    new.write_bytes(bytes(data))
    assert newest(tmp_path) == old
    assert f"warning: {new} is damaged" in capsys.readouterr().out
    old.write_bytes(old.read_bytes()[:-1])
    with pytest.raises(UserError, match="no checkpoint is intact"):
        newest(tmp_path)


@pytest.mark.parametrize("moment", ["torch.save", "os.replace"])
def test_a_failed_write_keeps_the_last_checkpoint(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = save(tmp_path, 9)

    def fails(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(moment, fails)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, 10)
    monkeypatch.undo()
    assert newest(tmp_path) == old


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_at_the_next_step_and_exits_with_its_code(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_end = SaveState.on_train_batch_end

    def sends(self: SaveState, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == 7:
            os.kill(os.getpid(), number)
        step_end(self, trainer, *rest)

    monkeypatch.setattr(SaveState, "on_train_batch_end", sends)
    overrides = ["trainer.batch_size=8", "trainer.max_images=320", f"runs_dir={tmp_path}", "denoiser.depth=1"]
    with pytest.raises(SystemExit) as ended:
        train(ROOT / "experiments" / "digits" / "dit.yaml", overrides)
    assert ended.value.code == code
    (run,) = (tmp_path / "digits").iterdir()
    assert newest(run / "checkpoints") == run / "checkpoints" / "step-7.ckpt"
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
