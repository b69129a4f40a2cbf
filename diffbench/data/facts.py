"""What a run keeps of its data set, so that it can be used where the images are not."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from diffbench.core.errors import UserError
from diffbench.core.files import write_text
from diffbench.data.places import some
from diffbench.data.sets import ImageSet


class OtherDataError(UserError):
    """The data are not those that the run was trained on."""


@dataclass(frozen=True)
class DataFacts:
    """What a network must know of its images, and what identifies them.

    Attributes:
        name: of the data set.
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
        return cls(
            train.name,
            train.shape,
            train.num_classes,
            train.class_names,
            len(train),
            train.fingerprint() if len(train) else "",
        )

    def write(self, path: Path) -> None:
        """Writes the facts as JSON."""
        write_text(path, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "DataFacts":
        """The facts that `write` wrote.

        Raises:
            UserError: if the file is damaged.
        """
        try:
            values = json.loads(path.read_text())
            channels, height, width = (int(n) for n in values.pop("shape"))
            names = tuple(map(str, values.pop("class_names")))
            return cls(shape=(channels, height, width), class_names=names, **values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
            raise UserError(f"{path}: damaged ({' '.join(str(e).split())}); remove it") from None

    def difference(self, other: "DataFacts") -> str | None:
        """How other training data differs from this, in words; None where it is the same."""
        if self.class_names != other.class_names:
            return f"classes {some(self.class_names, 10)}, now {some(other.class_names, 10)}"
        if self.fingerprint != other.fingerprint:
            return f"{self.fingerprint}, now {other.fingerprint}"
        return None
