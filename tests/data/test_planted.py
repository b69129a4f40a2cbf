"""Planted classes: the images, label and name of each, and the errors for invalid ones."""

from pathlib import Path

import pytest
import torch

from diffbench.config.load import load
from diffbench.core.errors import UserError
from diffbench.data.digits import DigitsConfig, digits
from diffbench.data.facts import DataFacts, labels_for
from diffbench.data.planted import plant
from diffbench.runs.build import load_data
from diffbench.runs.lifecycle import train

PLANTED = {"0 or 1": ["0", "1"], "copy of 3": ["3"]}


def test_a_planted_class_has_the_images_of_its_source_classes() -> None:
    base, _ = digits(DigitsConfig())
    found = plant(base, PLANTED)
    assert (found.num_classes, found.class_names[9:]) == (12, ("9", "0 or 1", "copy of 3"))
    assert torch.equal(found.images[: len(base)], base.images)
    assert torch.equal(found.images[found.labels == 10], base.images[base.labels < 2])
    assert torch.equal(found.images[found.labels == 11], base.images[base.labels == 3])
    assert len(found) == len(base) + int((base.labels < 2).sum()) + int((base.labels == 3).sum())
    assert len({base.fingerprint(), found.fingerprint(), plant(base, {"0 or 1": ["0", "2"]}).fingerprint()}) == 3
    assert plant(base, {}) is base


def test_both_splits_have_planted_classes_by_name_and_by_number() -> None:
    config = load("experiments/digits/dit.yaml", ["data.planted={0 or 1: [0, 1], copy of 3: [3]}"])
    train, held_out = load_data(config)
    assert train.class_names == held_out.class_names
    assert int((held_out.labels == 11).sum()) == int((held_out.labels == 3).sum()) > 0
    facts = DataFacts.of(train)
    assert labels_for(None, ["copy of 3", "11", "3", "0 or 1"], facts).tolist() == [11, 11, 3, 10]
    with pytest.raises(ValueError, match=r"labels: 'copy of 4' is not a class; .*; did you mean 'copy of 3'\?"):
        labels_for(None, "copy of 4", facts)


@pytest.mark.parametrize(
    ("planted", "text"),
    [
        ("{3: [4]}", "data.planted.3: digits already has a class of that name; choose another"),
        ("{x: [0, ten]}", "data.planted.x: 'ten' is not a class; choose from 0, 1, 2"),
        ("{x: []}", "data.planted.x: must list different classes, such as [0, 1], got []"),
        ("{x: [2, 2]}", "data.planted.x: must list different classes, such as [0, 1], got ['2', '2']"),
    ],
)
def test_invalid_planted_classes_are_refused_by_name(planted: str, text: str) -> None:
    with pytest.raises((UserError, ValueError)) as e:
        load_data(load("experiments/digits/dit.yaml", [f"data.planted={planted}"]))
    assert text in str(e.value)


def test_a_run_with_planted_classes_starts_from_another_run(tmp_path: Path) -> None:
    args = ["debug=smoke", "data.planted={both: [0, 1]}", f"runs_dir={tmp_path}"]
    first = train("experiments/digits/dit.yaml", [*args, "tag=a"])
    second = train("experiments/digits/dit.yaml", [*args, "tag=b", "seed=1", f"init_from={first.folder}"])
    assert second.images_seen == 16 and second.facts.num_classes == 11
