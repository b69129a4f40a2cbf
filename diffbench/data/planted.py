"""Planted classes of known composition, which are added to a data set: a copy of a class, or a mixture of several."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from diffbench.core.errors import check_at_least, suggest
from diffbench.data.sets import ImageSet


@dataclass
class DataConfig:
    """The keys shared by all data sets."""

    num_workers: int = field(default=0, kw_only=True)
    """DataLoader processes; 0 loads in the training process, which is fastest for data in memory."""

    def __post_init__(self) -> None:
        check_at_least(self, "data", num_workers=0)


@dataclass
class PlantedConfig(DataConfig):
    """The keys shared by data sets into which classes can be planted."""

    planted: dict[str, list[str]] = field(default_factory=dict, kw_only=True)
    """Classes to add after the data's own, name -> classes to copy images from: {copy of 3: [3], 0 or 1: [0, 1]}.
    The images are copied in memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, parts in self.planted.items():
            if not parts or len(set(parts)) < len(parts):
                raise ValueError(f"data.planted.{name}: must list different classes, such as [0, 1], got {parts}")


def plant(data: ImageSet, planted: Mapping[str, Sequence[str]]) -> ImageSet:
    """Add classes to a set: each contains copies of the images of its parts, under a label of its own.

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
