"""The benchmark: its plan, its refusals, and all of it end to end on networks too small to mean anything."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import bench as benchmark
from benchmarks import cases, drawn, machine, models, pieces, settings, show
from benchmarks.__main__ import main
from benchmarks.peak import WAYS
from benchmarks.settings import PARTS, BenchConfig
from diffbench.core.errors import UserError
from diffbench.denoisers import PRESETS
from diffbench.denoisers.linear import mkl_holds_back
from diffbench.runs import build

CPU = torch.device("cpu")
TINY = ["tiny=true", "force=true", "repeats=2"]


def other_network(model: str, config: Any) -> nn.Module | None:
    """Another implementation: here ours again."""
    return build.build_denoiser(config, build.load_data(config)[0]) if model == "DiT-S/2" else None


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All parts on tiny networks, but for fresh processes, which take seconds each."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECES", pieces.PIECES[:-2])
        own = "variants=['no channels-last: trainer.channels_last=false']"
        asked = ["models=[DiT-S/2]", f"parts=[{','.join(PARTS)}]", f"other={__name__}:other_network", own]
        made = benchmark.bench([*TINY, *asked, f"out={folder / 'a.json'}"])
    return made | {"path": folder / "a.json"}


def test_the_report_tells_the_machine(report: dict[str, Any]) -> None:
    saved = json.loads(report["path"].read_text())
    assert saved == json.loads(json.dumps({k: v for k, v in report.items() if k != "path"}))
    told = saved["machine"]
    assert (saved["format"], saved["settings"]["force"], saved["settings"]["tiny"]) == (1, True, True)
    assert (told["threads"], told["device"]) == (torch.get_num_threads(), "cpu")
    assert told["versions"]["torch"] == torch.__version__
    assert {"processor", "cores", "load_average", "commit", "memory_bytes"} <= told.keys()
    assert report["path"].with_suffix(".png").stat().st_size > 10_000
    assert report["path"].with_suffix(".growth.png").stat().st_size > 10_000


def test_every_part_gives_positive_numbers(report: dict[str, Any]) -> None:
    rows = report["rows"]
    assert {row["part"] for row in rows} == {"models", "loop", "pieces", "growth", "sampling"}
    assert not [row for row in rows if "skipped" in row]
    for row in rows:
        for name in ("ms", "ms_low", "images_per_s", "bytes_per_s", "flops_per_s", "share", "roofline_ms", "bare_ms"):
            assert row.get(name, 1.0) > 0 and math.isfinite(row.get(name, 1.0)), (name, row)
        if "ms_low" in row:
            assert row["ms_low"] <= row["ms"] <= row["ms_high"]


def test_steps_of_a_network_and_its_variants(report: dict[str, Any]) -> None:
    rows = [row for row in report["rows"] if row["part"] == "models" and row["name"] == "DiT-S/2"]
    by_mkl = ["linear by MKL"] if mkl_holds_back() else []
    names = ["default", "no channels-last", "attention math", "bf16", *by_mkl, "other"]
    assert [(row["variant"], row["work"]) for row in rows] == [
        (name, work) for name in names for work in ("forward", "train", "sample")
    ]
    config = cases.run_config(BenchConfig(tiny=True), "DiT-S/2", "cpu")
    cost = build.cost_of(config, build.load_data(config)[0])
    for row in rows:
        passes = {"forward": 1, "train": 3, "sample": 1}[row["work"]]
        assert row["flops_per_s"] == pytest.approx(2 * cost.macs * passes * 4 / row["ms"] * 1e3)
        assert row["share"] == pytest.approx(row["flops_per_s"] / row["peak"]["flops_per_s"])
        assert row["mm_share"] == pytest.approx(row["flops_per_s"] / row["peak"]["mm_flops_per_s"])
        assert row["peak"]["flops_per_s"] >= row["peak"]["mm_flops_per_s"] and row["peak"]["way"] in WAYS
        assert row["peak"]["precision"] == ("bf16-mixed" if row["variant"] == "bf16" else "32-true")
        assert (row["batch"], row["parameters"]) == (4, cost.parameters)
        assert ("ratio" in row) == (row["variant"] != "default")
    train = rows[1]
    assert 0 < train["products_ms"] < train["roofline_ms"]
    assert train["memory_bytes"] > rows[0]["memory_bytes"] > 0
    assert train["state_bytes"] == 4 * rows[0]["state_bytes"]


def test_lightning_against_a_bare_loop(report: dict[str, Any]) -> None:
    rows = [row for row in report["rows"] if row["part"] == "loop"]
    assert [row["name"] for row in rows] == ["experiments/digits/dit.yaml", "DiT-S/2"]
    for row in rows:
        assert (row["pairs"], row["steps"]) == (5, 2)
        assert row["overhead_low"] <= row["overhead_ms"] <= row["overhead_high"]
        assert row["data_wait_share"] > 0
        assert row["idle_share"] is None and row["synchronizations_per_step"] is None  # a GPU's


def test_growth_has_a_slope_for_each_curve(report: dict[str, Any]) -> None:
    rows = [row for row in report["rows"] if row["part"] == "growth"]
    curves = {(row["name"], row["variant"]) for row in rows}
    assert {axis for _, axis in curves} == {"area", "batch", "depth", "width", "samples"}
    assert {(row["name"], row["variant"]) for row in rows if "time_slope" in row} == curves
    (batch,) = (row for row in rows if row["variant"] == "batch" and "memory_slope" in row)
    assert 0.2 < batch["memory_slope"] < 1.1  # twice the batch: at most twice the memory
    sampled = [row["size"] for row in rows if row["name"] == "sampling" and "size" in row]
    assert sampled == [8, 16]


def test_sampling_counts_both_halves_of_guidance(report: dict[str, Any]) -> None:
    (row,) = (row for row in report["rows"] if row["part"] == "sampling")
    assert (row["batch"], row["steps"], row["guidance"], row["evaluations"]) == (4, 2, 1.5, 4)
    assert row["images_per_s"] == pytest.approx(4 / row["seconds"])


def test_sampling_without_an_end_of_time_takes_all_its_steps() -> None:
    (row,) = drawn.measure(BenchConfig(full=True, tiny=True), CPU, math.inf)
    assert row["steps"] == drawn.PLAN["tiny"][2]


def test_a_baseline_shows_the_change(
    report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, asked = tmp_path / "b.json", ["models=[DiT-S/2]", "parts=[models]", f"baseline={report['path']}"]
    assert main([*TINY, *asked, f"out={out}"]) == 0
    said = capsys.readouterr().out
    assert f"\nAgainst {report['path']} (" in said
    assert len([line for line in said.splitlines() if line.endswith(" of the baseline")]) == 3
    assert out.exists() and out.with_suffix(".png").exists() and not out.with_suffix(".growth.png").exists()


def test_one_first_step() -> None:
    pieces.one_step("DiT-S/2", "cpu", tiny=True)


def test_an_import_is_timed_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PACKAGES", ("json",))
    (row,) = pieces.imports(BenchConfig(tiny=True), CPU)
    assert row["name"] == "import json" and 0 < row["ms"] < 10_000


@pytest.mark.slow
def test_the_plan_for_a_gpu_runs_at_a_small_size(tmp_path: Path) -> None:
    report = benchmark.bench([*TINY, "gpu=true", "device=cpu", "seconds=1e6", f"out={tmp_path / 'gpu.json'}"])
    names = {row["name"] for row in report["rows"] if row["part"] == "models" and row.get("work") == "train"}
    assert names == set(cases.LARGE)
    assert any(row["name"].startswith("first step") for row in report["rows"])
    skipped = [(row["name"], row["variant"]) for row in report["rows"] if "skipped" in row]
    assert skipped == [("DiffiT-XL/2", "attention flash")]  # it takes no bias


@pytest.mark.parametrize("model", [*PRESETS, *cases.SHORT])
def test_every_network_has_an_experiment(model: str) -> None:
    config = cases.run_config(BenchConfig(), model, "cpu")
    assert config.process.name == ("edm" if model.startswith(("DDPM", "DiffiT-CIFAR", "DiffiT-FFHQ")) else "vp")
    assert config.trainer.precision == "32-true"
    assert config.trainer.batch_size == (64 if model.endswith(".yaml") else 8)
    assert cases.run_config(BenchConfig(), model, "cuda").trainer.precision == "bf16-mixed"


def test_our_own_networks_are_the_size_of_dit_s_2() -> None:
    found = {}
    for model in ("DiT-S/2", *cases.OWN):
        config = cases.run_config(BenchConfig(), model, "cpu")
        found[model] = build.cost_of(config, build.load_data(config)[0]).gmacs
    assert found["DiT-S/2"] == pytest.approx(6.06, abs=0.01)
    assert all(5.4 < gmacs < 6.7 for gmacs in found.values()), found


@pytest.mark.parametrize("form", [BenchConfig(), BenchConfig(full=True), BenchConfig(gpu=True)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_variant_is_a_config(form: BenchConfig, device: str) -> None:
    found = {}
    for model in [*cases.SHORT, *cases.LARGE]:
        base = cases.run_config(form, model, device)
        for variant in cases.variants(form, model, base, device):
            if variant.overrides:
                assert cases.run_config(form, model, device, variant.overrides) != base
            found.setdefault(model, []).append(variant.name)
    assert all(names[0] == "default" and len(set(names)) == len(names) for names in found.values())
    brief = not (form.full or form.gpu)  # in which attention is shown at the small size
    assert len(found["DiT-S/2"]) > (1 if brief else 2)
    assert any(name.startswith("attention ") for name in found[cases.DIGITS[0]])
    large = form.gpu or device == "cuda"
    assert len(found["DiT-XL/2"]) > 1 if large else len(found["DiT-XL/2"]) == 1


@pytest.mark.parametrize("held", [True, False])
def test_linear_layers_by_mkl_are_a_variant_where_they_are_slower(held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "mkl_holds_back", lambda: held)

    def there(model: str, device: str, form: BenchConfig) -> bool:
        found = cases.variants(form, model, cases.run_config(form, model, device), device)
        return "linear by MKL" in [variant.name for variant in found]

    assert there("DiT-S/2", "cpu", BenchConfig()) is there("DiffiT-S/2", "cpu", BenchConfig(full=True)) is held
    assert not there("DiT-S/2", "cuda", BenchConfig()) and not there("ADM-S/32", "cpu", BenchConfig(full=True))


def test_a_backend_of_ones_own_is_a_variant() -> None:
    def found(model: str, device: str, words: str) -> cases.Variant:
        form = BenchConfig(models=[model], variants=[f"mine: {words}"])
        return cases.variants(form, model, cases.run_config(form, model, device), device)[1]

    assert found("DiffiT-S/2", "cpu", "bench.attention=math") == cases.Variant("mine", (), "math")
    assert found("DiffiT-S/2", "cpu", "trainer.tf32=true").overrides == ("trainer.tf32=true",)
    assert found(cases.DIGITS[1], "cpu", "bench.attention=flash trainer.tf32=true") == cases.Variant(
        "mine", ("trainer.tf32=true",), "flash"
    )


def test_a_batch_is_halved_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    config = cases.run_config(BenchConfig(), "DiT-S/2", "cpu")
    weights = 33e6 * models.PER_PARAMETER
    each = models.kept_bytes(config)
    monkeypatch.setattr(models, "free_bytes", lambda device: (weights + 3 * each) / 0.9)
    base, why = models._fitting(BenchConfig(), "DiT-S/2", CPU, 1e18)
    assert (base.trainer.batch_size, why) == (2, "")
    slow, why = models._fitting(BenchConfig(), "DiT-S/2", CPU, 1e9)  # 36 s a training step of one image
    assert (slow.trainer.batch_size, why[:28]) == (8, "at batch 1 it needs about 0.")
    _, why = models._fitting(BenchConfig(batch=8), "DiT-S/2", CPU, 1e18)
    assert why.startswith("at batch 8 it needs about ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["modells=[x]"], "modells: unknown key; allowed: models, parts, full"),
        (["models=[DiT-S/3]"], "models: unknown network 'DiT-S/3'; choose from DiffiT-S/2, ADM-S/32, ADM-64"),
        (["models=[]"], "models: must hold at least one, or be null, got []"),
        (["parts=[loops]"], "parts: unknown value 'loops'; choose from loop, models, variants"),
        (["full=true", "gpu=true"], "gpu: has a length of its own; leave out full"),
        (["repeats=0"], "repeats: must be positive, got 0"),
        (["out=x.txt"], "out: must end in .json, got 'x.txt'"),
        (["out=tests/golden/figures.json"], "out: "),
        (["variants=[fast]"], "variants: must be as 'plain: trainer.channels_last=false', got 'fast'"),
        (
            ["variants=['x: bench.attention=all']", *TINY],
            "variants: bench.attention=all is unknown; choose from bench.attention=cudnn|efficient|flash|math|whole",
        ),
        (["other=torch"], "other: must be package.module:function, got 'torch'"),
        (["baseline=none.json"], "baseline: none.json: No such file or directory; name a JSON that it wrote"),
        (["device=gpu"], "device: this machine has no CUDA GPU; choose from auto, cpu"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if arguments[0].startswith("out=tests"):
        (tmp_path / "there.json").touch()
        arguments, said = [f"out={tmp_path}/there.json"], f"out: {tmp_path}/there.json exists already; choose another"
    if TINY[0] in arguments:
        arguments = [*arguments, "models=[DiT-S/2]", "parts=[models,variants]", f"out={tmp_path}/a.json"]
    assert main([*arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert error.removeprefix("error: ").removeprefix("command line: ").startswith(said)


def test_a_busy_machine_is_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (2.0, 1.0, 1.0))
    with pytest.raises(UserError, match=r"^force: the load average is 2.00, above 0.5"):
        benchmark.bench([f"out={tmp_path / 'a.json'}"])
    assert not list(tmp_path.iterdir())


def test_settings_with_and_without_their_section() -> None:
    assert settings.read(["bench.full=true"]) == settings.read(["full=true"]) == BenchConfig(full=True)
    assert BenchConfig().chosen_parts == ("loop", "models", "variants", "pieces")
    assert BenchConfig(full=True).chosen_parts == PARTS
    assert "growth" not in BenchConfig(gpu=True).chosen_parts
    assert (BenchConfig().budget, BenchConfig(gpu=True).budget, BenchConfig(seconds=9).budget) == (170, 540, 9)


def test_what_no_time_is_left_for_is_said() -> None:
    rows = list(benchmark._rows(BenchConfig(tiny=True, seconds=1e-9), CPU, began=0.0))
    assert {row["skipped"] for row in rows if row.get("work") != "copy"} == {"the time is up"}
    assert {row["part"] for row in rows} == {"models", "loop", "pieces"}
    assert show.line(rows[-1]).endswith("skipped: the time is up")
