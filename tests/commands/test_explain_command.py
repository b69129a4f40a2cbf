"""`diffbench explain`: its output and files, the same on every call, and its one-line errors."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffbench.cli import main

Capture = pytest.CaptureFixture[str]
QUICK = ["images=8", "steps=4", "batch_size=4", "sample.steps=2"]


def test_the_command_prints_a_table_and_writes_figure_json_and_tensorboard(smoke_run: Path, capsys: Capture) -> None:
    assert main(["explain", str(smoke_run), "class=8", *QUICK]) == 0
    out = capsys.readouterr().out.splitlines()
    figure, listing = (smoke_run / "explain" / name for name in ("class-8.png", "class-8.json"))
    assert out[0].split() == ["class", "coefficient", "cosine", "least", "squares"]
    assert [line.split()[0] for line in out[1:4]] == ["1.", "2.", "3."]
    assert out[-2:] == [str(figure), str(listing)]
    found = json.loads(listing.read_text())
    assert (found["name"], found["n"], len(found["elements"])) == ("8", 3, 9)
    coefficients = [e["coefficient"] for e in found["elements"]]
    assert coefficients == sorted(coefficients, reverse=True)
    top = [e["name"] for e in found["elements"][:3]]
    assert list(found["change"]) == ["8", "reconstruction", *(f"without {name}" for name in top)]
    with Image.open(figure) as picture:
        assert np.asarray(picture.convert("L")).std() > 10
    events = EventAccumulator(str(smoke_run / "explain"))
    events.Reload()
    assert events.Tags()["images"] == ["explain/class-8"]
    assert main(["explain", str(smoke_run), "class=8", *QUICK]) == 0
    capsys.readouterr()
    assert listing.with_stem("class-8-2").read_bytes() == listing.read_bytes()
    assert figure.with_stem("class-8-2").read_bytes() == figure.read_bytes()


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["class=10"], "class: '10' is not a class; choose from 0 to 9"),
        (["class=eigth"], "class: 'eigth' is not a class; choose from 0 to 9"),
        ([], "class: missing; give a name or a number, e.g. class=8"),
        (["klass=3"], "klass: unknown key; allowed: class, n, target, images, steps, batch_size, sparsity, seed, out, sample; did you mean 'class'?"),  # noqa: E501
        (["class=3", "n=10"], "n: must be at most 9, the number of other classes, got 10"),
        (["class=3", "target=teachr"], "target: unknown value 'teachr'; choose from teacher, noise; did you mean 'teacher'?"),  # noqa: E501
        (["class=3", "sample=3"], "sample: must be a section with keys, got 3; write sample.KEY=VALUE"),
        (["class=3", "sample.steps=x"], "sample.steps: must be like 250, ddim25 or 10,15,20, got 'x'"),
    ],
)  # fmt: skip
def test_invalid_arguments_are_refused_by_name(smoke_run: Path, args: list[str], line: str, capsys: Capture) -> None:
    assert main(["explain", str(smoke_run), *args]) == 2
    assert capsys.readouterr().err.strip() == f"error: command line: {line}"
