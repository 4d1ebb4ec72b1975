"""One picture: what each recipe does to the true norm while it trains."""

import io

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from jaxcae.words import number

# The two that do what they say in one family of colours, the others apart from it.
STYLES: dict[str, tuple[str, float, str]] = {
    "no penalty": ("#6b7280", 1.6, "no penalty, and\nno create_graph, and\ndetached weights"),
    "gradient of the summed outputs": ("#c2410c", 1.6, "gradient of the\nsummed outputs"),
    "finite differences, step 1e-6": ("#b91c1c", 1.6, "finite differences,\nstep 1e-6"),
    "finite differences, step 1e-2": ("#d97706", 1.6, "finite differences,\nstep 1e-2"),
    "exact": ("#1d4ed8", 2.8, "the exact\npenalty"),
    "L1 of the weights": ("#7c3aed", 1.6, "L1 of the weights:\nthe code dies"),
}
FLOOR = 1e-4  # lines leave the picture here: the encoder no longer sees its input


def draw(runs: dict[str, list[float]]) -> bytes:
    """Draw the mean true ‖J‖² of held-out digits over training, one line per recipe, as PNG."""
    with plt.rc_context({"font.size": 10, "font.family": "DejaVu Sans"}):
        figure, axes = plt.subplots(figsize=(9, 5.4), dpi=160)
        steps = max(len(track) for track in runs.values()) - 1
        for name, track in runs.items():
            colour, width, _ = STYLES[name]
            axes.plot(range(len(track)), track, color=colour, lw=width, solid_capstyle="round")
        axes.set(yscale="log", xlim=(0, steps), xlabel="training step")
        axes.set_ylim(bottom=FLOOR)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        figure.text(
            0.075,
            0.945,
            "One penalty, as seven pieces of code compute it",
            fontsize=14,
            fontweight="bold",
        )
        figure.text(
            0.075,
            0.9,
            "The true ‖J(x)‖², mean of 512 held-out digits, while training with each. 784-256-64, "
            "ReLU; same start, same batches, λ = 0.001.",
            fontsize=9,
            color="#4b5563",
        )
        axes.grid(axis="y", color="#e5e7eb", lw=0.8)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="y", which="minor", length=0)
        label_ends(axes, runs, steps)
        figure.subplots_adjust(left=0.075, right=0.8, top=0.87, bottom=0.11)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        plt.close(figure)
    return buffer.getvalue()


def label_ends(axes: Axes, runs: dict[str, list[float]], steps: int) -> None:
    """Name every line at its right end, pushed apart where ends are close."""
    low, high = axes.get_ylim()
    axes.figure.canvas.draw()
    to_axes = axes.transScale.transform
    (_, bottom), (_, top) = to_axes((1, low)), to_axes((1, high))

    def height(value: float) -> float:
        return float((to_axes((1, max(value, FLOOR)))[1] - bottom) / (top - bottom))

    taken = -1.0
    for name, track in sorted(runs.items(), key=lambda run: run[1][-1]):
        colour, _, label = STYLES[name]
        lines = label.count("\n") + 1
        room = 0.022 * lines + 0.012
        middle = max(height(track[-1]), taken + room, room)
        taken = middle + room
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
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.7, "shrinkA": 1, "shrinkB": 1}
            if track[-1] > FLOOR
            else None,
        )
