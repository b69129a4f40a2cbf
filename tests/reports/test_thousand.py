"""Many run folders at once: the work of `compare` grows linearly with their number."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
from made_runs import make_run

from diffbench.cli import main
from diffbench.evaluation import records
from diffbench.runs import base, build


@pytest.mark.parametrize("count", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_each_folder_is_read_once_and_one_network_is_built(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / "runs" / "dit-s0")]
    config = (runs[0] / "config.yaml").read_text()
    for seed in range(1, count):
        runs.append(Path(shutil.copytree(runs[0], tmp_path / "runs" / f"dit-s{seed}")))
        (runs[-1] / "config.yaml").write_text(config.replace("seed: 0\n", f"seed: {seed}\n", 1))
    calls: Counter[str] = Counter()

    def count_calls(module: object, name: str) -> None:
        real = getattr(module, name)

        def call(*args: object) -> object:
            calls[name] += 1
            return real(*args)

        monkeypatch.setattr(module, name, call)

    for module, name in ((base, "read_values"), (build, "cost_of"), (records, "read"), (base, "from_dict")):
        count_calls(module, name)
    monkeypatch.setattr(base, "_costs", {})
    assert main(["compare", *map(str, runs), f"out={tmp_path / 'report'}"]) == 0
    assert str(runs[0]) not in capsys.readouterr().out  # too many for a table with a column per run
    assert f"1 variant, {count:,} seeds" in (tmp_path / "report" / "report.html").read_text()
    # Each config, metrics and results file is read once, one network is built, and one run is opened for its attention.
    assert calls == {"read_values": count + 1, "read": 2 * count, "cost_of": 1, "from_dict": 2}
