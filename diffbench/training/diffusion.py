"""The LightningModule that trains any denoiser under any diffusion process."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffbench.config.sections import SampleConfig, ValidationConfig
from diffbench.core import distributed, rng
from diffbench.data.batches import unpack
from diffbench.denoisers.base import Denoiser
from diffbench.denoisers.custom import CustomDenoiser
from diffbench.denoisers.registry import as_values, from_values
from diffbench.diffusion import PROCESSES, LossAware, Process, stratified
from diffbench.diffusion.guidance import null_labels
from diffbench.evaluation.validation_error import batch_errors, bound_metrics
from diffbench.sampling.sampler import Sampler
from diffbench.training.augment import augment
from diffbench.training.halves import loss_in_halves
from diffbench.training.module import OptimizerLike, SchedulerLike, TrainingModule, to_plain
from diffbench.training.recorded import Recorded


class DiffusionModule(TrainingModule):
    """LightningModule that trains a denoiser on the process's loss, with any Trainer and any data loader.

    A batch is images, (images, labels), or a mapping with `image` and `label`. Images are (B, C, H, W), float in
    [-1, 1] or uint8; labels are integers (B,) or weights (B, labels). Every random number is a function of the seed and
    the image's position in the run. Batches from our data modules carry positions; for any other batch, numbering
    continues from all images seen so far, rank after rank, across epochs and fits. A resumed run therefore draws the
    same noise, times, dropped labels and dropout as an uninterrupted one. It also sees the same images if the loader
    resumes in the middle of an epoch, as our data modules do.

    `validate` logs the variational bound in nats per dimension, "val/bound", and the squared error of the noise at each
    log-SNR, "val/level/<log-SNR>", with fixed noise; `test` logs the same as "test/...". `predict` returns samples,
    (B, C, H, W) uint8, for the labels of each batch; a batch may consist of labels only.

    A checkpoint stores the settings as plain values, and those of this package's networks and processes too. Pass all
    others when loading: load_from_checkpoint(path, network=..., optimizer=...).

    Args:
        network: (x, t, y) -> output; its label `null_label` means "no class". y is None if batches have no labels.
        process: the noise process and its loss.
        optimizer: settings, or a callable from parameters to an optimizer; None for AdamW.
        lr_scheduler: a callable from an optimizer to a scheduler, stepped with it.
        lr: learning rate that overrides the optimizer's own.
        seed: of all random numbers.
        label_dropout: fraction of labels replaced by the null label.
        null_label: the null class; None for the network's own, if it has one.
        time_sampling: "uniform", "stratified" over each batch, or "loss_aware", whose history is in checkpoints.
        augment: probability of each of EDM's augmentations, which the network is given as a label.
        log_snr: increasing levels at which `validate` and `test` measure; None for those of `ValidationConfig`.
        sample: settings of `predict`; None for `SampleConfig()`.

    Raises:
        ValueError: if labels are dropped without a null class, or a checkpoint only names its network or process.
    """

    def __init__(
        self,
        network: nn.Module | dict[str, Any] | str,
        process: Process | dict[str, Any] | str,
        optimizer: OptimizerLike | None = None,
        lr_scheduler: SchedulerLike | None = None,
        lr: float | None = None,
        seed: int = 0,
        label_dropout: float = 0.0,
        null_label: int | None = None,
        time_sampling: Literal["uniform", "stratified", "loss_aware"] = "uniform",
        augment: float = 0.0,
        log_snr: Sequence[float] | None = None,
        sample: SampleConfig | dict[str, Any] | None = None,
    ) -> None:
        if isinstance(network, str) or isinstance(process, str):
            missing = f"network={network}" if isinstance(network, str) else f"process={process}"
            raise ValueError(f"the checkpoint does not hold {missing}; pass load_from_checkpoint(path, {missing})")
        net = from_values(network) if isinstance(network, dict) else network
        super().__init__(net, optimizer, lr_scheduler, lr, seed)
        self.process = _process(process)
        for part in net.modules() if isinstance(net, Denoiser) and not isinstance(net, CustomDenoiser) else ():
            if isinstance(label := getattr(part, "augment", None), nn.Module):
                label.requires_grad_(augment > 0)  # DDP would wait for the gradient of an unused layer
        if null_label is None and getattr(net, "null_class", False):
            null_label = int(net.num_classes)  # type: ignore[arg-type]
        if label_dropout and null_label is None:
            raise ValueError("trainer.label_dropout needs a denoiser with a null class")
        self.label_dropout, self.null_label = label_dropout, null_label
        self.time_sampling, self.augment = time_sampling, augment
        self.log_snr = list(ValidationConfig().log_snr if log_snr is None else log_snr)
        self.sample = SampleConfig(**(sample or {})) if isinstance(sample, dict | None) else sample
        self.shape: tuple[int, ...] | None = getattr(net, "shape", None)
        """(C, H, W) of the network's input: its own attribute, else taken from the last batch."""
        if time_sampling not in ("uniform", "stratified", "loss_aware"):
            unknown = f"time_sampling: unknown value {time_sampling!r}"
            raise ValueError(f"{unknown}; choose from uniform, stratified, loss_aware")
        if time_sampling == "loss_aware" and self.process.name != "vp":
            raise ValueError(f"time_sampling: loss_aware counts the steps of vp, not {self.process.name}")
        self.in_halves = False
        """Whether two threads each compute half of a micro-batch; the network must keep no state and draw no random
        numbers, not even for dropout."""
        self._recorded = Recorded(self.network)
        self.history = LossAware(self.process.config.steps) if time_sampling == "loss_aware" else None
        self._step_losses: list[tuple[int, float]] = []
        self._keys = {what: rng.key(seed, what) for what in ("noise", "time", "label")}
        self._measured = 0
        self.save_hyperparameters(
            {
                "network": as_values(net) or type(net).__qualname__,
                "process": _described(self.process),
                "optimizer": to_plain(self.optimizer),
                "lr_scheduler": to_plain(lr_scheduler),
                "lr": lr,
                "seed": seed,
                "label_dropout": label_dropout,
                "null_label": null_label,
                "time_sampling": time_sampling,
                "augment": augment,
                "log_snr": self.log_snr,
                "sample": to_plain(self.sample),
            }
        )

    def draw(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the inputs of the loss: images (B, C, H, W), uniform numbers (B,), noise (B, C, H, W), labels (B,)."""
        x0, position, y = batch["x0"], batch["position"], batch["label"]
        u, drop = rng.uniforms((self._keys["time"], self._keys["label"]), position)
        if self.time_sampling == "stratified":
            u = stratified(u, position % self.batch_size, self.batch_size)
        eps = rng.normal(self._keys["noise"], position, tuple(x0.shape[1:]))
        if self.label_dropout and y is not None:
            dropped = drop < self.label_dropout
            null = null_labels(y, self.null_label)  # type: ignore[arg-type]
            y = torch.where(dropped[:, None] if y.ndim > 1 else dropped, null, y)
        dtype = next(self.network.parameters()).dtype
        return x0.to(dtype), u, eps.to(dtype), y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = self.take(batch)
        x0, u, eps, y = self.draw(batch)
        self.shape = tuple(x0.shape[1:])
        inputs: dict[str, Tensor] = {}
        if self.augment:
            x0, inputs["augment"] = augment(x0, batch["position"], self.seed, self.augment)
        t, weight = (self.process.time(u), None) if self.history is None else self.history.time(u)
        self.seed_dropout(batch)
        batch["time"] = t
        x, time = self.process.inputs(self.process.add_noise(x0, t, eps), t)

        in_halves = self.in_halves and len(u) > 1
        network = self._recorded if in_halves else self.network

        def losses(part: slice) -> Tensor:
            some = {name: value[part] for name, value in inputs.items()}
            output = network(x[part], time[part], None if y is None else y[part], **some)
            return self.process.losses(output, x0[part], t[part], eps[part])

        if in_halves:
            share = (torch.ones_like(u) if weight is None else weight) / len(u)
            loss, each = loss_in_halves(losses, share, self.network.parameters())
        else:
            each = losses(slice(None))
            loss = each.mean() if weight is None else (each * weight.to(each.dtype)).mean()
        if self.history is not None:
            self._remember(t, each.detach().double())
        return loss

    def _remember(self, t: Tensor, losses: Tensor) -> None:
        """Collect a step's losses over ranks and micro-batches, and update the history once the batch is complete."""
        assert self.history is not None
        times, per_image = distributed.all_gather_rows(t).tolist(), distributed.all_gather_rows(losses).tolist()
        self._step_losses += zip(times, per_image, strict=True)
        if len(self._step_losses) >= self.batch_size:
            steps, values = zip(*self._step_losses, strict=True)
            self.history.update(torch.tensor(steps), torch.tensor(values, dtype=torch.float64))
            self._step_losses = []

    def on_validation_epoch_start(self) -> None:
        self._measured = 0

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log "val/bound" and "val/level/<log-SNR>"; see the class."""
        self._measure("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._measure("test", batch)

    def _measure(self, part: str, batch: Any) -> None:
        """Log the errors of a batch; each image's index in the data set determines its noise."""
        found = unpack(batch)
        count, index = len(found["x0"]), found.get("index")
        self.check(None if self._measured else found["x0"], found["label"])
        if index is None:  # Lightning's DistributedSampler deals images to the ranks one by one
            index = (self._measured + torch.arange(count)) * distributed.world_size() + distributed.rank()
        self._measured += count
        errors = batch_errors(self.network, self.process, found["x0"], found["label"], index, self.log_snr).mean(1)
        values = bound_metrics(part, dict(zip(self.log_snr, errors.tolist(), strict=True)))
        size: Any = float(count)  # Lightning averages sizes over ranks, and would truncate the mean of integers
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)

    def sampler(self) -> Sampler:
        """Return a sampler of the current network; ValueError if neither it nor a batch has set the shape yet."""
        if self.shape is None:
            raise ValueError("the shape of samples is unknown until a batch has been trained on; set module.shape")
        return Sampler(self.network, self.process, self.shape, self.null_label, raw=self.shape[0] not in (1, 3))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return samples (B, C, H, W) for a batch or labels (B,): uint8 images, or float32 if they are not images."""
        alone = isinstance(batch, Tensor) and batch.ndim == 1
        found = {"x0": batch, "label": batch} if alone else unpack(batch)
        labels, count, index = found["label"], len(found["x0"]), found.get("index")
        if labels is None:
            labels = torch.full((count,), 0 if self.null_label is None else self.null_label)
        # Ranks may have batches of different sizes.
        first = self._measured + distributed.rank() * 2**32 if index is None else int(index[0])
        self._measured += count
        labels = labels if labels.is_floating_point() else labels.long()
        if labels.ndim == 1 and len(given := labels[labels != (-1 if self.null_label is None else self.null_label)]):
            self.check(None, given)
        return self.sampler()(labels, self.sample, seed=self.seed, first=first)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["shape"] = self.shape
        if self.history is not None:
            checkpoint["loss_history"] = self.history.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.shape = checkpoint["shape"]
        if self.history is not None:
            self.history.load_state_dict(checkpoint["loss_history"])


def _process(process: Process | dict[str, Any]) -> Process:
    if isinstance(process, Process):
        return process
    entry = PROCESSES[process["name"]]
    return entry.build(entry.config(**{key: value for key, value in process.items() if key != "name"}))


def _described(process: Process) -> dict[str, Any] | str:
    """Return a registered process as plain values, any other as its class name."""
    entry = PROCESSES.get(getattr(process, "name", ""))
    if entry is None or type(process) is not entry.build:
        return type(process).__qualname__
    return {"name": process.name, **to_plain(process.config)}
