"""Two pictures: what a step costs by method, and what an estimator's accuracy costs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.estimators import CONTROL_VARIATE, INDEPENDENT, PROBE
from jaxcae.plotting.frame import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    VERMILION,
    log_axis,
    make_figure,
    name_axis,
    quiet,
    save_figure,
)
from jaxcae.words import short

_NAMES = {
    "plain": "no penalty (the unit)",
    "auto": "exact, jaxcae",
    "hutchinson": "one random projection",
    "reverse": "exact, reverse mode",
    "forward": "exact, forward mode",
    "vmap(jacrev)": "jax.vmap(jax.jacrev)",
    "vmap(jacfwd)": "jax.vmap(jax.jacfwd)",
    "jaxcae plain": "jaxcae: no penalty (the unit)",
    "jaxcae auto": "jaxcae: exact",
    "jaxcae hutchinson": "jaxcae: one random projection",
    "jaxcae reverse": "jaxcae: reverse mode",
    "torch plain": "PyTorch: no penalty",
    "torch closed form": "PyTorch: the same closed form",
    "torch closed form, compiled": "PyTorch: the same, torch.compile",
    "torch one projection": "PyTorch: one random projection",
    "torch vmap(jacrev)": "PyTorch: vmap(jacrev)",
    "torch vmap(jacfwd)": "PyTorch: vmap(jacfwd)",
    "torch grad per code unit": "PyTorch: grad per code unit",
    "torch 784 finite differences": "PyTorch: 784 finite differences*",
}


def draw(stored: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what the stored suites allow."""
    drawn = []
    for name in ("steps", "side_by_side"):
        if name in stored:
            drawn.append(cost(stored[name], folder / f"{name}.png"))
    if "estimators" in stored:
        drawn.append(estimators(stored["estimators"], folder / "estimators.png"))
    return drawn


def cost(suite: Mapping[str, Any], path: Path, group: str = "784-256-64, batch 128") -> Path:
    """Draw the cost of a training step by each method, in units of the plain step, log scale."""
    rows = [row for row in suite["rows"] if row["group"] == group]
    known = {row["name"] for row in rows}
    rows += [
        row
        for row in suite["rows"]
        if row["group"] == f"{group}, explicit Jacobians" and row["name"] not in known
    ]
    rows.sort(key=lambda row: row["times_unit"][0])
    exact = next(row for row in rows if row["name"] in ("auto", "jaxcae auto"))
    jacobian = [r["times_unit"][0] for r in rows if r["name"].endswith(("jacrev)", "reverse"))]
    title = f"The exact penalty costs {exact['times_unit'][0]:.1f} plain training steps"
    if jacobian:
        low, high = min(jacobian), max(jacobian)
        span = f"{low:.0f}" if round(low) == round(high) else f"{low:.0f} to {high:.0f}"
        title += f"; by the explicit Jacobian, {span}"
    at = suite["environment"]
    machine = f"{at['device']['platform']}, {at['host']['threads']} threads"
    subtitle = (
        f"One training step (loss and gradient), {group}, float32, {machine}; median, 95 % interval"
    )
    if any(row.get("check") == "differs" for row in rows):
        subtitle += ". * does not compute the penalty it is meant to"
    figure = make_figure(8.4, 0.36 * len(rows) + 0.9, title, subtitle)
    axes = figure.add_subplot()
    places = np.arange(len(rows))[::-1]
    values = [row["times_unit"][0] for row in rows]
    axes.barh(places, values, left=0, height=0.62, color=[_colour(row["name"]) for row in rows])
    for place, row in zip(places, rows, strict=True):
        value, low, high = row["times_unit"]
        axes.plot([low, high], [place, place], color=INK, linewidth=1.0, solid_capstyle="butt")
        axes.annotate(
            f"{short(float(f'{value:.2g}' if value < 100 else f'{value:.3g}'))} ×",
            (max(high, value), place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            fontweight="bold" if row is exact else "normal",
            color=INK,
        )
    axes.set_xlim(0.8, max(values) * 2.4)
    log_axis(axes, "x")
    axes.set_yticks(places, [_NAMES.get(row["name"], row["name"]) for row in rows])
    quiet(axes)
    axes.tick_params(axis="y", length=0, labelcolor=INK, labelsize=9.5)
    axes.spines["left"].set_visible(False)
    name_axis(axes, x="times a plain training step of jaxcae")
    return save_figure(figure, path)


def _colour(name: str) -> str:
    if "plain" in name:
        return MUTED
    if name in ("auto", "jaxcae auto"):
        return BLUE
    return VERMILION if name.startswith("torch") else ORANGE


_COLOURS = {"softplus": BLUE, "relu": VERMILION, "sigmoid": GREEN, "tanh": PURPLE}
_MARKS = {
    INDEPENDENT: ("independent", "o"),
    PROBE: ("1 probe", "o"),
    "hutchinson, 4 probes": ("4 probes", "o"),
    "hutchinson, 16 probes": ("16 probes", "o"),
    CONTROL_VARIATE: ("control variate", "D"),
}


def estimators(suite: Mapping[str, Any], path: Path) -> Path:
    """Draw the errors of each estimator against its cost: a column for each depth."""
    groups = list(dict.fromkeys(row["group"] for row in suite["rows"]))
    depths = list(dict.fromkeys(group.split(",")[0] for group in groups))
    gains = [_gain([r for r in suite["rows"] if r["group"] == group]) for group in groups]
    shares = [
        f"1/{1 / row['facts']['share_of_exact'][0]:.0f}"
        for row in suite["rows"]
        if row["name"] == CONTROL_VARIATE
    ]
    least, most = (short(float(f"{gain:.2g}")) for gain in (min(gains), max(gains)))
    title = (
        f"At {' or '.join(dict.fromkeys(shares))} of the exact price, the control variate leaves "
        f"{least} to {most} times less spread than one probe"
    )
    subtitle = (
        "Networks trained on 5,000 digits, 784-512-256-64 and deeper, batch 1,024. Above: spread "
        "of one draw for one sample; below: error of the batch's gradient, which probes balanced "
        "over the batch keep small. Dashed: the exact method's price"
    )
    wide = 5.2 * len(depths) + (1.0 if len(depths) == 1 else 0)
    figure = make_figure(wide, 7.4, title, subtitle)
    grid = figure.subplots(2, len(depths), squeeze=False, sharex="col", sharey="row")
    probes = [name for name in _MARKS if name.startswith("hutchinson")]
    panels = (
        ("spread, % of the mean norm", 0, (*probes, CONTROL_VARIATE), probes),
        ("gradient error, %", 1, tuple(_MARKS), [INDEPENDENT]),
    )
    for axes_row, (label, which, names, labelled) in zip(grid, panels, strict=True):
        points = _points(suite["rows"], which, names)
        of_depth = {
            depth: {key[1:]: at for key, at in points.items() if key[0] == depth}
            for depth in depths
        }
        for axes, depth in zip(axes_row, depths, strict=True):
            exact = next(
                row["times_unit"][0]
                for row in suite["rows"]
                if row["name"] == "exact" and row["group"].startswith(depth)
            )
            _panel(axes, of_depth[depth], exact)
        errors = [error for _, error in points.values()]
        axes_row[0].set_ylim(min(errors) / 2.5, max(errors) * 1.8)
        for axes, depth in zip(axes_row, depths, strict=True):
            log_axis(axes, "y")
            _label(axes, of_depth[depth], labelled)
        name_axis(axes_row[0], y=label)
    for top, bottom, depth in zip(*grid, depths, strict=True):
        top.set_title(depth, fontsize=10, color=INK, loc="left")
        name_axis(bottom, x="cost, in plain training steps")
    return save_figure(figure, path)


Points = dict[tuple[str, str, str], tuple[float, float]]
"""(depth, activation, estimator) to (cost, error in percent)."""


def _points(rows: Sequence[Mapping[str, Any]], which: int, names: Sequence[str]) -> Points:
    return {
        (*row["group"].split(", "), row["name"]): (row["times_unit"][0], 100 * row["errors"][which])
        for row in rows
        if row["name"] in names
    }


def _gain(rows: Sequence[Mapping[str, Any]]) -> float:
    spread = {row["name"]: row["errors"][0] for row in rows}
    return float(spread[PROBE] / spread[CONTROL_VARIATE])


def _panel(axes: Any, points: Mapping[tuple[str, str], tuple[float, float]], exact: float) -> None:
    """Draw errors of (activation, estimator) against cost, a colour for each activation."""
    axes.axvline(exact, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    for activation in dict.fromkeys(activation for activation, _ in points):
        colour = _COLOURS.get(activation, INK)
        own = {name: at for (of, name), at in points.items() if of == activation}
        probes = [at for name, at in own.items() if name.startswith("hutchinson")]
        axes.plot(*zip(*probes, strict=True), color=colour, linewidth=0.9, alpha=0.6)
        for name, at in own.items():
            mark = _MARKS[name][1]
            face = "none" if name == INDEPENDENT else colour
            axes.plot(*at, mark, color=colour, mfc=face, markersize=7 if mark == "D" else 5)
    axes.set_xlim(min(cost for cost, _ in points.values()) / 2, exact * 1.3)
    log_axis(axes, "x")
    quiet(axes)


def _label(
    axes: Any, points: Mapping[tuple[str, str], tuple[float, float]], names: Sequence[str]
) -> None:
    """Name the estimators, above all points but the diamonds, and the activations beside those."""
    for name in (*names, CONTROL_VARIATE):
        found = [at for (_, of), at in points.items() if of == name]
        if not found:
            continue
        below = name == CONTROL_VARIATE
        axes.annotate(
            _MARKS[name][0],
            (min if below else max)(found, key=lambda point: point[1]),
            xytext=(0, -15 if below else 8),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color=MUTED,
        )
    diamonds = {of: at for (of, name), at in points.items() if name == CONTROL_VARIATE}
    lowest = -math.inf  # the height, in points, of the name below
    for activation, at in sorted(diamonds.items(), key=lambda item: item[1][1]):
        height = float(axes.transData.transform(at)[1]) * 72 / axes.figure.dpi
        lift = max(0.0, lowest + 11 - height)
        lowest = height + lift
        axes.annotate(
            activation,
            at,
            xytext=(8, lift),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=_COLOURS.get(activation, INK),
            fontweight="bold",
        )
