"""Tables are fitted to the width of a terminal, and left unchanged in a pipe."""

import sys

import pytest

from diffbench.core import terminal
from diffbench.reports.text import columns, filled

HEAD = ["run", "images", "of", "newest score", "last change"]
ROWS = [
    [
        "runs/digits/dit-hidden_size_32-s0",
        "6,400",
        "400,000",
        "fd/digits-cnn@500 0.0123 (guidance 1.5)",
        "2026-01-02 10:00",
    ],
    ["runs/digits/unet-s1", "400,000", "400,000", "-", "2026-01-02"],
]


def set_width(monkeypatch: pytest.MonkeyPatch, width: int | None) -> None:
    monkeypatch.setattr(terminal, "width", lambda: width)


def test_tables_in_a_pipe_are_not_fitted() -> None:
    lines = columns([HEAD, *ROWS], optional=["of"], rule=False).splitlines()
    assert len(lines) == 3 and len(lines[0]) > 105
    assert lines[1].split()[:3] == ["runs/digits/dit-hidden_size_32-s0", "6,400", "400,000"]


def test_optional_columns_are_dropped_first_then_long_cells_wrap(monkeypatch: pytest.MonkeyPatch) -> None:
    set_width(monkeypatch, 90)
    lines = columns([HEAD, *ROWS], optional=["last change", "of"], rule=False).splitlines()
    assert lines[0].split() == ["run", "images", "newest", "score"] and len(lines) == 3
    set_width(monkeypatch, 60)
    text = columns([HEAD, *ROWS], optional=["last change", "of"], rule=False)
    assert max(map(len, text.splitlines())) <= 60
    assert all(word in text for word in ("hidden_size_32-s0", "0.0123", "400,000"))  # numbers are not broken


def test_many_columns_are_split_into_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    set_width(monkeypatch, 80)
    names = [f"variant-{i}" for i in range(9)]
    table = [["metric", *names], ["val/bound", *[f"{i}.1234 ± 0.0{i}" for i in range(9)]]]
    blocks = columns(table).split("\n\n")
    assert len(blocks) == 3
    assert all(block.startswith("metric ") and "\nval/bound " in block for block in blocks)
    assert all(len(line) <= 80 for block in blocks for line in block.splitlines())
    assert [name for block in blocks for name in names if f"{name}\n" in block or f"{name} " in block] == names


def test_a_paragraph_is_wrapped_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "one two three " * 20
    assert filled(text) == text
    set_width(monkeypatch, 40)
    assert max(map(len, filled(text).splitlines())) <= 40


def test_only_terminals_have_colours(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert terminal.red("error:", sys.stderr) == "error:"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert terminal.red("error:", sys.stderr) == "\033[31merror:\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal.red("error:", sys.stderr) == "error:"
