"""Seeds of single sources of randomness: each changes its own draws and nothing else."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffbench.config.load import load
from diffbench.runs.denoiser import DenoiserRun
from diffbench.runs.drawing import draw, samples_of
from diffbench.runs.lifecycle import load as load_run

SMALL = ["denoiser.hidden_size=32", "denoiser.depth=1", "trainer.batch_size=16", "evaluate.count=20"]
MEASURED = {
    "init": ["weights"],
    "data": ["order"],
    "noise": ["noise", "times", "labels", "dropout"],
    "sample": ["samples"],
}


def random_draws(folder: Path, *overrides: str) -> dict[str, Tensor]:
    """Return what a run draws at random: initial weights, a batch, noise and times, samples of a fixed network."""
    config = load("experiments/digits/dit.yaml", [*SMALL, "sample.steps='2'", "sample.guidance=1", *overrides])
    run = DenoiserRun(folder, config)
    found = {"weights": torch.cat([p.detach().flatten() for p in run.network.parameters()])}
    data = run.data_module()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    found["order"] = data.on_after_batch_transfer(batch, 0)["label"]
    inputs = {
        "x0": torch.zeros(512, 1, 8, 8),
        "position": torch.arange(512),
        "label": torch.zeros(512, dtype=torch.long),
    }
    module = run.module()
    _, found["times"], found["noise"], labels = module.draw(inputs)
    assert labels is not None
    found["labels"] = labels
    module.seed_dropout(inputs)
    found["dropout"] = torch.rand(4)
    with torch.no_grad():
        for p in run.network.parameters():
            p.fill_(0.01)
    samples = samples_of(run, config, config.sample)
    draw(run, config.sample, samples, config.seed_of("sample"))
    found["samples"] = samples.images().float()
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return random_draws(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("source", MEASURED)
def test_reseeding_a_source_changes_only_its_draws(source: str, plain: dict[str, Tensor], tmp_path: Path) -> None:
    found = random_draws(tmp_path, f"seeds.{source}=3")
    changed = [name for name in found if not torch.equal(found[name], plain[name])]
    assert sorted(changed) == sorted(MEASURED[source])


def test_reseeding_all_sources_equals_another_seed(plain: dict[str, Tensor], tmp_path: Path) -> None:
    parts = random_draws(tmp_path / "parts", *(f"seeds.{source}=3" for source in MEASURED))
    whole = random_draws(tmp_path / "whole", "seed=3")
    assert all(torch.equal(parts[name], whole[name]) and not torch.equal(parts[name], plain[name]) for name in parts)


def test_a_wrong_seed_of_a_source_is_named() -> None:
    from diffbench.core.errors import UserError

    with pytest.raises(UserError, match=r"seeds.data: must lie in \[0, 2\^63\) or be null, got -1"):
        load("experiments/digits/dit.yaml", ["seeds.data=-1"])


def test_opening_a_run_keeps_the_callers_generator_and_training_has_its_own(finished: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run = load_run(finished)
    assert torch.equal(torch.get_rng_state(), before)
    fresh = DenoiserRun(finished, run.config).network.state_dict()
    torch.manual_seed(run.config.seed_of("init"))
    assert all(torch.equal(value, fresh[name]) for name, value in run.build().state_dict().items())
