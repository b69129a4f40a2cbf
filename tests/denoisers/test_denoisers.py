"""Every registered denoiser: its contract and its cost."""

from typing import Any

import pytest
import torch
from small_networks import CHANNELS, CLASSES, SIZE, SMALL, inputs, small
from torch import nn
from torch.nn.functional import one_hot
from torch.utils.flop_counter import FlopCounterMode

from diffbench.denoisers import DENOISERS, DiT, DiTConfig, build
from diffbench.denoisers.flops import count

EACH = pytest.mark.parametrize("name", DENOISERS)


@EACH
@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("num_classes", [0, CLASSES])
def test_output_has_the_shape_of_the_contract(name: str, learn_sigma: bool, num_classes: int) -> None:
    x, t, y = inputs()
    out = small(name, learn_sigma=learn_sigma, num_classes=num_classes)(x, t, y if num_classes else None)
    assert out.shape == (4, CHANNELS * (2 if learn_sigma else 1), SIZE, SIZE)
    assert out.dtype == torch.float32
    assert out.std(dim=(0, 2, 3)).min() > 1e-3  # each channel is written


@EACH
def test_the_output_is_zero_at_initialization(name: str) -> None:
    x, t, y = inputs()
    first = small(name, shaken=False)(x, t, y).abs().max()
    # DDPM++ scales its last weights by 1e-5; U-ViT starts with small weights everywhere.
    assert first < {"ddpmpp": 1e-3, "uvit": 1}[name] if name in ("ddpmpp", "uvit") else first == 0
    assert small(name)(x, t, y).std() > 1e-3


@EACH
def test_no_label_means_the_null_label(name: str) -> None:
    net, (x, t, y) = small(name), inputs()
    out = net(x, t, None)
    assert torch.equal(out, net(x, t, torch.full_like(y, CLASSES)))
    assert (out - net(x, t, y)).abs().amax(dim=(1, 2, 3)).min() > 1e-4


@EACH
def test_a_network_without_a_null_class_needs_labels(name: str) -> None:
    net, (x, t, y) = small(name, null_class=False), inputs()
    assert net(x, t, y).shape == x.shape
    with pytest.raises(ValueError, match=r"no null class: give labels y in 0\.\.4"):
        net(x, t, None)


@EACH
@pytest.mark.parametrize("null_class", [True, False])
def test_one_hot_weights_equal_the_label_and_others_mix_the_table(name: str, null_class: bool) -> None:
    net, (x, t, y) = small(name, null_class=null_class), inputs()
    y[0] = CLASSES if null_class else 4
    weights = one_hot(y, CLASSES + null_class).float()
    assert torch.equal(net(x, t, weights), net(x, t, y))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(x, t, weights), net(x, t, y))
    assert torch.equal(net.double()(x.double(), t, weights), net(x.double(), t, y))
    # The table's row 3 set to a mixture of others is that mixture.
    net, mixture = small(name, null_class=null_class), torch.tensor([0.5, 0.3, -0.2, 0.0, 1.1] + [0.0] * null_class)
    labels = next(p for key, p in net.named_parameters() if key.endswith("label.weight"))
    table = labels.T if name == "ddpmpp" else labels
    assert net.label_rows().shape == (CLASSES + null_class, table.shape[1])
    before = net(x, t, mixture.expand(4, -1))
    table[3] = mixture[:CLASSES] @ table[:CLASSES]
    assert (net(x, t, torch.full_like(y, 3)) - before).abs().max() < 1e-5
    with pytest.raises(ValueError, match=r"label weights must be \(4, \d\), one per label, got \(4, 9\)"):
        net(x, t, torch.ones(4, 9))


@EACH
def test_label_weights_get_gradients(name: str) -> None:
    net, (x, t, y) = small(name), inputs()
    weights = one_hot(y, CLASSES + 1).float().requires_grad_()
    net(x, t, weights).square().sum().backward()
    assert weights.grad is not None
    assert weights.grad[:, :CLASSES].abs().amin() > 1e-6


@pytest.mark.parametrize(("name", "part"), [("dit", "condition"), ("ddpmpp", "embedding")])
def test_label_weights_compile(name: str, part: str) -> None:
    net, (_, t, y) = getattr(small(name), part), inputs()
    augment = (None,) if name == "ddpmpp" else ()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    assert torch.equal(compiled(t, one_hot(y, CLASSES + 1).float(), *augment), net(t, y, *augment))


@EACH
def test_a_network_without_classes_ignores_labels(name: str) -> None:
    net, (x, t, y) = small(name, num_classes=0), inputs()
    assert torch.equal(net(x, t, y), net(x, t, None))


class Custom(DiT):
    def __init__(self, width: int = 32) -> None:
        super().__init__(DiTConfig(hidden_size=width, depth=1, num_heads=2), (8, 4), 1)


class Sized(DiT):
    def __init__(self, config: DiTConfig, image_size: int = 8) -> None:
        super().__init__(config, image_size, 1)


def test_a_subclass_with_custom_arguments_knows_its_shape() -> None:
    assert Custom().shape == (1, 8, 4)
    assert Sized(SMALL["dit"]).shape == (1, 8, 8)


@EACH
def test_samples_do_not_depend_on_each_other(name: str) -> None:
    net, (x, t, y) = small(name), inputs()
    whole = net(x, t, y)
    for i in range(len(x)):
        alone = net(x[i : i + 1], t[i : i + 1], y[i : i + 1])
        assert (alone - whole[i : i + 1]).abs().max() < 1e-5
    assert (net(x, t.flip(0), y) - whole).abs().amax(dim=(1, 2, 3)).min() > 1e-4  # the time matters


@EACH
def test_integer_and_float_times_give_the_same_output(name: str) -> None:
    net, (x, _, y) = small(name), inputs()
    t = torch.tensor([0, 3, 500, 999])
    assert torch.equal(net(x, t, y), net(x, t.double(), y))


@pytest.mark.parametrize("image_size", [8, 16, 32])
@EACH
def test_default_sizes_fit_small_images(name: str, image_size: int) -> None:
    cost = count(lambda: build(name, DENOISERS[name].config(), image_size=image_size, channels=3), 3, image_size)
    assert cost.parameters > 1_000_000


def test_counting_takes_no_memory_and_keeps_the_default_device() -> None:
    devices = []

    def make() -> nn.Module:
        net = build("dit", SMALL["dit"], image_size=8, channels=3)
        devices.append(next(net.parameters()).device.type)
        return net

    assert count(make, 3, 8).parameters > 0
    assert devices == ["meta"]
    assert torch.empty(1).device.type == "cpu"


def attention_macs(name: str, config: Any, image_size: int) -> int:
    """Count the multiply-accumulates of the products inside softmax attention, the only ones without weights."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        net = build(name, config, image_size=image_size, channels=3)
        net(torch.empty(1, 3, image_size, image_size), torch.empty(1))
    operations = counter.get_flop_counts()["Global"].items()
    return sum(flops for op, flops in operations if "bmm" in str(op) or "attention" in str(op)) // 2


def test_attention_is_counted_in_full() -> None:
    # 2 N^2 D per layer, or 2 N M D in windows of M tokens.
    assert attention_macs("dit", DiTConfig(hidden_size=32, depth=3, num_heads=4), 16) == 3 * 2 * 64**2 * 32
    assert attention_macs("unet", SMALL["unet"], 8) == 4 * 2 * 16**2 * 16
    assert attention_macs("diffit", SMALL["diffit"], 8) == 2 * (2 * 64 * 16 * 8) + 2 * 16 * 16 * 16
    assert attention_macs("diffit-latent", SMALL["diffit-latent"], 8) == 2 * 2 * 16**2 * 32
    assert attention_macs("ddpmpp", SMALL["ddpmpp"], 8) == 3 * 2 * 16**2 * 16
    assert attention_macs("segformer", SMALL["segformer"], 8) == 2 * (64 * 4 * 8 + 16 * 4 * 8 + 4 * 4 * 16)
    assert attention_macs("uvit", SMALL["uvit"], 8) == 3 * 2 * 17**2 * 32


def test_a_dit_block_costs_the_sum_of_its_products() -> None:
    def macs(depth: int) -> int:
        return count(lambda: build("dit", DiTConfig(2, 32, depth, 4), image_size=16, channels=3), 3, 16).macs

    n, d = 64, 32
    assert macs(3) - macs(2) == n * 12 * d * d + 6 * d * d + 2 * n * n * d


def test_an_unknown_constructor_argument_is_answered_with_the_signature() -> None:
    wanted = r"DiT: got an unexpected keyword argument 'depth'; call DiT\(config: .*DiTConfig, image_size: int .*, chan"
    with pytest.raises(TypeError, match=wanted):
        DiT(image_size=8, channels=1, depth=2)  # type: ignore[call-arg]


def test_an_unknown_choice_is_refused_in_scripts_too() -> None:
    with pytest.raises(ValueError, match=r"denoiser.conditioning: unknown value 'adaLN-Zero'; choose from adaln-zero"):
        DiT(DiTConfig(4, 64, 2, 4, conditioning="adaLN-Zero"), image_size=8, channels=1)  # type: ignore[arg-type]
