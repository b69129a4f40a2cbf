"""Faster ways to the same numbers: compilation, memory that stays in the process, and TF32."""

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
"""FLOPs from which compiling on a GPU pays. On an H200 in bf16 it took 40 to 80 s, and a step of DiT-XL/2 and of DDPM++
then 77% and 67% of its time: even after 5.5e16 FLOPs (77,000 images) and 1.2e16 (340,000)."""

WORTH_THREADS = 1e9
"""Multiply-accumulates of a forward pass from which several threads share each layer. In the digits' networks (3e8)
they wait for each other everywhere: beside one other busy process two train at 0.01 to 0.02 of the rate of one."""


def compile_here(network: nn.Module, asked: Literal["auto", "none", "block", "model"], flops: float, gpu: bool) -> How:
    """The meaning of `trainer.compile` here: auto compiles on a GPU, where there is a compiler and enough work to come.

    A transformer is compiled by block, a network of convolutions (most of its weights) as a whole: the faster way for
    each, on an H200.
    """
    if asked != "auto":
        return asked
    if not gpu or flops < WORTH_COMPILING:
        return "none"
    if (name := missing_compiler()) is not None:
        print(f"note: trainer.compile=auto compiles nothing: there is no {name}")
        return "none"
    kernels = [p.numel() for p in network.parameters() if p.ndim == 4 and p.shape[-1] > 1]
    how: How = "model" if 2 * sum(kernels) > sum(p.numel() for p in network.parameters()) else "block"
    print(f"trainer.compile: {how} (auto); the first step waits for the compiler")
    return how


def use_threads(asked: int | Literal["auto"], macs: float, divides: bool) -> int:
    """Sets the number of CPU threads that share a layer in this process: `trainer.threads`, one for a small network.

    It follows from the network, not from the load, so that a resumed run keeps its bits.

    Args:
        asked: the key's value; auto is PyTorch's number, which OMP_NUM_THREADS sets.
        macs: multiply-accumulates of a forward pass of a micro-batch; infinite on a GPU.
        divides: whether halves of a micro-batch may be computed at a time. Threads that were asked for share the layers
            of a small network that cannot use them otherwise.

    Returns:
        The number of batches, or halves of one, to compute at a time, each on one core: as many as there are threads,
        four at most (samples are stored by the thousand); one where threads share a layer.
    """
    threads = _own_threads() if asked == "auto" else asked  # PyTorch's own, before the first change
    chosen = asked != "auto" or {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & set(os.environ)
    apart = macs < WORTH_THREADS and (divides or not chosen)
    torch.set_num_threads(1 if apart else threads)
    return min(4, threads) if apart else 1


@cache
def _own_threads() -> int:
    return torch.get_num_threads()


def missing_compiler() -> str | None:
    """The C++ compiler that torch.compile looks for, $CXX or g++, if there is none of that name."""
    name = os.environ.get("CXX", "g++")
    return name if shutil.which(name) is None else None


def compile_network(network: nn.Module, how: How, backend: str = "inductor") -> None:
    """Compiles a network in place, as a whole or block by block; names of weights and the weights stay as they are.

    Blocks of one shape share what is compiled, so that a deep network waits no longer than a shallow one.
    """
    if how == "none":
        return
    import torch._dynamo  # seconds
    import torch._inductor.config

    torch._inductor.config.fallback_random = True  # the dropout of uncompiled code
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 64)  # a U-Net has as many kinds of blocks
    for module in [network] if how == "model" else blocks(network):
        module.compile(backend=backend)


def blocks(network: nn.Module) -> list[nn.Module]:
    """The repeated parts of a network: the members of its module lists, but for single layers."""
    lists = [m for m in network.modules() if isinstance(m, nn.ModuleList)]
    members = [member for found in lists for member in found if not isinstance(member, nn.ModuleList)]
    return [m for m in members if next(m.children(), None) is not None]


def keep_memory() -> None:
    """Makes glibc keep freed memory in this process, in blocks of up to 32 MiB, instead of returning it in each step.

    The kernel clears a page before it hands it out again: on two CPU cores that is up to a seventh of a training
    step's time. Peak memory stays the same. With another C library than glibc this does nothing.
    """
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 32 * 2**20)


@contextlib.contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Gives float32 products and convolutions on a CUDA GPU TF32's 10 bits of mantissa, or all 23, in the block."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with warnings.catch_warnings():
        if not tf32:  # as the config says; inductor advises otherwise
            warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
        try:
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = tf32
            yield
        finally:
            torch.set_float32_matmul_precision(before[0])
            torch.backends.cudnn.allow_tf32 = before[1]
