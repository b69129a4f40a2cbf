"""Drawn shapes: every image solves its task, and the rules tolerate noise and compression but not wrong images."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffbench.config.load import load
from diffbench.core import rng
from diffbench.core.errors import UserError
from diffbench.data.shapes import ABILITIES, CLASSES, ShapesConfig, corner_colours, draw, objects, shapes, solves_task
from diffbench.metrics.base import Rule
from diffbench.metrics.classification import SolvedTasks

SIZES = pytest.mark.parametrize("size", [16, 32])


def draw_test_images(size: int, count: int = 2_000) -> tuple[Tensor, Tensor]:
    labels = torch.arange(count) % len(CLASSES)
    return draw(torch.arange(count), labels, size, rng.key("test")), labels


def compress(images: Tensor, quality: int) -> Tensor:
    found = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
        found.append(torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1))
    return torch.stack(found)


@SIZES
def test_every_image_solves_its_task(size: int) -> None:
    images, labels = draw_test_images(size)
    assert solves_task(images, labels).all()


@SIZES
def test_the_rules_tolerate_noise_and_compression(size: int) -> None:
    images, labels = draw_test_images(size)
    noise = 20 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noisy = (images + noise).clamp(0, 255).to(torch.uint8)
    assert solves_task(noisy, labels).double().mean() >= 0.999
    assert solves_task(compress(images, 75), labels).double().mean() >= 0.999


def test_images_of_another_ability_rarely_solve_a_task() -> None:
    images, labels = draw_test_images(16)
    # Two counted shapes may lie in opposite corners, and a shape and its mirror image are two objects.
    for ability, most in {"texture": 0, "corners": 0.03, "count": 0.25}.items():
        wanted = torch.tensor([i for i, a in enumerate(ABILITIES) if a == ability])
        others = torch.tensor([ABILITIES[label] != ability for label in labels])
        guesses = wanted[torch.arange(int(others.sum())) % len(wanted)]
        assert solves_task(images[others], guesses).double().mean() <= most
    swapped = {0: 1, 1: 2, 2: 0, 3: 4, 4: 3, 5: 6, 6: 5, 7: 8, 8: 9, 9: 7}
    wrong = torch.tensor([swapped[int(label)] for label in labels])
    assert solves_task(images, wrong).double().mean() < 0.005
    assert not solves_task(torch.zeros(10, 3, 16, 16, dtype=torch.uint8), torch.arange(10)).any()


def test_one_patch_breaks_a_symmetry() -> None:
    images, labels = draw_test_images(16)
    mirrored = (labels == 3) | (labels == 4)
    broken = images[mirrored].clone()
    broken[:, :, 2:6, 0:4] = 255 - broken[:, :, 2:6, 0:4]
    assert solves_task(broken, labels[mirrored]).double().mean() < 0.02


def test_factors_are_read_back() -> None:
    images, labels = draw_test_images(16)
    x = images.float() / 255
    counted = labels >= 7
    assert torch.equal(objects(x[counted].amax(1) > 0.6), labels[counted] - 6)
    colours = corner_colours(x[labels == 5])
    assert torch.equal(colours[:, 0], colours[:, 3]) and (colours[:, 1:3] == -1).all()
    assert colours[:, 0].bincount(minlength=3).min() > 50  # 200 images in three colours


def test_two_colours_or_a_third_corner_break_a_corner_task() -> None:
    images, labels = draw_test_images(16)
    corners = (labels == 5) | (labels == 6)
    other = images[corners].clone()
    other[:, :, 8:] = other[:, :, 8:].roll(1, dims=1)  # yellow -> cyan -> magenta in the lower half
    assert not solves_task(other, labels[corners]).any()
    third = torch.maximum(images[corners], images[corners].flip(3))
    assert not solves_task(third, labels[corners]).any()


def test_images_depend_only_on_the_seed_and_their_index() -> None:
    images, labels = draw_test_images(16, 40)
    few = torch.tensor([31, 3])
    assert torch.equal(draw(few, labels[few], 16, rng.key("test")), images[few])
    train, held_out = shapes(ShapesConfig(count=200, held_out=50))
    assert train.images.shape == (200, 3, 16, 16) and train.class_names == CLASSES
    assert train.labels.bincount().tolist() == [20] * 10
    assert len(torch.cat([train.images, held_out.images]).flatten(1).unique(dim=0)) == 250
    assert not torch.equal(shapes(ShapesConfig(count=200, held_out=50, seed=1))[0].images, train.images)


def test_solved_tasks_are_counted_by_ability() -> None:
    images, labels = draw_test_images(16, 100)
    images[labels == 7] = 0
    metric = SolvedTasks(Rule(solves_task, ABILITIES), 100)
    for part in torch.arange(100).split(33):
        metric.update(images[part], labels[part])
    assert {k: float(v) for k, v in metric.compute().items()} == pytest.approx(
        {"solved": 0.9, "solved_texture": 1, "solved_symmetry": 1, "solved_corners": 1, "solved_count": 2 / 3}
    )


def test_an_unsupported_image_size_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"data\.image_size: must be 16 or 32, got 24"):
        load("experiments/shapes/dit.yaml", ["data.image_size=24"])
