"""Draw the samples of a run that are scored, into its folder; with several processes if the run trains with several."""

import dataclasses
import json
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from diffbench.config.kinds import RunConfig
from diffbench.config.sections import SampleConfig
from diffbench.core.progress import progress, span
from diffbench.evaluation.reference import sample_labels
from diffbench.evaluation.samples import SIZE, Samples
from diffbench.evaluation.scorer import PATIENCE
from diffbench.metrics.extractors.base import state_hash
from diffbench.runs.denoiser import DenoiserRun
from diffbench.runs.ranks import run_ranks
from diffbench.sampling.cost import network_evaluations, sampling_seconds


def samples_of(run: DenoiserRun, config: RunConfig, how: SampleConfig) -> Samples:
    """Return the store of a run's samples; its folder is named by everything that they depend on."""
    models = run.guided_by(how)
    what = {
        "weights": state_hash(run.network),
        "guidance_models": [state_hash(n) for n in (models.weak_model, models.classifier) if n is not None],
        "autoencoder": None if run.autoencoder is None else run.autoencoder.fingerprint,
        "process": dataclasses.asdict(config.process),
        "sample": how.sampling_keys(),
        "seed": config.seed_of("sample"),
        "labels": sample_labels(run.train_set, config.evaluate.count).bincount(minlength=1).tolist(),
        "count": config.evaluate.count,
    }
    channels, height, width = run.train_set.images.shape[1:]
    return Samples(run.folder / "evaluations", what, config.evaluate.count, (channels, height, width))


def drawing_seconds(run: DenoiserRun) -> float:
    """Estimate the seconds that drawing the scored samples of a run's config takes on this machine."""
    run.use_device()
    sampler, count = run.sampler(run.config.sample), run.config.evaluate.count
    return sum(sampling_seconds(sampler, how, count) for how in run.config.sample.scored())


def draw(
    run: DenoiserRun, how: SampleConfig, samples: Samples, seed: int, rank: int = 0, world: int = 1
) -> dict[str, Any]:
    """Draw the missing samples, after printing an estimate of the time.

    This starts `trainer.devices` processes, or as many as this machine has devices, each of which draws its own chunks;
    only they pass `rank` and `world`.

    Returns:
        Entries of a record: network evaluations, seconds of this call, samples drawn, share of clipped values.
    """
    sampler, evaluations = run.sampler(how), network_evaluations(run.process, how)
    labels, started = sample_labels(run.train_set, samples.count), time.perf_counter()
    missing = left = samples.count - samples.present()
    estimate = 0.0
    processes = min(run.config.trainer.devices, torch.cuda.device_count() or run.config.trainer.devices)
    wanted = {"ema": run.ema, "snapshot": run.snapshot, "seed": seed, "count": samples.count}
    wanted |= {"sample": dataclasses.asdict(how)}
    if left > SIZE and run_ranks(processes, "draw", str(run.folder), json.dumps(wanted)):
        left = samples.count - samples.present()
    if left:
        run.compile(run.cost.sampling_flops(evaluations * left) / world)
        estimate = sampling_seconds(sampler, how, left)
        print(
            f"{left:,} samples by {how.sampler}, {evaluations} network evaluations each: about {span(estimate)}",
            flush=True,
        )
    shown = progress("samples", samples.count) if estimate > PATIENCE else nullcontext(lambda count: None)
    with shown as advance:

        def one(first: int, count: int) -> Tensor:
            return sampler(labels[first : first + count], how, seed=seed, first=first, progress=advance)

        samples.fill(one, advance, rank, world)
    return {
        "network_evaluations": evaluations,
        "seconds": time.perf_counter() - started,
        "drawn": missing,
        "clipped": sampler.clipped / sampler.values if sampler.values else None,
    }
