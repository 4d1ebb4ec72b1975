"""One form for error messages: what came, what was expected, what to do."""

import difflib
import math
from collections.abc import Iterable


def unknown_name(kind: str, name: object, known: Iterable[str]) -> ValueError:
    """Build the error for a name that is not in a table, with the closest known name."""
    names = list(known)
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ValueError(f"unknown {kind} {name!r}; choose from {', '.join(names)}.{hint}")


def check_positive_int(name: str, value: object, advice: str = "") -> None:
    """Raise ValueError unless `value` is an int of at least 1 (a bool is not)."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}. {advice}".rstrip())


def check_nonnegative(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a finite number of at least 0."""
    if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and at least 0, got {value!r}.")


class InputError(ValueError):
    """Bad input from outside: one line that says what came, where, and what to do (exit code 2)."""
