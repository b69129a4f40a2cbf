"""One row per metric: how it is computed, and how tables, conclusions, plots and TensorBoard present it."""

from dataclasses import dataclass
from typing import Any, Literal

from diffbench.metrics.base import SampleMetric
from diffbench.metrics.classification import InceptionScore, LabelAccuracy, SolvedTasks
from diffbench.metrics.extractors.base import Extractor
from diffbench.metrics.frechet import FrechetDistance, FrechetInfinity, SpatialFrechetDistance
from diffbench.metrics.kernel import KernelDistance
from diffbench.metrics.memorisation import Memorisation
from diffbench.metrics.neighbours import DensityCoverage, PrecisionRecall

_DISTANCES = (
    "Fréchet and kernel distances compare the features of generated and real images. They depend on the number of"
    " samples and on the extractor, both of which stand in their names; what as many real images score is the floor."
)
_BOUND = (
    "The bound is the diffusion loss of the variational bound on -log p(x) over the validation's noise levels: half the"
    " integral over log-SNR of the squared error of the noise, in nats per dimension, which no schedule changes (Kingma"
    " et al. 2021; Kingma & Gao 2023). What held-out images score above training images is overfitting."
)
_TASKS: dict[str, Any] = {
    "percent": True,
    "of_pixels": True,
    "note": "Tasks are solved where a rule finds in the sample what its label asks for; no network decides.",
}
_COPIES: dict[str, Any] = {
    "percent": True,
    "of_pixels": True,
    "note": "A copy is nearer to a training image than others there, by a threshold that flags 0.5% of training images"
    " left out in turn. The share of copies is corrected for the held-out images that it flags, and has an exact"
    " binomial interval. Copies of an image that the training set holds many times count as new. Authentic samples are"
    " farther from their nearest training image than that is from another one (Alaa et al. 2022).",
}
_SHARES = "Precision tells how real samples look, recall and coverage how much of the real variety they reach."

_PLANTED = (
    "A planted class has the images of others; its explanation, a mixture of label embeddings, should put these first"
    " and give them all of the coefficients."
)


@dataclass(frozen=True)
class Metric:
    """A metric as tables, reports and TensorBoard see it.

    Attributes:
        name: name under which values are recorded, without extractor and count: "fd" of "fd/digits-cnn@500".
        title: the name in words.
        unit: unit of the values; empty for a plain number.
        direction: which values are better; None for a metric that ranks nothing.
        shown: whether tables have a row or column for it; records contain every metric.
        percent: whether a value in 0 to 1 is written as a percentage.
        digits: decimals if no uncertainty is known.
        measure: the class that computes the metric from samples; several rows may share one.
        computed: the name that the class gives the value, if the published Inception protocol renames it.
        in_training: whether it is also computed in training, with the distances.
        of_pixels: whether it needs no extractor, so that its full name is like "copies@500".
        watched: whether a conclusion mentions that this metric contradicts the primary one.
        swept: whether plots over a sampling key draw it.
        tie: relative gap below which two values count as a tie, since retraining changes them by as much.
        listed: whether a list of runs shows it as the score of a run.
        floor: whether tables also show the value of an equal number of real images.
        note: its text in the report's glossary.
    """

    name: str
    title: str
    direction: Literal["lower", "higher"] | None = "lower"
    shown: bool = True
    percent: bool = False
    digits: int = 3
    measure: type[SampleMetric] | None = None
    computed: str = ""
    in_training: bool = False
    of_pixels: bool = False
    watched: bool = False
    swept: bool = False
    tie: float = 0.0
    listed: bool = False
    floor: bool = False
    unit: str = ""
    note: str = ""

    @property
    def lower_is_better(self) -> bool:
        """Whether lower values are better; also true for a metric that ranks nothing."""
        return self.direction != "higher"

    @property
    def is_validation(self) -> bool:
        """Whether the metric is logged by training rather than measured on samples."""
        return self.name.startswith(("val/", "train/"))

    def better(self) -> str:
        """Return "lower is better" or "higher is better"; an empty string for a metric that ranks nothing."""
        return f"{self.direction} is better" if self.direction else ""

    def text(self, value: float) -> str:
        """Format a value as in tables: 93.1% or 12.345."""
        return f"{100 * value:.1f}%" if self.percent else f"{value:.{self.digits}f}"


_FRECHET: dict[str, Any] = {"tie": 0.013, "note": _DISTANCES}
_MAIN: dict[str, Any] = {
    "measure": FrechetDistance,
    **dict.fromkeys(("in_training", "watched", "swept", "listed", "floor"), True),
}

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("val/bound", "validation bound", unit="nats/dim", digits=4, watched=True, note=_BOUND),
        Metric("train/bound", "bound on training images", None, unit="nats/dim", digits=4, note=_BOUND),
        Metric("fd", "Fréchet distance", **_MAIN, **_FRECHET),
        Metric("fid", "FID", computed="fd", **_MAIN, **_FRECHET),
        Metric("fd_spatial", "spatial Fréchet distance", measure=SpatialFrechetDistance, **_FRECHET),
        Metric("sfid", "spatial FID", computed="fd_spatial", measure=SpatialFrechetDistance, **_FRECHET),
        Metric("fd_held_out", "Fréchet distance to held-out images", **_FRECHET),
        Metric("fid_held_out", "FID to held-out images", computed="fd_held_out", **_FRECHET),
        Metric("fd_gap", "gap of the Fréchet distances to held-out and training images", None, **_FRECHET),
        Metric("fid_gap", "gap of the FIDs to held-out and training images", None, computed="fd_gap", **_FRECHET),
        Metric("fd_infinity", "Fréchet distance at infinitely many samples", measure=FrechetInfinity, **_FRECHET),
        Metric(
            "fid_infinity",
            "FID at infinitely many samples",
            computed="fd_infinity",
            measure=FrechetInfinity,
            **_FRECHET,
        ),
        Metric(
            "label_accuracy", "label accuracy", "higher", percent=True, measure=LabelAccuracy, watched=True, swept=True
        ),
        Metric(
            "solved",
            "tasks solved",
            "higher",
            measure=SolvedTasks,
            in_training=True,
            watched=True,
            swept=True,
            listed=True,
            **_TASKS,
        ),
        Metric("solved_texture", "tasks solved, local texture", "higher", **_TASKS),
        Metric("solved_symmetry", "tasks solved, symmetry of the image", "higher", **_TASKS),
        Metric("solved_corners", "tasks solved, far corners agree", "higher", **_TASKS),
        Metric("solved_count", "tasks solved, number of objects", "higher", **_TASKS),
        Metric(
            "kid",
            "kernel distance (KID)",
            measure=KernelDistance,
            in_training=True,
            watched=True,
            floor=True,
            note=_DISTANCES,
        ),
        Metric("kid_sd", "spread of the kernel distance over subsets", None, shown=False),
        Metric("inception_score", "Inception score", "higher", shown=False, measure=InceptionScore),
        Metric("precision", "precision", "higher", measure=PrecisionRecall, note=_SHARES),
        Metric("recall", "recall", "higher", measure=PrecisionRecall, swept=True, note=_SHARES),
        Metric("density", "density", "higher", shown=False, measure=DensityCoverage),  # rises for bad samples
        Metric("coverage", "coverage", "higher", measure=DensityCoverage, watched=True, swept=True, note=_SHARES),
        Metric("copies", "copies of training images", None, measure=Memorisation, **_COPIES),
        Metric("copies_low", "copies of training images, at least", None, shown=False, **_COPIES),
        Metric("copies_high", "copies of training images, at most", None, shown=False, **_COPIES),
        Metric("authenticity", "authentic samples", None, floor=True, **_COPIES),
        Metric(
            "planted_found",
            "planted classes whose parts come first",
            "higher",
            percent=True,
            of_pixels=True,
            note=_PLANTED,
        ),
        Metric("planted_share", "coefficients on planted parts", "higher", percent=True, of_pixels=True, note=_PLANTED),
        Metric("reconstruction_fd", "Fréchet distance of reconstructions", **_FRECHET),
        Metric("psnr", "PSNR of reconstructions", "higher", digits=2, of_pixels=True, listed=True),
        Metric("ssim", "SSIM of reconstructions", "higher", digits=4, of_pixels=True),
    )
}
"""Name without extractor and count -> row, in table order."""
RANKING = [name for name, metric in METRICS.items() if metric.direction]
"""Names of the metrics that can rank variants."""


def metric_of(name: str) -> Metric:
    """Return the row of a metric by its full or short name: "fd/digits-cnn@500", "psnr@200", "val/bound".

    An unknown name gets a new row that is not shown and ranks nothing.
    """
    short = name if name.startswith(("val/", "train/")) else name.split("/")[0].split("@")[0]
    return METRICS.get(short) or Metric(short, short.replace("_", " "), None, shown=False)


def metric_name(computed: str, extractor: Extractor | None, count: int) -> str:
    """Return the full name under which a value is recorded: metric/extractor@count, or metric@count without extractor.

    Only distances of the published Inception protocol may be called FID.
    """
    if extractor is None or metric_of(computed).of_pixels:
        return f"{computed}@{count}"
    if extractor.published:
        computed = next((m.name for m in METRICS.values() if m.computed == computed), computed)
    return f"{computed}/{extractor.name}@{count}"
