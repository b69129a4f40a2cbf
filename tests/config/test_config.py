"""Configs: inheritance, overrides, registries, presets; every mistake is a one-line error naming file and key."""

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ValidationError

from diffbench.config.kinds import REGISTRIES, RunConfig
from diffbench.config.layers import experiments, parse_overrides
from diffbench.config.load import SMOKE, build, flatten, from_dict, load, to_dict, to_yaml
from diffbench.core.errors import UserError
from diffbench.denoisers import DENOISERS
from diffbench.studies.config import load_study

ROOT = Path(__file__).parents[2]
DIT = "experiments/digits/dit.yaml"
UNET = "experiments/digits/unet.yaml"
BASE = "data: {name: digits}\ndenoiser: {name: dit, hidden_size: 32, depth: 2, num_heads: 4}\n"


def refusal(path: str | Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def written(folder: Path, **files: str | bytes) -> Path:
    """Write files NAME.yaml and return the path of the first."""
    for name, content in files.items():
        (folder / f"{name}.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
    return folder / f"{next(iter(files))}.yaml"


@pytest.mark.parametrize("path", sorted(str(p.relative_to(ROOT)) for p in (ROOT / "experiments").glob("*/*.yaml")))
def test_every_experiment_loads_and_survives_saving(path: str) -> None:
    if Path(path).name.startswith("_"):
        assert yaml.safe_load(Path(path).read_text())  # a base is not an experiment
        return
    if "studies" in path:  # test_studies_plan.py takes a step of each of their variants
        assert load_study(path).kind == "study"
        return
    if "diffusers:" in Path(path).read_text():
        pytest.importorskip("diffusers")
    config = load(path)
    again = from_dict(yaml.safe_load(to_yaml(config)), "saved")
    assert again == config
    assert to_yaml(again) == to_yaml(config)
    assert path in experiments()


@pytest.mark.parametrize("name", DENOISERS)
def test_every_denoiser_has_an_experiment_and_replaces_another(name: str) -> None:
    assert load(f"experiments/digits/{name}.yaml").denoiser.name == name
    config = load(DIT, [f"denoiser.name={name}"])
    assert isinstance(config.denoiser, DENOISERS[name].config)
    if name != "dit":  # the sizes of dit do not carry over
        assert to_dict(config)["denoiser"] == {**vars(DENOISERS[name].config()), "name": name}


def test_children_inherit_missing_keys_from_their_bases(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    written(tmp_path, root=BASE + "seed: 1\noptimizer: {lr: 0.5, betas: [0.1, 0.2]}\n")
    written(tmp_path, middle="base: root.yaml\noptimizer: {betas: [0.3, 0.4]}\nseed: 2\n")
    config = load(written(tmp_path / "sub", leaf="base: ../middle.yaml\nseed: 3\n"), ["seed=4"])
    assert (config.seed, config.optimizer.lr, config.optimizer.betas) == (4, 0.5, [0.3, 0.4])
    assert config.denoiser.hidden_size == 32


def test_no_sizes_are_inherited_from_a_base_with_another_denoiser(tmp_path: Path) -> None:
    written(tmp_path, root=BASE)
    config = load(written(tmp_path, leaf="base: root.yaml\ndenoiser: {name: unet, norm_groups: 4}\n"))
    assert (config.denoiser.name, config.denoiser.norm_groups, config.denoiser.num_heads) == ("unet", 4, 4)
    assert not hasattr(config.denoiser, "hidden_size")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("trainer.max_images=2e5", 200_000),
        ("trainer.max_images=200_000", 200_000),
        ("optimizer.lr=1e-4", 1e-4),
        ("optimizer.lr=1", 1.0),
        ("optimizer.grad_clip_norm=null", None),
        ("optimizer.grad_clip_norm=", None),
        ("ema.decays=[0.9,0.99]", [0.9, 0.99]),
        ("ema.warmup=false", False),
        ("sample.steps=50", "50"),
        ("sample.steps=ddim50", "ddim50"),
        ("sample.steps=10,15,20", "10,15,20"),
        ("tag=3", "3"),
        ("tag='on'", "on"),
        ("tag=on", "on"),
        ("tag=True", "True"),
        ("tag=true", "true"),
        ("tag=007", "007"),
        ("tag=2024_11_28", "2024_11_28"),
        ("tag=1e3", "1e3"),
        ("tag=0x10", "0x10"),
        ("tag=1.50", "1.50"),
        ("init_from=/x/runs #2", "/x/runs #2"),
        ("init_from=a: b", "a: b"),
        ("init_from=- a", "- a"),
        ("init_from=1:30", "1:30"),
        ("init_from=2024-11-28", "2024-11-28"),
        ("seed=010", 10),
        ("seed= 1 ", 1),
        ("runs_dir=~/runs", os.path.expanduser("~/runs")),
        ("init_from=~/runs/a", os.path.expanduser("~/runs/a")),
        ("evaluate.judge=~/runs/a", os.path.expanduser("~/runs/a")),
        ("ema.warmup=No", False),
        ("tag=a-b_c.d", "a-b_c.d"),
        ("init_from=runs/a=b", "runs/a=b"),
        ("seed=${process.steps}", 1000),
    ],
)
def test_overrides_are_parsed_as_the_type_of_their_key(argument: str, value: Any) -> None:
    value_read = flatten(to_dict(load(DIT, [argument])))[argument.split("=")[0]]
    assert value_read == value
    assert type(value_read) is type(value)


def test_images_in_the_default_folder_are_pixels_with_or_without_channels() -> None:
    for args in ([], ["data.channels=null"]):
        config = load("experiments/cifar10/dit.yaml", [*args, "process.name=edm"])
        assert (config.pixels, config.process.sigma_data) == (True, 0.5)  # type: ignore[attr-defined]


def test_later_overrides_win() -> None:
    assert load(DIT, ["seed=1", "seed=2"]).seed == 2
    assert parse_overrides(["a.b=1", "a.c=2"]) == {"a": {"b": 1, "c": 2}}


def test_presets_replace_sizes_and_yield_to_explicit_keys(tmp_path: Path) -> None:
    config = load(DIT, ["denoiser.preset=DiT-S/2", "denoiser.depth=3"])
    assert (config.denoiser.hidden_size, config.denoiser.num_heads, config.denoiser.depth) == (384, 6, 3)
    assert "preset" not in to_yaml(config)
    root = "data: {name: digits}\ndenoiser: {name: dit, preset: DiT-B/4}\n"
    assert load(written(tmp_path, root=root), ["denoiser.depth=1"]).denoiser.hidden_size == 768
    assert load(DIT, ["denoiser.preset="]) == load(DIT)


def test_smoke_trains_two_steps_and_yields_to_the_command_line() -> None:
    config = load(DIT, ["debug=smoke"])
    assert config.trainer.max_images == 2 * config.trainer.batch_size
    assert load(DIT, ["debug=smoke", "trainer.max_images=24"]).trainer.max_images == 24
    known = flatten(to_dict(config))
    assert set(flatten(SMOKE)) <= set(known)


TOP = (
    "format, kind, seed, seeds, tag, runs_dir, debug, data, init_from, autoencoder, latent_dtype, denoiser, process,"
    " optimizer, ema, trainer, validation, sample, evaluate"
)
REFUSED = {
    "sedd=1": f"sedd: unknown key; allowed: {TOP}; did you mean 'seed'?",
    "procces.steps=3": f"procces: unknown key; allowed: {TOP}; did you mean 'process'?",
    "process.stpes=3": "process.stpes: unknown key; allowed: loss_space, weighting, ",
    "data.nam=x": "data.nam: unknown key; allowed: num_workers, planted, held_out, size, name; did you mean 'name'?",
    "base=x.yaml": f"base: unknown key; allowed: {TOP}",
    "trainer.max_images=many": "trainer.max_images: must be a whole number, got 'many'",
    "trainer.max_images=1.5": "trainer.max_images: must be a whole number, got 1.5",
    "trainer.max_images=true": "trainer.max_images: must be a whole number, got true",
    "trainer.max_images=": "trainer.max_images: must be a whole number, got null",
    "trainer.max_images=[1,2]": "trainer.max_images: must be a whole number, got [1, 2]",
    "trainer.max_images=.inf": "trainer.max_images: must be a whole number, got inf",
    "trainer.max_images.x=1": "trainer.max_images: must be a whole number, got {'x': 1}",
    "trainer.max_images=0": "trainer.max_images: must be positive, got 0",
    "trainer.accumulate_grad_batches=7": "trainer.accumulate_grad_batches: 7 must divide trainer.batch_size=",
    "trainer.label_dropout=1": "trainer.label_dropout: must lie in [0, 1), got 1.0",
    "trainer.label_dropout=0": "needs a null class, but trainer.label_dropout=0 trains none; allowed: ",
    "trainer.accelerator=tpu": (
        "trainer.accelerator: unknown value 'tpu'; choose from auto, cpu, gpu; did you mean 'gpu'?"
    ),
    "trainer.precision=16": (
        "trainer.precision: unknown value 16; choose from auto, 32-true, bf16-mixed, 16-mixed, 64-true"
    ),
    "trainer=5": "trainer: must be a section with keys, got 5; allowed: max_images, ",
    "trainer=null": "trainer: must be a section with keys, got null; allowed: max_images, ",
    "optimizer=[1]": "optimizer: must be a section with keys, got [1]; allowed: name, ",
    "denoiser=dit": "denoiser: must be a section with keys, got 'dit'; write denoiser.name=",
    "denoiser.name=ditt": f"choose from {', '.join(DENOISERS)}, or write package.module:Class; did you mean 'dit'?",
    "denoiser.name=[dit]": "denoiser.name: unknown name ['dit']; choose from ",
    "denoiser.name=": f"denoiser.name: missing; choose from {', '.join(DENOISERS)}",
    "data.name=cifar": f"data.name: unknown name 'cifar'; choose from {', '.join(REGISTRIES['data'])}",
    "denoiser.preset=DiT-S/3": "denoiser.preset: unknown preset 'DiT-S/3'; choose from DiT-S/2, ",
    "denoiser.channels=[8]": "denoiser.channels: unknown key; allowed: patch_size, ",
    "denoiser.depth.0=1": "denoiser.depth: must be a whole number, got {'0': 1}",
    "seed=-1": "seed: must lie in [0, 2^63), got -1",
    "seed=x": "seed: must be a whole number, got 'x'",
    "seed=[1": "seed: not valid YAML: did not find expected",
    "seed=${nope}": "seed: Interpolation key 'nope' not found",
    "tag=a/b": "tag: 'a/b' is not a valid name; allowed: up to 100 letters, digits, '-', '_' and '.'",
    "tag=..": "tag: '..' is not a valid name; allowed: ",
    "tag=[a]": "tag: must be text or null, got ['a']",
    "runs_dir=": "runs_dir: must be text, got null",
    "sample.steps=1e2": "sample.steps: must be like 250, ddim25 or 10,15,20, got '1e2'",
    "format=2": "format: must be 1, got 2",
    "debug=smok": "debug: unknown value 'smok'; choose from none, smoke, overfit; did you mean 'smoke'?",
    "optimizer.lr=.nan": "optimizer.lr: must be a finite number, got nan",
    "optimizer.lr=0": "optimizer.lr: must be positive, got 0.0",
    "optimizer.weight_decay=-1": "optimizer.weight_decay: must be at least 0, got -1.0",
    "optimizer.final_lr=2": "optimizer.final_lr: must lie in [0, 1], got 2.0",
    "optimizer.betas=0.9": "optimizer.betas: must be a list of finite numbers, e.g. [1, 2], got 0.9",
    "optimizer.betas=[a,b]": "optimizer.betas: must be a list of finite numbers, e.g. [1, 2], got ['a', 'b']",
    "optimizer.betas.0=0.5": "optimizer.betas: must be a list of finite numbers, e.g. [1, 2], got {'0': 0.5}",
    "optimizer.betas=[0.9]": "optimizer.betas: must be two numbers in [0, 1), got [0.9]",
    "optimizer.warmup_images=1e9": "must exceed optimizer.warmup_images=1000000000; allowed: null for a constant rate",
    "ema.decays=[0.9,0.9]": "ema.decays: must be different numbers between 0 and 1, got [0.9, 0.9]",
    "ema.warmup=maybe": "ema.warmup: must be true or false, got 'maybe'",
    "process.steps=1": "process.steps",
    "process.steps=50": "does not fit process.steps=50: cannot keep ",
    "validation.log_snr=[0,100]": "validation.log_snr: log-SNR must lie in ",
    "validation.log_snr=[0]": "validation.log_snr: must be at least two rising levels, got [0.0]",
    "sample.steps=abc": "sample.steps: must be like 250, ddim25 or 10,15,20, got 'abc'",
    "sample.steps=2000": "sample.steps: '2000' does not fit process.steps=1000: cannot keep 2000 of 1000 steps",
    "sample.steps=ddim999": "sample.steps: 'ddim999' does not fit process.steps=1000: no integer stride",
    "sample.eta=0.5": "sample.eta: belongs to sample.sampler=ddim; with ddpm leave it at 0",
    "sample.guidance=-1": "sample.guidance: must lie in [0, 1e6], got -1.0",
    "evaluate.reference=some": "evaluate.reference: unknown value 'some'; choose from same, all; did you mean 'same'?",
    "evaluate.every_count=3": "evaluate.every_count: must be at least 20, got 3",
    "evaluate.every_images=0": "evaluate.every_images: must be positive or null, got 0",
    "evaluate.best=fd": "evaluate.best: needs distances in training; allowed: null, or set evaluate.every_images",
    "evaluate.infinity=true": "evaluate.infinity: needs evaluate.count of at least 5000, got 500",
    "evaluate.count=5": "evaluate.count: must be at least 20, got 5",
    "denoiser=unet denoiser.dropout=0.1": "denoiser: must be a section with keys, got 'unet'; write denoiser.KEY=VALUE",
    "trainer=5 trainer.max_images=64": "trainer: must be a section with keys, got 5; write trainer.KEY=VALUE",
    "sample.sampler=DDIM": "euler_maruyama, dopri5, null; did you mean 'ddim'?",
    "Seed=1": "Seed: unknown key; allowed: format, ",
    "seed=1 2": "seed: must be a whole number, got '1 2'",
    "ema.warmup=2": "ema.warmup: must be true or false, got 2",
    f"optimizer.lr=1{'0' * 400}": f"optimizer.lr: must be a finite number, got 1{'0' * 400}",
    "optimizer.lr=1e999": "optimizer.lr: must be a finite number, got inf",
    "optimizer.betas=[0.9,.nan]": "optimizer.betas: must be a list of finite numbers, e.g. [1, 2], got [0.9, nan]",
    "optimizer.betas=[0.9,true]": "optimizer.betas: must be a list of finite numbers, e.g. [1, 2], got [0.9, True]",
    "trainer={devices: 1, devices: 2}": "trainer: not valid YAML: found duplicate key devices (line 1, column 14)",
    "optimizer.lr=0,001": "optimizer.lr: must be a finite number, got '0,001'",
    "trainer.max_images=1__0": "trainer.max_images: must be a whole number, got '1__0'",
    "trainer.max_images=0x10": "trainer.max_images: must be a whole number, got '0x10'",
    "foo": "'foo' is not an override; write key=value, e.g. trainer.max_images=200_000",
    "--seed=1": "'--seed=1' is not an override; write key=value",
    "-x": "'-x' is not an override; write key=value",
    "=5": "'=5' is not an override; write key=value",
    "a..b=1": "'a..b=1' is not an override; write key=value",
    "optimizer.betas[0]=1": "write a list as a whole, e.g. ema.decays=[0.99,0.999]",
}


def test_a_null_half_life_leaves_the_decays_unchanged() -> None:
    assert load(DIT, ["ema.half_life=null"]).ema == load(DIT).ema
    assert load(DIT, ["ema.half_life=[0.1]"]).ema.decays == [0.1]


@pytest.mark.parametrize("argument", REFUSED)
def test_the_error_for_a_wrong_override_names_its_key(argument: str) -> None:
    text = refusal(DIT, *re.split(r" (?=[a-z]+[.=])", argument))
    assert text.startswith("command line: ")
    assert REFUSED[argument] in text


def test_a_preset_of_another_network_is_refused() -> None:
    text = refusal(UNET, "denoiser.preset=DiT-S/2")
    assert text.startswith("command line: denoiser.preset: unknown preset 'DiT-S/2'; choose from ADM-")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (BASE + "trainr: {}\n", f"trainr: unknown key; allowed: {TOP}; did you mean 'trainer'?"),
        (BASE + "trainer:\n", "trainer: must be a section with keys, got null; allowed: max_images"),
        (BASE + "trainer.max_images: 5\n", f"trainer.max_images: unknown key; allowed: {TOP}"),
        (BASE + "---\nseed: 1\n", "not valid YAML: but found another document (line 3, column 1)"),
        (BASE + "5: 1\n", f"5: unknown key; allowed: {TOP}"),
        (BASE + "seed: 1\nseed: 2\n", "not valid YAML: found duplicate key seed (line 4, column 1)"),
        (BASE + "seed: [1\n", "not valid YAML: did not find expected ',' or ']' (line 4, column 1)"),
        (BASE + "trainer:\n\tbatch_size: 1\n", "not valid YAML: found character that cannot start any token (line 4"),
        (BASE + "seed: !!python/object/apply:os.system [ls]\n", "not valid YAML: could not determine a constructor"),
        (
            "a: &a [" + "1," * 99 + "1]\nb: &b [" + "*a," * 99 + "*a]\nc: [" + "*b," * 99 + "*b]\n",
            "not valid YAML: contains too many values",
        ),
        ("a: &a [*a]\n", "not valid YAML: nested too deeply"),
        ("5: 1\n5: 2\n", "not valid YAML: found duplicate key 5 (line 2, column 1)"),
        ("trainer: {devices: 1, devices: 2}\n", "not valid YAML: found duplicate key devices (line 1, column 23)"),
        ("[a]: 1\n", "not valid YAML: found a key that is not text (line 1, column 1)"),
        (b"\x00\xff\xfe", "not valid YAML: not text in UTF-8"),
        (b"tag: \xe9", "not valid YAML: not text in UTF-8"),
        ("- 1\n", "must contain keys with values, e.g. seed: 1"),
        ("5", "must contain keys with values, e.g. seed: 1"),
        ("", "data.name: missing; choose from digits"),
        ("data: {name: digits}\n", "denoiser.name: missing; choose from"),
        ("base: [a.yaml]\n", "base: must be the path of one YAML file, relative to this one, got ['a.yaml']"),
        ("base: 3\n", "base: must be the path of one YAML file, relative to this one, got 3"),
        ("base: bad.yaml\n", "base: the chain bad.yaml -> bad.yaml is a cycle"),
    ],
)
def test_the_error_for_a_wrong_file_names_the_file(tmp_path: Path, content: str | bytes, expected: str) -> None:
    path = written(tmp_path, bad=content)
    assert refusal(path).startswith(f"{path}: {expected}")


def test_an_error_in_a_base_names_the_base(tmp_path: Path) -> None:
    leaf = written(tmp_path, leaf="base: root.yaml\n", root=BASE + "optimizer: {lr: -1}\n")
    assert refusal(leaf) == f"{tmp_path / 'root.yaml'}: optimizer.lr: must be positive, got -1.0"
    assert refusal(leaf, "optimizer.lr=-2") == "command line: optimizer.lr: must be positive, got -2.0"


def test_a_value_in_place_of_a_section_is_refused_even_in_a_base(tmp_path: Path) -> None:
    leaf = written(tmp_path, leaf="base: root.yaml\ndenoiser: {depth: 1}\n", root="denoiser: unet\n")
    assert refusal(leaf) == (f"{leaf}: denoiser: must be a section with keys, got 'unet'; write denoiser.KEY=VALUE")


def test_missing_and_cyclic_bases_are_refused(tmp_path: Path) -> None:
    leaf = written(tmp_path, leaf="base: rot.yaml\n", root=BASE)
    root, rot = tmp_path / "root.yaml", tmp_path / "rot.yaml"
    assert refusal(leaf) == f"{leaf}: base: {rot}: no such file; choose from {root}; did you mean '{root}'?"
    a = written(tmp_path, a="base: b.yaml\n", b="base: a.yaml\n")
    assert refusal(a) == f"{tmp_path / 'b.yaml'}: base: the chain a.yaml -> b.yaml -> a.yaml is a cycle"


def test_a_missing_experiment_suggests_the_nearest() -> None:
    digits = ", ".join(path for path in experiments() if path.startswith("experiments/digits/"))
    for wrong, message in (
        ("experiments/digits/dti.yaml", "no such file"),
        ("experiments/digits/dit", "no such file"),
        ("experiments/digits", "is a folder, not a YAML file"),
    ):
        assert refusal(wrong) == f"{wrong}: {message}; choose from {digits}; did you mean '{DIT}'?"
    for wrong, meant in (("dit", "experiments/own/dit.yaml"), ("experiments/digit/dit.yaml", DIT)):
        line = refusal(wrong)
        assert line.startswith(f"{wrong}: no such file; choose from experiments/") and line.count(".yaml") <= 10
        assert line.endswith(f"; see diffbench list for more; did you mean '{meant}'?")


def test_an_incompatible_default_is_blamed_on_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, bad=BASE + "process: {steps: 100}\n")  # the default of sample.steps is 250
    assert refusal(path).startswith(f"{path}: sample.steps: '250' does not fit process.steps=100")


@dataclass
class Example:
    """Keys of the types that sections have."""

    tag: str | None = None
    lr: float = 1.0
    steps: int = 1
    warmup: bool = False
    betas: list[float] = field(default_factory=lambda: [0.9])


def test_omegaconf_misses_type_errors_that_build_finds() -> None:
    """OmegaConf accepts these wrong values silently or hides the key. If this fails, `build` may be replaced by it."""

    def by_omegaconf(text: str) -> Any:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Example), OmegaConf.create(text)))

    silent = {"tag: 007": "7", "tag: 2024_11_28": "20241128", "tag: on": "True", "tag: ???": None, "tag: 0x10": "16"}
    assert {text: by_omegaconf(text).tag for text in silent} == silent
    assert by_omegaconf("warmup: 2").warmup is True and math.isnan(by_omegaconf("lr: .nan").lr)
    with pytest.raises(ValidationError, match="could not be converted to Integer"):
        by_omegaconf("steps: 2e5")
    with pytest.raises(TypeError, match="Cannot merge incompatible container types"):
        by_omegaconf("betas: {0: 0.5}")
    for text, error in {"tag: ???": None, "warmup: 2": "warmup: must be true or false, got 2"}.items():
        values = parse_overrides([text.replace(": ", "=")])
        if error is None:
            assert build(Example, values).tag == "???"
        else:
            with pytest.raises(ValueError, match=error):
                build(Example, values)


def test_sections_are_plain_dataclasses() -> None:
    config = load(DIT)
    assert isinstance(config, RunConfig)
    assert type(config.ema.decays) is list
    assert type(to_dict(config)["denoiser"]) is dict
