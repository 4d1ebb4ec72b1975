"""Pictures of a series: its channels, its score with threshold and events; and of one event."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure

from jaxcae.plotting.frame import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    VERMILION,
    drawable,
    make_figure,
    name_axis,
    quiet,
    whole_numbers,
)
from jaxcae.words import short

MOST_CHANNELS = 6
_BINS = 1500
"""Across the width of a picture; of more rows, the smallest and largest of each bin are drawn."""


def series_scores(
    values: Float[np.ndarray, "rows channels"],
    scores: Float[np.ndarray, " rows"],
    threshold: float,
    events: Int[np.ndarray, "events 2"],
    *,
    places: Any = None,
    segments: Int[np.ndarray, "segments 2"] | None = None,
    names: Sequence[str] | None = None,
    labels: Bool[np.ndarray, " rows"] | None = None,
    score_name: str = "score",
    alpha: float | None = None,
) -> Figure:
    """Draw a series above its score, with the threshold and the events that alarms make.

    Args:
        values: The series in its own units; NaN leaves a gap.
        scores: One a row, high for an anomaly; NaN where there is none.
        threshold: Alarms are above it.
        events: Half-open ranges of rows.
        places: Where rows are on the x axis: datetime64 or numbers; their number unless given.
        segments: Half-open ranges of rows between gaps in time, which no line crosses.
        names: Names of the channels.
        labels: Which rows are known to be anomalous, drawn as bars below the score.
        score_name: Which score it is.
        alpha: The level of the alarms.
    """
    count = values.shape[1]
    shown = min(count, MOST_CHANNELS)
    found, rows = len(events), len(scores)
    title = f"{found:,} event{'s' * (found != 1)} in {rows:,} rows"
    title += "" if alpha is None else f" at α = {short(alpha)}"
    subtitle = f"Below: the score ({score_name}), and the threshold of alarms. Shaded: events."
    if labels is not None:
        subtitle += f" Bars at the bottom: rows labelled anomalous ({int(labels.sum()):,})."
    if count > shown:
        subtitle += f" {count - shown} of {count} channels are not shown."
    if not np.isfinite(scores).all():
        subtitle += f" {int((~np.isfinite(scores)).sum()):,} rows have no score."
    figure = make_figure(10.2, 1.25 * shown + 2.0, title, subtitle)
    heights = [1.0] * shown + [1.6]
    panels = figure.subplots(shown + 1, 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    places = np.arange(rows) if places is None else np.asarray(places)
    for channel, axes in enumerate(panels[:-1]):
        _draw(axes, places, values[:, channel], segments, INK, 0.7)
        name_axis(axes, y=_name(names, channel, count))
    axes = panels[-1]
    _draw(axes, places, scores, segments, BLUE, 1.0)
    axes.axhline(threshold, color=VERMILION, linewidth=1, linestyle=(0, (5, 2)))
    axes.annotate(
        f"threshold {short(threshold)}",
        (0.995, threshold),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=VERMILION,
    )
    name_axis(axes, y="score")
    for axes in panels:
        quiet(axes)
        for start, stop in events.tolist():
            axes.axvspan(*_edges(places, start, stop), color=ORANGE, alpha=0.35, linewidth=0)
    if labels is not None and labels.any():
        _bars(panels[-1], places, labels)
    _place_axis(panels[-1], places)
    return figure


def event_closely(
    observed: Float[np.ndarray, "rows channels"],
    expected: Float[np.ndarray, "rows channels"],
    event: tuple[int, int],
    *,
    title: str,
    places: Any = None,
    names: Sequence[str] | None = None,
    shares: Float[np.ndarray, " channels"] | None = None,
) -> Figure:
    """Draw what was there about an event and what the network expected, per channel.

    Args:
        observed: Rows about the event, in their own units.
        expected: What the network makes of them; NaN where no window covers a row.
        event: Its rows among these, half-open.
        title: What it is.
        places: Where rows are on the x axis, as in `series_scores`.
        names: Names of the channels.
        shares: How much of the error each channel has, adding up to 1; the largest come first.
    """
    count = observed.shape[1]
    order = np.arange(count) if shares is None else np.argsort(-np.nan_to_num(shares))
    shown = order[:MOST_CHANNELS]
    subtitle = "Solid: what was there. Dashed: what the network expected. Shaded: the event."
    if count > 1 and shares is not None:
        subtitle += " Channels by their share of the error."
    if count > len(shown):
        subtitle += f" {count - len(shown)} of {count} channels are not shown."
    figure = make_figure(8.2, 1.5 * len(shown) + 0.9, title, subtitle)
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    places = np.arange(len(observed)) if places is None else np.asarray(places)
    for channel, axes in zip(shown.tolist(), panels, strict=True):
        axes.plot(places, drawable(observed[:, channel]), color=INK, linewidth=1.4)
        axes.plot(
            places,
            drawable(expected[:, channel]),
            color=BLUE,
            linewidth=1.4,
            linestyle=(0, (4, 1.5)),
        )
        quiet(axes, grid=True)
        name_axis(axes, y=_name(names, channel, count))
        axes.axvspan(*_edges(places, *event), color=ORANGE, alpha=0.25, linewidth=0)
        if shares is not None and count > 1:
            axes.set_title(
                f"{100 * np.nan_to_num(shares[channel]):.0f} % of the error",
                loc="right",
                fontsize=8,
                color=MUTED,
            )
    _place_axis(panels[-1], places)
    return figure


def _draw(
    axes: Axes, places: Any, values: np.ndarray, segments: Any, colour: str, width: float
) -> None:
    """Draw a curve in its segments; of more rows than there are pixels, their range in each bin."""
    for start, stop in [(0, len(values))] if segments is None else segments.tolist():
        bins = max(1, _BINS * (stop - start) // len(values))
        _draw_segment(axes, places[start:stop], drawable(values[start:stop]), bins, colour, width)


def _draw_segment(
    axes: Axes, places: Any, kept: np.ndarray, bins: int, colour: str, width: float
) -> None:
    if len(kept) <= 2 * bins:
        axes.plot(places, kept, color=colour, linewidth=width)
        return
    edges = np.linspace(0, len(kept), bins + 1).astype(int)[:-1]
    known = ~np.isnan(kept)
    some = np.add.reduceat(known, edges) > 0
    low = np.minimum.reduceat(np.where(known, kept, np.inf), edges)
    high = np.maximum.reduceat(np.where(known, kept, -np.inf), edges)
    low, high = np.where(some, low, np.nan), np.where(some, high, np.nan)
    axes.fill_between(places[edges], low, high, color=colour, linewidth=width, step="mid")


def _edges(places: Any, start: int, stop: int) -> tuple[Any, Any]:
    """Return where a range of rows begins and ends, half a row about it."""
    last = len(places) - 1
    if last == 0:
        return places[0], places[0]
    before = places[max(start - 1, 0)] if start else places[0]
    after = places[min(stop, last)]
    first, end = places[start], places[min(stop - 1, last)]
    return first - (first - before) / 2, end + (after - end) / 2


def _bars(axes: Axes, places: Any, labels: np.ndarray) -> None:
    jumps = np.flatnonzero(np.diff(np.concatenate([[0], labels.astype(int), [0]])))
    for start, stop in jumps.reshape(-1, 2).tolist():
        axes.axvspan(*_edges(places, start, stop), ymax=0.05, color=INK, linewidth=1.2)


def _place_axis(axes: Axes, places: Any) -> None:
    if places.dtype.kind == "M":
        locator = AutoDateLocator()
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
        axes.xaxis.get_offset_text().set(color=MUTED, fontsize=9)
    else:
        whole_numbers(axes.xaxis)
        name_axis(axes, x="row" if places.dtype.kind in "iu" else "time")
    if len(places) > 1:
        axes.set_xlim(places[0], places[-1])


def _name(names: Sequence[str] | None, channel: int, count: int) -> str:
    if names:
        name = names[channel].replace("$", r"\$")
        return name if len(name) <= 18 else f"{name[:17]}…"
    return "value" if count == 1 else f"channel {channel}"
