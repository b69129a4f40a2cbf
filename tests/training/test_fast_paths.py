"""Each faster path has a config key and gives the numbers of the slower one."""

import os
import signal
import subprocess
import sys
import threading
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import CLASSES, inputs, small
from test_reference import inputs as golden_inputs
from test_reference import network as golden_network
from test_resume import CASES, KILL, TINY, assert_equal, only, state
from torch import Tensor, nn

from diffbench import __main__
from diffbench.cli import main
from diffbench.config.kinds import RunConfig
from diffbench.config.load import load as load_config
from diffbench.config.sections import SampleConfig
from diffbench.config.trainer import TrainerConfig, precision_here
from diffbench.core.errors import UserError
from diffbench.core.tensors import read_state
from diffbench.denoisers import tmsa
from diffbench.diffusion import DiscreteVP, VPConfig
from diffbench.runs.checks import check_machine
from diffbench.runs.denoiser import DenoiserRun
from diffbench.runs.lifecycle import load, train
from diffbench.sampling.sampler import Sampler
from diffbench.training import speed
from diffbench.training.checkpoint import AtomicCheckpointIO, all_steps
from diffbench.training.diffusion import DiffusionModule
from diffbench.training.speed import blocks, compile_here, compile_network, float32_products, use_threads

DIT = "experiments/digits/dit.yaml"
SHORT = [*TINY, *CASES["dit"], "trainer.max_images=40", "sample.steps='2'"]  # 5 steps
WITH_TMSA: list[tuple[str, dict[str, Any]]] = [
    *(("diffit-latent", {"time_in": parts}) for parts in ("qkv", "qk", "qv", "kv", "q", "k", "v", "separate")),
    ("diffit", {}),
    ("unet", {"tmsa": True}),
    ("ddpmpp", {"tmsa": True}),
]


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give the process three threads without an environment variable; restore its own number afterwards."""
    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(3)
    speed._default_threads.cache_clear()
    yield
    torch.set_num_threads(before)
    speed._default_threads.cache_clear()


@pytest.mark.parametrize(
    ("setting", "macs", "divides", "variable", "threads", "at_once"),
    [
        *(("auto", 9e8, True, None, 1, 3), ("auto", 9e8, False, None, 1, 3), ("auto", 1.1e9, True, None, 3, 1)),
        *((2, 9e8, True, None, 1, 2), (2, 9e8, False, None, 2, 1), (2, 1.1e9, True, None, 2, 1)),
        *((1, 9e8, True, None, 1, 1), (8, 9e8, True, None, 1, 4)),
        *(("auto", 9e8, True, "3", 1, 3), ("auto", 9e8, False, "3", 3, 1)),
    ],
)
def test_threads_per_layer_and_parallel_batches_follow_the_network_size(
    three_threads: None,
    monkeypatch: pytest.MonkeyPatch,
    setting: Any,
    macs: float,
    divides: bool,
    variable: str | None,
    threads: int,
    at_once: int,
) -> None:
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert use_threads(setting, macs, divides) == at_once
    assert torch.get_num_threads() == threads


def test_a_large_network_gets_its_threads_back_after_a_small_one(three_threads: None) -> None:
    for macs, threads in ((9e8, 1), (1.1e9, 3), (9e8, 1)):
        use_threads("auto", macs, True)
        assert torch.get_num_threads() == threads
    use_threads(2, 9e8, True)
    use_threads("auto", 1.1e9, True)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(
    ("args", "threads", "at_once"),
    [
        ([], 1, 3),  # 4.3e6 multiply-accumulates per digit, 64 digits
        (["trainer.batch_size=256"], 3, 1),
        (["trainer.batch_size=256", "trainer.accumulate_grad_batches=4"], 1, 3),
        (["trainer.threads=2"], 1, 2),
    ],
)
def test_the_threads_of_a_run_follow_the_size_of_its_micro_batch(
    three_threads: None, args: list[str], threads: int, at_once: int
) -> None:
    run = DenoiserRun("x", load_config(DIT, args))  # type: ignore[arg-type]
    assert run.sampler(run.config.sample).at_once == 1
    run.use_threads()
    assert torch.get_num_threads() == threads
    assert run.sampler(run.config.sample).at_once == at_once
    assert run.provenance(None)["threads"] == max(threads, at_once)  # the number that `reproduce` requests


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "7"), (None, "")])
def test_waiting_threads_sleep_soon_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, name: str | None, value: str
) -> None:
    monkeypatch.setattr(__main__, "main", lambda: 0)
    monkeypatch.setattr(__main__.atexit, "register", lambda work: None)
    monkeypatch.setattr(__main__.gc, "set_threshold", lambda count: None)
    for variable in __main__.WAITING:
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    if name is not None:
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        __main__.run()
    wanted = {None: "10000", "OMP_WAIT_POLICY": None, "GOMP_SPINCOUNT": "7"}
    assert os.environ.get("GOMP_SPINCOUNT") == wanted[name]


def gradients(net: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    net(x, t, y).square().mean().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", ["diffit_a", "diffit_b", "diffit_c"])
def test_outputs_equal_the_published_ones_with_chunked_attention(name: str, dtype: torch.dtype) -> None:
    net, case = golden_network(name, dtype)
    x, t, y = golden_inputs(case, case.info["calls"][0], dtype)
    case.check("forward", net.requires_grad_(True)(x, t, y).detach())


@pytest.mark.parametrize(("name", "changes"), [*WITH_TMSA, ("diffit-latent", {"time_in": "bias"})], ids=str)
@pytest.mark.parametrize("part", [1, 3000, 1 << 19])
def test_chunked_attention_equals_whole_attention(
    name: str, changes: dict[str, Any], part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tmsa, "CHUNK", part)
    net, (x, t, y) = small(name, **changes).double().requires_grad_(True), inputs()
    with monkeypatch.context() as patch:
        patch.setattr(tmsa, "needs_chunks", lambda _bias: False)
        want, whole = net(x.double(), t, y), gradients(net, x.double(), t, y)
    parts: list[int] = []
    really = tmsa.chunked_attention
    monkeypatch.setattr(tmsa, "chunked_attention", lambda *a: parts.append(len(a[0])) or really(*a))
    assert (net(x.double(), t, y) - want).abs().max() < 1e-12
    found = gradients(net, x.double(), t, y)
    assert parts and found.keys() == whole.keys()
    assert all((found[key] - whole[key]).abs().max() < 1e-12 for key in whole)
    tried = len(parts)
    with torch.no_grad():
        net(x.double(), t, y)
    with torch.autocast("cpu", torch.bfloat16):
        net.float()(x, t, y)
    assert len(parts) == tried  # without gradients or in bfloat16 a fused kernel is used


@pytest.mark.parametrize("name", ["diffit", "diffit-latent"])
def test_samples_follow_changed_weights(name: str) -> None:
    net = small(name)
    process, labels = DiscreteVP(VPConfig()), torch.arange(3)

    def sample(network: nn.Module) -> Tensor:
        config = SampleConfig(sampler="ddim", steps="2", batch_size=2)
        return Sampler(network, process, (3, 8, 8), raw=True)(labels, config)

    first = sample(net)
    for p in net.parameters():
        p.data += 0.05  # a change that no version counter records
    assert not torch.equal(sample(net), first)
    assert torch.equal(sample(net), sample(deepcopy(net)))


def trained(folder: Path, *changes: str) -> dict[str, Any]:
    """Return the last checkpoint of a run of five steps."""
    train(DIT, [*SHORT, *changes, f"runs_dir={folder}"])
    run = next((folder / "digits").iterdir())
    return torch.load(run / "checkpoints" / "step-5.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[2])
        return trained(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    "change", ["trainer.data_on_device=true", "trainer.async_checkpoints=true", "trainer.tf32=true"]
)
def test_a_run_on_a_faster_path_ends_with_the_same_bits(change: str, plain: dict[str, Any], tmp_path: Path) -> None:
    other = trained(tmp_path, change)
    for part in ("state_dict", "optimizer_states"):
        assert_equal(plain[part], other[part], part)
    assert_equal(plain["callbacks"]["EMA"], other["callbacks"]["EMA"], "EMA")


def test_channels_last_changes_the_weights_by_rounding_only(plain: dict[str, Any], tmp_path: Path) -> None:
    a, b = plain["state_dict"], trained(tmp_path, "trainer.channels_last=false")["state_dict"]
    assert a.keys() == b.keys()
    assert all((a[key] - b[key]).abs().max() < 1e-5 for key in a)


@pytest.mark.parametrize(("device", "given", "last"), [("cpu", "", True), ("cuda", "", False), ("cuda", "true", True)])
def test_channels_last_is_the_default_on_a_cpu_only(
    device: str, given: str, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffbench.runs.base.device_of", lambda accelerator: torch.device(device))
    args = [f"trainer.channels_last={given}"] if given else []
    config = load_config("experiments/digits/ddpmpp.yaml", args)
    assert isinstance(config, RunConfig)
    network = DenoiserRun(Path("x"), config).network
    weights = [p for p in network.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
    assert weights and {w.is_contiguous(memory_format=torch.channels_last) for w in weights} == {last}


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("diffit-latent", "unet", "ddpmpp")]


@pytest.mark.parametrize("how", ["block", "model"])
@pytest.mark.parametrize("name", ["dit", "diffit", *OTHERS])
def test_compiling_in_place_keeps_names_and_values(name: str, how: Any) -> None:
    net, (x, t, y) = small(name), inputs()
    want, names = net(x, t, y), list(net.state_dict())
    torch.compiler.reset()
    compile_network(net, how, backend="eager")
    assert torch.equal(net(x, t, y), want)
    assert list(net.state_dict()) == names
    assert how == "model" or all(b._compiled_call_impl is not None for b in blocks(net))
    for p in net.parameters():
        p.data = p.data + 0.05  # as when averages replace the weights
    assert torch.equal(net(x, t, y), deepcopy(net).forward(x, t, y))
    assert not torch.equal(net(x, t, y), want)


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    check_machine(TrainerConfig())
    with pytest.raises(UserError, match=r"trainer\.compile: block needs a C\+\+ compiler, and there is no no-such-c"):
        train(DIT, ["trainer.compile=block"])


@pytest.mark.parametrize(
    ("name", "flops", "gpu", "how"),
    [
        ("dit", 1e17, True, "block"),
        ("segformer", 1e17, True, "block"),
        ("diffit-latent", 1e17, True, "block"),
        ("unet", 1e17, True, "model"),
        ("ddpmpp", 1e17, True, "model"),
        ("dit", 1e13, True, "none"),
        ("dit", 1e17, False, "none"),
    ],
)
def test_auto_compiles_long_runs_on_a_gpu(name: str, flops: float, gpu: bool, how: str) -> None:
    assert compile_here(small(name), "auto", flops, gpu) == how
    assert compile_here(small(name), "none", flops, gpu) == "none"


def test_auto_prints_a_note_if_there_is_no_compiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compile_here(small("dit"), "auto", 1e17, True) == "none"
    assert capsys.readouterr().out == (
        "note: trainer.compile=auto does not compile: the C++ compiler no-such-compiler was not found\n"
    )


def test_flops_of_training_and_sampling_decide_on_compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flops_seen: list[float] = []

    def recorded(network: nn.Module, how: str, flops: float, gpu: bool) -> str:
        flops_seen.append(flops)
        return "none"

    monkeypatch.setattr("diffbench.training.speed.compile_here", recorded)
    assert main(["train", DIT, *SHORT, "evaluate.count=20", f"runs_dir={tmp_path}"]) == 0
    macs = load(only(tmp_path)).cost.macs
    assert flops_seen[0] == 6.0 * macs * 40
    assert flops_seen[1] == 2.0 * macs * 2 * 20  # two steps for each of twenty samples


def test_auto_means_bfloat16_on_a_gpu_for_denoisers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TrainerConfig().precision == "auto"
    assert load_config(DIT, ["trainer.accelerator=cpu"]).trainer.precision == "32-true"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: not including_emulation)
    assert precision_here(TrainerConfig(), low=True) == "bf16-mixed"
    assert precision_here(TrainerConfig(), low=False) == "32-true"
    assert precision_here(TrainerConfig(accelerator="cpu"), low=True) == "32-true"
    assert precision_here(TrainerConfig(precision="64-true"), low=True) == "64-true"
    assert load_config(DIT).trainer.precision == "bf16-mixed"
    assert load_config("experiments/digits/classifier.yaml").trainer.precision == "32-true"


FAULTS = """
import resource, sys, torch
from diffbench.training.speed import keep_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    for _ in range(3):
        kept = [torch.ones(2**20) for _ in range(20)]

if sys.argv[1] == "true":
    keep_memory()
step()
before = faults()
step()
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_freed_memory_is_reused() -> None:
    """Allocating 80 MiB three times takes 61,440 pages of 4 KiB."""
    command = [sys.executable, "-c", FAULTS]
    counts = {on: int(subprocess.check_output([*command, on])) for on in ("true", "false")}
    assert counts["true"] < 3_000 < 15_000 < counts["false"], counts


def test_a_run_enables_keep_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    monkeypatch.setattr("diffbench.runs.base.keep_memory", lambda: calls.append(None))
    run = DenoiserRun(Path("none"), load_config("experiments/digits/dit.yaml"))
    assert run.network is run.network and len(calls) == 1


def test_the_precision_of_float32_products_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    def now() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = now()
    with float32_products(tf32=True):
        assert now() == before  # nothing to change without a CUDA GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for tf32, want in ((True, ("high", True)), (False, ("highest", False))):
        with float32_products(tf32=tf32):
            assert now() == want
    assert now() == before


def test_inductors_warning_about_tf32_is_suppressed(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with float32_products(tf32=False):
            compile_fx._warn_tf32_disabled.__wrapped__()
        with pytest.raises(UserWarning, match="TensorFloat32 tensor cores"):
            compile_fx._warn_tf32_disabled.__wrapped__()


def test_samples_in_bfloat16_are_close_to_those_in_float32() -> None:
    net, process, labels = small("diffit-latent"), DiscreteVP(VPConfig()), torch.arange(4) % CLASSES

    def sample(**changes: Any) -> Tensor:
        config = SampleConfig(sampler="ddim", steps="4", **changes)
        return Sampler(net, process, (3, 8, 8), raw=True)(labels, config)

    assert "precision" not in SampleConfig().sampling_keys()  # the default adds no key
    assert SampleConfig(precision="bf16-mixed").sampling_keys()["precision"] == "bf16-mixed"
    want, low = sample(), sample(precision="bf16-mixed")
    assert low.dtype == torch.float32
    assert 0 < (low - want).norm() < 0.03 * want.norm()


def test_dropout_is_seeded_by_the_first_position() -> None:
    module = DiffusionModule(small("dit"), DiscreteVP(VPConfig()), seed=3)
    states = []
    for batch in ({"position": torch.arange(8, 12)}, {"position": torch.arange(4), "first": 8}):
        module.seed_dropout(batch)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_batch_contains_its_first_position_as_a_number(tmp_path: Path) -> None:
    config = load_config(DIT, ["trainer.data_on_device=true"])
    module = DenoiserRun(tmp_path, config).data_module()
    assert module.data_on_device is True
    batch = next(iter(module.train_dataloader()))
    assert set(batch) == {"first", "position", "index"} and batch["first"] == 0
    assert set(module.on_after_batch_transfer(batch, 0)) == {"x0", "label", "position", "first"}


def test_a_checkpoint_written_in_the_background_has_the_state_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, write = threading.Event(), torch.save

    def slow(*arguments: Any) -> None:
        assert release.wait(60)
        write(*arguments)

    monkeypatch.setattr("diffbench.training.checkpoint.torch.save", slow)
    io, weight = AtomicCheckpointIO(background=True, keep=2), torch.zeros(3)
    io.save_checkpoint({"w": weight, "deep": [{"step": 1}]}, tmp_path / "step-1.ckpt")
    weight += 1  # training continues
    assert all_steps(tmp_path) == []
    release.set()
    io.join()
    assert read_state(tmp_path / "step-1.ckpt")["w"].tolist() == [0, 0, 0]
    for step in (2, 3):
        io.save_checkpoint({"w": weight}, tmp_path / f"step-{step}.ckpt")
    io.join()
    assert [p.name for p in all_steps(tmp_path)] == ["step-2.ckpt", "step-3.ckpt"]

    def full(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("diffbench.training.checkpoint.torch.save", full)
    io.save_checkpoint({"w": weight}, tmp_path / "step-4.ckpt")
    with pytest.raises(OSError, match="disk full"):
        io.join()
    io.join()  # raised once
    assert [p.name for p in all_steps(tmp_path)] == ["step-2.ckpt", "step-3.ckpt"]


@pytest.mark.slow
def test_a_run_killed_while_writing_in_the_background_resumes_bit_for_bit(tmp_path: Path) -> None:
    overrides = [*TINY, *CASES["dit"], "trainer.async_checkpoints=true"]
    train(DIT, [*overrides, f"runs_dir={tmp_path / 'whole'}"])
    broken = [*overrides, f"runs_dir={tmp_path / 'broken'}"]
    killed = subprocess.run([sys.executable, "-c", KILL, DIT, *broken], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    train(DIT, broken)
    a, b = state(only(tmp_path / "whole")), state(only(tmp_path / "broken"))
    for part in ("state_dict", "optimizer_states"):
        assert_equal(a[part], b[part], part)
    assert_equal(a["callbacks"]["EMA"], b["callbacks"]["EMA"], "EMA")


@pytest.mark.slow
def test_compiling_changes_the_weights_by_rounding_only(plain: dict[str, Any], tmp_path: Path) -> None:
    torch.compiler.reset()
    a, b = plain["state_dict"], trained(tmp_path, "trainer.compile=block")["state_dict"]
    assert a.keys() == b.keys()
    assert all((a[key] - b[key]).abs().max() < 1e-4 for key in a)
