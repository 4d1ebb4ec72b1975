"""The page and the picture of `python -m benchmarks detection`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcae.files import read_json
from jaxcae.plotting.frame import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    VERMILION,
    make_figure,
    name_axis,
    quiet,
    save_figure,
)

Records = Sequence[Mapping[str, Any]]
_KINDS = (
    "two_scale", "reconstruction", "neighbour", "reconstruction+neighbour", "jacobian_norm",
    "reconstruction, causal", "reconstruction × ‖J‖²",
)  # fmt: skip
_COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE)


def read(file: Path) -> dict[str, Any]:
    """Read what has been measured, by set."""
    return dict(read_json(file)) if file.exists() else {}


def page(kept: Mapping[str, Any]) -> str:
    """Write the tables of all sets in Markdown."""
    parts = [
        "# How well anomalies are found",
        "",
        "By `python -m benchmarks detection`. Mean over seeds, ± the standard deviation between "
        "them; bold, the best of a table. Rows are those after the training part. VUS-PR is by "
        "aeon's rule. `jacobian_norm` of a plain network (λ none) is there to show what it says.",
    ]
    for name, measured in kept.items():
        where = measured["environment"]
        quick = " **A quick form, not to be quoted.**" if measured["quick"] else ""
        parts += ["", f"## {name}", "", f"{versions(where)}.{quick}"]
        for key, records in _tables(measured["records"]).items():
            parts += ["", *_table(key, records)]
    return "\n".join(parts) + "\n"


_SAID = ("jax", "jaxcae", "numpy", "scikit-learn")


def versions(environment: Mapping[str, Any]) -> str:
    """Name the versions that the figures depend on."""
    return ", ".join(f"{k} {v}" for k, v in sorted(environment["versions"].items()) if k in _SAID)


def _tables(records: Records) -> dict[tuple[str, Any], list[Mapping[str, Any]]]:
    found: dict[tuple[str, Any], list[Mapping[str, Any]]] = {}
    for record in records:
        found.setdefault((record["set"], record["window"]), []).append(record)
    return found


def _measure(records: Records) -> str:
    return "vus_pr" if "vus_pr" in records[0] else "roc_auc"


def _table(key: tuple[str, Any], records: Records) -> list[str]:
    name, window = key
    measure = _measure(records)
    networks = [r for r in records if "seed" in r]
    weights = list(dict.fromkeys(r["contraction"] for r in networks))
    kinds = [k for k in _KINDS if any(r["scores"] == k for r in networks)]
    cells = {
        (kind, weight): _of(networks, measure, kind, weight) for kind in kinds for weight in weights
    }
    simple = {r["scores"]: r[measure] for r in records if "seed" not in r}
    best = max([float(np.mean(v)) for v in cells.values()] + list(simple.values()))

    def shown(values: Sequence[float]) -> str:
        mean = float(np.mean(values))
        text = f"{mean:.3f}" + (f" ± {np.std(values):.3f}" if len(values) > 1 else "")
        return f"**{text}**" if mean > best - 5e-4 else text

    what = "VUS-PR" if measure == "vus_pr" else "ROC-AUC"
    title = f"{name}, {what}"
    if window:
        title += f", window {window}, buffer {records[0]['buffer']}"
    lines = [
        f"{title}:",
        "",
        "| scores by | "
        + " | ".join("λ none" if w is None else f"λ {w:g}" for w in weights)
        + " |",
        "| --- |" + " ---: |" * len(weights),
    ]
    for kind in kinds:
        row = " | ".join(shown(cells[kind, weight]) for weight in weights)
        lines.append(f"| {kind} | {row} |")
    told = ", ".join(f"{kind} {shown([value])}" for kind, value in simple.items())
    lines += ["", f"Simpler detectors: {told}."]
    rates = [r for r in networks if "alarms_on_normal_rows" in r and r["scores"] == "two_scale"]
    if rates:
        rate = np.mean([r["alarms_on_normal_rows"] for r in rates])
        lines += [
            "",
            f"Alarms by `two_scale` on normal rows that share no window with an anomaly: "
            f"{100 * rate:.1f} %, at the least α that the calibration holds, "
            f"{100 * rates[0]['alpha']:.1f} %.",
        ]
    return lines


def _of(records: Records, measure: str, kind: str, weight: Any) -> list[float]:
    return [r[measure] for r in records if r["scores"] == kind and r["contraction"] == weight]


def draw(kept: Mapping[str, Any], folder: Path) -> None:
    """Draw each set's scores over λ, with the simpler detectors as levels."""
    tables = {
        key: records
        for measured in kept.values()
        for key, records in _tables(measured["records"]).items()
        if len({r.get("contraction") for r in records if "seed" in r}) > 2
    }
    if not tables:
        return
    columns = 3
    lines = -(-len(tables) // columns)
    figure = make_figure(
        10.4,
        2.7 * lines,
        "Where contraction helps detection, and where PCA does as well",
        "VUS-PR of series, ROC-AUC of rows, over λ; bands: the lowest and highest of the seeds. "
        "Dashed: PCA with the same bookkeeping. Dotted: the nearest training window.",
    )
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    shown = ("two_scale", "reconstruction", "neighbour", "reconstruction+neighbour")
    for axes, (key, records) in zip(grid, tables.items(), strict=False):
        measure = _measure(records)
        networks = [r for r in records if "seed" in r]
        weights = list(dict.fromkeys(r["contraction"] for r in networks))
        kinds = [k for k in shown if any(r["scores"] == k for r in networks)]
        for kind, colour in zip(shown, _COLOURS, strict=False):
            if kind not in kinds:
                continue
            values = [_of(networks, measure, kind, weight) for weight in weights]
            places = np.arange(len(weights))
            axes.plot(places, [np.mean(v) for v in values], color=colour, label=kind, linewidth=1.8)
            low, high = [min(v) for v in values], [max(v) for v in values]
            axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
        for name, style in (("PCA, two scales", "--"), ("PCA", "--"), ("1-NN of windows", ":")):
            level = [r[measure] for r in records if r["scores"] == name and "seed" not in r]
            if level:
                axes.axhline(level[0], color=MUTED, linestyle=style, linewidth=1)
        axes.set_xticks(range(len(weights)), ["none" if w is None else f"{w:g}" for w in weights])
        axes.set_ylim(0, 1.03)
        quiet(axes, grid=True)
        title = key[0] if key[1] is None else f"{key[0]}, window {key[1]}"
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        name_axis(axes, x="λ")
    for axes in grid[len(tables) :]:
        axes.set_visible(False)
    handles = {h.get_label(): h for axes in grid for h in axes.get_legend_handles_labels()[0]}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles),
        frameon=False, fontsize=9,
    )  # fmt: skip
    save_figure(figure, folder / "detection.png", dpi=110)
