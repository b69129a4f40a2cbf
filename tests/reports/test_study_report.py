"""Reports of comparisons: answers, tables, CSV and HTML page, from run folders created without training."""

import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from made_runs import LEVELS, PROFILE, backbones, make_run, record, save_record, save_samples
from scipy.stats import spearmanr

from diffbench.core.errors import UserError
from diffbench.evaluation.validation_error import bound
from diffbench.metrics.memorisation import share_of_copies
from diffbench.reports.conclusions import conclude
from diffbench.reports.html import render, write
from diffbench.reports.pairs import paired_tests
from diffbench.reports.plots import draw, sweep_plot
from diffbench.reports.results import Comparison, Trial
from diffbench.reports.series import above_least, networks, shared_levels, sweeps
from diffbench.reports.statistics import by_image, paired, summary
from diffbench.reports.tables import agreement, as_csv, costs, for_terminal, pairs, quality
from diffbench.runs.lifecycle import open_any
from diffbench.sampling.images import save_grid


def compare(results: list[Trial], **changes: object) -> Comparison:
    return Comparison("Backbones", "Which one?", results, **changes)  # type: ignore[arg-type]


def test_a_winner_is_reported_with_page_csv_and_plots(tmp_path: Path) -> None:
    results = backbones(tmp_path / "runs")
    for result in results:
        assert result.record is not None and result.run is not None
        save_samples(result.run.folder, result.record, torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8))
        save_grid(
            torch.zeros(32, 1, 8, 8, dtype=torch.uint8), 16, result.run.folder / "evaluations" / "made" / "nearest.png"
        )
    text = for_terminal(write(compare(results, notes=["Tuned alike."]), tmp_path / "out"))
    c = conclude(compare(results))
    values = {v: [t.values["val/bound"] for t in found] for v, found in c.variants.items()}
    means = {v: float(np.mean(x)) for v, x in values.items()}
    half = summary(values["diffit"]).half
    assert c.outcome == "winner" and c.ranked()[0] == "diffit"
    share = share_of_copies(25, 2500, 2, 360)  # over all five seeds
    assert quality(c)[0]["copies@500"] == f"{share.value:.2%} ({share.low:.2%} to {share.high:.2%})"
    mean = f"diffit ({means['diffit']:.4f} ± {half:.4f})"
    assert f"WINNER BY VALIDATION BOUND. {mean} has the lowest validation bound, better than" in text
    assert "note: Tuned alike." in text
    page = (tmp_path / "out" / "report.html").read_text()
    assert "A winner" in page and c.answer in page and "Tuned alike." in page
    assert not re.search(r"(src|href)=\"(?!data:image/png;base64,)", page)  # opens offline
    assert page.count("<img ") == 5
    plots = sorted(p.name for p in (tmp_path / "out" / "plots").glob("*.png"))
    assert plots == ["answer.png", "budget-val-bound.png", "nearest.png", "noise-levels.png", "samples.png"]
    rows = list(csv.DictReader((tmp_path / "out" / "report.csv").read_text().splitlines()))
    assert [(r["variant"], r["seed"]) for r in rows] == [(r.variant, str(r.seed)) for r in results]
    assert [float(r["val/bound"]) for r in rows[:5]] == values["unet"]
    assert float(rows[0]["fd/digits-cnn@500"]) == results[0].record["fd/digits-cnn@500"]  # type: ignore[index]
    assert float(rows[0]["training_flops"]) == 6 * int(rows[0]["macs"]) * 98_304
    assert {r["config.denoiser.name"] for r in rows} == {"unet", "dit", "diffit"}
    assert "config.seed" not in rows[0] and "config.data.name" not in rows[0]  # the same in all runs


def test_more_networks_than_lines_can_show_are_drawn_as_a_level_map(tmp_path: Path) -> None:
    tilts = {f"tilt {tilt:g}": tilt for tilt in np.linspace(0, 0.9, 10)}
    made = [
        Trial(
            name, seed, "complete", open_any(make_run(tmp_path / f"{name}-{seed}", seed=seed, tilt=tilt)), record(1.0)
        )
        for name, tilt in tilts.items()
        for seed in range(3)
    ]
    c = conclude(Comparison("Made", "Which?", made))
    at, levels = shared_levels(networks(c))
    above = above_least(levels)
    assert at == LEVELS and list(above) == list(tilts)
    profiles = np.array([PROFILE * np.exp(tilt * np.linspace(-1, 1, 7)) for tilt in tilts.values()])
    profiles /= np.array([bound(LEVELS, p) for p in profiles])[:, None]
    assert np.allclose(list(above.values()), 100 * (profiles / profiles.min(axis=0) - 1))
    assert "level-map.png" in [plot.path.name for plot in draw(c, tmp_path / "plots")]


def test_a_winner_contradicted_by_other_metrics_is_disputed(tmp_path: Path) -> None:
    fd = "fd/digits-cnn@500"
    plain = backbones(tmp_path)
    made = [
        replace(r, record={**(r.record or {}), fd: (1.0 if r.variant == "unet" else 2.0) + 0.01 * r.seed})
        for r in plain
    ]
    c = conclude(compare(made))
    assert c.outcome == "disputed" and c.ranked()[0] == "diffit"
    answer = "Other measures disagree: by Fréchet distance unet (1.020 ± 0.020) is better than diffit (2.020 ± 0.020)."
    assert c.answer.endswith(answer)
    assert for_terminal(c).split("\n")[3].startswith("MEASURES DISAGREE. diffit (")
    close = [replace(r, record={**(r.record or {}), fd: 1.0 if r.variant == "unet" else 1.01}) for r in plain]
    assert conclude(compare(close)).outcome == "winner"  # gaps under 1.3% decide nothing


def test_pairs_are_tested_by_seed_and_by_image(tmp_path: Path) -> None:
    results = backbones(tmp_path)
    c = conclude(compare(results))
    one, two = (c.by_seed(v, "val/bound") for v in ("unet", "diffit"))
    rows = {(a, b): [c.by_seed(a, "val/bound")[s] - c.by_seed(b, "val/bound")[s] for s in range(5)]
            for a, b in (("unet", "dit"), ("unet", "diffit"), ("dit", "diffit"))}  # fmt: skip
    expected = paired(rows)
    for contest in c.tests:
        assert contest.paired == expected[contest.first, contest.second]
    (contest,) = (x for x in c.tests if (x.first, x.second) == ("unet", "diffit"))
    assert contest.paired.mean == pytest.approx(np.mean([one[s] - two[s] for s in range(5)]))
    errors = [{t.seed: t.image_bounds for t in c.variants[v] if t.image_bounds is not None} for v in ("unet", "diffit")]
    assert contest.by_image is not None and contest.by_image.n == 60
    assert contest.by_image.mean == pytest.approx(by_image(*errors).mean())
    others = paired_tests(c.variants, "fd/digits-cnn@500", [(contest.first, contest.second)])
    assert [x.by_image for x in others] == [None]  # per-image values exist only for bounds


def test_the_share_of_copies_is_in_the_column_of_its_count(tmp_path: Path) -> None:
    few = {
        "copies@250": 0.2,
        "memorisation": {"flagged": 50, "count": 250, "threshold": 0.6, "false_alarms": 2, "real": 360},
    }
    results = [Trial("many", seed, "complete", None, record(0.5, seed)) for seed in range(3)]
    for seed in range(3):
        made = record(0.5, seed) | few
        del made["copies@500"]
        results.append(Trial("few", seed, "complete", None, made, more=[made]))  # each network is sampled twice
    rows = {row["variant"]: row for row in quality(conclude(compare(results, primary="fd")))}
    share = share_of_copies(300, 1500, 2, 360)
    assert rows["few"]["copies@250"] == f"{share.value:.2%} ({share.low:.2%} to {share.high:.2%})"
    assert "copies@500" not in rows["few"] and "copies@250" not in rows["many"]


@pytest.mark.filterwarnings("error")
def test_a_mean_that_is_not_finite_ranks_last(tmp_path: Path) -> None:
    for broken in (np.nan, np.inf):
        values = {"a": [0.1, broken, 0.1], "b": [0.5, 0.52, 0.51], "c": [0.3, 0.31, 0.32]}
        results = [
            Trial(name, seed, "complete", None, record(fd, seed))
            for name, found in values.items()
            for seed, fd in enumerate(found)
        ]
        c = conclude(compare(results, primary="fd"))
        assert c.ranked() == ["c", "b", "a"] and c.answer.startswith("c (")


def test_crossings_along_noise_levels_and_the_agreement_of_metrics(tmp_path: Path) -> None:
    c = conclude(compare(backbones(tmp_path)))  # the U-Net's profile is tilted; distances follow the bound
    answer = " Along the noise levels they cross: unet is better at log-SNR -6 and -4, diffit at -2, 0, 2, 4 and 6."
    assert c.answer.endswith(answer)
    rows = {row["measure"]: row for row in agreement(c)}
    errors, distances = ([t.values[name] for t in c.trials] for name in ("val/bound", "fd/digits-cnn@500"))
    assert rows["fd/digits-cnn@500"]["val/bound"] == f"{spearmanr(errors, distances).statistic:.2f}" == "1.00"
    assert rows["label_accuracy/digits-cnn@500"]["val/bound"] == "1.00"  # where higher is better
    lowest = [t.values["val/level/-6"] for t in c.trials]
    assert rows["val/level/-6"]["val/bound"] == f"{spearmanr(lowest, errors).statistic:.2f}"
    assert agreement(conclude(compare(c.trials[:4]))) == []


def test_equal_variants_and_close_frechet_distances_tie(tmp_path: Path) -> None:
    results = backbones(tmp_path, errors={"unet": 0.1, "dit": 0.1002})
    assert conclude(compare(results)).outcome == "tie"
    close = []
    for result in results:
        fd = 0.500 if result.variant == "unet" else 0.505
        close.append(Trial(result.variant, result.seed, "complete", result.run, record(fd + 1e-4 * result.seed)))
    c = conclude(compare(close, primary="fd"))
    (contest,) = c.tests
    assert contest.paired.found and contest.verdict == "tie"  # 1% apart
    assert contest.detectable == pytest.approx(0.013 * 0.5002)
    assert c.outcome == "tie" and "gaps under 1.3% decide nothing" in c.answer
    assert pairs(c)[0]["verdict"] == "tie (under 1.3%)"
    assert c.name == "fd/digits-cnn@500" and quality(c)[-1]["fd/digits-cnn@500"] == "0.1810"


def test_fewer_than_three_seeds_decide_nothing(tmp_path: Path) -> None:
    c = conclude(compare(backbones(tmp_path, seeds=2)))
    assert c.outcome == "not decided"
    assert c.answer.endswith("Not decided against unet and dit: fewer than 3 shared seeds.")
    text = for_terminal(c)
    assert "NOT DECIDED" in text and "none: 2 shared seeds" in text and "±" not in text


def test_variants_are_tested_against_a_baseline(tmp_path: Path) -> None:
    results = backbones(tmp_path)
    c = conclude(compare(results, baseline="dit"))
    assert [(x.first, x.second) for x in c.tests] == [("unet", "dit"), ("diffit", "dit")]
    assert re.match(r"Against dit \(0\.1\d+ ± 0\.\d+\) by validation bound: better: diffit \(by 0\.00\d+\)", c.answer)
    with pytest.raises(UserError, match="baseline: vit is not a variant; choose from unet, dit, diffit"):
        conclude(compare(results, baseline="vit"))


def test_an_unfinished_study_with_failures_is_reported(tmp_path: Path) -> None:
    results = backbones(tmp_path / "runs")
    results[0] = Trial("unet", 0, "failed", results[0].run, None, "killed by signal 9")
    results[6] = Trial("dit", 1, "not begun")
    results += [Trial("edm", seed, "not begun") for seed in range(5)]
    c = conclude(compare(results))
    text, page = for_terminal(c), render(c, [])
    assert "killed by signal 9" in text and "killed by signal 9" in page
    assert "7 not complete" in page
    assert [row["seeds"] for row in quality(c)[:4]] == ["4 of 5", "4 of 5", "5", "0 of 5"]
    assert {(x.first, x.second): x.paired.n for x in c.tests}["unet", "dit"] == 3
    assert "Not decided against edm: fewer than 3 shared seeds" in c.answer
    rows = list(csv.DictReader(as_csv(c).splitlines()))
    assert (rows[6]["status"], rows[6]["val/bound"]) == ("not begun", "")


def test_a_study_without_results_is_not_decided(tmp_path: Path) -> None:
    results = [Trial(v, 0, "not begun") for v in ("a", "b")]
    text = for_terminal(write(compare(results, primary="fd"), tmp_path / "out"))
    assert "NOT DECIDED. Not decided: no result has Fréchet distance yet." in text
    assert "none are scored yet" in (tmp_path / "out" / "report.html").read_text()


class Tags(HTMLParser):
    """Collects the tags that a browser would create."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.add(tag)


def test_names_given_by_users_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>$x_{$&\"'"
    results = backbones(tmp_path / "runs", seeds=3, errors={"unet": 0.11, "dit": 0.1})
    results = [Trial(evil if r.variant == "dit" else "a", r.seed, r.status, r.run, r.record) for r in results]
    results.append(Trial("a", 9, "failed", None, None, "<b>why</b>"))
    write(Comparison(evil, evil, results, notes=[evil]), tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    tags = Tags()
    visible, record, end = re.split(
        r'<script type="application/json" id="record">(.*?)</script>', page, flags=re.DOTALL
    )
    assert evil not in record and json.loads(record)["title"] == evil
    tags.feed(visible + end)
    assert not tags.seen & {"script", "b"} and {"table", "img"} <= tags.seen
    assert "&lt;script&gt;alert(1)" in page


def test_sampling_variants_of_the_same_runs_are_plotted_as_a_sweep(tmp_path: Path) -> None:
    results = []
    for seed in range(3):
        run = open_any(make_run(tmp_path / f"dit-s{seed}", "dit", seed))
        for steps in (5, 10, 20):
            made = record(0.4 + 2 / steps + 0.001 * seed, seed, steps=str(steps))
            results.append(Trial(f"dit, steps={steps}", seed, "complete", run, made))
    results.sort(key=lambda r: (int(r.variant.split("=")[1]), r.seed))
    write(compare(results, primary="fd"), tmp_path / "out")
    assert (tmp_path / "out" / "plots" / "steps.png").is_file()
    c = conclude(compare(results, primary="fd"))
    assert c.ranked() == ["dit, steps=20", "dit, steps=10", "dit, steps=5"]
    assert all(x.by_image is None for x in c.tests)  # the same networks
    assert [row["network evaluations a sample"] for row in costs(c)] == ["5", "10", "20"]
    assert "val/bound" not in quality(c)[0]


def test_a_numeric_axis_may_be_negative() -> None:
    results = [
        Trial(f"p_mean={mean}", seed, "complete", None, record(1.0 + mean**2 + 0.01 * seed, seed))
        for mean in (-2, -1.5, 0, 1)
        for seed in range(3)
    ]
    (found,) = sweeps(conclude(compare(results, primary="fd")))
    assert [at for at, _ in next(iter(found.lines.values()))] == [-2, -1.5, 0, 1]


def test_a_numeric_axis_is_drawn_with_one_line_per_value_of_the_other_axis(tmp_path: Path) -> None:
    results = [
        Trial(f"patch_size={size}, {what}", seed, "complete", None, record(fd * size + 0.01 * seed, seed))
        for size in (16, 4)
        for what, fd in (("x0", 0.1), ("eps", 0.2))
        for seed in range(3)
    ]
    c = conclude(compare(results, primary="fd"))
    (found,) = sweeps(c)
    places = [(4.0, "patch_size=4, x0"), (16.0, "patch_size=16, x0")]
    assert (found.key, found.label, found.lines["x0"]) == ("patch_size", "patch size", places)
    assert list(found.lines) == ["x0", "eps"] and found.metrics[0] == "fd/digits-cnn@500"
    drawn = sweep_plot(c, found, tmp_path / "patch_size.png")
    assert drawn.caption.startswith("Bands are 95% intervals") and drawn.path.is_file()


def test_variants_of_the_same_runs_may_be_scored_differently(tmp_path: Path) -> None:
    results = []
    for seed in range(3):
        run = open_any(make_run(tmp_path / f"dit-s{seed}", "dit", seed))
        few = record(0.8, seed)
        few = {name.replace("@500", "@250"): value for name, value in few.items()}
        few["floor"]["count"] = 250
        results.append(Trial("count=500", seed, "complete", run, record(0.4, seed)))
        results.append(Trial("count=250", seed, "complete", run, few))
    c = conclude(compare(results, primary="fd/digits-cnn@250"))
    assert c.ranked() == ["count=250"]
    many, fewer, real = quality(c)
    assert "fd/digits-cnn@250" not in many and "fd/digits-cnn@500" not in fewer
    assert {"fd/digits-cnn@250", "fd/digits-cnn@500"} < real.keys()
    assert few["extractor"] is not None
    results[1].record["extractor"]["weights"] = "others"  # type: ignore[index]  # but under the same name
    with pytest.raises(UserError, match=r"extractor\.weights is others in one and \w+ in the other"):
        conclude(compare(results))


def test_mixed_protocols_are_refused(tmp_path: Path) -> None:
    results = backbones(tmp_path, seeds=1)
    assert results[0].record is not None
    results[0].record["reference"]["count"] = 1000
    with pytest.raises(UserError, match=r"measured differently: reference\.count is 1000 in one and 500 in the other"):
        conclude(compare(results))
    results[0].record["reference"]["count"] = 500
    results[0].record["sample"]["steps"] = "10"  # not a variant: these runs share a config
    with pytest.raises(UserError, match=r"sample\.steps is 10 in one and 50 in the other"):
        conclude(compare(results))


def test_runs_with_different_held_out_images_are_refused(tmp_path: Path) -> None:
    one = make_run(tmp_path / "a", "dit")
    other = make_run(tmp_path / "b", "dit", overrides=["validation.count=100"])
    results = [Trial(f.name, 0, "complete", open_any(f)) for f in (one, other)]
    with pytest.raises(UserError, match=r"validation\.count is 2000 in one and 100 in the other"):
        conclude(compare(results))
    with pytest.raises(UserError, match="primary: copies does not rank variants; choose from val/bound, fd,"):
        conclude(compare(results, primary="copies"))


def test_runs_trained_on_changed_images_are_refused(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name) for name in ("a", "b")]
    facts = {"name": "digits", "shape": [1, 8, 8], "num_classes": 10, "class_names": [], "count": 1437}
    for folder, fingerprint in zip(folders, ("0123", "4567"), strict=True):
        (folder / "data.json").write_text(json.dumps(facts | {"fingerprint": fingerprint}))
    trials = [Trial(f.name, 0, "complete", open_any(f)) for f in folders]
    with pytest.raises(
        UserError, match=f"{folders[0]} and {folders[1]} were trained on different images, though their"
    ):
        conclude(compare(trials))
    (folders[1] / "data.json").write_text((folders[0] / "data.json").read_text())
    assert conclude(compare([Trial(f.name, 0, "complete", open_any(f)) for f in folders])).ranked() == ["a", "b"]


def test_complete_recipes_are_marked_as_not_like_for_like(tmp_path: Path) -> None:
    c = conclude(compare(backbones(tmp_path, seeds=1), like_for_like=False))
    assert "Not like for like." in render(c, []) and "Not like for like" in for_terminal(c)


def test_made_runs_have_the_errors_they_were_made_with(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", "dit", error=0.12)
    save_record(folder, record(0.5))
    c = conclude(compare([Trial("a", 0, "complete", open_any(folder))]))
    values = c.trials[0].values
    assert values["val/bound"] == pytest.approx(0.12)
    assert bound(LEVELS, [values[f"val/level/{level:g}"] for level in LEVELS]) == pytest.approx(0.12)
    assert values["train/bound"] == pytest.approx(0.9 * 0.12)
