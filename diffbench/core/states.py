"""States that torch saved, read as plain values: nothing in a file is ever run."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from diffbench.core.errors import UserError


def read_state(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """A dictionary that training wrote with torch.save.

    Raises:
        UserError: naming the file, if it is damaged, or holds code or something else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on pickles that it then refuses
            state: Any = torch.load(path, map_location=map_location, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError):
        raise UserError(f"{path}: damaged, or holds pickled code, which is never run; remove it") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, no state of training; remove it")
    return state
