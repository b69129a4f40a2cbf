"""Estimates of the time that a study takes, from rates measured on this machine before anything is trained."""

import json
import time
from pathlib import Path

import torch
from torch.utils._pytree import tree_map_only

from diffbench.config.kinds import RunConfig
from diffbench.config.load import to_dict
from diffbench.core.distributed import threads_each
from diffbench.core.files import digest, write_text
from diffbench.runs.build import device_of
from diffbench.runs.denoiser import DenoiserRun
from diffbench.studies.plan import TrainingVariant, evaluation_config

WARM, LEAST_STEPS, LEAST_SECONDS = 3, 10, 2.0
FORWARDS = 3
"""Cost of a training image, in forward passes."""


class Probe:
    """The speed of configs on this machine, each measured once.

    Training rates are stored in a file, so that a study stopped by seconds ends at the same image if it is resumed.

    Args:
        path: file of the training rates.
        jobs: number of runs at a time, which share the cores.
    """

    def __init__(self, path: Path, jobs: int) -> None:
        self.path, self.jobs = path, jobs
        self.rates: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
        self._forward: dict[str, float] = {}

    def training_rate(self, config: RunConfig) -> float:
        """Return training images per second: forward, backward and optimizer, without data, logs and validation."""
        name = _rate_key(config)
        if name not in self.rates:
            self.rates[name] = _training_rate(config)
            write_text(self.path, json.dumps(self.rates) + "\n")
        return self.rates[name]

    def seconds(self, variant: TrainingVariant) -> float:
        """Estimate the seconds that one seed of a variant takes to train and to sample, with `jobs` runs at a time."""
        from diffbench.sampling.cost import network_evaluations, seconds_per_evaluation
        from diffbench.sampling.sampler import Sampler

        c, name = variant.config, _rate_key(variant.config)
        run = DenoiserRun(Path("probe"), c)
        before = torch.get_num_threads()
        try:
            run.use_threads()
            if name not in self._forward:
                sampler = Sampler(run.network.to(device_of(c.trainer.accelerator)), run.process, run.shape)
                if self.jobs > 1:
                    torch.set_num_threads(min(torch.get_num_threads(), threads_each(self.jobs)))
                self._forward[name] = seconds_per_evaluation(sampler, c.trainer.batch_size)
        finally:
            torch.set_num_threads(before)
        forwards = float(FORWARDS * variant.trained_images)
        for changes in variant.evaluations.values():
            varied = evaluation_config(c, changes, "study")
            drawn = varied.evaluate.count * max(1, len(variant.rungs)) * variant.samplings
            forwards += drawn * network_evaluations(run.process, varied.sample) / (run.at_once if self.jobs == 1 else 1)
        return forwards * self._forward[name]


def _rate_key(config: RunConfig) -> str:
    values = to_dict(config)
    kept = {key: values[key] for key in ("data", "denoiser", "process", "autoencoder")}
    kept["batch"] = [config.trainer.batch_size, config.trainer.accumulate_grad_batches, config.trainer.precision]
    return digest(kept)[:16]


def _training_rate(config: RunConfig) -> float:
    device = device_of(config.trainer.accelerator)
    run = DenoiserRun(Path("probe"), config)
    run.use_threads()
    module, data = run.module().to(device), run.data_module()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    batch = data.on_after_batch_transfer(tree_map_only(torch.Tensor, lambda t: t.to(device), batch), 0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6)
    size, steps, started = len(batch["position"]), -WARM, time.perf_counter()
    while steps < LEAST_STEPS or time.perf_counter() - started < LEAST_SECONDS:
        if steps == 0:
            started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=config.trainer.precision == "bf16-mixed"):
            loss = module.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return size * steps / (time.perf_counter() - started)
