"""Custom data sets: unusual items are read, or refused in one line."""

from typing import Any

import numpy as np
import pytest
import torch

from diffbench.data.batches import image_set, latent_set
from diffbench.data.datamodule import ImageDataModule
from diffbench.data.facts import DataFacts, labels_for

IMAGE = torch.zeros(1, 8, 8, dtype=torch.uint8)


class Items(list[Any]):
    """A minimal data set: a list with class names."""

    classes: Any = None


@pytest.mark.parametrize(
    ("read", "items", "text"),
    [
        (image_set, [(IMAGE, float("inf"))], "labels must be whole numbers, or all None; got inf"),
        (image_set, [(None, 0)], r"an item must have one of image, .*; got \(None, 0\)"),
        (image_set, [{"x": 0}], "an item must have one of image, .*; it has x"),
        (latent_set, [torch.zeros(1, 8, 8), torch.zeros(1, 8, 9)], r"latents must have one shape; got \(1, 8, 8\) and"),
    ],
)
def test_malformed_items_are_refused_in_one_line(read: Any, items: list[Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}"):
        read(Items(items))


def test_classes_may_be_a_numpy_array() -> None:
    data = Items([(IMAGE, np.int64(0)), (IMAGE, np.int64(1))])
    data.classes = np.array(["cat", "dog"])
    assert image_set(data).class_names == ("cat", "dog")  # type: ignore[arg-type]


def test_a_label_may_be_a_numpy_integer() -> None:
    facts = DataFacts("x", (1, 8, 8), 2, ("cat", "dog"), 2, "")
    assert labels_for(2, np.int64(1), facts).tolist() == [1, 1]  # type: ignore[arg-type]


def test_a_data_module_can_be_printed() -> None:
    data: Any = Items([(IMAGE, 0), (IMAGE, 1)])
    assert "ImageDataModule object" in str(ImageDataModule(data, data, batch_size=2))
