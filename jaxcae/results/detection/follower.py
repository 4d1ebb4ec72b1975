"""Scores of a series while it comes: each row by the window that ends there."""

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jaxcae.data.segments import segments
from jaxcae.errors import InputError
from jaxcae.results.detection.detector import ContractiveDetector
from jaxcae.results.detection.events import alarms_of
from jaxcae.results.detection.scoring import combined
from jaxcae.results.scores import CHUNK_SIZE


class Followed(NamedTuple):
    """One value a row; NaN, and no alarm, until a window is full and after a gap."""

    scores: Float[np.ndarray, " rows"]
    p_values: Float[np.ndarray, " rows"]
    alarms: Bool[np.ndarray, " rows"]


class Follower:
    """Score rows as they come, in memory of one window, by programs of one shape.

    A row's score is of the window that ends there, calibrated as such. No later row is waited for,
    so it sees less than half of what scores of whole series see (by VUS-PR, where it was measured).

    Attributes:
        alpha: The level of alarms.
        threshold: Their threshold.
    """

    def __init__(self, detector: ContractiveDetector, alpha: float | None = None) -> None:
        """Begin to follow.

        Args:
            detector: Fitted, on windows.
            alpha: The level of alarms; that of the detector by default.

        Raises:
            InputError: If the detector is of rows, or its calibration cannot hold the level.
        """
        if detector.window is None:
            raise InputError("rows that stand alone are not followed: the detector has no window.")
        self._detector, self._levels = detector, detector._causal_levels
        self.alpha = self._levels.level(detector.alpha if alpha is None else alpha)
        self.threshold = self._levels.threshold(self.alpha)
        self._scorer = detector._scorer()
        self._kept = np.zeros((0, self._scorer.channels), np.float32)
        self._last: Any = None

    def update(self, rows: Any, times: Any = None) -> Followed:
        """Score the next rows.

        Args:
            rows: Shape (rows, channels), in the units of the data; a row with a NaN is a gap.
            times: Their times, datetime64 or numbers; where the detector knows the step of its
                training, a longer one is a gap, too.

        Raises:
            InputError: If the times do not go on.
        """
        values = np.asarray(rows, np.float64)
        parts = [
            self._some(
                values[at : at + CHUNK_SIZE], None if times is None else times[at : at + CHUNK_SIZE]
            )
            for at in range(0, len(values), CHUNK_SIZE)
        ]
        scores = np.concatenate([np.zeros(0), *parts])
        return Followed(scores, self._levels.p_values(scores), alarms_of(scores, self.threshold))

    def _some(self, rows: np.ndarray, times: Any) -> np.ndarray:
        """Score at most as many rows as one call of the program takes."""
        size, scorer = self._scorer.size, self._scorer
        prepared = self._detector.standardization_.apply(rows)
        breaks = self._gaps(times, len(rows))
        x = np.concatenate([self._kept, prepared])
        before = len(self._kept)
        scores = np.full(len(rows), np.nan)
        ranges = _cut(segments(x), breaks + before) if _any_whole(x) else np.zeros((0, 2), int)
        if (ranges[:, 1] - ranges[:, 0] >= size).any():
            # What is missing belongs to no segment; zeros there are never looked at.
            measured = scorer.measure(np.nan_to_num(x), ranges)
            parts = scorer.parts(measured, "last", len(x), ranges)
            scores = combined(parts, self._detector.causal_scales_)[before:]
        first = max(0, len(x) - (size - 1), int(breaks[-1]) + before if len(breaks) else 0)
        self._kept = x[first:]
        return scores

    def _gaps(self, times: Any, count: int) -> np.ndarray:
        """Return the rows at which the series begins anew."""
        if times is None or not count:
            return np.zeros(0, int)
        given = np.asarray(times)
        all_of = given if self._last is None else np.concatenate([[self._last], given])
        steps = np.diff(all_of)
        dated = steps.dtype.kind == "m"
        steps = steps / np.timedelta64(1, "s") if dated else steps.astype(np.float64)
        if (steps <= 0).any() or np.isnan(steps).any():
            row = int(np.flatnonzero(~(steps > 0))[0]) + (self._last is None)
            raise InputError(f"the time {given[row]} does not come after the one before it.")
        begins_here = self._last is None
        self._last = given[-1]
        step = self._detector.step_
        if step is None:
            return np.zeros(0, int)
        return np.flatnonzero(steps > self._detector.gap * step) + begins_here


def _any_whole(x: np.ndarray) -> bool:
    return bool((~np.isnan(x).any(1)).any()) if len(x) else False


def _cut(ranges: np.ndarray, breaks: np.ndarray) -> np.ndarray:
    """Cut segments where the series begins anew."""
    pieces = []
    for start, stop in ranges.tolist():
        edges = [start, *(b for b in breaks.tolist() if start < b < stop), stop]
        pieces += list(pairwise(edges))
    return np.array(pieces, int).reshape(-1, 2)
