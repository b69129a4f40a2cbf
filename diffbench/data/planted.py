"""Classes planted into a data set, whose composition is known: a copy of a class, or a mixture of several."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from diffbench.core.errors import check_least, suggest
from diffbench.data.sets import ImageSet


@dataclass
class DataConfig:
    """The key of every data set."""

    num_workers: int = field(default=0, kw_only=True)
    """Loader processes; 0 loads in the training process, the fastest for data in memory."""

    def __post_init__(self) -> None:
        check_least(self, "data", num_workers=0)


@dataclass
class PlantedConfig(DataConfig):
    """The keys of every data set that has classes."""

    planted: dict[str, list[str]] = field(default_factory=dict, kw_only=True)
    """Classes added after the data's own, name -> classes whose images it also has: {copy of 3: [3], 0 or 1: [0, 1]}.
    The images are copied in memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, parts in self.planted.items():
            if not parts or len(set(parts)) < len(parts):
                raise ValueError(f"data.planted.{name}: must be a list of different classes, as [0, 1], got {parts}")


def plant(data: ImageSet, planted: Mapping[str, Sequence[str]]) -> ImageSet:
    """Add classes to a set: each has the images of its parts once more, under a label of its own.

    So a class of one part is an exact copy, and an image of a class of several is drawn from one of them.

    Raises:
        ValueError: if a part is not a class of the data, or a planted class has the name of another.
    """
    if not planted:
        return data
    own = [data.class_names[i] if data.class_names else str(i) for i in range(data.num_classes)]
    images, labels = [data.images], [data.labels]
    for number, (name, parts) in enumerate(planted.items(), start=len(own)):
        if name in own:
            raise ValueError(f"data.planted.{name}: {data.name} has a class of that name; choose another")
        for part in parts:
            if part not in own:
                known = ", ".join(own[:20]) or "none, as the data has no classes"
                raise ValueError(
                    f"data.planted.{name}: {part!r} is not a class; choose from {known}{suggest(part, own)}"
                )
        chosen = torch.isin(data.labels, torch.tensor([own.index(part) for part in parts]))
        images.append(data.images[chosen])
        labels.append(torch.full((int(chosen.sum()),), number))
    digest = hashlib.sha256(f"{data.fingerprint()} {dict(planted)}".encode()).hexdigest()[:16]
    return replace(
        data,
        images=torch.cat(images),
        labels=torch.cat(labels),
        num_classes=len(own) + len(planted),
        class_names=(*own, *planted),
        digest=digest,
        base=data,
    )
