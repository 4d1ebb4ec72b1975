"""Recurrences: a scan whose step is read by the rules that the encoder is read by.

If the step of a `lax.scan` is a chain of affine and elementwise stages in what it carries and in
its slice of the sample, its Jacobian is a product of shared kernels and diagonals. Of a GRU with
update u, reset r and candidate m, for example (W the kernels from the carry),

    ∂h′/∂h = diag(u) + diag(∂h′/∂u) W_u + diag(∂h′/∂r) W_r + diag(∂h′/∂m) W_m,

one n × n matrix a step, made of shared kernels whose rows are scaled. k vectors then pass a step by
one product with it, where k pullbacks take one with each kernel. What is made is rematerialised in
the backward pass, so that of a step only slopes and the k vectors are held. Where the step is not
proved to be of this form, or more work would come of it, the scan stays what it is: opaque.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Var

from jaxcae.jacobian.jaxprs import (
    FlatProgram,
    evaluate,
    flatten,
    scan_arguments,
    shape_of,
    typed_like,
    variables,
)
from jaxcae.jacobian.rules import floating
from jaxcae.jacobian.stages import split_between
from jaxcae.jacobian.step import Stages, Vectors, add, pays
from jaxcae.jacobian.structure import Segment


class Cell(NamedTuple):
    """The step of a scan, proved to be affine and elementwise stages in what moves.

    Attributes:
        program: The step.
        values: What it closes over.
        sources: The variables of its inputs that depend on the sample: carries, then slices.
        sinks: The outputs that depend on it, by their positions.
        stages: What lies between.
        before: The equations that do not depend on the sample.
        fixed: Those of them that are the same in every step.
    """

    program: FlatProgram
    values: list[Any]
    sources: tuple[Var, ...]
    sinks: dict[int, Var]
    stages: tuple[Segment, ...]
    before: tuple[JaxprEqn, ...]
    fixed: tuple[JaxprEqn, ...]


def read_cell(eqn: JaxprEqn, moving: set[int]) -> Cell | None:
    """Read the step of a scan whose operands at these positions depend on the sample."""
    constants, carries = scan_arguments(eqn)
    if min(moving) < constants:
        return None
    program, values = flatten(eqn.params["jaxpr"])
    if program.effects or any(e.effects for e in program.equations):
        return None
    while True:  # every carry that the sample reaches in some step
        reached = _reached(program.equations, {program.inputs[i] for i in moving})
        more = {constants + j for j in range(carries) if program.outputs[j] in reached}
        if more <= moving:
            break
        moving = moving | more
    sources = tuple(program.inputs[i] for i in sorted(moving))
    sinks = {j: v for j, v in enumerate(program.outputs) if v in reached}
    if not floating(*(v.aval for v in (*sources, *sinks.values()))):
        return None
    dependent = [e for e in program.equations if not reached.isdisjoint(variables(e.invars))]
    stages = split_between(dependent, sources, tuple(sinks.values()))
    if not stages:
        return None
    inside = {id(e) for e in dependent}
    before = tuple(e for e in program.equations if id(e) not in inside)
    steps = _reached(before, set(program.inputs[constants:]))
    fixed = tuple(e for e in before if steps.isdisjoint(variables(e.invars)))
    segments = tuple(Segment(*stage) for stage in stages)
    for segment in segments:
        if segment.kind == "affine" and any(
            v in steps for e in segment.equations for v in variables(e.invars) if v not in reached
        ):
            return None  # a kernel of its own in every step
    return Cell(program, values, sources, sinks, segments, before, fixed)


def _reached(equations: Sequence[JaxprEqn], sources: set[Any]) -> set[Any]:
    found = set(sources)
    for eqn in equations:
        if not found.isdisjoint(variables(eqn.invars)):
            found.update(eqn.outvars)
    return found


def pull_back(
    segment: Segment, known: Mapping[Var, Any], arrays: Sequence[Any], rows: int, dtype: Any
) -> tuple[tuple[Any, ...], Callable[[Sequence[Any]], list[Any]]] | None:
    """Compute a segment that holds recurrences, and its transposed Jacobian; None without any."""
    cells = {
        where: cell for where, cell in _cells(segment).items() if cell and pays(cell.stages, rows)
    }
    if not cells:
        return None
    values = dict(known) | dict(zip(segment.inputs, arrays, strict=True))
    moving = set(segment.inputs)
    tape: list[Callable[[Vectors], None]] = []
    equations = list(segment.equations)
    while equations:
        cell = cells.get(id(equations[0]))
        if cell is not None:
            group = [equations.pop(0)]
            tape.append(_scan(group[0], cell, values, moving, rows, dtype))
        else:
            n = next((i for i, e in enumerate(equations) if id(e) in cells), len(equations))
            group, equations = equations[:n], equations[n:]
            wanted = {v for e in equations for v in variables(e.invars)} | set(segment.outputs)
            tape.append(_plain(group, wanted, values, moving))
        moving.update(v for e in group for v in e.outvars)

    def pull(cotangents: Sequence[Any]) -> list[Any]:
        vectors: Vectors = {}
        for v, cotangent in zip(segment.outputs, cotangents, strict=True):
            add(vectors, v, cotangent)
        for back in reversed(tape):
            back(vectors)
        return [
            vectors[v] if v in vectors else jnp.zeros(shape_of(v), dtype) for v in segment.inputs
        ]

    return tuple(values[v] for v in segment.outputs), pull


def _cells(segment: Segment) -> dict[int, Cell | None]:
    if "cells" not in segment.memory:
        found: dict[int, Cell | None] = {}
        moving = set(segment.inputs)
        for eqn in segment.equations:
            at = {i for i, v in enumerate(eqn.invars) if isinstance(v, Var) and v in moving}
            if at:
                moving.update(eqn.outvars)
                if eqn.primitive.name == "scan":
                    found[id(eqn)] = read_cell(eqn, at)
        segment.memory["cells"] = found
    return segment.memory["cells"]


def _plain(
    group: list[JaxprEqn], wanted: set[Var], values: dict[Any, Any], moving: set[Any]
) -> Callable[[Vectors], None]:
    """Run equations as JAX would, and pull back through them as JAX would."""
    entries = [
        v
        for v in dict.fromkeys(v for e in group for v in variables(e.invars))
        if v in moving and v in values and floating(v.aval)
    ]
    made = [v for e in group for v in e.outvars if v in wanted]
    exits = [v for v in made if floating(v.aval)]
    others = [v for v in made if not floating(v.aval)]

    def run(*arrays: Any) -> Any:
        at = values | dict(zip(entries, arrays, strict=True))
        found = evaluate(group, [*exits, *others], at)
        return found[: len(exits)], found[len(exits) :]

    results, pull, rest = jax.vjp(run, *(values[v] for v in entries), has_aux=True)
    kinds = dict(zip(exits, results, strict=True))

    def back(vectors: Vectors) -> None:
        if not any(v in vectors for v in exits):
            return
        cotangents = [
            typed_like(vectors.pop(v) if v in vectors else jnp.zeros_like(kinds[v]), kinds[v])
            for v in exits
        ]
        for v, cotangent in zip(entries, pull(cotangents), strict=True):
            add(vectors, v, cotangent)

    values.update(zip([*exits, *others], [*results, *rest], strict=True))
    return back


def _scan(
    eqn: JaxprEqn, cell: Cell, values: dict[Any, Any], moving: set[Any], rows: int, dtype: Any
) -> Callable[[Vectors], None]:
    """Run a scan and keep its slopes; pull vectors back through the steps in turn."""
    constants, carries = scan_arguments(eqn)
    operands = [values[v] if isinstance(v, Var) else v.val for v in eqn.invars]
    shared = dict(zip(cell.program.constants, cell.values, strict=True))
    shared |= dict(zip(cell.program.inputs, operands[:constants], strict=False))
    options = {"length": eqn.params["length"], "reverse": eqn.params["reverse"]}

    def forward(carry: Any, slices: Any) -> Any:
        at = shared | dict(zip(cell.program.inputs[constants:], [*carry, *slices], strict=True))
        slopes = _run(cell, at, dtype)
        out = [at[v] if isinstance(v, Var) else v.val for v in cell.program.outputs]
        return out[:carries], (out[carries:], slopes)

    carry, (ys, slopes) = jax.lax.scan(
        forward, operands[constants : constants + carries], operands[constants + carries :],
        unroll=eqn.params["unroll"], **options,
    )  # fmt: skip
    values.update(zip(eqn.outvars, [*carry, *ys], strict=True))
    made = [v for e in cell.fixed for v in e.outvars]
    shared.update(zip(made, evaluate(cell.fixed, made, shared), strict=True))
    stages = Stages(cell.stages, shared, rows, dtype)
    inputs = cell.program.inputs
    kept = {i: v for i, v in enumerate(inputs) if v in set(cell.sources)}
    carried = [i for i in kept if i < constants + carries]
    sliced = [i for i in kept if i >= constants + carries]

    def none(i: int) -> Any:
        """Make a cotangent of 0, which in a `jax.shard_map` varies as what it belongs to does."""
        like = carry[i - constants] if i < constants + carries else operands[i][0]
        return typed_like(jnp.zeros(shape_of(inputs[i])), like).reshape(-1).astype(dtype)

    def back(vectors: Vectors) -> None:
        found = {j: vectors.pop(eqn.outvars[j], None) for j in cell.sinks}
        if all(cotangent is None for cotangent in found.values()):
            return
        start = {i: none(i) for i in carried}
        for i in carried:
            cotangent = found.get(i - constants)
            if cotangent is not None:
                start[i] = start[i] + cotangent.astype(dtype).reshape(-1)
        given = {
            j: cotangent.astype(dtype).reshape(cotangent.shape[0], -1)
            for j, cotangent in found.items()
            if j >= carries and cotangent is not None
        }

        @jax.checkpoint
        def step(state: Any, at: Any) -> Any:
            given, slopes = at
            cotangents: Vectors = {}
            for j, v in cell.sinks.items():
                if j < carries:
                    add(cotangents, v, state[constants + j])
                elif j in given:
                    add(cotangents, v, given[j])
            pulled = stages.pull(cotangents, slopes)
            pulled = {i: pulled[inputs[i]] if inputs[i] in pulled else none(i) for i in kept}
            return {i: pulled[i] for i in carried}, {i: pulled[i] for i in sliced}

        options["reverse"] = not eqn.params["reverse"]
        state, slices = jax.lax.scan(step, start, (given, slopes), **options)
        for i, cotangent in (state | slices).items():
            v = eqn.invars[i]
            if isinstance(v, Var) and v in moving:
                add(vectors, v, cotangent.reshape(shape_of(v)))

    return back


def _run(cell: Cell, at: dict[Any, Any], dtype: Any) -> list[list[Any]]:
    """Take one step: add its values to what is known, return the slopes of each stage, by edge."""
    made = [v for e in cell.before for v in e.outvars]
    at.update(zip(made, evaluate(cell.before, made, at), strict=True))
    slopes: list[list[Any]] = []
    for stage in cell.stages:
        fixed = dict(at)

        def run(*arrays: Any, stage: Segment = stage, fixed: Any = fixed) -> list[Any]:
            known = fixed | dict(zip(stage.inputs, arrays, strict=True))
            return evaluate(stage.equations, stage.outputs, known)

        arrays = [at[v] for v in stage.inputs]
        if stage.kind == "affine":
            found = run(*arrays)
        else:
            found, pull = jax.vjp(run, *arrays)
            own = [edge for edge in stage.edges if not edge.is_identity]
            by_target = {
                j: pull([jnp.ones_like(a) if i == j else jnp.zeros_like(a)
                         for i, a in enumerate(found)])
                for j in dict.fromkeys(edge.target for edge in own)
            }  # fmt: skip
            slopes.append([by_target[e.target][e.source].astype(dtype).reshape(-1) for e in own])
        at.update(zip(stage.outputs, found, strict=True))
    return slopes
