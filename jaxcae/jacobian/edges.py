"""Linear algebra with an elementwise segment of several arrays: a block of diagonals."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcae.jacobian.structure import Edge, Segment

Slopes = Sequence[Any]
"""The slopes of each edge; None where an array passes unchanged."""


def spans(sizes: Sequence[int]) -> list[slice]:
    """Cut a row of arrays of these sizes."""
    found, start = [], 0
    for size in sizes:
        found.append(slice(start, start + size))
        start += size
    return found


def apply(
    segment: Segment, slopes: Slopes, stack: Float[Array, "rows before"], *, forward: bool
) -> Float[Array, "rows after"]:
    """Multiply rows with the block of diagonals: inputs to outputs, or outputs to inputs."""
    before, after = segment.in_sizes, segment.out_sizes
    if not forward:
        before, after = after, before
    found: list[Any] = [None] * len(after)
    where = spans(before)
    for edge, slope in zip(segment.edges, slopes, strict=True):
        entry, exit_ = (edge.source, edge.target) if forward else (edge.target, edge.source)
        part = stack[:, where[entry]]
        if slope is not None:
            part = part * jnp.broadcast_to(slope, part.shape)
        found[exit_] = part if found[exit_] is None else found[exit_] + part
    zeros = (jnp.zeros((stack.shape[0], size), stack.dtype) for size in after)
    return jnp.concatenate(
        [part if part is not None else zero for part, zero in zip(found, zeros, strict=True)], 1
    )


def pull(
    segment: Segment,
    slopes: Slopes,
    stack: Float[Array, "rows after"],
    passing: float | None = None,
) -> Float[Array, "rows before"]:
    """Multiply rows with a segment's Jacobian; with other slopes than 1 for what passes, if any."""
    return apply(segment, [passing if m is None else m for m in slopes], stack, forward=False)


def own(segment: Segment) -> list[Edge]:
    """List the edges that have slopes."""
    return [edge for edge in segment.edges if not edge.is_identity]


def passing(segment: Segment) -> list[Edge]:
    """List the edges along which an array passes unchanged."""
    return [edge for edge in segment.edges if edge.is_identity]


def tile(
    matrix: Float[Array, "s t"], rows: Sequence[slice], columns: Sequence[slice]
) -> Float[Array, "m n"]:
    """Lay blocks of a matrix beside one another, those used twice twice."""
    return jnp.concatenate([jnp.concatenate([matrix[r, c] for c in columns], 1) for r in rows], 0)


def columns(stack: Float[Array, "rows s"], parts: Sequence[slice]) -> Float[Array, "rows m"]:
    """Lay columns of a stack beside one another."""
    return jnp.concatenate([stack[:, part] for part in parts], 1)
