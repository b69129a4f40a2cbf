"""`diffbench explain`: decompose a class of a run into the other classes' label embeddings."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from diffbench.commands.arguments import build_keys
from diffbench.config.layers import COMMAND_LINE, located, parse_overrides, refuse_unknown
from diffbench.config.load import change
from diffbench.core.errors import UserError
from diffbench.core.files import write_text
from diffbench.data.facts import class_number
from diffbench.evaluation.explain import ExplainConfig, draw_images, explain
from diffbench.evaluation.records import versions
from diffbench.reports.explain import changes, explanation_figure, explanation_table
from diffbench.reports.figures import save_with_tensorboard
from diffbench.runs.lifecycle import load
from diffbench.sampling.images import new_files


def run(arguments: argparse.Namespace) -> None:
    """Explain a class of `arguments.run`: print the mixture, and write a figure and a JSON file."""
    values = parse_overrides(arguments.overrides)
    refuse_unknown(values, "class", *vars(ExplainConfig()), "sample")
    if values.get("class") is None:
        raise UserError(f"{COMMAND_LINE}: class: missing; give a name or a number, e.g. class=8")
    label, sample = str(values.pop("class")), values.pop("sample", {})
    if not isinstance(sample, dict):
        raise UserError(f"{COMMAND_LINE}: sample: must be a section with keys, got {sample}; write sample.KEY=VALUE")
    config = build_keys(ExplainConfig, values)
    run = load(Path(arguments.run))
    settings = change(run.config, {"sample": asdict(run.config.sample.unguided()) | sample}).sample
    with located([(COMMAND_LINE, {"class": label} | vars(config))]):
        number = class_number(label, run.facts, "class") if run.facts.num_classes else 0
        default = run.folder / "explain" / f"class-{number}.png"
        figure, listing = new_files(config.out, default, [".json"])
        run.use_device()
        sampler = run.sampler(settings)
        explanation = explain(sampler, settings, run.facts, number, config)
        print(explanation_table(explanation), flush=True)
        images = {} if run.raw else draw_images(explanation, sampler, settings, config.seed)
    record = {"run": run.folder.name, "images_seen": run.images_seen, "ema": run.ema, "settings": vars(config)}
    record |= {"sample": settings.sampling_keys(), "versions": versions(), "change": changes(images)} | asdict(
        explanation
    )
    record |= {"gap_closed": explanation.gap_closed, "verdict": explanation.verdict}
    write_text(listing, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    save_with_tensorboard(explanation_figure(explanation, images), figure, [run], "explain")
    print(f"{figure}\n{listing}")
