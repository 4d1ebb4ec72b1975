"""Windows of a time series, and the way back from windows to timestamps.

No window crosses from one segment of a series into another (`jaxcae.data.segments`). The way back
costs O(length), and a timestamp that no window covers has the value NaN.
"""

from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int, Num

from jaxcae.data.segments import as_series
from jaxcae.errors import InputError, check_positive_int, unknown_name

Placement = Literal["mean", "max", "last"]
PLACEMENTS = ("mean", "max", "last")
"""How the values of windows become that of a timestamp; `last` sees no later row."""


def window_starts(
    length: int, size: int, stride: int = 1, segments: Any = None
) -> Int[np.ndarray, " windows"]:
    """Return the first row of each window, in the order of `windows`; those are its arguments.

    Raises:
        InputError: If no window fits.
    """
    check_positive_int("size", size)
    check_positive_int("stride", stride)
    ranges = np.array([[0, length]]) if segments is None else _checked(segments, length)
    starts = [np.arange(start, stop - size + 1, stride) for start, stop in ranges]
    found = np.concatenate(starts) if starts else np.zeros(0, int)
    if not len(found):
        if len(ranges) < 2:
            longest = int(np.ptp(ranges[0])) if len(ranges) else 0
            problem = f"a window of {size} rows is longer than the series, which has {longest}"
        else:
            longest = int(np.max(ranges[:, 1] - ranges[:, 0]))
            problem = (
                f"a window of {size} rows fits between no two gaps: the longest stretch without "
                f"one has {longest}"
            )
        raise InputError(f"{problem}. Use a shorter window, or a longer series.")
    return found


def windows(
    x: Any, size: int, stride: int = 1, *, segments: Any = None
) -> Num[np.ndarray, "windows size ..."]:
    """Cut a series into windows, none of which crosses a gap.

    Args:
        x: The series, shape (length,) or (length, channels).
        size: Rows of a window.
        stride: Rows from the start of one window to that of the next in the same segment.
        segments: Half-open ranges of rows that windows stay in, as `segments` of
            `jaxcae.data.windows` finds them from missing rows and times; None for one.

    Returns:
        Shape (windows, size) or (windows, size, channels); with one segment a read-only view,
        which takes no memory, with several a copy.

    Raises:
        InputError: If no window fits.

    Example:
        >>> windows(np.arange(5.0), 3, 2).tolist()
        [[0.0, 1.0, 2.0], [2.0, 3.0, 4.0]]
    """
    values = as_series(x)
    starts = window_starts(len(values), size, stride, segments)
    view = np.moveaxis(np.lib.stride_tricks.sliding_window_view(values, size, axis=0), -1, 1)
    if len(starts) == 1 or np.all(np.diff(starts) == stride):
        return view[starts[0] : starts[-1] + 1 : stride]
    return view[starts]


def to_timestamps(
    values: Any,
    size: int,
    length: int,
    stride: int = 1,
    how: Placement = "mean",
    *,
    segments: Any = None,
) -> Float[np.ndarray, " length"]:
    """Bring one value a window to one value a timestamp, in O(length).

    Args:
        values: One a window, in the order of `windows`. A window whose value is NaN covers nothing.
        size: Rows of a window.
        length: Rows of the series.
        stride: That of the windows.
        how: `"mean"` or `"max"` over the windows that cover a timestamp, or `"last"`: the value of
            the window that ends there, which needs no later row and misses most of what the
            others find (by VUS-PR half of it and more, on the series that were measured).
        segments: Those of the windows.

    Returns:
        One value a row of the series; NaN where no window covers it.

    Raises:
        InputError: If there is not one value a window.
    """
    if how not in PLACEMENTS:
        raise unknown_name("placement", how, PLACEMENTS)
    starts = window_starts(length, size, stride, segments)
    given = _one_a_window(values, starts)
    known = ~np.isnan(given)
    starts, given = starts[known], given[known]
    if how == "last":
        out = np.full(length, np.nan)
        out[starts + size - 1] = given
        return out
    # Windows by the row they start at; a timestamp is covered by those of the last `size` rows.
    placed = np.full(length + size - 1, 0.0 if how == "mean" else -np.inf)
    placed[starts + size - 1] = given
    there = np.zeros(length + size - 1)
    there[starts + size - 1] = 1
    count = sliding(there, size, np.add)
    reduced = sliding(placed, size, np.add if how == "mean" else np.maximum)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(count > 0, reduced / count if how == "mean" else reduced, np.nan)


def point_errors(
    squared_residuals: Any, size: int, length: int, stride: int = 1, *, segments: Any = None
) -> Float[np.ndarray, "length ..."]:
    """Average squared residuals at each timestamp over the windows that cover it.

    Args:
        squared_residuals: (x − x̂)² of each window, shape (windows, size) or (windows, size,
            channels), in the order of `windows`.
        size: Rows of a window.
        length: Rows of the series.
        stride: That of the windows.
        segments: Those of the windows.

    Returns:
        Shape (length,) or (length, channels); NaN where no window covers a timestamp. O(length)
        memory.

    Raises:
        InputError: If there are not `size` residuals for each window.
    """
    starts = window_starts(length, size, stride, segments)
    residuals = _one_a_window(squared_residuals, starts)
    if residuals.ndim < 2 or residuals.shape[1] != size:
        raise InputError(f"expected {size} residuals a window, got shape {residuals.shape}.")
    means = PointMeans(size, length, residuals.shape[2:])
    means.add(starts, residuals)
    return means.values


class PointMeans:
    """Means at each timestamp over the windows that cover it, of windows that come in parts."""

    def __init__(self, size: int, length: int, channels: tuple[int, ...] = ()) -> None:
        self._size = size
        self._totals = np.zeros((length, *channels))
        self._counts = np.zeros(length)

    def add(self, starts: Int[np.ndarray, " windows"], values: Any) -> None:
        """Take in windows that begin at these different rows, shape (windows, size, *channels)."""
        for lag in range(self._size):
            self._totals[starts + lag] += values[:, lag]
            self._counts[starts + lag] += 1

    @property
    def values(self) -> Float[np.ndarray, "length ..."]:
        """The means so far, NaN where nothing covers a timestamp."""
        counts = self._counts.reshape(-1, *[1] * (self._totals.ndim - 1))
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._totals / counts


def sliding(values: Float[np.ndarray, " n"], width: int, reduce: np.ufunc) -> Any:
    """Reduce every `width` neighbours by a ufunc with an identity, or by the maximum, in O(n).

    Each window of neighbours is the end of one block of `width` and the beginning of the next, so
    that nothing is subtracted: one huge value costs the others no digits.

    References:
        Van Herk, "A fast algorithm for local minimum and maximum filters", 1992,
        doi:10.1016/0167-8655(92)90069-C.
    """
    identity = -np.inf if reduce is np.maximum else float(reduce.identity)
    blocks = -(-len(values) // width) + 1
    padded = np.full(blocks * width, identity)
    padded[: len(values)] = values
    table = padded.reshape(blocks, width)
    ends = reduce.accumulate(table[:, ::-1], axis=1)[:, ::-1].reshape(-1)
    before = np.full((blocks, width), identity)  # of a block, what lies before each place
    before[:, 1:] = reduce.accumulate(table[:, :-1], axis=1)
    count = len(values) - width + 1
    return reduce(ends[:count], before.reshape(-1)[width : width + count])


def _checked(ranges: Any, length: int) -> Int[np.ndarray, "segments 2"]:
    found = np.asarray(ranges)
    sound = found.ndim == 2 and found.shape[1] == 2 and found.dtype.kind in "iu"
    flat = found.ravel()
    if not sound or np.any(np.diff(flat) < 0) or np.any((flat < 0) | (flat > length)):
        raise InputError(
            f"segments must be half-open ranges of rows, in order, none beyond row {length}; "
            f"got {found.tolist()!r:.80}."
        )
    return found


def _one_a_window(values: Any, starts: np.ndarray) -> Float[np.ndarray, "windows ..."]:
    given = np.asarray(values, np.float64)
    if given.ndim < 1 or len(given) != len(starts):
        raise InputError(
            f"expected a value for each of {len(starts)} windows, got shape {given.shape}. "
            "Pass the size, length, stride and segments that the windows were made with."
        )
    return given
