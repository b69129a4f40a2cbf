"""The section `trainer` of a config: length, batch size, intervals, devices and precision."""

from dataclasses import dataclass, field, fields
from typing import Literal

import torch

from diffbench.core.errors import check
from diffbench.denoisers.base import check_positive


@dataclass
class TrainerConfig:
    """Length, batch size, intervals and devices; intervals are in images and rounded up to whole steps."""

    max_images: int = 1_000_000
    """Images seen in total; a larger number extends a finished run."""
    batch_size: int = 128
    """Images per optimizer step, over all devices."""
    accumulate_grad_batches: int = 1
    """Micro-batches per optimizer step."""
    log_images: int = 12_800
    """Images between log entries."""
    validate_images: int = 128_000
    """Images between validations."""
    checkpoint_images: int = 128_000
    """Images between checkpoints."""
    sample_images: int = 256_000
    """Images between grids of samples."""
    logger: list[Literal["tensorboard", "wandb"]] = field(default_factory=lambda: ["tensorboard"])
    """Loggers in addition to the files of the run; wandb (Weights & Biases) stays offline without a login."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: a CUDA GPU if there is one. Apple GPUs cannot be used: times and noise levels need float64."""
    threads: int | Literal["auto"] = "auto"
    """CPU threads per process; auto: PyTorch's default, one per core unless OMP_NUM_THREADS is set. They share the work
    of each layer. In a network below 1e9 multiply-accumulates per forward pass they would wait for each other, so two
    of them train on half a batch each instead, and up to four draw a batch of samples each."""
    devices: int = 1
    """Processes per machine, each with its own device; they share the images of a step."""
    num_nodes: int = 1
    """Machines; for more than one, start the command with torchrun or srun."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """Distribution over processes. ddp (auto): each has a copy of the network; fsdp: each has a shard of the weights,
    their averages and the optimizer state."""
    timeout_s: int = 1800
    """Seconds that a process waits for the others before it gives up."""
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed", "64-true"] = "auto"
    """auto: bf16-mixed for a denoiser on a CUDA GPU that supports bfloat16, else 32-true; config.yaml records which.
    16-mixed scales the loss, and skips steps while it searches for the scale."""
    tf32: bool = False
    """Use TF32 (10 bits of mantissa) for float32 matrix products and convolutions on a CUDA GPU; false: use all 23
    bits, even where PyTorch's default is TF32."""
    max_skipped: int = 10
    """Stop training after this many steps in a row are skipped because a loss or gradient is not finite."""
    deterministic: bool = False
    """Use only deterministic kernels, for an exact resume on a GPU."""
    channels_last: bool | None = None
    """Use the channels-last memory format for convolutions (same results up to rounding); null: on a CPU, where it is
    10% faster. (On an H200 in bf16 it makes DDPM++ 31% and DiffiT 10% slower.)"""
    data_on_device: bool | None = None
    """Keep the training images on the device; null: on a GPU with four times as much free memory."""
    async_checkpoints: bool | None = None
    """Write checkpoints from a copy in memory while training continues; null: on a GPU."""

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
                f"trainer.strategy: {self.strategy} needs several processes, and there is only one; allowed: auto, or"
                " trainer.devices above 1"
            )
        if self.strategy == "fsdp" and self.precision not in ("auto", "32-true", "bf16-mixed"):
            raise ValueError(
                f"trainer.precision: {self.precision} does not work with trainer.strategy=fsdp; allowed: 32-true,"
                " bf16-mixed"
            )

    @property
    def processes(self) -> int:
        return self.devices * self.num_nodes

    @property
    def max_steps(self) -> int:
        return -(-self.max_images // self.batch_size)


def precision_here(settings: TrainerConfig, low: bool) -> Literal["32-true", "bf16-mixed", "16-mixed", "64-true"]:
    """Return the precision that `trainer.precision` means on this machine; `low` lets auto choose bfloat16."""
    if settings.precision != "auto":
        return settings.precision
    gpu = low and settings.accelerator in ("auto", "gpu") and torch.cuda.is_available()
    return "bf16-mixed" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


@dataclass
class DenoiserTrainerConfig(TrainerConfig):
    """Trainer keys of a denoiser's run, in addition to those of every kind of run."""

    label_dropout: float = 0.1
    """Fraction of labels replaced by the null class, for classifier-free guidance."""
    time_sampling: Literal["uniform", "stratified", "loss_aware"] = "uniform"
    """Draw training times from the process's distribution independently, spread evenly over each batch, or weighted by
    past losses (Nichol & Dhariwal 2021, §3.3); loss_aware unpairs the run from others."""
    augment: float = 0.0
    """Probability of each of EDM's non-leaking augmentations; needs a network with an augmentation input."""
    compile: Literal["auto", "none", "block", "model"] = "auto"
    """Compile the whole network or each of its blocks (quicker to compile); same results up to rounding. Needs a C++
    compiler. auto: whichever runs faster, on a GPU if the run is long enough to pay for it; otherwise none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strategy == "fsdp" and self.compile not in ("auto", "none"):
            raise ValueError(
                f"trainer.compile: {self.compile} does not work with trainer.strategy=fsdp; allowed: auto, none, or"
                " trainer.strategy=ddp"
            )
        check(self, "trainer", "lie in [0, 1]", lambda v: 0 <= v <= 1, "augment")
        check(self, "trainer", "lie in [0, 1)", lambda v: 0 <= v < 1, "label_dropout")
