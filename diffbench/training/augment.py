"""Non-leaking augmentation (Karras et al. 2022, appendix F.2): images are changed, and the network is told how.

Sampling with the label of an unchanged image yields unaugmented images.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from diffbench.core import rng

SCALE_STD, STRETCH_STD, SHIFT_STD = 0.2, 0.2, 0.125
"""Standard deviations: of the two scalings in octaves, of the shift in images."""


def augment(x0: Tensor, position: Tensor, seed: int, probability: float) -> tuple[Tensor, Tensor]:
    """Changed images and their labels.

    A mirror image half the time; and each with the given probability: upside down (half of those times), a scaling, a
    rotation by any angle, a stretch along any direction, a shift.

    Args:
        x0: (B, C, H, W) images.
        position: (B,) of the samples in the run; with the seed they fix what is done.
        seed: of the run.
        probability: of each change but the mirror's.

    Returns:
        The images, those that no geometric change befell but flips bit for bit, and labels (B, 9) float32: mirrored,
        upside down, octaves of scale, cosine of the rotation less one, its sine, octaves of stretch times cosine and
        sine of its direction, shift to the right and down in images. All zero means untouched.
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
    # Where in x each pixel of the result comes from: the changes undone, the last one first. Sides run from -1 to 1.
    undo = _rotation(-direction) @ _scaling(-STRETCH_STD * stretch, STRETCH_STD * stretch) @ _rotation(direction)
    undo = undo @ _rotation(-angle) @ _scaling(-SCALE_STD * scale, -SCALE_STD * scale)
    side = undo.new_tensor([x.shape[3], x.shape[2]])
    undo = undo * (side / side[:, None])  # turned in pixels, not in shares of the sides
    offset = torch.stack([right, down], dim=1) * (2 * SHIFT_STD)
    theta = torch.cat([undo, -(undo @ offset[:, :, None])], dim=2).to(x.dtype)
    grid = affine_grid(theta, list(x.shape), align_corners=False)
    moved = grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    still = (label[:, 2:] == 0).all(1)[:, None, None, None]
    return torch.where(still, x, moved), label.float()


def _rotation(angle: Tensor) -> Tensor:
    """Angles (B,) to matrices (B, 2, 2)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)


def _scaling(octaves_x: Tensor, octaves_y: Tensor) -> Tensor:
    """Octaves (B,) to matrices (B, 2, 2)."""
    return torch.diag_embed(torch.stack([2**octaves_x, 2**octaves_y], -1))
