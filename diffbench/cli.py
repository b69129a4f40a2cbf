"""The command line: verbs that parse, call and print. Heavy imports wait until a verb needs them."""

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from diffbench import launching
from diffbench.core.errors import UserError, suggest

COMMAND_LINE = "command line"
VERBS = {
    "train": "train an experiment; the same command resumes it",
    "encode": "encode an experiment's data into latents ahead of training",
    "show": "print an experiment's resolved config; runs nothing",
    "list": "list backbones, presets and experiments; or the runs in folders",
    "evaluate": "score samples of a run, or pictures of anyone",
    "reference": "statistics of real images: build, inspect, verify",
    "sample": "draw samples of a run into a PNG",
    "study": "train every variant of a study with every seed",
    "compare": "a table and a report of several runs, or of a study",
    "attention": "draw where a run's tokens look along sampling",
    "import": "turn a published checkpoint into a run folder",
    "bench": "measure speed and memory here, beside the machine's limits",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit code: 0, or 2 after one line that says what to mend."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        launcher, argv = launching.split(argv)
        arguments = _parser().parse_args(_checked_verb(argv))
        arguments.launcher = launcher
        code = 0
        if launcher.name == "slurm" and arguments.verb != "study":  # which hands over its cells itself
            print(launching.launch(argv, launcher))
        else:
            code = int(globals()[f"_{arguments.verb}"](arguments) or 0)
        sys.stdout.flush()
        return code
    except UserError as e:
        return _told(str(e))
    except BrokenPipeError:  # whoever read, as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:  # outside training, which ends by itself
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, OSError) as e:  # what no check foresaw, still in one line
        if os.environ.get("DIFFBENCH_TRACEBACK"):
            raise
        if isinstance(e, OSError) and e.filename is not None and e.strerror:  # as of a name too long, or no rights
            return _told(f"{str(e.filename)[:300]}: {e.strerror}")
        return _told(f"{' '.join(str(e).split())} (DIFFBENCH_TRACEBACK=1 shows where)")


def _told(text: str) -> int:
    """Prints an error as one line, whatever characters a user gave; returns the exit code."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    print(f"error: {shown}", file=sys.stderr)
    return 2


class _Help(argparse.HelpFormatter):
    """Help whose verbs stand beside their texts, however long: argparse forgets that they are indented."""

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action.choices, dict):
            self._action_max_length += self._indent_increment


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{COMMAND_LINE}: {message}; see {self.prog} --help")


def _checked_verb(argv: list[str]) -> list[str]:
    verb = argv[0] if argv else "--help"
    if verb not in VERBS and verb not in ("-h", "--help", "--version"):
        near = suggest(verb, VERBS)
        raise UserError(f"{COMMAND_LINE}: unknown command {verb!r}; choose from {', '.join(VERBS)}{near}")
    return argv or ["--help"]


def _parser() -> argparse.ArgumentParser:
    from diffbench import __version__

    parser = _Parser(prog="diffbench", description="Compare diffusion denoisers fairly.", formatter_class=_Help)
    parser.add_argument("--version", action="version", version=f"diffbench {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    parsers = {name: verbs.add_parser(name, help=text, description=text) for name, text in VERBS.items()}
    parsers["study"].add_argument("study", metavar="STUDY", help="YAML, as experiments/studies/backbones.yaml")
    for name in ("train", "encode", "show"):
        parsers[name].add_argument("config", metavar="CONFIG", help="YAML, as experiments/digits/dit.yaml")
    parsers["sample"].add_argument("run", metavar="RUN", help="run folder, as runs/digits/dit-s0")
    parsers["evaluate"].add_argument(
        "what", metavar="RUN", help="run folder; or a folder of pictures or an npz with arr_0, then --against as well"
    )
    parsers["evaluate"].add_argument(
        "--against", metavar="REAL", help="what pictures compare with: a run, a folder, an npz, or built statistics"
    )
    parsers["reference"].add_argument("action", choices=("build", "inspect", "verify"))
    parsers["reference"].add_argument("paths", nargs="*", metavar="PATH", help="run, folder, npz or statistics")
    parsers["list"].add_argument("folders", nargs="*", metavar="FOLDER", help="list the runs in it or below, as runs")
    parsers["list"].add_argument("--models", action="store_true", help="only the presets, with their sizes")
    parsers["compare"].add_argument(
        "runs",
        nargs="+",
        metavar="RUN [key=value]",
        help="run folders, or a study's YAML or folder, then keys as out=FOLDER primary=fd baseline=dit",
    )
    parsers["import"].add_argument("source", metavar="SOURCE", help="dit, sit, diffit, adm or ddpmpp")
    parsers["import"].add_argument("checkpoint", metavar="CKPT", help="a state dict, as DiT-XL-2-256x256.pt")
    parsers["import"].add_argument("out", metavar="OUT", help="the new run folder")
    parsers["attention"].add_argument(
        "runs", nargs="+", metavar="RUN [key=value]", help="run folders, then keys as layers=[blocks.0] times=6"
    )
    values = {
        "import": "arguments.num_heads=16 sample.steps=50",
        "train": "trainer.max_images=900_000, or launcher=slurm launcher.time=90",
        "study": "--dry-run seeds=[0,1] stop.images=20_000 jobs=2",
        "encode": "latent_dtype=float32",
        "show": "denoiser.depth=2",
        "evaluate": "sample.steps=50 ema=0.999 snapshot=best export=samples.npz evaluate.extractor=efficientnet-lite0",
        "bench": "models=[DiT-S/2] full=true gpu=true tiny=true baseline=old.json out=bench.json force=true",
        "sample": "n=16 labels=3 guidance=2 seed=0 out=digits.png strip=true gif=true, or keys of `sample` as steps=50",
    }
    for name, example in values.items():
        parsers[name].add_argument("overrides", nargs=argparse.REMAINDER, metavar="key=value", help=f"as {example}")
    return parser


def _train(arguments: argparse.Namespace) -> None:
    from diffbench.report import facts, newest_scores, table
    from diffbench.run import load_any, train

    run = train(arguments.config, arguments.overrides)
    builds_on = getattr(run.config, "autoencoder", None)
    if builds_on is not None and (Path(builds_on) / "config.yaml").is_file():
        autoencoder = load_any(builds_on)
        if not newest_scores(autoencoder):
            _score(autoencoder)
    if run.config.kind == "classifier":
        print(f"\n{table([(run.folder.name, facts(run))])}\n")
        return
    from diffbench.training.pictures import save_grid  # imports Lightning: after the checks

    picture = run.folder / "samples" / f"final-{run.images_seen:09d}.png"
    wanted = 1 + (run.config.kind == "denoiser" and run.config.sample.guided)
    if len(newest_scores(run)) < wanted:  # a kill may have come between the two
        try:
            _score(run)
        except UserError as e:  # the run itself is complete
            print(f"not scored: {e}", flush=True)
    if not picture.exists():
        save_grid(run.pictures(100), columns=10, path=picture)
    print(f"\n{table([(run.folder.name, facts(run))])}\n")
    print(f"samples: {picture}")
    print(f"curves:  {_python()} -m tensorboard.main --logdir {run.config.runs_dir}")


def _score(run: Any, overrides: Sequence[str] = ()) -> None:
    """Appends a run's scores to its records, as its kind is scored."""
    from diffbench import reconstructing, scoring

    kinds: dict[str, Any] = {"denoiser": scoring, "autoencoder": reconstructing}
    if run.config.kind not in kinds:
        raise UserError(f"{run.folder}: a run of kind {run.config.kind}; choose a denoiser's or an autoencoder's")
    what = "scoring reconstructions" if run.config.kind == "autoencoder" else "drawing and scoring samples"
    print(f"{run.folder}: {what}", flush=True)
    kinds[run.config.kind].evaluate(run, overrides)


def _encode(arguments: argparse.Namespace) -> None:
    from diffbench.run import encode

    encode(arguments.config, arguments.overrides)


def _python() -> str:
    """The interpreter as one would type it here."""
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else "python"


def _show(arguments: argparse.Namespace) -> None:
    from diffbench.config import load, to_yaml

    print(to_yaml(load(arguments.config, arguments.overrides)), end="")


def _list(arguments: argparse.Namespace) -> None:
    from diffbench.listing import catalogue, runs

    folders = [Path(folder) for folder in arguments.folders]
    for line in runs(folders) if folders else catalogue(only_models=arguments.models):
        print(line, flush=True)


def _evaluate(arguments: argparse.Namespace) -> None:
    overrides = list(arguments.overrides)
    if "--against" in overrides[:-1]:  # argparse leaves what follows the folder to the overrides
        arguments.against = overrides.pop(overrides.index("--against") + 1)
        overrides.remove("--against")
    from diffbench.foreign import evaluate_pictures
    from diffbench.records import values

    if arguments.against is not None:
        record = evaluate_pictures(Path(arguments.what), Path(arguments.against), overrides)
        print("\n".join(f"{name:<40} {value:>12.6g}" for name, value in values(record).items()))
        return
    from diffbench.report import facts, table
    from diffbench.run import load_any

    run = load_any(arguments.what)
    _score(run, overrides)
    print(table([(run.folder.name, facts(run))]))


def _reference(arguments: argparse.Namespace) -> int:
    from diffbench.referencing import run

    text, right = run(arguments.action, arguments.paths)
    print(text)
    return 0 if right else 2


def _sample(arguments: argparse.Namespace) -> None:
    from diffbench.drawing import draw

    for path in draw(Path(arguments.run), arguments.overrides):
        print(path)


def _study(arguments: argparse.Namespace) -> int:
    from diffbench.config_layers import read_yaml
    from diffbench.studies.cells import KIND, run_cell

    path, overrides = Path(arguments.study), [o for o in arguments.overrides if o != "--dry-run"]
    if path.is_file() and read_yaml(path).get("kind") == KIND:
        run_cell(path)
        return 0
    from diffbench.studies.run import run_study, slurm_folder

    dry_run = "--dry-run" in arguments.overrides
    launcher = arguments.launcher
    folder = run_study(path, overrides, dry_run, launcher)
    if dry_run or (launcher.name == "slurm" and launching.queued(slurm_folder(folder, launcher))):
        return 0
    from diffbench.studies.collect import comparison_of_study
    from diffbench.studies.report import write

    comparison = comparison_of_study(folder)
    print(f"\n{write(comparison, folder)}\n\nreport: {folder / 'report.html'}")
    return int(any(r.status != "complete" for r in comparison.results))


def _attention(arguments: argparse.Namespace) -> None:
    from diffbench import schema
    from diffbench.attention import AttentionConfig, attention, draw, save
    from diffbench.config_layers import blaming, parse_overrides
    from diffbench.run import load

    folders = [word for word in arguments.runs if not re.match(r"[A-Za-z_]\w*=", word)]
    values = parse_overrides([word for word in arguments.runs if word not in folders])
    if not folders:
        raise UserError(f"{COMMAND_LINE}: name a run folder, as runs/digits/diffit-s0; see diffbench attention --help")
    with blaming([(COMMAND_LINE, values)]):
        config = schema.build(AttentionConfig, values)
        runs = [load(folder) for folder in folders]
        path = Path(config.out or runs[0].folder / "samples" / f"attention-{runs[0].images_seen:09d}.png")
        if config.out and path.exists():
            raise ValueError(f"out: {path} exists already; choose another name")
        levels, found = attention(runs, config)
    save(draw(levels, found), path, runs)
    print(path)


def _import(arguments: argparse.Namespace) -> None:
    from diffbench.importing import import_reference

    out = Path(arguments.out)
    config = import_reference(arguments.source, Path(arguments.checkpoint), out, arguments.overrides)
    d, p, s = config.data, config.process, config.sample
    shape = f"{d.channels}x{d.image_size}x{d.image_size}, {d.num_classes} classes" if d.name == "none" else d.name
    told = f" ({p.schedule} schedule, {p.variance} variance)" if p.name == "vp" else ""
    print(f"{out}: {config.denoiser.name} for {shape}; process {p.name}{told}")
    print(f"samples by {s.sampler} in {s.steps} steps, guidance {s.guidance:g}: {_python()} -m diffbench sample {out}")


def _bench(arguments: argparse.Namespace) -> None:
    from diffbench.bench.bench import bench

    bench(arguments.overrides)


def _compare(arguments: argparse.Namespace) -> None:
    from diffbench.studies.comparing import compare

    for text in compare(arguments.runs):
        print(text, flush=True)
