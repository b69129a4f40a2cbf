"""Import of Python modules by name, from a folder or installed; those from a folder are hashed and can be copied."""

import ast
import hashlib
import importlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

KEPT = "code"
"""Folder next to a config that contains copies of modules, each under its hash."""


@dataclass(frozen=True, eq=False)
class Source:
    """An imported module.

    Attributes:
        module: the module object.
        digest: hash of its files; None for an installed module.
        folder: folder that it was imported from.
        files: path in the folder -> content, for its own file and those that it imports from the folder.
    """

    module: ModuleType
    digest: str | None = None
    folder: Path = Path()
    files: Mapping[Path, bytes] = field(default_factory=dict)

    def keep(self, folder: Path) -> None:
        """Copy the files into a folder, in which `load` then finds them by their hash."""
        for file, content in self.files.items():
            target = folder / KEPT / str(self.digest) / file
            if not target.exists() or target.read_bytes() != content:
                target.parent.mkdir(parents=True, exist_ok=True)
                staged = target.with_name(f".{target.name}.staged")
                staged.write_bytes(content)
                os.replace(staged, target)


_loaded: dict[tuple[str, str | None], Source] = {}
"""Loaded modules by name and hash; the hash is None for installed ones."""


def load(name: str, digest: str | None, folders: Sequence[Path]) -> Source:
    """Import a module from the first folder that contains it, or else as installed.

    Args:
        name: dotted name.
        digest: required hash of its files; None accepts any.
        folders: folders to search, each including the copies made by `Source.keep`.

    Raises:
        ValueError: if there is no such module, none with that hash, or its import fails.
    """
    if digest is not None and (name, digest) in _loaded:
        return _loaded[name, digest]
    for place in folders:
        if place.resolve() == Path(__file__).resolve().parents[1]:  # the package's own parts are not top-level modules
            continue
        for folder in (place, *([place / KEPT / digest] if digest else [])):
            files = _needed(folder, name)
            if files and (actual := _digest(files)) and digest in (None, actual):
                if (name, actual) not in _loaded:
                    _loaded[name, actual] = Source(_import(name, folder, files), actual, folder.absolute(), files)
                return _loaded[name, actual]
    if digest is not None:
        raise ValueError(f"no module {name} with the hash {digest}; looked in {', '.join(map(str, folders))}")
    if (name, None) not in _loaded:
        _loaded[name, None] = Source(_import_by_name(name))
    return _loaded[name, None]


def _needed(folder: Path, name: str) -> dict[Path, bytes]:
    """Return the files in a folder that a module consists of or imports, now or later; none if it is not there."""
    if name.split(".")[0] == "diffbench" or not any((folder / file).is_file() for file in _possible_files(name)):
        return {}
    found: dict[Path, bytes] = {}
    pending = [name]
    while pending:
        for file in (file for prefix in _prefixes(pending.pop()) for file in _possible_files(prefix)):
            if file not in found and (folder / file).is_file():
                found[file] = (folder / file).read_bytes()
                pending += _imports(file, found[file])
    return dict(sorted(found.items()))


def _possible_files(name: str) -> tuple[Path, Path]:
    base = Path(*name.split("."))
    return base / "__init__.py", base.with_suffix(".py")


def _prefixes(name: str) -> list[str]:
    """Return a, a.b and a.b.c for a.b.c."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _imports(file: Path, content: bytes) -> Iterator[str]:
    """Yield the dotted names that a file imports anywhere; each name of `from a import b` may be a module too."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):  # importing the module will report it
        return
    package = list(file.parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = [*parents, *(node.module.split(".") if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def _digest(files: Mapping[Path, bytes]) -> str:
    digest = hashlib.sha256()
    for file, content in files.items():
        digest.update(f"{file.as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def _import(name: str, folder: Path, files: Iterable[Path]) -> ModuleType:
    """Import a module from a folder under its own name, even if a module of that name was loaded from elsewhere.

    Raises:
        ValueError: if it cannot be imported, with the reason.
    """
    modules = [".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files]
    names = {prefix for module in modules for prefix in _prefixes(module)}
    hidden = {n: sys.modules.pop(n) for n in list(sys.modules) if n in names}
    wrote, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # a run folder should contain sources only
    sys.path.insert(0, str(folder.absolute()))
    try:
        importlib.invalidate_caches()
        return _import_by_name(name)
    finally:
        sys.path.remove(str(folder.absolute()))
        if str(folder.absolute()) not in sys.path:
            sys.path.append(str(folder.absolute()))  # for what it imports only when it is built or run
        sys.dont_write_bytecode = wrote
        sys.modules.update({n: module for n, module in hidden.items() if not _is_loaded(module)})


def _is_loaded(module: ModuleType) -> bool:
    """Return whether a module is in a folder from which `load` imported one."""
    file = Path(getattr(module, "__file__", None) or "/")
    return any(source.files and file.is_relative_to(source.folder) for source in _loaded.values())


def _import_by_name(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as e:
        why = f"{type(e).__name__}: {' '.join(str(e).split())}"
        raise ValueError(f"{name} cannot be imported ({why})") from None
