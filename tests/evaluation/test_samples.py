"""Samples on disk: drawn once, whatever happens; verified; in any order; and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffbench.core.errors import UserError
from diffbench.evaluation.samples import SIZE, Samples

COUNT = 2 * SIZE + 300


class Pen:
    """Draws sample i as a picture of the number i, and remembers what it was asked for."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.asked: list[tuple[int, int]] = []
        self.fail_at = fail_at

    def __call__(self, first: int, count: int) -> Tensor:
        self.asked.append((first, count))
        if first == self.fail_at:
            raise KeyboardInterrupt
        return numbered(torch.arange(first, first + count))


def numbered(index: Tensor) -> Tensor:
    return torch.stack([index % 256, index // 256], dim=1).to(torch.uint8).reshape(-1, 1, 1, 2)


def samples(tmp_path: Path, **what: object) -> Samples:
    return Samples(tmp_path / "evaluations", {"seed": 0} | what, COUNT, (1, 1, 2))


def test_all_samples_in_order_and_in_any(tmp_path: Path) -> None:
    place, pen = samples(tmp_path), Pen()
    place.fill(pen)
    assert pen.asked == [(0, SIZE), (SIZE, SIZE), (2 * SIZE, 300)]
    assert torch.equal(place.images(), numbered(torch.arange(COUNT)))
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
    assert torch.equal(place.images()[order], numbered(order))


def test_a_killed_command_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        samples(tmp_path).fill(Pen(fail_at=SIZE))
    place, pen, skipped = samples(tmp_path), Pen(), []
    assert place.present() == SIZE
    place.fill(pen, skipped.append)
    assert pen.asked == [(SIZE, SIZE), (2 * SIZE, 300)] and skipped == [SIZE]
    again = Pen()
    place.fill(again)
    assert again.asked == [] and place.present() == COUNT
    told = json.loads(place.store.manifest.read_text())
    assert told["identity"] == {"seed": 0} and told["rows"] == COUNT
    assert [chunk["start"] for chunk in told["chunks"]] == [0, 1000, 2000]


def test_damaged_and_lost_samples_are_drawn_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = samples(tmp_path)
    place.fill(Pen())
    path = place.store.path("images")
    whole = path.read_bytes()
    path.write_bytes(b"x" + whole[1:-1])
    pen = Pen()
    place.fill(pen)
    assert pen.asked == [(0, SIZE), (2 * SIZE, 300)] and path.read_bytes() == whole
    assert capsys.readouterr().out.startswith(f"warning: {path}: damaged: ")
    place.store.manifest.write_text("{")
    place.fill(pen)
    assert len(pen.asked) == 5 and "manifest.json: damaged" in capsys.readouterr().out


def test_other_samples_lie_elsewhere(tmp_path: Path) -> None:
    assert samples(tmp_path).folder == samples(tmp_path).folder
    assert samples(tmp_path).folder != samples(tmp_path, seed=1).folder != samples(tmp_path, steps="50").folder


def test_a_full_disk_is_found_before_anything_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    place, pen = samples(tmp_path), Pen()
    with pytest.raises(UserError) as caught:
        place.fill(pen)
    assert str(caught.value) == f"{place.folder}: needs 4,600 bytes, but only 1,000 are free; make room"
    assert pen.asked == []


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    place = samples(tmp_path)
    place.fill(Pen())
    path = place.store.path("images")
    path.write_bytes(b"broken")
    with pytest.raises(UserError, match=rf"{path}: damaged: 6 bytes where 4,600 were written; run the same command"):
        place.images()
