"""`diffbench sample`: draw samples of a run, into a grid, and how they come about."""

import argparse
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from diffbench.commands.compare import asked_for
from diffbench.config.layers import COMMAND_LINE, located, parse_overrides, refuse_others
from diffbench.config.load import change
from diffbench.runs.folder import short
from diffbench.runs.lifecycle import load
from diffbench.sampling.images import FORMATS, Trajectory, class_columns, new_files, save_grid, save_image, save_npz


@dataclass
class DrawConfig:
    """The arguments of `sample`; the keys of the sample section are allowed too."""

    n: int | None = None
    """Number of samples; null draws one for each label, or 16."""
    labels: str | list[str] | None = None
    """A class, by name or number, or a list with one for each sample; null takes the classes in turn."""
    seed: int = 0
    """Sample i's noise follows from (seed, i)."""
    out: str | None = None
    """File of the grid: .png, .jpg, .webp or .gif; or .npz with the samples as arr_0 and their labels as arr_1."""
    ema: float | None = None
    """Decay of the average to sample; null takes the first."""
    strip: bool = False
    """Also draw how the first four come about, x_t and the predicted image along the steps, as NAME.strip.png."""
    gif: bool = False
    """The same as an animation, NAME.steps.gif."""
    raw: bool = False
    """Leave out the autoencoder, and write what the network denoises; needs out=NAME.npz."""


def run(arguments: argparse.Namespace) -> None:
    """Draw samples of `arguments.run`, and print the files."""
    for line in draw(Path(arguments.run), arguments.overrides):
        print(line)


def draw(folder: Path, overrides: Sequence[str]) -> Iterator[str]:
    """Draw samples of a run as key=value arguments ask; yields the files as they are written, and named classes.

    Raises:
        UserError: naming the key that is wrong, or the file that is there already.
    """
    run = load(folder)
    values = parse_overrides(overrides)
    section = values.pop("sample", {})  # steps=50 and sample.steps=50 are the same
    values |= section if isinstance(section, dict) else {"sample": section}
    refuse_others(values, *vars(DrawConfig()), *vars(run.config.sample))
    asked = asked_for(DrawConfig, {k: v for k, v in values.items() if k in vars(DrawConfig())})
    if asked.ema is not None:
        run.use_average(asked.ema)
    settings = change(run.config, {"sample": {k: v for k, v in values.items() if k not in vars(asked)}}).sample
    with located([(COMMAND_LINE, values)]):
        labels = run.labels_for(asked.n, asked.labels)
        if asked.raw and run.config.autoencoder is None and not run.raw:
            raise ValueError("raw: this network denoises images; leave it at false")
        raw = asked.raw or run.raw
        if raw and (asked.strip or asked.gif or Path(asked.out or "").suffix.lower() != ".npz"):
            key = "strip" if asked.strip else "gif" if asked.gif else "out"
            shape = "x".join(map(str, run.shape))
            raise ValueError(f"{key}: {shape} raw values are not an image; give out=NAME.npz alone")
        words = [f"{run.images_seen:09d}", *(word for word in overrides if not word.startswith("out="))]
        name = short(re.sub(r"[^\w.,=\[\]-]", "_", "-".join(["sample", *words])))
        endings = [ending for ending, asks in ((".strip.png", asked.strip), (".steps.gif", asked.gif)) if asks]
        default, formats = run.folder / "samples" / f"{name}.png", [*FORMATS, ".npz"]
        new_files(asked.out, default, endings, formats)  # refused before anything is drawn
        run.use_device()
        sampler = run.sampler(settings, raw)
        trajectory = Trajectory(sampler.images) if endings else None
        samples = sampler(labels, settings, seed=asked.seed, callback=trajectory)
        files = new_files(asked.out, default, endings, formats)  # another command may have written meanwhile
    names = run.label_names
    if names and names != tuple(map(str, range(run.facts.num_classes))):
        yield f"labels: {_counts(labels, names)}"
    in_turn = asked.labels is None and len(names) > 1
    columns = min(class_columns(len(names)) if in_turn else 10, len(samples))
    captions = [names[label] for label in labels] if names else None
    writers: list[Callable[[Path], None]] = [partial(save_grid, samples, columns, captions=captions)]
    if files[0].suffix.lower() == ".npz":
        writers = [partial(save_npz, samples, labels)]
    if trajectory and asked.strip:
        writers.append(lambda path: save_image(trajectory.strip(), path))
    if trajectory and asked.gif:
        writers.append(trajectory.save_gif)
    for path, write in zip(files, writers, strict=True):
        write(path)
        yield str(path)


def _counts(labels: Tensor, names: Sequence[str], most: int = 20) -> str:
    """Classes with how many samples each has, as "cat 4, dog 3"."""
    counts = Counter(labels.tolist())
    shown = [f"{names[label]} {count}" for label, count in sorted(counts.items())[:most]]
    return ", ".join(shown + ([f"and {len(counts) - most} more classes"] if len(counts) > most else []))
