"""Two pictures: what a step costs by method, and what an estimator's accuracy costs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import figure as number
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
            f"{number(float(f'{value:.2g}' if value < 100 else f'{value:.3g}'))} ×",
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
    "hutchinson, 1 probe": ("1 probe", "o"),
    "hutchinson, 4 probes": ("4 probes", "o"),
    "hutchinson, 16 probes": ("16 probes", "o"),
    "control variate, 1 probe": ("control variate", "D"),
}


def estimators(suite: Mapping[str, Any], path: Path) -> Path:
    """Draw the spread of each estimator against its cost, one panel for each depth."""
    groups = list(dict.fromkeys(row["group"] for row in suite["rows"]))
    depths = list(dict.fromkeys(group.split(",")[0] for group in groups))
    gains = [_gain([r for r in suite["rows"] if r["group"] == group]) for group in groups]
    share = next(
        row["facts"]["share_of_exact"][0]
        for row in suite["rows"]
        if row["name"] == "control variate, 1 probe"
    )
    least, most = (number(float(f"{gain:.2g}")) for gain in (min(gains), max(gains)))
    title = (
        f"At 1/{1 / share:.0f} of the exact price, the control variate leaves {least} to {most} "
        "times less spread than one probe"
    )
    subtitle = (
        "Networks trained on 5,000 digits, 784-512-256-64 and deeper, batch 1,024; spread of one "
        "draw for one sample, relative to the mean norm; dashed: the exact method's price"
    )
    figure = make_figure(5.2 * len(depths) + (1.0 if len(depths) == 1 else 0), 3.9, title, subtitle)
    axes_row = figure.subplots(1, len(depths), squeeze=False, sharey=True)[0]
    for axes, depth in zip(axes_row, depths, strict=True):
        _panel(axes, depth, [row for row in suite["rows"] if row["group"].startswith(depth)])
    name_axis(axes_row[0], y="spread, % of the mean norm")
    return save_figure(figure, path)


def _gain(rows: Sequence[Mapping[str, Any]]) -> float:
    spread = {row["name"]: row["errors"][0] for row in rows}
    return float(spread["hutchinson, 1 probe"] / spread["control variate, 1 probe"])


def _panel(axes: Any, depth: str, rows: Sequence[Mapping[str, Any]]) -> None:
    activations = list(dict.fromkeys(row["group"].split(", ")[1] for row in rows))
    exact = next(row["times_unit"][0] for row in rows if row["name"] == "exact")
    axes.axvline(exact, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    highest: dict[str, tuple[float, float]] = {}
    for activation in activations:
        found = {r["name"]: r for r in rows if r["group"].endswith(f", {activation}")}
        probes = [found[name] for name in _MARKS if name.startswith("hutchinson")]
        colour = _COLOURS.get(activation, INK)
        axes.plot(
            [row["times_unit"][0] for row in probes],
            [100 * row["errors"][0] for row in probes],
            color=colour,
            linewidth=0.9,
            alpha=0.6,
        )
        for name, (_, mark) in _MARKS.items():
            at = found[name]["times_unit"][0], 100 * found[name]["errors"][0]
            axes.plot(*at, mark, color=colour, markersize=7 if mark == "D" else 5)
            highest[name] = max(highest.get(name, at), at, key=lambda point: point[1])
        last = found["control variate, 1 probe"]
        axes.annotate(
            activation,
            (last["times_unit"][0], 100 * last["errors"][0]),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=colour,
            fontweight="bold",
        )
    for name, (label, _) in _MARKS.items():
        axes.annotate(
            label,
            highest[name],
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color=MUTED,
        )
    cheapest = min(row["times_unit"][0] for row in rows)
    spreads = [100 * row["errors"][0] for row in rows if row["name"] in _MARKS]
    axes.set_xlim(cheapest / 2, exact * 1.3)
    axes.set_ylim(min(spreads) / 1.6, max(spreads) * 1.8)
    log_axis(axes, "x")
    log_axis(axes, "y")
    axes.set_title(depth, fontsize=10, color=INK, loc="left")
    quiet(axes)
    name_axis(axes, x="cost, in plain training steps")
