"""TensorBoard as the place of a run's numbers and images, over images seen, with charts that compare runs."""

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
"""Charts of training that lay the chosen runs over each other, in TensorBoard's custom-scalars tab."""
FINAL = ("val/bound", "train/loss")
"""Metrics of the hparams tab: their last values."""


def _line(tag: str) -> list[Any]:
    """A chart of one value, a line for each run: a margin of no width, as TensorBoard smooths all other charts."""
    return ["Margin", [tag, tag, tag]]


def show_scores(folder: Path, images: int, scores: Mapping[str, float], prefix: str = "") -> None:
    """Writes a trained run's scores to TensorBoard, at the images that its weights have seen."""
    with full_disk_reported(folder), _new_writer(folder) as writer:
        for name, value in scores.items():
            writer.add_scalar(prefix + name, value, images)


@contextlib.contextmanager
def full_disk_reported(folder: Path) -> Iterator[None]:
    """Reports a full disk in TensorBoard's writer as a UserError of one line, without the traceback of its thread."""
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
    # TensorBoard reads event files in the order of their names, which begin with the second they were made in.
    while any(f".tfevents.{int(time.time())}." in p.name for p in folder.glob("events.*")):
        time.sleep(0.05)
    return SummaryWriter(str(folder), purge_step=purge_step, flush_secs=30)


class TensorBoardLog:
    """Writes a new event file, which drops the points of earlier files past the images resumed at.

    Args:
        resumed_at: images resumed at; None for a new run.
        facts: entries of the hparams tab.
        levels: noise levels, log-SNR, that validation records; each has a chart.
        bands: metric -> its reference curves, drawn around it.
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
        watched.sort(key=lambda metric: metric.name not in FINAL)  # what every run has comes first
        better = {m.title: _line(m.name) if "/" in m.name else ["Multiline", [f"{m.name}[/@]"]] for m in watched}
        charts = {f"error of eps at log-SNR {level:g}": _line(f"val/level/{level:g}") for level in levels}
        where = {"Where it is better, from noise (low log-SNR) to image": charts} if charts else {}
        margins = {name: ["Margin", [name, f"band/{name}/low", f"band/{name}/high"]] for name in bands}
        healthy = {"Does it go as healthy runs did": margins} if margins else {}
        self._writer.add_custom_scalars({"Which backbone is better": better, **where, **LAYOUT, **healthy})
        for summary in hparams(dict(facts), dict.fromkeys(FINAL, 0.0)):  # add_hparams would make a run of its own
            self._writer._get_file_writer().add_summary(summary)

    def record(self, values: Mapping[str, float], images: int) -> None:
        """Log values at an image count, with their reference curves there."""
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
        with contextlib.suppress(OSError):  # a full disk was reported when it was found
            self._writer.close()
