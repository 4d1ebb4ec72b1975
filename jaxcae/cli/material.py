"""The data of a training run: loaded or opened, split, measured, and bound to the configuration."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxcae.data import load, split
from jaxcae.data.dataset import Standardization
from jaxcae.errors import InputError
from jaxcae.runs.config import STANDARDIZE, Config

MAX_HELD_OUT = 10_000
"""How many held-out rows of streamed data to evaluate on; they are held in memory."""
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
        standardization: What was applied to the features, if anything.
        feature_shape: The shape of one sample when it is an image.
    """

    config: Config
    train: Any
    num_train: int
    held_out: np.ndarray
    labels: np.ndarray | None
    standardization: Standardization | None
    feature_shape: tuple[int, ...] | None


def load_material(config: Config, max_bytes: int | None = None) -> Material:
    """Load the data that a configuration names.

    Raises:
        InputError: If the data is not usable, or the options do not go with it.
    """
    return _stream(config) if config.data.stream else _load(config, max_bytes)


def _load(config: Config, max_bytes: int | None) -> Material:
    dataset = load(
        config.data.source,
        max_bytes=max_bytes,
        flatten=config.data.flatten,
        standardize=STANDARDIZE[config.data.standardize],
    )
    train, held_out = split(dataset, config.data.held_out, config.training.seed)
    summary = _Summary()
    summary.add(train.features)
    summary.add(held_out.features)
    return Material(
        summary.resolve(config, train.num_features, dataset.tabular),
        train.features,
        len(train),
        held_out.features,
        held_out.labels,
        train.standardization,
        dataset.feature_shape,
    )


def _stream(config: Config) -> Material:
    from jaxcae.data.stream import NpySource, StreamedBatches

    if Path(config.data.source).suffix.lower() != ".npy":
        raise InputError(f"`stream` reads .npy files, got {config.data.source}.")
    source = NpySource(config.data.source, flatten=config.data.flatten)
    standardize = bool(STANDARDIZE[config.data.standardize])
    if standardize:
        train, _ = source.split(config.data.held_out, config.training.seed)
        source = source.standardized(train.fit_standardization())
    # One pass over the file before training: a bad value is found now, and not after an hour.
    summary = _Summary()
    for block in source.scan(_ROWS_AT_ONCE):
        summary.add(block)
    train, rest = source.split(config.data.held_out, config.training.seed)
    held_out = np.concatenate(list(_first(rest, MAX_HELD_OUT)))
    return Material(
        summary.resolve(config, source.num_features, standardize),
        StreamedBatches(train, min(config.training.batch_size, len(train)), config.training.seed),
        len(train),
        held_out,
        None,
        source.standardization,
        source.feature_shape,
    )


class _Summary:
    """Range and digest of an array that comes in blocks."""

    def __init__(self) -> None:
        self.low, self.high = np.inf, -np.inf
        self._digest = hashlib.sha256()

    def add(self, block: np.ndarray) -> None:
        self.low = min(self.low, float(block.min()))
        self.high = max(self.high, float(block.max()))
        self._digest.update(np.ascontiguousarray(block).data)

    def resolve(self, config: Config, features: int, standardized: bool) -> Config:
        digest = self._digest.hexdigest()
        return config.resolve(features, self.low, self.high, digest, standardized=standardized)


def _first(source: Any, count: int) -> Iterator[np.ndarray]:
    for block in source.blocks(_ROWS_AT_ONCE):
        yield block[:count]
        count -= len(block)
        if count <= 0:
            return
