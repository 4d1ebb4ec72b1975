"""Pictures of curves: training, the spectrum of the Jacobian, contraction over distance."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from jaxcae.plotting.frame import (
    INK,
    colour,
    drawable,
    label_ends,
    largest,
    left_out,
    line_style,
    log_axis,
    make_figure,
    mark_level,
    mark_place,
    name_axis,
    quiet,
    span,
    whole_numbers,
)
from jaxcae.plotting.words import comparison, trade
from jaxcae.words import short

Array = np.ndarray
_BOLD, _THIN = 2.2, 0.9


def training_curves(
    histories: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    reconstruction_label: str = "‖x − x̂‖²",
    kept: float | None = None,
) -> Figure:
    """Draw reconstruction and ‖J‖ over the epochs, apart, for each network.

    Args:
        histories: Name of a network to its curves. `epoch` is required; of `reconstruction`,
            `held_out_reconstruction` and `held_out_jacobian_norm` (mean ‖J‖_F) those present are
            drawn. A NaN leaves a gap, so that curves may begin at different epochs.
        reconstruction_label: What the reconstruction error is, or its unit.
        kept: The epoch that the headline is about, to be marked unless it is the last one.
    """
    curves = {
        name: {key: drawable(values) for key, values in history.items()}
        for name, history in histories.items()
    }
    epochs = np.concatenate([history["epoch"] for history in curves.values()])
    last = largest(epochs)
    kept = last if kept is None else kept
    title = trade(
        _values_at(curves, "held_out_jacobian_norm", kept),
        _values_at(curves, "held_out_reconstruction", kept),
    )
    subtitle = "Means per epoch. Bold: held-out samples. Thin: training samples."
    if kept < last:
        subtitle += f" The headline is of epoch {kept:,.0f}, the best, which was kept."
    figure = make_figure(10.2, 4.3, title, subtitle)
    left, right = figure.subplots(1, 2)
    for axes, heading, drawn in (
        (
            left,
            f"reconstruction error, {reconstruction_label}",
            {"reconstruction": _THIN, "held_out_reconstruction": _BOLD},
        ),
        (right, "sensitivity of the code, mean ‖J‖$_F$", {"held_out_jacobian_norm": _BOLD}),
    ):
        quiet(axes, grid=True)
        axes.set_title(heading, loc="left", fontsize=10, color=INK)
        for name, history in curves.items():
            for key, width in drawn.items():
                if key in history:
                    style = line_style(name, curves) | {"linewidth": width, "label": name}
                    alpha = 0.6 if width == _THIN else 1.0
                    axes.plot(history["epoch"], history[key], alpha=alpha, **style)
        name_axis(axes, x="epoch")
        whole_numbers(axes.xaxis)
        span(axes, epochs)
        log_axis(axes, "y")
        bold = list(drawn)[-1]
        if kept < last:
            mark_place(axes, kept, "best\nepoch", list(_values_at(curves, bold, kept).values()))
        label_ends(axes, {name: history.get(bold, []) for name, history in curves.items()})
    return figure


def singular_value_spectrum(
    spectra: Mapping[str, Any],
    *,
    dimensions: Mapping[str, float] | None = None,
    samples: int | None = None,
) -> Figure:
    """Draw the average singular values of J by rank, on a log scale.

    Args:
        spectra: Name of a network to `(mean, low, high)`, each of shape `(rank,)`, such as a
            `jaxcae.results.analysis.Spectrum`; or to the mean alone.
        dimensions: Mean effective dimension of each network, to be stated.
        samples: How many samples the average is over, to be stated.
    """
    bands = {name: np.atleast_2d(drawable(spectrum)) for name, spectrum in spectra.items()}
    first = {name: largest(band[0]) for name, band in bands.items()}
    title = comparison(first, "the largest singular value of J", "cuts", "raises")
    banded = len(next(iter(bands.values()))) > 1
    subtitle = f"Mean over {f'{samples:,} ' if samples else ''}held-out samples"
    subtitle += " and the middle 80%." if banded else "."
    if dimensions:
        told = ", ".join(f"{name} {short(value)}" for name, value in dimensions.items())
        subtitle += f" Effective dimension: {told}."
    figure = make_figure(7.8, 4.4, title, subtitle + left_out(*spectra.values()))
    axes = figure.subplots()
    # A log scale has no zero: what rounding makes of it in float32 is left out.
    floor = max(largest(np.array([*first.values(), 0.0])) * 1e-7, float(np.finfo(np.float32).tiny))
    means = {}
    for name, band in bands.items():
        ranks, shown = np.arange(1, band.shape[1] + 1), np.where(band > floor, band, np.nan)
        if len(band) > 1:
            shade: dict[str, Any] = {"color": colour(name, bands), "alpha": 0.16, "linewidth": 0}
            axes.fill_between(ranks, shown[1], shown[2], **shade)
        means[name] = shown[0]
        axes.plot(ranks, shown[0], linewidth=_BOLD, label=name, **line_style(name, bands))
    quiet(axes, grid=True)
    span(axes, [1, max(band.shape[1] for band in bands.values())])
    whole_numbers(axes.xaxis, 8)
    log_axis(axes, "y")
    name_axis(axes, "rank i of the singular value", "mean σ$_i$ (code units per input unit)")
    mark_level(axes, 1, "σ = 1, a step keeps its length", list(means.values()))
    label_ends(axes, means, values=False)
    return figure


def contraction_curves(
    radii: Float[Array, " radii"],
    ratios: Mapping[str, Float[Array, " radii"]],
    *,
    typical_distance: float | None = None,
    curvatures: Mapping[str, Float[Array, " radii"]] | None = None,
) -> Figure:
    """Draw how much the encoder shrinks a distance r, over r, both on log scales.

    Args:
        radii: The distances in input space, ascending.
        ratios: Name of a network to its mean ratio at each radius, from
            `jaxcae.results.analysis.contraction_ratios`.
        typical_distance: Distance between two samples, to be marked.
        curvatures: Name of a network to its mean curvature at each radius, from
            `curvature_curves`, to be drawn beside.
    """
    panels = [("ratio ‖h(x + ru) − h(x)‖ / r", ratios)]
    panels += [("curvature ‖∇²h(x + ru)‖$_F$", curvatures)] if curvatures else []
    subtitle = "Distance between two codes over that between their inputs"
    subtitle += ", and how much the encoder bends there" if curvatures else ""
    given = [values for _, curves in panels for values in curves.values()]
    subtitle += f": held-out samples and points around them.{left_out(radii, *given)}"
    radii = drawable(radii)
    nearest = {name: _first(values) for name, values in ratios.items()}
    title = comparison(nearest, "the ratio at small distances", "cuts", "raises")
    figure = make_figure(7.8 if len(panels) == 1 else 11.4, 4.2, title, subtitle)
    for axes, (label, given_curves) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        curves = {name: drawable(values) for name, values in given_curves.items()}
        _over_distance(axes, radii, curves, label, typical_distance, given_curves is ratios)
    return figure


def _first(values: Any) -> float:
    shown = drawable(values)
    return float(shown[0]) if shown.size else math.nan


def _over_distance(
    axes: Any,
    radii: Array,
    curves: Mapping[str, Array],
    label: str,
    typical_distance: float | None,
    is_ratio: bool,
) -> None:
    for name, values in curves.items():
        axes.plot(radii, values, linewidth=_BOLD, label=name, **line_style(name, curves))
    quiet(axes, grid=True)
    above = radii[radii > 0]
    span(axes, above, margin=0.5 * largest(above) if above.size else 0.5)
    log_axis(axes, "x")
    log_axis(axes, "y")
    name_axis(axes, "distance r between inputs", label)
    marked = typical_distance
    if marked is not None and not (above.size and above.min() <= marked <= above.max()):
        marked = None
    if is_ratio:
        mark_level(axes, 1, "ratio 1, a distance is kept", list(curves.values()), avoid=marked)
    if marked is not None:
        near = [float(np.interp(marked, radii, values)) for values in curves.values()]
        mark_place(axes, marked, "distance between\ntwo samples", near)
    label_ends(axes, curves)


def _values_at(
    curves: Mapping[str, Mapping[str, Array]], key: str, epoch: float
) -> dict[str, float]:
    """Take the last finite value up to an epoch of one curve of each network that has it."""
    values = {}
    for name, history in curves.items():
        if key in history:
            usable = np.isfinite(history[key]) & (history["epoch"] <= epoch)
            if usable.any():
                values[name] = float(history[key][usable][-1])
    return values
