"""`diffbench sample`: draw samples from a run, as a grid, and optionally their steps."""

import argparse
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from diffbench.commands.arguments import build_keys
from diffbench.config.layers import COMMAND_LINE, located, parse_overrides, refuse_unknown
from diffbench.config.load import change
from diffbench.runs.folder import short
from diffbench.runs.lifecycle import load
from diffbench.sampling.images import FORMATS, Trajectory, class_columns, new_files, save_grid, save_image, save_npz


@dataclass
class DrawConfig:
    """Keys of `diffbench sample`, in addition to those of the section `sample`."""

    n: int | None = None
    """Number of samples; null: one for each of `labels`, else 16."""
    labels: str | list[str] | None = None
    """A class, by name or number, or a list with one for each sample; null: all classes in turn."""
    seed: int = 0
    """Seed of the noise; the noise of sample i depends only on (seed, i)."""
    out: str | None = None
    """File of the grid: .png, .jpg, .webp or .gif; or .npz with the samples as arr_0 and their labels as arr_1."""
    ema: float | None = None
    """Decay of the weight average to sample from; null: the first."""
    strip: bool = False
    """Also draw x_t and the predicted image of the first four samples over the steps, as NAME.strip.png."""
    gif: bool = False
    """Also draw these steps as an animation, NAME.steps.gif."""
    raw: bool = False
    """Skip the autoencoder and write the denoised latents; needs out=NAME.npz."""


def run(arguments: argparse.Namespace) -> None:
    """Draw samples from `arguments.run`, and print the files written."""
    for line in draw(Path(arguments.run), arguments.overrides):
        print(line)


def draw(folder: Path, overrides: Sequence[str]) -> Iterator[str]:
    """Draw samples from a run with key=value settings; yield the classes, if they have names, then each file written.

    Raises:
        UserError: if a key is wrong, or a file already exists.
    """
    run = load(folder)
    values = parse_overrides(overrides)
    section = values.pop("sample", {})  # steps=50 and sample.steps=50 mean the same
    values |= section if isinstance(section, dict) else {"sample": section}
    refuse_unknown(values, *vars(DrawConfig()), *vars(run.config.sample))
    config = build_keys(DrawConfig, {k: v for k, v in values.items() if k in vars(DrawConfig())})
    if config.ema is not None:
        run.use_average(config.ema)
    settings = change(run.config, {"sample": {k: v for k, v in values.items() if k not in vars(config)}}).sample
    with located([(COMMAND_LINE, values)]):
        labels = run.labels_for(config.n, config.labels)
        if config.raw and run.config.autoencoder is None and not run.raw:
            raise ValueError("raw: this network denoises images; leave it at false")
        raw = config.raw or run.raw
        if raw and (config.strip or config.gif or Path(config.out or "").suffix.lower() != ".npz"):
            key = "strip" if config.strip else "gif" if config.gif else "out"
            shape = "x".join(map(str, run.shape))
            raise ValueError(f"{key}: {shape} raw values are not an image; set only out=NAME.npz")
        parts = [f"{run.images_seen:09d}", *(o for o in overrides if not o.startswith("out="))]
        name = short(re.sub(r"[^\w.,=\[\]-]", "_", "-".join(["sample", *parts])))
        endings = [ending for ending, wanted in ((".strip.png", config.strip), (".steps.gif", config.gif)) if wanted]
        default, formats = run.folder / "samples" / f"{name}.png", [*FORMATS, ".npz"]
        new_files(config.out, default, endings, formats)  # raises before anything is drawn
        run.use_device()
        sampler = run.sampler(settings, raw)
        trajectory = Trajectory(sampler.images) if endings else None
        samples = sampler(labels, settings, seed=config.seed, callback=trajectory)
        files = new_files(config.out, default, endings, formats)  # another command may have written them meanwhile
    names = run.label_names
    if names and names != tuple(map(str, range(run.facts.num_classes))):
        yield f"labels: {_counts(labels, names)}"
    all_classes = config.labels is None and len(names) > 1
    columns = min(class_columns(len(names)) if all_classes else 10, len(samples))
    captions = [names[label] for label in labels] if names else None
    writers: list[Callable[[Path], None]] = [partial(save_grid, samples, columns, captions=captions)]
    if files[0].suffix.lower() == ".npz":
        writers = [partial(save_npz, samples, labels)]
    if trajectory and config.strip:
        writers.append(lambda path: save_image(trajectory.strip(), path))
    if trajectory and config.gif:
        writers.append(trajectory.save_gif)
    for path, write in zip(files, writers, strict=True):
        write(path)
        yield str(path)


def _counts(labels: Tensor, names: Sequence[str], most: int = 20) -> str:
    """Format the classes with their numbers of samples, such as "cat 4, dog 3"."""
    counts = Counter(labels.tolist())
    shown = [f"{names[label]} {count}" for label, count in sorted(counts.items())[:most]]
    return ", ".join(shown + ([f"and {len(counts) - most} more classes"] if len(counts) > most else []))
