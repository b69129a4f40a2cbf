"""`diffbench reproduce`: rebuilds cells from a report page alone, and detects values changed by hand."""

import json
import re
from pathlib import Path

import pytest
import yaml

from diffbench.cli import main
from diffbench.commands.reproduce import _compare
from diffbench.core.files import digest
from diffbench.reports.results import Trial
from diffbench.reports.text import number

Capture = pytest.CaptureFixture[str]
STUDY = {
    "kind": "study",
    "experiment": "experiments/digits/dit.yaml",
    "title": "Tiny <b>",
    "axes": {"sample.steps": ["2", "3"]},
    "set": {
        "denoiser": {"depth": 1, "hidden_size": 32},
        "trainer.batch_size": 8,
        "sample.guidance": 1.0,
        "evaluate": {"count": 20, "extractor": "random-cnn"},
        "validation.count": 20,
    },
    "seeds": [0, 1],
    "stop": {"images": [16, 32]},
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return only the report page of a study with two sampling settings and two budgets."""
    folder = tmp_path_factory.mktemp("reported")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(STUDY | {"runs_dir": str(folder / "runs")}))
    with pytest.MonkeyPatch.context() as patch:
        from diffbench.studies import runner

        def start(file: runner.TrialFile, jobs: int) -> object:
            file.run()
            file.log.touch()
            return type("Ended", (), {"returncode": 0, "poll": lambda self: 0})()

        patch.setattr(runner, "_start", start)
        patch.setattr(runner, "_terminate", lambda running: None)
        assert main(["study", str(folder / "tiny.yaml")]) == 0
    page = folder / "runs" / "studies" / "tiny" / "report.html"
    return page.rename(folder / "report.html")


def record_of(page: str) -> dict[str, object]:
    (text,) = re.findall(r'<script type="application/json" id="record">(.*?)</script>', page, re.DOTALL)
    return dict(json.loads(text))


def test_a_page_contains_everything_to_rebuild_its_cells(report: Path, capsys: Capture) -> None:
    page = report.read_text()
    record = record_of(page)
    assert record["title"] == "Tiny <b>" and "Tiny &lt;b&gt;" in page and "<b>" not in json.dumps(record["configs"])
    assert record["command"] == f"diffbench study {report.parent / 'tiny.yaml'}"
    assert list(record["cells"]) == ["steps=2/0", "steps=2/1", "steps=3/0", "steps=3/1"]  # type: ignore[call-overload]
    assert record["sha256"] == digest({k: v for k, v in record.items() if k != "sha256"})
    made = record["made"]
    assert {"platform", "processor", "threads", "versions", "commit"} <= made.keys()  # type: ignore[attr-defined]
    assert main(["reproduce", str(report)]) == 0
    printed = capsys.readouterr().out
    assert "Tiny <b>: 4 cells" in printed and "the page matches its record, and the record is intact" in printed
    assert re.search(r"\nsteps=3/1 +32 +\S+ s +5\d\n", printed) and "to train cells again, name them" in printed


def test_cells_are_rebuilt_bit_for_bit_in_a_separate_folder(
    report: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p: p.stat().st_mtime_ns for p in report.parent.rglob("*") if p.is_file()}
    args = ["reproduce", str(report), "steps=2/1", "steps=3/1", f"out={tmp_path / 'again'}"]
    assert main(args) == 0
    printed = capsys.readouterr().out
    count = re.findall(r"\nsteps=(\d)/1: (\d+) bit-identical of (\d+) values\n", printed)
    assert [steps for steps, *_ in count] == ["2", "3"] and all(n == total for _, n, total in count)
    assert printed.count("fd/random-cnn@20") == 4 and len(list((tmp_path / "again").glob("dit-*/config.yaml"))) == 1
    assert {p: p.stat().st_mtime_ns for p in report.parent.rglob("*") if p.is_file()} == before
    assert main(args) == 0 and "complete at 32 images" in capsys.readouterr().out  # the same command resumes
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert main([*args[:-1], f"out={tmp_path / 'mine'}"]) == 2
    assert "already exists and has no reproduced cells" in capsys.readouterr().err


def test_values_changed_by_hand_are_detected(report: Path, tmp_path: Path, capsys: Capture) -> None:
    page, changed = report.read_text(), tmp_path / "changed.html"
    cell = record_of(page)["cells"]["steps=2/0"]  # type: ignore[index]
    name = "fd/random-cnn@20"
    value = list(cell["values"].values())[-1][name]
    shown = number(value, name)

    def reproduce_changed(text: str, *args: str) -> str:
        assert text != page
        changed.write_text(text)
        assert main(["reproduce", str(changed), *args]) == 1
        return capsys.readouterr().out

    row = rf"page: Seed by seed, steps=2/0, .*{name} +{shown} +1\.234\n"
    assert re.search(row, reproduce_changed(page.replace(f"<td>{shown}</td>", "<td>1.234</td>")))
    assert "record of steps=2/0: hash" in reproduce_changed(page.replace(f'"{name}": {value}', f'"{name}": 1.234'))
    assert re.search("page: .*image", reproduce_changed(page.replace("base64,iVBOR", "base64,iVBOS", 1)))
    args = ("steps=2/0", f"out={tmp_path / 'again'}")
    printed = reproduce_changed(page.replace(f'"{name}": {value}', f'"{name}": 1.234'), *args)
    assert re.search(rf"{name} +1\.234 +{re.escape(str(value))} +0 +DIFFERENT\n", printed)
    assert re.search(r"steps=2/0: \d+ bit-identical, 1 DIFFERENT of", printed)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["stesp=2/0"], "no cell 'stesp=2/0'; choose from steps=2/0, .*; did you mean 'steps=2/0'?"),
        (["oot=x"], "no cell 'oot=x'"),
    ],
)
def test_an_unknown_cell_is_refused_in_one_line(report: Path, args: list[str], message: str, capsys: Capture) -> None:
    assert main(["reproduce", str(report), *args]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err) and err.count("\n") == 1


def test_files_that_are_not_reports_are_refused(tmp_path: Path, capsys: Capture) -> None:
    for path, wrong in (
        (tmp_path / "none.html", "no such file"),
        (Path("README.md"), "not a report"),
        (Path("docs/tensorboard.png"), "not a report"),
    ):
        assert main(["reproduce", str(path)]) == 2
        err = capsys.readouterr().err
        assert f"{path}: {wrong}" in err and err.count("\n") == 1


def test_other_data_is_refused_in_one_line(report: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "other.html").write_text(re.sub(r'("data": )"\w{16}"', r'\1"0123456789abcdef"', report.read_text()))
    assert main(["reproduce", str(tmp_path / "other.html"), "steps=2/0", f"out={tmp_path / 'again'}"]) == 2
    assert "data: the report's images are 0123456789abcdef, those here are" in capsys.readouterr().err


def test_budgets_missing_from_a_report_are_skipped(capsys: Capture) -> None:
    cell = {
        "variant": "dit",
        "record": {},
        "recipe": {"rungs": [[64, "64 images"], [128, "128 images"]]},
        "values": {"64 images": {"val/bound": 1.5}},
    }
    found = [Trial("dit", 0, "complete", None, {"val/bound": bound}) for bound in (1.5, 1.25)]
    assert _compare({"cells": {"dit/0": cell}}, "dit/0", found) == 0
    assert "dit/0: 1 bit-identical of 1 values" in capsys.readouterr().out
