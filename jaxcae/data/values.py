"""Checks that every reader shares: how much memory, which shape, and whether values fit float32."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxcae.data.standardization import DEVIATION_FLOOR, Moments, shown_columns
from jaxcae.errors import InputError

Source = Path | str
"""What an error names first: a path, or words for what has none."""
Place = Callable[[int, int], str]
"""`place(row, column)` says where a value is, in the words of the file's kind."""

# float32 holds every integer up to 2²⁴; from there on it rounds neighbours to the same number.
LARGEST_INTEGER = 1 << 24
LARGEST_EXACT = 1 << 53
"""float64 holds every integer up to here."""
# How large the spacing of a float type may be against a column's deviation: a thousandth of it
# rounds away 10 of the 24 bits that float32 has, and leaves figures of three digits.
SMALL = 1e-3
BLOCK_BYTES = 1 << 22


def default_max_bytes() -> int:
    """Return half of the memory this process may use: the machine's, or its control group's."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no control group, or "max"
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text("ascii")))
    return memory // 2


def check_fits(path: Source, need: int, max_bytes: int | None, advice: str = "") -> None:
    """Raise InputError if `need` bytes are more than the cap."""
    cap = default_max_bytes() if max_bytes is None else max_bytes
    if need > cap:
        raise InputError(
            f"{path}: needs {_readable(need)} in memory, the cap is {_readable(cap)}. "
            f"{advice}Raise `max_bytes` if the memory is there."
        )


def matrix_shape(
    path: Source, shape: tuple[int, ...], flatten: bool
) -> tuple[int, int, tuple[int, ...] | None]:
    """Return `(rows, features, feature_shape)` of an array of this shape.

    Raises:
        InputError: If the rank is not 2 and `flatten` was not asked for, or nothing is there.
    """
    if not shape:
        raise InputError(f"{path}: expected samples in rows, the array is a single number.")
    rows, rest = shape[0], shape[1:]
    features = int(np.prod(rest, dtype=object)) if rest else 1
    if rows == 0:
        raise InputError(f"{path}: no rows, the array has shape {shape}.")
    if features == 0:
        raise InputError(f"{path}: no features, the array has shape {shape}.")
    if len(shape) != 2 and not flatten:
        raise InputError(
            f"{path}: expected rank 2 (samples × features), the array has shape {shape}. "
            f"Use `flatten=True` to read {rows} samples of {features} feature(s)."
        )
    return rows, features, rest if len(rest) > 1 else None


class Caster:
    """Casts blocks to a float type, remembering every value that would not survive the cast.

    All blocks are cast before `finish` raises, so that the message can give the count.

    Args:
        path: What to name in front of an error.
        place: Where a value is.
        names: Names of the columns, for errors that are about one.
        missing: Accept NaN, as the mark of a missing value.
        spacing: See, once all rows have come, whether rounding is as large as the signal.
    """

    def __init__(
        self,
        path: Source,
        place: Place | None = None,
        names: tuple[str, ...] | None = None,
        missing: bool = False,
        spacing: bool = True,
    ) -> None:
        self.path, self.names, self.missing, self.spacing = path, names, missing, spacing
        self.place = place or (lambda row, column: f"row {row}, column {column} (from 0)")
        self.counts: dict[str, int] = {}
        self.first: dict[str, str] = {}
        self._moments = Moments()
        self._changed: Any = False
        self._beyond: Any = False
        self._largest: Any = 0.0
        self._origin: np.ndarray | None = None
        self._step = 0.0

    def taken(self, block: np.ndarray, first_row: int, dtype: Any) -> np.ndarray:
        """Return `block` in another type, or itself where it has that type; see `cast`."""
        out = block if block.dtype == dtype else np.empty(block.shape, dtype)
        self.cast(block, first_row, out)
        return out

    def cast(self, block: np.ndarray, first_row: int, out: np.ndarray) -> None:
        """Cast `block`, whose first row is row `first_row` of the file, into `out`."""
        if out is not block:
            with np.errstate(over="ignore", invalid="ignore"):
                out[...] = block
        integers = block.dtype.kind in "iu"
        if integers and out.dtype == np.float32:
            self.report("integer", _beyond_exact(block), block, first_row)
            return
        if out.dtype == np.float32:
            lost = ~np.isfinite(out)
        else:  # standardised values are float32 in the end, and squared on the way
            lost = ~(np.abs(out) <= np.finfo(np.float32).max)
        if lost.any():
            nan = np.isnan(block) if block.dtype.kind == "f" else np.zeros(block.shape, bool)
            finite = np.isfinite(block)
            self.report("not finite", ~finite & ~nan if self.missing else ~finite, block, first_row)
            self.report("range", lost & finite, block, first_row)
            if not (lost & nan == lost).all():
                return  # `finish` will refuse; a deviation means nothing any more
        eight = integers and block.dtype.itemsize == 8
        # Of text with more digits than float64 has, the values have come rounded already.
        beyond = (np.abs(block) > LARGEST_EXACT).any(0) if block.dtype == np.float64 else False
        narrower = block.dtype.itemsize > out.dtype.itemsize
        if self.spacing and (eight or narrower or np.any(beyond)):
            # NumPy would compare integers as the floats that they are about to become.
            back = out.astype(block.dtype) if integers else out
            self._beyond = self._beyond | beyond
            self._changed = self._changed | ((back != block) & ~np.isnan(out)).any(0) | beyond
            self._largest = np.maximum(
                self._largest, np.abs(out).max(0, initial=0, where=out == out)
            )
            if integers:  # their differences are whole where they themselves no longer would be
                self._origin = block[0] if self._origin is None else self._origin
                block = (block - self._origin).astype(np.int64)
            self._moments.add(block)
            self._step = float(np.finfo(out.dtype).eps)

    def finish(self) -> None:
        """Raise InputError if anything was reported, or rounding is as large as the signal."""
        for kind, text in (
            ("not finite", "NaN or infinite; the first is {}. Remove or impute them first."),
            ("range", "outside the range of float32 (±3.4e38); the first is {}. Rescale them."),
            (
                "integer",
                f"beyond ±{LARGEST_INTEGER}, where float32 no longer tells neighbouring integers "
                "apart; the first is {}. Standardise them, which is done on all their digits, or "
                "rescale them.",
            ),
        ):
            if count := self.counts.get(kind):
                if self.first[kind].startswith("nan "):
                    text += " Or use `missing='drop'` or `missing='mean'`."
                number = "1 value is" if count == 1 else f"{count} values are"
                raise InputError(f"{self.path}: {number} {text.format(self.first[kind])}")
        self.check_spacing()

    def check_spacing(self) -> None:
        """Raise InputError where a deviation is no longer told from the rounding of the type."""
        moments = self._moments
        if not self._step:
            return
        deviation, spacing = moments.deviation, self._step * self._largest
        whole = self._origin is not None
        floor = np.where(whole | self._beyond, 0, DEVIATION_FLOOR["float64"])
        constant = deviation <= floor * self._largest
        bad = np.flatnonzero(self._changed & ~constant & (spacing > SMALL * deviation))
        if len(bad):
            worst = bad[0]
            advice = "Standardise the data, which is done on all its digits, or take"
            advice = "Take" if np.any(self._beyond) else advice
            raise InputError(
                f"{self.path}: column {shown_columns(bad, self.names)}: values near "
                f"{self._largest[worst]:.7g} that vary by ±{deviation[worst]:.3g} are stored in "
                f"steps of {spacing[worst]:.2g}, so little of them is left. "
                f"{advice} the offset off first."
            )

    def report(self, kind: str, bad: np.ndarray, block: np.ndarray, first_row: int) -> None:
        """Count the values marked in `bad`, and keep the place of the first of all."""
        count = int(np.count_nonzero(bad))
        if count and kind not in self.first:
            row, column = (int(i) for i in np.argwhere(bad)[0])
            self.first[kind] = f"{block[row, column]} at {self.place(first_row + row, column)}"
        if count:
            self.counts[kind] = self.counts.get(kind, 0) + count


def _beyond_exact(block: np.ndarray) -> np.ndarray:
    # Two comparisons, since abs(int64 minimum) overflows.
    return (block > LARGEST_INTEGER) | (block < -LARGEST_INTEGER)


def _readable(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return (
                f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count // size} {unit}"
            )
    return f"{count} bytes"
