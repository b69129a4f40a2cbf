"""Sampling from a trained denoiser. The noise of sample i depends only on (seed, i), not on the batch or device."""

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from diffbench.config.sections import SampleConfig
from diffbench.core import rng
from diffbench.core.errors import UserError
from diffbench.core.pixels import to_uint8
from diffbench.core.tensors import eval_mode
from diffbench.diffusion import SAMPLERS, Grid, Predict, Process, StepLimitError, ddim, ddpm, dopri5, predictor
from diffbench.diffusion.samplers import Callback, Noise
from diffbench.sampling.guided import GuidanceModels, guided

CPU_BATCH = 250
"""Maximum batch size on a CPU: batches of 500 exceed its caches and take a fifth to a third more time."""


@dataclass(eq=False)
class Sampler:
    """A sampler that draws images from a denoiser.

    Attributes:
        denoiser: network (x, t, y) -> output, on its device.
        process: the process that the denoiser was trained under.
        shape: (C, H, W) of the denoiser's input.
        null_label: null class of the denoiser, needed for classifier-free guidance; None without one.
        guidance_models: the networks that other kinds of guidance need.
        decode: maps the denoiser's space (B, C, H, W) to pixels (B, 1 or 3, H', W') in [-1, 1], such as an
            autoencoder's decoder; None if the denoiser works on pixels.
        raw: whether to return samples in the denoiser's space, as float32, instead of images.
        name: name in error messages, such as the run folder.
        at_once: number of batches drawn in parallel on a CPU, one per thread; above 1 for stateless networks only.
        values: number of pixel values drawn so far, over all channels.
        clipped: number of values outside [-1, 1] by more than 1/255, half an 8-bit level.
    """

    denoiser: nn.Module
    process: Process
    shape: tuple[int, ...]
    null_label: int | None = None
    guidance_models: GuidanceModels = GuidanceModels()  # noqa: RUF009 (frozen)
    decode: Callable[[Tensor], Tensor] | None = None
    raw: bool = False
    name: str = "denoiser"
    at_once: int = 1
    values: int = field(default=0, init=False)
    clipped: int = field(default=0, init=False)

    def __call__(
        self,
        labels: Tensor,
        config: SampleConfig,
        *,
        seed: int = 0,
        first: int = 0,
        progress: Callable[[int], None] | None = None,
        callback: Callback | None = None,
        check: Callable[[], None] | None = None,
    ) -> Tensor:
        """Draw one image per label, in batches of `batch_size`, which is halved if GPU memory runs out.

        Args:
            labels: (N,) classes, or (N, labels) weights over the network's label table.
            config: sampler, steps, guidance and the rest.
            seed: seed that, with a sample's number, determines its noise.
            first: number of the first sample.
            progress: called with the number of images after each batch.
            callback: called after each step of the first batch with (step, x, predicted x0).
            check: called after each step, from several threads; an exception that it raises stops sampling.

        Returns:
            (N, 1 or 3, H', W') uint8 on the CPU; (N, C, H, W) float32 if `raw`.

        Raises:
            ValueError: if the network or the guidance models do not support the config's guidance.
            UserError: if the network's output is not finite, naming call and noise level; or if an adaptive sampler
                does not reach the end.
        """
        config = config.with_defaults(self.process.name, pixels=self.decode is None and not self.raw)
        parameter = next(self.denoiser.parameters())
        device = parameter.device
        predict, models = predictor(self.process, self._network(config, device)), self.guidance_models.to(device)
        size, failed = self.batch_size(config), threading.Event()

        @torch.no_grad()  # on the inner function, since grad mode is per thread
        def draw(part: Tensor) -> Tensor:
            position, y = (first + part).to(device), labels[part].to(device)

            def after_step(step: int, x: Tensor, x0: Tensor) -> None:
                if failed.is_set():
                    raise CancelledError
                if check:
                    check()
                if callback and not part[0]:
                    callback(step, x, x0)

            def noise(step: int) -> Tensor:
                return rng.normal(rng.key(seed, "sample", step), position, self.shape).to(parameter.dtype)

            guided_predict = guided(predict, y, self.process, config, self.null_label, models)
            try:
                x = run_sampler(guided_predict, noise, self.process, config, after_step)
            except StepLimitError as e:
                raise UserError(f"{self.name}: sample.rtol: {e}") from None
            if not bool(x.isfinite().all()):
                run_sampler(self._until_broken(guided_predict, config), noise, self.process, config)
                raise UserError(f"{self.name}: the {config.sampler} sampler ended in values that are not finite")
            return (x.float() if self.raw else self.pixels(x)).cpu()

        def draw_in_parts(batch: Tensor) -> Tensor:
            nonlocal size
            try:
                return torch.cat([draw(part) for part in batch.split(size)])
            except torch.OutOfMemoryError:  # smaller batches give the same images
                if size == 1:
                    raise
                size = (min(size, len(batch)) + 1) // 2
            return draw_in_parts(batch)  # outside `except`: the traceback keeps the tensors drawn so far alive

        images: list[Tensor] = []
        with eval_mode(self.denoiser), ThreadPoolExecutor(self.at_once) as pool:
            batches = torch.arange(len(labels)).split(size)
            try:
                for drawn in pool.map(draw_in_parts, batches) if self.at_once > 1 else map(draw_in_parts, batches):
                    images.append(self._finished(drawn))
                    if progress:
                        progress(len(drawn))
            except BaseException:
                failed.set()
                raise
        return torch.cat(images)

    def _finished(self, drawn: Tensor) -> Tensor:
        """Convert pixels (B, C, H, W) to uint8 and update the counts; return raw values unchanged."""
        if self.raw:
            return drawn
        if broken := int((~drawn.isfinite()).sum()):
            raise UserError(f"{self.name}: {broken} values of the samples are not finite")
        self.values += drawn.numel()
        self.clipped += int((drawn.abs() > 1 + 1 / 255).sum())
        return to_uint8(drawn)

    def batch_size(self, config: SampleConfig) -> int:
        """Return the batch size: the config's, but at most `CPU_BATCH` on a CPU."""
        on_cpu = next(self.denoiser.parameters()).device.type == "cpu"
        return min(config.batch_size, CPU_BATCH) if on_cpu else config.batch_size

    def pixels(self, x: Tensor) -> Tensor:
        """Decode the denoiser's space (B, C, H, W) to pixels (B, 1 or 3, H', W') in about [-1, 1]."""
        return x if self.decode is None else self.decode(x)

    def images(self, x: Tensor) -> Tensor:
        return to_uint8(self.pixels(x))

    def _network(self, config: SampleConfig, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:

        def in_bfloat16(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                return self.denoiser(x, t, y).to(x.dtype)

        return in_bfloat16 if config.precision == "bf16-mixed" else self.denoiser

    def _until_broken(self, predict: Predict, config: SampleConfig) -> Predict:
        """Wrap a predictor so that it raises at the first prediction that is not finite, naming the call.

        Each check synchronises, so it is used only to draw a failed batch again.
        """
        calls = 0

        def watched(x: Tensor, t: Tensor) -> Any:
            nonlocal calls
            calls += 1
            prediction = predict(x, t)
            if not bool(prediction.x0.isfinite().all() & prediction.eps.isfinite().all()):
                level = float((-0.5 * self.process.log_snr(t[:1])).exp())
                raise UserError(
                    f"{self.name}: the network's output is not finite at call {calls} of the {config.sampler} sampler,"
                    f" time {float(t[0]):g}, noise level sigma/alpha {level:.4g}"
                )
            return prediction

        return watched


def run_sampler(
    predict: Predict, noise: Noise, process: Process, config: SampleConfig, callback: Callback | None = None
) -> Tensor:
    """Turn noise into samples (B, C, H, W) with the config's sampler; `noise(-1)` is the starting noise."""
    c, p, x = config.with_defaults(process.name), cast(Any, process), noise(-1)
    options: dict[str, Any] = {}
    match c.sampler:
        case "ddpm":
            variance = "learned_range" if p.learn_sigma else c.variance
            tables = p.respaced(c.steps)
            return ddpm(predict, x, tables, noise, variance=variance, clip=bool(c.clip), callback=callback)
        case "ddim":
            tables = p.respaced(c.steps)
            return ddim(predict, x, tables, noise, eta=c.eta, clip=bool(c.clip), callback=callback)
        case "dopri5":
            return dopri5(predict, x, p.path, noise, rtol=c.rtol, atol=c.atol, callback=callback)
        case "euler_maruyama":
            grid: Grid = p.sde_grid(c.steps, c.sde_last_step)
            options = {"diffusion": c.sde_diffusion, "strength": c.sde_strength, "last": c.sde_last}
        case _:
            grid = process.grid(c.steps)
            if c.sampler == "heun" and c.s_churn:
                options = {"s_churn": c.s_churn, "s_min": c.s_min, "s_noise": c.s_noise}
                options["s_max"] = math.inf if c.s_max is None else c.s_max
    return SAMPLERS[str(c.sampler)](
        predict, grid.start(x), grid, noise, clip=bool(c.clip), callback=callback, **options
    )


def sample(
    network: nn.Module,
    process: Process,
    n: int | None = None,
    labels: int | Sequence[int] | Tensor | None = None,
    *,
    shape: tuple[int, ...] | None = None,
    null_label: int | None = None,
    seed: int = 0,
    callback: Callback | None = None,
    **settings: Any,
) -> Tensor:
    """Draw samples from a denoiser, on its device.

    Args:
        network: (x, t, y) -> output, trained under `process`.
        process: the process that the network was trained under.
        n: number of samples; by default one per label, or 16 without labels.
        labels: (N,) classes, or one for all; by default the network's classes in turn, or all 0 if it has none.
        shape: (C, H, W) of the network's input; denoisers of this package know theirs.
        null_label: null class of the network, for guidance; denoisers of this package know theirs.
        seed: the noise of sample i depends only on (seed, i), not on the batch or device.
        callback: called after each step of the first batch with (step, x, predicted x0).
        settings: keys of `SampleConfig`, such as steps=50, sampler="ddim", guidance=2.0 or batch_size=100.

    Returns:
        (N, C, H, W) uint8; float32 in the denoiser's space unless there are one or three channels.

    Raises:
        ValueError: if the network has no parameters, the shape is unknown, counts disagree, or a setting is not
            allowed.
    """
    if next(network.parameters(), None) is None:
        raise ValueError("network: has no parameters, from which samples take their device and dtype")
    shape = getattr(network, "shape", None) if shape is None else shape
    if shape is None:
        raise ValueError("shape: give (C, H, W) of the images; this network has no attribute shape")
    if null_label is None and getattr(network, "null_class", False):
        null_label = int(network.num_classes)  # type: ignore[arg-type]
    if labels is None:
        labels = torch.arange(16 if n is None else n) % max(1, int(getattr(network, "num_classes", 1)))
    y = torch.as_tensor(labels)
    y = y.repeat(1 if n is None else n) if y.ndim == 0 else y
    if n is not None and n < 1:
        raise ValueError(f"n: must be at least 1, got {n}")
    if not len(y):
        raise ValueError("labels: at least one is needed, got none")
    if n not in (None, len(y)):
        raise ValueError(f"n: {n} samples, but {len(y)} labels")
    classes = int(getattr(network, "num_classes", 0))
    if classes and y.ndim == 1 and not 0 <= int(y.min()) <= int(y.max()) < classes + (null_label is not None):
        raise ValueError(f"labels: lie in {int(y.min())}..{int(y.max())}, allowed are 0..{classes - 1}")
    raw = shape[0] not in (1, 3)
    sampler = Sampler(network, process, shape, null_label, raw=raw, name=type(network).__name__)
    return sampler(y, SampleConfig(**settings), seed=seed, callback=callback)
