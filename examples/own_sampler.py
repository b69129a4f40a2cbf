"""Your own sampler on a trained run: python examples/own_sampler.py RUN [STEPS].

Second-order Adams-Bashforth in the ODE's own variable: as many network evaluations as Euler, with less error.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from diffbench import load
from diffbench.core.pixels import to_uint8
from diffbench.diffusion import Grid, Predict, Prediction, euler, predictor
from diffbench.sampling.images import grid as tiles
from diffbench.sampling.images import save_image


def adams_bashforth(predict: Predict, x: Tensor, grid: Grid) -> Tensor:
    """Integrate from noise x (B, C, H, W) at the grid's first point to an image at its last."""
    before: Tensor | None = None
    for i in range(len(grid)):
        here, step = grid[i], float(grid[i + 1].s - grid[i].s)
        rate = here.rate(predict(x, here.time.expand(len(x))))
        if before is None:
            x = x + step * rate
        else:
            ratio = step / float(here.s - grid[i - 1].s)
            x = x + step * (rate + 0.5 * ratio * (rate - before))
        before = rate
    return x


run = load(sys.argv[1] if len(sys.argv) > 1 else sys.exit(__doc__))
steps, labels = int(sys.argv[2]) if sys.argv[2:] else 10, torch.arange(10)
network, noise = predictor(run.process, run.denoiser), torch.randn(10, *run.shape)


def predict(x: Tensor, t: Tensor) -> Prediction:
    return network(x, t, labels)


with torch.no_grad():
    grids = [run.process.grid(n) for n in (250, steps)]
    best, plain = (euler(predict, grid.start(noise), grid, lambda step: noise) for grid in grids)
    own = adams_bashforth(predict, grids[1].start(noise), grids[1])
print(f"distance to 250 steps of Euler: Euler {(plain - best).norm():.2f}, own {(own - best).norm():.2f}")
save_image(tiles(to_uint8(torch.cat([best, plain, own])), 10, scale=4), Path("own.png"))
