"""The command line: verbs that parse, call and print. Heavy imports wait until a verb needs them."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn

from diffbench.config.layers import COMMAND_LINE
from diffbench.core.errors import UserError, report, suggest
from diffbench.runs import slurm

VERBS = {
    "train": "train an experiment; the same command resumes it",
    "encode": "encode an experiment's data into latents ahead of training",
    "show": "print an experiment's resolved config; runs nothing",
    "list": "list backbones, presets and experiments; or the runs in folders",
    "evaluate": "score samples of a run, or anyone's images",
    "reference": "make statistics of real images",
    "sample": "draw samples of a run into a PNG",
    "study": "train every variant of a study with every seed",
    "compare": "a table and a report of several runs, or of a study",
    "attention": "draw where a run's tokens look along sampling",
    "import": "turn a published checkpoint into a run folder",
}

MODULES = {"import": "import_checkpoint"}
"""Verb -> its module in commands/, where that has another name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return exit_code(lambda: _run(words))


def _run(argv: list[str]) -> int:
    launcher, argv = slurm.split(argv)
    arguments = _parser().parse_args(_checked_verb(argv))
    arguments.launcher = launcher
    if launcher.name == "slurm" and arguments.verb != "study":  # which hands over its trials itself
        print(slurm.launch(argv, launcher))
        return 0
    return int(import_module(f"diffbench.commands.{MODULES.get(arguments.verb, arguments.verb)}").run(arguments) or 0)


def exit_code(work: Callable[[], int]) -> int:
    """Run a command; return its exit code: 2 after a line that says what to mend, 1 after a bug."""
    try:
        code = work()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read, as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:  # outside training, which ends by itself
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    except Exception as e:
        if os.environ.get("DIFFBENCH_TRACEBACK") and not isinstance(e, UserError):
            raise
        return report(e)


class _Help(argparse.HelpFormatter):
    """Help with each verb on the line of its text: argparse forgets that verbs are indented."""

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action.choices, dict):
            self._action_max_length += self._indent_increment


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose options are not abbreviated."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

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
        "what", metavar="RUN", help="run folder; or a folder of images or an npz with arr_0, then --against as well"
    )
    parsers["evaluate"].add_argument(
        "--against", metavar="REAL", help="what images compare with: a run, a folder, an npz, or built statistics"
    )
    parsers["reference"].add_argument("what", metavar="REAL", help="run folder, folder of images, or npz with arr_0")
    parsers["list"].add_argument("folders", nargs="*", metavar="FOLDER", help="list the runs in it or below, as runs")
    parsers["list"].add_argument("--models", action="store_true", help="only the presets, with their sizes")
    parsers["compare"].add_argument(
        "runs",
        nargs="+",
        metavar="RUN [key=value]",
        help="run folders, or a study's YAML or folder, then keys as out=FOLDER primary=fd baseline=dit",
    )
    parsers["import"].add_argument("source", metavar="SOURCE", help="dit, sit, diffit, adm, ddpmpp or uvit")
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
        "reference": "evaluate.count=1000 out=stats.safetensors",
        "sample": "n=16 labels=3 guidance=2 seed=0 out=digits.png strip=true gif=true, or keys of `sample` as steps=50",
    }
    for name, example in values.items():
        parsers[name].add_argument("overrides", nargs=argparse.REMAINDER, metavar="key=value", help=f"as {example}")
    return parser
