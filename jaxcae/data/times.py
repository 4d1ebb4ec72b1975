"""The times of the rows of a series: read, held to their order, and put into words.

Times are ISO 8601 or numbers (seconds since 1970, or whatever counts). They must ascend: two rows
of one time, or a time that goes back, are a fault of the file that nobody can mend by guessing.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from jaxcae.data.values import Source
from jaxcae.errors import InputError, printable
from jaxcae.words import short

MAX_GAP = 1.5
"""Steps that are longer than so many medians are gaps."""
_JITTER, _FEW = 0.1, 0.01
"""Where more than few steps are off the median by more than jitter, a sampling is irregular."""
_ISO = re.compile(
    r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d(?::\d\d(?:[.,]\d{1,9})?)?))?"
    r"\s*(Z|UTC|[+-]\d\d(?::?\d\d)?)?"
)
_UNITS = (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))

RowPlace = Callable[[int], str]
"""`place(row)` says where a row is, in the words of the file's kind."""


def row_place(row: int) -> str:
    """Count rows from 0, as NumPy does."""
    return f"row {row} (from 0)"


class Times(NamedTuple):
    """The times of all rows.

    Attributes:
        values: datetime64, in UTC where the texts name a zone; else float64 or int64.
        texts: As they stand in the source, where it is text.
        place: Where a row is, in the words of the source.
    """

    values: Shaped[np.ndarray, " rows"]
    texts: tuple[str, ...] | None = None
    place: RowPlace = row_place

    def text(self, row: int) -> str:
        """Write the time of a row, as the source does if it is text."""
        if self.texts is not None:
            return self.texts[row]
        value = self.values[row]
        if self.values.dtype.kind == "M":
            text = np.datetime_as_string(value)
            return text.rstrip("0").rstrip(".") if "." in text else text
        return repr(value.item())

    def take(self, rows: Any) -> "Times":
        """Return the times of these rows: a slice, numbers or a mask."""
        if self.texts is None:
            return Times(self.values[rows])  # rows are counted anew
        kept = np.arange(len(self.texts))[rows]
        return Times(self.values[rows], tuple(self.texts[i] for i in kept))


def line_place(header: int) -> RowPlace:
    """Count lines from 1, as editors do, after so many lines of a header."""
    return lambda row: f"line {header + 1 + row}"


def parse_times(source: Source, cells: Sequence[str], place: RowPlace = row_place) -> Times:
    """Read the cells of a time column: all of them ISO 8601, or all of them numbers.

    Args:
        source: What to name in front of an error.
        cells: The texts.
        place: Where a row is.

    Returns:
        The times; see `Times`. ISO 8601 with an offset is brought to UTC.

    Raises:
        InputError: With the first cell that is no time, or not of the kind of the others.
    """
    texts = tuple(cell.strip() for cell in cells)
    return Times(_values(source, texts, place), texts, place)


def _values(source: Source, texts: Sequence[str], place: RowPlace) -> np.ndarray:
    try:
        numbers = np.array([float(text) for text in texts])
        plain = all("_" not in text and text.isascii() for text in texts)
    except ValueError:
        return _iso(source, texts, place)
    bad = np.flatnonzero(~np.isfinite(numbers))
    if len(bad) or not plain:
        row = int(bad[0]) if len(bad) else next(i for i, t in enumerate(texts) if "_" in t)
        raise InputError(f"{source}: {place(row)}: the time is {texts[row]!r:.40}. {_EXPECTED}")
    whole = all(text.lstrip("+-").isdecimal() for text in texts)
    if whole and (np.abs(numbers) < 2**62).all():
        return np.array([int(text) for text in texts])
    return numbers


_EXPECTED = (
    "Expected ISO 8601, such as 2024-05-01T12:00:00, or a number, such as seconds since 1970."
)


def _iso(source: Source, texts: Sequence[str], place: RowPlace) -> np.ndarray:
    matches = [_ISO.fullmatch(text) for text in texts]
    for row, match in enumerate(matches):
        if match is None:
            what = "is empty" if not texts[row] else f"is {printable(texts[row])!r:.40}"
            raise InputError(f"{source}: {place(row)}: the time {what}. {_EXPECTED}")
    known = [match for match in matches if match is not None]
    zoned = [match[3] is not None for match in known]
    if any(zoned) and not all(zoned):
        row = zoned.index(not zoned[0])
        raise InputError(
            f"{source}: {place(row)}: the time {texts[row]!r} has "
            f"{'an' if zoned[row] else 'no'} offset, those before have "
            f"{'none' if zoned[row] else 'one'}. Write all of them in one way."
        )
    unit = "ns" if any(len(match[2] or "") > 15 for match in known) else "us"
    bare = [f"{m[1]}T{(m[2] or '00:00').replace(',', '.')}" for m in known]
    try:
        values = np.array(bare, f"datetime64[{unit}]")
    except ValueError:
        for row, text in enumerate(bare):
            try:
                np.array(text, f"datetime64[{unit}]")
            except ValueError:
                raise InputError(
                    f"{source}: {place(row)}: there is no time {texts[row]!r:.40}."
                ) from None
        raise
    if unit == "ns":
        years = np.array([int(m[1][:4]) for m in known])
        if (years < 1678).any() or (years > 2261).any():
            raise InputError(f"{source}: nanoseconds reach from 1678 to 2261, the times beyond.")
    offsets = {match[3] for match in known} - {None, "Z", "UTC"}
    if offsets:
        minutes = {None: 0, "Z": 0, "UTC": 0} | {text: _minutes(text) for text in offsets}
        values = values - np.array([minutes[m[3]] for m in known], "timedelta64[m]")
    return values


def _minutes(offset: str) -> int:
    digits = offset[1:].replace(":", "").ljust(4, "0")
    return (-1 if offset[0] == "-" else 1) * (60 * int(digits[:2]) + int(digits[2:]))


def check_ascending(source: Source, times: Times) -> None:
    """See that every time comes after the one before.

    Raises:
        InputError: With the first that does not.
    """
    values, place = times.values, times.place
    bad = np.flatnonzero(~(values[1:] > values[:-1]))
    if not len(bad):
        return
    row = int(bad[0]) + 1
    if np.issubdtype(values.dtype, np.datetime64) and np.isnat(values[row]):
        raise InputError(f"{source}: {place(row)}: the time is missing. {_EXPECTED}")
    now, before = printable(times.text(row))[:40], printable(times.text(row - 1))[:40]
    others = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
    if values[row] == values[row - 1]:
        raise InputError(
            f"{source}: {place(row)}: the time {now} comes twice{others}. Keep one row for each "
            "time; for several series in one file, score one at a time."
        )
    raise InputError(
        f"{source}: {place(row)}: the time goes back from {before} to {now}{others}. Sort the "
        "rows; local times that jump when clocks change need their offset, or UTC."
    )


def sampling(times: Times, max_gap: float = MAX_GAP) -> str:
    """Say how a series is sampled: its step, how irregular it is, and where it has gaps.

    Args:
        times: Ascending.
        max_gap: How many medians of the steps a step may be long; what is longer is a gap, which
            no window crosses.
    """
    values = times.values
    dated = values.dtype.kind == "M"
    if len(values) < 2:
        return "one row"
    steps = np.diff(values) / np.timedelta64(1, "s") if dated else np.diff(values).astype(float)
    median = float(np.median(steps))
    gaps = np.flatnonzero(steps > max_gap * median)
    within = np.delete(steps, gaps)
    words = f"a row every {_duration(median, dated)}"
    if (np.abs(within - median) > _JITTER * median).mean() > _FEW:
        low, high = _duration(within.min(), dated), _duration(within.max(), dated)
        words = f"irregular, {words} by the median, in steps from {low} to {high}"
    if len(gaps):
        longest = int(gaps[np.argmax(steps[gaps])])
        named = f"{len(gaps):,} gaps, the longest" if len(gaps) > 1 else "a gap"
        words += (
            f"; {named} of {_duration(steps[longest], dated)} after "
            f"{printable(times.text(longest))[:40]} ({times.place(longest)})"
        )
    return words


def row_of(until: str, times: Times | None, rows: int, name: str = "train_until") -> int:
    """Return how many rows come before a row or a time, given as text.

    A whole number up to the number of rows counts rows; all else is a time, ISO 8601 or, where
    times are numbers, a number.

    Raises:
        InputError: If it is neither, or there are no rows before or after it.
    """
    text = until.strip()
    if text.isdecimal() and (int(text) <= rows or times is None):
        row = int(text)
    elif times is None:
        raise InputError(
            f"`{name}` is {until!r:.40}: without `time_column` it is a number of rows."
        )
    else:
        row = int(np.searchsorted(times.values, _moment(text, times, name)))
    if not 0 < row <= rows:
        where = "no row lies before it" if row <= 0 else f"there are {rows:,} rows"
        raise InputError(f"`{name}` is {until!r:.40}: {where}.")
    return row


def _moment(text: str, times: Times, name: str) -> Any:
    try:
        (moment,) = parse_times(f"`{name}`", [text]).values
    except InputError:
        raise InputError(f"`{name}` is {text!r:.40}. {_EXPECTED} Or a number of rows.") from None
    dated, asked = times.values.dtype.kind == "M", isinstance(moment, np.datetime64)
    if dated and not asked:
        raise InputError(
            f"`{name}` is {text!r:.40}: the times of the series are dates. Give one of them, or a "
            "number of rows."
        )
    if asked and not dated:  # seconds since 1970, which most numbers are
        return moment.astype("datetime64[ns]").astype(np.int64) / 1e9
    return moment


def _duration(value: float, dated: bool) -> str:
    """Write seconds in the largest unit that they fill, or a plain number."""
    if not dated or not math.isfinite(value) or value <= 0:
        return short(value)
    unit, size = next(((u, s) for u, s in _UNITS if value >= s), ("ns", 1e-9))
    return f"{short(value / size)} {unit}"
