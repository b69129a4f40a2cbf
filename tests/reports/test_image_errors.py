"""Per-image errors: the file written for comparisons, and when it is written again."""

from pathlib import Path

import pytest
import torch

from diffbench.core import tensors
from diffbench.core.errors import UserError
from diffbench.evaluation import validation_error
from diffbench.evaluation.records import metrics
from diffbench.evaluation.validation_error import image_errors
from diffbench.reports.image_errors import image_bounds, save_image_errors
from diffbench.runs.lifecycle import load


def test_per_image_errors_average_to_the_logged_errors(smoke_run: Path) -> None:
    run = load(smoke_run)
    path = save_image_errors(run)
    assert path == smoke_run / "validation.safetensors"
    found, metadata = tensors.read(path)
    assert (metadata["images"], found["log_snr"].tolist()) == ("16", run.config.validation.log_snr)
    assert found["error"].dtype == torch.float32 and found["error"].shape == (7, 20)
    last = metrics(smoke_run)[-1]
    for level, row in zip(found["log_snr"].tolist(), found["error"].double(), strict=True):
        assert float(row.mean()) == pytest.approx(last[f"val/level/{level:g}"], rel=1e-6)
    bounds = image_bounds(smoke_run, 16, 0.999)
    assert bounds is not None and bounds.mean() == pytest.approx(last["val/bound"], rel=1e-6)
    assert image_bounds(smoke_run, 32, 0.999) is None


def test_errors_do_not_depend_on_the_batch(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load(finished)
    run.network.train()
    errors = []
    for size in (512, 100):
        monkeypatch.setattr(validation_error, "BATCH", size)
        errors.append(image_errors(run.network, run.process, run.held_out, [-2.0, 2.0]))
    assert errors[0].shape == (2, 360) and errors[0].dtype == torch.float64
    assert torch.allclose(errors[0], errors[1], rtol=1e-4)
    assert run.network.training


def test_the_file_is_written_once_for_the_same_weights(smoke_run: Path) -> None:
    run = load(smoke_run)
    path = save_image_errors(run)
    before = path.stat().st_mtime_ns, path.read_bytes()
    assert save_image_errors(load(smoke_run)) == path
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before
    run.images_seen = 32  # as after longer training
    save_image_errors(run)
    assert image_bounds(smoke_run, 32, 0.999) is not None


def test_a_missing_file_is_none_and_a_damaged_file_is_an_error(smoke_run: Path) -> None:
    assert image_bounds(smoke_run, 16, 0.999) is None
    path = smoke_run / "validation.safetensors"
    path.write_bytes(b"broken")
    with pytest.raises(UserError, match=rf"^{path}: damaged \(.*\); remove it$"):
        image_bounds(smoke_run, 16, 0.999)
