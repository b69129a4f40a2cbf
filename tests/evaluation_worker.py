"""The two processes of test_metrics_distributed: each updates metrics with its share, then both compute together."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DistributedSampler

from diffbench.metrics.base import SampleMetric
from diffbench.metrics.classification import InceptionScore, LabelAccuracy
from diffbench.metrics.frechet import FrechetDistance, gaussian
from diffbench.metrics.kernel import KernelDistance
from diffbench.metrics.neighbours import DensityCoverage, PrecisionRecall

N = 65  # odd: a padding sampler would make it 66


def data() -> dict[str, Any]:
    """Return the samples and the real features they are compared with."""
    generator = torch.Generator().manual_seed(0)
    features, real = torch.randn(N, 8, generator=generator), torch.randn(90, 8, generator=generator) + 0.3
    logits, labels = torch.randn(N, 4, generator=generator), torch.randint(0, 4, (N,), generator=generator)
    subsets = [
        (torch.randperm(N, generator=generator)[:30], torch.randperm(90, generator=generator)[:30]) for _ in "ab"
    ]
    return {"features": features, "real": real, "logits": logits, "labels": labels, "subsets": subsets}


def metrics(d: dict[str, Any]) -> dict[str, tuple[SampleMetric, tuple[Tensor, ...]]]:
    """Return each metric with the arguments of its update for all samples."""
    index = torch.arange(N)
    return {
        "fd": (FrechetDistance({"fd": gaussian(d["real"])}, N), (d["features"],)),
        "kid": (KernelDistance(d["real"], N, subsets=d["subsets"]), (d["features"], index)),
        "pr": (PrecisionRecall(d["real"], N), (d["features"], index)),
        "dc": (DensityCoverage(d["real"], N), (d["features"], index)),
        "is": (InceptionScore(4, N, chunk=40), (d["logits"], index)),
        "accuracy": (LabelAccuracy(N), (d["logits"], d["labels"])),
    }


def scores(share: Tensor) -> dict[str, Any]:
    """Return all metric values after this process has seen only the samples of its share."""
    found = {}
    for name, (metric, inputs) in metrics(data()).items():
        for part in share.split(16):
            metric.update(*(a[part] for a in inputs))
        value = metric.compute()
        found[name] = {k: float(v) for k, v in value.items()} if isinstance(value, dict) else float(value)
    return found


def work(rank: int, folder: str) -> None:
    """Run one of the two processes and write its results to a JSON file."""
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    reduced: list[int] = []
    original = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        reduced.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counted
    everything = torch.arange(N)
    found: dict[str, Any] = {"halves": scores(everything[rank::2])}
    found["reductions"] = len(reduced)
    found["idle"] = scores(everything if rank == 0 else everything[:0])  # rank 1 never has a sample
    found["uneven"] = scores(everything[:3] if rank == 0 else everything[3:])

    padded = DistributedSampler(everything, num_replicas=2, rank=rank, shuffle=False)
    try:
        scores(torch.tensor(list(padded)))
    except ValueError as e:
        found["padded"] = str(e)

    # Rank 1 has nothing new for the second compute: a cached value would leave rank 0 waiting.
    metric, (features,) = metrics(data())["fd"]
    metric.count = None
    metric.update(features[:40] if rank == 0 else features[40:60])
    first = float(metric.compute()["fd"])
    local = float(metric.n)
    if rank == 0:
        metric.update(features[60:])
    found["twice"] = [first, float(metric.compute()["fd"]), local, float(metric.n)]
    (Path(folder) / f"rank-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
