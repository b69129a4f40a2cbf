"""The command line: parse the arguments, call the verb, print. Heavy imports wait until a verb needs them."""

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn

from diffbench.commands.verbs import VERBS
from diffbench.config.keys import key_lines
from diffbench.config.layers import COMMAND_LINE
from diffbench.core.errors import UserError, report, suggest
from diffbench.core.files import finite
from diffbench.runs import launcher as launchers
from diffbench.runs import slurm


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb in `argv`; return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    return exit_code(lambda: _run(args))


def _run(argv: list[str]) -> int:
    if not {"", os.getcwd()} & set(sys.path):  # where extractors and networks named as module:function are found
        sys.path.append(os.getcwd())
    launcher, argv = launchers.split(argv)
    arguments = _parser().parse_args(_checked(argv))
    arguments.launcher = launcher
    if launcher.name == "slurm" and arguments.verb != "study":  # a study submits its own trials
        print(slurm.launch(argv, launcher))
        return 0
    module = import_module(f"diffbench.commands.{VERBS[arguments.verb].module or arguments.verb}")
    if getattr(arguments, "json", False):
        with contextlib.redirect_stdout(sys.stderr):  # so that stdout contains only the JSON
            result = module.as_json(arguments)
        print(json.dumps(finite(result), indent=1, default=str))
        return 0
    return int(module.run(arguments) or 0)


def exit_code(work: Callable[[], int]) -> int:
    """Run a command; return its exit code: 2 after an error that the user can fix, 1 after a bug."""
    try:
        code = work()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of the pipe, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at exit
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:  # outside training, which handles it itself
        print("stopped; run the same command again to resume", file=sys.stderr)
        return 130
    except Exception as e:
        if os.environ.get("DIFFBENCH_TRACEBACK") and not isinstance(e, UserError):
            raise
        return report(e)


class _Help(argparse.HelpFormatter):
    """Help that puts each verb and its description on one line: argparse ignores the verbs' indentation."""

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action.choices, dict):
            self._action_max_length += self._indent_increment


class _Parser(argparse.ArgumentParser):
    """A parser with one-line errors, no abbreviated options, and help that lists a verb's keys."""

    verb = ""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{COMMAND_LINE}: {message}; see {self.prog} --help")

    def format_help(self) -> str:
        text = super().format_help()
        if not self.verb:
            return text
        verb, width = VERBS[self.verb], shutil.get_terminal_size().columns
        keys = verb.read_keys()
        parts = [text.rstrip()]
        if keys or verb.more:
            wrapped = [textwrap.fill(more, width, initial_indent="  ", subsequent_indent="  ") for more in verb.more]
            parts.append("\n".join(["keys and their defaults, set as key=value:", *key_lines(keys, width), *wrapped]))
        examples = [f"  diffbench {self.verb} {args}".rstrip() for args in verb.examples]
        return "\n\n".join([*parts, "\n".join(["examples:", *examples])]) + "\n"


def _checked(argv: list[str]) -> list[str]:
    """Check the verb; return the arguments with a `--help` or `--json` from anywhere moved to just after the verb."""
    verb = argv[0] if argv else "--help"
    if verb not in VERBS and verb not in ("-h", "--help", "--version"):
        near = suggest(verb, VERBS)
        raise UserError(f"{COMMAND_LINE}: unknown command {verb!r}; choose from {', '.join(VERBS)}{near}")
    if verb in VERBS and {"-h", "--help"} & {*argv}:
        return [verb, "--help"]
    if "--json" in argv and verb in VERBS and VERBS[verb].json:  # after RUN, argparse would take it for an override
        return [verb, "--json", *(arg for arg in argv[1:] if arg != "--json")]
    return argv or ["--help"]


def _parser() -> argparse.ArgumentParser:
    from diffbench import __version__

    parser = _Parser(prog="diffbench", description="Compare diffusion denoisers fairly.", formatter_class=_Help)
    parser.add_argument("--version", action="version", version=f"diffbench {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    parsers: dict[str, _Parser] = {}
    for name, verb in VERBS.items():
        parsers[name] = verbs.add_parser(name, help=verb.text, description=verb.text)
        parsers[name].verb = name
        if verb.json:
            parsers[name].add_argument("--json", action="store_true", help="print only the result, as JSON")
    parsers["init"].add_argument("folder", nargs="?", default=".", metavar="FOLDER", help="default: the current folder")
    parsers["study"].add_argument("study", metavar="STUDY", help="YAML file, e.g. experiments/studies/backbones.yaml")
    for name in ("train", "encode", "show"):
        parsers[name].add_argument("config", metavar="CONFIG", help="YAML file, e.g. experiments/digits/dit.yaml")
    parsers["sample"].add_argument("run", metavar="RUN", help="run folder, e.g. runs/digits/dit-s0")
    parsers["evaluate"].add_argument(
        "what", metavar="RUN", help="run folder; with --against, a folder of images or an .npz with arr_0"
    )
    parsers["evaluate"].add_argument(
        "--against", metavar="REAL", help="real images: a run, a folder, an .npz, or statistics written by `reference`"
    )
    parsers["reference"].add_argument("what", metavar="REAL", help="run folder, folder of images, or .npz with arr_0")
    parsers["list"].add_argument("folders", nargs="*", metavar="FOLDER", help="list the runs below it, e.g. runs")
    parsers["list"].add_argument("--models", action="store_true", help="list only the presets, with their sizes")
    what = "run folders, or the YAML file or folder of one study"
    parsers["compare"].add_argument("runs", nargs="+", metavar="RUN [key=value]", help=f"{what}; then keys")
    parsers["reproduce"].add_argument("report", metavar="REPORT", help="report.html written by study or compare")
    parsers["reproduce"].add_argument(
        "cells", nargs="*", metavar="CELL [key=value]", help="cells to train again, e.g. dit/0, or all; then keys"
    )
    parsers["import"].add_argument("source", metavar="SOURCE", help="model: dit, sit, diffit, adm, ddpmpp or uvit")
    parsers["import"].add_argument("checkpoint", metavar="CKPT", help="state dict, e.g. DiT-XL-2-256x256.pt")
    parsers["import"].add_argument("out", metavar="OUT", help="new run folder")
    for name in ("attention", "curves"):
        parsers[name].add_argument("runs", nargs="+", metavar="RUN [key=value]", help="run folders; then keys")
    parsers["explain"].add_argument("run", metavar="RUN", help="run folder, e.g. runs/digits/dit-s0")
    for name in (
        *("import", "train", "study", "encode", "show", "evaluate", "reference", "sample", "explain", "findings"),
    ):
        overrides = parsers[name].add_argument(
            "overrides", nargs=argparse.REMAINDER, metavar="key=value", help="see keys below"
        )
        overrides.required = False  # argparse would name them among the missing arguments
    return parser
