"""Scores of an autoencoder's reconstructions of held-out images, as records appended to results.jsonl."""

from collections.abc import Sequence
from typing import Any

import torch

from diffbench.config.kinds import AutoencoderConfig
from diffbench.config.layers import COMMAND_LINE, parse_overrides
from diffbench.config.load import change
from diffbench.core.errors import UserError, suggest
from diffbench.data.coding import reconstruct
from diffbench.data.sets import ImageSet, balanced
from diffbench.evaluation import records, reference
from diffbench.metrics import Extractor
from diffbench.metrics.functional import frechet_distance
from diffbench.metrics.reconstruction import psnr, ssim
from diffbench.metrics.suite import metric_name
from diffbench.runs.autoencoder import AutoencoderRun
from diffbench.runs.build import device_of


def evaluate(run: AutoencoderRun, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Scores the finished autoencoder, with averaged weights, on `evaluate.count` held-out images.

    Args:
        run: a finished run.
        overrides: key=value for the section `evaluate`.

    Returns:
        The record, already appended to the run's results.jsonl: PSNR and SSIM, the Fréchet distance of the
        reconstructions from the same images, and how many the extractor still recognises.
    """
    changes = parse_overrides(overrides)
    for key in changes:
        if key != "evaluate":
            raise UserError(
                f"{COMMAND_LINE}: {key}: not for evaluate here; allowed: evaluate.KEY{suggest(key, ['evaluate'])}"
            )
    config = change(run.config, changes)
    try:
        run.check(config)
    except ValueError as e:
        raise UserError(f"{COMMAND_LINE}: {e}") from None
    device = device_of(config.trainer.accelerator)
    net = run.trained.to(device)
    chosen = balanced(run.held_out.labels, config.evaluate.count)
    images, labels = run.held_out.images[chosen], run.held_out.labels[chosen]
    c, h, w = net.config.latent_shape(tuple(images.shape[1:]))
    restored, divergence = reconstruct(net, images)
    n, judge = len(images), _judge(config, run.train_set, device)
    record = {
        **records.surroundings(judge, device),
        "images_seen": run.images_seen,
        "ema": run.ema,
        "data": run.train_set.fingerprint(),
        "data_name": run.train_set.name,
        "reference": {"split": "held-out", "count": n},
        "autoencoder": net.fingerprint,
        "numbers": c * h * w,
        f"psnr@{n}": psnr(restored, images),
        f"ssim@{n}": ssim(restored, images),
        f"kl_nats@{n}": float(divergence.double().mean()),
    }
    if judge is not None:
        seen, real = ([judge(part) for part in a.split(reference.BATCH)] for a in (restored, images))
        pooled = [torch.cat([part.pooled.cpu() for part in parts]) for parts in (seen, real)]
        record[metric_name("reconstruction_fd", judge, n)] = frechet_distance(*pooled)
        if judge.judges_labels:
            found = torch.cat([part.logits.argmax(1).cpu() for part in seen if part.logits is not None])
            record[metric_name("label_accuracy", judge, n)] = float((found == labels).double().mean())
    run.add_result(record)
    return record


def _judge(config: AutoencoderConfig, data: ImageSet, device: torch.device) -> Extractor | None:
    """The extractor, or None with a line where it cannot be made: PSNR and SSIM need none."""
    try:
        return reference.judge(config.evaluate.extractor, config.evaluate.weights, data, device)
    except ValueError as e:
        print(f"no Fréchet distance: {e}", flush=True)
        return None
