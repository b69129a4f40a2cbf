"""Planted classes of known composition, which are added to a data set: a copy of a class, or a mixture of several."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from diffbench.core.errors import suggest
from diffbench.data.sets import ImageSet


def plant(data: ImageSet, planted: Mapping[str, Sequence[str]]) -> ImageSet:
    """Add classes to a set: each contains copies of the images of its parts, under a new label.

    A class with one part is thus an exact copy of it, and a class with several parts is their mixture.

    Raises:
        ValueError: if a part is not a class of the data, or a planted class has the name of an existing one.
    """
    if not planted:
        return data
    existing = [data.class_names[i] if data.class_names else str(i) for i in range(data.num_classes)]
    images, labels = [data.images], [data.labels]
    for number, (name, parts) in enumerate(planted.items(), start=len(existing)):
        if name in existing:
            raise ValueError(f"data.planted.{name}: {data.name} already has a class of that name; choose another")
        for part in parts:
            if part not in existing:
                known = ", ".join(existing[:20]) or "none, as the data has no classes"
                raise ValueError(
                    f"data.planted.{name}: {part!r} is not a class; choose from {known}{suggest(part, existing)}"
                )
        chosen = torch.isin(data.labels, torch.tensor([existing.index(part) for part in parts]))
        images.append(data.images[chosen])
        labels.append(torch.full((int(chosen.sum()),), number))
    digest = hashlib.sha256(f"{data.fingerprint()} {dict(planted)}".encode()).hexdigest()[:16]
    return replace(
        data,
        images=torch.cat(images),
        labels=torch.cat(labels),
        num_classes=len(existing) + len(planted),
        class_names=(*existing, *planted),
        digest=digest,
        base=data,
    )
