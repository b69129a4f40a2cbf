"""Metrics of class membership, by the classes that the extractor predicts or by a data set's rule."""

from typing import Self

import torch
from torch import Tensor

from diffbench.metrics.base import Measurement, Rule, SampleMetric, finite_rows


class InceptionScore(SampleMetric):
    """exp of the mean KL divergence from p(y|x) to p(y) (Salimans et al. 2016), computed as in the ADM evaluator.

    The score is the mean over consecutive chunks of 5,000 samples; a shorter last chunk has the same weight. The order
    of the samples therefore matters: it should be shuffled if labels come sorted. (torch-fidelity shuffles and takes
    ten splits instead.)

    Args:
        places: (count,) position of each sample in that order; None for the order of the sample numbers.
    """

    higher_is_better = True
    n: Tensor
    bad: Tensor
    p: Tensor
    negative_entropy: Tensor

    def __init__(self, classes: int, count: int, chunk: int = 5000, places: Tensor | None = None) -> None:
        super().__init__()
        self.count, self.chunk = count, chunk
        self.places = torch.arange(count) if places is None else places
        chunks = -(-count // chunk)
        self.add_sum("n", chunks)
        self.add_sum("bad")
        self.add_sum("p", chunks, classes)
        self.add_sum("negative_entropy", chunks)

    @classmethod
    def of(cls, measurement: Measurement) -> Self | None:
        classes, count = measurement.extractor.classes, measurement.count
        if classes is None:
            return None
        exported = measurement.permutation(count, "order of samples", "export") if measurement.by_class else None
        return cls(classes, count, places=None if exported is None else exported.argsort())

    def update(self, logits: Tensor, index: Tensor) -> None:
        """Add logits (B, classes) of the samples numbered `index` (B,)."""
        x, finite = finite_rows(logits, self.p)
        chunk = self.places[index.cpu()].to(x.device) // self.chunk
        log_p = torch.where(finite[:, None], x, 0).log_softmax(1)
        self.n.index_add_(0, chunk, torch.ones_like(x[:, 0]))
        self.bad += (~finite).sum()
        self.p.index_add_(0, chunk, log_p.exp())
        self.negative_entropy.index_add_(0, chunk, (log_p.exp() * log_p).sum(1))

    def compute(self) -> Tensor:
        """Return the score, a float64 scalar."""
        self.checked_count(self.n.sum(), self.bad, self.count)
        marginal = self.p / self.n[:, None]
        entropy = torch.special.xlogy(marginal, marginal).sum(1)
        return (self.negative_entropy / self.n - entropy).exp().mean()


class LabelAccuracy(SampleMetric):
    """Share of samples that the extractor's classifier assigns to the label that they were drawn for."""

    higher_is_better = True
    n: Tensor
    bad: Tensor
    right: Tensor

    def __init__(self, count: int | None = None) -> None:
        super().__init__()
        self.count = count
        for name in ("n", "bad", "right"):
            self.add_sum(name)

    @classmethod
    def of(cls, measurement: Measurement) -> Self | None:
        return cls(measurement.count) if measurement.extractor.predicts_labels and measurement.labels else None

    def update(self, logits: Tensor, labels: Tensor) -> None:
        self.n += len(labels)
        self.bad += (~logits.isfinite().all(1)).sum().to(self.bad)
        self.right += (logits.argmax(1) == labels.to(logits.device)).sum().to(self.right)

    def compute(self) -> Tensor:
        return self.right / self.checked_count(self.n, self.bad, self.count)


class SolvedTasks(SampleMetric):
    """Share of samples that solve the task of their label by a data set's rule, overall and for each ability."""

    higher_is_better = True
    n: Tensor
    right: Tensor

    def __init__(self, rule: Rule, count: int | None = None) -> None:
        super().__init__()
        self.rule, self.count = rule, count
        for name in ("n", "right"):
            self.add_sum(name, len(rule.abilities))

    @classmethod
    def of(cls, measurement: Measurement) -> Self | None:
        return cls(measurement.rule, measurement.count) if measurement.rule and measurement.labels else None

    def update(self, images: Tensor, labels: Tensor) -> None:
        right = self.rule.solves(images.cpu(), labels.cpu())
        self.n += labels.bincount(minlength=len(self.n)).to(self.n)
        self.right += labels.cpu()[right].bincount(minlength=len(self.n)).to(self.right)

    def compute(self) -> dict[str, Tensor]:
        """Return "solved" and "solved_ABILITY", in 0 to 1, omitting abilities without samples."""
        self.checked_count(self.n.sum(), torch.tensor(0), self.count)
        shares = {"solved": self.right.sum() / self.n.sum()}
        for ability in dict.fromkeys(self.rule.abilities):
            mask = torch.tensor([a == ability for a in self.rule.abilities], device=self.n.device)
            if self.n[mask].sum():
                shares[f"solved_{ability}"] = self.right[mask].sum() / self.n[mask].sum()
        return shares
