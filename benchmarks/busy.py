"""Training next to other busy processes, by the number of threads, what they share, and how they wait."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from benchmarks.config import BenchConfig, Row, shared
from benchmarks.networks import DIGITS, Subject, Variant, run_config
from diffbench.__main__ import WAITING

MODELS = (*DIGITS[:2], "experiments/digits/unet.yaml", "DiT-S/2")
OTHERS = (0, 1, 2)
"""Numbers of other busy processes."""
WAYS = {
    "default": {},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "all threads": {},
    "all threads, asleep": {"OMP_WAIT_POLICY": "passive"},
    "all threads, spinning": {"GOMP_SPINCOUNT": "300000"},
}
"""Environment variables for each way to use threads: diffbench's default (`trainer.threads=auto`), one thread, and
threads that share each layer, with diffbench's way of waiting, asleep, or spinning as plain PyTorch does."""
SECONDS = 3.0


def measure(config: BenchConfig, _device: torch.device, deadline: float) -> Iterator[Row]:
    """Yield images per second for each network, way and number of busy processes; the ways take turns."""
    for model, until in shared(config.models or MODELS, deadline):
        for others in OTHERS[:2] if config.tiny else OTHERS:
            if until is None or time.monotonic() > until:
                yield {"part": "busy", "name": model, "size": others, "skipped": "the time is up"}
                continue
            rates: dict[str, list[float]] = {way: [] for way in WAYS}
            with busy(others):
                for _ in range(1 if config.tiny else 3):
                    for way, found in rates.items():
                        found.append(_rate(model, way, config.tiny))
            for way, found in rates.items():
                row: Row = {"part": "busy", "name": model, "variant": way, "size": others}
                yield row | {"images_per_s": statistics.median(found), "rates": found}


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Run `count` busy processes during the block, each in its own session, like those of another user."""
    loop = f"import os\nwhile os.getppid() == {os.getpid()}: pass"  # ends even if this process is killed
    command = [sys.executable, "-c", loop]
    others = [subprocess.Popen(command, start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def _rate(model: str, way: str, tiny: bool) -> float:
    unset = {"OMP_NUM_THREADS", "MKL_NUM_THREADS", *WAITING}
    environment = {name: value for name, value in os.environ.items() if name not in unset} | WAYS[way]
    command = [sys.executable, "-m", "benchmarks.busy", model, way, str(tiny).lower()]
    return float(subprocess.check_output(command, env=environment, text=True).split()[-1])


def main(args: Sequence[str]) -> None:
    """Train the network of `args` (model, way, tiny) for some seconds and print its images per second."""
    model, way, tiny = args
    config = run_config(BenchConfig(tiny=tiny == "true"), model, "cpu")
    subject = Subject(config, Variant(), torch.device("cpu"))
    if way == "default":
        subject.run.use_threads()
    module, batch = subject.run.module(), {"image": subject.x0, "label": subject.y, "position": subject.position}
    subject.ready()

    def step() -> None:
        subject.optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        subject.optimizer.step()
        subject.ema.update()

    step()
    steps, began = 0, time.perf_counter()
    while steps == 0 or (time.perf_counter() - began < SECONDS and tiny == "false"):
        step()
        steps += 1
    print(steps * config.trainer.batch_size / (time.perf_counter() - began))


if __name__ == "__main__":
    main(sys.argv[1:])
