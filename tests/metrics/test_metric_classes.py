"""The torchmetrics classes: independent of batch and order, mergeable, resumable, and strict about their inputs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from formulas import inception_score
from torch import Tensor

from diffbench.metrics.base import Rows, SampleMetric, evenly_spaced, states_device
from diffbench.metrics.classification import InceptionScore, LabelAccuracy
from diffbench.metrics.copies import Calibration, CopyDetector
from diffbench.metrics.frechet import FrechetDistance, FrechetInfinity, Moments, frechet, frechet_infinity, gaussian
from diffbench.metrics.kernel import KernelDistance, kernel_distance
from diffbench.metrics.memorisation import Memorisation, share_of_copies
from diffbench.metrics.neighbours import DensityCoverage, PrecisionRecall, neighbours

N, D = 60, 6
GENERATOR = torch.Generator().manual_seed(0)
SAMPLES = torch.randn(N, D, generator=GENERATOR) @ torch.randn(D, D, generator=GENERATOR) + 3
REAL = torch.randn(80, D, generator=GENERATOR) @ torch.randn(D, D, generator=GENERATOR) + 3
LOGITS = 3 * torch.randn(N, 5, generator=GENERATOR)
LABELS = torch.randint(0, 5, (N,), generator=GENERATOR)
IMAGES, TRAINING = (torch.randint(0, 256, (n, 1, 4, 4), generator=GENERATOR).to(torch.uint8) for n in (N, 30))
IMAGES[:6] = TRAINING[:6]
DETECTOR = CopyDetector(TRAINING)
DETECTOR.calibration = Calibration(0.2, 1, 100, None)
SUBSETS = [(torch.randperm(N, generator=GENERATOR)[:20], torch.randperm(80, generator=GENERATOR)[:20]) for _ in "abc"]
INDEX = torch.arange(N)

MAKE: dict[str, Callable[[], SampleMetric]] = {
    "fd": lambda: FrechetDistance({"fd": gaussian(REAL), "other": gaussian(REAL[:40])}, N),
    "kid": lambda: KernelDistance(REAL, N, subsets=SUBSETS),
    "kid_all": lambda: KernelDistance(REAL, N),
    "pr": lambda: PrecisionRecall(REAL, N),
    "dc": lambda: DensityCoverage(REAL, N),
    "is": lambda: InceptionScore(5, N, chunk=25),
    "accuracy": lambda: LabelAccuracy(N),
    "copies": lambda: Memorisation(DETECTOR, N),
}
FEED: dict[str, tuple[Tensor, ...]] = {
    "fd": (SAMPLES,),
    "kid": (SAMPLES, INDEX),
    "kid_all": (SAMPLES, INDEX),
    "pr": (SAMPLES, INDEX),
    "dc": (SAMPLES, INDEX),
    "is": (LOGITS, INDEX),
    "accuracy": (LOGITS, LABELS),
    "copies": (IMAGES, INDEX),
}


def values(found: Any) -> dict[str, float]:
    return {k: float(v) for k, v in found.items()} if isinstance(found, dict) else {"": float(found)}


def updated(name: str, order: Tensor, size: int) -> SampleMetric:
    metric = MAKE[name]()
    for part in order.split(size):
        metric.update(*(a[part] for a in FEED[name]))
    return metric


def kernel_over_subsets() -> dict[str, float]:
    found = torch.stack([kernel_distance(SAMPLES[i], REAL[j]) for i, j in SUBSETS])
    return {"kid": found.mean().item(), "kid_sd": found.std().item()}


def share_of_planted_copies() -> dict[str, float]:
    shares = dict(zip(("copies", "copies_low", "copies_high"), share_of_copies(6, N, 1, 100), strict=True))
    return shares | {"authenticity": DETECTOR.judge(IMAGES).authentic.double().mean().item()}


def expected(name: str) -> dict[str, float]:
    fit = gaussian(SAMPLES)
    return {
        "fd": lambda: values({"fd": frechet(fit, gaussian(REAL)), "other": frechet(fit, gaussian(REAL[:40]))}),
        "kid": kernel_over_subsets,
        "kid_all": lambda: values({"kid": kernel_distance(SAMPLES, REAL)}),
        "pr": lambda: dict(zip(("precision", "recall"), neighbours(SAMPLES, REAL, 3)[:2], strict=True)),
        "dc": lambda: dict(zip(("density", "coverage"), neighbours(SAMPLES, REAL, 5)[2:], strict=True)),
        "is": lambda: values(inception_score([LOGITS[:25], LOGITS[25:50], LOGITS[50:]])),
        "accuracy": lambda: values((LOGITS.argmax(1) == LABELS).double().mean()),
        "copies": share_of_planted_copies,
    }[name]()


@pytest.mark.parametrize("name", MAKE)
def test_the_value_equals_the_function_of_the_whole_set(name: str) -> None:
    assert values(updated(name, INDEX, N).compute()) == pytest.approx(expected(name), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("size", [1, 7, 60])
def test_the_value_does_not_depend_on_batch_and_order(name: str, size: int) -> None:
    shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(size))
    assert values(updated(name, shuffled, size).compute()) == pytest.approx(expected(name), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", MAKE)
def test_states_merge_and_survive_a_checkpoint(name: str, tmp_path: Any) -> None:
    first, second = (updated(name, part, 20) for part in (INDEX[:23], INDEX[23:]))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    resumed = MAKE[name]()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    resumed.merge_state(second)
    assert values(resumed.compute()) == pytest.approx(expected(name), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", MAKE)
def test_a_metric_contains_no_network_and_only_float64_states(name: str) -> None:
    metric = updated(name, INDEX, N)
    assert not list(metric.parameters()) and not list(metric.buffers())
    assert {state.dtype for state in metric.metric_state.values()} == {torch.float64}
    metric.half()  # mixed-precision plugins cast whole modules
    assert {state.dtype for state in metric.metric_state.values()} == {torch.float64}


@pytest.mark.parametrize("name", MAKE)
def test_trap_4_a_batch_is_never_counted_twice(name: str) -> None:
    metric = updated(name, INDEX, N)
    with pytest.raises(TypeError, match=r"use update\(\) for each batch and compute\(\) once"):
        metric(*FEED[name])
    assert values(metric.compute()) == values(metric.compute()) == pytest.approx(expected(name), rel=1e-9)


@pytest.mark.parametrize("name", MAKE)
def test_trap_3_compute_before_any_update_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="got 0 samples, expected 60"):
        MAKE[name]().compute()
    with pytest.raises(ValueError, match="a covariance needs at least 2 samples, got 0"):
        Moments(3).compute()


@pytest.mark.parametrize("name", MAKE)
def test_trap_7_padding_is_refused(name: str) -> None:
    padded = torch.cat([INDEX, INDEX[:1]])
    with pytest.raises(ValueError, match="got 61 samples, expected 60; were some padded or dropped"):
        updated(name, padded, 13).compute()


def test_trap_7_a_sample_that_replaces_another_is_named() -> None:
    swapped = INDEX.clone()
    swapped[17] = 4
    with pytest.raises(ValueError, match="Rows: sample 4 was added 2 times; 2 were not added once"):
        metric = Rows(D, N)
        metric.update(SAMPLES, swapped)
        metric.compute()


@pytest.mark.parametrize("name", [n for n in MAKE if n != "copies"])
def test_trap_8_non_finite_values_are_counted_and_refused(name: str) -> None:
    broken = FEED[name][0].clone()
    broken[3, 0], broken[9, 1] = float("nan"), float("inf")
    metric = MAKE[name]()
    metric.update(broken, *FEED[name][1:])
    with pytest.raises(ValueError, match="2 of 60 samples have non-finite features"):
        metric.compute()


@pytest.mark.parametrize("name", MAKE)
def test_trap_8_the_global_generator_is_left_alone(name: str) -> None:
    before = torch.get_rng_state()
    updated(name, INDEX, 20).compute()
    assert torch.equal(torch.get_rng_state(), before)


def test_trap_8_a_buffer_may_be_reused_between_updates() -> None:
    buffer = SAMPLES[:30].clone()
    metric = MAKE["fd"]()
    metric.update(buffer)
    buffer.copy_(SAMPLES[30:])
    metric.update(buffer)
    assert values(metric.compute()) == pytest.approx(expected("fd"), rel=1e-9)


def test_features_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"features must be \(B, 6\), got \(60, 5\)"):
        MAKE["fd"]().update(LOGITS)


def test_trap_8_float64_states_stay_off_devices_without_float64() -> None:
    assert states_device(torch.device("mps")) == torch.device("cpu")
    assert states_device(torch.device("cuda", 1)) == torch.device("cuda", 1)


def test_an_empty_batch_changes_nothing() -> None:
    for name in MAKE:
        metric = updated(name, INDEX, N)
        metric.update(*(a[:0] for a in FEED[name]))
        assert values(metric.compute()) == pytest.approx(expected(name), rel=1e-9, abs=1e-12)


def test_sums_about_a_centre_keep_their_precision() -> None:
    far = SAMPLES.double() + 1e7
    want = gaussian(SAMPLES.double()).cov
    near, raw = Moments(D, N, center=far[0]), Moments(D, N)
    for metric in (near, raw):
        metric.update(far)
    assert torch.allclose(near.compute().cov, want, rtol=1e-8)
    assert not torch.allclose(raw.compute().cov, want, rtol=1e-3)  # without a centre, digits are lost


def test_rows_keeps_evenly_spaced_rows() -> None:
    metric = Rows(D, N, keep=7)
    for part in torch.randperm(N, generator=torch.Generator().manual_seed(1)).split(11):
        metric.update(SAMPLES[part], part)
    assert evenly_spaced(N, 7).tolist() == [0, 8, 17, 25, 34, 42, 51]
    assert torch.equal(metric.compute(), SAMPLES[evenly_spaced(N, 7)].double())


def test_fd_infinity_needs_5000_samples() -> None:
    with pytest.raises(ValueError, match="fd_infinity needs at least 5,000 samples, got 60"):
        FrechetInfinity(gaussian(REAL), N, INDEX)
    x = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0))
    order = torch.arange(5000).flip(0)
    metric = FrechetInfinity(gaussian(x[:, :] + 1), 5000, order)
    metric.update(x, torch.arange(5000))
    assert float(metric.compute()) == pytest.approx(frechet_infinity(x, gaussian(x + 1), order), rel=1e-12)
