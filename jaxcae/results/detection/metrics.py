"""How good scores are against labels: areas under curves, events found, false alarms.

Point adjustment, which counts an event as wholly found where one of its rows is, is not among them:
by it, random numbers reach an F1 of 0.99 on an event of 350 rows.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jaxcae.data.segments import runs
from jaxcae.errors import InputError, is_finite

VUS_RULE = "aeon"
"""By whose rule the volume is taken; others give other numbers for the same scores."""
_THRESHOLDS = 250


class Volume(NamedTuple):
    """The volume under a surface of curves; see `vus`.

    Attributes:
        pr: Under precision-recall curves.
        roc: Under receiver operating characteristics.
        buffer: The longest buffer about an event, in rows.
        rule: By whose rule, `VUS_RULE`.
    """

    pr: float
    roc: float
    buffer: int
    rule: str = VUS_RULE


class Quality(NamedTuple):
    """What scores, and alarms where there are some, are worth against labels.

    Attributes:
        roc_auc: Area under the receiver operating characteristic, by rows.
        average_precision: Mean precision over recall, by rows.
        vus: The volume under the surface, with its rule and buffer.
        rows: Rows with a score; the others count in nothing.
        uncovered: Rows without one.
        events: Events in the labels, of which a row has a score.
        events_found: Events with an alarm in at least one row; None without alarms.
        false_alarms_per_1000: Alarms for 1,000 rows outside events; None without alarms.
    """

    roc_auc: float
    average_precision: float
    vus: Volume
    rows: int
    uncovered: int
    events: int
    events_found: int | None = None
    false_alarms_per_1000: float | None = None


def quality(labels: Any, scores: Any, buffer: int, alarms: Any = None) -> Quality:
    """Measure scores against labels.

    Args:
        labels: One a row, other than zero for an anomaly.
        scores: One a row, high for an anomaly; NaN for a row without one, which is left out.
        buffer: See `vus`.
        alarms: One truth value a row.

    Raises:
        InputError: If there are not as many of each, or there is no anomaly or nothing but.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    truth, values = _pair(labels, scores)
    known = ~np.isnan(values)
    truth, values = truth[known], values[known]
    volume = vus(truth, values, buffer)
    events = runs(truth)
    found = rate = None
    if alarms is not None:
        raised = np.asarray(alarms, bool)
        if raised.shape != known.shape:
            raise InputError(f"expected {len(known)} alarms, got shape {raised.shape}.")
        raised = raised[known]
        found = sum(bool(raised[start:stop].any()) for start, stop in events)
        rate = float(1000 * raised[~truth].mean())
    return Quality(
        float(roc_auc_score(truth, values)),
        float(average_precision_score(truth, values)),
        volume,
        len(values),
        int(np.sum(~known)),
        len(events),
        found,
        rate,
    )


def vus(labels: Any, scores: Any, buffer: int) -> Volume:
    """Compute the volume under the surface (VUS), as the package aeon does.

    For each buffer b from 0 to `buffer`, a label falls off on both sides of an event as √(1 − i/b)
    over i = 0 … b/2 − 1 rows. Precision and recall then count in parts of rows, the positives are
    the mean of the sums of both kinds of labels, recall is multiplied by the share of events that
    any row of finds, and curves go through 250 thresholds at even ranks of the scores. The volume
    is the mean area over the buffers.

    Scores by another rule are other numbers: 0.93 where this one gives 0.64 has been seen. Report
    rule and buffer with it. Scores that are all equal have a volume of 0.

    Args:
        labels: One a row, other than zero for an anomaly.
        scores: One finite number a row, high for an anomaly.
        buffer: Rows, at least 0; about the length of an event, or of a window.

    Raises:
        InputError: If there are not as many of each, a score is not finite, or there is no anomaly
            or nothing but.

    References:
        Paparrizos et al., "Volume Under the Surface", PVLDB 15 (2022),
        doi:10.14778/3551793.3551830.
    """
    if not (is_finite(buffer) and buffer >= 0 and int(buffer) == buffer):
        raise ValueError(f"buffer counts rows, at least 0, got {buffer!r}.")
    truth, values = _pair(labels, scores)
    if not np.isfinite(values).all():
        raise InputError(
            f"{int(np.sum(~np.isfinite(values)))} scores are not finite. Leave those rows out."
        )
    if truth.all() or not truth.any():
        which = "every row is" if truth.all() else "no row is"
        raise InputError(f"{which} labelled an anomaly: there is nothing to tell apart.")
    if values.min() == values.max():
        return Volume(0.0, 0.0, int(buffer))
    falling = np.argsort(-values, kind="stable")
    sorted_scores = values[falling]
    ranks = np.linspace(0, len(values) - 1, _THRESHOLDS, dtype=int)
    thresholds = sorted_scores[ranks]
    # How many scores are at or above each threshold.
    taken = np.searchsorted(-sorted_scores, -thresholds, side="right")
    areas = [_areas(truth, values, falling, thresholds, taken, b) for b in range(int(buffer) + 1)]
    pr, roc = np.mean(areas, axis=0)
    return Volume(float(pr), float(roc), int(buffer))


def _areas(
    truth: Bool[np.ndarray, " rows"],
    values: Float[np.ndarray, " rows"],
    falling: Any,
    thresholds: Float[np.ndarray, " thresholds"],
    taken: Any,
    buffer: int,
) -> tuple[float, float]:
    """Compute the areas under the two curves of one buffer."""
    soft = _softened(truth, buffer)
    positives = (truth.sum() + soft.sum()) / 2
    hits = np.cumsum(soft[falling])[taken - 1]
    highest = np.array([values[start:stop].max() for start, stop in runs(soft > 0)])
    existing = (highest[:, None] >= thresholds[None]).mean(axis=0)
    recall = np.concatenate([[0], np.minimum(hits / positives, 1) * existing, [1]])
    misses = np.minimum((taken - hits) / (len(values) - positives), 1)
    fall_out = np.concatenate([[0], misses, [1]])
    precision = np.concatenate([[1], hits / taken])
    # The last point, at a recall of 1, belongs to the second curve alone.
    return _trapezoids(recall[:-1], precision), _trapezoids(fall_out, recall)


def _softened(truth: Bool[np.ndarray, " rows"], buffer: int) -> Float[np.ndarray, " rows"]:
    """Let labels fall off on both sides of each event."""
    soft = truth.astype(np.float64)
    if buffer <= 1:
        return soft
    length = buffer // 2
    for start, stop in runs(truth):
        after = np.arange(stop - 1, min(stop - 1 + length, len(soft)))
        soft[after] += np.sqrt(1 - (after - (stop - 1)) / buffer)
        before = np.arange(max(start - length, 0), start)
        soft[before] += np.sqrt(1 - (start - before) / buffer)
    return np.minimum(soft, 1)


def _trapezoids(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float:
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2))


def _pair(labels: Any, scores: Any) -> tuple[np.ndarray, np.ndarray]:
    truth, values = np.asarray(labels), np.asarray(scores, np.float64)
    if truth.dtype.kind not in "biuf":
        raise InputError(
            f"labels are numbers, other than zero for an anomaly; got dtype {truth.dtype}. "
            "Compare them with the name of the normal class first."
        )
    if truth.ndim != 1 or truth.shape != values.shape:
        raise InputError(
            f"expected a label and a score a row, got shapes {truth.shape} and {values.shape}."
        )
    if truth.dtype.kind == "f" and np.isnan(truth).any():
        raise InputError(f"{int(np.isnan(truth).sum())} labels are missing. Leave those rows out.")
    return truth != 0, values
