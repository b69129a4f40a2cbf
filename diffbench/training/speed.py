"""Speed settings: compilation, CPU threads, memory kept by the process, and TF32."""

import contextlib
import ctypes
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

import torch
from torch import nn

How = Literal["none", "block", "model"]
WORTH_COMPILING = 5e16
"""FLOPs of a run from which compiling on a GPU pays off. On an H200 in bf16, compiling took 40 to 80 s and cut steps of
DiT-XL/2 and DDPM++ to 77% and 67% of their time: break-even at 5.5e16 FLOPs (77,000 images) and 1.2e16 (340,000)."""

WORTH_THREADS = 1e9
"""Multiply-accumulates of a forward pass from which several threads share each layer. In the digits networks (3e8) they
mostly wait for each other: next to one busy process, two threads train at 0.01 to 0.02 of the rate of one."""


def compile_here(network: nn.Module, mode: How | Literal["auto"], flops: float, gpu: bool) -> How:
    """Resolve `trainer.compile`: auto compiles on a GPU if there is a compiler and the run takes enough FLOPs.

    With auto, a network whose weights are mostly convolutions is compiled as a whole, any other one block by block: the
    faster way for each on an H200.
    """
    if mode != "auto":
        return mode
    if not gpu or flops < WORTH_COMPILING:
        return "none"
    if (name := missing_compiler()) is not None:
        print(f"note: trainer.compile=auto does not compile: the C++ compiler {name} was not found")
        return "none"
    kernels = [p.numel() for p in network.parameters() if p.ndim == 4 and p.shape[-1] > 1]
    how: How = "model" if 2 * sum(kernels) > sum(p.numel() for p in network.parameters()) else "block"
    print(f"trainer.compile: {how} (auto); the first step waits for the compiler")
    return how


def use_threads(setting: int | Literal["auto"], macs: float, divides: bool) -> int:
    """Set how many CPU threads of this process share each layer: one for a small network, else `trainer.threads`.

    The choice depends on the network and not on the load, so a resumed run stays bit-identical.

    Args:
        setting: value of `trainer.threads`; auto is PyTorch's default, which OMP_NUM_THREADS sets.
        macs: multiply-accumulates of a forward pass of a micro-batch; infinite on a GPU.
        divides: whether the halves of a micro-batch may be computed in parallel. If not, a small network uses several
            threads only if their number was set explicitly, and they share its layers.

    Returns:
        The number of batches, or halves of one, to compute in parallel on one core each: the number of threads, at most
        four (samples are stored by the thousand); one if the threads share layers.
    """
    threads = _default_threads() if setting == "auto" else setting
    chosen = setting != "auto" or {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & set(os.environ)
    apart = macs < WORTH_THREADS and (divides or not chosen)
    torch.set_num_threads(1 if apart else threads)
    return min(4, threads) if apart else 1


@cache
def _default_threads() -> int:
    """Return PyTorch's own number of threads; cached before this module first changes it."""
    return torch.get_num_threads()


def missing_compiler() -> str | None:
    """Return the name of torch.compile's C++ compiler, $CXX or g++, if it is not installed; else None."""
    name = os.environ.get("CXX", "g++")
    return name if shutil.which(name) is None else None


def compile_network(network: nn.Module, how: How, backend: str = "inductor") -> None:
    """Compile a network in place, as a whole or block by block; its weights and their names do not change.

    Blocks of the same shape share compiled code, so a deep network compiles as fast as a shallow one.
    """
    if how == "none":
        return
    import torch._dynamo  # takes seconds
    import torch._inductor.config

    torch._inductor.config.fallback_random = True  # draw the same dropout as uncompiled code
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 64)  # a U-Net has that many kinds of blocks
    for module in [network] if how == "model" else blocks(network):
        module.compile(backend=backend)


def blocks(network: nn.Module) -> list[nn.Module]:
    """Return the repeated parts of a network: the members of its module lists that have submodules."""
    lists = [m for m in network.modules() if isinstance(m, nn.ModuleList)]
    members = [member for found in lists for member in found if not isinstance(member, nn.ModuleList)]
    return [m for m in members if next(m.children(), None) is not None]


def keep_memory() -> None:
    """Make glibc keep freed blocks of up to 32 MiB in this process instead of returning them at every step.

    The kernel clears each page before it hands it out again, which takes up to a seventh of a training step on two CPU
    cores. Peak memory does not change. Without glibc, this does nothing.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in malloc.h
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 32 * 2**20)


@contextlib.contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Allow or forbid TF32 (10 mantissa bits, not 23) in float32 products and convolutions on a GPU in the block."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with warnings.catch_warnings():
        if not tf32:  # inductor advises to turn it on, but the config says no
            warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
        try:
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = tf32
            yield
        finally:
            torch.set_float32_matmul_precision(before[0])
            torch.backends.cudnn.allow_tf32 = before[1]
