"""A micro-batch computed in halves by two threads: its loss and gradients equal those of the whole."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffbench.config.load import load as load_config
from diffbench.denoisers.registry import DENOISERS
from diffbench.diffusion import LossAware
from diffbench.runs.denoiser import DenoiserRun
from diffbench.training.diffusion import DiffusionModule
from diffbench.training.halves import loss_in_halves
from diffbench.training.recorded import Recorded

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def digits(model: str, *args: str) -> DenoiserRun:
    return DenoiserRun("x", load_config(EXPERIMENTS / "digits" / f"{model}.yaml", args))  # type: ignore[arg-type]


def step(module: DiffusionModule, in_halves: bool, count: int = 5) -> tuple[Tensor, Tensor]:
    module.in_halves, module.images_seen = in_halves, 0
    module.zero_grad()
    image = torch.linspace(-1, 1, count * 64).sin().view(count, 1, 8, 8)
    loss = module.training_step({"image": image, "label": torch.arange(count) % 10}, 0)
    (loss / 3).backward()  # as one of three micro-batches
    return loss.detach(), torch.cat([p.grad.flatten() for p in module.network.parameters() if p.grad is not None])


@pytest.mark.parametrize("model", ["dit", "unet", "diffit", "diffit-latent", "ddpmpp", "uvit", "segformer"])
def test_halves_give_the_loss_and_gradients_of_the_whole(model: str) -> None:
    assert model in DENOISERS
    module = digits(model).module()
    with torch.no_grad():
        for p in module.network.parameters():  # many start at zero; make none zero
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    whole, halves, again = step(module, False), step(module, True), step(module, True)
    torch.testing.assert_close(halves[0], whole[0], rtol=1e-6, atol=0)
    assert (halves[1] - whole[1]).norm() <= 3e-6 * whole[1].norm()
    assert torch.equal(halves[0], again[0]) and torch.equal(halves[1], again[1])


def test_halves_work_with_weighted_losses_mixed_precision_and_one_image() -> None:
    module = digits("dit", "trainer.time_sampling=loss_aware").module()
    module.batch_size = 5
    results = []
    for in_halves in (False, True):
        module.history = LossAware(1000)
        with torch.autocast("cpu", torch.bfloat16):
            loss, gradient = step(module, in_halves)
        results.append((loss, gradient, module.history.state_dict()))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-2, atol=0)
    assert (results[1][1] - results[0][1]).norm() <= 2e-2 * results[0][1].norm()
    torch.testing.assert_close(results[1][2], results[0][2], rtol=1e-2, atol=1e-6)
    assert torch.equal(step(module, True, count=1)[1], step(module, False, count=1)[1])


@pytest.mark.parametrize("model", ["dit", "unet", "diffit", "diffit-latent", "ddpmpp", "uvit", "segformer"])
def test_recorded_operations_equal_the_network_bit_for_bit(model: str) -> None:
    network = digits(model).network
    recorded, generator = Recorded(network), torch.Generator().manual_seed(0)
    labels = torch.arange(6) % 11
    for y in (labels, labels[:5], None, torch.rand(6, 11, generator=generator), labels):
        with torch.no_grad():
            for p in network.parameters():  # in place, as an optimizer does
                p.add_(0.02 * torch.randn(p.shape, generator=generator))
        x = torch.randn(6 if y is None else len(y), 1, 8, 8, generator=generator)
        t = 100 * torch.rand(len(x), generator=generator)
        expected, found = values(network, network, x, t, y), values(recorded, network, x, t, y)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def values(forward: Callable[..., Tensor], network: nn.Module, *inputs: Tensor | None) -> dict[str, Tensor]:
    network.zero_grad()
    out = forward(*inputs)
    out.square().sum().backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {"": out.detach(), **gradients}


def test_a_copy_of_recorded_operations_has_its_own_weights() -> None:
    network = digits("dit").network
    recorded, x, t, y = Recorded(network), torch.randn(2, 1, 8, 8), torch.rand(2), torch.arange(2)
    recorded(x, t, y)
    copied = copy.deepcopy(recorded)
    with torch.no_grad():
        copied._network.final.bias.add_(1)  # type: ignore[union-attr, operator]
    assert torch.equal(recorded(x, t, y), network(x, t, y))
    torch.testing.assert_close(copied(x, t, y), network(x, t, y) + 1)


@pytest.mark.parametrize(("python", "mixed"), [((3, 10), False), ((3, 99), True)])
def test_the_network_itself_is_called_where_it_cannot_be_recorded(
    python: tuple[int, int], mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffbench.training.recorded.PYTHON", python)
    monkeypatch.setattr(torch.jit, "trace", None)
    network = digits("dit").network
    inputs = torch.randn(2, 1, 8, 8), torch.rand(2), torch.arange(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        assert torch.equal(Recorded(network)(*inputs), network(*inputs))


@pytest.mark.parametrize("args", [[], ["denoiser.gradient_checkpointing=true"]])
def test_a_network_with_gradient_checkpointing_is_not_recorded(args: list[str]) -> None:
    module = digits("dit", *args).module()
    step(module, in_halves=True)
    assert bool(module._recorded._recorded) == (not args)


def test_gradients_of_parameters_that_only_one_half_or_neither_uses() -> None:
    a, b, unused, frozen = (nn.Parameter(torch.tensor(value)) for value in (2.0, 3.0, 5.0, 7.0))
    frozen.requires_grad_(False)
    x = torch.tensor([1.0, 2.0, 4.0])

    def losses(part: slice) -> Tensor:
        return a * frozen * x[part] if part.start is None else b * x[part]

    weight = torch.tensor([0.5, 0.25, 0.25])
    loss, each = loss_in_halves(losses, weight, [a, b, unused, frozen])
    assert each.tolist() == [14.0, 28.0, 12.0] and loss.item() == 7 + 7 + 3 and not each.requires_grad
    loss.backward()
    assert a.grad is not None and b.grad is not None and (a.grad.item(), b.grad.item()) == (7 * (0.5 + 0.5), 1.0)
    assert unused.grad is None and frozen.grad is None


def test_an_error_in_one_half_reaches_the_caller() -> None:
    a = nn.Parameter(torch.ones(()))

    def broken(part: slice) -> Tensor:
        if part.start is not None:
            raise FloatingPointError("second half")
        return a * torch.ones(2)

    with pytest.raises(FloatingPointError, match="second half"):
        loss_in_halves(broken, torch.ones(4), [a])


@pytest.mark.parametrize(
    ("model", "args", "in_halves"),
    [  # a step of the digits' DiT has 2.7e8 multiply-accumulates
        ("dit", [], True),
        ("dit", ["trainer.threads=1"], False),
        ("dit", ["trainer.batch_size=256"], False),
        ("dit", ["denoiser.dropout=0.1"], False),
        ("segformer", ["denoiser.drop_path=0.1"], False),
        ("dit", ["trainer.compile=model"], False),
        ("dit", ["trainer.devices=2"], False),
        ("../foreign/uvit", [], False),
    ],
)
def test_only_small_networks_without_random_layers_compute_in_halves(
    model: str, args: list[str], in_halves: bool, two_threads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffbench.training.speed.compile_network", lambda *_: None)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    run = digits(model, *args)
    assert not run.module().in_halves  # before `use_threads`
    run.use_threads()
    assert run.module().in_halves == in_halves
    # Training again with this number of threads computes in the same way.
    again = digits(model, *args, f"trainer.threads={run.provenance(None)['threads']}")
    shared = torch.get_num_threads()
    again.use_threads()
    assert (again.module().in_halves, torch.get_num_threads()) == (in_halves, shared)


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Any:
    before = torch.get_num_threads()
    monkeypatch.setattr("diffbench.training.speed._default_threads", lambda: 2)
    yield
    torch.set_num_threads(before)
