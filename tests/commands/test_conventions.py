"""Command-line conventions: help with keys, shipped experiments, sources of values, completion, JSON."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made_runs import make_run

from diffbench.cli import main
from diffbench.commands.verbs import VERBS
from diffbench.config.keys import read_keys
from diffbench.config.load import flatten, load, to_dict

ROOT = Path(__file__).parents[2]
DIT = "experiments/digits/dit.yaml"
Capture = pytest.CaptureFixture[str]


def test_help_lists_the_keys_of_the_config() -> None:
    keys = {key.name: key for key in read_keys("config/kinds.py:RunConfig")}
    config_keys = flatten(to_dict(load(DIT)))
    named = {k for k in config_keys if k.split(".")[0] not in ("data", "denoiser", "process")}
    assert {k for k in keys if not k.endswith(".name") or k == "optimizer.name"} == named - {"format", "kind"}
    assert keys["trainer.max_images"].default == "1_000_000"
    assert keys["trainer.label_dropout"].default == "0.1"  # the default of a subclass
    assert keys["optimizer.name"].choices[:2] == ("adamw", "adam")
    assert keys["trainer.threads"].choices == ()  # auto or any number
    assert keys["evaluate.every_count"].text == "Number of samples per distance during training."


@pytest.mark.parametrize("verb", [name for name, verb in VERBS.items() if verb.keys])
def test_at_least_half_of_the_keys_in_help_are_described(verb: str) -> None:
    keys = VERBS[verb].read_keys()
    assert len({key.name for key in keys}) == len(keys) > 0
    assert sum(not key.text for key in keys) <= len(keys) // 2


def test_help_omits_keys_that_a_command_refuses() -> None:
    shown = {verb: {key.name for key in VERBS[verb].read_keys()} for verb in ("train", "evaluate", "reference")}
    training = {"evaluate.every_images", "evaluate.every_count", "evaluate.best"}
    assert training <= shown["train"] and not training & (shown["evaluate"] | shown["reference"])
    assert "evaluate.judge" in shown["evaluate"] and "evaluate.judge" not in shown["reference"]


def test_help_of_a_command_does_not_import_torch() -> None:
    code = (
        "import sys; from diffbench.cli import main\ntry: main(['train', 'x.yaml', '--help'])\nexcept SystemExit: pass"
    )
    code += "\nprint({'torch', 'omegaconf', 'numpy', 'lightning'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "trainer.batch_size=128" in done.stdout and done.stdout.endswith("\nset()\n")


def test_init_copies_the_experiments_and_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["show", DIT]) == 2
    assert f"{DIT}: no such file; `diffbench init` copies the shipped experiments here" in capsys.readouterr().err
    assert main(["init"]) == 0
    assert capsys.readouterr().out.endswith("files; try: diffbench train experiments/digits/dit.yaml\n")
    shipped_files = sorted(p.relative_to(ROOT) for p in ROOT.glob("experiments/*/*.yaml"))
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.glob("experiments/*/*.yaml")) == shipped_files
    assert load(DIT) == load(ROOT / DIT)
    assert main(["init"]) == 2
    assert "command line: experiments already exists; name another FOLDER" in capsys.readouterr().err


def test_show_prints_the_source_of_each_value(tmp_path: Path, capsys: Capture) -> None:
    args = ["denoiser.depth=2", "tag=007", "debug=smoke", "ema.decays=[0.9, 0.99]"]
    assert main(["show", DIT, *args]) == 0
    text = capsys.readouterr().out
    found = {line.split("#")[0].strip(): line.split("# ")[1] for line in text.splitlines() if "# " in line}
    assert found["depth: 2"] == found["tag: '007'"] == found["decays: [0.9, 0.99]"] == "command line"
    assert found["hidden_size: 64"] == f"{DIT}:9"
    assert found["grad_clip_norm: 1.0"] == "experiments/digits/_base.yaml:9"
    assert found["log_images: 8"] == "debug=smoke"
    assert found["timeout_s: 1800"] == "default"
    (tmp_path / "again.yaml").write_text(text)
    assert load(tmp_path / "again.yaml") == load(DIT, args)


def test_show_of_a_preset_and_of_another_denoiser(capsys: Capture) -> None:
    assert main(["show", "experiments/imagenet256-latent/dit-xl-2.yaml", "denoiser.depth=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(
        "num_heads: 16" in x and x.endswith("# preset, experiments/imagenet256-latent/dit-xl-2.yaml:8") for x in lines
    )
    assert any("depth: 3" in x and x.endswith("# command line") for x in lines)
    assert main(["show", DIT, "denoiser.name=unet"]) == 0
    assert not [x for x in capsys.readouterr().out.splitlines() if f"{DIT}:1" in x]  # without DiT's sizes


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("diffbench co", {"compare", "completion"}),
        ("diffbench train trainer.max_i", {"trainer.max_images="}),
        ("diffbench sample RUN guidance_p", {"guidance_power="}),
        (
            "diffbench train experiments/digits/di",
            {DIT, "experiments/digits/diffit.yaml", "experiments/digits/diffit-latent.yaml"},
        ),
        ("diffbench compare RUN out=exp", {"experiments/"}),
    ],
)
def test_bash_completion(line: str, completed: set[str], capsys: Capture, tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    assert main(["completion"]) == 0
    args = line.split()
    script = tmp_path / "script"
    script.write_text(
        f"{capsys.readouterr().out}\ncompopt() {{ :; }}\nCOMP_LINE='{line}' COMP_POINT={len(line)}\n"
        f"COMP_WORDS=({line}) COMP_CWORD={len(args) - 1}\n_diffbench\nprintf '%s\\n' \"${{COMPREPLY[@]}}\"\n"
    )
    done = subprocess.run([bash, str(script)], capture_output=True, text=True, check=True, cwd=ROOT)
    assert set(done.stdout.split()) == completed


def test_json_output_for_scripts(tmp_path: Path, capsys: Capture) -> None:
    runs = [
        str(
            make_run(
                tmp_path / "digits" / f"{name}-s{seed}", name, seed, error + 0.001 * seed, [f"runs_dir={tmp_path}"]
            )
        )
        for name, error in (("dit", 0.1), ("unet", 0.2))
        for seed in range(3)
    ]
    (tmp_path / "digits" / "broken").mkdir()
    (tmp_path / "digits" / "broken" / "config.yaml").write_text("[")
    assert main(["list", str(tmp_path), "--json"]) == 0
    broken, first, *_ = json.loads(capsys.readouterr().out)
    assert "error" in broken and first["run"] == runs[0] and first["complete"] is True
    assert first["validation"]["val/bound"] == pytest.approx(0.1)
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["presets"]["DiT-S/2"]["gmacs"] == pytest.approx(6.06, abs=0.005)
    assert main(["compare", *runs, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["outcome"], found["primary"], len(found["runs"])) == ("winner", "val/bound", 6)
    assert found["variants"]["unet"]["val/bound"]["mean"] == pytest.approx(0.201)
    (test,) = found["tests"]
    assert test["winner"] == "dit" and test["n"] == 3 and test["mean"] == pytest.approx(-0.1)
    assert Path(found["report"]).is_file()


@pytest.mark.parametrize("args", [[], ["--models"]])
def test_lists_fit_80_columns(args: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffbench.core.terminal.width", lambda: 80)
    assert main(["list", *args]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.slow
def test_a_wheel_contains_experiments_and_templates(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    shipped = tmp_path / "site" / "diffbench"
    assert (shipped / "py.typed").is_file() and (shipped / "reports/report.html.j2").is_file()
    assert (shipped / DIT).read_text() == (ROOT / DIT).read_text()
    assert {p.name for p in (tmp_path / "site").iterdir() if not p.name.endswith(".dist-info")} <= {"diffbench", "bin"}
