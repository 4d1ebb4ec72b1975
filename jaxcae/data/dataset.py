"""What a data set is, and how it is split and standardised."""

import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from jaxcae.errors import InputError

# A column whose deviation is below this fraction of its largest magnitude is constant up to the
# rounding of float32; dividing by such a deviation would amplify rounding to the size of a signal.
DEVIATION_FLOOR = 1e-6
_ROWS_AT_ONCE = 8192


class Standardization(NamedTuple):
    """The map x ↦ (x − mean) / deviation of each feature, fitted on the training split alone."""

    mean: Float[np.ndarray, " features"]
    deviation: Float[np.ndarray, " features"]

    @classmethod
    def fit(
        cls, features: Float[np.ndarray, "rows features"], names: tuple[str, ...] | None = None
    ) -> "Standardization":
        """Fit in float64; a constant column gets deviation 1 and a warning that names it."""
        starts = range(0, len(features), _ROWS_AT_ONCE)
        return cls.fit_blocks((features[start : start + _ROWS_AT_ONCE] for start in starts), names)

    @classmethod
    def fit_blocks(
        cls,
        blocks: Iterable[Float[np.ndarray, "rows features"]],
        names: tuple[str, ...] | None = None,
    ) -> "Standardization":
        """Fit on rows that come in blocks, at least one row in all; see `fit`.

        Means and sums of squares are merged block by block, which loses nothing where the mean is
        large against the deviation, as a difference of sums of squares would.

        References:
            Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance", The American
            Statistician 37 (1983), eq. 2.1, doi:10.1080/00031305.1983.10483115.
        """
        count, mean, squares, largest = 0, np.zeros(()), np.zeros(()), np.zeros(())
        for block in blocks:
            if len(block) == 0:
                continue
            wide = block.astype(np.float64)
            total, center = count + len(wide), wide.mean(0)
            shift = center - mean
            squares = squares + ((wide - center) ** 2).sum(0) + shift**2 * count * len(wide) / total
            mean = mean + shift * len(wide) / total
            largest = np.maximum(largest, np.abs(wide).max(0))
            count = total
        deviation = np.sqrt(squares / count)
        constant = deviation <= DEVIATION_FLOOR * largest
        if constant.any():
            columns = np.flatnonzero(constant)
            shown = ", ".join(names[i] if names else str(i) for i in columns[:8])
            more = f" and {len(columns) - 8} more" if len(columns) > 8 else ""
            warnings.warn(
                f"{len(columns)} constant column(s) in the training split: {shown}{more}. "
                "They are centred and left unscaled; consider dropping them.",
                stacklevel=3,
            )
        return cls(mean, np.where(constant, 1.0, deviation))

    def apply(
        self, features: Float[np.ndarray, "rows features"]
    ) -> Float[np.ndarray, "rows features"]:
        """Return the standardised features in float32."""
        out = np.empty(features.shape, np.float32)
        for start in range(0, len(features), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            out[rows] = (features[rows] - self.mean) / self.deviation
        return out

    def invert(
        self, features: Float[np.ndarray, "rows features"]
    ) -> Float[np.ndarray, "rows features"]:
        """Return standardised features in their own units again."""
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
        arrays = []
        for key in ("mean", "deviation"):
            entries = value[key]
            if not isinstance(entries, list) or not entries or not all(map(_is_finite, entries)):
                raise InputError(f"standardization: {key!r} must be a list of finite numbers.")
            arrays.append(np.array(entries, np.float64))
        mean, deviation = arrays
        if len(mean) != len(deviation) or not (deviation > 0).all():
            raise InputError("standardization: one positive deviation per mean is expected.")
        return cls(mean, deviation)


@dataclass(frozen=True)
class Dataset:
    """Samples in rows.

    Attributes:
        features: float32, one row per sample.
        labels: One label per row where the source has them; never used in training.
        name: The catalogue's name, or the file's stem.
        feature_shape: The shape of one sample when it is an image, such as (28, 28).
        source: Where it came from, for a person to read.
        feature_names: Names of the columns where the source has them.
        tabular: Whether `split` standardises the features.
        standardization: What was applied to `features`; None while they are in their own units.
    """

    features: Float[np.ndarray, "rows features"]
    labels: Shaped[np.ndarray, " rows"] | None
    name: str
    feature_shape: tuple[int, ...] | None
    source: str
    feature_names: tuple[str, ...] | None = None
    tabular: bool = False
    standardization: Standardization | None = None

    def __len__(self) -> int:
        return len(self.features)

    @property
    def num_features(self) -> int:
        """The width of a sample."""
        return self.features.shape[1]

    def take(self, rows: Any) -> "Dataset":
        """Return the data set of these rows."""
        labels = None if self.labels is None else self.labels[rows]
        return replace(self, features=self.features[rows], labels=labels)

    def standardized(self, standardization: Standardization) -> "Dataset":
        """Return the data set with `standardization` applied."""
        if len(standardization.mean) != self.num_features:
            raise InputError(
                f"{self.name}: expected {len(standardization.mean)} features (from the "
                f"standardization), the data has {self.num_features}."
            )
        features = standardization.apply(self.features)
        return replace(self, features=features, standardization=standardization)


def split(dataset: Dataset, held_out: float = 0.2, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Split into a training and a held-out set by a seeded permutation.

    A tabular set is standardised by the mean and deviation of the training split alone; what was
    applied is in `train.standardization`.

    Args:
        dataset: What to split.
        held_out: The fraction to hold out, above 0 and below 1. At least one row goes each way.
        seed: Seed of the permutation.

    Returns:
        `(train, held_out)`.

    Raises:
        InputError: If there are not two rows, or `held_out` is out of range.
    """
    order, count = split_rows(dataset.name, len(dataset), held_out, seed)
    train, rest = dataset.take(order[count:]), dataset.take(order[:count])
    if dataset.tabular and dataset.standardization is None:
        fitted = Standardization.fit(train.features, dataset.feature_names)
        train, rest = train.standardized(fitted), rest.standardized(fitted)
    return train, rest


def split_rows(name: str, rows: int, held_out: float, seed: int) -> tuple[np.ndarray, int]:
    """Return a permutation of the rows and how many of its first are held out."""
    if not 0 < held_out < 1:
        raise InputError(f"held_out must be above 0 and below 1, got {held_out!r}.")
    if rows < 2:
        raise InputError(
            f"{name}: {rows} row; at least two are needed, one to train on and one to hold out."
        )
    order = np.random.default_rng(seed).permutation(rows)
    return order, min(max(round(held_out * rows), 1), rows - 1)


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # also an integer too large to be a float
