"""The ADM evaluator's files (Dhariwal & Nichol 2021), and its published self-check repeated with our metrics."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from diffbench.core.errors import UserError
from diffbench.core.files import atomic
from diffbench.core.progress import progress
from diffbench.evaluation.images import open_pictures, read_statistics, refuse_to_overwrite
from diffbench.evaluation.reference import BATCH
from diffbench.metrics import Extractor
from diffbench.metrics.functional import frechet, gaussian, inception_score, neighbours
from diffbench.metrics.rows import spread
from diffbench.metrics.suite import KEPT, Reference
from diffbench.runs import foreign

SAMPLES, REFERENCE = "admnet_guided_upsampled_imagenet256.npz", "VIRTUAL_imagenet256_labeled.npz"
PUBLISHED = {
    "inception_score": (215.8370361328125, 0.5),
    "fid": (3.9425574129223264, 0.02),
    "sfid": (6.140433703346162, 0.05),
    "precision": (0.8265, 0.005),
    "recall": (0.5309, 0.005),
}
"""What the evaluator's README states for those two files, and how far another implementation may be off."""


def write_reference(path: Path, extractor: Extractor, reference: Reference, images: Sequence[Tensor]) -> None:
    """Writes a reference file that the ADM evaluator reads: arr_0 (it asks for pictures always), and all of mu, sigma,
    mu_s and sigma_s.

    Args:
        path: an npz that does not exist yet.
        extractor: which must be the published one, with its spatial layer.
        reference: statistics of the whole set.
        images: pictures (C, H, W) uint8 for precision and recall, 10,000 at most as is customary.

    Raises:
        UserError: if the extractor is another, for the evaluator would compare two feature spaces unaware.
    """
    refuse_to_overwrite(path)
    if not extractor.published or reference.spatial is None:
        raise UserError(
            f"{path}: the ADM evaluator reads Inception statistics with a spatial layer, not those of {extractor.name};"
            " allowed: evaluate.extractor=inception with a state dict as evaluate.weights"
        )
    fits = {"mu": reference.fit.mean, "sigma": reference.fit.cov}
    fits |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.cov}
    pictures = rearrange(list(images), "n c h w -> n h w c").expand(-1, -1, -1, 3)
    with atomic(path) as file:
        np.savez(file, allow_pickle=False, arr_0=pictures.numpy(), **{n: t.cpu().numpy() for n, t in fits.items()})


def self_check(samples: Path, reference: Path, extractor: Extractor) -> tuple[str, bool]:
    """The evaluator's numbers of its published samples, by our code, beside the published ones.

    Args:
        samples: the file `SAMPLES`.
        reference: the file `REFERENCE`.
        extractor: `inception` from a state dict.

    Returns:
        A table, and whether every number lies within its tolerance.
    """
    if extractor.spatial is None:
        raise UserError("evaluate.weights: the self-check needs logits and a spatial layer; name a state dict")
    found = numbers(samples, reference, extractor)
    lines = [f"{'':<16} {'here':>12} {'published':>12} {'difference':>12}"]
    right = True
    for name, (want, allowed) in PUBLISHED.items():
        ok = abs(found[name] - want) <= allowed
        right &= ok
        verdict = "" if ok else f"  more than {allowed:g}"
        lines.append(f"{name:<16} {found[name]:>12.4f} {want:>12.4f} {found[name] - want:>+12.4f}{verdict}")
    return "\n".join(lines), right


def numbers(samples: Path, reference: Path, extractor: Extractor) -> dict[str, float]:
    """Inception score, FID, sFID, precision and recall as the ADM evaluator defines them.

    FID and sFID compare with the file's statistics, precision and recall (k=3) with its pictures.
    """
    fits = read_statistics(reference)
    if fits is None or fits[1] is None:
        raise UserError(f"{reference}: must hold arr_0 and all of mu, sigma, mu_s, sigma_s")
    features: dict[str, list[Tensor]] = {"pooled": [], "logits": [], "spatial": []}
    pictures = open_pictures(samples)
    with progress("samples", len(pictures)) as advance:
        for batch in pictures.batches(BATCH):
            found: Any = extractor(batch)
            for name, kept in features.items():
                kept.append(getattr(found, name).cpu())
            advance(len(batch))
    pooled, logits, spatial = (torch.cat(kept) for kept in features.values())
    real = foreign.of_pictures(extractor, reference, KEPT)[0].rows
    shares = neighbours(pooled, real.to(pooled), k=3)
    return {
        "inception_score": inception_score(logits.split(5000)),
        "fid": float(frechet(gaussian(pooled), fits[0])),
        "sfid": float(frechet(gaussian(spatial), fits[1])),
        "precision": shares.precision,
        "recall": shares.recall,
    }


def pictures_for(count: int) -> Tensor:
    """Numbers of the pictures that go into a reference file: 10,000 at most, evenly spread."""
    return spread(count, min(count, KEPT))
