"""Samples on disk: drawn once, verified, read in any order, and refused when damaged."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffbench.core.errors import UserError
from diffbench.evaluation.samples import SIZE, Samples

COUNT = 2 * SIZE + 300


class Drawer:
    """Draws sample i as an image that encodes the number i, and records the requests."""

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


def test_samples_are_drawn_in_order_and_read_in_any_order(tmp_path: Path) -> None:
    saved, drawer = samples(tmp_path), Drawer()
    saved.fill(drawer)
    assert drawer.asked == [(0, SIZE), (SIZE, SIZE), (2 * SIZE, 300)]
    assert torch.equal(saved.images(), numbered(torch.arange(COUNT)))
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
    assert torch.equal(saved.images()[order], numbered(order))


def test_a_killed_command_resumes(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        samples(tmp_path).fill(Drawer(fail_at=SIZE))
    saved, drawer, skipped = samples(tmp_path), Drawer(), []
    assert saved.present() == SIZE
    saved.fill(drawer, skipped.append)
    assert drawer.asked == [(SIZE, SIZE), (2 * SIZE, 300)] and skipped == [SIZE]
    again = Drawer()
    saved.fill(again)
    assert again.asked == [] and saved.present() == COUNT
    manifest = json.loads(saved.store.manifest.read_text())
    assert manifest["identity"] == {"seed": 0} and manifest["rows"] == COUNT
    assert [chunk["start"] for chunk in manifest["chunks"]] == [0, 1000, 2000]


def test_damaged_samples_are_drawn_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = samples(tmp_path)
    saved.fill(Drawer())
    path = saved.store.path("images")
    whole = path.read_bytes()
    path.write_bytes(b"x" + whole[1:-1])
    drawer = Drawer()
    saved.fill(drawer)
    assert drawer.asked == [(0, SIZE), (2 * SIZE, 300)] and path.read_bytes() == whole
    assert capsys.readouterr().out.startswith(f"warning: {path}: damaged: ")
    saved.store.manifest.write_text("{")
    saved.fill(drawer)
    assert len(drawer.asked) == 5 and "manifest.json: damaged" in capsys.readouterr().out


def test_different_samples_have_different_folders(tmp_path: Path) -> None:
    assert samples(tmp_path).folder == samples(tmp_path).folder
    assert samples(tmp_path).folder != samples(tmp_path, seed=1).folder != samples(tmp_path, steps="50").folder


def test_a_full_disk_is_detected_before_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    saved, drawer = samples(tmp_path), Drawer()
    with pytest.raises(UserError) as caught:
        saved.fill(drawer)
    assert str(caught.value) == f"{saved.folder}: needs 4,600 bytes, but only 1,000 are free; make room"
    assert drawer.asked == []


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    saved = samples(tmp_path)
    saved.fill(Drawer())
    path = saved.store.path("images")
    path.write_bytes(b"broken")
    with pytest.raises(UserError, match=rf"{path}: damaged: 6 bytes where 4,600 were written; run the same command"):
        saved.images()
