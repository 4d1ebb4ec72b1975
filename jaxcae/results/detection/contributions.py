"""What a network expected about a row, and where its error is, by lag and channel."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxcae.data.standardization import Standardization
from jaxcae.errors import InputError
from jaxcae.results.detection.scoring import Ranges, Scorer


class Contributions(NamedTuple):
    """What a network expected about some rows, by lag and channel, in the units of the data.

    Attributes:
        starts: The first row of the window about each, shape (rows,).
        observed: What was there, shape (rows, size, channels).
        expected: The reconstruction.
        share: The squared error in units of the channel's deviation, which adds up to the
            window's reconstruction error.
    """

    starts: Int[np.ndarray, " rows"]
    observed: Float[np.ndarray, "rows size channels"]
    expected: Float[np.ndarray, "rows size channels"]
    share: Float[np.ndarray, "rows size channels"]


def contributions(
    scorer: Scorer,
    standardization: Standardization,
    x: Float[np.ndarray, "_ _"],
    ranges: Ranges,
    rows: Iterable[Any],
) -> Contributions:
    """Look at the windows about some rows.

    Args:
        scorer: The network.
        standardization: What it sees the series through.
        x: The series, in the units of the data.
        ranges: The segments that windows stay in.
        rows: Which rows.

    Raises:
        InputError: If there is no such row, or no window about it.
    """
    starts = np.array([_window_about(int(row), scorer.size, ranges) for row in rows], int)
    parts = [part[1:] for part in scorer.reconstruct(standardization.apply(x), starts)]
    none = np.zeros((0, scorer.size, scorer.channels))
    observed = np.concatenate([none, *(windows for windows, _ in parts)])
    expected = np.concatenate([none, *(found["x_hats"] for _, found in parts)])
    mean, deviation = standardization
    return Contributions(
        starts,
        observed * deviation + mean,
        expected * deviation + mean,
        (observed - expected) ** 2,
    )


def _window_about(row: int, size: int, ranges: Ranges) -> int:
    for start, stop in ranges:
        if start <= row < stop and stop - start >= size:
            return int(np.clip(row - size // 2, start, stop - size))
    raise InputError(f"row {row} (from 0) is not there, or no window of {size} covers it.")
