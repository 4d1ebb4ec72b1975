"""A structure bound to values: run its segments, and take their slopes and products."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Var
from jaxtyping import Array, Float

from jaxcae.jacobian import affine, convolutions, recurrence
from jaxcae.jacobian.directions import wide
from jaxcae.jacobian.jaxprs import (
    evaluate,
    evaluate_checkpointed,
    gathered,
    struct,
    typed_like,
    variables,
)
from jaxcae.jacobian.low_rank import LowRank
from jaxcae.jacobian.program import Encoder
from jaxcae.jacobian.structure import Structure

Arrays = tuple[Any, ...]
Operator = Callable[[Any], Any]
"""Applies a segment's Jacobian, or its transpose, to a flat vector."""


class Bound:
    """A structure with the values of an encoder's parameters, tracers among them or not.

    Attributes:
        structure: The structure.
        dtype: In which slopes, kernels and norms are computed: float32 at least.
    """

    def __init__(self, structure: Structure, encoder: Encoder) -> None:
        self.structure, self.encoder = structure, encoder
        known = encoder.known
        if structure.shared_outputs:
            found = evaluate(structure.shared, structure.shared_outputs, known)
            known.update(zip(structure.shared_outputs, found, strict=True))
        self._known: list[dict[Var, Any]] = []
        for segment in structure.segments:
            reads = {v for eqn in segment.equations for v in variables(eqn.invars)}
            self._known.append({v: known[v] for v in reads if v in known})
        cuts = [v for segment in structure.segments for v in segment.outputs]
        self.dtype = wide(structure.program.x.dtype, *(struct(v).dtype for v in cuts))

    def run(self, i: int, arrays: Arrays) -> Arrays:
        """Compute a segment for one sample."""
        segment = self.structure.segments[i]
        known = self._known[i] | dict(zip(segment.inputs, arrays, strict=True))
        flat = self.structure.program.flat
        return tuple(evaluate_checkpointed(flat, segment.equations, segment.outputs, known))

    def run_linear(self, i: int, arrays: Arrays) -> Arrays:
        """Compute what the segment's `linear` part means: its scale, if it has one, at 1."""
        segment = self.structure.segments[i]
        known = self._known_linear(i) | dict(zip(segment.inputs, arrays, strict=True))
        return tuple(evaluate(convolutions.swapped(segment), segment.outputs, known))

    def kernel(self, i: int) -> Float[Array, "in_size out_size"]:
        """Compute the matrix of an affine segment."""
        found = affine.kernel(self.structure.segments[i], self._known_linear(i))
        return gathered(found).astype(self.dtype)

    def scalar(self, i: int, arrays: Arrays) -> Float[Array, ""]:
        """Compute the s of a segment's scale σ = s^e."""
        scale = self.structure.segments[i].scale
        assert scale is not None
        known = self._known[i] | dict(zip(self.structure.segments[i].inputs, arrays, strict=True))
        (scalar,) = evaluate(scale.head, [scale.scalar], known)
        return scalar.astype(self.dtype).reshape(())

    def slopes(self, i: int, arrays: Arrays) -> tuple[Arrays, list[Any]]:
        """Compute an elementwise segment and its diagonal blocks, edge by edge; 1 is None.

        One of low rank gives D, then the columns of U and of V array by array, as rows.
        """
        segment = self.structure.segments[i]
        if segment.rank is not None:
            return self._low_rank(i, segment.rank, arrays)
        run = functools.partial(self._run_of, i)
        own = [edge for edge in segment.edges if not edge.is_identity]
        slopes: dict[Any, Any] = {}
        if segment.forward_mode and len(arrays) == 1:
            values, tangents = jax.jvp(run, arrays, (jnp.ones_like(arrays[0]),))
            slopes = {edge: tangents[edge.target] for edge in own}
        elif segment.forward_mode:
            values, push = jax.linearize(run, *arrays)
            for source in dict.fromkeys(edge.source for edge in own):
                tangents = push(*_one_hot(arrays, source))
                slopes |= {e: tangents[e.target] for e in own if e.source == source}
        else:  # diagonal blocks are their own transposes
            values, pull = jax.vjp(run, *arrays)
            for target in dict.fromkeys(edge.target for edge in own):
                cotangents = pull(_one_hot(values, target))
                slopes |= {e: cotangents[e.source] for e in own if e.target == target}
        found = [
            gathered(slopes[e]).astype(self.dtype).reshape(-1) if e in slopes else None
            for e in segment.edges
        ]
        return values, found

    def _low_rank(self, i: int, rank: LowRank, arrays: Arrays) -> tuple[Arrays, list[Any]]:
        (source,), (sink,) = self.structure.segments[i].inputs, self.structure.segments[i].outputs
        known, (a,) = self._known[i], arrays

        def rows(operator: Any, kind: Any) -> Any:
            """Send every number of an array through; of blocks, all at once."""
            basis = jnp.eye(kind.size, dtype=kind.dtype).reshape(-1, *kind.shape)
            if rank.blocks > 1:
                basis = jnp.ones((1, *kind.shape), kind.dtype)
            found = jax.vmap(lambda t: self.join([operator(typed_like(t, kind))]))
            return found(basis)

        numbers, rights = [], []
        for each in rank.hidden:

            def head(a: Any, each: Any = each) -> Any:
                return evaluate(each.head, [each.variable], known | {source: a})[0]

            value, pull = jax.vjp(head, a)
            numbers.append(value)
            rights.append(rows(lambda t, pull=pull: pull(t)[0], value))

        def body(a: Any, numbers: list[Any]) -> Any:
            at = dict(zip((each.variable for each in rank.hidden), numbers, strict=True))
            return evaluate(rank.body, [sink], known | {source: a} | at)[0]

        y, push = jax.linearize(body, a, numbers)
        zeros = [jnp.zeros_like(z) for z in numbers]
        lefts = [
            rows(lambda t, j=j: push(jnp.zeros_like(a), [*zeros[:j], t, *zeros[j + 1 :]]), z)
            for j, z in enumerate(numbers)
        ]
        return (y,), [self.join([push(jnp.ones_like(a), zeros)]), *lefts, *rights]

    def linearize(
        self, i: int, arrays: Arrays, *, forward: bool, linear: bool = False, rows: int = 1
    ) -> tuple[Arrays, Operator]:
        """Compute a segment and the product with J (forward) or Jᵀ, for flat vectors.

        The product is prepared for so many `rows` at a time.
        """
        segment = self.structure.segments[i]
        if segment.kind == "opaque" and not forward:
            found = recurrence.pull_back(segment, self._known[i], arrays, rows, self.dtype)
            if found is not None:
                return found[0], self._flat(found[1], found[0])
        run = functools.partial(self._run_linear_of if linear else self._run_of, i)
        if forward:
            values, push = jax.linearize(run, *arrays)
            return values, self._flat(lambda parts: push(*parts), arrays)
        values, pull = jax.vjp(run, *arrays)
        return values, self._flat(lambda parts: pull(tuple(parts)), values)

    def origin(self, i: int) -> Arrays:
        """Make zeros of a segment's inputs: where an affine function is linearised matters not."""
        kinds = [struct(v) for v in self.structure.segments[i].inputs]
        return tuple(typed_like(jnp.zeros(kind.shape, kind.dtype), kind) for kind in kinds)

    def join(self, arrays: Sequence[Any]) -> Float[Array, " size"]:
        """Lay arrays flat and in a row."""
        flat = [gathered(array).astype(self.dtype).reshape(-1) for array in arrays]
        return flat[0] if len(flat) == 1 else jnp.concatenate(flat)

    def _flat(self, product: Callable[[list[Any]], Any], sources: Arrays) -> Operator:
        sizes = [source.size for source in sources]

        def operator(vector: Float[Array, " s"]) -> Float[Array, " t"]:
            parts, start = [], 0
            for source, size in zip(sources, sizes, strict=True):
                parts.append(typed_like(vector[start : start + size], source))
                start += size
            return self.join(product(parts))

        return operator

    def _run_of(self, i: int, *arrays: Any) -> Arrays:
        return self.run(i, arrays)

    def _run_linear_of(self, i: int, *arrays: Any) -> Arrays:
        return self.run_linear(i, arrays)

    def _known_linear(self, i: int) -> dict[Var, Any]:
        segment = self.structure.segments[i]
        if segment.scale is None:
            return self._known[i]
        scalar = segment.scale.scalar
        one = typed_like(jnp.ones(struct(scalar).shape, struct(scalar).dtype), scalar)
        known = self._known[i] | {scalar: one}
        moving = set(segment.inputs)
        for eqn in segment.linear:  # what follows from the scale alone
            if moving.isdisjoint(variables(eqn.invars)):
                known.update(zip(eqn.outvars, evaluate([eqn], eqn.outvars, known), strict=True))
            else:
                moving.update(eqn.outvars)
        return known


def _one_hot(arrays: Arrays, which: int) -> Arrays:
    return tuple(
        jnp.ones_like(a) if i == which else jnp.zeros_like(a) for i, a in enumerate(arrays)
    )
