"""Samples of a run as pictures: what `diffbench sample` takes and writes."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from diffbench.config.layers import COMMAND_LINE, located, parse_overrides
from diffbench.config.load import build, change
from diffbench.core.errors import UserError, suggest
from diffbench.runs.lifecycle import load


@dataclass
class DrawConfig:
    """What `sample` takes besides the keys of the sample section."""

    n: int | None = None
    labels: int | list[int] | None = None
    seed: int = 0
    out: str | None = None
    ema: float | None = None
    strip: bool = False
    """Besides, how the first four come about: x_t and the predicted image along the steps, as a PNG."""
    gif: bool = False
    """The same as an animation."""
    raw: bool = False
    """What the network denoises as it is, without the autoencoder; needs out=NAME.npz."""


def run(arguments: argparse.Namespace) -> None:
    """Draws samples of `arguments.run`."""
    for path in draw(Path(arguments.run), arguments.overrides):
        print(path)


def draw(folder: Path, overrides: Sequence[str]) -> Iterator[Path]:
    """Draws samples of a run as key=value arguments ask; yields the files as they are written.

    Raises:
        UserError: naming the key that is wrong, or the file that is there already.
    """
    run = load(folder)
    values = parse_overrides(overrides)
    section = values.pop("sample", {})  # steps=50 and sample.steps=50 are the same
    values |= section if isinstance(section, dict) else {"sample": section}
    known = [*(f.name for f in fields(DrawConfig)), *vars(run.config.sample)]
    for key in values:
        if key not in known:
            raise UserError(f"{COMMAND_LINE}: {key}: unknown key; allowed: {', '.join(known)}{suggest(key, known)}")
    with located([(COMMAND_LINE, values)]):
        asked = build(DrawConfig, {k: v for k, v in values.items() if k in vars(DrawConfig())})
    if asked.ema is not None:
        run.use_average(asked.ema)
    changes = {k: v for k, v in values.items() if k not in vars(asked)}
    change(run.config, {"sample": changes})
    words = [f"{run.images_seen:09d}", *(a.replace("/", "_") for a in overrides if not a.startswith("out="))]
    path = Path(asked.out or run.folder / "samples" / f"{'-'.join(['sample', *words])[:200]}.png")
    if asked.out and path.exists():
        raise UserError(f"{COMMAND_LINE}: out: {path} exists already; choose another name")
    if asked.raw and run.config.autoencoder is None and not run.raw:
        raise UserError(f"{COMMAND_LINE}: raw: this network denoises pictures; leave it at false")
    if asked.raw:
        run.config = replace(run.config, autoencoder=None)
    if run.raw and path.suffix != ".npz":
        raise UserError(
            f"{COMMAND_LINE}: out: {run.shape[0]} channels make no picture; give out=NAME.npz for their raw values"
        )
    if run.raw and (asked.strip or asked.gif):
        raise UserError(f"{COMMAND_LINE}: {'strip' if asked.strip else 'gif'}: {run.shape[0]} channels make no picture")
    from diffbench.sampling.images import save_grid, save_npz, save_png
    from diffbench.sampling.trajectory import Trajectory

    steps = Trajectory(run.sampler(run.config.sample.unguided()).images)
    with located([(COMMAND_LINE, values)]):
        images = run.sample_tensor(
            asked.n, asked.labels, seed=asked.seed, callback=steps if asked.strip or asked.gif else None, **changes
        )
    if path.suffix == ".npz":
        save_npz(images, path)
    else:
        save_grid(images, columns=min(10, len(images)), path=path)
    yield path
    if asked.strip:
        save_png(steps.strip(), path.with_suffix(".strip.png"))
        yield path.with_suffix(".strip.png")
    if asked.gif:
        steps.save_gif(path.with_suffix(".gif"))
        yield path.with_suffix(".gif")
