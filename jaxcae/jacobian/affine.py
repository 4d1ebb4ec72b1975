"""The matrix of an affine segment, taken from the parameters where it stands there already.

For each array that goes in, follow its basis vectors through the equations: what only moves or
scales elements keeps one entry a row; a product with a parameter then is that parameter, its rows
moved and scaled. Anything else waits until a product with a parameter comes, and is then taken from
the smaller side: its d rows pushed forward, or the parameter's h columns pulled back.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Var
from jaxtyping import Array, Float

from jaxcae.jacobian.cost import flops
from jaxcae.jacobian.jaxprs import evaluate, shape_of, struct, typed_like, variables
from jaxcae.jacobian.proofs import keeps_order
from jaxcae.jacobian.rows import Known, Rows
from jaxcae.jacobian.structure import Segment, size_of

_PLAIN = frozenset(
    """copy copy_p convert_element_type device_put mesh_cast name pcast pvary reshard
    sharding_constraint""".split()
)


_KEEP_ONE = frozenset(
    "broadcast_in_dim convert_element_type integer_pow reshape rsqrt sqrt square squeeze".split()
)


def recipe(segment: Segment) -> list[list[Rows | None]]:
    """Find out how each block of the kernel is had: from each array in, to each array out."""
    if "recipe" not in segment.memory:
        segment.memory["recipe"] = [_follow(segment, v) for v in segment.inputs]
    return segment.memory["recipe"]


def is_identity(segment: Segment) -> bool:
    """Tell whether the kernel is the identity: a normalisation without centring, a mere shift."""
    if len(segment.inputs) != 1 or len(segment.outputs) != 1:
        return False
    rows = recipe(segment)[0][0]
    return rows is not None and rows.is_identity


def kernel_flops(segment: Segment) -> float:
    """Count the operations of the kernel."""
    return sum(rows.flops for blocks in recipe(segment) for rows in blocks if rows is not None)


def kernel(segment: Segment, known: Known) -> Float[Array, "in_size out_size"]:
    """Compute the kernel K of an affine segment v ↦ v K + c, arrays taken flat and in a row."""
    blocks = recipe(segment)
    sizes = list(zip(segment.in_sizes, segment.out_sizes, strict=False))
    if len(blocks) == len(blocks[0]) == 1 and sizes:
        (rows,) = blocks[0]
        assert rows is not None
        return rows.matrix(known)
    dtype = jnp.result_type(*(struct(v).dtype for v in segment.outputs))

    def block(rows: Rows | None, n: int, size: int) -> Any:
        return jnp.zeros((n, size), dtype) if rows is None else rows.matrix(known).astype(dtype)

    return jnp.concatenate(
        [
            jnp.concatenate(
                [block(r, n, s) for r, s in zip(row, segment.out_sizes, strict=True)], 1
            )
            for row, n in zip(blocks, segment.in_sizes, strict=True)
        ],
        0,
    )


def _follow(segment: Segment, source: Var) -> list[Rows | None]:
    first = Rows(size_of(source), source)
    first.entries = np.arange(first.n)
    first._dtype = struct(source).dtype
    rows: dict[Any, Rows] = {source: first}
    ones = {segment.scale.scalar} if segment.scale else set()  # a scale at 1, and its like
    for eqn in segment.linear:
        if (
            ones
            and all(a in ones for a in variables(eqn.invars))
            and eqn.primitive.name in _KEEP_ONE
        ):
            ones.update(eqn.outvars)
        moving = [i for i, a in enumerate(eqn.invars) if isinstance(a, Var) and a in rows]
        if moving:
            for found in _through(eqn, moving, rows, ones):
                found._dtype = first._dtype
                rows[found.like] = found
    return [rows.get(v) for v in segment.outputs]


def _through(eqn: JaxprEqn, moving: list[int], rows: dict[Any, Rows], ones: set[Var]) -> list[Rows]:
    if len(moving) == 1 and len(eqn.outvars) == 1:
        before = rows[eqn.invars[moving[0]]]
        if (
            eqn.primitive.name in ("mul", "div")
            and isinstance(eqn.invars[1 - moving[0]], Var)
            and (eqn.invars[1 - moving[0]] in ones)
        ):
            return [_like(before, eqn.outvars[0])]
        for simple in (_unchanged, _scaled, _moved, _product):
            found = simple(eqn, moving[0], before)
            if found is not None:
                return [found]
    return [_waiting(eqn, moving, rows, j) for j in range(len(eqn.outvars))]


def _like(before: Rows, v: Any) -> Rows:
    after = Rows(before.n, v)
    after.flops, after.push_flops = before.flops, before.push_flops
    after.entries, after.factors = before.entries, before.factors
    after.dense, after.push = before.dense, before.push
    return after


def _unchanged(eqn: JaxprEqn, position: int, before: Rows) -> Rows | None:
    """Pass what only relabels, or adds something constant."""
    name, (out,) = eqn.primitive.name, eqn.outvars
    if size_of(out) != before.size:
        return None
    plain = name in _PLAIN or keeps_order(eqn) or (name == "optimization_barrier")
    shift = name in ("add", "add_any") or (name == "sub" and position == 0)
    if not (plain or (shift and shape_of(out) == shape_of(eqn.invars[position]))):
        return None
    after = _like(before, out)
    if before.push is not None:
        inner = before.push
        after.push = lambda known, t: typed_like(inner(known, t), out)
    return after


def _scaled(eqn: JaxprEqn, position: int, before: Rows) -> Rows | None:
    """Scale single entries, or whole columns, by a constant."""
    name, (out,) = eqn.primitive.name, eqn.outvars
    negated = name == "neg" or (name == "sub" and position == 1)
    if not (negated or name == "mul" or (name == "div" and position == 0)):
        return None
    if size_of(out) != before.size or before.push is not None:
        return None
    other = None if negated else eqn.invars[1 - position]
    inverse = name == "div"

    def factor(known: Known, index: Any) -> Any:
        if other is None:
            return -1.0
        value = jnp.asarray(_value(other, known)).reshape(-1)
        value = value[index] if value.size > 1 else value
        return 1 / value if inverse else value

    after = _like(before, out)
    if before.entries is not None:
        index, inner = np.maximum(before.entries, 0), before.factors

        def factors(known: Known) -> Any:
            ones = jnp.ones(before.n, struct(out).dtype) if inner is None else inner(known)
            return ones * factor(known, index)

        after.factors = factors
    else:
        matrix = before.dense
        assert matrix is not None
        every = np.arange(before.size)
        after.dense = lambda known: matrix(known) * jnp.atleast_1d(factor(known, every))[None, :]
        after.flops += before.n * before.size
    return after


def _moved(eqn: JaxprEqn, position: int, before: Rows) -> Rows | None:
    """Follow single entries through what moves elements about."""
    if before.entries is None or eqn.primitive.name not in _MOVES:
        return None
    labels = [np.zeros(shape_of(a), np.int64) for a in eqn.invars]
    labels[position] = np.arange(1, before.size + 1).reshape(shape_of(eqn.invars[position]))
    moved = _MOVES[eqn.primitive.name](eqn.params, *labels)
    if moved is None:
        return None
    where = np.full(before.size + 1, -1)
    (found,) = np.nonzero(moved.reshape(-1))
    where[moved.reshape(-1)[found]] = found
    where[0] = -1
    (out,) = eqn.outvars
    after = _like(before, out)
    after.entries = np.where(before.entries < 0, -1, where[before.entries + 1])
    return after


def _pad(params: Any, a: np.ndarray, _: Any) -> np.ndarray | None:
    config = params["padding_config"]
    if any(low < 0 or high < 0 or inner for low, high, inner in config):
        return None
    return np.pad(a, [(low, high) for low, high, _ in config])


_MOVES: dict[str, Callable[..., np.ndarray | None]] = {
    "transpose": lambda p, a: np.transpose(a, p["permutation"]),
    "rev": lambda p, a: np.flip(a, p["dimensions"]),
    "slice": lambda p, a: a[
        tuple(
            slice(*s)
            for s in zip(
                p["start_indices"],
                p["limit_indices"],
                p["strides"] or [1] * a.ndim,
                strict=True,
            )
        )
    ],
    "concatenate": lambda p, *a: np.concatenate(a, p["dimension"]),
    "pad": _pad,
}


def _product(eqn: JaxprEqn, position: int, before: Rows) -> Rows | None:
    """Contract a vector with a parameter, whole and unbatched: the rows times that parameter."""
    if eqn.primitive.name != "dot_general" or len(shape_of(eqn.invars[position])) != 1:
        return None
    sides, (batch, _) = eqn.params["dimension_numbers"]
    if batch or len(sides[0]) != 1:
        return None
    other, (axis,), (out,) = eqn.invars[1 - position], sides[1 - position], eqn.outvars
    columns = size_of(out)
    after = Rows(before.n, out)
    after.flops = before.flops + before.times_flops(columns)

    def dense(known: Known) -> Any:
        value = jnp.asarray(_value(other, known))
        parameter = jnp.moveaxis(value, axis, 0).reshape(value.shape[axis], -1)
        return before.times(known, parameter)

    after.dense = dense
    return after


def _waiting(eqn: JaxprEqn, moving: list[int], rows: dict[Any, Rows], j: int) -> Rows:
    """Pass anything else: matrices at once, what is still to be applied later."""
    operands = list(dict.fromkeys(eqn.invars[i] for i in moving))
    out, work = eqn.outvars[j], flops([eqn])
    after = Rows(rows[operands[0]].n, out)

    def apply(known: Known, *directions: Any) -> Any:
        at = [typed_like(jnp.zeros(shape_of(v)), v) for v in operands]
        # What moves with other arrays alone does not matter here, whatever it is.
        given = {
            v: known[v] if v in known else typed_like(jnp.zeros(shape_of(v)), v)
            for v in variables(eqn.invars)
            if v not in operands
        }

        def run(*values: Any) -> Any:
            return evaluate([eqn], [out], given | dict(zip(operands, values, strict=True)))[0]

        return jax.jvp(
            run, tuple(at), tuple(typed_like(t, v) for t, v in zip(directions, at, strict=True))
        )[1]

    if any(rows[v].dense is not None for v in operands):
        after.flops = sum(rows[v].flops for v in operands) + after.n * work

        def dense(known: Known) -> Any:
            stacks = [rows[v].matrix(known) for v in operands]
            return jax.vmap(lambda *t: apply(known, *t).reshape(-1))(*stacks)

        after.dense = dense
        return after

    def push(known: Known, t: Any) -> Any:
        return apply(known, *(_one(rows[v], known, t) for v in operands))

    after.push = push
    after.push_flops = work + sum(rows[v].push_flops for v in operands)
    after.flops = min(after.n, after.size) * after.push_flops
    return after


def _one(rows: Rows, known: Known, t: Any) -> Any:
    if rows.push is not None:
        return rows.push(known, t)
    assert rows.entries is not None
    scaled = t if rows.factors is None else t * rows.factors(known)
    if rows.is_identity or (rows.n == rows.size and (rows.entries == np.arange(rows.n)).all()):
        return typed_like(scaled, rows.like)
    kept = np.nonzero(rows.entries >= 0)[0]
    placed = (
        jnp.zeros(rows.size, scaled.dtype)
        .at[rows.entries[kept]]
        .set(scaled[kept], unique_indices=True)
    )
    return typed_like(placed, rows.like)


def _value(atom: Any, known: Known) -> Any:
    return known[atom] if isinstance(atom, Var) else atom.val
