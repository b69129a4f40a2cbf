"""Samples from a trained denoiser: sample i's noise is a function of (seed, i), whatever the batch or device."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffbench.config.sample_sections import SampleConfig
from diffbench.core import collectives as together
from diffbench.core import rng
from diffbench.core.pixels import to_uint8
from diffbench.denoisers.tmsa import frozen_weights
from diffbench.diffusion import Churn, Predict, Process, predictor
from diffbench.diffusion.pairs import ON_GRID, ON_PATH, ON_TABLES, PAIRS
from diffbench.sampling.fast import Graphed, Network, in_bfloat16
from diffbench.sampling.guided import Helpers, guided

Noise = Callable[[int], Tensor]
Callback = Callable[[int, Tensor, Tensor], None]


@torch.no_grad()
def generate(
    denoiser: nn.Module,
    process: Process,
    config: SampleConfig,
    labels: Tensor,
    shape: tuple[int, ...],
    *,
    null_label: int | None = None,
    helpers: Helpers = Helpers(),  # noqa: B008 (frozen)
    seed: int = 0,
    first: int = 0,
    decode: Callable[[Tensor], Tensor] = to_uint8,
    progress: Callable[[int], None] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Images of the given labels, in batches of `config.batch_size`, or halves of it where a GPU's memory is too small.

    Args:
        denoiser: network (x, t, y) -> output, on its device.
        process: the process that it was trained under.
        config: sampler, steps, guidance and the rest.
        labels: (N,) classes.
        shape: (C, H, W) of what the denoiser works on.
        null_label: the network's null class, needed for classifier-free guidance.
        helpers: the networks that other guidance needs.
        seed: with a sample's number it fixes its noise.
        first: number of the first sample.
        decode: what the denoiser works on, (B, C, H, W), to pictures (B, 1 or 3, H', W') uint8.
        progress: called with the number of images done after each batch.
        callback: called after each step of each batch with (step, x, predicted x0).

    Returns:
        (N, 1 or 3, H', W') uint8 on the CPU.

    Raises:
        ValueError: where guidance is asked for that the network or the helpers do not allow.
        RuntimeError: where the network put out non-finite values, naming step and noise level.
    """
    parameter = next(denoiser.parameters())
    training = denoiser.training
    denoiser.eval()
    predict, helpers = predictor(process, _fast(denoiser, config, parameter.device)), helpers.to(parameter.device)

    def draw(position: Tensor, y: Tensor) -> Tensor:
        def noise(step: int) -> Tensor:
            return rng.normal(rng.key(seed, "sample", step), position, shape).to(parameter.dtype)

        ask = guided(predict, y, process, config, null_label, helpers)
        x = walk(ask, noise, process, config, callback)
        if not bool(x.isfinite().all()):
            walk(_until_broken(ask, process, config), noise, process, config)
            raise RuntimeError(f"the {config.sampler} sampler ended in non-finite values")
        return decode(x).cpu()

    images: list[Tensor] = []
    done, size = 0, config.batch_size
    with frozen_weights(denoiser):
        while done < len(labels):
            part = slice(done, min(done + size, len(labels)))
            position = torch.arange(first + part.start, first + part.stop, device=parameter.device)
            try:
                images.append(draw(position, labels[part].to(parameter.device)))
            except torch.OutOfMemoryError:  # smaller batches give the same images
                if size == 1:
                    raise
                size = (min(size, len(labels) - done) + 1) // 2
                continue
            done = part.stop
            if progress:
                progress(done)
    denoiser.train(training)
    return torch.cat(images)


def generate_together(
    denoiser: nn.Module, process: Process, config: SampleConfig, labels: Tensor, shape: tuple[int, ...], **options: Any
) -> Tensor:
    """The images of `generate`, of which each rank draws a share; all get all of them."""
    if len(labels) < together.size():  # a share of nothing has no shape
        return generate(denoiser, process, config, labels, shape, **options)
    mine = together.share(len(labels))
    return together.rows(generate(denoiser, process, config, labels[mine], shape, first=int(mine[0]), **options))


def _fast(denoiser: nn.Module, config: SampleConfig, device: torch.device) -> Network:
    """The network as the config's keys of speed have it."""
    network: Network = in_bfloat16(denoiser, device) if config.precision == "bf16-mixed" else denoiser
    if not config.cuda_graphs:
        return network
    if device.type != "cuda":
        print(f"note: sample.cuda_graphs: off, the network is on {device.type}")
        return network
    return Graphed(network)


def walk(
    predict: Predict, noise: Noise, process: Process, config: SampleConfig, callback: Callback | None = None
) -> Tensor:
    """The way from noise to a sample (B, C, H, W) by the config's sampler; `noise(-1)` is the start."""
    name, start = config.sampler or PAIRS[process.name][0], noise(-1)
    clip = name in ON_TABLES if config.clip is None else config.clip
    if name in ON_PATH:
        path = process.path  # type: ignore[attr-defined]
        return ON_PATH[name](predict, start, path, noise, rtol=config.rtol, atol=config.atol, callback=callback)
    if name in ON_TABLES:
        tables = process.tables.respaced(config.steps)  # type: ignore[attr-defined]
        if name == "ddim":
            return ON_TABLES[name](predict, start, tables, noise, eta=config.eta, clip=clip, callback=callback)
        variance = "learned_range" if process.learn_sigma else config.variance
        return ON_TABLES[name](predict, start, tables, noise, variance=variance, clip=clip, callback=callback)
    options: dict[str, Any] = {}
    points = process.grid(config.steps) if name != "euler_maruyama" else None
    if points is None:
        points = process.sde_grid(config.steps, config.sde_last_step)  # type: ignore[attr-defined]
        options = {"diffusion": config.sde_diffusion, "strength": config.sde_strength, "last": config.sde_last}
    elif name == "heun" and config.s_churn:
        high = math.inf if config.s_max is None else config.s_max
        options["churn"] = Churn(config.s_churn, config.s_min, high, config.s_noise)
    return ON_GRID[name](predict, points.start(start), points, noise, clip=clip, callback=callback, **options)


def _until_broken(predict: Predict, process: Process, config: SampleConfig) -> Predict:
    """A predictor that names the step at which a prediction is not finite. Looking costs a synchronisation each time:
    a failed batch alone is walked again so, to the same end."""
    asked = 0

    def watched(x: Tensor, t: Tensor) -> Any:
        nonlocal asked
        asked += 1
        prediction = predict(x, t)
        if not bool(prediction.x0.isfinite().all() & prediction.eps.isfinite().all()):
            level = float((-0.5 * process.log_snr(t[:1])).exp())
            raise RuntimeError(
                f"the network's output is not finite at call {asked} of the {config.sampler} sampler, time"
                f" {float(t[0]):g}, noise level sigma/alpha {level:.4g}"
            )
        return prediction

    return watched
