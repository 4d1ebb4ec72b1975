"""One form for error messages: what came, what was expected, what to do."""

import difflib
import math
import numbers
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeGuard


def unknown_name(kind: str, name: object, known: Iterable[str]) -> ValueError:
    """Build the error for a name that is not in a table, with the closest known name."""
    names = list(known)
    bare = {known.casefold(): known for known in names}  # Relu is nearer to relu than to elu
    close = difflib.get_close_matches(str(name).casefold(), bare, n=1)
    hint = f" Did you mean {bare[close[0]]!r}?" if close else ""
    return ValueError(f"unknown {kind} {name!r}; choose from {', '.join(names)}.{hint}")


def check_positive_int(name: str, value: object, advice: str = "") -> None:
    """Raise ValueError unless `value` is an integer of at least 1, NumPy's too (a bool is not)."""
    number: Any = value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or number < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}. {advice}".rstrip())


def check_nonnegative(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a finite number of at least 0, NumPy's too."""
    if not (is_finite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and at least 0, got {value!r}.")


def check_positive(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a finite number above 0, NumPy's too."""
    if not (is_finite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}.")


def is_finite(value: object) -> TypeGuard[float]:
    """Tell whether a value is a finite real number: Python's or NumPy's, no bool."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    return math.isfinite(value)


class FileError(Exception):
    """An error in one line that may quote a file: what in it is not printable is escaped."""

    def __init__(self, message: object):
        super().__init__(printable(message))


class InputError(FileError, ValueError):
    """Bad input from outside: one line that says what came, where, and what to do (exit code 2)."""


class RunError(InputError):
    """A run directory that cannot be used as asked; says what to do instead."""


class UnfinishedRunError(RunError):
    """A run that has not come to its end, where a finished one is needed."""


class CheckpointError(FileError, RuntimeError):
    """A checkpoint that cannot be written, or cannot be trusted."""


def printable(text: object) -> str:
    r"""Escape what is not printable in a text from a file: an escape code becomes `\x1b`.

    Terminals obey control characters, and characters that reverse the direction of writing show
    another text than is there. Every message and table that quotes a file goes through here.

    Example:
        >>> print(printable("a\x1b[31m\n"))
        a\x1b[31m\n
    """
    return "".join(
        c if c.isprintable() or c == "\u00a0" else c.encode("unicode_escape").decode()
        for c in str(text)
    )


def install_hint(extra: str) -> str:
    """Return the command that installs an extra, for a checkout or for an installed wheel."""
    checkout = Path(__file__).parents[1]
    if (checkout / "pyproject.toml").exists():
        return f"pip install -e '{checkout}[{extra}]'"
    return f"pip install 'jaxcae[{extra}]'"
