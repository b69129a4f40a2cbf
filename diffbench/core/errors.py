"""The one error type for what a user can mend."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """One line that names the key or file, says what is allowed, and suggests the nearest; exit code 2."""


def suggest(word: str, choices: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for the choice nearest to `word`, or nothing where none is near."""
    known = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(word.lower(), known, n=1)
    return f"; did you mean {known[near[0]]!r}?" if near else ""


class LostError(UserError):
    """Another process of this job has ended, or answers no more; it knows why."""
