"""A detector's scores beside those of simpler ones, on the same rows, by the same measures."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool

from jaxcae.data.series import Series
from jaxcae.data.windows import window_starts
from jaxcae.errors import InputError
from jaxcae.results.detection.baselines import baselines
from jaxcae.results.detection.metrics import quality
from jaxcae.results.detection.of_run import assess, uncalibrated
from jaxcae.runs import Outcome
from jaxcae.runs.config import PLAIN, main_network
from jaxcae.runs.windowed import Parts, windows_of


def compare(
    labels: Bool[np.ndarray, " rows"],
    scores: Mapping[str, Any],
    buffer: int | None,
    alarms: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure scores against labels, on the rows where all of them are known.

    Args:
        labels: Which rows are anomalous.
        scores: Name to one score a row, high for an anomaly; NaN where there is none.
        buffer: Rows of the longest buffer of VUS-PR; None leaves it out, where rows are no series.
        alarms: Name to one truth value a row, of those that raise alarms.

    Returns:
        JSON: `rows`, `anomalous_rows`, `events`, `uncovered_rows`, `vus` (rule and buffer), and
        `detectors`, name to its figures.

    Raises:
        InputError: If no row is labelled anomalous, or every one.
    """
    known = np.all([~np.isnan(values) for values in scores.values()], axis=0)
    figures: dict[str, Any] = {}
    some = None
    for name, values in scores.items():
        raised = None if alarms is None or name not in alarms else np.asarray(alarms[name])[known]
        some = quality(labels[known], np.asarray(values)[known], buffer or 0, raised)
        figures[name] = {
            "roc_auc": some.roc_auc,
            "average_precision": some.average_precision,
            "vus_pr": None if buffer is None else some.vus.pr,
            "events_found": some.events_found,
            "false_alarms_per_1000": some.false_alarms_per_1000,
        }
    if some is None:
        raise ValueError("expected scores, got none.")
    return {
        "rows": some.rows,
        "anomalous_rows": int(labels[known].sum()),
        "events": some.events,
        "uncovered_rows": int((~known).sum()),
        "vus": None if buffer is None else {"rule": some.vus.rule, "buffer": some.vus.buffer},
        "detectors": figures,
    }


def simpler(parts: Parts, size: int, series: Series | None = None, seed: int = 0) -> dict[str, Any]:
    """Score a series by the baselines, trained on the rows that a run trained on.

    Args:
        parts: The series of the run, and which of its rows are for what.
        size: Rows of a window.
        series: The series to score; that of the run unless given.
        seed: See `baselines`.
    """
    train = parts.values
    starts = window_starts(len(train), size, segments=parts.train)
    chosen = starts[np.linspace(0, len(starts) - 1, min(len(starts), 5000)).astype(int)]
    scored = parts.series if series is None else series
    x = parts.preparation.apply(scored.values)
    ranges = scored.segments(~np.isnan(x).any(1))
    return baselines(windows_of(train, chosen, size), x, ranges, seed)


def compare_run(outcome: Outcome) -> dict[str, Any] | None:
    """Compare the networks of a finished run with baselines, on labelled rows after its training.

    Returns:
        As `compare`; None where no row after the training is labelled anomalous, or all are.
    """
    config, parts = outcome.config, outcome.material.parts
    labels = None if parts is None else parts.series.anomalous
    if parts is None or labels is None:
        return None
    series, size = parts.series, config.series.window or 1
    rest = np.arange(len(series)) >= parts.train_rows
    if len(np.unique(labels[rest])) < 2:
        return None
    x = parts.filled
    try:
        ranges = series.segments(~np.isnan(x).any(1))
        scores: dict[str, Any] = {}
        alarms: dict[str, Any] = {}
        for network, params in outcome.params.items():
            if network == PLAIN != main_network(config) and config.series.score == "jacobian_norm":
                continue  # which says nothing of it
            detector = uncalibrated(config, outcome.model, params, outcome.material)
            detector._calibrate(parts.values, parts.calibration)
            found = assess(detector, x, ranges)
            name = f"{network} network"
            scores[name], alarms[name] = found.scores, found.alarms
        scores |= simpler(parts, size, seed=config.training.seed)
        after = {name: np.asarray(values)[rest] for name, values in scores.items()}
        raised = {name: values[rest] for name, values in alarms.items()}
        return compare(labels[rest], after, size, raised)
    except InputError:  # too few rows after the training for a window, or for both kinds of label
        return None
