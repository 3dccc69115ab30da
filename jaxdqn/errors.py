"""Errors that are the user's to fix: one line that names the value, what is allowed, and what to do."""

import difflib
from collections.abc import Iterable

LONGEST = 300  # letters of a value that a message quotes


class UserError(ValueError):
    """A mistake in what was asked for. Scripts print it as one line, without a traceback, and exit with 2."""


def unknown_name(kind: str, name: object, known: Iterable[str], hint: str = "") -> UserError:
    """An error for `name`, which is no `kind`; it suggests the nearest known name."""
    known = list(known)
    folded = {option.lower(): option for option in known}
    close = difflib.get_close_matches(shown(name).strip("'").lower(), list(folded), n=1, cutoff=0.5)
    suggestion = f"did you mean {folded[close[0]]!r}?" if close else f"known: {shortened(', '.join(sorted(known)))}."
    return UserError(f"unknown {kind} {shown(name)}: {suggestion}{' ' + hint if hint else ''}")


def shortened(text: str) -> str:
    """`text`, or its two ends where it is too long to be read in one line."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST * 2 // 3]} ... {text[-LONGEST // 3 :]}"


def shown(value: object) -> str:
    """A value of anybody's as part of one line."""
    try:
        return shortened(" ".join(repr(value).split()))
    except ValueError:  # an integer of more digits than Python prints
        return f"a {type(value).__name__} that is too long to print"
