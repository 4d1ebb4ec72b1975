"""Mean and deviation of each feature, fitted on the digits of the data and kept with a run."""

import sys
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Real

from jaxcae.errors import InputError, printable

# A column whose deviation is below this fraction of its largest magnitude is constant up to the
# rounding of its type; dividing by such a deviation would amplify rounding to the size of a signal.
DEVIATION_FLOOR = {"float32": 1e-6, "float64": 1e-13}
_ROWS_AT_ONCE = 8192


class Moments:
    """Count, mean, deviation and largest magnitude of each column of rows that come in blocks.

    Missing values (NaN) are left out. Means and sums of squares are merged block by block, which
    loses nothing where the mean is large against the deviation, as a difference of sums of squares
    would.

    References:
        Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance", The American
        Statistician 37 (1983), eq. 2.1, doi:10.1080/00031305.1983.10483115.
    """

    def __init__(self) -> None:
        self.count: Any = 0
        self.mean = self._squares = self.largest = np.zeros(())

    def add(self, block: Real[np.ndarray, "rows features"]) -> None:
        """Take in more rows."""
        if len(block) == 0:
            return
        wide = block.astype(np.float64)
        missing = np.isnan(wide)
        if missing.any():
            rows: Any = len(wide) - missing.sum(0)
            center = np.where(missing, 0, wide).sum(0) / np.maximum(rows, 1)
            wide = np.where(missing, center, wide)
        else:
            rows, center = len(wide), wide.mean(0)
        total = np.maximum(self.count + rows, 1)
        shift = center - self.mean
        self._squares = (
            self._squares + ((wide - center) ** 2).sum(0) + shift**2 * self.count * rows / total
        )
        self.mean = self.mean + shift * rows / total
        self.largest = np.maximum(self.largest, np.abs(wide).max(0))
        self.count = self.count + rows

    @property
    def deviation(self) -> Float[np.ndarray, " features"]:
        """Root of the mean square about the mean."""
        return np.sqrt(self._squares / np.maximum(self.count, 1))

    def known_mean(self, names: tuple[str, ...] | None = None) -> Float[np.ndarray, " features"]:
        """Return the means.

        Raises:
            InputError: If a column has no value at all.
        """
        empty = np.flatnonzero(np.broadcast_to(self.count, self.mean.shape) == 0)
        if len(empty):
            raise InputError(
                f"no value in the training split in column {shown_columns(empty, names)}. Drop it."
            )
        return self.mean


class Standardization(NamedTuple):
    """The map x ↦ (x − mean) / deviation of each feature, fitted on the training split alone.

    Both are float64, and so is the subtraction: what is large against its deviation, such as
    seconds since 1970, keeps its digits if the rows come with them.
    """

    mean: Float[np.ndarray, " features"]
    deviation: Float[np.ndarray, " features"]

    @classmethod
    def fit(
        cls, features: Real[np.ndarray, "rows features"], names: tuple[str, ...] | None = None
    ) -> "Standardization":
        """Fit in float64; a constant column gets deviation 1 and a warning that names it."""
        starts = range(0, len(features), _ROWS_AT_ONCE)
        return cls.fit_blocks((features[start : start + _ROWS_AT_ONCE] for start in starts), names)

    @classmethod
    def fit_blocks(
        cls,
        blocks: Iterable[Real[np.ndarray, "rows features"]],
        names: tuple[str, ...] | None = None,
    ) -> "Standardization":
        """Fit on rows that come in blocks, at least one row in all; see `fit` and `Moments`.

        Raises:
            InputError: If a column has no value at all.
        """
        moments, floor = Moments(), DEVIATION_FLOOR["float32"]
        for block in blocks:
            moments.add(block)
            if block.dtype.itemsize > 4 or block.dtype.kind in "iu":
                floor = DEVIATION_FLOOR["float64"]
        mean, deviation = moments.known_mean(names), moments.deviation
        constant = deviation <= floor * moments.largest
        if constant.any():
            columns = np.flatnonzero(constant)
            warnings.warn(
                f"{len(columns)} constant column(s) in the training split: "
                f"{shown_columns(columns, names)}. "
                "They are centred and left unscaled; consider dropping them.",
                stacklevel=3,
            )
        return cls(mean, np.where(constant, 1.0, deviation))

    def check_width(self, width: int) -> None:
        """Raise InputError unless there is one mean and deviation for each of `width` features."""
        if len(self.mean) != width:
            raise InputError(
                f"expected {len(self.mean)} features (from the standardization), got {width}."
            )

    def apply(
        self, features: Real[np.ndarray, "rows features"]
    ) -> Float[np.ndarray, "rows features"]:
        """Return the standardised features in float32, computed in float64."""
        self.check_width(features.shape[1])
        out = np.empty(features.shape, np.float32)
        for start in range(0, len(features), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            out[rows] = (features[rows] - self.mean) / self.deviation
        return out

    def invert(
        self, features: Float[np.ndarray, "rows features"]
    ) -> Float[np.ndarray, "rows features"]:
        """Return standardised features in their own units again."""
        self.check_width(features.shape[1])
        return (features * self.deviation + self.mean).astype(np.float32)

    def to_json(self) -> dict[str, list[float]]:
        """Return plain lists, which hold each float64 exactly."""
        return {"mean": self.mean.tolist(), "deviation": self.deviation.tolist()}

    @classmethod
    def from_json(cls, value: Any) -> "Standardization":
        """Rebuild from `to_json`, checking every entry.

        Raises:
            InputError: If the lists are missing, of unequal length, not finite, or a deviation is
                not positive.
        """
        if not isinstance(value, dict) or set(value) != {"mean", "deviation"}:
            raise InputError("standardization must hold exactly 'mean' and 'deviation'.")
        mean, deviation = (
            finite_list(value[key], f"standardization: {key!r}") for key in ("mean", "deviation")
        )
        if len(mean) != len(deviation) or not (deviation > 0).all():
            raise InputError("standardization: one positive deviation per mean is expected.")
        return cls(mean, deviation)


def finite_list(value: Any, name: str) -> Float[np.ndarray, " entries"]:
    """Return a list from a file as float64, or raise InputError if it is anything else."""
    if not isinstance(value, list) or not value or not all(map(_is_finite, value)):
        raise InputError(f"{name} must be a list of finite numbers.")
    return np.array(value, np.float64)


def shown_columns(columns: Any, names: tuple[str, ...] | None) -> str:
    """Name columns, at most eight; by number, from 0, where they have no names."""
    shown = ", ".join(printable(names[i])[:40] if names else str(i) for i in columns[:8])
    return f"{shown} and {len(columns) - 8} more" if len(columns) > 8 else shown


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # also an integer too large to be a float
