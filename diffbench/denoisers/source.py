"""Python modules by name, from a folder or installed; those from a folder are hashed, and copied to be found again."""

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
"""Beside a config: the folder with copies of modules, each under its hash."""


@dataclass(frozen=True, eq=False)
class Source:
    """An imported module.

    Attributes:
        module: it.
        digest: hash of its files; None for an installed module.
        folder: where it lies.
        files: path in the folder -> content, of its own file and those that it imports from the folder.
    """

    module: ModuleType
    digest: str | None = None
    folder: Path = Path()
    files: Mapping[Path, bytes] = field(default_factory=dict)

    def keep(self, folder: Path) -> None:
        """Copies the files below a folder, from where `load` finds them by their hash."""
        for file, content in self.files.items():
            target = folder / KEPT / str(self.digest) / file
            if not target.exists() or target.read_bytes() != content:
                target.parent.mkdir(parents=True, exist_ok=True)
                staged = target.with_name(f".{target.name}.staged")
                staged.write_bytes(content)
                os.replace(staged, target)


_loaded: dict[tuple[str, str | None], Source] = {}
"""Modules by name and hash; None for installed ones."""


def load(name: str, digest: str | None, folders: Sequence[Path]) -> Source:
    """Imports a module from the first folder that holds it, or else as it is installed.

    Args:
        name: dotted.
        digest: hash of the files that are wanted; None takes whatever is found.
        folders: each is searched, and the copies that `Source.keep` left in it.

    Raises:
        ValueError: if there is no such module, none with that hash, or its import fails.
    """
    if digest is not None and (name, digest) in _loaded:
        return _loaded[name, digest]
    for place in folders:
        if place.resolve() == Path(__file__).resolve().parents[1]:  # its rooms are not modules of their own
            continue
        for folder in (place, *([place / KEPT / digest] if digest else [])):
            files = _needed(folder, name)
            if files and (found := _digest(files)) and digest in (None, found):
                if (name, found) not in _loaded:
                    _loaded[name, found] = Source(_import(name, folder, files), found, folder.absolute(), files)
                return _loaded[name, found]
    if digest is not None:
        raise ValueError(f"no module {name} whose hash is {digest}; looked in {', '.join(map(str, folders))}")
    if (name, None) not in _loaded:
        _loaded[name, None] = Source(_imported(name))
    return _loaded[name, None]


def _needed(folder: Path, name: str) -> dict[Path, bytes]:
    """The files below a folder that importing a module runs or may run later; none if the module is not there."""
    if name.split(".")[0] == "diffbench" or not any((folder / file).is_file() for file in _own(name)):
        return {}
    found: dict[Path, bytes] = {}
    waiting = [name]
    while waiting:
        for file in (file for around in _prefixes(waiting.pop()) for file in _own(around)):
            if file not in found and (folder / file).is_file():
                found[file] = (folder / file).read_bytes()
                waiting += _imports(file, found[file])
    return dict(sorted(found.items()))


def _own(name: str) -> tuple[Path, Path]:
    base = Path(*name.split("."))
    return base / "__init__.py", base.with_suffix(".py")


def _prefixes(name: str) -> list[str]:
    """a.b.c to a, a.b, a.b.c."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _imports(file: Path, content: bytes) -> Iterator[str]:
    """Dotted names that a file imports, at its top or later; each name of `from a import b` may be a module too."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):  # which the import will report
        return
    package = list(file.parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            around = package[: len(package) - node.level + 1] if node.level else []
            base = [*around, *(node.module.split(".") if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def _digest(files: Mapping[Path, bytes]) -> str:
    digest = hashlib.sha256()
    for file, content in files.items():
        digest.update(f"{file.as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def _import(name: str, folder: Path, files: Iterable[Path]) -> ModuleType:
    """Imports a module from a folder, under its own name though another folder's may have the same.

    Raises:
        ValueError: saying why it cannot be.
    """
    modules = [".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files]
    ours = {around for module in modules for around in _prefixes(module)}
    hidden = {n: sys.modules.pop(n) for n in list(sys.modules) if n in ours}
    wrote, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # a run folder holds sources
    sys.path.insert(0, str(folder.absolute()))
    try:
        importlib.invalidate_caches()
        return _imported(name)
    finally:
        sys.path.remove(str(folder.absolute()))
        if str(folder.absolute()) not in sys.path:
            sys.path.append(str(folder.absolute()))  # for what it imports as it is built or runs
        sys.dont_write_bytecode = wrote
        sys.modules.update({n: module for n, module in hidden.items() if not _is_loaded(module)})


def _is_loaded(module: ModuleType) -> bool:
    """Whether a module lies in a folder from which another one was loaded."""
    file = Path(getattr(module, "__file__", None) or "/")
    return any(source.files and file.is_relative_to(source.folder) for source in _loaded.values())


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as e:
        why = f"{type(e).__name__}: {' '.join(str(e).split())}"
        raise ValueError(f"{name} cannot be imported ({why})") from None
