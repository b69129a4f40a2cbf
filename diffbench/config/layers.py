"""The layers of a config (YAML files, their bases, and key=value arguments), each kept with its origin."""

import contextlib
import difflib
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
"""The experiments that ship with the package; in a checkout, a symlink to the top-level folder."""
Layer = tuple[str, dict[str, Any]]
"""The origin of some values (a file, the command line), and the values as written."""


@contextlib.contextmanager
def located(layers: Sequence[Layer] = (), key: str = "") -> Iterator[None]:
    """Prefix an error raised in the block with its key, or with the file or argument that set the key.

    Args:
        layers: the layers of the config. A ValueError becomes a UserError that begins with the last layer to set a key
            named in the message (up to its first "; "); if there is none, with the last file or "command line".
        key: used instead of layers. A ValueError or UserError becomes a ValueError that begins with this key. An
            outer `located` with layers looks for this key too, since the fault may be in how keys combine.
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
        origins = [origin for origin, values in layers if any(_sets(values, name) for name in named)]
        files = [origin for origin, _ in layers if origin not in (SMOKE_MODE, COMMAND_LINE)]
        raise UserError(f"{(origins or files or [COMMAND_LINE])[-1]}: {text}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the keys and values of a YAML file; UserError if it cannot be read or contains anything else."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not valid YAML: not text in UTF-8") from None
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    values = parse(text, str(path))
    if not isinstance(values, dict | None):
        raise UserError(f"{path}: must contain keys with values, e.g. seed: 1")
    return values or {}


def read_chain(path: Path, chain: tuple[Path, ...] = ()) -> list[Layer]:
    """Read a YAML file and its bases, the root of the chain first; `chain` lists the files that led to this one."""
    if path.resolve() in chain:
        names = " -> ".join(p.name for p in (*chain, path))
        raise UserError(f"{chain[-1]}: base: the chain {names} is a cycle")
    if not path.is_file():
        raise _missing(path, chain)
    values = read_yaml(path)
    base = values.pop("base", None)
    values = resolve_paths(values, path)
    if base is None:
        return [(str(path), values)]
    if not isinstance(base, str) or not base:
        raise UserError(f"{path}: base: must be the path of one YAML file, relative to this one, got {base!r}")
    return [*read_chain(path.parent / base, (*chain, path.resolve())), (str(path), values)]


PATHS = re.compile(
    r"(^|\.)(experiment|autoencoder|init_from|sample\.weak_model|sample\.classifier|data\.path)$"
    r"|(^|\.)evaluate\.(weights|judge)$|^(out|export)$"
)
"""Keys whose value may be a path, including those nested in a study's `set` and `axes`."""


def search_folders(file: Path) -> list[Path]:
    """List the folders in which a YAML file's paths are looked up: the file's own, the root of its repository, the
    working folder, and this package (for the shipped experiments)."""
    own = file.resolve().parent
    marked = (p for p in (own, *own.parents) if any((p / name).exists() for name in (".git", "pyproject.toml")))
    return list(dict.fromkeys([own, *itertools.islice(marked, 1), Path.cwd(), SHIPPED.resolve().parent]))


def resolve_path(path: str, file: Path | None) -> str:
    """Return a path from a YAML file, or from the command line if `file` is None, as seen from the working folder.

    A path that exists in none of the file's `search_folders`, such as a hub name, is returned unchanged.
    """
    path = os.path.expanduser(path)
    if not path or os.path.isabs(path):
        return path
    for folder in [] if file is None else search_folders(file):
        if (found := Path(os.path.normpath(folder / path))).exists():
            if os.path.exists(path) and os.path.samefile(path, found):
                return path
            return str(found.relative_to(Path.cwd()) if found.is_relative_to(Path.cwd()) else found)
    return path


def resolve_paths(value: Any, file: Path | None, key: str = "") -> Any:
    """Return the values of a config with their paths resolved by `resolve_path`."""
    if isinstance(value, dict):
        return {k: resolve_paths(v, file, f"{key}.{k}" if key else k) for k, v in value.items()}
    if isinstance(value, list):
        return [resolve_paths(v, file, key) for v in value]
    return resolve_path(str(value), file) if isinstance(value, str | Typed) and PATHS.search(key) else value


def _missing(path: Path, chain: tuple[Path, ...]) -> UserError:
    problem = "is a folder, not a YAML file" if path.is_dir() else "no such file"
    where = f"{chain[-1]}: base: {path}" if chain else str(path)
    folder = path if path.is_dir() else path.parent
    siblings = (p for p in folder.glob("*.yaml") if p.resolve() not in chain and (chain or p.name[0] != "_"))
    files = sorted(map(str, siblings))
    near = files or difflib.get_close_matches(str(path), experiments(), n=8, cutoff=0)
    if not near:
        return UserError(f"{where}: {problem}; `diffbench init` copies the shipped experiments here")
    alike = [file for file in near if Path(file).stem == path.stem]
    hint = f"; did you mean {alike[0]!r}?" if alike else suggest(str(path), near)
    more = "" if files else "; see diffbench list for more"
    return UserError(f"{where}: {problem}; choose from {', '.join(near)}{more}{hint}")


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Parse key=value arguments into nested dictionaries. A value in quotes, [] or {} is YAML, any other a scalar."""
    values: dict[str, Any] = {}
    for argument in overrides:
        key, equals, text = argument.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+){0,20}", key):
            lists = "; write a list as a whole, e.g. ema.decays=[0.99,0.999]" if "[" in key else ""
            raise UserError(
                f"{COMMAND_LINE}: {argument!r} is not an override; write key=value, e.g."
                f" trainer.max_images=200_000{lists}"
            )
        value = parse(text, f"{COMMAND_LINE}: {key}") if text.lstrip()[:1] in tuple("'\"[{") else scalar(text)
        for part in reversed(key.split(".")):
            value = {part: value}
        with located():
            values = overlay(values, value)
    return resolve_paths(values, None)


def refuse_unknown(values: Mapping[str, Any], *allowed: str, why: str = "unknown key") -> None:
    """Raise UserError for the first command-line key that is not allowed; "sample.KEY" allows a whole section."""
    known = [name.removesuffix(".KEY") for name in allowed]
    for key in values:
        if key not in known:
            hint = suggest(key, known)
            raise UserError(f"{COMMAND_LINE}: {key}: {why}; allowed: {', '.join(allowed)}{hint}")


def merge(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """Merge two layers: sections are merged key by key, anything else (lists too) is replaced by `upper`."""
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def overlay(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """Merge a layer over the lower ones; ValueError if it has a section where they have a plain value."""
    for key, value in upper.items():
        below = lower.get(key)
        if isinstance(value, dict) and below is not None and not isinstance(below, dict):
            raise ValueError(f"{key}: must be a section with keys, got {below!r}; write {key}.KEY=VALUE")
    return merge(lower, upper)


def experiments(root: Path = Path("experiments")) -> list[str]:
    """List the experiment YAML files in the sub-folders of `root`, except shared bases (named with a leading _)."""
    return sorted(str(p) for p in root.glob("*/*.yaml") if not p.name.startswith("_"))


def _sets(values: Any, key: str) -> bool:
    if isinstance(values, dict) and key in values:
        return True
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True
