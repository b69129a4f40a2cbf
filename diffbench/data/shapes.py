"""Drawn images of known composition, in any number: each class is a task whose solution a rule can check."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from diffbench.core import rng
from diffbench.core.errors import check_at_least
from diffbench.data.sets import DataConfig, ImageSet

TASKS = {
    "texture": ("horizontal stripes", "vertical stripes", "checks"),
    "symmetry": ("left-right mirror", "top-bottom mirror"),
    "corners": ("main diagonal agrees", "other diagonal agrees"),
    "count": ("one", "two", "three"),
}
"""Ability -> its classes, in the order of the labels. Textures are local, mirror symmetry spans the image, two opposite
corners have the same colour (the others are dark), and one to three separate objects are counted."""
CLASSES = tuple(name for names in TASKS.values() for name in names)
ABILITIES = tuple(ability for ability, names in TASKS.items() for _ in names)
"""The ability of each label."""
COLOURS = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1]], dtype=torch.float32)
"""Yellow, magenta, cyan; the background is dark."""


@dataclass
class ShapesConfig(DataConfig):
    """Drawn colour images in ten classes, each a task that a rule checks: no download, and no image repeats."""

    image_size: int = 16
    """Side of an image in pixels: 16 or 32."""
    count: int = 50_000
    """Training images; with at least `trainer.max_images` of them, none is seen twice."""
    held_out: int = 2_000
    """Validation images; a multiple of ten has the same number of each class."""
    seed: int = 0
    """Seed of the images, independent of the run's seed."""

    def __post_init__(self) -> None:
        if self.image_size not in (16, 32):
            raise ValueError(f"data.image_size: must be 16 or 32, got {self.image_size}")
        super().__post_init__()
        check_at_least(self, "data", count=10, held_out=10)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an image."""
        return 3, self.image_size, self.image_size


def shapes(config: ShapesConfig) -> tuple[ImageSet, ImageSet]:
    size, seed = config.image_size, config.seed
    return _part("train", config.count, size, seed), _part("held-out", config.held_out, size, seed)


@cache
def _part(part: str, count: int, size: int, seed: int) -> ImageSet:
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    labels = torch.arange(count) % len(CLASSES)
    for index in torch.arange(count).split(10_000):
        images[index] = draw(index, labels[index], size, rng.key("shapes", seed, part))
    from diffbench.metrics.base import Rule  # here, so that a config loads without importing the metrics

    rule = Rule(solves_task, ABILITIES)
    return ImageSet(images, labels, len(CLASSES), f"shapes{size}", CLASSES, origin="drawn", rule=rule)


# Drawing: coordinates are in pixels with y down; edges are one pixel wide, so that shapes are anti-aliased.


def draw(number: Tensor, labels: Tensor, size: int, key: int) -> Tensor:
    """Draw images (B, 3, size, size) uint8 of classes `labels` (B,), which depend on `key` and `number` (B,) alone."""
    u = (rng.words(key, number, 48).float() + 0.5) * 2.0**-32
    # Random dim light in every corner: no image repeats, and a copy can be told from a new image.
    corners = 0.3 * rearrange(u[:, 36:], "b (c h w) -> b c h w", c=3, h=2)
    image = F.interpolate(corners, (size, size), mode="bilinear", align_corners=True)
    for ability, of in {"texture": _texture, "symmetry": _mirrored, "corners": _corners, "count": _counted}.items():
        first = ABILITIES.index(ability)
        mine = (labels >= first) & (labels < first + len(TASKS[ability]))
        image[mine] = of(image[mine], labels[mine] - first, u[mine])
    return (255 * image).round().to(torch.uint8)


def _texture(image: Tensor, kind: Tensor, u: Tensor) -> Tensor:
    """Draw stripes or checks, size/8 wide, over the entire image in one colour, with a random phase."""
    size = image.shape[-1]
    step = size // 8
    y, x = (torch.arange(size)[None] + (u[:, i : i + 1] * 2 * step).long() for i in (0, 1))
    bands = torch.stack([y // step % 2, x // step % 2], dim=1)  # 0 or 1 for each row, for each column
    rows, columns = bands[:, 0, :, None].expand(-1, -1, size), bands[:, 1, None].expand(-1, size, -1)
    lit = torch.stack([rows, columns, rows ^ columns], dim=1)[torch.arange(len(kind)), kind]
    return torch.where(lit[:, None].bool(), _colour(u[:, 2])[:, :, None, None], image)


def _mirrored(image: Tensor, kind: Tensor, u: Tensor) -> Tensor:
    """Draw a shape in one quarter and its mirror image in another, across the vertical or the horizontal middle."""
    size = image.shape[-1]
    a = u[:, :6].T
    radius = (0.16 + 0.05 * a[2]) * size
    y, x = radius + a[:2] * (0.47 * size - 2 * radius)
    y = torch.where(a[5] < 0.5, y, size - y)
    for at in (x, size - x):
        image = _paint(image, torch.stack([y, at]), radius, a[3], _colour(a[4]))
    # The background is mirrored too.
    half = image[..., : size // 2]
    image = torch.cat([half, half.flip(3)], dim=3)
    return torch.where((kind == 0)[:, None, None, None], image, image.transpose(2, 3))


def _corners(image: Tensor, kind: Tensor, u: Tensor) -> Tensor:
    """Draw shapes of one colour in two opposite corners; the other two corners stay dark."""
    size = image.shape[-1]
    for i in range(2):
        a = u[:, 1 + 4 * i : 5 + 4 * i].T
        radius = (0.13 + 0.05 * a[2]) * size
        y, x = radius + 0.06 * a[0] * size, radius + 0.06 * a[1] * size
        right = (kind == 0) == (i == 1)  # on the main diagonal, the lower shape is on the right
        centre = torch.stack([size - y if i == 1 else y, torch.where(right, size - x, x)])
        image = _paint(image, centre, radius, a[3], _colour(u[:, 0]))
    return image


def _counted(image: Tensor, kind: Tensor, u: Tensor) -> Tensor:
    """Draw one to three shapes of one colour in different quarters of the image, with a gap between them."""
    size = image.shape[-1]
    quarters = u[:, :4].argsort(1)[:, :3]
    for i in range(3):
        a = u[:, 5 + 4 * i : 9 + 4 * i].T
        radius = (0.13 + 0.04 * a[2]) * size
        corner = (torch.stack([quarters[:, i] // 2, quarters[:, i] % 2]) + 0.5) * size / 2
        drawn = _paint(image, corner + (2 * a[:2] - 1) * (0.19 * size - radius), radius, a[3], _colour(u[:, 4]))
        image = torch.where((kind >= i)[:, None, None, None], drawn, image)
    return image


def _paint(image: Tensor, centre: Tensor, radius: Tensor, which: Tensor, colour: Tensor) -> Tensor:
    """Paint a disc, square or diamond (chosen by `which`, (B,) in 0..1) on each image; centre (2, B), colour (B, 3)."""
    at = torch.arange(image.shape[-1]) + 0.5
    dy, dx = (at - centre[0][:, None])[:, :, None].abs(), (at - centre[1][:, None])[:, None].abs()
    disc, square, diamond = (dy**2 + dx**2).sqrt(), torch.maximum(dy, dx) + 0 * dy, 0.75 * (dy + dx)
    w = which[:, None, None]
    distance = torch.where(w < 1 / 3, disc, torch.where(w < 2 / 3, square, diamond))
    cover = (radius[:, None, None] - distance + 0.5).clamp(0, 1)[:, None]
    return image * (1 - cover) + cover * colour[:, :, None, None]


def _colour(u: Tensor) -> Tensor:
    return COLOURS[(u * len(COLOURS)).long()]


# Checking.


def solves_task(images: Tensor, labels: Tensor) -> Tensor:
    """Return by rule whether each image solves the task of its label: (B,) bool.

    The rules tolerate noise and JPEG compression, and do not depend on the training images.

    Args:
        images: (B, 3, S, S) uint8.
        labels: (B,) in 0..9.
    """
    x = images.float() / 255
    found = torch.zeros(len(x), dtype=torch.bool)
    for label in labels.unique().tolist():
        mine = labels == label
        found[mine] = _RULES[label](x[mine])
    return found


def _lit(x: Tensor) -> Tensor:
    return x.mean(1) > 0.4  # the mean, not the brightest channel, because JPEG blurs colours


def _bands(x: Tensor, kind: int, share: float = 0.95) -> Tensor:
    size = x.shape[-1]
    step = size // 8
    at = torch.arange(size)
    rows, columns = ((at[None] + torch.arange(2 * step)[:, None]) // step % 2 for _ in range(2))
    if kind == 2:
        patterns = (rows[:, None, :, None] ^ columns[None, :, None, :]).flatten(0, 1)
    else:
        patterns = rows[:, :, None].expand(-1, -1, size) if kind == 0 else rows[:, None].expand(-1, size, -1)
    same = _lit(x)[:, None] == patterns.bool()
    return same.float().mean((2, 3)).amax(1) >= share


def _mirrors(x: Tensor, dim: int, share: float = 0.92) -> Tensor:
    """Return whether 92% of pixels are within 0.4 of their mirror image in every channel, and at least 5% are lit."""
    same = ((x - x.flip(dim)).abs().amax(1) < 0.4).float().mean((1, 2))
    return (same >= share) & (_lit(x).float().mean((1, 2)) >= 0.05)


def corner_colours(x: Tensor) -> Tensor:
    """Return the index into COLOURS of each corner, (B, 4) from top left to bottom right; -1 for a dark one."""
    patch = round(0.28 * x.shape[-1])
    ends = slice(0, patch), slice(-patch, None)
    mean = torch.stack([x[:, :, top, left].mean((2, 3)) for top in ends for left in ends], dim=1)
    brightest = mean.amax(2)
    colour = torch.cdist(mean / brightest[..., None].clamp_min(1e-6), COLOURS.expand(len(x), -1, -1)).argmin(2)
    return torch.where(brightest > 0.4, colour, -1)


def _diagonal(x: Tensor, ends: tuple[int, int], others: tuple[int, int]) -> Tensor:
    """Return whether the corners `ends` contain shapes of one colour and the `others` are dark."""
    colours = corner_colours(x)
    (a, b), rest = colours[:, ends].T, colours[:, others]
    return (a >= 0) & (a == b) & (rest < 0).all(1)


def objects(lit: Tensor, least: float = 0.016) -> Tensor:
    """Count the connected objects of at least 1.6% of the pixels in each image (B, S, S)."""
    from scipy.ndimage import label

    sizes = (np.bincount(label(image)[0].ravel())[1:] for image in lit.numpy())
    return torch.tensor([int((found >= least * lit[0].numel()).sum()) for found in sizes])


def _counts(x: Tensor, wanted: int) -> Tensor:
    return objects(x.amax(1) > 0.6) == wanted


_RULES: tuple[Callable[[Tensor], Tensor], ...] = (
    *(partial(_bands, kind=kind) for kind in range(3)),
    partial(_mirrors, dim=3),
    partial(_mirrors, dim=2),
    partial(_diagonal, ends=(0, 3), others=(1, 2)),
    partial(_diagonal, ends=(1, 2), others=(0, 3)),
    *(partial(_counts, wanted=n) for n in (1, 2, 3)),
)
"""The rule of each label: images (B, 3, S, S) in [0, 1] -> (B,) bool."""
