"""The one exception for input that a user can mend."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong input. The message is one line: what was found, where, what is expected, what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the known name nearest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
