"""The facts of a data set that a run keeps, so that it can be used where the images are not."""

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffbench.core.errors import UserError, suggest
from diffbench.core.files import write_text
from diffbench.data.places import some
from diffbench.data.sets import ImageSet


class OtherDataError(UserError):
    """The data are not those that the run was trained on."""


@dataclass(frozen=True)
class DataFacts:
    """The facts of images that a network must know, and those that identify them.

    Attributes:
        shape: (C, H, W) of an image.
        num_classes: 0 for images without labels.
        class_names: by label; empty where the classes have no names.
        count: training images.
        fingerprint: of the training images and their labels.
    """

    name: str
    shape: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...]
    count: int
    fingerprint: str

    @classmethod
    def of(cls, train: ImageSet) -> "DataFacts":
        """The facts of a training set."""
        digest = train.fingerprint() if len(train) else ""
        return cls(train.name, train.shape, train.num_classes, train.class_names, len(train), digest)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes, or their numbers where they have none."""
        return self.class_names or tuple(map(str, range(self.num_classes)))

    def write(self, path: Path) -> None:
        write_text(path, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "DataFacts":
        """The facts that `write` wrote; a damaged file is a UserError."""
        try:
            values = json.loads(path.read_text())
            channels, height, width = (int(n) for n in values.pop("shape"))
            names = tuple(map(str, values.pop("class_names")))
            return cls(shape=(channels, height, width), class_names=names, **values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
            raise UserError(f"{path}: damaged ({' '.join(str(e).split())}); remove it") from None

    def difference(self, other: "DataFacts") -> str | None:
        """The difference of other training data from this, in words; None where it is the same."""
        if self.class_names != other.class_names:
            return f"classes {some(self.class_names, 10)}, now {some(other.class_names, 10)}"
        if self.fingerprint != other.fingerprint:
            return f"{self.fingerprint}, now {other.fingerprint}"
        return None


def other_data(change: str) -> OtherDataError:
    """The error for training data that changed, in words such as `difference`'s."""
    return OtherDataError(
        f"data: the run began with other training data ({change}); bring it back, or choose another tag=NAME"
    )


def labels_for(n: int | None, labels: int | str | Sequence[int | str] | Tensor | None, facts: DataFacts) -> Tensor:
    """Labels (N,) of samples: those given, one for all, or by default the classes in turn.

    Args:
        n: how many samples; None for one each.
        labels: a class or a list of them, by name, or by number where no name is another number; a tensor holds
            numbers, or weights over the network's label table (N, labels), which are returned as they are.

    Raises:
        ValueError: if there is no such class, or the counts disagree.
    """
    if n is not None and n < 1:
        raise ValueError(f"n: must be at least 1, got {n}")
    if labels is None:
        return torch.arange(16 if n is None else n) % max(1, facts.num_classes)
    if not facts.num_classes:
        raise ValueError("labels: this network was trained without classes; leave them out")
    weights = isinstance(labels, Tensor) and labels.is_floating_point()
    if isinstance(labels, Tensor):
        y = labels if weights else labels.long()
    elif isinstance(labels, int | str | np.integer):
        y = torch.tensor(class_number(labels, facts))
    else:
        y = torch.tensor([class_number(label, facts) for label in labels], dtype=torch.int64)
    if y.ndim == 0:
        y = y.repeat(1 if n is None else n)
    if not len(y):
        raise ValueError("labels: at least one is needed, got none")
    if n is not None and len(y) != n:
        raise ValueError(f"labels: {len(y)} labels for n={n} samples; give one label, or one for each sample")
    if not weights and not 0 <= int(y.min()) <= int(y.max()) < facts.num_classes:
        raise ValueError(f"labels: must lie in 0 to {facts.num_classes - 1}, got {int(y.min())} to {int(y.max())}")
    return y


def class_number(label: int | str, facts: DataFacts, key: str = "labels") -> int:
    """The number of a class that a user names, or gives by its number where no name is another number.

    Raises:
        ValueError: beginning with `key`, if there is no such class.
    """
    names, text = facts.class_names, str(label)
    if text in names:
        return names.index(text)
    numbers = [int(name) if name.isdecimal() else None for name in names]
    if re.fullmatch(r"-?\d+", text) and int(text) in numbers:  # as 7 for a folder 007
        return numbers.index(int(text))
    by_number = all(number in (None, i) for i, number in enumerate(numbers))
    if by_number and re.fullmatch(r"\d+", text) and int(text) < facts.num_classes:
        return int(text)
    plain = numbers == list(range(len(names)))
    known = names if names and not plain else (f"0 to {facts.num_classes - 1}",)
    near = "" if plain else suggest(text, names)
    listed = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
    raise ValueError(f"{key}: {text!r} is not a class; choose from {listed}{near}")
