"""Expect the bytes that a plan takes, from shapes alone: before anything of it is traced.

What is counted: for a gradient, everything that the forward pass of the penalty makes, since its
backward pass reads it; for values alone, what one step reads and makes. Of an opaque part each
equation's results count, once for the sample and once for each vector pushed through. `cost.py`
counts a traced program more closely, and what is expected here is meant to be more, not less.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from jax.extend.core import JaxprEqn

from jaxcae.jacobian.cost import stored_by
from jaxcae.jacobian.directions import wide
from jaxcae.jacobian.jaxprs import shape_of, struct
from jaxcae.jacobian.plan import Form, Plan, Sweep
from jaxcae.jacobian.rules import floating
from jaxcae.jacobian.structure import Segment, Structure

_ALIVE = 2.0  # a value and its cotangent
_MARGIN = 2.0  # seen: 0.55 to 1.3 times what is counted in the traced program, without it


def opaque_rows(structure: Structure, plan: Plan) -> list[tuple[str, int]]:
    """List how many vectors the plan pushes through each opaque part, and from which end."""
    found = []
    for side, sweep in (("input", plan.from_input), ("output", plan.from_output)):
        for segment, rows, _, _ in _walk(structure, sweep, side):
            if segment is not None and segment.kind == "opaque":
                found.append((side, rows))
    return found


def of_plan(structure: Structure, plan: Plan, gradient: bool) -> tuple[float, float]:
    """Expect the bytes once a batch and for each sample."""
    item = _item(structure)
    once, each = [0.0], [0.0]
    for side, sweep in (("input", plan.from_input), ("output", plan.from_output)):
        for segment, rows, made, is_shared in _walk(structure, sweep, side):
            inner = 0.0
            if segment is not None and segment.kind == "opaque":
                inner = rows * made_by(segment.equations, gradient)
            (once if is_shared else each).append(made + inner)
    each.append(_met(plan, structure))
    forward = made_by([e for s in structure.segments for e in s.equations], gradient)
    # A backward pass in chunks adds up the gradient of what is shared, parameters included.
    held = sum(math.prod(shape_of(v)) for v in structure.program.flat.inputs[:-1])
    shared = (2.0 * _ALIVE * sum(once) + 2.0 * held) if gradient else 2.0 * sum(once)
    own = _ALIVE * (sum(each) + forward) if gradient else 3.0 * max(each) + forward
    return item * shared, _MARGIN * item * own


def of_directions(structure: Structure, gradient: bool) -> tuple[float, float]:
    """Expect the bytes for a sample, and for each direction of it."""
    equations = [e for s in structure.segments for e in s.equations]
    work = made_by(equations, gradient) + structure.in_size + structure.code_size
    factor = _ALIVE if gradient else 1.0
    each = factor * _item(structure) * work
    return _MARGIN * each, each


def made_by(equations: Sequence[JaxprEqn], gradient: bool) -> float:
    """Count the elements that the equations write, or the most that one writes and reads."""
    stored = stored_by(equations)
    sizes = [
        sum(math.prod(shape_of(v)) for v in eqn.outvars if v in stored and floating(v.aval))
        for eqn in equations
    ]
    if gradient:
        return float(sum(n * _repeats(eqn) for n, eqn in zip(sizes, equations, strict=True)))
    return 3.0 * max(sizes, default=0)


def _repeats(eqn: JaxprEqn) -> float:
    """A loop keeps what its body makes for each turn."""
    if eqn.primitive.name != "scan":
        return 1.0
    inner = made_by(eqn.params["jaxpr"].jaxpr.eqns, True)
    size = sum(math.prod(shape_of(v)) for v in eqn.outvars) or 1
    return 1.0 + inner * float(eqn.params["length"]) / size


def _walk(
    structure: Structure, sweep: Sweep, side: str
) -> Iterable[tuple[Segment | None, int, float, bool]]:
    """Yield for each move its segment, the vectors pushed, the elements made, and if shared."""
    segments: Sequence[Segment] = (
        structure.segments if side == "input" else (structure.segments[::-1])
    )
    form: Form = sweep.start
    shared, at, rows = True, 0, sweep.rows
    width = structure.in_size if side == "input" else structure.code_size
    for move in sweep.moves:
        if move == "gram":
            form = "gram"
            yield None, rows, float(width**2), shared
            continue
        segment, at = segments[at], at + 1
        before, width = (
            (segment.in_size, segment.out_size)
            if side == "input"
            else (segment.out_size, segment.in_size)
        )
        shared = shared and segment.kind == "affine"
        pushed = {"diagonal": before, "stack": rows, "gram": before + width}[form]
        if form == "diagonal" and move != "pass" and not segment.is_diagonal:
            form, rows = "stack", before
        made = {"diagonal": width, "stack": rows * width, "gram": width**2}[form]
        yield segment, pushed, float(made), shared


def _met(plan: Plan, structure: Structure) -> float:
    a, b = plan.from_input, plan.from_output
    if plan.across:
        segment = structure.segments[plan.position]
        if segment.rank is not None:  # columns and their images on both sides, slopes apart
            columns = segment.rank.columns
            return float((2 + 2 * columns * (1 + segment.rank.blocks)) * segment.in_size)
        return float(2 * sum(segment.in_sizes[edge.source] for edge in segment.edges))
    if a.form == b.form == "stack":
        return float(a.rows * b.rows)
    segments, at = structure.segments, plan.position
    width = segments[at].in_size if at < len(segments) else structure.code_size
    if "gram" in (a.form, b.form) and "stack" in (a.form, b.form):
        return float((a.rows if a.form == "stack" else b.rows) * width)
    return float(width)


def _item(structure: Structure) -> int:
    kinds: list[Any] = [v for segment in structure.segments for v in segment.outputs]
    return wide(structure.program.x.dtype, *(struct(v).dtype for v in kinds)).itemsize
