"""Explaining a class as a sparse mixture of the other classes' label embeddings (Conceptor, Chefer et al. 2024).

The network is frozen. A small MLP maps each embedding to its coefficient. It is trained on the denoising loss of
samples of the class, with the mixture in place of the class's own label.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from scipy.optimize import nnls
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, one_hot

from diffbench.config.sections import SampleConfig
from diffbench.core import rng
from diffbench.core.tensors import eval_mode
from diffbench.data.facts import DataFacts, class_number
from diffbench.diffusion.process import mean_square
from diffbench.metrics.registry import metric_name
from diffbench.sampling.sampler import Sampler

HIDDEN, LEARNING_RATE = 100, 2e-3
"""Width of the MLP, as in the paper's code, and learning rate of its AdamW, twice the code's for half the steps."""
WARM_UP = 500
"""Steps that first fit the mixture of embeddings to the class's own, in a tenth of a second: if a network hardly uses
its labels, the denoising loss alone is too flat to train from a random start."""
EVERY = 50
"""Steps between validations; the best coefficients are kept, as in the paper's code."""
HELD_OUT, NOISES = 20, 12
"""Samples of the class used only for validation, and the number of fixed noises for each."""
SHOWN = 8
"""Images in a row of the figure."""
LEAST_CLOSED = 0.5
"""Share of the loss gap between the others' mean and the class that must be closed for the class to be a mixture."""
TWINS = 0.9
"""Cosine above which two embeddings are interchangeable, so that the split of weight between them is arbitrary."""


@dataclass
class ExplainConfig:
    """Keys of `diffbench explain` besides the class."""

    n: int | None = None
    """Number of elements in the reconstruction, largest coefficients first; null: a third of the other classes, at most
    50."""
    target: Literal["teacher", "noise"] = "teacher"
    """Target of the network's output under the mixture: `teacher` is its output under the class (ours; a noise-free
    loss that is 0 for an exact mixture), `noise` the process's own training target, as in the paper."""
    images: int = 100
    """Samples of the class to train on."""
    steps: int = 250
    batch_size: int = 16
    sparsity: float = 0.02
    """Weight of the loss 1 - cos(reconstruction, mixture of all others). The denoising loss is divided by that of the
    plain mean of the others, since its scale differs a thousandfold between networks."""
    seed: int = 0
    out: str | None = None
    """File of the figure (.png, .jpg, .webp or .gif), with a .json next to it; null: in the run's folder `explain`."""

    def __post_init__(self) -> None:
        for name in ("n", "images", "steps", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")
        if self.sparsity < 0:
            raise ValueError(f"sparsity: must be at least 0, got {self.sparsity:g}")


@dataclass(frozen=True)
class Element:
    """Another class in the mixture.

    Attributes:
        coefficient: coefficient of its embedding in the mixture.
        cosine: cosine of its embedding and the class's.
        nearest: its coefficient in the non-negative least-squares mixture of embeddings, which uses no images.
    """

    label: int
    name: str
    coefficient: float
    cosine: float
    nearest: float


@dataclass(frozen=True)
class Explanation:
    """A class as a mixture of others.

    Attributes:
        rows: number of rows of the label table.
        elements: the other classes, largest coefficient first.
        n: number of elements, from the first, that make up the reconstruction.
        losses: validation loss under the class ("own"; 0 for the teacher), the reconstruction, the mixture of all
            others, and their plain mean.
        history: (step, validation loss of the reconstruction); step 0 is the mixture fitted to embeddings alone.
        twins: (name, name, cosine) of pairs whose embeddings are interchangeable, see `TWINS`.
    """

    label: int
    name: str
    rows: int
    elements: list[Element]
    n: int
    losses: dict[str, float]
    history: list[tuple[int, float]]
    twins: list[tuple[str, str, float]]

    @property
    def top(self) -> list[Element]:
        return self.elements[: self.n]

    @property
    def gap_closed(self) -> float | None:
        """Share of the loss gap that the reconstruction closes from the others' mean (0) to the class itself (1)."""
        gap = self.losses["mean of the others"] - self.losses["own"]
        return (self.losses["mean of the others"] - self.losses["reconstruction"]) / gap if gap > 0 else None

    @property
    def verdict(self) -> str:
        """The conclusion in one sentence."""
        closed = max(0.0, self.gap_closed or 0.0)
        evidence = f"the reconstruction closes {closed:.0%} of the gap in loss between the others' mean and the class"
        if closed < LEAST_CLOSED:
            return f"{self.name} is not a mixture of the others: {evidence}"
        named = [e for e in self.top if e.coefficient >= 0.05] or self.top[:1]
        parts = ", ".join(f"{e.coefficient:.2f} of {e.name}" for e in named)
        return f"{self.name} is about {parts}: {evidence}"

    def weights(self, without: int | None = None) -> Tensor:
        """Return the weights (rows,) of the reconstruction over the label table, optionally without one element."""
        weights = torch.zeros(self.rows)
        for place, element in enumerate(self.top):
            weights[element.label] = element.coefficient if place != without else 0.0
        return weights


def explain(sampler: Sampler, how: SampleConfig, facts: DataFacts, label: int, config: ExplainConfig) -> Explanation:
    """Decompose a class into the others; results are bit-identical on every call.

    Args:
        sampler: sampler of the run, whose EMA weights are explained.
        how: config for drawing samples of the class.

    Raises:
        ValueError: a message that begins with the key, if the run has no other classes or no label embeddings.
    """
    net, process = sampler.denoiser, sampler.process
    table = _table(net, facts)
    others = [i for i in range(facts.num_classes) if i != label]
    n = config.n or min(50, -(-len(others) // 3))
    if n > len(others):
        raise ValueError(f"n: must be at most {len(others)}, the number of other classes, got {n}")
    rows, device = table[others], table.device
    own = one_hot(torch.tensor(label, device=device), len(table)).to(table.dtype)

    labels = torch.full((config.images + HELD_OUT,), label)
    x0 = replace(sampler, raw=True)(labels, how, seed=rng.key(config.seed, "explain", "images")).to(table)
    train, held_out = x0[: config.images], x0[config.images :]

    def loss(weights: Tensor, x: Tensor, u: Tensor, eps: Tensor) -> Tensor:
        t = process.time(u)
        inputs = process.inputs(process.add_noise(x, t, eps), t)
        out = net(*inputs, weights.expand(len(x), -1))
        if config.target == "noise":
            return process.losses(out, x, t, eps).mean()
        with torch.no_grad():
            taught = net(*inputs, own.expand(len(x), -1))
        return mean_square(out - taught).mean()

    key = {what: rng.key(config.seed, "explain", what) for what in ("image", "time", "noise", "mlp", "validation")}
    number = torch.arange(HELD_OUT * NOISES, device=device)
    validation = (
        held_out[number % HELD_OUT],
        (rng.permutation(key["validation"], len(number)).to(device).double() + 0.5) / len(number),
        rng.normal(key["validation"], number, sampler.shape).to(table),
    )

    def weights_of(coefficients: Tensor, kept: int) -> Tensor:
        chosen = coefficients.topk(kept).indices
        return torch.zeros_like(own).index_put((torch.tensor(others, device=device)[chosen],), coefficients[chosen])

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key["mlp"])
        mlp = nn.Sequential(nn.Linear(table.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1)).to(table)
    parameters = list(mlp.parameters())
    scale = rows.square().mean().sqrt()  # normalise embeddings to suit the MLP's initial weights
    features, wanted = rows / scale, table[label] / scale
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE)
    for _ in range(WARM_UP):
        optimizer.zero_grad()
        (mlp(features)[:, 0].abs() @ features - wanted).square().mean().backward(inputs=parameters)
        optimizer.step()
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE)
    best, history = torch.zeros(len(others), device=device), []
    mean = weights_of(torch.full_like(best, 1 / len(others)), len(others))
    with eval_mode(net):
        with torch.no_grad():
            unit = loss(mean, *validation).clamp(min=1e-12)
        for step in range(config.steps + 1):
            if step % EVERY == 0 or step == config.steps:
                with torch.no_grad():
                    now = mlp(features)[:, 0].abs()
                    history.append((step, float(loss(weights_of(now, n), *validation))))
                if history[-1][1] <= min(error for _, error in history):
                    best = now
            if step == config.steps:
                break
            position = torch.arange(step * config.batch_size, (step + 1) * config.batch_size, device=device)
            u, image = rng.uniforms((key["time"], key["image"]), position)
            x = train[(image * len(train)).long()]
            coefficients = mlp(features)[:, 0].abs()
            mixture, reconstruction = weights_of(coefficients, len(others)), weights_of(coefficients, n)
            sparsity = 1 - cosine_similarity(reconstruction @ table, mixture @ table, dim=0)
            fit = loss(mixture, x, u, rng.normal(key["noise"], position, sampler.shape).to(table))
            optimizer.zero_grad()
            (fit / unit + config.sparsity * sparsity).backward(inputs=parameters)
            optimizer.step()
        shown = {
            "own": own,
            "reconstruction": weights_of(best, n),
            "all others": weights_of(best, len(others)),
            "mean of the others": mean,
        }
        with torch.no_grad():
            losses = {name: float(loss(weights, *validation)) for name, weights in shown.items()}
    cosines = cosine_similarity(rows, table[label], dim=1).tolist()
    nearest = nnls(rows.T.double().cpu().numpy(), table[label].double().cpu().numpy())[0].tolist()
    elements = [
        Element(i, facts.names[i], float(coefficient), cosine, near)
        for i, coefficient, cosine, near in zip(others, best.tolist(), cosines, nearest, strict=True)
    ]
    elements.sort(key=lambda e: -e.coefficient)
    twins = _twins(elements[:n], elements, table)
    return Explanation(label, facts.names[label], len(table), elements, n, losses, history, twins)


def label_rows(net: nn.Module) -> Tensor | None:
    """Return the rows of a network's label table; None if it has none."""
    return getattr(net, "label_rows", lambda: None)()


def _table(net: nn.Module, facts: DataFacts) -> Tensor:
    if facts.num_classes < 2:
        has = "no classes" if not facts.num_classes else "one class"
        raise ValueError(f"class: this run was trained with {has}; choose a run with at least two")
    rows = label_rows(net)
    if rows is None:
        raise ValueError("class: this network has no table of label embeddings; choose a run of another denoiser")
    return rows.detach()


def _twins(top: Sequence[Element], elements: Sequence[Element], table: Tensor) -> list[tuple[str, str, float]]:
    """Return pairs of a reconstruction's element and a later element whose embeddings are nearly parallel."""
    pairs = [(one, other) for i, one in enumerate(top) for other in elements[i + 1 :]]
    cosines = [float(cosine_similarity(table[a.label], table[b.label], dim=0)) for a, b in pairs]
    return [(a.name, b.name, cosine) for (a, b), cosine in zip(pairs, cosines, strict=True) if cosine > TWINS]


def draw_images(explanation: Explanation, sampler: Sampler, how: SampleConfig, seed: int) -> dict[str, Tensor]:
    """Draw from the same noise images of the class, of its reconstruction, and of that without each of its elements.

    Returns:
        Title -> (SHOWN, C, H, W) uint8, or (SHOWN, C, H, W) float32 if samples are not images.
    """
    own = one_hot(torch.tensor(explanation.label), explanation.rows).float()
    rows = {explanation.name: own, "reconstruction": explanation.weights()}
    rows |= {f"without {e.name}": explanation.weights(without=i) for i, e in enumerate(explanation.top)}
    key = rng.key(seed, "explain", "figure")
    return {title: sampler(weights.expand(SHOWN, -1), how, seed=key) for title, weights in rows.items()}


def planted_scores(
    sampler: Sampler,
    how: SampleConfig,
    facts: DataFacts,
    planted: Mapping[str, Sequence[str]],
    config: ExplainConfig,
) -> dict[str, float]:
    """Score explanations of planted classes, whose true parts are known.

    Returns:
        planted_found: share of planted classes whose parts are the first elements; planted_share: mean share of the
        sum of coefficients that their parts have.
    """
    found, shares = [], []
    for name, parts in planted.items():
        explanation = explain(sampler, how, facts, class_number(name, facts), config)
        first = [e.name for e in explanation.elements[: len(parts)]]
        found.append(float(set(first) == set(parts)))
        total = sum(e.coefficient for e in explanation.elements)
        shares.append(sum(e.coefficient for e in explanation.elements if e.name in parts) / max(total, 1e-12))
        print(f"{name}: {', '.join(f'{e.coefficient:.2f} {e.name}' for e in explanation.elements[:4])}", flush=True)
    scores = {"planted_found": found, "planted_share": shares}
    return {metric_name(key, None, len(found)): sum(values) / len(values) for key, values in scores.items()}
