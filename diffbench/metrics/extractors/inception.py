"""inception: the network and the protocol of published FID, from a local weights file.

The 2015 Inception v3 (Szegedy et al. 2016; 1,008 classes) that FID uses differs from later versions: average pooling
inside the blocks excludes the padding from the mean, the last block uses max pooling, batch normalisation has no
learned scale, and images are resized as in TensorFlow 1.
"""

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffbench.metrics.extractors.base import Extractor, Features, Request, check_channels, file_hash
from diffbench.metrics.extractors.resize import tf1

VARIABLE = "DIFFBENCH_INCEPTION"
STATE_DICT = "pt_inception-2015-12-05-6726825d.pth"


class Conv(nn.Module):
    """Convolution, batch normalisation and ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, pad: Any = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, pad, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _mean3(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(nn.Module):
    """35x35: 1x1, 5x5 and two 3x3 in parallel, and a pooled branch."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(inputs, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(inputs, 48, 1), Conv(48, 64, 5, pad=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(inputs, 64, 1), Conv(64, 96, 3, pad=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, pad=1)
        self.branch_pool = Conv(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        five = self.branch5x5_2(self.branch5x5_1(x))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_mean3(x))], 1)


class BlockB(nn.Module):
    """35x35 to 17x17."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3 = Conv(288, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(288, 64, 1), Conv(64, 96, 3, pad=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class BlockC(nn.Module):
    """17x17: 1x1, and 7x7 as pairs of 1x7 and 7x1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        row: Any = {"kernel": (1, 7), "pad": (0, 3)}
        column: Any = {"kernel": (7, 1), "pad": (3, 0)}
        self.branch1x1 = Conv(768, 192, 1)
        self.branch7x7_1 = Conv(768, width, 1)
        self.branch7x7_2, self.branch7x7_3 = Conv(width, width, **row), Conv(width, 192, **column)
        self.branch7x7dbl_1 = Conv(768, width, 1)
        self.branch7x7dbl_2, self.branch7x7dbl_3 = Conv(width, width, **column), Conv(width, width, **row)
        self.branch7x7dbl_4, self.branch7x7dbl_5 = Conv(width, width, **column), Conv(width, 192, **row)
        self.branch_pool = Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_mean3(x))], 1)


class BlockD(nn.Module):
    """17x17 to 8x8."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(768, 192, 1), Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(768, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7), pad=(0, 3))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), pad=(3, 0))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, stride=2)], 1)


class BlockE(nn.Module):
    """8x8, with 3x3 convolutions split into parallel 1x3 and 3x1; `pool` is the pooling of the last branch."""

    def __init__(self, inputs: int, pool: str) -> None:
        super().__init__()
        self.pool = pool
        row: Any = {"kernel": (1, 3), "pad": (0, 1)}
        column: Any = {"kernel": (3, 1), "pad": (1, 0)}
        self.branch1x1 = Conv(inputs, 320, 1)
        self.branch3x3_1 = Conv(inputs, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = Conv(384, 384, **row), Conv(384, 384, **column)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(inputs, 448, 1), Conv(448, 384, 3, pad=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Conv(384, 384, **row), Conv(384, 384, **column)
        self.branch_pool = Conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = _mean3(x) if self.pool == "mean" else F.max_pool2d(x, 3, stride=1, padding=1)
        parts = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)]
        return torch.cat(parts, 1)


class Inception(nn.Module):
    """The Inception v3 of FID, 23,850,960 parameters, named as in the state dict of pytorch-fid and torch-fidelity."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, 32, 3, stride=2), Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, pad=1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Conv(64, 80, 1), Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a = BlockB()
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (BlockC(w) for w in (128, 160, 160, 192))
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = BlockD(), BlockE(1280, "mean"), BlockE(2048, "max")
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> Features:
        """Map images (B, 3, 299, 299) in [-1, 1] to 2,048 features, logits without bias, and the spatial layer of sFID.

        The spatial layer is the first 7 channels of Mixed_6d's 1x1 branch (TensorFlow's mixed_6/conv): 2,023 values.
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        spatial = self.Mixed_6d.branch1x1(x)[:, :7].flatten(1)
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        pooled = x.mean((2, 3))
        return Features(pooled, F.linear(pooled, self.fc.weight), spatial)


def weights_file(request: Request) -> Path | None:
    name = request.weights or os.environ.get(VARIABLE)
    return Path(os.path.expanduser(name)) if name else None


def check(request: Request) -> None:
    """Check that the weights file exists and the images are grey or RGB."""
    path = weights_file(request)
    if path is None or not path.is_file():
        problem = "needs a weights file" if path is None else f"cannot find {path}"
        raise ValueError(
            f"inception {problem}; set evaluate.weights or ${VARIABLE} to {STATE_DICT} (pytorch-fid; torch-fidelity's"
            f" weights-{STATE_DICT[3:]} is the same)"
        )
    check_channels("inception", request)


def build(request: Request) -> Extractor:
    """Make the extractor from a state dict; raise ValueError if the file is anything else."""
    path = weights_file(request)
    assert path is not None
    network = Inception()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch.load warns about pickles that it then rejects
            state = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(state, strict=True)
    except (RuntimeError, pickle.UnpicklingError, AttributeError, TypeError, KeyError, EOFError, OSError) as e:
        reason = " ".join(str(e).split())[:200]
        raise ValueError(f"evaluate.weights: {path} is not a state dict of the FID network ({reason})") from None
    network.eval().requires_grad_(False)
    return Extractor(
        name="inception-tf1",
        network=network,
        run=network,
        dim=2048,
        weights=file_hash(path),
        licence="Apache-2.0",
        prepare=lambda images: (tf1(images, 299) - 128) / 128,
        classes=1008,
        spatial=7 * 17 * 17,
        published=True,
    )
