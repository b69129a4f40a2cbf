"""Non-leaking augmentation (Karras et al. 2022, appendix F.2): a label tells the network how an image was changed.

Sampling with the label of an unchanged image yields unaugmented images.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from diffbench.core import rng

SCALE_STD, STRETCH_STD, SHIFT_STD = 0.2, 0.2, 0.125
"""Standard deviations: scale and stretch in octaves, shift as a fraction of the image size."""


def augment(x0: Tensor, position: Tensor, seed: int, probability: float) -> tuple[Tensor, Tensor]:
    """Augment images, and return them with their augmentation labels.

    Images are mirrored with probability 1/2. With the given probability each, they are also flipped upside down (half
    of those times), scaled, rotated by any angle, stretched along any direction, and shifted.

    Args:
        x0: (B, C, H, W) images.
        position: (B,) positions of the images in the run; together with the seed they determine the augmentation.
        seed: of the run.
        probability: of each augmentation other than mirroring.

    Returns:
        The images, not resampled if they are at most flipped, and labels (B, 9) float32: mirrored, upside down, scale,
        cosine of the rotation minus one, its sine, stretch times cosine and sine of its direction, shift to the right
        and down; scale, stretch and shift in their standard deviations. All zeros means unchanged.
    """

    def uniform(what: str) -> Tensor:
        return rng.uniform(rng.key(seed, "augment", what), position)

    def normal(what: str) -> Tensor:
        return rng.normal(rng.key(seed, "augment", what), position, (1,))[:, 0].double()

    def chosen(what: str) -> Tensor:
        return (uniform(f"whether {what}") < probability).double()

    mirror = (uniform("mirror") < 0.5).double()
    flip = (uniform("flip") < 0.5).double() * chosen("flip")
    scale = normal("scale") * chosen("scale")
    angle = (2 * uniform("angle") - 1) * math.pi * chosen("angle")
    direction = (2 * uniform("direction") - 1) * math.pi
    stretch = normal("stretch") * chosen("stretch")
    shift = chosen("shift")
    right, down = normal("right") * shift, normal("down") * shift
    label = torch.stack(
        [
            mirror,
            flip,
            scale,
            angle.cos() - 1,
            angle.sin(),
            stretch * direction.cos(),
            stretch * direction.sin(),
            right,
            down,
        ],
        dim=1,
    )
    x = torch.where(mirror.bool()[:, None, None, None], x0.flip(3), x0)
    x = torch.where(flip.bool()[:, None, None, None], x.flip(2), x)
    # grid_sample needs the source of each output pixel in [-1, 1]: undo the augmentations, the last one first.
    undo = _rotation(-direction) @ _scaling(-STRETCH_STD * stretch, STRETCH_STD * stretch) @ _rotation(direction)
    undo = undo @ _rotation(-angle) @ _scaling(-SCALE_STD * scale, -SCALE_STD * scale)
    side = undo.new_tensor([x.shape[3], x.shape[2]])
    undo = undo * (side / side[:, None])  # rotate in pixels, not in units of the two sides
    offset = torch.stack([right, down], dim=1) * (2 * SHIFT_STD)
    theta = torch.cat([undo, -(undo @ offset[:, :, None])], dim=2).to(x.dtype)
    grid = affine_grid(theta, list(x.shape), align_corners=False)
    moved = grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    still = (label[:, 2:] == 0).all(1)[:, None, None, None]
    return torch.where(still, x, moved), label.float()


def _rotation(angle: Tensor) -> Tensor:
    """Return the rotation matrices (B, 2, 2) of angles (B,)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)


def _scaling(octaves_x: Tensor, octaves_y: Tensor) -> Tensor:
    """Return the scaling matrices (B, 2, 2) for octaves (B,) along x and y."""
    return torch.diag_embed(torch.stack([2**octaves_x, 2**octaves_y], -1))
