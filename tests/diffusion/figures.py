"""Print the moment errors of every (process, sampler) pair and plot docs/convergence.png.

    .venv/bin/python tests/diffusion/figures.py

The data is the Gaussian mixture of mixture.py, whose exact denoiser is known in closed form.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from test_mixture import MIXTURE, PROCESSES, RUNS, converged, drawn, moment_errors, run

DOCS = Path(__file__).resolve().parents[2] / "docs"
COLOURS = {"euler": "#4477aa", "ddim": "#66ccee", "heun": "#ee6677", "dpm_solver": "#228833"}
STYLES = dict(zip(PROCESSES, ["-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1))], strict=True))
STEPS = (8, 16, 32, 64, 128, 256)


def table() -> str:
    """Return a Markdown row per pair: the largest error of mean and covariance of 10,000 samples of 100 steps."""
    lines = ["| process | sampler | error of the mean | error of the covariance |", "|---|---|---|---|"]
    for process, sampler in RUNS:
        mean, covariance = moment_errors(process, sampler)
        lines.append(f"| {process} | {sampler} | {mean:.4f} | {covariance:.4f} |")
    return "\n".join(lines)


def convergence(path: Path) -> None:
    """Plot error against steps for each deterministic sampler with a fixed number of steps."""
    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    noise = drawn(100, 1, 1, 2)
    for process, sampler in RUNS:
        if sampler not in COLOURS:
            continue
        extra = int(process.startswith("vp"))
        predict = MIXTURE.denoiser(PROCESSES[process])
        off = [run(PROCESSES[process], sampler, n + extra, noise, predict) - converged(process) for n in STEPS]
        errors = [float(d.square().mean().sqrt()) for d in off]
        axes.loglog(STEPS, errors, color=COLOURS[sampler], linestyle=STYLES[process], label=f"{sampler}, {process}")
    for order, start in ((1, 0.35), (2, 0.02)):
        axes.loglog(STEPS, [start * (STEPS[0] / n) ** order for n in STEPS], color="0.7", linewidth=4, zorder=0)
        axes.annotate(f"order {order}", (STEPS[-1], start * (STEPS[0] / STEPS[-1]) ** order), color="0.4")
    axes.set_xticks(STEPS, [str(n) for n in STEPS])
    axes.set(xlabel="steps", ylabel="error of the samples (root mean square)")
    axes.set_title("Samplers on a Gaussian mixture with its exact denoiser")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    print(table())
    convergence(DOCS / "convergence.png")
    print(DOCS / "convergence.png")
