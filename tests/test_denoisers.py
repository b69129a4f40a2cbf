"""Every registered denoiser: its contract, its published size, and the algebra of its parts."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from golden_cases import load
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffbench.denoisers import (
    DENOISERS,
    DDPMppConfig,
    DiffiTConfig,
    DiffiTLatentConfig,
    DiTConfig,
    UNetConfig,
    build,
)
from diffbench.denoisers.cost import count
from diffbench.denoisers.layers import (
    from_windows,
    relative_position_index,
    sincos_position_table,
    timestep_embedding,
    to_windows,
)
from diffbench.denoisers.tmsa import TMSA, TimeIn

SMALL = {
    "unet": UNetConfig(8, [1, 2], 1, [4], num_heads=2, norm_groups=4),
    "dit": DiTConfig(hidden_size=32, depth=2, num_heads=4),
    "diffit": DiffiTConfig([8, 16], [1, 1], num_heads=2, time_dim=16, norm_groups=4),
    "diffit-latent": DiffiTLatentConfig(hidden_size=32, depth=2, num_heads=4),
    "ddpmpp": DDPMppConfig(8, [1, 2], 1, [4]),
}
EACH = pytest.mark.parametrize("name", DENOISERS)
SIZE, CHANNELS, CLASSES = 8, 3, 5


def small(name: str, shaken: bool = True, **changes: Any) -> nn.Module:
    """A small network in eval mode with changes of shape or config; `shaken`, no weight is zero as it is at first."""
    config = SMALL[name] if name in SMALL else DENOISERS[name].config()
    config = replace(config, **{key: value for key, value in changes.items() if hasattr(config, key)})
    shape = {"image_size": SIZE, "channels": CHANNELS, "num_classes": CLASSES}
    shape |= {key: value for key, value in changes.items() if not hasattr(config, key)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build(name, config, **shape).eval()
        for p in net.parameters() if shaken else []:
            p.data += 0.1 * torch.randn_like(p)
    return net.requires_grad_(False)


def inputs(batch: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy images, times (one of them fractional) and labels."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, CHANNELS, SIZE, SIZE, generator=generator)
    return x, torch.linspace(0, 999, batch), torch.arange(batch) % CLASSES


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
def test_the_first_output_is_zero(name: str) -> None:
    x, t, y = inputs()
    first = small(name, shaken=False)(x, t, y).abs().max()
    assert first < 1e-3 if name == "ddpmpp" else first == 0  # DDPM++ scales its last weights by 1e-5
    assert small(name)(x, t, y).std() > 1e-3


@EACH
def test_no_label_is_the_null_label(name: str) -> None:
    net, (x, t, y) = small(name), inputs()
    out = net(x, t, None)
    assert torch.equal(out, net(x, t, torch.full_like(y, CLASSES)))
    assert (out - net(x, t, y)).abs().amax(dim=(1, 2, 3)).min() > 1e-4


@EACH
def test_without_a_null_class_labels_are_needed(name: str) -> None:
    net, (x, t, y) = small(name, null_class=False), inputs()
    assert net(x, t, y).shape == x.shape
    with pytest.raises(ValueError, match=r"no null class: give labels y in 0\.\.4"):
        net(x, t, None)


@EACH
def test_a_network_without_classes_ignores_labels(name: str) -> None:
    net, (x, t, y) = small(name, num_classes=0), inputs()
    assert torch.equal(net(x, t, y), net(x, t, None))


@EACH
def test_each_sample_is_on_its_own(name: str) -> None:
    net, (x, t, y) = small(name), inputs()
    whole = net(x, t, y)
    for i in range(len(x)):
        alone = net(x[i : i + 1], t[i : i + 1], y[i : i + 1])
        assert (alone - whole[i : i + 1]).abs().max() < 1e-5
    assert (net(x, t.flip(0), y) - whole).abs().amax(dim=(1, 2, 3)).min() > 1e-4  # the time matters


@EACH
def test_whole_and_float_times_are_the_same(name: str) -> None:
    net, (x, _, y) = small(name), inputs()
    t = torch.tensor([0, 3, 500, 999])
    assert torch.equal(net(x, t, y), net(x, t.double(), y))


@EACH
def test_compiles_as_one_graph_to_the_same_values(name: str) -> None:
    net, (x, t, y) = small(name), inputs()
    torch.compiler.reset()
    assert torch.equal(torch.compile(net, fullgraph=True, backend="eager")(x, t, y), net(x, t, y))
    assert torch.equal(torch.compile(net, fullgraph=True, backend="eager")(x, t), net(x, t))


@pytest.mark.parametrize(
    ("config", "image_size", "text"),
    [
        (DiTConfig(patch_size=3), 8, "denoiser.patch_size must divide the image size: 3 does not divide 8"),
        (DiTConfig(hidden_size=32, num_heads=5), 8, "num_heads must divide denoiser.hidden_size: 5 does not divide 32"),
        (DiTConfig(hidden_size=30, num_heads=5), 8, "a width divisible by 4, got 30"),
        (DiTConfig(patch_size=0), 8, "0 does not divide 8"),
        (UNetConfig(channel_mult=[1, 1, 1]), 6, "3 levels .* halve the image too often: 4 does not divide 6"),
        (UNetConfig(model_channels=48), 8, "norm_groups must divide each level's width: 32 does not divide 48"),
        (UNetConfig(num_heads=5), 16, "num_heads must divide the width where attention acts: 5 does not divide 128"),
        (
            UNetConfig(num_head_channels=48),
            16,
            "num_head_channels must divide .* attention acts: 48 does not divide 128",
        ),
        (DDPMppConfig(), 10, "3 levels .* halve the image too often: 4 does not divide 10"),
        (DDPMppConfig(num_heads=3), 16, "num_heads must divide the width where attention acts: 3 does not divide 256"),
        (DDPMppConfig(channel_mult=[1, 1], model_channels=134), 8, "groups .* divide each width, .*: 32 does not"),
        (DiffiTLatentConfig(patch_size=3), 8, "denoiser.patch_size must divide the image size: 3 does not divide 8"),
        (DiffiTLatentConfig(num_heads=5), 8, "num_heads must divide denoiser.hidden_size: 5 does not divide 384"),
        (DiffiTConfig(window=[4, 2]), 32, "channels has 3 stages, denoiser.window has 2"),
        (DiffiTConfig(), 10, "3 stages halve the image too often: 4 does not divide 10"),
        (DiffiTConfig(window=3), 32, "window must divide the side of stage 1: 3 does not divide 32"),
        (DiffiTConfig(num_heads=3), 8, "num_heads must divide each stage's width: 3 does not divide 128"),
        (DiffiTConfig(norm_groups=24), 8, "norm_groups must divide each width, .*: 24 does not divide 128"),
        (DiffiTConfig(channels=[32, 32], blocks=[1]), 8, "channels has 2 stages, denoiser.blocks has 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_both_numbers(config: Any, image_size: int, text: str) -> None:
    name = next(n for n, entry in DENOISERS.items() if entry.config is type(config))
    with torch.device("meta"), pytest.raises(ValueError, match=text):
        build(name, config, image_size=image_size, channels=3)


@pytest.mark.parametrize("name", ["dit", "diffit", "diffit-latent"])
def test_an_image_of_another_size_is_refused_with_both(name: str) -> None:
    with pytest.raises(ValueError, match="takes images of 3x8x8, got 3x16x8"):
        small(name)(torch.zeros(2, CHANNELS, 16, 8), torch.zeros(2))


@pytest.mark.parametrize("name", ["unet", "ddpmpp"])
def test_convolutional_networks_take_any_multiple_of_their_levels(name: str) -> None:
    x, t = torch.randn(2, CHANNELS, 16, 6), torch.zeros(2)
    assert small(name)(x, t).shape == x.shape
    with pytest.raises(ValueError, match="3 channels and sides divisible by 2, got 3x16x7"):
        small(name)(torch.zeros(2, CHANNELS, 16, 7), t)
    with pytest.raises(ValueError, match="3 channels and sides divisible by 8, got 3x16x6"):
        small(name, tmsa=True)(x, t)


@pytest.mark.parametrize("image_size", [8, 16, 32])
@EACH
def test_default_sizes_fit_small_images(name: str, image_size: int) -> None:
    cost = count(lambda: build(name, DENOISERS[name].config(), image_size=image_size, channels=3), 3, image_size)
    assert cost.parameters > 1_000_000


def test_counting_takes_no_memory_and_leaves_the_default_device() -> None:
    devices = []

    def make() -> nn.Module:
        net = build("dit", SMALL["dit"], image_size=8, channels=3)
        devices.append(next(net.parameters()).device.type)
        return net

    assert count(make, 3, 8).parameters > 0
    assert devices == ["meta"]
    assert torch.empty(1).device.type == "cpu"


def attention_macs(name: str, config: Any, image_size: int) -> int:
    """Multiply-accumulates of the products inside softmax attention, the only ones without a weight."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        net = build(name, config, image_size=image_size, channels=3)
        net(torch.empty(1, 3, image_size, image_size), torch.empty(1))
    operations = counter.get_flop_counts()["Global"].items()
    return sum(flops for op, flops in operations if "bmm" in str(op) or "attention" in str(op)) // 2


def test_attention_is_counted_in_full() -> None:
    # 2 N^2 D each, or 2 N M D in windows of M tokens.
    assert attention_macs("dit", DiTConfig(hidden_size=32, depth=3, num_heads=4), 16) == 3 * 2 * 64**2 * 32
    assert attention_macs("unet", SMALL["unet"], 8) == 4 * 2 * 16**2 * 16
    assert attention_macs("diffit", SMALL["diffit"], 8) == 2 * (2 * 64 * 16 * 8) + 2 * 16 * 16 * 16
    assert attention_macs("diffit-latent", SMALL["diffit-latent"], 8) == 2 * 2 * 16**2 * 32
    assert attention_macs("ddpmpp", SMALL["ddpmpp"], 8) == 3 * 2 * 16**2 * 16


def test_a_dit_block_costs_what_its_products_say() -> None:
    def macs(depth: int) -> int:
        return count(lambda: build("dit", DiTConfig(2, 32, depth, 4), image_size=16, channels=3), 3, 16).macs

    n, d = 64, 32
    assert macs(3) - macs(2) == n * 12 * d * d + 6 * d * d + 2 * n * n * d


@pytest.mark.parametrize("call", load("timestep_embedding").info["calls"], ids=lambda c: c["name"])
def test_time_features_equal_the_reference(call: dict[str, Any]) -> None:
    case = load("timestep_embedding")
    t = case.tensors[next(iter(call["inputs"].values()))]
    case.check(call["name"], timestep_embedding(t, **call["args"]))


@pytest.mark.parametrize(("width", "grid"), [(32, 4), (48, 8)])
def test_position_table_equals_the_reference(width: int, grid: int) -> None:
    load("pos_embed_2d").check(f"dim{width}.grid{grid}", sincos_position_table(width, grid, grid))


def test_position_table_of_an_oblong_grid() -> None:
    table = sincos_position_table(16, 2, 5)
    assert table.shape == (10, 16)
    assert torch.equal(table[:5], sincos_position_table(16, 5, 5)[:5])  # row 0
    assert torch.equal(table[5:], sincos_position_table(16, 5, 5)[5:10])


@pytest.mark.parametrize("window", [4, 8])
def test_relative_positions_equal_the_reference(window: int) -> None:
    load("relative_position_index").check(f"window{window}", relative_position_index(window))


def test_windows_hold_pixels_and_go_back() -> None:
    x = torch.arange(2 * 3 * 4 * 8).reshape(2, 3, 4, 8)
    tokens = to_windows(x, 2)
    assert tokens.shape == (16, 4, 3)
    assert torch.equal(from_windows(tokens, 2, 4, 8), x)
    for b, row, col in [(0, 0, 0), (0, 1, 3), (1, 2, 5), (1, 3, 7)]:
        window = b * 8 + row // 2 * 4 + col // 2
        assert torch.equal(tokens[window, row % 2 * 2 + col % 2], x[b, :, row, col])


def tmsa() -> tuple[TMSA, Tensor, Tensor]:
    """Attention over 3 windows in each of 2 samples, float64, no parameter zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = TMSA(dim=8, num_heads=2, window=2, time_dim=6).double()
        for p in net.parameters():
            p.data += 0.3 * torch.randn_like(p)
        return net, torch.randn(6, 4, 8, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)


def test_time_in_the_keys_of_tmsa_does_nothing() -> None:
    """The softmax removes what is the same for every key, so a third of the time projection is idle."""
    net, tokens, time = tmsa()
    out = net(tokens, time)
    out.square().sum().backward()
    for p in (net.qkv_time.weight, net.qkv_time.bias):
        assert p.grad is not None
        query, key, value = p.grad.chunk(3)
        assert query.abs().max() > 1e-3
        assert value.abs().max() > 1e-3
        assert key.abs().max() < 1e-10 * query.abs().max()
    with torch.no_grad():
        net.qkv_time.weight[8:16] = 5 * torch.randn(8, 6, dtype=torch.float64)
        net.qkv_time.bias[8:16] = 5.0
        assert (net(tokens, time) - out).abs().max() < 1e-10
        net.qkv_time.weight[:8] += 1.0
        assert (net(tokens, time) - out).abs().max() > 1e-2


def test_time_in_the_values_of_tmsa_shifts_every_token_alike() -> None:
    net, tokens, time = tmsa()
    with torch.no_grad():
        out = net(tokens, time)
        weight = net.qkv_time.weight[16:].clone()
        net.qkv_time.weight[16:] = 0
        shift = (out - net(tokens, time)).reshape(2, 3, 4, 8)
    want = time @ weight.T @ net.proj.weight.T
    assert (shift - want[:, None, None]).abs().max() < 1e-12


def test_the_windows_of_a_sample_get_its_own_time() -> None:
    net, tokens, time = tmsa()
    with torch.no_grad():
        both, second = net(tokens, time), net(tokens[3:], time[1:])
    assert (both[3:] - second).abs().max() < 1e-12


def test_the_full_form_of_tmsa_equals_the_fused_two_terms() -> None:
    """Time adds q_t.k_j to the logits of key j, the same for every query, and W_o v_t to every token."""
    net, tokens, time = tmsa()
    with torch.no_grad():
        full = net(tokens, time)
        q, k, v = net.qkv(tokens).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        q_time, _, v_time = net.qkv_time(time.repeat_interleave(3, dim=0)).unflatten(-1, (3, 2, 4)).permute(1, 0, 2, 3)
        per_key = torch.einsum("bhd,bhmd->bhm", q_time, k)[:, :, None]
        logits = (torch.einsum("bhnd,bhmd->bhnm", q, k) + per_key) / 2 + net.bias[net.bias_index].permute(2, 0, 1)
        h = torch.einsum("bhnm,bhmd->bnhd", logits.softmax(-1), v) + v_time[:, None]
        assert (net.proj(h.flatten(2)) - full).abs().max() < 1e-13


@pytest.mark.parametrize(("without_keys", "same"), [("qv", "qkv"), ("q", "qk"), ("v", "kv")])
def test_time_parts_without_keys_equal_those_with(without_keys: Any, same: Any) -> None:
    full, tokens, time = tmsa()
    nets = [TMSA(8, 2, 2, 6, parts).double() for parts in (without_keys, same)]
    rows = {"q": slice(0, 8), "k": slice(8, 16), "v": slice(16, 24)}
    for net, parts in zip(nets, (without_keys, same), strict=True):
        chosen = {
            f"qkv_time.{name}": torch.cat([p[rows[part]] for part in parts])
            for name, p in full.qkv_time.named_parameters()
        }
        net.load_state_dict(full.state_dict() | chosen)
    with torch.no_grad():
        assert (nets[0](tokens, time) - nets[1](tokens, time)).abs().max() < 1e-13
        assert (nets[0](tokens, time) - nets[0](tokens, 0 * time)).abs().max() > 1e-2


TIMES_IN = get_args(TimeIn)
ABLATIONS: list[tuple[str, dict[str, Any]]] = [
    *(("dit", {"conditioning": way}) for way in ("adaln-zero", "adaln", "cross-attention", "in-context")),
    ("dit", {"gradient_checkpointing": True, "dropout": 0.1}),
    *(("diffit-latent", {"time_in": way}) for way in TIMES_IN),
    ("diffit-latent", {"head_silu": False}),
    ("diffit-latent", {"gradient_checkpointing": True}),
    *(("diffit", {"time_in": way}) for way in TIMES_IN),
    *(("diffit", {"tmsa": where}) for where in ("encoder", "decoder", "none")),
    *(("diffit", {"skip": kind}) for kind in ("concat", "add", "none")),
    ("diffit", {"resample": "bilinear"}),
    ("diffit", {"window": 2}),
    ("diffit", {"window": [8, 2]}),
    ("diffit", {"time_dim": 8, "token_dim": 32}),
    *((name, {"time_features": "fourier", "fourier_scale": 0.01}) for name in ("diffit", "unet", "ddpmpp")),
    *((name, {"tmsa": True}) for name in ("unet", "ddpmpp")),
    ("unet", {"use_scale_shift_norm": False, "conv_resample": False, "num_heads_upsample": 4}),
    ("unet", {"resblock_updown": True, "num_head_channels": 4}),
    ("ddpmpp", {"num_heads": 2, "augment_dim": 9}),
]


@pytest.mark.parametrize(("name", "changes"), ABLATIONS, ids=lambda v: v if isinstance(v, str) else str(v))
def test_each_ablation_takes_a_training_step(name: str, changes: dict[str, Any]) -> None:
    net, (x, t, y) = small(name, **changes).train().requires_grad_(True), inputs()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
    extra = {"augment": torch.ones(len(x), 9)} if "augment_dim" in changes else {}
    losses = []
    for _ in range(2):
        torch.manual_seed(0)  # the same dropout in both
        loss = (net(x, t, y, **extra) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    timeless = changes.get("time_in") == "none"
    for key, p in net.named_parameters():
        if not (timeless and key.startswith("condition.")):
            assert p.grad is not None and bool(p.grad.isfinite().all()), key


@pytest.mark.parametrize("name", ["diffit", "diffit-latent"])
@pytest.mark.parametrize("time_in", TIMES_IN)
def test_time_changes_the_output_but_through_keys_alone(name: str, time_in: str) -> None:
    net, (x, t, _) = small(name, num_classes=0, time_in=time_in).double(), inputs()
    change = (net(x.double(), t) - net(x.double(), t + 300)).abs().max()
    assert change < 1e-12 if time_in in ("k", "none") else change > 1e-4


@pytest.mark.parametrize("name", ["dit", "diffit-latent"])
def test_oblong_images(name: str) -> None:
    net = small(name, image_size=(4, 8))
    x, t, y = torch.randn(2, CHANNELS, 4, 8), torch.tensor([3.0, 500.0]), torch.tensor([0, CLASSES])
    assert net(x, t, y).shape == x.shape
    assert net.grid == (2, 4)
    with pytest.raises(ValueError, match="patch_size must divide the image size: 2 does not divide 5"):
        small(name, image_size=(4, 5))
    square, again, (x, t, y) = small(name, image_size=(8, 8)), small(name), inputs()
    assert torch.equal(square(x, t, y), again(x, t, y))


def test_relative_positions_of_an_oblong_window() -> None:
    index = relative_position_index(2, 3)
    assert index.shape == (6, 6)
    assert (index.min(), index.max()) == (0, 14)
    where = [(row, col) for row in range(2) for col in range(3)]
    offsets = {(a[0] - b[0], a[1] - b[1]): set() for a in where for b in where}
    for i, a in enumerate(where):
        for j, b in enumerate(where):
            offsets[a[0] - b[0], a[1] - b[1]].add(int(index[i, j]))
    assert sorted(row for rows in offsets.values() for row in rows) == list(range(15))  # one row an offset


@pytest.mark.parametrize("name", ["dit", "diffit-latent"])
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    x, t, y = inputs()
    gradients = []
    for on in (False, True):
        net = small(name, gradient_checkpointing=on).requires_grad_(True)
        net(x, t, y).square().sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("conditioning", ["cross-attention", "in-context"])
def test_time_and_class_are_tokens_where_asked(conditioning: str) -> None:
    x, t, y = inputs()
    net = small("dit", conditioning=conditioning)
    assert (net(x, t, y) - net(x, t.flip(0), y)).abs().max() > 1e-4
    assert (net(x, t, y) - net(x, t, y.flip(0))).abs().max() > 1e-4
    assert small("dit", conditioning=conditioning, num_classes=0)(x, t).shape == x.shape


def test_fourier_frequencies_are_saved_and_drawn_once() -> None:
    net = small("diffit", time_features="fourier", fourier_scale=0.01)
    frequencies = net.state_dict()["condition.fourier.frequencies"]
    assert frequencies.shape == (128,)
    assert 0.005 < frequencies.std() < 0.02
