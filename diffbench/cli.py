"""The command line: verbs that parse, call and print. Heavy imports wait until a verb needs them."""

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
from diffbench.config.keys import key_lines, read_keys
from diffbench.config.layers import COMMAND_LINE
from diffbench.core.errors import UserError, report, suggest
from diffbench.core.files import finite
from diffbench.runs import launcher as launchers
from diffbench.runs import slurm


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not {"", os.getcwd()} & set(sys.path):  # which holds extractors and networks that are named as module:function
        sys.path.append(os.getcwd())
    return exit_code(lambda: _run(words))


def _run(argv: list[str]) -> int:
    launcher, argv = launchers.split(argv)
    arguments = _parser().parse_args(_checked(argv))
    arguments.launcher = launcher
    if launcher.name == "slurm" and arguments.verb != "study":  # which hands over its trials itself
        print(slurm.launch(argv, launcher))
        return 0
    module = import_module(f"diffbench.commands.{VERBS[arguments.verb].module or arguments.verb}")
    if getattr(arguments, "json", False):
        with contextlib.redirect_stdout(sys.stderr):  # so that standard output holds the result alone
            found = module.as_json(arguments)
        print(json.dumps(finite(found), indent=1, default=str))
        return 0
    return int(module.run(arguments) or 0)


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
    """A parser whose errors are one line, whose options are not abbreviated, and whose help shows a verb's keys."""

    verb = ""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{COMMAND_LINE}: {message}; see {self.prog} --help")

    def format_help(self) -> str:
        text = super().format_help()
        if not self.verb:
            return text
        about, width = VERBS[self.verb], shutil.get_terminal_size().columns
        keys = [key for place, prefix in about.keys.items() for key in read_keys(place, prefix)]
        parts = [text.rstrip()]
        if keys or about.more:
            wrapped = [textwrap.fill(more, width, initial_indent="  ", subsequent_indent="  ") for more in about.more]
            parts.append("\n".join(["keys, as key=value, with their defaults:", *key_lines(keys, width), *wrapped]))
        examples = [f"  diffbench {self.verb} {words}".rstrip() for words in about.examples]
        return "\n\n".join([*parts, "\n".join(["examples:", *examples])]) + "\n"


def _checked(argv: list[str]) -> list[str]:
    """The words of a command whose verb is known; `--help` may stand anywhere after it."""
    verb = argv[0] if argv else "--help"
    if verb not in VERBS and verb not in ("-h", "--help", "--version"):
        near = suggest(verb, VERBS)
        raise UserError(f"{COMMAND_LINE}: unknown command {verb!r}; choose from {', '.join(VERBS)}{near}")
    if verb in VERBS and {"-h", "--help"} & {*argv}:
        return [verb, "--help"]
    if "--json" in argv and verb in VERBS and VERBS[verb].json:  # argparse would leave it to what follows the run
        return [verb, "--json", *(word for word in argv[1:] if word != "--json")]
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
            parsers[name].add_argument("--json", action="store_true", help="print the result as JSON, and nothing else")
    parsers["init"].add_argument("folder", nargs="?", default=".", metavar="FOLDER", help="by default this one")
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
    what = "run folders, or a study's YAML or folder"
    parsers["compare"].add_argument("runs", nargs="+", metavar="RUN [key=value]", help=f"{what}, then keys")
    parsers["reproduce"].add_argument("report", metavar="REPORT", help="report.html of a study or of compare")
    parsers["reproduce"].add_argument(
        "cells", nargs="*", metavar="CELL [key=value]", help="as dit/0, or all; then keys"
    )
    parsers["import"].add_argument("source", metavar="SOURCE", help="dit, sit, diffit, adm, ddpmpp or uvit")
    parsers["import"].add_argument("checkpoint", metavar="CKPT", help="a state dict, as DiT-XL-2-256x256.pt")
    parsers["import"].add_argument("out", metavar="OUT", help="the new run folder")
    for name in ("attention", "curves"):
        parsers[name].add_argument("runs", nargs="+", metavar="RUN [key=value]", help="run folders, then keys")
    parsers["explain"].add_argument("run", metavar="RUN", help="run folder, as runs/digits/dit-s0")
    for name in (
        *("import", "train", "study", "encode", "show", "evaluate", "reference", "sample", "explain", "findings"),
    ):
        parsers[name].add_argument("overrides", nargs=argparse.REMAINDER, metavar="key=value", help="see keys below")
    return parser
