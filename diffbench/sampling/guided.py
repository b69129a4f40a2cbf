"""Guidance configured by a SampleConfig: a weight over time, a weaker model, or a classifier's gradient."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffbench.config.sections import SampleConfig
from diffbench.diffusion import Predict, Process, guidance, predictor
from diffbench.diffusion.guidance import Weight
from diffbench.diffusion.process import LabelledPredict


@dataclass(frozen=True)
class GuidanceModels:
    """The networks that guidance needs in addition to the denoiser, in eval mode."""

    weak_model: nn.Module | None = None
    """(x, t, y) -> output under the same process; autoguidance leads away from it."""
    classifier: nn.Module | None = None
    """(x, t) -> logits (B, num_classes) of noisy images, which are scaled as the denoiser's inputs."""

    def to(self, device: torch.device) -> "GuidanceModels":
        for network in (self.weak_model, self.classifier):
            if network is not None:
                network.to(device)
        return self


def guided(
    predict: LabelledPredict,
    y: Tensor,
    process: Process,
    config: SampleConfig,
    null_label: int | None = None,
    models: GuidanceModels = GuidanceModels(),
) -> Predict:
    """Wrap a labelled predictor into one for labels y (B,), or weights over labels, with the config's guidance.

    Raises:
        ValueError: if the null class, weaker model or classifier that guidance needs is missing, or a classifier would
            have to guide towards a mixture of classes.
    """
    if config.guidance == 1:
        plain: Predict = lambda x, t: predict(x, t, y)  # noqa: E731
    elif config.weak_model is not None:
        if models.weak_model is None:
            raise ValueError(f"sample.weak_model: {config.weak_model} was not loaded")
        weak = predictor(process, models.weak_model)
        plain = guidance.autoguidance(predict, weak, y, _weight(process, config), config.guidance_channels)
    elif null_label is None:
        raise ValueError(f"guidance {config.guidance} needs a network with a null class; this one was trained without")
    else:
        plain = guidance.classifier_free(predict, y, null_label, _weight(process, config), config.guidance_channels)
    if config.classifier is None or config.classifier_scale == 0:
        return plain
    if models.classifier is None:
        raise ValueError(f"sample.classifier: {config.classifier} was not loaded")
    if y.is_floating_point():
        raise ValueError("sample.classifier: guides towards one class, not towards a mixture of classes")
    return guidance.classifier_guidance(
        plain, gradient_of(models.classifier, process, y), process, config.classifier_scale
    )


def gradient_of(classifier: nn.Module, process: Process, y: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return (x, t) -> gradient of log p(y | x_t) in x_t, (B, C, H, W), by a classifier (x, t) -> logits."""

    def gradient(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            scaled, time = process.inputs(x, t.to(x.device))
            log_p = classifier(scaled, time).log_softmax(-1)
            (grad,) = torch.autograd.grad(log_p.gather(-1, y[:, None]).sum(), x)
        return grad

    return gradient


def _weight(process: Process, config: SampleConfig) -> Weight:
    weight: Weight = config.guidance
    if config.guidance_schedule == "power_cosine":
        if process.name != "vp":
            raise ValueError("sample.guidance_schedule: power_cosine follows the steps of vp; choose constant")
        weight = guidance.power_cosine(config.guidance, config.guidance_power, process.config.steps)
    if config.guidance_interval is not None:
        weight = guidance.interval(process, weight, *config.guidance_interval)
    return weight
