"""The cost of sampling: network evaluations, and their time in seconds on this machine."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffbench.config.sections import SampleConfig
from diffbench.core.tensors import eval_mode
from diffbench.diffusion import Prediction, Process
from diffbench.sampling.guided import guided
from diffbench.sampling.sampler import Sampler, run_sampler

PROBE = 64
"""Maximum number of samples in a timed batch."""


@torch.no_grad()
def network_evaluations(process: Process, config: SampleConfig) -> int:
    """Count the network evaluations of one sample by running the sampler without a network.

    Guidance by the null class or a weaker model counts twice where its weight is not 1; a classifier's gradient is not
    counted. For an adaptive sampler the count is a lower bound.
    """
    count = 0

    def predict(x: Tensor, t: Tensor, y: Tensor) -> Prediction:
        nonlocal count
        count += len(x)
        return Prediction(torch.zeros_like(x), x, torch.zeros_like(x))

    config = replace(config, weak_model=None, classifier=None)
    counted = guided(predict, torch.zeros(1, dtype=torch.int64), process, config, null_label=0)
    run_sampler(counted, lambda step: torch.ones(1, 1, 1, 1, dtype=torch.float64), process, config)
    return count


def sampling_seconds(sampler: Sampler, config: SampleConfig, count: int) -> float:
    """Estimate the time in seconds that `count` samples take on this machine."""
    batch = min(sampler.batch_size(config), count)
    rounds = math.ceil(math.ceil(count / batch) / sampler.at_once)
    return rounds * batch * network_evaluations(sampler.process, config) * seconds_per_evaluation(sampler, batch)


@torch.no_grad()
def seconds_per_evaluation(sampler: Sampler, batch: int) -> float:
    """Measure the seconds per sample of one denoiser evaluation, in batches of `batch` (at most 64)."""
    size, like = min(batch, PROBE), next(sampler.denoiser.parameters())
    x = torch.zeros(size, *sampler.shape, device=like.device, dtype=like.dtype)
    t = sampler.process.time(torch.full((size,), 0.5, device=like.device, dtype=torch.float64)).to(x)
    y = torch.zeros(size, device=like.device, dtype=torch.int64)
    with eval_mode(sampler.denoiser):
        return timed(lambda: sampler.denoiser(x, t, y), x.device) / size


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that `work` takes, the better of two runs after a warm-up."""
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return min(taken[1:])
