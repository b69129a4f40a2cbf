"""Attention maps of chosen tokens over sampling time, for several runs side by side, as in Fig. 2 of DiffiT."""

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
    """Names of attention layers; null: the first, the middle and the last of each run."""
    tokens: list[list[int]] | None = None
    """Pixels [row, column] whose tokens are shown (positions in the latent for latent runs); null: the centre."""
    times: int | list[float] = 8
    """Log-SNRs to show, or how many to space evenly over the range that all runs sample."""
    image: int = 0
    """Index of the held-out image that is noised."""
    out: str | None = None
    """Output file: .png, .jpg, .webp or .gif; null: a file in the samples of the first run."""

    def __post_init__(self) -> None:
        if self.times == [] or (isinstance(self.times, int) and self.times < 1):
            raise ValueError(f"times: must be at least 1, or a list of log-SNRs, got {self.times}")
        if self.tokens is not None and not all(len(token) == 2 for token in self.tokens):
            raise ValueError(f"tokens: must be a list of pixels such as [[4, 4], [0, 7]], got {self.tokens}")
        for name in ("layers", "tokens"):
            if getattr(self, name) == []:
                raise ValueError(f"{name}: must list at least one, or be null, got []")


@dataclass(frozen=True)
class Attention:
    """Attention maps of one run at several noise levels."""

    run: DenoiserRun
    times: Tensor
    """(T,) times in the run's own process."""
    noisy: Tensor
    """(T, C, H, W) noised images, as the network receives them."""
    tokens: list[tuple[int, int]]
    """The chosen pixels, as (row, column)."""
    maps: list[AttentionMap]
    """Maps of the chosen layers; their sample dimension runs over the times."""


def attention(runs: Sequence[DenoiserRun], config: AttentionConfig) -> tuple[list[float], list[Attention]]:
    """Return the attention maps of all runs on one noised image, or on its latent.

    The image is a held-out one of each run's data, with its label, or a generated sample if the data are unavailable.
    The noise is keyed by the image's index and is the same at all levels and for all runs.

    Returns:
        The log-SNRs, noisiest first, and one `Attention` per run.

    Raises:
        ValueError: if a layer, token, time or image does not exist; the message begins with the key.
    """
    levels = noise_levels(runs, config.times)
    found = [_record(run, config, levels) for run in runs]
    names = sorted({short(layer.layer) for a in found for layer in a.maps})
    for name in config.layers or []:
        if name not in names:
            hint = suggest(name, names)
            raise ValueError(f"layers: no run has an attention layer {name}; choose from {', '.join(names)}{hint}")
    return levels, [replace(a, maps=_chosen(a.maps, config.layers)) for a in found]


def noise_levels(runs: Sequence[DenoiserRun], times: int | list[float]) -> list[float]:
    """Return log-SNRs from noise to image: the list given, or values spaced evenly over the range all runs sample."""
    if isinstance(times, list):
        return sorted(times)
    ranges = [_log_snr_range(run) for run in runs]
    low, high = max(r[0] for r in ranges), min(r[1] for r in ranges)
    return torch.linspace(low, high, times, dtype=torch.float64).tolist()


def _log_snr_range(run: DenoiserRun) -> tuple[float, float]:
    """Return the lowest and highest log-SNR of the run's sampling grid, clamped to -10..10."""
    points = run.process.grid(run.config.sample.steps).points
    log_snr = 2 * (points.alpha.log() - points.sigma.log())
    log_snr = log_snr[log_snr.isfinite()].clamp(-10, 10)
    return float(log_snr.min()), float(log_snr.max())


def _image(run: DenoiserRun, number: int) -> tuple[Tensor, Tensor]:
    """Return a held-out image (1, C, H, W) uint8 and its label (1,), or a sample if the data are unavailable."""
    try:
        held_out = run.held_out
    except OtherDataError:
        raise
    except UserError as e:
        print(f"note: {run.folder}: using a generated sample instead of a held-out image ({e})")
        label = torch.tensor([number % max(1, run.facts.num_classes)])
        return run.sampler(run.config.sample)(label, run.config.sample, first=number), label
    if not len(held_out):
        raise ValueError(f"data.name: {run.folder} has no held-out images to noise (data.name={run.config.data.name})")
    if not 0 <= number < len(held_out):
        raise ValueError(f"image: {number} is not one of the {len(held_out)} held-out images of {run.folder}")
    return held_out.images[number : number + 1], held_out.labels[number : number + 1]


@torch.no_grad()
def _record(run: DenoiserRun, config: AttentionConfig, levels: list[float]) -> Attention:
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
        raise ValueError(f"layers: {run.folder} has no self-attention over the image")
    return Attention(run, t, x.cpu(), tokens, maps)


def _chosen(maps: list[AttentionMap], layers: list[str] | None) -> list[AttentionMap]:
    if layers is not None:
        return [found for found in maps if short(found.layer) in layers]
    return [maps[i] for i in sorted({0, len(maps) // 2, len(maps) - 1})]


def short(layer: str) -> str:
    """Strip the suffixes .tmsa, .attention and .block from the name of an attention layer."""
    return layer.removesuffix(".tmsa").removesuffix(".attention").removesuffix(".block")


def attention_figure(levels: Sequence[float], found: Sequence[Attention]) -> Figure:
    """Draw a panel for each run, with a row for each layer and token and a column for each time.

    Colours show on a log scale how much more (red) or less (blue) than an even share a token attends to each position,
    averaged over heads. Positions outside its window are grey; the token itself is framed.
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
        _label_row(line[0], f"{short(found.layer)}\n{pixel}")
    _label_row(axes[0, 0], "input")
    denoiser = a.run.config.denoiser
    where = f", time in {denoiser.time_in}" if hasattr(denoiser, "time_in") else ""
    panel.suptitle(f"{a.run.folder.name} ({denoiser.name}{where})", fontsize=9)
    panel.supxlabel("log-SNR: from noise to image, as sampling goes", fontsize=8)


def _label_row(axis: Axes, text: str) -> None:
    axis.set_ylabel(text, fontsize=8, rotation=0, ha="right", va="center")


def _displayed(x: Tensor) -> np.ndarray:
    """Convert a network input (C, H, W) to (H, W, 3) in 0..1 for display; a latent shows its first three channels."""
    rgb = x[:3] if len(x) >= 3 else x[:1].expand(3, -1, -1)
    return (rearrange(rgb.float(), "c h w -> h w c") / rgb.abs().max() / 2 + 0.5).numpy()
