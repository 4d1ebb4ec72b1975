"""The data of a training run: loaded or opened, split, measured, and bound to the configuration."""

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcae.data import ARRAY, Dataset, Preparation, Standardization, load_as, split
from jaxcae.data.tables import nameless
from jaxcae.data.windows import window_starts
from jaxcae.devices.processes import first_does
from jaxcae.errors import InputError
from jaxcae.runs.checks import STANDARDIZE
from jaxcae.runs.config import Config
from jaxcae.runs.windowed import (
    MAX_TRAIN_BYTES,
    STEPS,
    Parts,
    check_calibration,
    load_parts,
    sha256_of_rows,
    taken_of,
    tiled,
    windows_of,
)

MAX_HELD_OUT = 10_000
"""How many held-out rows of streamed data to evaluate on; they are held in memory."""
MAX_HELD_OUT_BYTES = 1 << 28
RAW_SCALE = 20
"""Values beyond this are told to be raw: standardised ones hardly ever are."""
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Material:
    """What a run trains on.

    Attributes:
        config: The configuration with what the data decides filled in.
        train: Samples in rows, or `jaxcae.training.Batches`.
        num_train: How many training samples there are.
        held_out: Samples in rows.
        labels: Labels of the held-out samples, where there are any.
        preparation: What was done to the features, and their names.
        feature_shape: The shape of one sample when it is an image.
        taken: What was taken for header, label and features, in words.
        parts: Of a run on windows, the series and which of its rows are for what.
    """

    config: Config
    train: Any
    num_train: int
    held_out: np.ndarray
    labels: np.ndarray | None
    preparation: Preparation
    feature_shape: tuple[int, ...] | None
    taken: str = ""
    parts: Parts | None = None

    @property
    def standardization(self) -> Standardization | None:
        """What was applied to the features, if anything."""
        return self.preparation.standardization


def load_material(config: Config, max_bytes: int | None = None, samples: Any = None) -> Material:
    """Load the data that a configuration names.

    Args:
        config: What to load, and how to split and scale it.
        max_bytes: The most memory the samples may take; half the memory by default.
        samples: Data that is in memory already, instead of what the configuration names: samples in
            rows, a data frame, or a `Dataset`.

    Raises:
        InputError: If the data is not usable, or the settings do not go with it.
    """
    if config.model.kind == "conv" or len(config.model.shape) > 1:  # takes images as they are
        config = config.replace(flatten=True)
    if samples is not None:
        config = config.replace(data=ARRAY)
    if config.series.window is not None:
        material = _of_series(config, samples, max_bytes)
    elif samples is not None:
        material = _split(config, _in_memory(config, samples, max_bytes))
    elif config.data.stream:
        material = _stream(config)
    else:
        dataset = open_dataset(config, max_bytes)
        if dataset.series is not None:
            warnings.warn(
                f"{config.data.source} is a series, and its rows are taken as samples that stand "
                f"alone. Use `window={dataset.series.window}` to detect in it.",
                stacklevel=2,
            )
        material = _split(config, dataset)
    shaped = material.config.shaped(material.held_out.shape[1], material.feature_shape)
    return replace(material, config=shaped)


def open_dataset(config: Config, max_bytes: int | None = None) -> Dataset:
    """Load the whole data of a configuration, in the units of its source.

    Raises:
        InputError: If the data is not usable.
    """
    data = config.data
    standardize = STANDARDIZE[data.standardize]
    dataset = load_as(
        data.source,
        data.table,
        max_bytes=max_bytes,
        flatten=data.flatten,
        # A run that standardised what float32 had left of the digits goes on doing so.
        standardize=False if standardize and is_narrow(config) else standardize,
    )
    return dataset if standardize is None else replace(dataset, tabular=standardize)


def is_narrow(config: Config) -> bool:
    """Tell whether a run is of the kind that narrowed its data before standardising it."""
    return bool(config.data.digest) and config.data.digits == "float32"


def _in_memory(config: Config, samples: Any, max_bytes: int | None) -> Dataset:
    standardize = STANDARDIZE[config.data.standardize]
    if isinstance(samples, Dataset):
        return samples if standardize is None else replace(samples, tabular=standardize)
    if isinstance(samples, jax.Array | list):
        samples = np.asarray(samples)
    return load_as(
        samples,
        config.data.table,
        max_bytes=max_bytes,
        flatten=config.data.flatten,
        standardize=standardize,
    )


def _split(config: Config, dataset: Dataset) -> Material:
    train, held_out = split(dataset, config.data.held_out, config.training.seed)
    summary = _Summary()
    summary.add(train.features)
    summary.add(held_out.features)
    return Material(
        summary.resolve(config, train.num_features, train.preparation),
        train.features,
        len(train),
        held_out.features,
        held_out.labels,
        train.preparation,
        dataset.feature_shape,
        dataset.taken,
    )


def _of_series(config: Config, samples: Any, max_bytes: int | None) -> Material:
    """Cut a series into windows, the first rows of it to train on, the last to calibrate."""
    parts = load_parts(config, max_bytes, samples)
    size, values = config.series.window or 1, parts.values
    width = size * values.shape[1]
    starts = window_starts(len(values), size, segments=parts.train)
    stride = -(-len(starts) * 4 * width // MAX_TRAIN_BYTES)
    train = windows_of(values, starts[::stride], size)
    starts = window_starts(len(values), size, segments=parts.calibration)
    check_calibration(parts.series.name, size, len(starts))
    kept = np.linspace(0, len(starts) - 1, min(len(starts), held_out_rows(width)), dtype=int)
    held_out = windows_of(values, starts[kept], size)
    summary = _Summary()
    summary.add(train)
    summary.add(held_out)
    preparation = tiled(parts.preparation, size)
    config = summary.resolve(
        config, width, preparation._replace(feature_names=parts.preparation.feature_names)
    )
    digest = sha256_of_rows(parts.series.values[: parts.train_rows])
    series = replace(config.series, train_rows=parts.train_rows, digest=digest)
    epochs = config.training.epochs or -(-STEPS // -(-len(train) // config.training.batch_size))
    return Material(
        replace(config.replace(epochs=epochs), series=series),
        train,
        len(train),
        held_out,
        None,
        preparation,
        None,
        taken_of(parts, config, stride, (len(train), len(starts))),
        parts,
    )


def _stream(config: Config) -> Material:
    from jaxcae.data.stream import NpySource, StreamedBatches

    data = config.data
    if Path(data.source).suffix.lower() != ".npy" and not Path(data.source).is_dir():
        raise InputError(f"`stream` reads .npy files and folders of them, got {data.source}.")
    data.table.check_kind(data.source, ".npy")
    missing = data.missing
    source = NpySource(data.source, flatten=data.flatten, missing=missing, narrow=is_narrow(config))
    nameless(data.source, source.num_features, data.table)
    if missing == "drop":
        source = source.without_missing()
    # Process 0 goes over the whole file, and the others over no more than their part of batches.
    train, _ = source.split(data.held_out, config.training.seed)
    standardize = STANDARDIZE[data.standardize]
    fitted = first_does(lambda: _fitted(train, bool(standardize), missing == "mean"))
    scaling = Standardization(*map(np.asarray, fitted[:2])) if standardize else None
    source = source.standardized(scaling, None if fitted[2] is None else np.asarray(fitted[2]))
    # One pass over the file before training: a bad value is found now, and not after an hour.
    summary = _Summary.of(first_does(lambda: _summary_of(source)))
    train, rest = source.split(data.held_out, config.training.seed)
    preparation = Preparation(source.standardization, data.feature_names or None, source.fill)
    return Material(
        summary.resolve(config, source.num_features, preparation),
        StreamedBatches(train, min(config.training.batch_size, len(train)), config.training.seed),
        len(train),
        np.concatenate(list(_first(rest, held_out_rows(source.num_features)))),
        None,
        preparation,
        source.feature_shape,
    )


def _fitted(train: Any, standardize: bool, fill: bool) -> list[list[float] | None]:
    """Fit mean, deviation and what missing values are filled with, where they are asked for."""
    if standardize:
        mean, deviation = (v.tolist() for v in train.fit_standardization())
        return [mean, deviation, mean if fill else None]
    return [None, None, train.fit_fill().tolist() if fill else None]


def _summary_of(source: Any) -> list[Any]:
    summary = _Summary()
    for block in source.scan():
        summary.add(block)
    return [summary.low, summary.high, summary.digest]


def held_out_rows(features: int) -> int:
    """Return how many held-out rows of streamed data to keep in memory for evaluation."""
    return min(MAX_HELD_OUT, max(1, MAX_HELD_OUT_BYTES // (4 * features)))


class _Summary:
    """Range and digest of an array that comes in blocks."""

    def __init__(self) -> None:
        self.low, self.high = np.inf, -np.inf
        self._digest = hashlib.sha256()
        self._known = ""

    @classmethod
    def of(cls, told: list[Any]) -> "_Summary":
        summary = cls()
        summary.low, summary.high, summary._known = told
        return summary

    @property
    def digest(self) -> str:
        return self._known or self._digest.hexdigest()

    def add(self, block: np.ndarray) -> None:
        if not len(block):
            return
        self.low = min(self.low, float(block.min()))
        self.high = max(self.high, float(block.max()))
        self._digest.update(np.ascontiguousarray(block).data)

    def resolve(self, config: Config, features: int, preparation: Preparation) -> Config:
        standardized = preparation.standardization is not None
        largest = max(-self.low, self.high)
        if config.data.standardize == "auto" and not standardized and largest > RAW_SCALE:
            warnings.warn(
                f"{config.data.source} goes from {self.low:.5g} to {self.high:.5g} and is not "
                "standardised; networks train best on features near 1. Use `standardize='yes'`, "
                "or scale it first.",
                stacklevel=2,
            )
        return config.resolve(
            features,
            self.low,
            self.high,
            self.digest,
            standardized=standardized,
            feature_names=preparation.feature_names or (),
        )


def _first(source: Any, count: int) -> Iterator[np.ndarray]:
    for block in source.blocks(min(count, _ROWS_AT_ONCE)):
        yield block[:count]
        count -= len(block)
        if count <= 0:
            return
