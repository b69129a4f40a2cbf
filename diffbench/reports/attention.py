"""Attention over time, as Fig. 2 of DiffiT: where chosen tokens look along sampling, several runs side by side."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from torch import Tensor

from diffbench.core import rng
from diffbench.core.errors import UserError, suggest
from diffbench.core.pixels import from_uint8
from diffbench.data.facts import OtherDataError
from diffbench.denoisers.attention_maps import AttentionMap, record_attention
from diffbench.reports.figures import new_figure
from diffbench.runs.denoiser import DenoiserRun


@dataclass
class AttentionConfig:
    """Keys of `diffbench attention`."""

    layers: list[str] | None = None
    """Names of layers; null: the first, the middle and the last of each run."""
    tokens: list[list[int]] | None = None
    """Pixels [row, column] whose tokens are shown, places of a latent in latent space; null: the centre."""
    times: int | list[float] = 8
    """Log-SNRs along sampling, noisiest first; or how many, evenly spread over what all runs pass through."""
    image: int = 0
    """Number of the held-out image that is noised."""
    out: str | None = None
    """The image, .png, .jpg, .webp or .gif; null: in the samples of the first run."""

    def __post_init__(self) -> None:
        if self.times == [] or (isinstance(self.times, int) and self.times < 1):
            raise ValueError(f"times: must be at least 1, or a list of log-SNRs, got {self.times}")
        if self.tokens is not None and not all(len(token) == 2 for token in self.tokens):
            raise ValueError(f"tokens: must be pixels as [[4, 4], [0, 7]], got {self.tokens}")
        for name in ("layers", "tokens"):
            if getattr(self, name) == []:
                raise ValueError(f"{name}: must hold at least one, or be null, got []")


@dataclass(frozen=True)
class Attention:
    """The attention of one run at several noise levels."""

    run: DenoiserRun
    times: Tensor
    """(T,) times of the run's process."""
    noisy: Tensor
    """(T, C, H, W), the image as the network sees it."""
    tokens: list[tuple[int, int]]
    """The chosen pixels."""
    maps: list[AttentionMap]
    """The chosen layers; samples are the times."""


def attention(runs: Sequence[DenoiserRun], config: AttentionConfig) -> tuple[list[float], list[Attention]]:
    """The attention maps of runs on one noised image, or its latent.

    The image is a held-out one of each run's data, with its label, or a sample of a run whose data are not at hand. Its
    noise is keyed by its number, the same at all levels and for all runs.

    Returns:
        The log-SNRs, noisiest first, and one `Attention` a run.

    Raises:
        ValueError: a line that begins with the key, for a layer, token, time or image that is not there.
    """
    levels = noise_levels(runs, config.times)
    found = [_of(run, config, levels) for run in runs]
    names = sorted({short(layer.layer) for a in found for layer in a.maps})
    for name in config.layers or []:
        if name not in names:
            near = suggest(name, names)
            raise ValueError(f"layers: {name} attends in no run; choose from {', '.join(names)}{near}")
    return levels, [replace(a, maps=_chosen(a.maps, config.layers)) for a in found]


def noise_levels(runs: Sequence[DenoiserRun], times: int | list[float]) -> list[float]:
    """Log-SNRs from noise to image: those given, or so many evenly spread in -10..10 where all runs pass through."""
    if isinstance(times, list):
        return sorted(times)
    reached = [_reached(run) for run in runs]
    low, high = max(r[0] for r in reached), min(r[1] for r in reached)
    return torch.linspace(low, high, times, dtype=torch.float64).tolist()


def _reached(run: DenoiserRun) -> tuple[float, float]:
    points = run.process.grid(run.config.sample.steps).points
    log_snr = 2 * (points.alpha.log() - points.sigma.log())
    log_snr = log_snr[log_snr.isfinite()].clamp(-10, 10)
    return float(log_snr.min()), float(log_snr.max())


def _image(run: DenoiserRun, number: int) -> tuple[Tensor, Tensor]:
    """A held-out image (1, C, H, W) uint8 and its label (1,); a sample of the run where its images are not at hand."""
    try:
        held_out = run.held_out
    except OtherDataError:
        raise
    except UserError as e:
        print(f"note: {run.folder}: a sample stands in for a held-out image ({e})")
        label = torch.tensor([number % max(1, run.facts.num_classes)])
        return run.sampler(run.config.sample)(label, run.config.sample, first=number), label
    if not len(held_out):
        raise ValueError(f"data.name: {run.folder} has no images (data.name={run.config.data.name}) to be noised")
    if not 0 <= number < len(held_out):
        raise ValueError(f"image: {number} is not one of the {len(held_out)} held-out images of {run.folder}")
    return held_out.images[number : number + 1], held_out.labels[number : number + 1]


@torch.no_grad()
def _of(run: DenoiserRun, config: AttentionConfig, levels: list[float]) -> Attention:
    image, label = _image(run, config.image)
    parameter = next(run.network.parameters())
    try:
        t = run.process.time_at(torch.tensor(levels, dtype=torch.float64))
    except ValueError as e:
        raise ValueError(f"times: {e}") from None
    index, x0 = torch.tensor([config.image]), from_uint8(image)
    if run.autoencoder is not None:
        x0 = run.autoencoder.scaled(run.autoencoder.encode(x0)[0])
    eps = rng.normal(rng.key("attention"), index, tuple(x0.shape[1:]))
    x0, eps = (v.to(parameter).expand(len(t), -1, -1, -1) for v in (x0, eps))
    label = label.to(parameter.device).expand(len(t))
    x, time = run.process.inputs(run.process.add_noise(x0, t, eps), t.to(parameter.device))
    height, width = x0.shape[2:]
    tokens = [(row, column) for row, column in config.tokens or [[height // 2, width // 2]]]
    with record_attention(run.network, tokens) as maps:
        out = run.network(x, time, label)
    if not bool(out.isfinite().all()):
        raise UserError(f"{run.folder}: the network's output is not finite")
    if not maps:
        raise ValueError(f"layers: {run.folder} has no layer in which the image attends to itself")
    return Attention(run, t, x.cpu(), tokens, maps)


def _chosen(maps: list[AttentionMap], layers: list[str] | None) -> list[AttentionMap]:
    if layers is not None:
        return [found for found in maps if short(found.layer) in layers]
    return [maps[i] for i in sorted({0, len(maps) // 2, len(maps) - 1})]


def short(layer: str) -> str:
    """The name of an attention layer without what all have at the end."""
    return layer.removesuffix(".tmsa").removesuffix(".attention").removesuffix(".block")


def attention_figure(levels: Sequence[float], found: Sequence[Attention]) -> Figure:
    """A panel a run, a row for each layer and token, a column for each time.

    Colours show how much more (red) or less (blue) than evenly a token looks at a place, heads averaged, on a
    logarithmic scale; places outside its window are grey, the token itself is framed.
    """
    columns = min(2, len(found))
    rows = -(-len(found) // columns)
    lines = max(sum(len(m.places) for m in a.maps) for a in found) + 1
    width, height = columns * (0.72 * len(levels) + 1.0), max(3.6, rows * (0.75 * lines + 0.7))
    figure = new_figure(width + 1.0, height)
    halves = figure.add_gridspec(1, 2, width_ratios=[width, 1.0])
    panels = figure.add_subfigure(halves[0]).subfigures(rows, columns, squeeze=False).flatten()
    colours = ScalarMappable(Normalize(-3, 3), "RdBu_r")
    for panel, a in zip(panels, found, strict=False):
        _panel(panel, levels, a, colours)
    bar = figure.colorbar(colours, cax=figure.add_subfigure(halves[1]).add_axes((0.1, 0.15, 0.12, 0.7)))
    bar.set_ticks([-3, -2, -1, 0, 1, 2, 3], labels=["1/8", "1/4", "1/2", "even", "2x", "4x", "8x"], fontsize=8)
    bar.set_label("attention of the framed token over an even share\n(grey: outside its window)", fontsize=8)
    return figure


def _panel(panel: SubFigure, levels: Sequence[float], a: Attention, colours: ScalarMappable) -> None:
    rows = [(found, token) for found in a.maps for token in range(len(found.places))]
    axes = panel.subplots(len(rows) + 1, len(levels), squeeze=False)
    for axis in axes.flatten():
        axis.set(xticks=[], yticks=[])
    for column, level in enumerate(levels):
        axes[0, column].imshow(_displayed(a.noisy[column]))
        axes[-1, column].set_xlabel(f"{level:.1f}", fontsize=8)
    for (found, token), line in zip(rows, axes[1:], strict=True):
        row, column = found.places[token]
        pixel = "pixel {},{}".format(*a.tokens[token])
        for weights, axis in zip(found.weights[:, :, token].mean(1), line, strict=True):
            even = weights * int(weights.isfinite().sum())
            axis.set_facecolor("0.85")
            axis.imshow(colours.to_rgba(even.log2().clamp(-3, 3).numpy()))
            axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1.5))
        _named(line[0], f"{short(found.layer)}\n{pixel}")
    _named(axes[0, 0], "input")
    denoiser = a.run.config.denoiser
    where = f", time in {denoiser.time_in}" if hasattr(denoiser, "time_in") else ""
    panel.suptitle(f"{a.run.folder.name} ({denoiser.name}{where})", fontsize=9)
    panel.supxlabel("log-SNR: from noise to image, as sampling goes", fontsize=8)


def _named(axis: Axes, text: str) -> None:
    axis.set_ylabel(text, fontsize=8, rotation=0, ha="right", va="center")


def _displayed(x: Tensor) -> np.ndarray:
    """(C, H, W) as the network sees it, to (H, W, 3) in 0..1 for display; of latents the first three channels."""
    rgb = x[:3] if len(x) >= 3 else x[:1].expand(3, -1, -1)
    return (rearrange(rgb.float(), "c h w -> h w c") / rgb.abs().max() / 2 + 0.5).numpy()
