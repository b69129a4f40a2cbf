"""`diffbench compare`: runs are grouped into variants, named and reported; incomparable runs are refused."""

import shutil
from pathlib import Path

import pytest
from made_runs import make_run, record, save_record

from diffbench.cli import main
from diffbench.commands import compare
from diffbench.core.errors import UserError
from diffbench.reports.images import attention_maps
from diffbench.reports.results import Comparison, Trial
from diffbench.reports.runs import comparable_scores
from diffbench.runs.lifecycle import load, open_any

Capture = pytest.CaptureFixture[str]


def comparison_of(folders: list[Path]) -> Comparison:
    runs = [compare._trained(folder) for folder in folders]
    return compare._comparison(runs, comparable_scores(runs), compare.CompareConfig())


def variants(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(r.variant for r in comparison.trials))


def test_runs_are_grouped_by_config_apart_from_the_seed(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / f"{name}-s{seed}", name, seed) for seed in (1, 0) for name in ("dit", "unet")]
    for folder in folders:
        save_record(folder, record(0.5))
    c = comparison_of(folders)
    assert [(r.variant, r.seed, r.status) for r in c.trials] == [
        (name, seed, "complete") for name in ("dit", "unet") for seed in (0, 1)
    ]
    assert (c.title, c.primary, c.like_for_like) == ("dit and unet on digits", "val/bound", True)
    assert all(r.record is not None and r.record["fd/digits-cnn@500"] == 0.5 for r in c.trials)
    assert c.notes == []  # sizes within 10%, and nothing else differs


MANY = ["denoiser.depth=2", "optimizer.lr=0.005", "trainer.label_dropout=0.2", "ema.decays=[0.99]"]


@pytest.mark.parametrize(
    ("overrides", "name"), [(MANY[:1], "dit, depth=2"), (MANY[:2], "dit, depth=2, lr=0.005"), (MANY, "dit, small")]
)
def test_variants_are_named_by_what_differs(tmp_path: Path, overrides: list[str], name: str) -> None:
    folders = [make_run(tmp_path / "dit-s0"), make_run(tmp_path / "small-s3", "dit", 3, overrides=overrides)]
    assert variants(comparison_of(folders))[1] == name


def test_differences_besides_the_backbone_are_noted(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", "unet", overrides=["optimizer.lr=0.01"])]
    c = comparison_of(folders)
    assert not c.like_for_like
    assert c.notes == ["Besides the backbone, runs differ in optimizer.lr."]
    assert comparison_of([folders[0], make_run(tmp_path / "c", overrides=["optimizer.lr=0.01"])]).like_for_like


def test_a_copied_run_is_a_separate_variant_and_a_repeated_folder_is_not(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "dit-s0")
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert variants(comparison_of([folder, copy, folder])) == ["dit", f"dit ({copy})"]


def test_an_unfinished_run_is_refused_or_marked(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "dit-s0")
    export = next(folder.glob("ema-*.safetensors"))
    export.unlink()
    with pytest.raises(UserError, match=f"^{folder}: no weights yet; train the run first$"):
        comparison_of([folder])
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step-100.ckpt").touch()
    (result,) = comparison_of([folder]).trials
    batch = open_any(folder).values["trainer"]["batch_size"]
    assert (result.status, result.why) == ("unfinished", f"stopped at {100 * batch:,} images")


def test_compare_writes_a_report_and_prints_its_path(tmp_path: Path, capsys: Capture) -> None:
    runs = f"runs_dir={tmp_path}"
    folders = [
        str(make_run(tmp_path / "digits" / f"{name}-s{seed}", name, seed, 0.1 + 0.01 * i + 0.0005 * seed, [runs]))
        for i, name in enumerate(("dit", "unet"))
        for seed in range(3)
    ]
    assert main(["compare", *folders]) == 0
    out = capsys.readouterr().out
    report = tmp_path / "reports" / "digits-dit-unet-s0,1,2" / "report.html"
    assert out.endswith(f"report: {report}\n") and report.is_file()
    assert sum(line.startswith("parameters ") for line in out.splitlines()) == 1  # one table
    assert "WINNER BY VALIDATION BOUND. dit (" in out and "Which of these runs has the better validation bound?" in out
    chosen = tmp_path / "mine"
    assert main(["compare", *folders, f"out={chosen}", "baseline=dit"]) == 0
    assert "Against dit (" in capsys.readouterr().out and (chosen / "report.csv").is_file()
    assert main(["compare", *folders, f"out={tmp_path / 'digits'}"]) == 2
    assert capsys.readouterr().err == (
        f"error: command line: out: {tmp_path / 'digits'} already exists and is not a report; choose another name\n"
    )
    for wrong, message in (
        ("outt=x", "outt: unknown key; "),
        ("primary=accuracy", "primary: accuracy does not rank variants; choose from val/bound"),
        ("primary=fid", "primary: no run has fid; choose from val/bound"),
        ("baseline=vit", "baseline: vit is not a variant; choose from dit, unet"),
    ):
        assert main(["compare", *folders, wrong]) == 2
        assert message in capsys.readouterr().err


def test_a_folder_given_many_times_has_a_column_each(tmp_path: Path, capsys: Capture) -> None:
    run = str(make_run(tmp_path / "digits" / "dit-s0", "dit", 0))
    assert main(["compare", *[run] * 9]) == 0
    assert capsys.readouterr().out.count("dit-s0") == 9


def test_runs_validated_differently_have_a_table_but_no_report(tmp_path: Path, capsys: Capture) -> None:
    one, other = make_run(tmp_path / "a"), make_run(tmp_path / "b", overrides=["validation.count=50"])
    assert main(["compare", str(one), str(other)]) == 0
    out = capsys.readouterr().out
    assert "validation bound" in out
    assert "no report: validations were measured differently: validation.count is 2000 in one and 50" in out


def test_an_opened_run_has_the_facts_of_the_loaded_run(finished: Path) -> None:
    opened, loaded = open_any(finished), load(finished)
    assert opened.values == loaded.values
    assert (opened.images_seen, opened.ema, opened.cost) == (loaded.images_seen, loaded.ema, loaded.cost)
    assert opened.results == loaded.results != []


def test_attention_is_drawn_once_for_the_same_weights(finished: Path, tmp_path: Path) -> None:
    found = {"dit": [Trial("dit", 0, "complete", open_any(finished))]}
    path = tmp_path / "attention.png"
    plot = attention_maps(found, path)
    assert plot is not None and plot.path == path and path.read_bytes()[:4] == b"\x89PNG"
    path.write_bytes(b"kept")
    assert attention_maps(found, path) == plot and path.read_bytes() == b"kept"
    made = make_run(tmp_path / "made")  # its weights cannot be loaded
    assert attention_maps({"a": [Trial("a", 0, "complete", open_any(made))]}, path) is None
