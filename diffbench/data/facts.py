"""Facts about a data set that a run stores, so that the run can be used without the images."""

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
from diffbench.data.places import first_few
from diffbench.data.sets import ImageSet


class OtherDataError(UserError):
    """Data that differ from those that the run was trained on."""


@dataclass(frozen=True)
class DataFacts:
    """Facts about images that a network depends on, and a fingerprint that identifies the images.

    Attributes:
        shape: (C, H, W) of an image.
        num_classes: 0 for images without labels.
        class_names: by label; empty if the classes have no names.
        count: number of training images.
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
        """Return the facts of a training set."""
        digest = train.fingerprint() if len(train) else ""
        return cls(train.name, train.shape, train.num_classes, train.class_names, len(train), digest)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes, or their numbers if they have none."""
        return self.class_names or tuple(map(str, range(self.num_classes)))

    def write(self, path: Path) -> None:
        write_text(path, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "DataFacts":
        """Read the facts that `write` wrote; raise UserError if the file is damaged."""
        try:
            values = json.loads(path.read_text())
            channels, height, width = (int(n) for n in values.pop("shape"))
            names = tuple(map(str, values.pop("class_names")))
            return cls(shape=(channels, height, width), class_names=names, **values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
            raise UserError(f"{path}: damaged ({' '.join(str(e).split())}); remove it") from None

    def difference(self, other: "DataFacts") -> str | None:
        """Describe in words how other training data differ from these; return None if they are the same."""
        if self.class_names != other.class_names:
            return f"classes {first_few(self.class_names, 10)}, now {first_few(other.class_names, 10)}"
        if self.fingerprint != other.fingerprint:
            return f"{self.fingerprint}, now {other.fingerprint}"
        return None


def other_data(change: str) -> OtherDataError:
    """Return the error for changed training data; `change` says in words what changed, as `difference` does."""
    return OtherDataError(
        f"data: the run was started with other training data ({change}); restore them, or choose another tag=NAME"
    )


def labels_for(n: int | None, labels: int | str | Sequence[int | str] | Tensor | None, facts: DataFacts) -> Tensor:
    """Return labels (N,) for samples: those given, one for all, or by default each class in turn.

    Args:
        n: number of samples; None for one per label.
        labels: a class or a list of classes, given as for `class_number`; a tensor contains class numbers, or weights
            over the network's label table (N, labels), which are returned unchanged.

    Raises:
        ValueError: if a class does not exist, or the counts disagree.
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
    """Return the number of a class given by name, or by number if no class is named after a different number.

    Raises:
        ValueError: if there is no such class; the message begins with `key`.
    """
    names, text = facts.class_names, str(label)
    if text in names:
        return names.index(text)
    numbers = [int(name) if name.isdecimal() else None for name in names]
    if re.fullmatch(r"-?\d+", text) and int(text) in numbers:  # such as 7 for a folder named 007
        return numbers.index(int(text))
    by_number = all(number in (None, i) for i, number in enumerate(numbers))
    if by_number and re.fullmatch(r"\d+", text) and int(text) < facts.num_classes:
        return int(text)
    plain = numbers == list(range(len(names)))
    known = names if names and not plain else (f"0 to {facts.num_classes - 1}",)
    near = "" if plain else suggest(text, names)
    listed = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
    raise ValueError(f"{key}: {text!r} is not a class; choose from {listed}{near}")
