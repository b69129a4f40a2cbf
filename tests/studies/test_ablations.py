"""Every ablation of the papers is a config key, and trains."""

from typing import Any, get_args

import pytest
import torch
from small_networks import inputs, small

from diffbench.denoisers.tmsa import TimeIn

TIMES_IN = get_args(TimeIn)
ABLATIONS: list[tuple[str, dict[str, Any]]] = [
    *(("dit", {"conditioning": way}) for way in ("adaln-zero", "adaln", "cross-attention", "in-context")),
    ("dit", {"qk_norm": True, "mlp": "swiglu", "position": "rope", "norm": "rms"}),
    ("dit", {"gradient_checkpointing": True, "dropout": 0.1}),
    *(("diffit-latent", {"time_in": way}) for way in TIMES_IN),
    ("diffit-latent", {"head_silu": False}),
    ("diffit-latent", {"gradient_checkpointing": True}),
    *(("diffit", {"time_in": way}) for way in TIMES_IN),
    *(("diffit", {"tmsa": where}) for where in ("encoder", "decoder", "none")),
    *(("diffit", {"skip": kind}) for kind in ("concat", "add", "none")),
    ("diffit", {"resample": "bilinear"}),
    ("diffit", {"augment_dim": 9}),
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
        torch.manual_seed(0)  # the same dropout mask in both steps
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
def test_time_changes_the_output_unless_it_enters_only_through_keys(name: str, time_in: str) -> None:
    net, (x, t, _) = small(name, num_classes=0, time_in=time_in).double(), inputs()
    change = (net(x.double(), t) - net(x.double(), t + 300)).abs().max()
    assert change < 1e-12 if time_in in ("k", "none") else change > 1e-4


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
def test_time_and_class_enter_through_tokens(conditioning: str) -> None:
    x, t, y = inputs()
    net = small("dit", conditioning=conditioning)
    assert (net(x, t, y) - net(x, t.flip(0), y)).abs().max() > 1e-4
    assert (net(x, t, y) - net(x, t, y.flip(0))).abs().max() > 1e-4
    assert small("dit", conditioning=conditioning, num_classes=0)(x, t).shape == x.shape


@pytest.mark.parametrize("name", ["ddpmpp", "diffit"])
def test_the_augmentation_label_changes_the_output_and_zeros_mean_no_label(name: str) -> None:
    net, (x, t, y) = small(name, augment_dim=9), inputs()
    label = torch.zeros(len(x), 9)
    assert torch.equal(net(x, t, y, augment=label), net(x, t, y))
    assert (net(x, t, y, augment=label + 1) - net(x, t, y)).abs().amax(dim=(1, 2, 3)).min() > 1e-4
