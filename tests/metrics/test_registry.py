"""The metric registry: name, title, direction and format of each metric."""

import pytest

from diffbench.metrics.registry import METRICS, metric_of


@pytest.mark.parametrize(
    ("name", "short", "title", "better"),
    [
        ("val/bound", "val/bound", "validation bound", "lower is better"),
        ("fd/digits-cnn@500", "fd", "Fréchet distance", "lower is better"),
        ("fid/inception-tf1@50000", "fid", "FID", "lower is better"),
        ("label_accuracy/digits-cnn@500", "label_accuracy", "label accuracy", "higher is better"),
        ("copies@500", "copies", "copies of training images", ""),
        ("psnr@200", "psnr", "PSNR of reconstructions", "higher is better"),
        ("my_own/digits-cnn@500", "my_own", "my own", ""),
        ("val/level/-2", "val/level/-2", "val/level/-2", ""),
    ],
)
def test_a_metric_is_found_by_its_full_name(name: str, short: str, title: str, better: str) -> None:
    found = metric_of(name)
    assert (found.name, found.title, found.better()) == (short, title, better)
    assert metric_of(short) == found
    assert found.is_validation == name.startswith("val/")


def test_values_are_formatted_for_tables() -> None:
    assert metric_of("fd/digits-cnn@500").text(12.34567) == "12.346"
    assert metric_of("label_accuracy/digits-cnn@500").text(0.9312) == "93.1%"
    assert metric_of("val/bound").text(0.123456) == "0.1235"


def test_metrics_shown_in_tables_and_metrics_that_rank_variants() -> None:
    shown = [name for name, metric in METRICS.items() if metric.shown]
    assert {"fd", "fid", "sfid", "fd_gap", "fd_held_out", "kid", "label_accuracy", "precision", "recall"} <= set(shown)
    assert not {"density", "kid_sd", "inception_score"} & set(shown)
    assert {name for name, metric in METRICS.items() if metric.tie} >= {"fd", "fid", "sfid", "fd_infinity"}
    assert not metric_of("kid").tie
    assert [metric.direction for metric in map(metric_of, ("fd_gap", "copies"))] == [None, None]
