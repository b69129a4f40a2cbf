"""A network under measurement, with everything that a training step has."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import Variant
from benchmarks.clock import Work
from diffbench.config.kinds import RunConfig
from diffbench.core import rng
from diffbench.diffusion import predictor
from diffbench.runs.denoiser import DenoiserRun
from diffbench.sampling.cost import network_evaluations
from diffbench.sampling.guided import guided
from diffbench.sampling.sampler import run_sampler
from diffbench.training.ema import EMA
from diffbench.training.speed import compile_network, float32_products

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
KINDS = ("forward", "train", "sample")
"""The steps that are timed."""


class Subject:
    """A run's network on its device, with optimizer and average, and a batch that always stays the same.

    Args:
        config: the run.
        variant: how it is run.
        device: where.
        network: another implementation, in place of the run's.
        like: another variant of the same network, whose weights, optimizer and average serve this one too.
        backend: of torch.compile.
    """

    def __init__(
        self,
        config: RunConfig,
        variant: Variant,
        device: torch.device,
        network: nn.Module | None = None,
        like: "Subject | None" = None,
        backend: str = "inductor",
    ) -> None:
        self.config, self.variant, self.device = config, variant, device
        self.run: DenoiserRun = DenoiserRun(Path("bench"), config) if like is None else like.run
        if network is not None:
            self.run.network = network
        self.network = self.run.network.to(device)
        self.module = self.run.module()
        compile_network(self.network, config.trainer.compile, backend)
        made: Any = like.optimizer if like else self.module.configure_optimizers()["optimizer"]
        self.optimizer: torch.optim.Optimizer = made
        if like is not None:
            self.ema = like.ema
        self.first = 0.0
        """Seconds of the very first training step, compilation included."""
        self.generator = torch.Generator(device).manual_seed(0)
        batch = config.trainer.batch_size
        self.position = torch.arange(batch, device=device)
        self.x0 = rng.normal(rng.key("bench", "x0"), self.position, self.run.shape).clamp(-1, 1)
        self.y = self.position % max(1, self.run.train_set.num_classes)
        if config.trainer.precision == "64-true":
            self.network.double()
            self.x0 = self.x0.double()

    @cached_property
    def ema(self) -> EMA:
        """The average, begun when it is first asked for."""
        ema = EMA(self.config.ema)
        ema.attach(self.network)
        return ema

    @contextlib.contextmanager
    def mode(self) -> Iterator[None]:
        """Autocast and attention as the run has them."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(float32_products(self.config.trainer.tf32))
            if self.config.trainer.precision == "bf16-mixed":
                stack.enter_context(torch.autocast(self.device.type, torch.bfloat16))
            if self.variant.linear_by_mkl:
                stack.enter_context(patch("diffbench.denoisers.linear.BY_ONEDNN", False))
            if self.variant.attention is not None:
                stack.enter_context(patch("diffbench.denoisers.tmsa.pays_in_parts", lambda bias: False))
            if self.variant.attention in BACKENDS:
                stack.enter_context(sdpa_kernel(BACKENDS[self.variant.attention]))
            yield

    @torch.no_grad()
    def forward(self) -> None:
        """One forward pass."""
        with self.mode():
            self.network(*self.process.inputs(self.x0, self._time()), self.y)

    def bare(self) -> None:
        """A training step as one writes it by hand: clipped as the run's, noise from one generator; no average, no log,
        no data."""
        eps = torch.randn(self.x0.shape, generator=self.generator, device=self.device, dtype=self.x0.dtype)
        t = self._time()
        self.optimizer.zero_grad(set_to_none=True)
        with float32_products(self.config.trainer.tf32):
            with self.mode():
                x, time = self.process.inputs(self.process.add_noise(self.x0, t, eps), t)
                loss = self.process.losses(self.network(x, time, self.y), self.x0, t, eps).mean()
            loss.backward()
        if self.config.optimizer.grad_clip_norm is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.config.optimizer.grad_clip_norm)
        self.optimizer.step()

    def train(self) -> None:
        """A training step: forward, loss, backward, optimizer, average."""
        self.bare()
        self.ema.update()

    @torch.no_grad()
    def sample(self) -> None:
        """`steps` steps of the sampler, without guidance."""
        predict = predictor(self.process, self.network)
        settings = replace(self.config.sample, steps=str(self.steps)).unguided()
        key = rng.key("bench", "sample")

        def noise(step: int) -> Tensor:
            return rng.normal(key, self.position + len(self.position) * (step + 1), self.run.shape).to(self.x0)

        with self.mode():
            run_sampler(guided(predict, self.y, self.process, settings), noise, self.process, settings)

    @property
    def products(self) -> str:
        """What products are computed in: `trainer.precision`, or tf32."""
        return "tf32" if self.config.trainer.tf32 else self.config.trainer.precision

    @property
    def steps(self) -> int:
        """Of the sampler in one `sample`: at least two for vp, and for Heun, whose last step takes one evaluation."""
        return 1 if self.process.name == "flow" else 2

    @property
    def process(self) -> Any:
        """What noises."""
        return self.run.process

    @cached_property
    def evaluations(self) -> float:
        """Of the network in one step of the sampler."""
        settings = replace(self.config.sample, steps=str(self.steps)).unguided()
        return network_evaluations(self.process, settings) / self.steps

    def works(self, kinds: Sequence[str] = KINDS) -> dict[str, Work]:
        """The kinds of step asked for."""
        works = {
            "forward": Work("forward", self.forward, self.network.eval),
            "train": Work("train", self.train, self.ready),
            "sample": Work("sample", self.sample, self.network.eval),
        }
        return {kind: works[kind] for kind in kinds}

    def ready(self) -> None:
        """Before training steps: no gradients yet, so that a step's memory holds them."""
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)

    def state_bytes(self, trained: bool) -> int:
        """What stays in memory between steps: the weights and, while training, two moments and an average."""
        return sum(p.nbytes for p in self.network.parameters()) * (4 if trained else 1)

    def _time(self) -> Tensor:
        u = torch.rand(len(self.x0), generator=self.generator, device=self.device, dtype=torch.float64)
        return self.process.time(u)
