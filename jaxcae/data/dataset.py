"""What a data set is, and how it is split and standardised."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from jaxcae.data.preparation import Preparation
from jaxcae.data.standardization import Moments, Standardization
from jaxcae.data.times import Times
from jaxcae.errors import InputError

__all__ = ["Dataset", "Preparation", "Standardization", "split", "split_rows"]


class Usage(NamedTuple):
    """How a named series is meant to be used.

    Attributes:
        train_rows: Its first rows, which are for training.
        starts: The rows at which another recording begins.
        window: A width of windows that suits it.
    """

    train_rows: int
    starts: tuple[int, ...] = ()
    window: int = 128


@dataclass(frozen=True)
class Dataset:
    """Samples in rows.

    Attributes:
        features: One row per sample, in float32; in float64 where digits that float32 would lose
            wait for `split` or `prepared` to standardise them. NaN where a value is missing.
        labels: One label per row where the source has them; never used in training.
        name: The catalogue's name, or the file's stem.
        feature_shape: The shape of one sample when it is an image, such as (28, 28).
        source: Where it came from, for a person to read.
        feature_names: Names of the columns where the source has them.
        tabular: Whether `split` standardises the features.
        standardization: What was applied to `features`; None while they are in their own units.
        missing: What `split` does about missing values; "mean" puts the mean of the training
            split there.
        fill: What was put in place of missing values.
        taken: What was taken for header, label and features, in words.
        times: The times of the rows, where there is a column of them.
        time_name: The name of that column.
        series: Of a named series, how it is meant to be used.
    """

    features: Float[np.ndarray, "rows features"]
    labels: Shaped[np.ndarray, " rows"] | None
    name: str
    feature_shape: tuple[int, ...] | None
    source: str
    feature_names: tuple[str, ...] | None = None
    tabular: bool = False
    standardization: Standardization | None = None
    missing: str = "refuse"
    fill: Float[np.ndarray, " features"] | None = None
    taken: str = ""
    times: Times | None = None
    time_name: str | None = None
    series: Usage | None = None

    def __len__(self) -> int:
        return len(self.features)

    @property
    def num_features(self) -> int:
        """The width of a sample."""
        return self.features.shape[1]

    def take(self, rows: Any) -> "Dataset":
        """Return the data set of these rows."""
        labels = None if self.labels is None else self.labels[rows]
        times = None if self.times is None else self.times.take(rows)
        return replace(self, features=self.features[rows], labels=labels, times=times, series=None)

    @property
    def preparation(self) -> Preparation:
        """What was done to the features, and their names: what other data needs, too."""
        return Preparation(self.standardization, self.feature_names, self.fill)

    def standardized(self, standardization: Standardization) -> "Dataset":
        """Return the data set with `standardization` applied."""
        return self.prepared(Preparation(standardization))

    def prepared(self, preparation: Preparation) -> "Dataset":
        """Return the data set as the networks see it; the columns must be in order.

        Raises:
            InputError: If the data has another number of features.
        """
        standardization, _, fill = preparation
        if standardization is not None and len(standardization.mean) != self.num_features:
            raise InputError(
                f"{self.name}: expected {len(standardization.mean)} features (from the "
                f"standardization), the data has {self.num_features}."
            )
        features = preparation.apply(self.features)
        return replace(self, features=features, standardization=standardization, fill=fill)


def split(dataset: Dataset, held_out: float = 0.2, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Split into a training and a held-out set by a seeded permutation.

    A tabular set is standardised by the mean and deviation of the training split alone; what was
    applied is in `train.standardization`. Where missing values are to be filled in, the means of
    the training split are, too, and those are in `train.fill`.

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
        fill = fitted.mean if dataset.missing == "mean" else None
        preparation = Preparation(fitted, dataset.feature_names, fill)
    elif dataset.missing == "mean":
        moments = Moments()
        moments.add(train.features)
        preparation = Preparation(
            None, dataset.feature_names, moments.known_mean(dataset.feature_names)
        )
    else:
        return train, rest
    return train.prepared(preparation), rest.prepared(preparation)


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
