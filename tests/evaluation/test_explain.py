"""Explanations: constructed mixtures of label embeddings are decomposed, and results are deterministic."""

from dataclasses import replace

import pytest
import torch
from small_networks import CHANNELS, CLASSES, SIZE, small
from torch import nn

from diffbench.config.sections import SampleConfig
from diffbench.data.facts import DataFacts
from diffbench.diffusion import Flow, FlowConfig
from diffbench.evaluation.explain import Element, ExplainConfig, Explanation, draw_images, explain, planted_scores
from diffbench.sampling.sampler import Sampler

FACTS = DataFacts("made", (CHANNELS, SIZE, SIZE), CLASSES, ("ant", "bee", "cat", "dog", "elk"), 100, "")
SAMPLE = SampleConfig("euler", "4")
QUICK = ExplainConfig(n=2, target="teacher", images=40, steps=300, batch_size=16)


def sampler_of(name: str) -> Sampler:
    """Return a sampler of a small network whose "elk" embedding is 0.6 bee + 0.4 cat."""
    net = small(name)
    labels = next(p for key, p in net.named_parameters() if key.endswith("label.weight"))
    table = labels.T if name == "ddpmpp" else labels
    table.normal_(generator=torch.Generator().manual_seed(3))
    table[4] = 0.6 * table[1] + 0.4 * table[2]
    return Sampler(net, Flow(FlowConfig()), (CHANNELS, SIZE, SIZE), CLASSES)


@pytest.mark.parametrize("name", ["unet", "dit", "diffit", "segformer", "uvit", "ddpmpp"])
def test_every_network_exposes_its_label_embeddings(name: str) -> None:
    rows = sampler_of(name).denoiser.label_rows()  # type: ignore[operator]
    assert torch.allclose(rows[4], 0.6 * rows[1] + 0.4 * rows[2], atol=1e-6) and len(rows) == CLASSES + 1


@pytest.mark.parametrize("name", ["unet", "ddpmpp"])
def test_a_constructed_mixture_is_decomposed(name: str) -> None:
    found = explain(sampler_of(name), SAMPLE, FACTS, 4, QUICK)
    assert [e.name for e in found.top] == ["bee", "cat"]
    assert [e.coefficient for e in found.elements] == pytest.approx([0.6, 0.4, 0, 0], abs=0.05)
    assert {e.name: e.nearest for e in found.elements} == pytest.approx(
        {"bee": 0.6, "cat": 0.4, "ant": 0, "dog": 0}, abs=1e-5
    )
    assert found.losses["own"] == 0 and found.gap_closed == pytest.approx(1, abs=0.02)
    assert found.weights(without=0).tolist() == [0, 0, found.top[1].coefficient, 0, 0, 0]


def test_explain_is_deterministic_and_leaves_the_network_unchanged() -> None:
    sampler, quick = sampler_of("dit"), replace(QUICK, steps=5, target="noise")
    before = {key: value.clone() for key, value in sampler.denoiser.state_dict().items()}
    torch.manual_seed(7)
    first = explain(sampler, SAMPLE, FACTS, 4, quick)
    torch.rand(3)
    assert explain(sampler, SAMPLE, FACTS, 4, quick) == first
    assert explain(sampler, SAMPLE, FACTS, 4, replace(quick, seed=1)) != first
    assert all(torch.equal(value, before[key]) for key, value in sampler.denoiser.state_dict().items())
    assert all(p.grad is None for p in sampler.denoiser.parameters())


def test_images_show_the_class_the_reconstruction_and_each_ablation() -> None:
    sampler = sampler_of("dit")
    found = explain(sampler, SAMPLE, FACTS, 4, replace(QUICK, steps=100))
    images = draw_images(found, sampler, SAMPLE, 0)
    assert list(images) == ["elk", "reconstruction", "without bee", "without cat"]
    moved = [float((x.float() - images["elk"].float()).square().mean()) for x in images.values()]
    assert moved[0] == 0 and moved[1] < moved[3] < moved[2]


def test_planted_classes_are_scored_by_their_parts() -> None:
    planted = {"elk": ["bee", "cat"], "dog": ["cat", "elk"]}
    sampler, quick = sampler_of("dit"), replace(QUICK, steps=100)
    found = planted_scores(sampler, SAMPLE, FACTS, planted, quick)
    first, second = (explain(sampler, SAMPLE, FACTS, label, quick).elements for label in (4, 3))
    assert {e.name for e in first[:2]} == {"bee", "cat"}
    right = {e.name for e in second[:2]} == {"cat", "elk"}
    assert found["planted_found@2"] == (1 + right) / 2
    shares = [
        sum(e.coefficient for e in elements if e.name in parts) / sum(e.coefficient for e in elements)
        for elements, parts in zip((first, second), planted.values(), strict=True)
    ]
    assert found["planted_share@2"] == pytest.approx(sum(shares) / 2)


def test_the_verdict_names_an_element_however_small() -> None:
    elements = [Element(i, FACTS.names[i], 0.01 / (i + 1), 0.0, 0.0) for i in range(4)]
    losses = {"own": 0.0, "reconstruction": 0.1, "all others": 0.1, "mean of the others": 1.0}
    found = Explanation(4, "elk", CLASSES + 1, elements, 2, losses, [], [])
    assert found.verdict.startswith("elk is about 0.01 of ant: the reconstruction closes 90%")


def test_invalid_explanations_are_refused() -> None:
    sampler = sampler_of("dit")
    with pytest.raises(ValueError, match="n: must be at most 4, the number of other classes, got 5"):
        explain(sampler, SAMPLE, FACTS, 4, replace(QUICK, n=5))
    with pytest.raises(ValueError, match="class: this run was trained with no classes; choose a run with at least two"):
        explain(sampler, SAMPLE, replace(FACTS, num_classes=0), 0, QUICK)
    with pytest.raises(ValueError, match="class: this network has no table of label embeddings"):
        explain(replace(sampler, denoiser=nn.Conv2d(3, 3, 1)), SAMPLE, FACTS, 0, QUICK)
    with pytest.raises(ValueError, match="steps: must be at least 1, got 0"):
        ExplainConfig(steps=0)
