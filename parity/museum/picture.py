"""One picture: what each recipe does to the true norm while it trains."""

import io

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# The two that do what they say in one family of colours, the others apart from it.
STYLES: dict[str, tuple[str, float, str]] = {
    "no penalty": ("#6b7280", 1.6, "no penalty\n= no create_graph\n= detached weights"),
    "gradient of the summed outputs": ("#c2410c", 1.6, "gradient of the\nsummed outputs"),
    "finite differences, step 1e-6": ("#b91c1c", 1.6, "finite differences,\nstep 1e-6"),
    "finite differences, step 1e-2": ("#d97706", 1.6, "finite differences,\nstep 1e-2"),
    "exact": ("#1d4ed8", 2.8, "exact ‖J‖²"),
    "L1 of the weights": ("#7c3aed", 1.6, "L1 of the weights"),
}
FLOOR = 1e-4  # below it a norm is drawn at the edge: the encoder no longer sees its input


def draw(runs: dict[str, list[float]]) -> bytes:
    """Draw the mean true ‖J‖² of held-out digits over training, one line per recipe, as PNG."""
    with plt.rc_context({"font.size": 10, "font.family": "DejaVu Sans"}):
        figure, axes = plt.subplots(figsize=(9, 5.4), dpi=160)
        steps = max(len(track) for track in runs.values()) - 1
        for name, track in runs.items():
            colour, width, _ = STYLES[name]
            shown = [max(value, FLOOR) for value in track]
            axes.plot(range(len(shown)), shown, color=colour, lw=width, solid_capstyle="round")
        axes.set(yscale="log", xlim=(0, steps), xlabel="training step")
        axes.set_ylim(bottom=FLOOR)
        figure.suptitle(
            "Only the exact penalty contracts what it says it does",
            x=0.075,
            ha="left",
            fontsize=14,
            fontweight="bold",
        )
        axes.set_title(
            "mean true ‖J(x)‖² of 512 held-out digits · 784-256-64, ReLU · "
            "same start, same batches, λ = 0.001",
            loc="left",
            fontsize=9.5,
            color="#4b5563",
        )
        axes.grid(axis="y", color="#e5e7eb", lw=0.8)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="y", which="minor", length=0)
        label_ends(axes, runs, steps)
        figure.subplots_adjust(left=0.075, right=0.79, top=0.86, bottom=0.11)
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
            f"{label}  {track[-1]:.2g}",
            xy=(1, height(track[-1])),
            xytext=(1.025, middle),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            color=colour,
            fontsize=9,
            fontweight="bold" if name == "exact" else "normal",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.7, "shrinkA": 1, "shrinkB": 1},
        )
