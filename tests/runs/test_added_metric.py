"""A custom metric is a class and a row in METRICS: it is measured and shown in the table, report and TensorBoard."""

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from diffbench.cli import main
from diffbench.evaluation import records
from diffbench.metrics.base import Measurement, SampleMetric
from diffbench.metrics.registry import METRICS, Metric
from diffbench.runs.lifecycle import load


class Brightness(SampleMetric):
    """Mean of all pixels, in 0 to 255."""

    total: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_sum("total")
        self.add_sum("values")

    @classmethod
    def of(cls, measurement: Measurement) -> "Brightness":
        return cls()

    def update(self, images: Tensor) -> None:
        self.total += images.sum()
        self.values += images.numel()

    def compute(self) -> Tensor:
        return self.total / self.values


def test_a_custom_metric_needs_only_a_class_and_a_row(
    tmp_path: Path, smoke_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = Metric(
        "brightness", "mean brightness", "higher", digits=1, measure=Brightness, in_training=True, watched=True
    )
    monkeypatch.setitem(METRICS, "brightness", row)
    (smoke_run / "results.jsonl").unlink()
    assert main(["evaluate", str(smoke_run), "sample.guidance=1", "evaluate.count=20"]) == 0
    table = capsys.readouterr().out
    record, name = records.results(smoke_run)[-1], "brightness/digits-cnn@20"
    run = load(smoke_run)
    samples = run.sampler(run.config.sample.unguided())(torch.arange(20) * 10 // 20, run.config.sample.unguided())
    assert record[name] == pytest.approx(samples.double().mean().item())
    assert [line.split() for line in table.splitlines() if line.startswith(name)] == [[name, f"{record[name]:.1f}"]]

    assert EventAccumulator(str(smoke_run)).Reload().Scalars(name)[-1].value == pytest.approx(record[name])
    assert main(["compare", str(smoke_run), f"out={tmp_path / 'report'}"]) == 0
    report = "".join(path.read_text() for path in (tmp_path / "report").rglob("*.html"))
    assert "mean brightness" in report and f"{record[name]:.1f}" in report

    argv = ["train", "experiments/digits/dit.yaml", "debug=smoke", "tag=bright", f"runs_dir={tmp_path / 'runs'}"]
    assert main([*argv, "evaluate.every_images=8", "evaluate.every_count=20"]) == 0
    (trained,) = (tmp_path / "runs" / "digits").iterdir()
    assert [m["images"] for m in records.metrics(trained) if name in m] == [8, 16]  # in training too
    events = EventAccumulator(str(trained)).Reload()
    assert {e.step for e in events.Scalars(name)} == {8, 16}
    layout = events.summary_metadata["custom_scalars__config__"]
    charts = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert layout is not None and b"mean brightness" in charts
    assert b"error of eps at log-SNR -4" in charts and b"val/level/-4" in charts  # a chart for each level
