"""The section `trainer` of a config: length, batch, cadence, devices and precision."""

from dataclasses import dataclass, field, fields
from typing import Literal

import torch

from diffbench.core.errors import check
from diffbench.denoisers.base import check_positive


@dataclass
class TrainerConfig:
    """Length, batch and cadence; all intervals are in images and rounded up to whole steps."""

    max_images: int = 1_000_000
    """Images to see in all; a longer run extends a finished one."""
    batch_size: int = 128
    """Images of one optimizer step, over all devices."""
    accumulate_grad_batches: int = 1
    """Micro-batches that make up a step."""
    log_images: int = 12_800
    validate_images: int = 128_000
    checkpoint_images: int = 128_000
    sample_images: int = 256_000
    logger: list[Literal["tensorboard", "wandb"]] = field(default_factory=lambda: ["tensorboard"])
    """Loggers of numbers and images besides the run folder; wandb (Weights & Biases) stays offline without a login."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: a CUDA GPU where there is one. Apple's have no float64, in which times and noise levels are computed."""
    threads: int | Literal["auto"] = "auto"
    """CPU threads of a process; auto: PyTorch's number, one for each core unless OMP_NUM_THREADS says another. They
    share each layer, except in a network of less than 1e9 multiply-accumulates a step, where they would wait for each
    other: there two of them train on half a batch each, and up to four draw a batch of samples each."""
    devices: int = 1
    """Processes on each machine, each with a device of its own; they share a step's images."""
    num_nodes: int = 1
    """Machines; on several of them torchrun or srun starts the command."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """Sharing of the network among processes: ddp (auto): each holds all of it; fsdp: each holds a part of the
    weights, the averages and the optimizer's state."""
    timeout_s: int = 1800
    """Seconds that a process waits for the others before it gives up."""
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed", "64-true"] = "auto"
    """auto: bf16-mixed for a denoiser on a CUDA GPU that knows bfloat16, else 32-true; config.yaml holds which.
    16-mixed scales the gradients, and skips steps while it looks for the scale."""
    tf32: bool = False
    """Products and convolutions of float32 on a CUDA GPU with 10 bits of mantissa; false: all 23, also where PyTorch
    would not."""
    max_skipped: int = 10
    """Steps in a row that are skipped, because a loss or gradient is not finite, until training stops."""
    deterministic: bool = False
    channels_last: bool | None = None
    """Keep convolutions in channels-last order, the same to rounding; null: on a CPU, where they are a tenth faster.
    (DDPM++ and DiffiT on an H200 in bf16 are 31% and 10% slower so.)"""
    data_on_device: bool | None = None
    """Keep the training part on the device; null: on a GPU with four times the room."""
    async_checkpoints: bool | None = None
    """Writes resume states while training goes on, from a copy in memory; null: on a GPU."""

    def __post_init__(self) -> None:
        names = ["max_images", "batch_size", "accumulate_grad_batches", "max_skipped"]
        names += ["devices", "num_nodes", "timeout_s"]
        names += [f.name for f in fields(self) if f.name.endswith("_images")]
        check_positive(self, *names, section="trainer")
        if self.threads != "auto":
            check_positive(self, "threads", section="trainer")
        parts = self.accumulate_grad_batches
        if self.batch_size % parts:
            raise ValueError(
                f"trainer.accumulate_grad_batches: {parts} must divide trainer.batch_size={self.batch_size}"
            )
        if self.batch_size % (parts * self.processes):
            raise ValueError(
                f"trainer.batch_size: {self.batch_size} must be a multiple of trainer.devices={self.devices} x"
                f" trainer.num_nodes={self.num_nodes} x trainer.accumulate_grad_batches={parts}"
            )
        if self.strategy != "auto" and self.processes == 1:
            raise ValueError(
                f"trainer.strategy: {self.strategy} shares work between processes, and here is one; allowed: auto, or"
                " trainer.devices above 1"
            )
        if self.strategy == "fsdp" and self.precision not in ("auto", "32-true", "bf16-mixed"):
            raise ValueError(
                f"trainer.precision: {self.precision} does not go with trainer.strategy=fsdp; allowed: 32-true,"
                " bf16-mixed"
            )

    @property
    def processes(self) -> int:
        return self.devices * self.num_nodes

    @property
    def max_steps(self) -> int:
        return -(-self.max_images // self.batch_size)


def precision_here(settings: TrainerConfig, low: bool) -> Literal["32-true", "bf16-mixed", "16-mixed", "64-true"]:
    """The precision that `trainer.precision` means on this machine; `low` lets auto take bfloat16."""
    if settings.precision != "auto":
        return settings.precision
    there = low and settings.accelerator in ("auto", "gpu") and torch.cuda.is_available()
    return "bf16-mixed" if there and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


@dataclass
class DenoiserTrainerConfig(TrainerConfig):
    """A denoiser's trainer keys, beside those of every kind of run."""

    label_dropout: float = 0.1
    """Share of labels replaced by the null class, for classifier-free guidance."""
    time_sampling: Literal["uniform", "stratified", "loss_aware"] = "uniform"
    """Draws training times over the process's own distribution: one by one, spread evenly over each batch, or
    by the size of past losses (Nichol & Dhariwal 2021, §3.3), which unpairs the run from others."""
    augment: float = 0.0
    """Probability of each non-leaking change of EDM's augmentation; needs a network with an augmentation input."""
    compile: Literal["auto", "none", "block", "model"] = "auto"
    """Compiles the network, or each of its blocks (less waiting): the same to rounding. Needs a C++ compiler. `auto`
    takes the faster of the two on a GPU where the run is long enough to pay for it, and none elsewhere."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strategy == "fsdp" and self.compile not in ("auto", "none"):
            raise ValueError(
                f"trainer.compile: {self.compile} does not go with trainer.strategy=fsdp; allowed: auto, none, or"
                " trainer.strategy=ddp"
            )
        check(self, "trainer", "lie in 0 to 1", lambda v: 0 <= v <= 1, "augment")
        check(self, "trainer", "lie in [0, 1)", lambda v: 0 <= v < 1, "label_dropout")
