"""The run folders and keys among a command's arguments."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from diffbench.config.layers import COMMAND_LINE, located, parse_overrides
from diffbench.config.load import build
from diffbench.core.errors import UserError

T = TypeVar("T")


def split_arguments(words: Sequence[str], keys: type[T], verb: str) -> tuple[list[Path], T]:
    """Split a command's arguments into run folders and keys; return the keys as a dataclass.

    Raises:
        UserError: if there is no folder, or a key is wrong.
    """
    overrides = [word for word in words if re.match(r"[A-Za-z_]\w*=", word)]
    folders = [Path(word) for word in words if word not in overrides]
    if not folders:
        raise UserError(f"{COMMAND_LINE}: name run folders, e.g. runs/digits/dit-s0; see diffbench {verb} --help")
    return folders, build_keys(keys, parse_overrides(overrides))


def build_keys(keys: type[T], values: dict[str, Any]) -> T:
    """Build the dataclass of a command's keys; UserError names a key that is wrong."""
    with located([(COMMAND_LINE, values)]):
        return build(keys, values)
