"""`diffbench reproduce`: a report rebuilds its cells from its page alone, and finds what was changed by hand."""

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
    """The report of a study of two ways of sampling and two budgets; what else the study left is gone."""
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


def test_a_page_holds_all_that_rebuilds_its_cells(report: Path, capsys: Capture) -> None:
    page = report.read_text()
    record = record_of(page)
    assert record["title"] == "Tiny <b>" and "Tiny &lt;b&gt;" in page and "<b>" not in json.dumps(record["configs"])
    assert record["command"] == f"diffbench study {report.parent / 'tiny.yaml'}"
    assert list(record["cells"]) == ["steps=2/0", "steps=2/1", "steps=3/0", "steps=3/1"]  # type: ignore[call-overload]
    assert record["sha256"] == digest({k: v for k, v in record.items() if k != "sha256"})
    made = record["made"]
    assert {"platform", "processor", "threads", "versions", "commit"} <= made.keys()  # type: ignore[attr-defined]
    assert main(["reproduce", str(report)]) == 0
    said = capsys.readouterr().out
    assert "Tiny <b>: 4 cells" in said and "the page matches its record, and the record is intact" in said
    assert re.search(r"\nsteps=3/1 +32 +\S+ s +5\d\n", said) and "to train cells again, name them" in said


def test_cells_are_rebuilt_to_the_bit_in_a_folder_of_their_own(
    report: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p: p.stat().st_mtime_ns for p in report.parent.rglob("*") if p.is_file()}
    words = ["reproduce", str(report), "steps=2/1", "steps=3/1", f"out={tmp_path / 'again'}"]
    assert main(words) == 0
    said = capsys.readouterr().out
    count = re.findall(r"\nsteps=(\d)/1: (\d+) bit-identical of (\d+) values\n", said)
    assert [steps for steps, *_ in count] == ["2", "3"] and all(n == total for _, n, total in count)
    assert said.count("fd/random-cnn@20") == 4 and len(list((tmp_path / "again").glob("dit-*/config.yaml"))) == 1
    assert {p: p.stat().st_mtime_ns for p in report.parent.rglob("*") if p.is_file()} == before
    assert main(words) == 0 and "complete at 32 images" in capsys.readouterr().out  # the same command goes on
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert main([*words[:-1], f"out={tmp_path / 'mine'}"]) == 2
    assert "already exists and has no reproduced cells" in capsys.readouterr().err


def test_what_was_changed_by_hand_is_found(report: Path, tmp_path: Path, capsys: Capture) -> None:
    page, changed = report.read_text(), tmp_path / "changed.html"
    cell = record_of(page)["cells"]["steps=2/0"]  # type: ignore[index]
    name = "fd/random-cnn@20"
    value = list(cell["values"].values())[-1][name]
    shown = number(value, name)

    def told(text: str, *words: str) -> str:
        assert text != page
        changed.write_text(text)
        assert main(["reproduce", str(changed), *words]) == 1
        return capsys.readouterr().out

    row = rf"page: Seed by seed, steps=2/0, .*{name} +{shown} +1\.234\n"
    assert re.search(row, told(page.replace(f"<td>{shown}</td>", "<td>1.234</td>")))
    assert "record of steps=2/0: hash" in told(page.replace(f'"{name}": {value}', f'"{name}": 1.234'))
    assert re.search("page: .*image", told(page.replace("base64,iVBOR", "base64,iVBOS", 1)))
    words = ("steps=2/0", f"out={tmp_path / 'again'}")
    said = told(page.replace(f'"{name}": {value}', f'"{name}": 1.234'), *words)
    assert re.search(rf"{name} +1\.234 +{re.escape(str(value))} +0 +DIFFERENT\n", said)
    assert re.search(r"steps=2/0: \d+ bit-identical, 1 DIFFERENT of", said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stesp=2/0"], "no cell 'stesp=2/0'; choose from steps=2/0, .*; did you mean 'steps=2/0'?"),
        (["oot=x"], "no cell 'oot=x'"),
    ],
)
def test_an_unknown_cell_is_one_line(report: Path, words: list[str], said: str, capsys: Capture) -> None:
    assert main(["reproduce", str(report), *words]) == 2
    err = capsys.readouterr().err
    assert re.search(said, err) and err.count("\n") == 1


def test_other_files_are_not_reports(tmp_path: Path, capsys: Capture) -> None:
    for path in (tmp_path / "none.html", Path("README.md"), Path("docs/tensorboard.png")):
        assert main(["reproduce", str(path)]) == 2
        err = capsys.readouterr().err
        assert f"{path}: not a report" in err and err.count("\n") == 1


def test_other_data_is_one_line(report: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "other.html").write_text(re.sub(r'("data": )"\w{16}"', r'\1"0123456789abcdef"', report.read_text()))
    assert main(["reproduce", str(tmp_path / "other.html"), "steps=2/0", f"out={tmp_path / 'again'}"]) == 2
    assert "data: the report's images are 0123456789abcdef, those here are" in capsys.readouterr().err


def test_budgets_that_a_report_does_not_hold_are_left_out(capsys: Capture) -> None:
    cell = {
        "variant": "dit",
        "record": {},
        "recipe": {"rungs": [[64, "64 images"], [128, "128 images"]]},
        "values": {"64 images": {"val/bound": 1.5}},
    }
    found = [Trial("dit", 0, "complete", None, {"val/bound": bound}) for bound in (1.5, 1.25)]
    assert _compare({"cells": {"dit/0": cell}}, "dit/0", found) == 0
    assert "dit/0: 1 bit-identical of 1 values" in capsys.readouterr().out
