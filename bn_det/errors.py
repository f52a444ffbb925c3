"""The error that a command shows as one line, without a traceback."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from numbers import Integral

_LONGEST = 300
"""Characters of a reason that is not ours."""


class InputError(ValueError):
    """What a user gave cannot be used. It names the key, the value and what is accepted."""


def choose(key: str, value: object, accepted: Iterable[object]) -> None:
    """Raise InputError unless value is one of the accepted ones."""
    accepted = list(accepted)
    if value not in accepted:
        raise InputError(f"{key}: {value!r} is not accepted; use one of {accepted}")


def of_other_type(key: str, value: object, accepted: str) -> InputError:
    """The error for an argument of another type than is accepted, which is in words."""
    return InputError(f"{key}: what is given is of type {type(value).__name__}; use {accepted}")


def first_of(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are, for a message in a line."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def check_positive(key: str, number: int) -> None:
    """Raise InputError unless a number of things is an integer, and 1 or more."""
    is_integer = isinstance(number, Integral) and not isinstance(number, bool)
    if not is_integer or number < 1:
        accepted = "1 or more" if is_integer else "an integer, 1 or more"
        raise InputError(f"{key}: {number!r} is not accepted; use {accepted}")


def check_rate(key: str, rate: float) -> None:
    """Raise InputError unless a rate of dropout is one."""
    if not 0 <= rate < 1:
        raise InputError(f"{key}: {rate!r} is not accepted; use 0.0 or more, and less than 1.0")


def nearest(name: str, known: Iterable[str]) -> str:
    """Names that a misspelt one may have meant, for the end of an error message."""
    known = sorted(known)
    close = get_close_matches(name, known, n=3)
    return f"nearest names: {close}" if close else f"known names: {known}"


def is_text(text: str) -> bool:
    """Whether a file in UTF-8 can hold it: not half of a character, nor a byte of another code."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(text: str) -> str:
    """A text of a user in a message: as it is, or with escapes if it would break the line."""
    return text if text.isprintable() else repr(text)


def escaped(text: str) -> str:
    """A text with escapes in place of what would break a line, or change the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def number(value: float, digits: str) -> str:
    """A number of a table, in a format such as ".4f"; NaN by that name."""
    return "NaN" if value != value else format(value, digits)


def one_line(error: Exception) -> str:
    """The message alone, without the report that a data loader's process puts around it.

    In one line that leaves the terminal as it is, whatever a file of the user's has put into it.
    """
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{path_of(error)}: {error.strerror}"
    if "Original Traceback (most recent call last):" in text:
        text = text.rpartition(f"{type(error).__name__}: ")[2]
    return escaped(" ".join(text.split()))


def path_of(error: OSError) -> str:
    """The file that the system refused, as text; who opened it may have named it by bytes."""
    return os.fsdecode(error.filename) if isinstance(error.filename, bytes) else str(error.filename)


def reason_of(error: BaseException) -> str:
    """What somebody else's code raised: the first line that says something, or else its type."""
    lines: Iterator[str]
    try:
        lines = map(str.strip, str(error).splitlines())
    except Exception:  # of its own code
        lines = iter(())
    reason = next(filter(None, lines), type(error).__name__)
    return reason if len(reason) <= _LONGEST else f"{reason[: _LONGEST - 4]} ..."


LOAD_ERRORS = (
    pickle.UnpicklingError,
    AssertionError,
    AttributeError,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What loaders raise for a file that is missing, cannot be had, or is no checkpoint."""
