"""The benchmark: its plan, its errors, and all parts end to end on networks too small for meaningful times."""

import ast
import json
import math
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import busy, command, growth, loop, networks, pieces, report, steps, watch
from benchmarks.__main__ import MEASURES, bench, main, measured
from benchmarks.config import FULL, GPU, PARTS, SHORT, BenchConfig, shared
from diffbench.core.errors import UserError
from diffbench.denoisers import PRESETS
from diffbench.runs import build

CPU = torch.device("cpu")
TINY = ["tiny=true", "force=true"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Measure all parts except whole commands on tiny networks; return the report."""
    folder = tmp_path_factory.mktemp("bench")
    own = "variants=['no channels-last: trainer.channels_last=false']"
    options = ["models=[DiT-S/2]", f"parts=[{','.join(PARTS[:-2])}]", own, "seconds=1e6"]
    return bench([*TINY, *options, f"out={folder / 'a.json'}"]) | {"path": folder / "a.json"}


def test_the_report_describes_the_machine(made: dict[str, Any]) -> None:
    saved = json.loads(made["path"].read_text())
    assert saved == json.loads(json.dumps({k: v for k, v in made.items() if k != "path"}))
    machine = saved["machine"]
    assert (saved["format"], saved["settings"]["force"], saved["settings"]["tiny"]) == (1, True, True)
    assert (machine["threads"], machine["device"]) == (torch.get_num_threads(), "cpu")
    assert machine["versions"]["torch"] == torch.__version__
    assert {"processor", "cores", "load_average", "commit", "memory_bytes"} <= machine.keys()
    for suffix in (".png", ".growth.png"):
        assert made["path"].with_suffix(suffix).stat().st_size > 10_000


def test_every_part_reports_positive_numbers(made: dict[str, Any]) -> None:
    rows = made["rows"]
    assert {row["part"] for row in rows} == {"models", "loop", "data", "growth", "sampling"}
    assert not [row for row in rows if "skipped" in row]
    for row in rows:
        for name in ("ms", "ms_low", "images_per_s", "flops_per_s", "share", "bare_ms"):
            assert row.get(name, 1.0) > 0 and math.isfinite(row.get(name, 1.0)), (name, row)
        if "ms_low" in row:
            assert row["ms_low"] <= row["ms"] <= row["ms_high"]
        assert report.line(row).startswith(row["part"])


def test_each_variant_of_a_network_has_forward_train_and_sample_rows(made: dict[str, Any]) -> None:
    rows = [row for row in made["rows"] if row["part"] == "models"]
    by_mkl = ["linear by MKL"] if networks.mkl_is_slow() else []
    names = ["default", "no channels-last", "bf16", *by_mkl, "attention math"]
    assert [(row["variant"], row["work"]) for row in rows] == [
        (name, work) for name in names for work in ("forward", "train", "sample")
    ]
    config = networks.run_config(BenchConfig(tiny=True), "DiT-S/2", "cpu")
    cost = build.cost_of(config, build.load_data(config)[0])
    for row in rows:
        passes = {"forward": 1, "train": 3, "sample": 1}[row["work"]]
        assert row["flops_per_s"] == pytest.approx(2 * cost.macs * passes * 4 / row["ms"] * 1e3)
        assert row["share"] == pytest.approx(row["flops_per_s"] / row["peak"]["flops_per_s"])
        assert row["mm_share"] == pytest.approx(row["flops_per_s"] / row["peak"]["mm_flops_per_s"])
        assert row["peak"]["flops_per_s"] >= row["peak"]["mm_flops_per_s"]
        assert row["peak"]["precision"] == ("bf16-mixed" if row["variant"] == "bf16" else "32-true")
        assert (row["batch"], row["parameters"], row["rounds"]) == (4, cost.parameters, 2)
        assert ("ratio" in row) == (row["variant"] != "default")
    assert rows[1]["memory_bytes"] > rows[0]["memory_bytes"] > 0


def test_lightning_is_compared_to_a_bare_loop(made: dict[str, Any]) -> None:
    rows = [row for row in made["rows"] if row["part"] == "loop"]
    assert [row["name"] for row in rows] == ["experiments/digits/dit.yaml", "DiT-S/2"]
    for row in rows:
        assert (row["pairs"], row["steps"]) == (5, 2)
        assert row["overhead_low"] <= row["overhead_ms"] <= row["overhead_high"]
        assert row["data_wait_share"] > 0


def test_a_loop_out_of_time_ends_after_two_pairs() -> None:
    (row, _) = loop.measure(BenchConfig(tiny=True), CPU, time.monotonic() + 0.1)
    assert row["pairs"] == 2


def test_growth_has_a_slope_for_each_curve(made: dict[str, Any]) -> None:
    rows = [row for row in made["rows"] if row["part"] == "growth"]
    curves = {(row["name"], row["variant"]) for row in rows}
    assert {axis for _, axis in curves} == {"area", "batch", "depth", "width", "samples", "runs"}
    assert {(row["name"], row["variant"]) for row in rows if "time_slope" in row} == curves
    (batch,) = (row for row in rows if row["variant"] == "batch" and "memory_slope" in row)
    assert 0.2 < batch["memory_slope"] < 1.1  # doubling the batch at most doubles the memory
    assert [row["size"] for row in rows if row["name"] == "sampling" and "size" in row] == [8, 16]
    assert [row["size"] for row in rows if row["variant"] == "runs" and "size" in row] == [4, 6]
    assert [row["size"] for row in rows if row["variant"] == "area" and "size" in row] == [64, 256] * 2


@pytest.mark.slow
def test_whole_commands_are_timed_by_stage() -> None:
    rows = list(command.measure(BenchConfig(tiny=True), CPU, math.inf))
    assert not [row for row in rows if "skipped" in row]
    whole = {row["name"]: row for row in rows if row["work"] == "all of it"}
    assert list(whole) == list(command.plan(BenchConfig(), Path()))
    for name, row in whole.items():
        stages = {r["work"]: r["cpu_s"] for r in rows if r["name"] == name and "cpu_share" in r}
        assert sum(stages.values()) == pytest.approx(row["cpu_s"], rel=0.05, abs=0.1)
        assert stages.get("imports", 0) > 0 or name == "--help"  # its imports may end before the first observation
        assert ("first_step_s" in row) == (name in ("train, an empty cache", "train, another seed"))
    assert whole["--help"]["cpu_s"] < whole["train, another seed"]["cpu_s"]
    first = [r["work"] for r in rows if r["name"] == "train, an empty cache"]
    assert {"feature extractor", "samples", "validation"} <= {*first}


def test_every_stage_is_the_name_of_a_function() -> None:
    defined = set()
    for path in (Path(command.__file__).parents[1] / "diffbench").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                defined.add(node.name)
            elif isinstance(node, ast.ClassDef):
                defined |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    assert watch.STAGES.keys() - defined == {"_find_and_load", "_TrainingEpochLoop.advance"}


def test_sampling_counts_both_halves_of_guidance(made: dict[str, Any]) -> None:
    (row,) = (row for row in made["rows"] if row["part"] == "sampling")
    assert (row["batch"], row["steps"], row["guidance"], row["evaluations"]) == (4, 2, 1.5, 4)
    assert row["images_per_s"] == pytest.approx(4 / row["seconds"])


def test_sampling_without_a_deadline_takes_all_its_steps() -> None:
    (row,) = pieces.sampling(BenchConfig(full=True, tiny=True), CPU, math.inf)
    assert row["steps"] == pieces.PLAN["tiny"][2]


def test_a_baseline_shows_the_change(made: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, options = tmp_path / "b.json", ["models=[DiT-S/2]", "parts=[models]", f"baseline={made['path']}"]
    assert main([*TINY, *options, f"out={out}"]) == 0
    printed = capsys.readouterr().out
    assert f"\nAgainst {made['path']} (" in printed
    assert len([line for line in printed.splitlines() if line.endswith(" of the baseline")]) == 3
    assert out.exists() and out.with_suffix(".png").exists()


@pytest.mark.slow
def test_the_gpu_plan_runs_on_tiny_networks(tmp_path: Path) -> None:
    found = bench([*TINY, "gpu=true", "seconds=1e6", f"out={tmp_path / 'gpu.json'}"])
    names = {row["name"] for row in found["rows"] if row["part"] == "models" and row.get("work") == "train"}
    assert names == set(networks.LARGE)
    assert [row["part"] for row in found["rows"]] == sorted((row["part"] for row in found["rows"]), key=list(GPU).index)
    assert not [row for row in found["rows"] if "skipped" in row]


@pytest.mark.parametrize("model", [*PRESETS, *networks.SHORT])
def test_every_network_has_an_experiment(model: str) -> None:
    config = networks.run_config(BenchConfig(), model, "cpu")
    edm = model.startswith(("DDPM", "DiffiT-CIFAR", "DiffiT-FFHQ"))
    assert config.process.name == ("edm" if edm else "flow" if model.startswith("Lightning") else "vp")
    assert config.trainer.precision == "32-true"
    assert config.trainer.batch_size == (64 if model.endswith(".yaml") else 8)
    assert networks.run_config(BenchConfig(), model, "cuda").trainer.precision == "bf16-mixed"


def test_custom_networks_are_the_size_of_dit_s_2() -> None:
    found = {}
    for model in ("DiT-S/2", *networks.OWN):
        config = networks.run_config(BenchConfig(), model, "cpu")
        found[model] = build.cost_of(config, build.load_data(config)[0]).gmacs
    assert found["DiT-S/2"] == pytest.approx(6.06, abs=0.01)
    assert all(5.4 < gmacs < 6.7 for gmacs in found.values()), found


@pytest.mark.parametrize("form", [BenchConfig(), BenchConfig(full=True), BenchConfig(gpu=True)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_variant_is_a_config(form: BenchConfig, device: str) -> None:
    found: dict[str, list[str]] = {}
    for model in [*networks.SHORT, *networks.LARGE]:
        base = networks.run_config(form, model, device)
        for variant in networks.variants(form, model, base, device):
            if variant.overrides:
                assert networks.run_config(form, model, device, variant.overrides) != base
            found.setdefault(model, []).append(variant.name)
    assert all(names[0] == "default" and len(set(names)) == len(names) for names in found.values())
    assert {"DiT-S/2", networks.DIGITS[0]} <= {model for model, names in found.items() if len(names) > 1}
    assert (len(found["DiT-XL/2"]) > 1) is (form.gpu or device == "cuda")
    if form.gpu:
        assert found["DiT-XL/2"][1] == found["DiffiT-XL/2"][1] == "compiled block"
        assert found["DDPM++-CIFAR10-cond"][1] == "compiled model"


def test_busy_processes_end_with_the_block() -> None:
    def children() -> int:
        found = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "while os.getppid"], capture_output=True)
        return len(found.stdout.split())

    with busy.busy(2):
        assert children() == 2
    assert children() == 0


def test_help_prints_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert [name for name in vars(BenchConfig()) if f"\n  {name}=" not in out] == []


def test_training_next_to_busy_processes_prints_a_rate(capsys: pytest.CaptureFixture[str]) -> None:
    busy.main(["experiments/digits/dit.yaml", "all threads, asleep", "true"])
    assert float(capsys.readouterr().out) > 0
    row = {"part": "busy", "name": "experiments/digits/dit.yaml", "variant": "default", "size": 1, "images_per_s": 1234}
    assert report.line(row).split() == ["busy", "experiments/digits/dit.yaml", "1", "1,234.0", "img/s"]


@pytest.mark.parametrize("slow", [True, False])
def test_linear_layers_by_mkl_are_a_variant_only_if_slow(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "mkl_is_slow", lambda: slow)

    def offered(model: str, device: str, form: BenchConfig) -> bool:
        found = networks.variants(form, model, networks.run_config(form, model, device), device)
        return "linear by MKL" in [variant.name for variant in found]

    assert offered("DiT-S/2", "cpu", BenchConfig()) is offered("DiffiT-S/2", "cpu", BenchConfig(full=True)) is slow
    assert not offered("DiT-S/2", "cuda", BenchConfig()) and not offered("ADM-S/32", "cpu", BenchConfig(full=True))


def test_a_custom_variant_is_parsed() -> None:
    form = BenchConfig(models=["DiffiT-S/2"], variants=["mine: trainer.tf32=true optimizer.lr=1e-5"])
    variant = networks.variants(form, "DiffiT-S/2", networks.run_config(form, "DiffiT-S/2", "cpu"), "cpu")[1]
    assert (variant.name, variant.overrides) == ("mine", ("trainer.tf32=true", "optimizer.lr=1e-5"))
    assert not variant.same_network and networks.Variant("x", ("trainer.tf32=true",)).same_network


def test_a_network_with_too_slow_steps_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps.Products, "peak", lambda self: {"flops_per_s": 1e9})
    (row,) = steps.measure(BenchConfig(models=["DiT-XL/2"], tiny=False), CPU, math.inf)
    assert row["skipped"] == "a training step at batch 8 takes 5694 s"  # 118.6 GMACs


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["modells=[x]"], "modells: unknown key; allowed: models, parts, full"),
        (["models=[DiT-S/3]"], "models: unknown network 'DiT-S/3'; choose from DiffiT-S/2, ADM-S/32, ADM-64"),
        (["models=[]"], "models: must contain at least one, or be null, got []"),
        (["parts=[loops]"], "parts: unknown value 'loops'; choose from loop, models, variants"),
        (["full=true", "gpu=true"], "gpu: sets its own length; leave out full"),
        (["batch=0"], "batch: must be positive, got 0"),
        (["out=x.txt"], "out: must end in .json, got 'x.txt'"),
        (["out=there.json"], "out: there.json already exists; choose another name"),
        (["variants=[fast]"], "variants: must look like 'plain: trainer.channels_last=false', got 'fast'"),
        (
            ["variants=['x: trainer.compile=auto']"],
            "variants: trainer.compile=auto depends on the machine; choose none",
        ),
        (
            ["variants=['x: trainer.compiel=none']", *TINY, "parts=[variants]"],
            "trainer.compiel: unknown key; allowed: ",
        ),
        (
            ["baseline=none.json"],
            "baseline: none.json: No such file or directory; give the JSON of an earlier benchmark",
        ),
        (["gpu=true"], "gpu: this machine has no CUDA GPU; leave it out"),
    ],
)
def test_invalid_options_are_refused_in_one_line(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.json").touch()
    assert (
        main([*arguments, *([] if "DiT-S/3" in arguments[0] or "models" in arguments[0] else ["models=[DiT-S/2]"])])
        == 2
    )
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert error.removeprefix("error: ").removeprefix("command line: ").startswith(text)


def test_a_busy_machine_is_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(report, "busy_share", lambda: 0.5)
    with pytest.raises(UserError, match=r"^force: 50% of the cores are busy, more than 25%: other processes"):
        bench([f"out={tmp_path / 'a.json'}"])
    assert not list(tmp_path.iterdir())
    report.check_quiet(force=True)
    monkeypatch.setattr(report, "busy_share", lambda: 0.2)
    report.check_quiet(force=False)


def test_busy_share_is_the_fraction_of_busy_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(["cpu 10 0 10 70 10 0 0 0", "cpu 30 0 20 130 20 0 0 0"])
    monkeypatch.setattr(report.Path, "read_text", lambda self: next(ticks) + "\ncpu0 0\n")
    assert report.busy_share(0.0) == pytest.approx(30 / 100)
    monkeypatch.undo()
    monkeypatch.setattr(report, "Path", lambda name: Path("/nowhere"))
    assert report.busy_share() == os.getloadavg()[0] / (os.cpu_count() or 1)


def test_measurements_are_kept_if_the_run_ends_early(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def part(config: BenchConfig, device: torch.device, deadline: float) -> Iterator[dict[str, Any]]:
        yield {"part": "data", "name": "a", "ms": 1.0}
        raise KeyboardInterrupt

    monkeypatch.setitem(MEASURES, "data", part)
    with pytest.raises(KeyboardInterrupt):
        bench(["parts=[data]", "force=true", f"out={tmp_path / 'a.json'}"])
    assert json.loads((tmp_path / "a.json").read_text())["rows"] == [{"part": "data", "name": "a", "ms": 1.0}]


def test_a_part_that_cannot_run_is_reported_as_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def part(config: BenchConfig, device: torch.device, deadline: float) -> Iterator[dict[str, Any]]:
        yield from ()
        raise RuntimeError("no such\nkernel")

    monkeypatch.setitem(MEASURES, "data", part)
    assert list(measured(BenchConfig(parts=["data"]), CPU)) == [
        {"part": "data", "name": "data", "skipped": "no such kernel"}
    ]


def test_parts_and_time_budget_of_each_form() -> None:
    assert (BenchConfig().shares, BenchConfig(full=True).shares, BenchConfig(gpu=True).shares) == (SHORT, FULL, GPU)
    assert (BenchConfig().budget, BenchConfig(gpu=True).budget, BenchConfig(seconds=9).budget) == (170, 540, 9)
    assert BenchConfig(full=True).budget == BenchConfig(parts=["busy"]).budget == math.inf
    assert BenchConfig(parts=["busy", "loop"]).budget == 170
    assert list(BenchConfig(gpu=True, parts=["growth", "loop", "variants"]).shares) == ["models", "loop", "growth"]
    assert next(iter(GPU)) == "models" and sum(GPU.values()) == pytest.approx(1)
    assert not BenchConfig(parts=["models"]).with_variants and BenchConfig(parts=["variants"]).with_variants


def test_items_share_the_remaining_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    found = []
    for item, until in shared("abcd", 12.0):
        found.append((item, until))
        now[0] += {"a": 1.0, "b": 2.0, "c": 10.0, "d": 0.0}[item]
    assert found == [
        ("a", 3.0),
        ("b", 1 + 11 / 3),
        ("c", 3 + 9 / 2),
        ("d", None),
    ]  # unused time goes to the later items


def test_parts_without_time_left_are_reported_as_skipped() -> None:
    rows = list(measured(BenchConfig(tiny=True, seconds=1e-9), CPU))
    assert {row["skipped"] for row in rows} == {"the time is up"}
    assert {row["part"] for row in rows} == {"models", "loop", "data"}
    assert report.line(rows[-1]).endswith("skipped: the time is up")
    assert [row["skipped"] for row in growth.measure(BenchConfig(), CPU, 0.0)] == ["the time is up"] * 7
