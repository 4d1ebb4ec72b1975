"""The data of a run on a series: which windows train, which calibrate, and how they are scaled.

Windows come from normal rows before `train_until`. The last of these rows, after a gap of a window,
are held out: on them scores are calibrated, so that no row is in windows of both kinds.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxcae.data import Preparation, Standardization
from jaxcae.data.series import Series, open_series
from jaxcae.data.standardization import Moments
from jaxcae.data.windows import window_starts
from jaxcae.errors import InputError
from jaxcae.runs.config import Config

STEPS = 1200
"""Steps of training where the epochs are left to the data."""
MAX_TRAIN_BYTES = 1 << 28
"""Windows of a long series are taken at a stride, so that they fit in this; neighbours differ in
one row, and a run of the usual length would not see them all."""


@dataclass(frozen=True)
class Parts:
    """A series as a run takes it.

    Attributes:
        series: The series.
        train: Segments of the rows to train on.
        calibration: Segments of the normal rows that are held out.
        preparation: How each channel is scaled and filled in.
        train_rows: The rows before `train_until`.
    """

    series: Series
    train: Int[np.ndarray, "segments 2"]
    calibration: Int[np.ndarray, "others 2"]
    preparation: Preparation
    train_rows: int

    @property
    def filled(self) -> Float[np.ndarray, "rows channels"]:
        """All rows in the units of the source, filled in where that was asked for."""
        fill, values = self.preparation.fill, self.series.values
        return values if fill is None else np.where(np.isnan(values), fill, values)

    @property
    def values(self) -> Float[np.ndarray, "rows channels"]:
        """All rows as the networks see them, NaN where a value is missing and not filled in."""
        return self.preparation.apply(self.series.values)


def load_parts(config: Config, max_bytes: int | None = None, samples: Any = None) -> Parts:
    """Load the series of a configuration, and part its rows.

    Raises:
        InputError: If it is not usable, or too short for what is asked.
    """
    settings = config.series
    series = open_series(
        config.data.source if samples is None else samples,
        config.data.table,
        max_gap=settings.max_gap,
        normal_label=settings.normal_label,
        max_bytes=max_bytes,
    )
    size = settings.window
    assert size is not None
    rows = series.rows_before(settings.train_until)
    usable = np.arange(len(series)) < rows
    if series.anomalous is not None:
        usable &= ~series.anomalous
    if config.data.missing != "mean":
        usable &= ~np.isnan(series.values).any(1)
    count = int(usable.sum())
    held_out = round(config.data.held_out * count)
    if count - held_out < size or held_out < size:
        raise InputError(
            f"{series.name}: {count:,} normal rows to train and calibrate on, windows of {size} "
            f"need at least {_needed(size, config.data.held_out):,}. Use a shorter `window`, or "
            "more rows."
        )
    first_held_out = int(np.flatnonzero(usable)[count - held_out])
    place = np.arange(len(series))
    parts = {
        "to train on": usable & (place < first_held_out),
        "to calibrate on": usable & (place >= first_held_out + size),
    }
    segments = {}
    for purpose, mask in parts.items():
        try:
            segments[purpose] = series.segments(mask)
            window_starts(len(series), size, segments=segments[purpose])
        except InputError as error:
            reason = str(error).removeprefix(f"{series.name}: ")
            raise InputError(f"{series.name}, normal rows {purpose}: {reason}") from None
    train, calibration = segments.values()
    inside = series.values[parts["to train on"]]
    preparation = _preparation(config, series, inside)
    return Parts(series, train, calibration, preparation, rows)


def check_calibration(name: str, size: int, windows: int) -> None:
    """See, before any training, that alarms could be told from chance.

    Raises:
        InputError: If fewer windows than two independent ones are held out.
    """
    if windows < 2 * size:
        raise InputError(
            f"{name}: {windows:,} windows of {size} are held out to calibrate on, and neighbours "
            f"share all rows but one: at least {2 * size:,} are needed to tell an alarm from "
            "chance. Use more rows, a shorter `window`, or a larger share in `held_out`."
        )


def _needed(size: int, held_out: float) -> int:
    return int(np.ceil(max(2 * size / held_out, size / (1 - held_out))))


def _preparation(config: Config, series: Series, inside: Any) -> Preparation:
    names = series.dataset.feature_names
    moments = Moments()
    moments.add(inside)
    mean = moments.known_mean(names)
    if (moments.deviation <= 0).all():
        raise InputError(
            f"{series.name}: every channel is constant over the rows to train on; there is nothing "
            "to learn."
        )
    fill = mean if config.data.missing == "mean" else None
    scaled = config.data.standardize != "no"
    return Preparation(Standardization.fit(inside, names) if scaled else None, names, fill)


def taken_of(parts: Parts, config: Config, stride: int, windows: tuple[int, int]) -> str:
    """Say what was taken of a series, for a person to check."""
    series, size = parts.series, config.series.window
    missing = int(np.isnan(series.values).any(1).sum())
    left_out = 0 if series.anomalous is None else int(series.anomalous[: parts.train_rows].sum())
    told = [
        series.dataset.taken.rstrip(".") or series.name,
        series.sampling,
        f"{missing:,} rows with missing cells, "
        + ("filled in" if config.data.missing == "mean" else "which no window takes")
        if missing
        else "",
        f"{left_out:,} anomalous rows before the end of training, left out" if left_out else "",
        f"windows of {size} rows: {windows[0]:,} to train on"
        + (f" (every {stride}th)" if stride > 1 else "")
        + f", {windows[1]:,} held out to calibrate on",
    ]
    return "; ".join(text for text in told if text) + "."


def windows_of(
    values: Float[np.ndarray, "rows channels"], starts: Int[np.ndarray, " windows"], size: int
) -> Float[np.ndarray, "windows features"]:
    """Lay windows out as samples: rows in time, the channels of each beside one another."""
    view = np.lib.stride_tricks.sliding_window_view(values, size, axis=0)
    return np.ascontiguousarray(np.moveaxis(view[starts], 1, 2)).reshape(len(starts), -1)


def tiled(preparation: Preparation, size: int) -> Preparation:
    """Return the preparation of windows as samples, from that of channels."""
    scaling, _, fill = preparation
    return Preparation(
        None if scaling is None else Standardization(*(np.tile(v, size) for v in scaling)),
        None,
        None if fill is None else np.tile(fill, size),
    )


def of_channels(preparation: Preparation, config: Config) -> Preparation:
    """Return the preparation of channels, from that of windows as samples."""
    scaling, _, fill = preparation
    size = config.series.window or 1
    count = config.model.num_features // size
    return Preparation(
        None if scaling is None else Standardization(*(v[:count] for v in scaling)),
        config.data.feature_names or None,
        None if fill is None else fill[:count],
    )


def sha256_of_rows(values: Float[np.ndarray, "rows channels"]) -> str:
    """Tell rows in their own units from others; a missing value is like another."""
    rows = np.where(np.isnan(values), np.nan, values).astype("<f8")
    return hashlib.sha256(np.ascontiguousarray(rows).data).hexdigest()
