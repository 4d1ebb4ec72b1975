"""How does the cost grow? Sweeps over d, k, h and B, with slopes fitted in log-log.

The claim to settle: of two layers, neither d nor k appears in what the penalty costs per sample.
It is settled by XLA's count of operations, not by the clock. Per sample, the penalty's share of a
step is (step − plain step) at two batch sizes, divided by their difference: what does not depend on
the batch cancels, and so does what the plain step does anyway.
"""

import functools
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from benchmarks import methods
from benchmarks.harness import Outcome, Row, Settings, compare
from benchmarks.steps import SHALLOW

TITLE = "Scaling: how the cost of a step grows with d, k, h and B"
BATCH = 128
SWEEPS: dict[str, tuple[int, ...]] = {
    "d": (196, 392, 784, 1568, 3136),
    "k": (16, 32, 64, 128),
    "h": (64, 128, 256, 512),
    "B": (32, 128, 512, 2048),
}
TIMED = ("plain", "auto", "hutchinson", "reverse")
COUNTED = ("auto", "hutchinson", "reverse", "forward")


def run(settings: Settings) -> Outcome:
    """Count and time all of each sweep, or its ends and middle."""
    rows: list[Row] = []
    notes: list[str] = []
    for axis, sweep in SWEEPS.items():
        values = sweep if settings.full else (sweep[0], sweep[len(sweep) // 2], sweep[-1])
        counts: dict[str, list[float]] = {}
        for name in COUNTED if axis != "B" else ():
            counts[name] = [per_sample_flops(shape_of(axis, value)[0], name) for value in values]
        for name, found in counts.items():
            notes.append(
                f"{name}, operations of the penalty per sample against {axis}: slope "
                f"{slope(values, found):+.2f} ({found[0]:,.0f} at {values[0]:,}, {found[-1]:,.0f} "
                f"at {values[-1]:,})."
            )
        measured = [row for value in values for row in _time(axis, value, settings)]
        for name in TIMED:
            ys = [row.seconds for row in measured if row.name == name]
            notes.append(
                f"{name}, seconds per step against {axis}: slope {slope(values, ys):+.2f}."
            )
        for row in measured:
            at = values.index(row.facts["value"])
            if row.name in counts:
                row = replace(row, facts=row.facts | {"per_sample_flops": counts[row.name][at]})
            rows.append(row)
    return Outcome(rows, notes)


def shape_of(axis: str, value: int) -> tuple[tuple[int, int, int], int]:
    """Put the value in place of one of d, h, k and B; return sizes and batch."""
    d, h, k = SHALLOW
    at = {"d": d, "h": h, "k": k, "B": BATCH} | {axis: value}
    return (at["d"], at["h"], at["k"]), at["B"]


def per_sample_flops(sizes: tuple[int, ...], method: str) -> float:
    """Count, before optimisation, the penalty's operations per sample in value and gradient."""
    few, many = 64, 128
    return (_extra(sizes, method, many) - _extra(sizes, method, few)) / (many - few)


def _extra(sizes: tuple[int, ...], method: str, batch: int) -> float:
    return _count(sizes, method, batch) - _count(sizes, "plain", batch)


@functools.cache
def _count(sizes: tuple[int, ...], method: str, batch: int) -> float:
    model, params, xs = methods.network(sizes, batch)
    step = jax.jit(methods.step(model, method))
    costs: Any = step.lower(params, xs, jax.random.key(0)).cost_analysis()
    return float(costs["flops"])


def _time(axis: str, value: int, settings: Settings) -> list[Row]:
    sizes, batch = shape_of(axis, value)
    model, params, xs = methods.network(sizes, batch)
    subjects = [methods.step_subject(model, params, xs, name) for name in TIMED]
    reference = methods.answer(methods.step(model, "reverse", chunk_size=8), params, xs)
    facts = {"axis": axis, "value": value}
    return compare(f"{axis} = {value:,}", subjects, settings, reference, facts=facts)


def slope(xs: Any, ys: Any) -> float:
    """Fit the exponent p of y ∝ x^p."""
    return float(np.polyfit(np.log(np.asarray(xs, float)), np.log(np.asarray(ys, float)), 1)[0])
