"""Segments of a time series: the stretches without a missing value and without a gap in time.

A series is rows in time, shape (length,) or (length, channels).
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num

from jaxcae.data.times import parse_times
from jaxcae.errors import InputError, is_finite


def segments(x: Any, times: Any = None, *, gap: float = 1.5) -> Int[np.ndarray, "segments 2"]:
    """Find the stretches of a series that windows may lie in.

    Args:
        x: The series, shape (length,) or (length, channels). A row with a NaN belongs to none.
        times: A time for each row, increasing: `datetime64`, ISO 8601, or numbers in any unit.
        gap: What counts as a gap: a step longer than this many median steps.

    Returns:
        Half-open ranges of rows, shape (segments, 2), in order.

    Raises:
        InputError: If a value is infinite, every row has a missing value, or the times do not
            increase, or are not one a row.
    """
    if not (is_finite(gap) and gap >= 1):
        raise ValueError(f"gap counts median steps, at least 1, got {gap!r}.")
    values = as_series(x)
    if np.isinf(values).any():
        row = int(np.argwhere(np.isinf(values))[0, 0])
        raise InputError(f"row {row} (from 0) of the series is infinite. Make it NaN, or mend it.")
    known = ~np.isnan(values).reshape(len(values), -1).any(1)
    if not known.any():
        raise InputError(
            f"each of the {len(values)} rows of the series has a missing value: nothing is left. "
            "Fill in or leave out the channel that is missing."
        )
    follows: Any = True
    steps = None if times is None else time_steps(times, len(values))
    if steps is not None and len(steps):
        follows = steps <= gap * np.median(steps)
    return runs(known, follows)


def runs(mask: Any, follows: Any = True) -> Int[np.ndarray, "runs 2"]:
    """Find the runs of truth in a mask as half-open ranges of rows.

    Args:
        mask: One truth value a row.
        follows: Whether each row but the first goes on with the run of the row above it, if both
            are true.

    Example:
        >>> runs([True, True, False, True]).tolist()
        [[0, 2], [3, 4]]
    """
    there = np.asarray(mask, bool)
    joined = there[1:] & there[:-1] & follows
    starts = there & ~np.append(False, joined)
    stops = there & ~np.append(joined, False)
    return np.stack([np.flatnonzero(starts), np.flatnonzero(stops) + 1], axis=1)


def time_steps(times: Any, length: int) -> Float[np.ndarray, " steps"]:
    """Return the steps between times, in their unit; of `datetime64` and of texts in seconds.

    Raises:
        InputError: If there is not one time a row, one is missing, or they do not increase.
    """
    given = np.asarray(times)
    if given.dtype.kind in "OUT" and given.ndim == 1:  # text, or Python's and pandas' own times
        given = parse_times("times", [str(time) for time in given]).values
    if given.dtype.kind not in "iufM":
        raise InputError(f"times must be numbers, datetime64 or ISO 8601, got dtype {given.dtype}.")
    if given.shape != (length,):
        raise InputError(f"expected one time for each of {length} rows, got shape {given.shape}.")
    missing = np.isnat(given) if given.dtype.kind == "M" else ~np.isfinite(given)
    if missing.any():
        row = int(np.flatnonzero(missing)[0])
        raise InputError(f"the time of row {row} (from 0) is missing. Leave that row out.")
    if given.dtype.kind == "M":
        steps = np.diff(given) / np.timedelta64(1, "s")
    else:
        # Unsigned numbers would wrap around; what float64 rounds is no step back.
        steps = np.diff(given.astype(np.float64))
        steps = np.where(given[1:] > given[:-1], np.maximum(steps, np.finfo(float).tiny), steps)
    wrong = np.flatnonzero(~(given[1:] > given[:-1]))
    if len(wrong):
        row = int(wrong[0]) + 1
        what = "comes twice" if given[row] == given[row - 1] else "is before the row above it"
        raise InputError(
            f"the time of row {row} (from 0), {given[row]}, {what}. Sort the rows by time, and "
            "keep one a time."
        )
    return steps


def as_series(x: Any) -> Num[np.ndarray, "length ..."]:
    """Return a series as an array of rank 1 or 2.

    Raises:
        InputError: If it is of another rank, has no rows, or holds anything but real numbers.
    """
    values = np.asarray(x)
    if values.ndim not in (1, 2):
        raise InputError(
            f"a series has the shape (length,) or (length, channels), got {values.shape}."
        )
    if values.dtype.kind not in "biuf":
        raise InputError(f"a series holds real numbers, got dtype {values.dtype}.")
    if values.size == 0:
        raise InputError(f"a series needs rows and channels, got shape {values.shape}.")
    return values
