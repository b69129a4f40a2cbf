"""Two processes give the same values as one, with equal, uneven and empty shares; padding is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_worker import N, data, metrics, scores, work

from diffbench.metrics.frechet import frechet, gaussian


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=2)
    return [json.loads((Path(folder) / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("shares", ["halves", "idle", "uneven"])
def test_two_processes_give_the_same_values_as_one(ranks: list[dict[str, Any]], shares: str) -> None:
    alone = scores(torch.arange(N))
    for found in ranks:
        assert found[shares].keys() == alone.keys()
        for name, value in alone.items():
            assert found[shares][name] == pytest.approx(value, rel=1e-9), name
        # Fractions of counts are the same to the last bit.
        assert all(found[shares][name] == alone[name] for name in ("pr", "dc", "accuracy"))


def test_both_processes_get_the_same_bits(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0] | {"twice": 0} == ranks[1] | {"twice": 0}


def test_each_metric_takes_one_reduction(ranks: list[dict[str, Any]]) -> None:
    assert [found["reductions"] for found in ranks] == [len(metrics(data()))] * 2


def test_padding_is_refused_by_both_processes(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["padded"] == ("FrechetDistance: got 66 samples, expected 65; were some padded or dropped?")


def test_a_process_without_new_samples_takes_part_in_compute(ranks: list[dict[str, Any]]) -> None:
    d = data()
    want = [float(frechet(gaussian(d["features"][:n]), gaussian(d["real"]))) for n in (60, N)]
    for found, local in zip(ranks, ([40, 45], [20, 20]), strict=True):
        assert found["twice"][:2] == pytest.approx(want, rel=1e-9)
        assert found["twice"][2:] == local  # afterwards each has its own share again
