"""YAML files, their bases, and key=value arguments: layers of plain values that remember where they came from."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffbench.core.errors import UserError, suggest

COMMAND_LINE, SMOKE_MODE = "command line", "debug=smoke"
Layer = tuple[str, dict[str, Any]]
"""Where values come from (a file, the command line), and the values as written."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        UserError: if it cannot be read, or holds something else.
    """
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except UnicodeDecodeError:
        raise UserError(f"{path}: not valid YAML: not text in UTF-8") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as e:
        raise UserError(f"{path}: not valid YAML: {one_line(e)}") from None
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: nested too deeply") from None
    except OSError as e:
        values = e.strerror
    if not isinstance(values, dict):
        why = values if isinstance(values, str) else "must hold keys with values, as seed: 1"
        raise UserError(f"{path}: {why}")
    return {str(key): value for key, value in values.items()}


def read_chain(path: Path, chain: tuple[Path, ...] = ()) -> list[Layer]:
    """A YAML file and the files below it, the farthest `base` first; `chain` holds the files that led here."""
    if path.resolve() in chain:
        names = " -> ".join(p.name for p in (*chain, path))
        raise UserError(f"{chain[-1]}: base: the chain {names} returns to itself")
    if not path.is_file():
        wrong = "is a folder, not a YAML file" if path.is_dir() else "no such file"
        where = f"{chain[-1]}: base: {path}" if chain else str(path)
        folder = path if path.is_dir() else path.parent
        beside = (p for p in folder.glob("*.yaml") if p.resolve() not in chain and (chain or p.name[0] != "_"))
        near = sorted(map(str, beside)) or experiments()
        named_so = [n for n in near if Path(n).stem == path.stem]
        named_so.sort(key=lambda n: (Path(n).parent != folder, len(n)))
        hint = f"; did you mean {named_so[0]!r}?" if named_so else suggest(str(path), near)
        raise UserError(f"{where}: {wrong}; choose from {', '.join(near) or 'files that exist'}{hint}")
    values = read_yaml(path)
    base = values.pop("base", None)
    if base is None:
        return [(str(path), values)]
    if not isinstance(base, str) or not base:
        raise UserError(f"{path}: base: must be the path of one YAML file, relative to this one, got {base!r}")
    return [*read_chain(path.parent / base, (*chain, path.resolve())), (str(path), values)]


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """key=value arguments as nested dictionaries, values read as YAML reads them.

    Raises:
        UserError: if an argument has another form.
    """
    values: dict[str, Any] = {}
    for argument in overrides:
        key, equals, _ = argument.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
            lists = "; a list is given whole, as ema.decays=[0.99,0.999]" if "[" in key else ""
            raise UserError(
                f"{COMMAND_LINE}: {argument!r} is no override; write key=value, as trainer.max_images=200_000{lists}"
            )
        try:
            tree = OmegaConf.to_container(OmegaConf.from_dotlist([argument]))
        except RecursionError:
            raise UserError(f"{COMMAND_LINE}: {key}: not valid YAML: nested too deeply") from None
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as e:
            raise UserError(f"{COMMAND_LINE}: {key}: not valid YAML: {one_line(e)}") from None
        assert isinstance(tree, dict)
        values = merge(values, {str(k): v for k, v in tree.items()})
    return values


def merge(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """Both together: sections merge, all else (lists too) is replaced."""
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


@contextlib.contextmanager
def blaming(stack: Sequence[Layer]) -> Iterator[None]:
    """Turns a ValueError whose text names keys into a UserError that also names where they were set."""
    try:
        yield
    except ValueError as e:
        text = " ".join(str(e).split())
        named = re.findall(r"[A-Za-z_][\w.]*", text.split("; ")[0])
        origins = [origin for origin, values in stack if any(_holds(values, key) for key in named)]
        files = [origin for origin, _ in stack if origin not in (SMOKE_MODE, COMMAND_LINE)]
        raise UserError(f"{(origins or files or [COMMAND_LINE])[-1]}: {text}") from None


def experiments(root: Path = Path("experiments")) -> list[str]:
    """The experiment YAMLs below a folder, but for shared bases (names that start with an underscore)."""
    return sorted(str(p) for p in root.glob("**/*.yaml") if not p.name.startswith("_"))


def one_line(error: Exception) -> str:
    """What a YAML or OmegaConf error says, without its context."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem} (line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1})"
    return str(error).strip().split("\n")[0]


def _holds(values: Any, key: str) -> bool:
    if isinstance(values, dict) and key in values:
        return True
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True
