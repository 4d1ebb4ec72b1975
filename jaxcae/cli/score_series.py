"""`jaxcae score` for a run on a series: one row of scores for each row of the data, and events."""

import csv
import io
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcae.cli.score import Arguments, preparation_of, table_of
from jaxcae.data import CATALOGUE
from jaxcae.data.readers import kind_of
from jaxcae.data.series import Series, open_series
from jaxcae.errors import InputError, printable
from jaxcae.files import write_atomic
from jaxcae.results.detection.events import Event
from jaxcae.results.detection.of_run import Assessment, assess, detector_of
from jaxcae.runs import Run
from jaxcae.runs.windowed import of_channels, sha256_of_rows
from jaxcae.words import number, short

_SHOWN = 5
WINDOW_VALUES = {
    "two_scale": "window_error",
    "reconstruction": "window_error",
    "neighbour": "neighbour_distance",
    "reconstruction+neighbour": "window_error_and_distance",
    "jacobian_norm": "jacobian_norm",
}
"""What the windows about a row say, by score."""


def run_series(arguments: Arguments, trained: Run) -> int:
    """Score a series, write the files, and print a summary."""
    detector = detector_of(trained, arguments.run_dir)
    detector._levels.level(arguments.alpha)  # before all the work
    series, filled = load(arguments, trained)
    usable = ~np.isnan(filled).any(1)
    try:
        result = assess(detector, filled, series.segments(usable), arguments.alpha)
    except InputError as error:
        text = str(error)
        named = text if text.startswith(series.name) else f"{series.name}: {text}"
        raise InputError(named) from None
    _check_finite(series.name, result)
    names = channel_names(series)
    assert arguments.output is not None
    kind = WINDOW_VALUES[trained.config.series.score]
    write_atomic(arguments.output, _scores_csv(arguments, series, result, names, kind))
    if arguments.events is not None:
        write_atomic(arguments.events, _events_csv(arguments, series, result, names))
    if arguments.plots is not None:
        _draw(arguments.plots, series, result, names, trained.config.series.score)
    if not arguments.json:
        _say(arguments, trained, series, usable)
    _print_summary(arguments, series, result, names)
    return 0


def load(arguments: Arguments, trained: Run) -> tuple[Series, np.ndarray]:
    """Return the series, and its rows with missing cells filled in where that was asked for.

    Raises:
        InputError: If it is not usable, or not of the channels of the run.
    """
    config = trained.config
    assert arguments.data is not None
    kind = "" if arguments.data in CATALOGUE else kind_of(Path(arguments.data))
    table = table_of(arguments, config, kind)
    series = open_series(
        arguments.data,
        table,
        max_gap=config.series.max_gap,
        normal_label=config.series.normal_label,
        max_bytes=arguments.max_bytes,
    )
    preparation = preparation_of(of_channels(trained.preparation, config), table.missing)
    channels = config.model.num_features // (config.series.window or 1)
    if series.values.shape[1] != channels:
        raise InputError(
            f"{series.name}: expected {channels} channels (from the run), the data has "
            f"{series.values.shape[1]}."
        )
    fill, values = preparation.fill, series.values
    return series, values if fill is None else np.where(np.isnan(values), fill, values)


def channel_names(series: Series) -> tuple[str, ...]:
    """Name the channels; by number, from 0, where they have no names."""
    names = series.dataset.feature_names
    return names or tuple(f"channel_{i}" for i in range(series.values.shape[1]))


def _check_finite(name: str, result: Assessment) -> None:
    if np.isinf(result.scores).any():
        row = int(np.flatnonzero(np.isinf(result.scores))[0])
        raise ArithmeticError(
            f"{name}: the score of row {row} (from 0) is infinite: values about it are too large "
            "for this network in float32."
        )


def when(arguments: Arguments, series: Series) -> tuple[str, Sequence[str]]:
    """Return the name of the column that tells rows apart, and its cells: times, or numbers."""
    times = series.times
    if times is None:
        return "row", [str(row) for row in range(len(series))]
    name = series.dataset.time_name or "time"
    texts = times.texts or [times.text(row) for row in range(len(series))]
    return name, texts


def _scores_csv(
    arguments: Arguments, series: Series, result: Assessment, names: Sequence[str], kind: str
) -> bytes:
    name, cells = when(arguments, series)
    points = result.points
    columns = {
        "score": result.scores,
        "p_value": result.p_values,
        "alarm": None,
        kind: result.window_values,
        "point_error": points.sum(1),
    }
    if len(names) > 1:
        columns |= {f"point_error:{n}": points[:, i] for i, n in enumerate(names)}
    columns |= {f"expected:{n}": result.expected[:, i] for i, n in enumerate(names)}
    texts = [
        map(str, result.alarms.astype(int).tolist()) if values is None else _digits(values)
        for values in columns.values()
    ]
    return encoded([name, *columns], zip(cells, *texts, strict=True))


def _digits(values: Any) -> Iterable[str]:
    return ("nan" if value != value else f"{value:.9g}" for value in values.tolist())


def encoded(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """Write a table as CSV."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue().encode()


_EVENT_COLUMNS = (
    "start", "end", "rows", "peak", "channel", "score", "p_value", "observed", "expected",
    "start_row", "end_row", "peak_row",
)  # fmt: skip


def _event(series: Series, cells: Sequence[str], result: Assessment, names: Any, e: Event) -> Any:
    observed, expected = series.values[e.peak, e.channel], result.expected[e.peak, e.channel]
    return {
        "start": cells[e.start],
        "end": cells[e.end],
        "rows": e.end - e.start + 1,
        "peak": cells[e.peak],
        "channel": names[e.channel],
        "score": e.score,
        "p_value": e.p_value,
        "observed": float(observed),
        "expected": float(expected),
        "start_row": e.start,
        "end_row": e.end,
        "peak_row": e.peak,
    }


def _events_csv(
    arguments: Arguments, series: Series, result: Assessment, names: Sequence[str]
) -> bytes:
    _, cells = when(arguments, series)
    rows = (_event(series, cells, result, names, event) for event in result.events)
    return encoded(
        _EVENT_COLUMNS,
        ([f"{v:.9g}" if isinstance(v, float) else v for v in row.values()] for row in rows),
    )


def _draw(
    folder: Path, series: Series, result: Assessment, names: Sequence[str], score: str
) -> None:
    from jaxcae import plotting

    places = None if series.times is None else series.times.values
    try:
        labels = series.anomalous
    except InputError:  # labels of whatever kind: the picture does without
        labels = None
    ranges = np.array([[e.start, e.end + 1] for e in result.events], int).reshape(-1, 2)
    figures: dict[str, Any] = {
        "series": lambda: plotting.series_scores(
            series.values,
            result.scores,
            result.threshold,
            ranges,
            places=places,
            segments=series.segments(np.ones(len(result.scores), bool)),
            names=names,
            labels=labels,
            score_name=score,
            alpha=result.alpha,
        )
    }
    strongest = sorted(result.events, key=lambda event: -event.score)[:_SHOWN]
    for rank, event in enumerate(strongest, start=1):
        figures[f"event-{rank}"] = lambda event=event: _closely(series, result, names, event)
    plotting.save_each(folder, figures)


def _closely(series: Series, result: Assessment, names: Sequence[str], event: Event) -> Any:
    from jaxcae import plotting

    margin = max(10, event.end - event.start + 1)
    rows = slice(max(0, event.start - margin), event.end + 1 + margin)
    first = rows.start
    error = np.nansum(result.points[event.start : event.end + 1], axis=0)
    places = np.arange(len(series)) if series.times is None else series.times.values
    at = series.times.text(event.peak) if series.times is not None else f"row {event.peak:,}"
    return plotting.event_closely(
        series.values[rows],
        result.expected[rows],
        (event.start - first, event.end + 1 - first),
        title=f"Event of {event.end - event.start + 1:,} rows, most at {printable(at)}: "
        f"p-value {short(event.p_value)}",
        places=places[rows],
        names=names,
        shares=error / max(error.sum(), 1e-300),
    )


def _say(arguments: Arguments, trained: Run, series: Series, usable: np.ndarray) -> None:
    """Tell on stderr what was taken, and of what to beware."""
    taken = [series.dataset.taken.rstrip("."), series.sampling]
    if any(taken):
        print("; ".join(t for t in taken if t) + ".", file=sys.stderr)
    settings = trained.config.series
    rows = settings.train_rows
    if rows <= len(series) and sha256_of_rows(series.values[:rows]) == settings.digest:
        print(
            f"{printable(series.name)}: its first {rows:,} rows are those of the run's training "
            "and calibration; scores there are lower than those of new rows.",
            file=sys.stderr,
        )


def _print_summary(
    arguments: Arguments, series: Series, result: Assessment, names: Sequence[str]
) -> None:
    _, cells = when(arguments, series)
    events = [_event(series, cells, result, names, event) for event in result.events]
    uncovered = int(np.isnan(result.scores).sum())
    if arguments.json:
        summary = {
            "output": str(arguments.output),
            "rows": len(series),
            "rows_without_score": uncovered,
            "alpha": result.alpha,
            "threshold": result.threshold,
            "alarms": int(result.alarms.sum()),
            "events": events,
        }
        print(json.dumps(summary, allow_nan=False))
        return
    told = f"{printable(arguments.output)}: {len(series):,} rows scored"
    if uncovered:
        told += f", {uncovered:,} of them nan, which no window covers"
    print(told)
    print(
        f"  {len(events):,} event{'s' * (len(events) != 1)}, {int(result.alarms.sum()):,} alarms "
        f"at α = {short(result.alpha)} (scores above {number(result.threshold)})"
    )
    strongest = sorted(events, key=lambda event: -event["score"])[:_SHOWN]
    for event in strongest:
        print(
            f"  {printable(event['start'])} to {printable(event['end'])}: {event['rows']:,} rows, "
            f"most at {printable(event['peak'])}, {printable(event['channel'])} "
            f"{short(event['observed'])} where {short(event['expected'])} was expected; "
            f"p-value {short(event['p_value'])}"
        )
    if len(events) > len(strongest):
        print(f"  and {len(events) - len(strongest):,} weaker ones (--events FILE lists all)")
