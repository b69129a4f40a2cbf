"""Published claims tested against results: known verdicts, references that exist, a page that agrees with its CSV."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from made_runs import record
from scipy.stats import spearmanr

from diffbench.cli import main
from diffbench.commands.findings import PAGE, as_text, page_text
from diffbench.core.errors import UserError
from diffbench.reports.conclusions import conclude
from diffbench.reports.results import Comparison, Trial
from diffbench.reports.tables import as_csv, pairs
from diffbench.studies.comparison import comparison_of_csv, shipped
from diffbench.studies.findings import Claim, findings, load_claims

EXPERIMENTS = Path("experiments")
STUDIES, RESULTS = EXPERIMENTS / "studies", EXPERIMENTS / "results"


def results(distances: dict[str, float], seeds: int = 5) -> Comparison:
    """Return variants with the given distances, plus an offset for each seed and a little noise for each run."""
    noise_of_runs = np.random.default_rng(0).normal(0, 0.01, (len(distances), seeds))
    trials = [
        Trial(variant, seed, "complete", None, record(fd + 0.2 * seed + noise_of_runs[i, seed], seed), at=51_200)
        for i, (variant, fd) in enumerate(distances.items())
        for seed in range(seeds)
    ]
    return Comparison("Made", "Which?", trials, primary="fd")


def test_every_shipped_claim_refers_to_existing_studies_and_variants() -> None:
    claims = load_claims(EXPERIMENTS / "findings.yaml", STUDIES)
    assert len(claims) >= 8 and len({c.claim for c in claims}) == len(claims)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"study": "windows"}, "study: no experiments/studies/windows.yaml; did you mean 'window'?"),
        ({"better": "window=3"}, "study: window has no variant 'window=3'; did you mean 'window="),
        ({"metric": "copies"}, "metric: copies does not rank variants"),
        ({"better": None}, "better: name variants either for better and worse, or for order, or for retrained"),
        ({"beter": "window=4"}, "beter: unknown key"),
    ],
)
def test_a_claim_with_unknown_names_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    claim = {"claim": "c", "source": "s", "study": "window", "better": "window=4", "worse": "window=2"}
    (tmp_path / "findings.yaml").write_text(yaml.safe_dump({"claims": [claim | changes]}))
    with pytest.raises(UserError) as e:
        load_claims(tmp_path / "findings.yaml", STUDIES)
    assert message in str(e.value) and "claims[0]" in str(e.value)


def test_claims_are_confirmed_tied_and_refuted_and_a_curve_needs_both_ends() -> None:
    made = results({"a": 1.0, "b": 1.5, "same": 1.002, "mid": 0.8, "late": 1.2})
    claims = [
        Claim("1", "s", "made", better="a", worse="b"),
        Claim("2", "s", "made", better="b", worse=["a", "late"]),
        Claim("3", "s", "made", better="a", worse="same"),
        Claim("4", "s", "made", better=["a", "mid", "late"], worse=["b", "same"]),
        Claim("5", "s", "made", better=["b", "late"], worse=["mid", "same"]),
        Claim("6", "s", "made", "label_accuracy", better="a", worse="b"),
        Claim("7", "s", "elsewhere", better="a", worse="b"),
        Claim("8", "s", "made", better="a", worse="not in the results"),
    ]
    found = findings(claims, {"made": made})
    assert [f.verdict for f in found] == [
        *("confirmed", "refuted", "tied", "confirmed", "refuted", "confirmed", "not run", "not run")
    ]
    assert found[3].evidence.startswith("Fréchet distance of mid minus same: -0.19")
    (few,) = findings(claims[:1], {"made": results({"a": 1.0, "b": 2.0}, seeds=2)})
    assert (few.verdict, few.evidence[-24:]) == ("undecided", "; 2 seeds, 51,200 images")
    lines = as_text(found).split("\n")
    assert max(map(len, lines)) <= 80 and lines[2].startswith("confirmed  1 [s]")


def test_the_interval_of_a_best_variant_accounts_for_the_choice() -> None:
    made = results({"a": 1.0, "b": 1.5, "c": 1.6, "d": 1.7})
    sides: list[dict[str, Any]] = [{"better": "a", "worse": ["b", "c", "d"]}, {"better": "a", "worse": "b"}]
    wide, narrow = (f.evidence for f in findings([Claim("1", "s", "made", **side) for side in sides], {"made": made}))
    assert (wide.split(";")[0], narrow.split(";")[0]) == (
        "Fréchet distance of a minus b: -0.501 (-0.517 to -0.485)",
        "Fréchet distance of a minus b: -0.501 (-0.512 to -0.490)",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("claims: 3", "claims: must be a list of claims, got 3"),
        ("claims: [a]", "claims[0]: must be a section with keys, got 'a'"),
        ("claims: [{claim: c, source: s, study: window, better: 2, worse: 4}]", "window has no variant '2'"),
        ("claims: [{claim: c, source: s, study: window, better: [2], worse: 4}]", "window has no variant '2'"),
    ],
)
def test_malformed_claims_are_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "findings.yaml").write_text(text)
    with pytest.raises(UserError) as e:
        load_claims(tmp_path / "findings.yaml", STUDIES)
    assert message in str(e.value)
    (tmp_path / "findings.yaml").write_text("claims:\n")
    assert load_claims(tmp_path / "findings.yaml", STUDIES) == []


@pytest.mark.parametrize(("text", "line"), [("", "not a table (No columns"), ("variant,seed,status,images", "no rows")])
def test_an_empty_csv_is_refused_in_one_line(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "report.csv").write_text(text)
    with pytest.raises(UserError) as e:
        comparison_of_csv(tmp_path / "report.csv", STUDIES / "window.yaml")
    assert str(e.value).startswith(f"{tmp_path / 'report.csv'}: {line}")


def test_a_nan_value_is_read_back_as_nan(tmp_path: Path) -> None:
    made = results({"window=2": 1.0, "window=4": 2.0})
    made.trials[0].record["fd/digits-cnn@500"] = math.nan  # type: ignore[index]
    (tmp_path / "report.csv").write_text(as_csv(conclude(made)))
    back = replace(comparison_of_csv(tmp_path / "report.csv", STUDIES / "window.yaml"), primary="fd", baseline=None)
    c = conclude(back)
    assert math.isnan(back.trials[0].values["fd/digits-cnn@500"]) and c.answer == conclude(made).answer
    assert "Not decided against window=2: a value is not finite." in c.answer
    assert pairs(c)[0]["interval"] == "none: a value is not finite"


@pytest.mark.parametrize(("power", "verdict"), [(2.0, "confirmed"), (1.0, "tied"), (0.5, "refuted")])
def test_the_order_of_a_method_is_its_slope_over_steps(power: float, verdict: str) -> None:
    steps = [8, 16, 32, 64]
    noise = np.random.default_rng(1).normal(1, 0.002, (4, 4))
    trials = [
        Trial(str(n), seed, "complete", None, record(2.0 - 5 * noise[seed, i] * n**-power, seed))
        for i, n in enumerate(steps)
        for seed in range(4)
    ]
    claim = Claim("c", "s", "made", order=[str(n) for n in steps], above=1)
    (found,) = findings([claim], {"made": Comparison("Made", "Which?", trials, primary="fd")})
    assert found.verdict == verdict
    assert float(found.evidence.split(": ")[1].split()[0]) == pytest.approx(power, abs=0.05)


@pytest.mark.parametrize(("ratio", "verdict"), [(5.0, "confirmed"), (0.05, "refuted")])
def test_training_scatter_is_compared_to_sampling_scatter(tmp_path: Path, ratio: float, verdict: str) -> None:
    draw = np.random.default_rng(2).normal(size=(10, 6))
    rows = [[record(9 + ratio * row[0] + one, seed) for one in row[1:]] for seed, row in enumerate(draw)]
    trials = [Trial("dit", i, "complete", None, first, at=640, more=more) for i, (first, *more) in enumerate(rows)]
    (tmp_path / "lottery").mkdir()
    made = conclude(Comparison("Made", "Which?", trials, primary="fd"))
    (tmp_path / "lottery" / "report.csv").write_text(as_csv(made))
    (found,) = findings([Claim("c", "s", "lottery", retrained="dit", above=1)], shipped(tmp_path, STUDIES))
    assert found.verdict == verdict and "10 x 5 seeds" in found.evidence
    few = {"lottery": replace(made.comparison, trials=trials[:2])}
    assert findings([Claim("c", "s", "lottery", retrained="dit", above=1)], few)[0].verdict == "undecided"


def test_results_are_read_back_from_csv_with_every_budget(tmp_path: Path) -> None:
    made = results({"window=2": 1.0, "window=4": 1.2})
    early = [Trial(t.variant, t.seed, t.status, None, record(5 - t.seed, t.seed), at=640) for t in made.trials]
    made = Comparison("Made", "Which?", made.trials, primary="fd", rungs={"early": early, "late": made.trials})
    (tmp_path / "window").mkdir()
    (tmp_path / "window" / "report.csv").write_text(as_csv(conclude(made)))
    (back,) = shipped(tmp_path, STUDIES).values()
    assert list(back.rungs) == ["early", "late"] and back.primary == "val/bound"
    for trial, other in zip(back.rungs["early"], early, strict=True):
        assert (trial.values, trial.images, trial.seed) == (other.values, 640, other.seed)
    (tmp_path / "window").rename(tmp_path / "windows")
    with pytest.raises(UserError, match=r"no study experiments/studies/windows\.yaml"):
        shipped(tmp_path, STUDIES)


def test_the_shipped_page_agrees_with_the_shipped_results(capsys: pytest.CaptureFixture[str]) -> None:
    text = (RESULTS / "README.md").read_text()
    conclusions = {name: conclude(found) for name, found in shipped(RESULTS, STUDIES).items()}
    found = findings(load_claims(EXPERIMENTS / "findings.yaml", STUDIES), shipped(RESULTS, STUDIES))
    written = PAGE.search(text)
    assert written is not None and page_text(conclusions, found) in written[0], "run make findings"
    for name, c in conclusions.items():
        assert c.comparison.question in text and (RESULTS / name / "answer.png").is_file()
        assert comparison_of_csv(RESULTS / name / "report.csv", STUDIES / f"{name}.yaml").trials
    table = pd.read_csv(RESULTS / "backbones" / "report.csv")
    table = table[(table["status"] == "complete") & (table["budget"] == table["budget"].iloc[-1])]
    agreed = spearmanr(table["val/bound"], table["fd/digits-cnn@500"]).statistic
    assert f"| `backbones` | {len(table)} | {agreed:.2f} |" in text
    assert "| `steps` | 15 |" not in text.partition("Spearman")[2]  # its variants share networks, and hence bounds
    assert main(["findings", "seeds=[0]"]) == 2
    assert "seeds=[0]: belongs to a study; write run=true" in capsys.readouterr().err


def test_a_variant_may_be_called_none(tmp_path: Path) -> None:
    csv = tmp_path / "report.csv"
    csv.write_text("variant,seed,status,images,val/bound\nNone,0,complete,64,1.5\nNA,0,complete,64,\n")
    found = comparison_of_csv(csv, STUDIES / "window.yaml").trials
    assert [(t.variant, t.values) for t in found] == [("None", {"val/bound": 1.5}), ("NA", {})]
