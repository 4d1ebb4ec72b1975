"""Alarms that follow each other as events: from when to when, where to look, in which channel."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jaxcae.data.segments import runs


class Event(NamedTuple):
    """A stretch of alarms; rows are counted from 0.

    Attributes:
        start: The first row.
        end: The last row.
        peak: The row where the point error is largest: where to look first. (The score is smooth
            over a window, so its own peak says less.)
        channel: The channel with the largest share in that error, against what it is on normal
            rows.
        score: The highest score within.
        p_value: Its p-value.
    """

    start: int
    end: int
    peak: int
    channel: int
    score: float
    p_value: float


def find_events(
    alarms: Bool[np.ndarray, " rows"],
    scores: Float[np.ndarray, " rows"],
    p_values: Float[np.ndarray, " rows"],
    points: Float[np.ndarray, "rows channels"],
    usual: Float[np.ndarray, " channels"],
    join: int = 0,
) -> list[Event]:
    """Gather alarms into events.

    Args:
        alarms: One truth value a row.
        scores: One a row, high for an anomaly.
        p_values: One a row.
        points: The point error of each row by channel.
        usual: The mean point error of each channel on normal rows.
        join: Stretches with at most this many rows between them are one event.

    Returns:
        The events in order.
    """
    relative = points / np.where(usual > 0, usual, 1)
    # What lies between two stretches belongs to their event.
    stretches = runs(alarms)
    events: list[Event] = []
    first = 0
    for i, (_, stop) in enumerate(stretches):
        if i + 1 < len(stretches) and stretches[i + 1][0] - stop <= join:
            continue
        start = int(stretches[first][0])
        rows = np.arange(start, stop)
        peak = int(rows[np.argmax(np.nan_to_num(relative[start:stop].sum(1), nan=-1.0))])
        top = int(rows[np.nanargmax(scores[start:stop])])
        channel = int(np.argmax(np.nan_to_num(relative[peak], nan=-1.0)))
        events.append(
            Event(start, int(stop) - 1, peak, channel, float(scores[top]), float(p_values[top]))
        )
        first = i + 1
    return events


def alarms_of(scores: Any, threshold: float) -> Bool[np.ndarray, " rows"]:
    """Tell which scores are above the threshold; one that is NaN raises no alarm."""
    return np.asarray(scores) > threshold
