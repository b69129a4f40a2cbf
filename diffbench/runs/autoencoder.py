"""An autoencoder's run: its training, its scores, and the folder in diffusers' format that it leaves."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffbench.autoencoders import KLAutoencoder, io, remove_variance_
from diffbench.config.kinds import AutoencoderConfig
from diffbench.config.layers import located, parse_overrides, refuse_unknown
from diffbench.config.load import change
from diffbench.core.errors import UserError
from diffbench.data.coding import reconstruct, side_by_side, spread
from diffbench.denoisers.flops import Cost, measure
from diffbench.evaluation import reference
from diffbench.metrics import Extractor
from diffbench.metrics.extractors.base import check
from diffbench.metrics.frechet import frechet_distance
from diffbench.metrics.reconstruction import psnr, ssim
from diffbench.metrics.registry import metric_name
from diffbench.runs import build, checks
from diffbench.runs.base import Run
from diffbench.runs.build import INSIDE

if TYPE_CHECKING:
    from diffbench.training.autoencoder import AutoencoderModule, Features


VALIDATED = 1000
"""Number of held-out images reconstructed during training; evaluation uses `evaluate.count`."""


class AutoencoderRun(Run[AutoencoderConfig]):
    """The run of an autoencoder."""

    kind = "autoencoder"

    def build(self) -> nn.Module:
        return KLAutoencoder(self.config.network.for_channels(self.facts.shape[0]))

    def count(self) -> Cost:
        with torch.device("meta"):
            return measure(self.build(), torch.empty(1, *self.facts.shape))

    @classmethod
    def check(cls, config: AutoencoderConfig) -> None:
        super().check(config)
        shape = config.data.shape
        with located(key="network.block_out_channels"):
            config.network.for_channels(shape[0]).latent_shape(shape)
        if config.loss.perceptual is not None:
            with _perceptual():
                checks.check_named_extractor(config.loss.perceptual, None, shape)
        train_set, _ = build.load_data(config)
        if config.loss.perceptual is not None:
            with _perceptual():
                check(config.loss.perceptual, reference.extractor_request(train_set, None))
                checks.check_custom_extractor(config.loss.perceptual, None, train_set)

    def module(self) -> "AutoencoderModule":
        from diffbench.training.autoencoder import AutoencoderModule

        c, net = self.config, self.network
        assert isinstance(net, KLAutoencoder)
        return AutoencoderModule(net, c.loss, c.optimizer, c.seed_of("noise"), self._features())

    def _features(self) -> "Features | None":
        if self.config.loss.perceptual is None:
            return None
        extractor = reference.make_extractor(self.config.loss.perceptual, None, self.train_set)

        def features(x: Tensor) -> Tensor:
            if extractor.device != x.device:
                extractor.to(x.device)
            return extractor.run(extractor.prepare(((x + 1) * 127.5).expand(-1, extractor.channels, -1, -1))).pooled

        return features

    def callbacks(self) -> "list[Any]":
        from diffbench.training.callbacks import ReconstructionGrid, Reconstructions

        t, data = self.config.trainer, self.held_out.balanced_subset(VALIDATED)
        return [Reconstructions(data, t.validate_images), ReconstructionGrid(data, t.sample_images)]

    def finish(self) -> None:
        """Write the averaged network with its latent scale to `<folder>/autoencoder`."""
        self.use_average()
        place, notes = self.folder / INSIDE, {"images": str(self.images_seen), "ema": str(self.ema)}
        if io.read_notes(place).items() >= notes.items():
            return
        net = self.network
        assert isinstance(net, KLAutoencoder)
        if self.config.loss.kl_weight == 0:
            remove_variance_(net)
        print(f"{self.folder}: measuring the scale of the latents of {len(self.train_set):,} images", flush=True)
        centre, deviation = spread(net, self.train_set.images)
        net.config = dataclasses.replace(net.config, scaling_factor=1 / deviation, shift_factor=centre)
        io.save(net, place, notes)

    def side_by_side(self, n: int) -> Tensor:
        """Return rows of the first n held-out images, each followed by a row of their reconstructions."""
        return side_by_side(self.trained, self.held_out.images[:n])

    @property
    def trained(self) -> KLAutoencoder:
        """The network with its latent scale, as used by `autoencoder: RUN`; UserError if training is not complete."""
        try:
            return io.load(self.folder / INSIDE)
        except ValueError as e:
            raise UserError(str(e)) from None

    def score(self, overrides: Sequence[str] = ()) -> dict[str, Any]:
        """Score the averaged network of a complete run on `evaluate.count` held-out images, or all if there are fewer.

        Args:
            overrides: key=value for the section `evaluate`.

        Returns:
            The record, already appended to the run's results.jsonl: PSNR and SSIM, the Fréchet distance between
            reconstructions and images, and the share of reconstructions that the extractor classifies correctly.
        """
        changes = parse_overrides(overrides)
        refuse_unknown(changes, "evaluate.KEY", why="not for evaluate")
        config = change(self.config, changes)
        with located():
            checks.refuse_unused(changes.get("evaluate", {}), ("count", "extractor", "weights"))
            self.check(config)
        device = build.device_of(config.trainer.accelerator)
        net = self.trained.to(device)
        part = reference.choose_first(self.held_out, "held-out", min(config.evaluate.count, len(self.held_out)))
        images, labels = self.held_out.images[part.index], part.labels
        restored, divergence = reconstruct(net, images)
        n, extractor = len(images), self._extractor(config, device)
        c, h, w = net.config.latent_shape(tuple(images.shape[1:]))
        record = {
            **self.provenance(extractor),
            "reference": {"split": "held-out", "count": n},
            "autoencoder": net.fingerprint,
            "numbers": c * h * w,
            f"psnr@{n}": psnr(restored, images),
            f"ssim@{n}": ssim(restored, images),
            f"kl_nats@{n}": float(divergence.double().mean()),
        }
        if extractor is not None:
            fake, real = ([extractor(part) for part in a.split(reference.BATCH)] for a in (restored, images))
            pooled = [torch.cat([part.pooled.cpu() for part in parts]) for parts in (fake, real)]
            record[metric_name("reconstruction_fd", extractor, n)] = frechet_distance(*pooled)
            if extractor.predicts_labels:
                classes = torch.cat([part.logits.argmax(1).cpu() for part in fake if part.logits is not None])
                record[metric_name("label_accuracy", extractor, n)] = float((classes == labels).double().mean())
        self.add_result(record)
        return record

    def _extractor(self, config: AutoencoderConfig, device: torch.device) -> Extractor | None:
        """Make the extractor; if that fails, print why and return None, since PSNR and SSIM need none."""
        try:
            return reference.run_extractor(config, self.train_set, device)
        except ValueError as e:
            print(f"no Fréchet distance: {e}", flush=True)
            return None


@contextlib.contextmanager
def _perceptual() -> Iterator[None]:
    """Context manager in which an extractor's errors name the key of the loss."""
    try:
        yield
    except ValueError as e:
        raise ValueError(str(e).replace("evaluate.extractor", "loss.perceptual", 1)) from None
