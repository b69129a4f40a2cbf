"""TensorBoard logging of a run's numbers and images over images seen, with charts that compare runs."""

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from diffbench.core.files import FULL, room_for
from diffbench.evaluation.curves import Band
from diffbench.metrics import registry

LAYOUT = {
    "How it trains": {
        "training loss": ["Multiline", ["train/loss"]],
        "gradient norm": ["Multiline", ["train/grad_norm"]],
        "skipped steps": ["Multiline", ["train/skipped_steps"]],
        "images/s": ["Multiline", ["perf/images_per_s"]],
    },
}
"""Training charts in TensorBoard's custom-scalars tab, which overlay the selected runs."""
FINAL = ("val/bound", "train/loss")
"""Metrics whose last values the hparams tab shows."""


def _line(tag: str) -> list[Any]:
    """Return a chart of one value with a line per run: a zero-width margin, as TensorBoard smooths all other charts."""
    return ["Margin", [tag, tag, tag]]


def show_scores(folder: Path, images: int, scores: Mapping[str, float], prefix: str = "") -> None:
    """Write a trained run's scores to TensorBoard, at the number of images that its weights have seen."""
    with full_disk_reported(folder), _new_writer(folder) as writer:
        for name, value in scores.items():
            writer.add_scalar(prefix + name, value, images)


@contextlib.contextmanager
def full_disk_reported(folder: Path) -> Iterator[None]:
    """Report a full disk in TensorBoard's writer as a one-line UserError, without the traceback of its thread."""
    before = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        if not (isinstance(failed.exc_value, OSError) and failed.exc_value.errno in FULL):
            before(failed)

    threading.excepthook = hook
    try:
        with room_for(folder / "events.out.tfevents"):
            yield
    finally:
        threading.excepthook = before


def _new_writer(folder: Path, purge_step: int | None = None) -> SummaryWriter:
    # TensorBoard reads event files in the order of their names, which begin with the second of their creation.
    while any(f".tfevents.{int(time.time())}." in p.name for p in folder.glob("events.*")):
        time.sleep(0.05)
    return SummaryWriter(str(folder), purge_step=purge_step, flush_secs=30)


class TensorBoardLog:
    """A TensorBoard writer with a new event file, which overrides points of earlier files past `resumed_at`.

    Args:
        resumed_at: images seen at the checkpoint resumed from; None for a new run.
        facts: entries of the hparams tab.
        levels: noise levels (log-SNR) that validation records; each gets a chart.
        bands: metric -> band of its reference curves, drawn around it.
    """

    def __init__(
        self,
        folder: Path,
        resumed_at: int | None,
        config_text: str,
        facts: Mapping[str, str | float],
        levels: Sequence[float],
        bands: Mapping[str, Band],
    ) -> None:
        self._bands = bands
        self._writer = _new_writer(folder, purge_step=0 if resumed_at is None else resumed_at + 1)
        if resumed_at is not None:
            return
        self._writer.add_text("config", f"```yaml\n{config_text}\n```", 0)
        watched = [metric for metric in registry.METRICS.values() if metric.watched]
        watched.sort(key=lambda metric: metric.name not in FINAL)  # metrics that every run has come first
        better = {m.title: _line(m.name) if "/" in m.name else ["Multiline", [f"{m.name}[/@]"]] for m in watched}
        charts = {f"error of eps at log-SNR {level:g}": _line(f"val/level/{level:g}") for level in levels}
        where = {"Where it is better, from noise (low log-SNR) to image": charts} if charts else {}
        margins = {name: ["Margin", [name, f"band/{name}/low", f"band/{name}/high"]] for name in bands}
        healthy = {"Does it train like healthy runs": margins} if margins else {}
        self._writer.add_custom_scalars({"Which backbone is better": better, **where, **LAYOUT, **healthy})
        for summary in hparams(dict(facts), dict.fromkeys(FINAL, 0.0)):  # add_hparams would create a separate run
            self._writer._get_file_writer().add_summary(summary)

    def record(self, values: Mapping[str, float], images: int) -> None:
        """Log values at an image count, with the ends of their reference bands there."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, images)
            ends = self._bands[tag].at(images) if tag in self._bands else None
            for end, at in zip(("low", "high"), ends or (), strict=False):
                self._writer.add_scalar(f"band/{tag}/{end}", at, images)

    def show_image(self, tag: str, image: np.ndarray, images: int) -> None:
        self._writer.add_image(tag, image, images, dataformats="HWC")

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk has been reported already
            self._writer.close()
