"""The networks to measure, their variants, and a network with all that a training step needs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.config import BenchConfig
from benchmarks.timing import Work
from diffbench.config.kinds import RunConfig
from diffbench.config.layers import COMMAND_LINE, merge, parse_overrides
from diffbench.config.load import from_dict, from_layers, read_layers, to_dict
from diffbench.core import rng
from diffbench.core.errors import UserError, suggest
from diffbench.denoisers import DENOISERS, PRESETS
from diffbench.denoisers.linear import mkl_is_slow
from diffbench.diffusion import predictor
from diffbench.runs.denoiser import DenoiserRun
from diffbench.sampling.cost import network_evaluations
from diffbench.sampling.guided import guided
from diffbench.sampling.sampler import run_sampler
from diffbench.training.ema import EMA
from diffbench.training.speed import compile_network, float32_products

_LATENT = {"image_size": 32, "channels": 4, "num_classes": 1000, "learn_sigma": True}
OWN: dict[str, dict[str, Any]] = {
    # Two networks of the size of DiT-S/2 at the same input: about 6 GMACs each.
    "DiffiT-S/2": {"name": "diffit-latent", "hidden_size": 384, "depth": 12, "num_heads": 6},
    "ADM-S/32": {"name": "unet", "model_channels": 128, "channel_mult": [1, 2, 2], "num_res_blocks": 2}
    | {"attention_resolutions": [16, 8], "num_head_channels": 64},
}
"""Networks for latents that are in no paper: a registered denoiser and its keys."""
DIGITS = tuple(f"experiments/digits/{name}.yaml" for name in ("dit", "diffit", "diffit-latent", "unet", "ddpmpp"))
SHORT = ("DiT-S/2", "DiffiT-S/2", "ADM-S/32", *DIGITS)
LARGE = {"DiffiT-CIFAR10-H1": 512, "DiT-XL/2": 128, "DiffiT-XL/2": 128, "DDPM++-CIFAR10-cond": 512}
"""Networks for a GPU -> batch size; the one whose compiled form was never measured comes first."""
SAMPLE_STEPS = 2
"""Sampler steps per measurement: vp does not allow one, and Heun's last step takes only one evaluation."""
PRECISION = {"cpu": "32-true", "cuda": "bf16-mixed"}
CONVOLUTIONAL = ("unet", "ddpmpp", "diffit")
TINY: dict[str, dict[str, Any]] = {
    "dit": {"hidden_size": 32, "depth": 2, "num_heads": 4},
    "diffit-latent": {"hidden_size": 32, "depth": 2, "num_heads": 4},
    "diffit": {"channels": [8, 16], "blocks": [1, 1], "num_heads": 2, "time_dim": 16, "norm_groups": 4},
    "unet": {"model_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "num_heads": 2, "norm_groups": 4}
    | {"num_head_channels": None},
    "ddpmpp": {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1},
    "uvit": {"hidden_size": 32, "depth": 2, "num_heads": 4},
    "segformer": {"hidden_sizes": [8, 8, 16], "depths": [1, 1, 1], "num_heads": [1, 1, 2], "decoder_hidden_size": 8}
    | {"time_dim": 16},
}


@dataclass(frozen=True)
class Variant:
    """A way to run a network: overrides of the experiment's keys, and a patch of the code."""

    name: str = "default"
    overrides: tuple[str, ...] = ()
    patched: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def same_network(self) -> bool:
        """Whether this variant can run the default's network, optimizer and average."""
        return all(word.startswith(("trainer.precision=", "trainer.tf32=")) for word in self.overrides)


@contextmanager
def _attention_by_math() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH), patch("diffbench.denoisers.tmsa.needs_chunks", lambda bias: False):
        yield


def variants(config: BenchConfig, model: str, base: RunConfig, device: str) -> list[Variant]:
    """Return the default variant of a network and, if variants are to be measured, the others, the most useful first.

    Args:
        config: the benchmark's config.
        model: the network's name.
        base: its experiment.
        device: cpu or cuda.
    """
    conv, small = base.denoiser.name in CONVOLUTIONAL, model == "DiT-S/2"
    large = LARGE if config.gpu or device == "cuda" else ()
    varied = config.models or ("DiT-S/2", "ADM-S/32", DIGITS[0], *(SHORT if config.full else ()), *large)
    if not config.with_variants or model not in varied:
        return [Variant()]
    found = []
    for text in config.variants or ():
        name, overrides = text.split(":", 1)
        found.append(Variant(name.strip(), tuple(overrides.split())))
    compiled = ("model", "block") if conv else ("block", "model")
    for how in compiled if config.full else compiled[:1] if config.gpu else ():
        found.append(Variant(f"compiled {how}", (f"trainer.compile={how}",)))
    if config.gpu:  # the others were measured before, and time is short
        return [Variant(), *found]
    if conv:
        name, last = ("channels-last", "true") if device == "cuda" else ("channels-first", "false")
        found.append(Variant(name, (f"trainer.channels_last={last}",)))
    if config.full or small:
        name, other = ("fp32", "32-true") if device == "cuda" else ("bf16", "bf16-mixed")
        found.append(Variant(name, (f"trainer.precision={other}",)))
    if device == "cpu" and mkl_is_slow() and not conv and (config.full or small):
        found.append(Variant("linear by MKL", (), partial(patch, "diffbench.denoisers.linear.BY_ONEDNN", False)))
    if not conv:
        found.append(Variant("attention math", (), _attention_by_math))
    return [Variant(), *found]


def selected_models(config: BenchConfig) -> list[str]:
    """Return the names of the networks to measure.

    Raises:
        UserError: if one is unknown.
    """
    if config.models is None:
        return list(LARGE if config.gpu else dict.fromkeys([*SHORT, *PRESETS]) if config.full else SHORT)
    known = [*OWN, *PRESETS]
    for name in config.models:
        if name not in known and Path(name).suffix != ".yaml":
            raise UserError(f"models: unknown network {name!r}; choose from {', '.join(known)}{suggest(name, known)}")
    return config.models


def run_config(config: BenchConfig, model: str, device: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the experiment in which a network is measured, without a data set.

    Raises:
        UserError: if an override is wrong.
    """
    accelerator = "gpu" if device == "cuda" else "cpu"
    trainer: dict[str, Any] = {"accelerator": accelerator, "precision": PRECISION[device], "compile": "none"}
    if Path(model).suffix == ".yaml":
        found = from_layers(read_layers(model))
        if not isinstance(found, RunConfig) or found.autoencoder is not None:
            raise UserError(f"models: {model} does not train a denoiser on images; name one that does, or a preset")
        base = to_dict(found)
        if found.data.name == "digits":
            base["data"] = {"name": "none", "channels": 1, "image_size": found.data.size, "num_classes": 10}
    else:
        base = to_dict(_published(model))
        trainer["batch_size"] = LARGE.get(model, 128) if device == "cuda" else 8
    if config.batch or config.tiny:
        trainer["batch_size"] = config.batch or 4
    if config.tiny:
        base["denoiser"] |= TINY.get(base["denoiser"]["name"], {})
        base["data"]["image_size"] = 16 if base["data"]["image_size"] > 8 else 8
    changed = from_layers([(model, merge(base, {"trainer": trainer})), (COMMAND_LINE, parse_overrides(overrides))])
    assert isinstance(changed, RunConfig)
    return changed


def _published(model: str) -> Any:
    """Return the config of a preset or one of `OWN`, with the process of its paper."""
    shape = _LATENT if model in OWN else PRESETS[model].shape
    if model in OWN:
        denoiser = OWN[model]
    else:
        name = next(name for name, entry in DENOISERS.items() if model in entry.presets)
        denoiser = {"name": name} | vars(PRESETS[model].config)
    classes, learned = shape.get("num_classes", 0), shape.get("learn_sigma")
    starts = {"U-ViT": "vp", "MiT": "vp", "LightningDiT": "flow"}
    plain = {"name": next((name for start, name in starts.items() if model.startswith(start)), "edm")}
    values = {
        "data": {"name": "none", "num_classes": classes} | {k: shape[k] for k in ("image_size", "channels")},
        "denoiser": denoiser,
        "process": {"name": "vp", "variance": "learned_range", "loss": "hybrid"} if learned else plain,
        "optimizer": {"lr": 1e-4},
        "trainer": {"label_dropout": 0.1 if classes and shape.get("null_class", True) else 0.0},
        "sample": {"steps": "250" if learned else "18"},
    }
    return from_dict(values, model)


class Subject:
    """A run's network on a device, with its optimizer and average and one fixed batch.

    Args:
        config: config of the run.
        variant: the variant that `config` sets up.
        device: the device to run on.
        like: another variant of the same network, to share its weights, optimizer and average.
        backend: backend of torch.compile.
    """

    def __init__(
        self,
        config: RunConfig,
        variant: Variant,
        device: torch.device,
        like: "Subject | None" = None,
        backend: str = "inductor",
    ) -> None:
        self.config, self.variant, self.device = config, variant, device
        self.run: DenoiserRun = DenoiserRun(Path("bench"), config) if like is None else like.run
        self.network = self.run.network.to(device)
        self.module = self.run.module()
        self.module.batch_size = config.trainer.batch_size  # there is no trainer to take it from
        how = config.trainer.compile
        assert how != "auto"  # `run_config` sets none, and variants may not use auto
        compile_network(self.network, how, backend)
        optimizer: Any = like.optimizer if like else self.module.configure_optimizers()["optimizer"]
        self.optimizer: torch.optim.Optimizer = optimizer
        if like is not None:
            self.ema = like.ema
        self.process: Any = self.run.process
        self.generator = torch.Generator(device).manual_seed(0)
        self.position = torch.arange(config.trainer.batch_size, device=device)
        self.x0 = rng.normal(rng.key("bench", "x0"), self.position, self.run.shape).clamp(-1, 1)
        self.y = self.position % max(1, self.run.train_set.num_classes)
        self.products = "tf32" if config.trainer.tf32 else config.trainer.precision
        """Precision of matrix products: tf32, or the value of `trainer.precision`."""
        self.settings = replace(config.sample, steps=str(SAMPLE_STEPS)).unguided()

    @cached_property
    def ema(self) -> EMA:
        """The weight average, created on first use."""
        ema = EMA(self.config.ema)
        ema.attach(self.network)
        return ema

    @contextmanager
    def mode(self) -> Iterator[None]:
        """Apply TF32, autocast and the variant's patch inside the block."""
        with ExitStack() as stack:
            stack.enter_context(float32_products(self.config.trainer.tf32))
            if self.config.trainer.precision == "bf16-mixed":
                stack.enter_context(torch.autocast(self.device.type, torch.bfloat16))
            stack.enter_context(self.variant.patched())
            yield

    @torch.no_grad()
    def forward(self) -> None:
        """Run one forward pass."""
        with self.mode():
            self.network(*self.process.inputs(self.x0, self._time()), self.y)

    def bare(self) -> None:
        """Run a hand-written training step: gradient clipping and unkeyed noise, but no average, logging or data
        loading."""
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
        """Run a training step: forward, loss, backward, optimizer, average."""
        self.bare()
        self.ema.update()

    @torch.no_grad()
    def sample(self) -> None:
        """Run `SAMPLE_STEPS` steps of the sampler, without guidance."""
        key = rng.key("bench", "sample")

        def noise(step: int) -> Tensor:
            return rng.normal(key, self.position + len(self.position) * (step + 1), self.run.shape).to(self.x0)

        with self.mode():
            predict = guided(predictor(self.process, self.network), self.y, self.process, self.settings)
            run_sampler(predict, noise, self.process, self.settings)

    def ready(self) -> None:
        """Prepare for training steps: free the gradients, so that they count in a step's memory."""
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)

    def works(self) -> dict[str, Work]:
        """Return the workloads to time: forward, train, sample."""
        return {
            "forward": Work("forward", self.forward, self.network.eval),
            "train": Work("train", self.train, self.ready),
            "sample": Work("sample", self.sample, self.network.eval),
        }

    def evaluations(self) -> int:
        """Return the number of network evaluations in one call of `sample`."""
        return network_evaluations(self.process, self.settings)

    def _time(self) -> Tensor:
        u = torch.rand(len(self.x0), generator=self.generator, device=self.device, dtype=torch.float64)
        return self.process.time(u)
