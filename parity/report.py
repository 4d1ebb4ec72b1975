"""Tell what was measured: a table for a person, Markdown and JSON for everyone else."""

import json
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from typing import Any, NamedTuple

import jax
import torch

from parity.compare import Row
from parity.tolerances import TABLE, Tolerance, find

REFERENCE = "PyTorch's exact penalties against one another"
METHODS = "jaxcae against PyTorch"
TRAINING = "training in jaxcae against training in PyTorch"
SECTIONS = (REFERENCE, METHODS, TRAINING)
SHOWN_STEPS = (1, 2, 5, 10, 20, 30)


class Line(NamedTuple):
    """The worst measurement of one section, tolerance and dtype."""

    section: str
    entry: Tolerance
    worst: Row
    measured: int
    breaches: int


def summarise(rows: Sequence[Row]) -> list[Line]:
    """Find the worst error for every section, tolerance and dtype, in a fixed order."""
    groups: dict[tuple[str, str, Tolerance], list[Row]] = {}
    for row in rows:
        key = section(row), row.dtype, find(row.quantity, row.case, row.method)
        groups.setdefault(key, []).append(row)
    lines = [
        Line(name, entry, max(found, key=severity), len(found), sum(not r.ok for r in found))
        for (name, _, entry), found in groups.items()
    ]
    return sorted(
        lines,
        key=lambda line: (
            SECTIONS.index(line.section),
            line.worst.dtype != "float64",
            bool(line.entry.cases),
            TABLE.index(line.entry),
        ),
    )


def section(row: Row) -> str:
    """Tell which of the three comparisons a row belongs to."""
    if row.method.startswith("torch"):
        return REFERENCE
    return TRAINING if row.case.startswith("training/") else METHODS


def severity(row: Row) -> float:
    """How much of its bound an error uses; a NaN is worse than anything."""
    return row.error / row.bound if row.error == row.error else float("inf")


def environment(device: str) -> dict[str, Any]:
    """Name the versions, devices and settings that the numbers belong to."""
    config: Any = jax.config  # its fields are not typed
    packages = ("jaxcae", "jax", "jaxlib", "torch", "optax", "numpy", "safetensors")
    return {
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in packages}},
        "machine": platform.machine(),
        "jax_device": jax.devices(device)[0].device_kind,
        "torch_device": torch.cuda.get_device_name() if device == "gpu" else "cpu",
        "jax_default_matmul_precision": config.jax_default_matmul_precision,
        "torch_allow_tf32": torch.backends.cuda.matmul.allow_tf32
        or torch.backends.cudnn.allow_tf32,
        "torch_threads": torch.get_num_threads(),
    }


def to_json(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """Write the report as JSON: the worst leaf of every quantity, and every breach."""
    worst: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        key = (row.case, row.method, row.quantity)
        if section(row) == TRAINING:
            key = (*key[:2], f"{row.quantity} {row.leaf}")
        if key not in worst or severity(row) > severity(worst[key]):
            worst[key] = row
    return json.dumps(
        {
            "passed": all(row.ok for row in rows),
            "measurements": len(rows),
            **about,
            "tolerances": [entry._asdict() for entry in TABLE],
            "rows": [_as_json(row) for row in worst.values()],
            "breaches": [_as_json(row) for row in rows if not row.ok],
        },
        indent=1,
        ensure_ascii=False,
        allow_nan=False,
    )


def to_markdown(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """Write the report as Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    text = [
        "# Parity report",
        "",
        verdict(rows) + f" {about['date']}, {about['seconds']:.0f} s.",
        "",
        f"{versions}. JAX on {about['jax_device']}, PyTorch on {about['torch_device']}, highest "
        "matrix-product precision, TF32 off.",
    ]
    for name, lines in groupby(summarise(rows), key=lambda line: line.section):
        text += ["", f"## {name[0].upper()}{name[1:]}", "", *_markdown_table(list(lines))]
    if tracks := drift_table(rows):
        text += ["", "## Drift, relative to the distance travelled, after each step", ""]
        text += ["| run | " + " | ".join(str(step) for step in SHOWN_STEPS) + " |"]
        text += ["| --- |" + " ---: |" * len(SHOWN_STEPS)]
        text += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in tracks]
    if breaches := [row for row in rows if not row.ok]:
        text += ["", "## Breaches", "", *(f"- {describe(row)}" for row in breaches)]
    text += ["", "## Why these bounds", "", "| quantity | reason |", "| --- | --- |"]
    text += [f"| {quantity_of(entry)} | {entry.reason} |" for entry in TABLE]
    return "\n".join(text) + "\n"


def drift_table(rows: Iterable[Row]) -> list[tuple[str, list[str]]]:
    """Lay out the drift of every training run over its steps."""
    tracks: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.quantity.startswith("drift"):
            name = f"{row.case.removeprefix('training/')}, {row.quantity.removeprefix('drift of ')}"
            tracks.setdefault(name, {})[row.leaf] = row.error
    return [
        (name, [f"{track[f'step {step}']:.1e}" for step in SHOWN_STEPS if f"step {step}" in track])
        for name, track in tracks.items()
    ]


def verdict(rows: Sequence[Row]) -> str:
    """Say in one sentence how it went."""
    cases, breaches = len({row.case for row in rows}), sum(not row.ok for row in rows)
    what = f"{len(rows):,} comparisons in {cases} cases"
    return (
        f"PASSED: {what}, all within bounds."
        if not breaches
        else (f"FAILED: {breaches:,} of {what} out of bounds.")
    )


def describe(row: Row) -> str:
    """Say in one line which measurement this is and how it went."""
    leaf = f" of {row.leaf}" if row.leaf else ""
    return (
        f"{row.case} by {row.method}: {row.quantity}{leaf}: {row.measure} error {row.error:.2e} "
        f"({row.epsilons:.3g} ε), bound {row.bound:.0e}"
    )


def _markdown_table(lines: list[Line]) -> list[str]:
    head = ["quantity", "dtype", "measure", "worst error", "in ε", "bound", "where"]
    rows = ["| " + " | ".join(head) + " |", "| --- | --- | --- | ---: | ---: | ---: | --- |"]
    for line in lines:
        worst = line.worst
        mark = "" if not line.breaches else f" **{line.breaches} breaches**"
        rows.append(
            f"| {quantity_of(line.entry)} | {worst.dtype} | {worst.measure} | {worst.error:.1e} | "
            f"{worst.epsilons:.1f} | {worst.bound:.0e} | {where(worst)}{mark} |"
        )
    return rows


def where(row: Row) -> str:
    """Name the case, method and leaf of a row."""
    case = row.case.removesuffix(f"/{row.dtype}")
    return " · ".join(part for part in (case, row.method, row.leaf) if part)


def quantity_of(entry: Tolerance) -> str:
    """Name the quantity of an entry, and its cases and methods where it is for some only."""
    only = ", ".join(filter(None, (entry.cases, entry.methods)))
    return f"{entry.quantity} [{only}]" if only else entry.quantity


def _as_json(row: Row) -> dict[str, Any]:
    error = row.error if row.error - row.error == 0 else str(row.error)
    epsilons = row.epsilons if row.error - row.error == 0 else str(row.epsilons)
    return {**row._asdict(), "error": error, "epsilons": epsilons, "ok": row.ok}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
