"""The FID network: its size and layers, the weights file it reads, and the error when there is none."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffbench.metrics import Request, extractor
from diffbench.metrics.extractors.base import check
from diffbench.metrics.extractors.inception import Inception, _mean3
from diffbench.metrics.extractors.resize import tf1
from diffbench.metrics.registry import metric_name

IMAGES = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.fixture(scope="module")
def network() -> Inception:
    torch.manual_seed(0)
    net = Inception().eval()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):  # keeps activations from vanishing
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return net


@pytest.fixture(scope="module")
def weights(network: Inception, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a file like the one pytorch-fid distributes, with random weights."""
    path = tmp_path_factory.mktemp("weights") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(network.state_dict(), path)
    return path


def test_size_and_parameter_names(network: Inception) -> None:
    assert sum(p.numel() for p in network.parameters()) == 23_850_960
    state = network.state_dict()
    assert len([k for k in state if k.endswith("conv.weight")]) == 94
    assert state["Conv2d_1a_3x3.conv.weight"].shape == (32, 3, 3, 3)
    assert state["Mixed_6d.branch7x7dbl_2.conv.weight"].shape == (160, 160, 7, 1)
    assert state["Mixed_7c.branch3x3dbl_3b.bn.running_var"].shape == (384,)
    assert state["fc.weight"].shape == (1008, 2048)


def test_shapes_of_the_layers(network: Inception) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    hooks = [
        module.register_forward_hook(lambda m, i, out, name=name: shapes.update({name: tuple(out.shape[1:])}))
        for name, module in network.named_children()
        if name != "fc"
    ]
    with torch.no_grad():
        found = network(torch.zeros(1, 3, 299, 299))
    for hook in hooks:
        hook.remove()
    assert shapes["Conv2d_2b_3x3"] == (64, 147, 147)
    assert shapes["Conv2d_4a_3x3"] == (192, 71, 71)
    sizes = {"Mixed_5b": (256, 35), "Mixed_5d": (288, 35), "Mixed_6a": (768, 17), "Mixed_6e": (768, 17)}
    sizes |= {"Mixed_7a": (1280, 8), "Mixed_7c": (2048, 8)}
    assert all(shapes[name] == (width, size, size) for name, (width, size) in sizes.items())
    assert [part.shape for part in found] == [(1, 2048), (1, 1008), (1, 2023)]


def test_details_of_the_2015_network(network: Inception) -> None:
    assert (network.Mixed_7b.pool, network.Mixed_7c.pool) == ("mean", "max")
    assert network.Mixed_5b.branch1x1.bn.eps == 0.001
    ones = torch.ones(1, 1, 4, 4)
    assert torch.equal(_mean3(ones), ones)  # the mean excludes padding
    with torch.no_grad():
        pooled, logits, _ = network(torch.zeros(1, 3, 299, 299))
    assert network.fc.bias.abs().max() > 0
    assert logits is not None and torch.allclose(logits, pooled @ network.fc.weight.T, rtol=1e-3, atol=1e-4)  # no bias


def test_a_state_dict_is_loaded_and_images_follow_the_protocol(network: Inception, weights: Path) -> None:
    features = extractor("inception", Request((3, 32, 32), str(weights)))
    assert (features.dim, features.classes, features.spatial, features.published) == (2048, 1008, 2023, True)
    assert metric_name("fd", features, 50_000) == "fid/inception-tf1@50000"
    with torch.no_grad():
        want = network((tf1(IMAGES, 299) - 128) / 128)
        shifted = network((F.interpolate(IMAGES.float(), (299, 299), mode="bilinear") - 128) / 128)
    for got, expected in zip(features(IMAGES), want, strict=True):
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(features(IMAGES).pooled, shifted.pooled, rtol=1e-2)


def test_the_file_may_be_given_by_an_environment_variable(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFBENCH_INCEPTION", str(weights))
    check("inception", Request((1, 8, 8)))
    monkeypatch.setenv("DIFFBENCH_INCEPTION", "/nowhere.pth")
    with pytest.raises(ValueError, match=r"evaluate\.extractor: inception cannot find /nowhere\.pth; set evaluate"):
        check("inception", Request((1, 8, 8)))


def test_the_error_for_a_missing_file_names_it_and_where_to_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFFBENCH_INCEPTION", raising=False)
    with pytest.raises(ValueError) as caught:
        extractor("inception", Request((3, 32, 32)))
    assert str(caught.value) == (
        "evaluate.extractor: inception needs a weights file; set evaluate.weights or $DIFFBENCH_INCEPTION to"
        " pt_inception-2015-12-05-6726825d.pth (pytorch-fid; torch-fidelity's weights-inception-2015-12-05-6726825d.pth"
        " is the same)"
    )


@pytest.mark.parametrize("content", [b"", b"no weights", "other"])
def test_another_file_is_refused(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "weights.pth"
    if isinstance(content, str):
        torch.save({"fc.weight": torch.zeros(2, 2)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"evaluate\.weights: {path} is not a state dict of the FID network \("):
        extractor("inception", Request((3, 32, 32), str(path)))


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"fc.weight": nn.Linear(1, 1)}, path)  # a module needs code to be unpickled
    with pytest.raises(ValueError, match=r"is not a state dict of the FID network \(Weights only load failed"):
        extractor("inception", Request((3, 32, 32), str(path)))
