"""Pictures of single things: samples beside their reconstructions, and first-layer filters."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from jaxcae.plotting.frame import (
    INK,
    MUTED,
    bare,
    colour,
    drawable,
    empty_figure,
    largest,
    left_out,
    line_style,
    make_figure,
    name_axis,
    quiet,
    whole_numbers,
)
from jaxcae.plotting.words import comparison
from jaxcae.words import short

Array = np.ndarray


def reconstructions(
    originals: Float[Array, "samples features"],
    reconstructed: Mapping[str, Float[Array, "samples features"]],
    *,
    feature_shape: Sequence[int] | None = None,
    errors: Mapping[str, float] | None = None,
    feature_names: Sequence[str] | None = None,
) -> Figure:
    """Draw samples beside their reconstructions: images in rows, other data as traces.

    Args:
        originals: The samples to draw: ten images or six traces make a good picture.
        reconstructed: Name of a network to its reconstructions of these samples.
        feature_shape: Shape of a sample if it is an image, `(height, width)` or
            `(height, width, channels)`; None for anything else.
        errors: Mean reconstruction error of each network over all held-out samples; by default
            the mean of ‖x − x̂‖² over the samples shown.
        feature_names: Names of the features, for the axis of a trace of 16 or fewer.
    """
    gaps = left_out(originals, *reconstructed.values())
    originals = drawable(originals)
    reconstructed = {name: drawable(xs) for name, xs in reconstructed.items()}
    if not len(originals):
        return empty_figure("Reconstructions", "There are no samples to draw.")
    over = "all held-out samples" if errors else "the samples shown"
    errors = errors or {
        name: float(np.mean(np.sum((originals - xs) ** 2, axis=1)))
        for name, xs in reconstructed.items()
    }
    title = comparison(errors, "the reconstruction error", "lowers", "raises")
    told = f"errors are means over {over}.{gaps}"
    if is_image(feature_shape):
        subtitle = f"Held-out samples, and what each network makes of them; {told}"
        return _image_rows(originals, reconstructed, feature_shape, errors, title, subtitle)
    subtitle = (
        f"One held-out sample per panel: dots are its features, lines reconstructions; {told}"
    )
    return _traces(originals, reconstructed, feature_names, title, subtitle)


def first_layer_filters(
    filters: Mapping[str, Float[Array, "units features"]],
    *,
    activity: Mapping[str, Float[Array, " units"]] | None = None,
    feature_shape: Sequence[int] | None = None,
    max_units: int = 64,
    feature_names: Sequence[str] | None = None,
) -> Figure:
    """Draw the input weights of the first layer's units, those that do most first.

    For images there is a tile per unit, for other data a row of a heat map. Zero is white, the
    sign is the colour, and each network has a scale of its own, which is drawn below it.

    Args:
        filters: Name of a network to its weights.
        activity: How much each unit's output varies over samples. Units that vary most come first,
            and those that do not vary at all are left out of the headline: a ReLU that is never on
            keeps the weights that it was given at random. Without it, largest ‖w‖ first.
        feature_shape: Shape of a sample if it is an image, else None.
        max_units: Draw so many units at most.
        feature_names: Names of the features, for the axis of a heat map of 16 or fewer.
    """
    gaps = left_out(*filters.values())
    filters = {name: drawable(ws) for name, ws in filters.items()}
    if not all(map(len, filters.values())):
        return empty_figure("First-layer filters", "There are no units to draw.")
    norms = {name: np.linalg.norm(ws, axis=1) for name, ws in filters.items()}
    ranks = norms if activity is None else {name: drawable(activity[name]) for name in filters}
    medians = {
        name: float(np.median(norms[name][rank > 0])) if (rank > 0).any() else 0.0
        for name, rank in ranks.items()
    }
    what = f"the median norm ‖w‖ of {'active ' if activity else ''}filters"
    title = comparison(medians, what, "cuts", "raises")
    image = is_image(feature_shape)
    order_label = "‖w‖" if activity is None else "how much they vary"
    figure = make_figure(
        max(6.4, 5.1 * len(filters)),
        5.75 if image else 4.6,
        title,
        _filters_subtitle(ranks, activity is not None, max_units) + gaps,
    )
    grid = figure.subplots(1, len(filters), squeeze=False)[0]
    for axes, (name, ws) in zip(grid, filters.items(), strict=True):
        order = np.argsort(-ranks[name], kind="stable")[:max_units]
        # The very largest weights may saturate, so that one of them does not pale all others.
        sizes = np.abs(ws[order])[np.isfinite(ws[order])]
        limit = (float(np.quantile(sizes, 0.995)) if sizes.size else 0.0) or 1.0
        drawn = axes.imshow(
            _tiles(ws[order], feature_shape) if image else ws[order],
            cmap="PRGn",
            norm=Normalize(-limit, limit),
            aspect="equal" if image else "auto",
            interpolation="nearest",
        )
        axes.set_title(name, loc="left", fontsize=11, fontweight="bold", color=colour(name))
        if image:
            bare(axes)
        else:
            quiet(axes)
            _feature_axis(axes, ws.shape[1], feature_names)
            name_axis(axes, y=f"unit, by {order_label}")
        bar = figure.colorbar(
            drawn, ax=axes, orientation="horizontal", shrink=0.5, aspect=40, pad=0.03
        )
        bar.set_ticks([-limit, 0, limit], labels=[f"−{short(limit)}", "0", short(limit)])
        bar.ax.tick_params(labelsize=8, length=0, labelcolor=MUTED)
        bar.outline.set_visible(False)
        bar.set_label("weight", fontsize=8, color=MUTED, labelpad=1)
    return figure


def _filters_subtitle(ranks: Mapping[str, Array], by_activity: bool, max_units: int) -> str:
    units = len(next(iter(ranks.values())))
    if by_activity:
        chosen = f"all {units}" if units <= max_units else f"the {max_units} most active of {units}"
        order = "by how much they vary over held-out samples"
        still = {name: int(np.sum(rank == 0)) for name, rank in ranks.items()}
        told = " and ".join(f"{count} of {name}" for name, count in still.items() if count)
        note = f" Units that never vary: {told}." if told else ""
    else:
        chosen = f"all {units}" if units <= max_units else f"the {max_units} largest of {units}"
        order, note = "by ‖w‖", ""
    return (
        f"Weights from the input to {chosen} units of the first layer, {order}.{note} "
        "Green adds, purple subtracts; each network has its own scale."
    )


def is_image(shape: Sequence[int] | None) -> bool:
    """Tell whether a feature shape is one of an image."""
    return shape is not None and len(shape) in (2, 3) and min(shape[:2]) > 1


def _image_rows(
    originals: Array,
    reconstructed: Mapping[str, Array],
    shape: Any,
    errors: Mapping[str, float],
    title: str,
    subtitle: str,
) -> Figure:
    rows = {"original": originals, **reconstructed}
    width = max(6.4, 0.92 * len(originals) + 1.5)
    figure = make_figure(width, 0.98 * len(rows), title, subtitle)
    grid = figure.subplots(len(rows), len(originals), squeeze=False)
    # One scale for all rows, from the originals: what is washed out is to look so.
    scale = Normalize(-largest(-originals), largest(originals))
    for line, (name, samples) in zip(grid, rows.items(), strict=True):
        for axes, sample in zip(line, samples, strict=True):
            picture = sample.reshape(shape)
            if picture.ndim == 3 and picture.shape[2] == 1:
                picture = picture[..., 0]
            if picture.ndim == 3:
                axes.imshow(np.clip(scale(picture), 0, 1), interpolation="nearest")
            else:
                axes.imshow(picture, cmap="gray_r", norm=scale, interpolation="nearest")
            bare(axes)
        line[0].set_ylabel(
            f"{name}\nerror {short(errors[name])}" if name in errors else name,
            rotation=0,
            ha="right",
            va="center",
            labelpad=10,
            fontsize=10,
            fontweight="bold",
            color=colour(name, reconstructed),
        )
    return figure


def _traces(
    originals: Array,
    reconstructed: Mapping[str, Array],
    feature_names: Sequence[str] | None,
    title: str,
    subtitle: str,
) -> Figure:
    count, features = originals.shape
    columns = min(3, count)
    rows = math.ceil(count / columns)
    figure = make_figure(max(6.4, 3.5 * columns), 2.1 * rows + 0.3, title, subtitle)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for number, axes in enumerate(grid.flat):
        if number >= count:
            axes.set_visible(False)
            continue
        for name, xs in reconstructed.items():
            axes.plot(xs[number], linewidth=1.6, label=name, **line_style(name, reconstructed))
        axes.plot(originals[number], "o", color=INK, markersize=3.2, label="original")
        quiet(axes, grid=True)
        if number + columns >= count:
            axes.xaxis.set_tick_params(labelbottom=True)
            _feature_axis(axes, features, feature_names)
        if number % columns == 0:
            name_axis(axes, y="feature value")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=len(labels),
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
    )
    return figure


def _feature_axis(axes: Axes, features: int, names: Sequence[str] | None) -> None:
    if names and features <= 16:
        axes.set_xticks(range(features), labels=list(names), rotation=40, ha="right", fontsize=8)
    else:
        whole_numbers(axes.xaxis)
        name_axis(axes, x="feature")


def _tiles(filters: Array, shape: Any) -> Array:
    """Lay images out in a near-square grid, a blank pixel apart; channels are averaged."""
    images = filters.reshape(len(filters), *shape)
    if images.ndim == 4:
        images = images.mean(-1)
    height, width = images.shape[1:]
    columns = math.ceil(math.sqrt(len(images) * height / width))
    rows = math.ceil(len(images) / columns)
    canvas = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1), np.nan)
    for number, image in enumerate(images):
        top, left = (number // columns) * (height + 1), (number % columns) * (width + 1)
        canvas[top : top + height, left : left + width] = image
    return canvas
