"""The matrix of an affine segment, taken from the parameters where it stands there already."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcae.jacobian.cost import flops
from jaxcae.jacobian.jaxprs import shape_of, struct, typed_like
from jaxcae.jacobian.structure import Piece, Segment

_SHIFTS = frozenset({"add", "add_any", "sub"})
_RESHAPES = frozenset({"reshape", "squeeze", "expand_dims", "copy", "copy_p"})


def kernel(segment: Segment) -> Float[Array, "in_size out_size"]:
    """Compute the kernel K of an affine segment v ↦ v K + c, arrays taken flat.

    A product with a parameter gives that parameter itself; anything else is applied to the rows
    gathered so far (to all basis vectors, if none are).
    """
    rows: Any = None  # None stands for the identity, a vector for a diagonal matrix
    for piece in segment.pieces:
        rows = _push(piece, rows)
    if rows is None or rows.ndim == 1:
        return _dense(rows, segment.in_size, segment.output.dtype)
    return rows


def kernel_flops(segment: Segment) -> float:
    """Count the operations of `kernel(segment)`."""
    dense, total = False, 0.0
    for piece in segment.pieces:
        if _keeps_rows(piece) or (not dense and piece.fact.elementwise):
            continue
        if dense or not _is_product_with_parameter(piece):
            total += segment.in_size * flops(piece.equations)
        dense = True
    return total


def _push(piece: Piece, rows: Any) -> Any:
    if _keeps_rows(piece):
        return rows
    source = struct(piece.input)
    zeros = typed_like(jnp.zeros(source.shape), source)
    if piece.fact.elementwise and (rows is None or rows.ndim == 1):
        _, scale = jax.jvp(piece.run, (zeros,), (jnp.ones_like(zeros),))
        return scale.reshape(-1) if rows is None else rows * scale.reshape(-1)
    if (rows is None or rows.ndim == 1) and _is_product_with_parameter(piece):
        parameter = _parameter(piece)
        return parameter if rows is None else rows[:, None] * parameter
    if rows is None or rows.ndim == 1:
        rows = _dense(rows, zeros.size, source.dtype)
    _, push = jax.linearize(piece.run, zeros)
    images = jax.vmap(lambda row: push(typed_like(row, source)))(rows)
    return images.reshape(rows.shape[0], -1)


def _dense(rows: Any, size: int, dtype: Any) -> Float[Array, "size size"]:
    return jnp.eye(size, dtype=dtype) if rows is None else jnp.diag(rows)


def _keeps_rows(piece: Piece) -> bool:
    """Tell whether the piece is a shift, or relabels elements without moving them."""
    if len(piece.equations) != 1:
        return False
    (eqn,) = piece.equations
    if eqn.primitive.name in _RESHAPES:
        return eqn.params.get("dimensions") is None or eqn.primitive.name != "reshape"
    from_first = eqn.invars[0] is piece.input and eqn.invars[-1] is not piece.input
    same = shape_of(eqn.invars[0]) == shape_of(eqn.outvars[0])
    commutes = eqn.primitive.name != "sub" and eqn.invars[-1] is piece.input
    return (
        eqn.primitive.name in _SHIFTS
        and piece.fact.elementwise
        and ((from_first and same) or (commutes and eqn.invars[0] is not piece.input))
    )


def _is_product_with_parameter(piece: Piece) -> bool:
    """Tell whether the piece contracts a vector with a parameter, whole and unbatched."""
    if len(piece.equations) != 1 or len(shape_of(piece.input)) != 1:
        return False
    (eqn,) = piece.equations
    if eqn.primitive.name != "dot_general":
        return False
    (left, right), (batch, _) = eqn.params["dimension_numbers"]
    return not batch and len(left) == len(right) == 1


def _parameter(piece: Piece) -> Float[Array, "in_size out_size"]:
    eqn: Any = piece.equations[0]
    (left, right), _ = eqn.params["dimension_numbers"]
    position = 1 if eqn.invars[0] is piece.input else 0
    (axis,) = (right, left)[1 - position]
    value = jnp.asarray(piece.known[eqn.invars[position]])
    return jnp.moveaxis(value, axis, 0).reshape(value.shape[axis], -1)
