"""What all pictures share: palette, headline, quiet axes, labels that keep clear of the data."""

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from jaxcae.files import write_atomic
from jaxcae.words import short

# Okabe and Ito's palette: distinct to colour-blind readers, and in print by its lightness.
BLUE, VERMILION, GREEN, PURPLE, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
INK, MUTED, FAINT = "#222222", "#6b6b6b", "#d9d9d9"

COLOURS = {"contractive": BLUE, "plain": VERMILION, "untrained": MUTED}
_DASHES: dict[str, Any] = {"plain": (0, (5, 2)), "untrained": (0, (1, 1.5))}
_SPARE = (GREEN, PURPLE, ORANGE)

_LARGEST = 1e30
"""Beyond this, squares and margins of what is drawn overflow."""

_LABEL_HEIGHT = 0.065
"""Height of a curve's label as a share of the axes, for panels about four inches high."""


def save_figure(figure: Figure, path: str | Path, dpi: int = 150) -> Path:
    """Write a figure as PNG, whole or not at all, and return its path.

    The same arrays give the same bytes: no date or version is stored in the file.
    """
    path = Path(path)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(
        buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None}
    )
    write_atomic(path, buffer.getvalue())
    return path


def save_each(directory: Path, makers: Mapping[str, Callable[[], Figure]]) -> list[Path]:
    """Draw and save each figure as `NAME.png`, and return the paths of those that could be.

    A picture is never worth a run: one that cannot be drawn is left out with a warning.
    """
    directory.mkdir(exist_ok=True)
    paths = []
    for name, make in makers.items():
        try:
            paths.append(save_figure(make(), directory / f"{name}.png"))
        except OSError:
            raise  # the disk is full or the directory gone: not the picture's fault
        except Exception as error:
            warnings.warn(
                f"{directory / name}.png is left out: {type(error).__name__}: {error}", stacklevel=2
            )
    return paths


def drawable(values: Any) -> np.ndarray:
    """Leave a gap (NaN) where a value is not finite, or beyond what axes can be laid out for."""
    array = np.asarray(values, dtype=float)
    return np.where(np.abs(array) <= _LARGEST, array, np.nan)


def left_out(*arrays: Any) -> str:
    """Say in a sentence, after a blank, that some values are not drawn; say nothing otherwise."""
    gaps = any(not (np.abs(np.asarray(array, dtype=float)) <= _LARGEST).all() for array in arrays)
    return " Values that are not finite are left out." if gaps else ""


def largest(values: np.ndarray) -> float:
    """Return the largest value that is not a gap; NaN if there is none."""
    kept = values[np.isfinite(values)]
    return float(kept.max()) if kept.size else math.nan


def empty_figure(title: str, word: str) -> Figure:
    """Make the picture of nothing, which says why."""
    figure = make_figure(6.4, 0.6, title, word)
    bare(figure.subplots())
    return figure


def span(axes: Axes, places: Any, margin: float = 0.5) -> None:
    """Let the x axis go from the first to the last place; a single one gets room beside it."""
    kept = drawable(places)
    kept = kept[np.isfinite(kept)]
    low, high = (float(kept.min()), float(kept.max())) if kept.size else (0.0, 1.0)
    axes.set_xlim(low, high) if high > low else axes.set_xlim(low - margin, high + margin)


def make_figure(width: float, height: float, title: str, subtitle: str) -> Figure:
    """Make a figure whose axes take `width` × `height` inches, below a headline."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    margin, gap, line = 0.14, 0.05, 1.25  # in inches, and in heights of the font
    bold: dict[str, Any] = {"fontsize": 12.5, "fontweight": "bold", "color": INK}
    light: dict[str, Any] = {"fontsize": 9, "color": MUTED}
    title = _wrap(figure, title, width - 2 * margin, bold)
    subtitle = _wrap(figure, subtitle, width - 2 * margin, light)
    below = margin + gap + line * bold["fontsize"] / 72 * (title.count("\n") + 1)
    band = below + line * light["fontsize"] / 72 * (subtitle.count("\n") + 1) + 0.1
    total = height + band
    figure.set_size_inches(width, total)
    figure.text(margin / width, 1 - margin / total, title, va="top", **bold)
    figure.text(margin / width, 1 - below / total, subtitle, va="top", **light)
    rect = (0.008, 0.01, 0.984, height / total - 0.01)
    figure.set_layout_engine(
        ConstrainedLayoutEngine(rect=rect, w_pad=0.06, h_pad=0.05, wspace=0.04)
    )
    return figure


def _wrap(figure: Figure, text: str, width: float, style: Mapping[str, Any]) -> str:
    """Break text into lines of at most so many inches, as this font draws them."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        drawn = figure.text(0, 0, longer, **style)
        fits = drawn.get_window_extent().width / figure.dpi <= width
        drawn.remove()
        if lines and fits:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def colour(name: str, among: Mapping[str, Any] | None = None) -> str:
    """Give a network its colour; networks without one of their own take turns."""
    if name in COLOURS:
        return COLOURS[name]
    others = [other for other in among or {} if other not in COLOURS]
    return _SPARE[others.index(name) % len(_SPARE)] if name in others else INK


def line_style(name: str, among: Mapping[str, Any]) -> dict[str, Any]:
    """Give a network its colour and its dashes: one of the two survives any printer."""
    return {"color": colour(name, among), "linestyle": _DASHES.get(name, "-")}


def quiet(axes: Axes, grid: bool = False) -> None:
    """Leave of the frame what helps to read the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(labelcolor=MUTED, color=FAINT, labelsize=9, length=3)
    axes.tick_params(which="minor", length=0)
    if grid:
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)


def bare(axes: Axes) -> None:
    """Leave nothing of the frame."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def name_axis(axes: Axes, x: str | None = None, y: str | None = None) -> None:
    """Label the axes."""
    if x is not None:
        axes.set_xlabel(x, color=INK, fontsize=10)
    if y is not None:
        axes.set_ylabel(y, color=INK, fontsize=10)


def whole_numbers(axis: Any, bins: int = 7) -> None:
    """Put ticks at round whole numbers."""
    axis.set_major_locator(MaxNLocator(bins, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def log_axis(axes: Axes, which: str) -> None:
    """Make an axis logarithmic, labelled 0.1, 1, 10 rather than by powers.

    Call it when the data is drawn: a short range gets ticks at 2 and 5 as well.
    """
    axis = axes.xaxis if which == "x" else axes.yaxis
    if not math.isfinite(axis.get_minpos()):
        # A logarithmic axis of nothing cannot be drawn.
        axes.annotate("nothing above 0", (0.5, 0.9), xycoords="axes fraction", ha="center",
                      fontsize=8, color=MUTED)  # fmt: skip
        return
    set_scale = axes.set_xscale if which == "x" else axes.set_yscale
    set_scale("log")
    low, high = sorted(axis.get_view_interval())
    subs = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    axis.set_major_locator(LogLocator(10, subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.set_minor_formatter(NullFormatter())


def label_ends(
    axes: Axes, curves: Mapping[str, Sequence[float] | np.ndarray], *, values: bool = True
) -> None:
    """Name each curve at its right end, the names apart where the ends are close.

    Call it when the scale and the limits of the axes are set.

    Args:
        axes: With the curves drawn; their last finite point is at the right edge.
        curves: Name to the values of the curve.
        values: Whether to give the last value as well.
    """
    ends, log = {}, axes.get_yscale() == "log"
    low, high = axes.get_ylim()
    for name, ys in curves.items():
        finite = drawable(ys)
        finite = finite[finite >= low] if log else finite[np.isfinite(finite)]
        if finite.size and low <= finite[-1] <= high:
            ends[name] = float(finite[-1])
    names = sorted(ends, key=lambda name: ends[name])
    heights = _spread([_height(axes, ends[name]) for name in names], _LABEL_HEIGHT)
    for name, height in zip(names, heights, strict=True):
        axes.annotate(
            f"{name} {short(ends[name])}" if values else name,
            (1.0, height),
            xycoords="axes fraction",
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            fontweight="bold",
            color=colour(name, curves),
        )


def mark_level(
    axes: Axes,
    level: float,
    text: str,
    curves: Sequence[np.ndarray],
    avoid: float | None = None,
) -> None:
    """Draw a horizontal line at a level in sight, named where the curves leave most room.

    Args:
        axes: With scale and limits set.
        level: Where, in data units.
        text: What the level means, in a few words.
        curves: The values drawn, each evenly over the width of the axes.
        avoid: A place on the x axis, in data units, that the words should not cross.
    """
    low, high = axes.get_ylim()
    if not low < level < high:
        return
    axes.axhline(level, color=MUTED, linewidth=0.8, zorder=1)
    at, width = _height(axes, level), 0.3
    barrier = 2.0 if avoid is None else _across(axes, avoid)
    spots = [
        (_room(axes, at + side * 0.03, curves, start, start + width), start, side)
        for side in (1, -1)
        for start in (0.0, 0.175, 0.35, 0.525, 0.7)
        if not start < barrier < start + width
    ]
    _, start, side = max(spots, key=lambda spot: spot[0])
    axes.annotate(
        text,
        (start + width / 2, level),
        xycoords=("axes fraction", "data"),
        xytext=(0, 2.5 * side),
        textcoords="offset points",
        ha="center",
        va="bottom" if side > 0 else "top",
        fontsize=8,
        color=MUTED,
    )


def mark_place(axes: Axes, place: float, text: str, curves: Sequence[float]) -> None:
    """Draw a vertical line, named to its left at the height where the curves leave most room.

    Args:
        axes: With scale and limits set.
        place: Where, in data units.
        text: What is there, in two lines.
        curves: The values of the curves at that place.
    """
    axes.axvline(place, color=MUTED, linewidth=0.8, zorder=1)
    heights = [_height(axes, value) for value in curves if np.isfinite(value)]
    candidates = np.linspace(0.08, 0.92, 15)
    gaps = np.abs(candidates[:, None] - np.array([-1.0, *heights])).min(axis=1)
    at = float(candidates[int(np.argmax(gaps))])
    axes.annotate(
        text,
        (place, at),
        xycoords=("data", "axes fraction"),
        xytext=(-4, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=8,
        color=MUTED,
    )


def _height(axes: Axes, value: float) -> float:
    """Translate a value into a share of the height of the axes."""
    return float(axes.transAxes.inverted().transform(axes.transData.transform((1, value)))[1])


def _across(axes: Axes, place: float) -> float:
    """Translate a place on the x axis into a share of the width of the axes."""
    point = axes.get_xaxis_transform().transform((place, 0))
    return float(axes.transAxes.inverted().transform(point)[0])


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move ascending heights as little as possible, in squares, for a gap between any two."""
    # Less its share of gaps, each height has only to be no lower than the one before: where it is,
    # the two are pooled at their mean.
    blocks: list[list[float]] = []
    for index, height in enumerate(heights):
        blocks.append([height - index * gap])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    level = [float(np.mean(block)) for block in blocks for _ in block]
    return [height + index * gap for index, height in enumerate(level)]


def _room(
    axes: Axes, height: float, curves: Sequence[np.ndarray], start: float, stop: float
) -> float:
    """Measure how far the curves stay from a height between two shares of the width."""
    gaps = [1.0]
    for curve in curves:
        part = curve[math.floor(start * len(curve)) : math.ceil(stop * len(curve))]
        gaps += [abs(_height(axes, float(v)) - height) for v in part if np.isfinite(v)]
    return min(gaps)
