"""Two pictures: what each recipe does to the true norm, or curvature, while it trains."""

import io
from itertools import pairwise
from statistics import mean
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from jaxcae.words import number

Styles = dict[str, tuple[str, float, str]]
"""Colour, width and label of each run. Those that do what they say are in one family of colours."""

STYLES: Styles = {
    "no penalty": ("#6b7280", 1.6, "no penalty, and\nno create_graph, and\ndetached weights"),
    "gradient of the summed outputs": ("#c2410c", 1.6, "gradient of the\nsummed outputs"),
    "finite differences, step 1e-6": ("#b91c1c", 1.6, "finite differences,\nstep 1e-6"),
    "finite differences, step 1e-2": ("#d97706", 1.6, "finite differences,\nstep 1e-2"),
    "exact": ("#1d4ed8", 2.8, "the exact\npenalty"),
    "L1 of the weights": ("#7c3aed", 1.6, "L1 of the weights:\nthe code dies"),
}
CURVED_STYLES: Styles = {
    "no penalty": ("#6b7280", 1.6, "no penalty"),
    "Hessian of the summed outputs": ("#c2410c", 1.6, "Hessian of the\nsummed outputs"),
    "noise form, one ε for the batch": ("#b91c1c", 1.6, "noise form, one ε\nfor the batch"),
    "noise form, an ε for each sample": ("#0d9488", 1.6, "noise form, an ε\nfor each sample"),
    "exact": ("#1d4ed8", 2.8, "the exact\ncurvature"),
}


class Words(NamedTuple):
    """What stands above a picture, and where its lines leave it at the bottom."""

    title: str
    subtitle: str
    floor: float


NORMS = Words(
    "One penalty, as seven pieces of code compute it",
    "The true ‖J(x)‖², mean of 512 held-out digits, while training with each. 784-256-64, "
    "ReLU; same start, same batches, λ = 0.001.",
    1e-4,  # the encoder no longer sees its input
)
CURVATURES = Words(
    "One curvature, as four pieces of code compute it",
    "The true ‖∇²h‖², mean of 512 held-out digits, training with each. 784-256-64, softplus; "
    "same start, same batches, γ = 0.001.",
    1e-3,
)


def draw_norms(runs: dict[str, list[float]]) -> bytes:
    """Draw the mean true ‖J‖² of held-out digits over training, one line per recipe, as PNG."""
    return _draw(runs, STYLES, NORMS)


def draw_curvatures(runs: dict[str, list[float]]) -> bytes:
    """Draw the mean true ‖∇²h‖² of held-out digits over training, likewise."""
    return _draw(runs, CURVED_STYLES, CURVATURES)


def _draw(runs: dict[str, list[float]], styles: Styles, words: Words) -> bytes:
    with plt.rc_context({"font.size": 10, "font.family": "DejaVu Sans"}):
        figure, axes = plt.subplots(figsize=(9, 5.4), dpi=160)
        steps = max(len(track) for track in runs.values()) - 1
        for name, track in runs.items():
            colour, width, _ = styles[name]
            axes.plot(range(len(track)), track, color=colour, lw=width, solid_capstyle="round")
        axes.set(yscale="log", xlim=(0, steps), xlabel="training step")
        axes.set_ylim(bottom=words.floor)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        figure.text(0.075, 0.945, words.title, fontsize=14, fontweight="bold")
        figure.text(0.075, 0.9, words.subtitle, fontsize=9, color="#4b5563")
        axes.grid(axis="y", color="#e5e7eb", lw=0.8)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="y", which="minor", length=0)
        label_ends(axes, runs, styles, words.floor)
        figure.subplots_adjust(left=0.075, right=0.8, top=0.87, bottom=0.11)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        plt.close(figure)
    return buffer.getvalue()


def label_ends(axes: Axes, runs: dict[str, list[float]], styles: Styles, floor: float) -> None:
    """Name every line at its right end, pushed apart where ends are close."""
    low, high = axes.get_ylim()
    axes.figure.canvas.draw()
    to_axes = axes.transScale.transform
    (_, bottom), (_, top) = to_axes((1, low)), to_axes((1, high))

    def height(value: float) -> float:
        return float((to_axes((1, max(value, floor)))[1] - bottom) / (top - bottom))

    ordered = sorted(runs.items(), key=lambda run: run[1][-1])
    rooms = [0.022 * (styles[name][2].count("\n") + 1) + 0.012 for name, _ in ordered]
    middles = apart([height(track[-1]) for _, track in ordered], rooms)
    for (name, track), middle in zip(ordered, middles, strict=True):
        colour, _, label = styles[name]
        axes.annotate(
            f"{label}  {number(track[-1], 2, trim=True)}",
            xy=(1, height(track[-1])),
            xytext=(1.025, middle),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            color=colour,
            fontsize=9,
            fontweight="bold" if name == "exact" else "normal",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.7, "relpos": (0, 0.5)}
            if track[-1] > floor
            else None,
        )


def apart(heights: list[float], rooms: list[float]) -> list[float]:
    """Move labels as little as leaves each its room above and below, in order, none below 0."""
    offsets = [rooms[0]]
    for lower, upper in pairwise(rooms):
        offsets.append(offsets[-1] + lower + upper)
    blocks: list[list[float]] = []  # of labels that touch, by what moves all of a block
    for height, offset in zip(heights, offsets, strict=True):
        blocks.append([height - offset])
        while len(blocks) > 1 and mean(blocks[-2]) > mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    moved = [max(mean(block), 0.0) for block in blocks for _ in block]
    return [base + offset for base, offset in zip(moved, offsets, strict=True)]
