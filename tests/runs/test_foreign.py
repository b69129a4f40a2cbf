"""Custom networks: what is refused before training, and that they can do all that a registered denoiser can."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from diffbench.cli import main
from diffbench.config.kinds import RunConfig
from diffbench.config.load import load
from diffbench.core import tensors
from diffbench.core.errors import UserError
from diffbench.runs import build as runs_build
from diffbench.runs import weights
from diffbench.runs.denoiser import DenoiserRun
from diffbench.runs.lifecycle import load as load_run
from diffbench.studies.config import load_study
from diffbench.studies.matching import match_size
from diffbench.studies.plan import training_variants

NETS = """
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from parts import conv  # next to this file


class Plain(nn.Module):
    def __init__(self, image_size, channels, num_classes, width=4, widths=(2, 4)):
        super().__init__()
        self.shape = image_size, channels, num_classes
        self.inside, self.out = conv(channels, width), conv(width, channels)
        self.label = nn.Embedding(num_classes + 1, width)
        self.norm = nn.BatchNorm2d(width)  # its buffers change in training
        self.fixed = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x, t, y):
        condition = self.label(y) * t[:, None] / 1000 * self.fixed
        return self.out(self.norm(self.inside(x) + condition[..., None, None]).relu())


class Values(Plain):  # needs values to be built and run, and the meta device has none
    def __init__(self, channels, num_classes):
        super().__init__(8, channels, num_classes)
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]
        self.heads = nn.MultiheadAttention(4, 2, batch_first=True)
        self.scale = torch.ones(())

    def forward(self, x, t, y):
        tokens = self.inside(x).flatten(2).transpose(1, 2)
        tokens = self.heads(tokens, tokens, tokens, need_weights=False)[0] * self.scale + self.label(y)[:, None]
        return self.out(self.norm(tokens.transpose(1, 2).unflatten(2, (8, 8)))) * (1 if t.max().item() > 0 else 2)


class Keywords(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.layer = conv(channels, channels)

    def forward(self, *, sigma, image):
        return {"image": self.layer(image) / (1 + sigma[:, None, None, None])}


class Unused(Plain):
    def __init__(self, channels, num_classes):
        super().__init__(8, channels, num_classes)
        self.spare = nn.Linear(2, 2)


class Noisy(Plain):
    def forward(self, x, t, y):
        return super().forward(x + torch.randn_like(x), t, y)


class NoisyInTraining(Plain):  # from a generator that torch does not seed
    def forward(self, x, t, y):
        return super().forward(x + float(np.random.randn()) * self.training, t, y)


class InPlace(Plain):
    def forward(self, x, t, y):
        return super().forward(x, t.div_(1000), y)


class Mixed(Plain):
    def __init__(self, channels, num_classes):
        super().__init__(8, channels, num_classes)
        self.norm.double()


class Frozen(Plain):
    def __init__(self, channels, num_classes):
        super().__init__(8, channels, num_classes)
        self.requires_grad_(False)


instance = Plain(8, 1, 10)


class Smaller(Plain):
    def forward(self, x, t, y):
        return super().forward(x, t, y)[:, :, :4]


class NoisyALittle(Plain):
    def forward(self, x, t, y):
        return super().forward(x, t, y) + 1e-6 * torch.randn_like(x)


class OtherInEvaluation(Plain):
    def forward(self, x, t, y):
        out = super().forward(x, t, y)
        return out if self.training else self.other(out)

    def other(self, out):
        return out, None


class SmallerInEvaluation(OtherInEvaluation):
    def other(self, out):
        return out[..., :4]


class FailsInEvaluation(OtherInEvaluation):
    def other(self, out):
        raise KeyError("no such mode")


class NanInEvaluation(OtherInEvaluation):
    def other(self, out):
        return out / 0


class Exits(Plain):
    def forward(self, x, t, y):
        raise SystemExit(3)


class NoBackward(Plain):
    def forward(self, x, t, y):
        hidden = self.inside(x).sigmoid()
        out = self.out(hidden) + self.label(y).sum()
        hidden.add_(1)  # the gradient needs the old value
        return out


class Wider(Plain):
    def forward(self, x, t, y):
        return super().forward(x, t, y).double()


class Tokens(Plain):
    def __init__(self, channels, num_classes):
        super().__init__(8, channels, num_classes)
        self.norm, self.place = nn.Identity(), nn.Embedding(num_classes + 1, 4)  # as many rows as labels

    def labels(self, y):
        return self.label(y[:, None]) + self.label(y[:, None].expand(-1, 2)).sum(1, keepdim=True)

    def forward(self, x, t, y):
        token = self.labels(y) + self.place(torch.arange(len(self.place.weight))).mean(0)
        return self.out(self.inside(x) + token.transpose(1, 2)[..., None])


class Backwards(Tokens):
    def labels(self, y):
        return self.label(10 - y)[:, None]


class FewRows(Plain):
    def __init__(self, image_size, channels, num_classes):
        super().__init__(image_size, channels, num_classes - 1)


class Broken(Plain):
    def __init__(self, channels):
        raise KeyError("no such thing")


@dataclass
class ConfiguredConfig:
    width: int = 4
    sizes: tuple[int, ...] = (1, 2)

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"denoiser.args.width: must be positive, got {self.width}")


class Configured(Plain):
    def __init__(self, config: ConfiguredConfig | None, image_size, channels, num_classes):
        super().__init__(image_size, channels, num_classes, config.width)
        self.sizes = config.sizes


@dataclass
class AssertedConfig:
    width: int = 4
    twice: int = field(init=False)

    def __post_init__(self):
        assert self.width > 1, "too narrow"
        if self.width > 8:
            raise ValueError("width: too wide")
        self.twice = 2 * self.width


class Asserted(Plain):
    def __init__(self, config: AssertedConfig, channels, num_classes):
        super().__init__(8, channels, num_classes, config.twice)


@dataclass
class HeldConfig:
    act: type = nn.SiLU


class Held(Plain):
    def __init__(self, config: HeldConfig, channels, num_classes):
        super().__init__(8, channels, num_classes)


@dataclass
class UntypedConfig:
    sizes: "Sizes" = ()


class Untyped(Plain):
    def __init__(self, config: UntypedConfig, channels, num_classes):
        super().__init__(8, channels, num_classes)


def function(channels, num_classes, width: int):
    return Plain(8, channels, num_classes, width)


def number():
    return 3


class Other:
    pass
"""
LATE = """
from nets import Plain


class Late(Plain):
    def forward(self, x, t, y):
        from later import twice

        return twice(super().forward(x, t, y))
"""
PARTS = "from torch import nn\n\n\ndef conv(a, b):\n    return nn.Conv2d(a, b, 3, padding=1)\n"


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "parts.py").write_text(PARTS)
    (tmp_path / "wrong.py").write_text("import nothing_of_this_name\n")
    base = Path("experiments/digits/_base.yaml").resolve()
    (tmp_path / "e.yaml").write_text(f"base: {base}\ndenoiser: {{name: 'nets:Plain'}}\nruns_dir: {tmp_path / 'runs'}\n")
    return tmp_path / "e.yaml"


def denoiser(*overrides: str) -> list[str]:
    return [f"denoiser.{override}" for override in overrides]


REFUSED = {
    "no module": (["name=nowhere:Net"], "denoiser.name: nowhere cannot be imported (ModuleNotFoundError"),
    "import fails": (["name=wrong:Net"], "wrong cannot be imported (ModuleNotFoundError: No module named 'nothing_of"),
    "no attribute": (["name=nets:Plane"], "denoiser.name: nets has no Plane; choose from Plain,"),
    "no name": (["name=nets/x:Net"], "write package.module:Class"),
    "no module class": (["name=nets:Other"], "nets:Other is neither a torch.nn.Module class nor a function"),
    "no network": (["name=nets:number"], "nets:number returns a value of type int, not a torch.nn.Module"),
    "unknown argument": (
        ["args.widht=4"],
        "denoiser.args.widht: nets:Plain takes no such argument; allowed: image_size",
    ),
    "missing argument": (["name=nets:function"], "denoiser.args.width: missing; nets:function needs it"),
    "unknown key": (
        ["name=nets:Configured", "args.widht=4"],
        "denoiser.args.widht: unknown key; allowed: width, sizes",
    ),
    "wrong type": (["name=nets:Configured", "args.width=x"], "denoiser.args.width: must be a whole number, got 'x'"),
    "wrong value": (["name=nets:Configured", "args.width=0"], "denoiser.args.width: must be positive, got 0"),
    "assertion": (
        ["name=nets:Asserted", "args.width=1"],
        "command line: denoiser.args: AssertedConfig refuses these values (AssertionError: too narrow)",
    ),
    "no key": (["name=nets:Asserted", "args.width=9"], "command line: denoiser.args: width: too wide"),
    "no argument": (["name=nets:Asserted", "args.twice=9"], "denoiser.args.twice: unknown key; allowed: width"),
    "no YAML": (["name=nets:Held"], "denoiser.args.act: HeldConfig has a value of type type; use what YAML can"),
    "no types": (["name=nets:Untyped"], "denoiser.name: the types of UntypedConfig cannot be read (NameError"),
    "size": (["width=widht"], "denoiser.width: no argument 'widht'; choose from"),
    "preset": (["preset=S"], "denoiser.name=nets:Plain has none"),
    "twice": (["call.t=0"], "denoiser.call: x, t and y must go to different positions or names"),
    "gap": (["call={x: 0, t: 2, y: null}"], "positions must count from 0 without a gap, got 0, 2; pass a later"),
    "negative": (["call.y=-1"], "denoiser.call: positions must count from 0 without a gap, got -1, 0, 1;"),
    "not built": (["name=nets:Broken"], "nets:Broken cannot be built (KeyError: 'no such thing')"),
    "shape": (["name=nets:Smaller"], "outputs 1x4x8 where 1x8x8 is needed"),
    "no gradient": (["name=nets:Unused"], "no gradient reaches the parameter spare.weight and 1 more"),
    "random": (["name=nets:Noisy"], "a second forward pass in evaluation returns another output"),
    "random, a little": (["name=nets:NoisyALittle"], "denoiser: in evaluation this network draws random numbers or"),
    "kind in evaluation": (["name=nets:OtherInEvaluation"], "forward returns tuple in evaluation; name the tensor"),
    "shape in evaluation": (["name=nets:SmallerInEvaluation"], "outputs 1x8x4 where 1x8x8 is needed"),
    "fails in evaluation": (["name=nets:FailsInEvaluation"], "forward fails for a 1x8x8 image with {x: 0, t: 1"),
    "not finite": (["name=nets:NanInEvaluation"], "denoiser: forward returns values that are not finite"),
    "exit": (["name=nets:Exits"], "(SystemExit: 3)"),
    "backward": (["name=nets:NoBackward"], "denoiser: no gradient can be computed (RuntimeError: one of the variables"),
    "type": (["name=nets:Wider"], "denoiser: forward returns float64, but the parameters are float32; return float32"),
    "random in training": (["name=nets:NoisyInTraining"], "pass in training with the same torch seed returns another"),
    "in place": (["name=nets:InPlace"], "denoiser: forward changes its input t in place; have it work on a copy"),
    "types": (["name=nets:Mixed"], "denoiser.name: parameters are of type float32 and float64 (norm.weight); make all"),
    "nothing to train": (["name=nets:Frozen"], "denoiser.name: this network has no parameters to train"),
    "instance": (["name=nets:instance"], "nets:instance is neither a torch.nn.Module class nor a function"),
    "null label": (["name=nets:FewRows"], "label 10 means no class: its table needs 11 rows"),
    "output's place": (["call.output=7"], "(IndexError: index 7 is out of bounds for dimension 0 with size 1)\n"),
    "call": (["name=nets:Keywords"], "denoiser.call: forward fails for a 1x8x8 image with {x: 0, t: 1, y: 2,"),
    "output": (["name=nets:Keywords", "call={x: image, t: sigma, y: null}"], "forward returns dict with image; name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_networks_that_cannot_train_are_refused(case: str, yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides, message = REFUSED[case]
    assert main(["train", str(yaml), *denoiser(*overrides), "sample.guidance=1"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (yaml.parent / "runs").exists()


def test_the_hint_names_the_nearest_argument(yaml: Path) -> None:
    with pytest.raises(UserError, match=r"did you mean 'width'\?$"):
        load(yaml, ["denoiser.args.widht=4"])


def built(yaml: Path, *overrides: str) -> tuple[DenoiserRun, nn.Module]:
    config = load(yaml, denoiser(*overrides))
    run = DenoiserRun(yaml.parent / "unwritten", config)  # type: ignore[arg-type]
    run.check(config)
    return run, run.network.eval()


X, T, Y = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8), torch.tensor([100.0, 600.0]), torch.tensor([3, 10])


def test_the_network_gets_its_arguments_and_its_inputs(yaml: Path) -> None:
    run, net = built(yaml, "args.width=6")
    inner = net.network
    assert inner.shape == (8, 1, 10) and inner.out.in_channels == 6
    assert torch.equal(net(X, T, Y), inner(X, T, Y))
    assert torch.equal(net(X, T), inner(X, T, torch.tensor([10, 10])))  # no labels: no class
    assert run.cost.parameters == sum(p.numel() for p in inner.parameters())  # without the buffers of the norm
    one_hot = torch.eye(11)[Y]
    assert torch.equal(net(X, T, one_hot), net(X, T, Y))
    halves = (torch.eye(11)[3] + torch.eye(11)[5]).repeat(2, 1) / 2
    table = inner.label.weight.data
    assert torch.equal(net.label_rows(), table)
    mixed = net(X, T, halves)
    table[0] = (table[3] + table[5]) / 2
    assert torch.equal(mixed, net(X, T, torch.tensor([0, 0])))
    assert run.cost.macs == 64 * 9 * 6 * 2
    _, configured = built(yaml, "name=nets:Configured", "args={width: 3, sizes: [5, 6]}")
    assert configured.network.out.in_channels == 3 and configured.network.sizes == (5, 6)
    _, plain = built(yaml, "name=nets:function", "args.width=2")
    assert plain.network.out.in_channels == 2


def test_a_neighbouring_module_that_is_imported_late_is_found(yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (yaml.parent / "late.py").write_text(LATE)
    (yaml.parent / "later.py").write_text("def twice(x):\n    return 2 * x\n")
    _, net = built(yaml, "name=late:Late")
    assert net(X, T, Y).shape == X.shape
    assert sys.path.count(str(yaml.parent)) == 1


def test_labels_as_tokens_are_mixed_too(yaml: Path) -> None:
    _, net = built(yaml, "name=nets:Tokens")
    assert torch.equal(net(X, T, torch.eye(11)[Y]), net(X, T, Y))
    table = net.network.label.weight.data
    halves = (torch.eye(11)[3] + torch.eye(11)[5]).repeat(2, 1) / 2
    mixed = net(X, T, halves)
    table[0] = (table[3] + table[5]) / 2
    assert torch.allclose(mixed, net(X, T, torch.tensor([0, 0])))
    _, net = built(yaml, "name=nets:Backwards")
    with pytest.raises(ValueError, match="this network does not look up labels unchanged"):
        net(X, T, halves)


def test_non_init_fields_are_left_out_of_the_config(yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(yaml), *denoiser("name=nets:Asserted"), "tag=x", "debug=smoke"]) == 0
    (run,) = (yaml.parent / "runs" / yaml.parent.name).iterdir()
    assert "twice" not in (run / "config.yaml").read_text()
    assert load_run(run).network.network.out.in_channels == 8


def test_a_network_without_labels_refuses_labels_and_guidance(yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = denoiser("name=nets:Keywords", "call={x: image, t: sigma, y: null, output: image}")
    assert main(["train", str(yaml), *overrides, "sample.guidance=2"]) == 2
    assert "sample.guidance: 2 needs labels, but denoiser.call.y=null gives the network none" in capsys.readouterr().err
    assert main(["train", str(yaml), *overrides, "sample.guidance=1", "tag=x", "debug=smoke"]) == 0
    (run,) = (yaml.parent / "runs" / yaml.parent.name).iterdir()
    assert main(["sample", str(run), "n=2"]) == 0
    capsys.readouterr()
    assert main(["sample", str(run), "labels=3"]) == 2
    assert "labels: denoiser.call.y=null gives this network none; leave them out" in capsys.readouterr().err


def test_planted_classes_are_not_explained_without_a_label_table(
    yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = denoiser("name=nets:Keywords", "call={x: image, t: sigma, y: null, output: image}")
    overrides += ["sample.guidance=1", "tag=p", "debug=smoke", "data.planted={copy of 8: [8]}"]
    assert main(["train", str(yaml), *overrides]) == 0
    assert (
        "note: planted classes are not explained, since this network has no table of label emb"
        in capsys.readouterr().out
    )
    (run,) = (yaml.parent / "runs" / yaml.parent.name).iterdir()
    assert {"fd/digits-cnn@20", "planted_found@1"} & load_run(run).results[-1].keys() == {"fd/digits-cnn@20"}


def test_the_macs_of_a_network_that_needs_real_values_are_counted(yaml: Path) -> None:
    run, _ = built(yaml, "name=nets:Values")
    attention = 64 * 4 * 12 + 2 * 64 * 64 * 4 + 64 * 4 * 4
    assert run.cost.macs == 2 * 64 * 9 * 4 + attention


@pytest.mark.parametrize("process", ["vp", "edm", "flow"])
@pytest.mark.parametrize("t_as", ["noise_level", "log_snr"])
def test_times_become_noise_levels(process: str, t_as: str, yaml: Path) -> None:
    config = load(
        yaml,
        [
            *denoiser("name=nets:Keywords", "call={x: image, t: sigma, y: null, output: image}"),
            f"denoiser.call.t_as={t_as}",
            f"process.name={process}",
            "sample.guidance=1",
        ],
    )
    net = DenoiserRun(yaml.parent / "unwritten", config).network  # type: ignore[arg-type]
    received = []
    net.network.register_forward_pre_hook(lambda _, args, named: received.append(named["sigma"]), with_kwargs=True)
    process_of = runs_build.build_process(config.process)  # type: ignore[attr-defined]
    levels = torch.tensor([-4.0, 2.0], dtype=torch.float64)
    net(*process_of.inputs(X, process_of.time_at(levels)))
    wanted = levels if t_as == "log_snr" else (-levels / 2).exp()
    assert received[0].numpy() == pytest.approx(wanted.numpy(), rel=1e-5)
    if process == "flow":  # starts at an infinite noise level
        assert net(X, torch.zeros(2)).isfinite().all()


@pytest.mark.parametrize("process", ["edm", "flow"])
def test_times_that_are_not_steps_are_not_rounded(process: str, yaml: Path) -> None:
    with pytest.raises(UserError, match=rf"denoiser\.call\.t_as: step rounds .*, not {process}; choose time"):
        load(yaml, ["denoiser.call.t_as=step", f"process.name={process}", "sample.guidance=1"])


def test_custom_networks_draw_one_batch_at_a_time(yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("diffbench.training.speed._default_threads", lambda: 4)
    threads = torch.get_num_threads()
    run, _ = built(yaml)
    run.use_threads()
    torch.set_num_threads(threads)
    assert run.at_once == 4 and run.sampler(run.config.sample).at_once == 1  # they may store state in a call


def test_code_is_kept_apart_by_folder_and_identified_by_its_hash(yaml: Path, tmp_path: Path) -> None:
    first = load(yaml)
    assert load(yaml).denoiser == first.denoiser  # type: ignore[attr-defined]
    other = tmp_path / "other"
    shutil.copytree(tmp_path, other, ignore=shutil.ignore_patterns("other"))
    same = load(other / "e.yaml").denoiser.code  # type: ignore[attr-defined]
    (other / "parts.py").write_text(PARTS.replace("3, padding=1", "1"))
    second = load(other / "e.yaml")
    assert same == first.denoiser.code != second.denoiser.code  # type: ignore[attr-defined]
    for config, side in ((first, 3), (second, 1), (first, 3)):
        network = DenoiserRun(tmp_path / "unwritten", config).network  # type: ignore[arg-type]
        assert network.network.out.kernel_size == (side, side)


def test_a_run_works_without_its_yaml_and_source_files(yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, folder = yaml.parent / "runs", yaml.parent
    assert main(["train", str(yaml), "debug=smoke"]) == 0
    (run,) = (runs / folder.name).iterdir()
    trained = load_run(run)
    assert trained.network.state_dict()["network.norm.num_batches_tracked"] == 2
    before = trained.sample_tensor(4, steps="3")
    (run / "ema-0.999.safetensors").unlink()
    assert main(["train", str(yaml), "debug=smoke"]) == 0  # complete; the average comes from the checkpoint
    (folder / "parts.py").write_text(PARTS + "# changed\n")
    assert main(["train", str(yaml), "debug=smoke"]) == 2
    assert "denoiser.code=" in capsys.readouterr().err
    for path in (yaml, folder / "nets.py", folder / "parts.py"):
        path.unlink()
    from diffbench.denoisers import source

    source._loaded.clear()  # as in another process
    assert torch.equal(load_run(run).sample_tensor(4, steps="3"), before)
    capsys.readouterr()
    shutil.rmtree(run / "code")
    source._loaded.clear()
    assert main(["sample", str(run), f"out={folder / 'x.png'}"]) == 2
    error = capsys.readouterr().err
    assert "denoiser.name: no module nets with the hash" in error and error.count("\n") == 1


STUDY = """
kind: study
title: Two networks
experiment: e.yaml
axes:
  network:
    plain: {denoiser.width: width, denoiser.args.width: 6}
    dit: {experiment: experiments/digits/dit.yaml, denoiser: {hidden_size: 8, depth: 1, num_heads: 1}}
set: {sample.steps: "3", sample.guidance: 1.0, evaluate.count: 20, validation.count: 20}
match: {by: gmacs, to: dit}
seeds: [0]
stop: {images: 128}
"""


def test_a_custom_network_joins_a_study(yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = yaml.parent / "s.yaml"
    study.write_text(STUDY + f"runs_dir: {yaml.parent / 'runs'}\n")
    plain, dit = training_variants(load_study(study), study, {}, lambda config: 1.0)
    assert plain.sized == f"width={plain.config.denoiser.args['width']}"
    assert plain.cost.macs == 1152 * plain.config.denoiser.args["width"]  # two 3x3 convolutions at 64 pixels
    assert abs(plain.cost.macs - dit.cost.macs) <= 1152
    assert main(["study", str(study)]) == 0, capsys.readouterr().out
    report = (yaml.parent / "runs" / "studies" / "s" / "report.html").read_text()
    assert "plain" in report and "dit" in report


def test_a_network_can_grow_far_to_match_a_target(yaml: Path) -> None:
    config = load(yaml, denoiser("width=width", "args.width=2"))
    assert isinstance(config, RunConfig)
    data, _ = runs_build.load_data(config)
    found = match_size(config, data, "gmacs", 1152 * 30 / 1e9, "width")
    assert found.denoiser.args["width"] == 30


FOREIGN = sorted(Path("experiments/foreign").glob("*.yaml"))


@pytest.mark.parametrize("path", FOREIGN, ids=lambda path: path.stem)
def test_the_shipped_networks_train_from_fewer_than_twenty_lines(path: Path, tmp_path: Path) -> None:
    if "diffusers" in path.read_text() and importlib.util.find_spec("diffusers") is None:
        pytest.skip("diffusers is missing")
    assert len([line for line in path.read_text().splitlines() if not line.startswith("#")]) < 20
    assert main(["train", str(path), "debug=smoke", f"runs_dir={tmp_path}"]) == 0


def test_tied_weights_are_averaged_under_both_names(tmp_path: Path) -> None:
    network = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    network["b"].weight = network["a"].weight
    average = torch.full((2, 2), 3.0)
    weights.export(tmp_path, network, 0.9, [average], 64)
    network.load_state_dict(tensors.read(weights.export_path(tmp_path, 0.9))[0])
    assert torch.equal(network["a"].weight, average)
