"""The layers of a config: YAML files, their bases, and key=value arguments, as values that remember their source."""

import contextlib
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffbench.config.documents import Typed, parse, scalar
from diffbench.core.errors import UserError, suggest

COMMAND_LINE, SMOKE_MODE = "command line", "debug=smoke"
SHIPPED = Path(__file__).parents[1] / "experiments"
"""The experiments that come with the package; in a checkout a link to the folder that is edited."""
Layer = tuple[str, dict[str, Any]]
"""The origin of values (a file, the command line), and the values as written."""


@contextlib.contextmanager
def located(layers: Sequence[Layer] = (), key: str = "") -> Iterator[None]:
    """Say where an error inside the block comes from: first its key, then the file or argument that set it.

    Args:
        layers: what the config consists of. A ValueError becomes a UserError that begins with the last layer that sets
            a key of the message's first sentence; without layers, with "command line".
        key: instead of layers: a ValueError or UserError becomes a ValueError that begins with this key. The layers
            around look for the key too, as one value may only be wrong beside another of its section.
    """
    try:
        yield
    except (ValueError, UserError) as e:
        text = " ".join(str(e).split())
        if key:
            error = ValueError(text if text.startswith(f"{key}.") else f"{key}: {text}")
            error.add_note(key)
            raise error from None
        if isinstance(e, UserError):
            raise
        named = [*re.findall(r"[A-Za-z_][\w.]*", text.split("; ")[0]), *getattr(e, "__notes__", ())]
        origins = [origin for origin, values in layers if any(_holds(values, name) for name in named)]
        files = [origin for origin, _ in layers if origin not in (SMOKE_MODE, COMMAND_LINE)]
        raise UserError(f"{(origins or files or [COMMAND_LINE])[-1]}: {text}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file; UserError if it cannot be read, or holds something else."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not valid YAML: not text in UTF-8") from None
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    values = parse(text, str(path))
    if not isinstance(values, dict | None):
        raise UserError(f"{path}: must hold keys with values, as seed: 1")
    return values or {}


def read_chain(path: Path, chain: tuple[Path, ...] = ()) -> list[Layer]:
    """A YAML file and the files below it, the farthest `base` first; `chain` holds the files that led here."""
    if path.resolve() in chain:
        names = " -> ".join(p.name for p in (*chain, path))
        raise UserError(f"{chain[-1]}: base: the chain {names} returns to itself")
    if not path.is_file():
        raise _missing(path, chain)
    values = read_yaml(path)
    base = values.pop("base", None)
    values = with_paths(values, path)
    if base is None:
        return [(str(path), values)]
    if not isinstance(base, str) or not base:
        raise UserError(f"{path}: base: must be the path of one YAML file, relative to this one, got {base!r}")
    return [*read_chain(path.parent / base, (*chain, path.resolve())), (str(path), values)]


PATHS = re.compile(
    r"(^|\.)(experiment|autoencoder|init_from|sample\.weak_model|sample\.classifier|data\.path)$"
    r"|(^|\.)evaluate\.(weights|judge)$|^(out|export)$"
)
"""Keys whose text may be a path, also below a study's `set` and `axes`."""


def places(file: Path) -> list[Path]:
    """The folders in which paths of a YAML file are looked up: its own, its repository, the working folder, and this
    package, where the shipped experiments lie."""
    own = file.resolve().parent
    marked = (p for p in (own, *own.parents) if any((p / name).exists() for name in (".git", "pyproject.toml")))
    return list(dict.fromkeys([own, *itertools.islice(marked, 1), Path.cwd(), SHIPPED.resolve().parent]))


def found_from(path: str, file: Path | None) -> str:
    """A path that stands in a YAML file or, without one, on the command line, as it is reached from the working folder.

    A path that exists in none of its `places`, such as a hub name, stays as it is.
    """
    path = os.path.expanduser(path)
    if not path or os.path.isabs(path):
        return path
    for folder in [] if file is None else places(file):
        if (found := Path(os.path.normpath(folder / path))).exists():
            if os.path.exists(path) and os.path.samefile(path, found):
                return path
            return str(found.relative_to(Path.cwd()) if found.is_relative_to(Path.cwd()) else found)
    return path


def with_paths(value: Any, file: Path | None, key: str = "") -> Any:
    """Values of a config with their paths as they are reached from the working folder; see `found_from`."""
    if isinstance(value, dict):
        return {k: with_paths(v, file, f"{key}.{k}" if key else k) for k, v in value.items()}
    if isinstance(value, list):
        return [with_paths(v, file, key) for v in value]
    return found_from(str(value), file) if isinstance(value, str | Typed) and PATHS.search(key) else value


def _missing(path: Path, chain: tuple[Path, ...]) -> UserError:
    wrong = "is a folder, not a YAML file" if path.is_dir() else "no such file"
    where = f"{chain[-1]}: base: {path}" if chain else str(path)
    folder = path if path.is_dir() else path.parent
    beside = (p for p in folder.glob("*.yaml") if p.resolve() not in chain and (chain or p.name[0] != "_"))
    near = sorted(map(str, beside)) or experiments()
    named_so = sorted((n for n in near if Path(n).stem == path.stem), key=lambda n: (Path(n).parent != folder, len(n)))
    hint = f"; did you mean {named_so[0]!r}?" if named_so else suggest(str(path), near)
    choices = f"choose from {', '.join(near)}" if near else "`diffbench init` copies the shipped experiments here"
    return UserError(f"{where}: {wrong}; {choices}{hint}")


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """key=value arguments as nested dictionaries. A value in quotes, [] or {} is YAML; any other is one scalar."""
    values: dict[str, Any] = {}
    for argument in overrides:
        key, equals, text = argument.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+){0,20}", key):
            lists = "; a list is given whole, as ema.decays=[0.99,0.999]" if "[" in key else ""
            raise UserError(
                f"{COMMAND_LINE}: {argument!r} is not an override; write key=value, as"
                f" trainer.max_images=200_000{lists}"
            )
        value = parse(text, f"{COMMAND_LINE}: {key}") if text.lstrip()[:1] in tuple("'\"[{") else scalar(text)
        for part in reversed(key.split(".")):
            value = {part: value}
        with located():
            values = stacked(values, value)
    return with_paths(values, None)


def refuse_others(values: Mapping[str, Any], *allowed: str, said: str = "unknown key") -> None:
    """Raise UserError for the first key of the command line that is not allowed; "sample.KEY" allows a section."""
    known = [name.removesuffix(".KEY") for name in allowed]
    for key in values:
        if key not in known:
            hint = suggest(key, known)
            raise UserError(f"{COMMAND_LINE}: {key}: {said}; allowed: {', '.join(allowed)}{hint}")


def merge(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """Both together: sections merge, all else (lists too) is replaced."""
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def stacked(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """Merge one layer over others; keys of a section where a value stood are a ValueError."""
    for key, value in upper.items():
        below = lower.get(key)
        if isinstance(value, dict) and below is not None and not isinstance(below, dict):
            raise ValueError(f"{key}: must be a section with keys, got {below!r}; write {key}.KEY=VALUE")
    return merge(lower, upper)


def experiments(root: Path = Path("experiments")) -> list[str]:
    """The experiment YAMLs in the folders of one, but for shared bases (names that start with an underscore)."""
    return sorted(str(p) for p in root.glob("*/*.yaml") if not p.name.startswith("_"))


def _holds(values: Any, key: str) -> bool:
    if isinstance(values, dict) and key in values:
        return True
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True
