"""Read an encoder's structure off its trace: affine and elementwise segments, the rest opaque.

What cannot be *proved* affine or elementwise is opaque. The proof goes by the primitives in
`proofs.py`; a function with a derivative rule of its own is judged by that rule.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Var

from jaxcae.jacobian.jaxprs import (
    Call,
    FlatProgram,
    calls_primitive,
    evaluate,
    struct,
    trace,
    variables,
)
from jaxcae.jacobian.proofs import Fact, prove

Kind = Literal["affine", "elementwise", "opaque"]


class Piece(NamedTuple):
    """The smallest stretch of equations from one array to the next.

    Attributes:
        equations: What it computes.
        fact: What is proved of it.
        input: Its only variable that depends on the sample.
        output: Its result.
        known: Values of everything else it reads.
    """

    equations: tuple[JaxprEqn, ...]
    fact: Fact
    input: Var
    output: Var
    known: dict[Var, Any]

    def run(self, v: Any) -> Any:
        """Compute the piece for one sample."""
        return evaluate(self.equations, [self.output], {**self.known, self.input: v})[0]


class Segment(NamedTuple):
    """Neighbouring pieces of a kind: a stretch of the encoder between two arrays.

    Attributes:
        kind: `"affine"` (its Jacobian does not depend on the sample), `"elementwise"` (its
            Jacobian is diagonal) or `"opaque"` (anything else).
        pieces: Its pieces in order.
    """

    kind: Kind
    pieces: tuple[Piece, ...]

    def run(self, v: Any) -> Any:
        """Compute the segment for one sample."""
        for piece in self.pieces:
            v = piece.run(v)
        return v

    @property
    def input(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of what goes in, one sample."""
        return struct(self.pieces[0].input)

    @property
    def output(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of what comes out, one sample."""
        return struct(self.pieces[-1].output)

    @property
    def in_size(self) -> int:
        """Number of elements that go in."""
        return math.prod(self.input.shape)

    @property
    def out_size(self) -> int:
        """Number of elements that come out."""
        return math.prod(self.output.shape)

    @property
    def equations(self) -> list[JaxprEqn]:
        """All equations in order."""
        return [eqn for piece in self.pieces for eqn in piece.equations]

    @property
    def forward_mode(self) -> bool:
        """Whether Jacobian-vector products exist: a `custom_vjp` rules them out."""
        return not any(calls_primitive(eqn, "custom_vjp_call") for eqn in self.equations)


class Structure(NamedTuple):
    """An encoder as a chain of segments.

    Attributes:
        segments: In order; empty if the code is the input itself or does not depend on it.
        depends: Whether the code depends on the input.
        in_size: Number of features.
        encode: The encoder of one sample, for what the chain cannot do.
        calls: The named function calls in it, by the equations of each.
    """

    segments: tuple[Segment, ...]
    depends: bool
    in_size: int
    encode: Callable[[Any], Any]
    calls: tuple[Call, ...]

    @property
    def code_size(self) -> int:
        """Number of code units."""
        return self.segments[-1].out_size if self.segments else self.in_size


def read_structure(encode: Callable[[Any], Any], x: jax.ShapeDtypeStruct) -> Structure:
    """Split `encode`, a function of one sample, into segments.

    Raises:
        TypeError: If x is not floating point or the code is not one floating-point array.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"samples must be floating point to have a Jacobian, got {x.dtype}.")
    program = trace(encode, x)
    _check_code(program.outputs)
    (entry,), (exit_,) = program.inputs, program.outputs
    per_sample, once = _split_by_dependence(program)
    depends = bool(per_sample) or exit_ is entry
    read = dict.fromkeys(v for eqn in per_sample for v in variables(eqn.invars))
    shared = [v for v in read if any(v in eqn.outvars for eqn in once)]
    known = program.constants
    if shared:
        known = {**known, **dict(zip(shared, evaluate(once, shared, known), strict=True))}
    pieces = _cut(per_sample, entry, exit_, known) if per_sample else []
    return Structure(_group(pieces), depends, math.prod(x.shape), encode, tuple(program.calls))


def _check_code(outputs: Sequence[Any]) -> None:
    if len(outputs) != 1:
        raise TypeError(
            f"encode must return one array per sample, got a pytree of {len(outputs)} arrays. "
            "Return the code alone."
        )
    if not jnp.issubdtype(outputs[0].aval.dtype, jnp.floating):
        raise TypeError(f"the code must be floating point, got {outputs[0].aval.dtype}.")


def _split_by_dependence(program: FlatProgram) -> tuple[list[JaxprEqn], list[JaxprEqn]]:
    reached = set(program.inputs)
    per_sample, once = [], []
    for eqn in program.equations:
        if reached.isdisjoint(variables(eqn.invars)):
            once.append(eqn)
        else:
            per_sample.append(eqn)
            reached.update(eqn.outvars)
    return per_sample, once


def _cut(
    equations: Sequence[JaxprEqn], entry: Var, exit_: Var, known: dict[Var, Any]
) -> list[Piece]:
    """Cut wherever one real array carries everything that depends on the sample.

    An array that every path from input to output passes is alone alive at its place in *any*
    order of evaluation, so one scan over the given order finds all of them.
    """
    last_use = {v: i for i, eqn in enumerate(equations) for v in variables(eqn.invars)}
    last_use[exit_] = len(equations)
    pieces: list[Piece] = []
    live, start, source = {entry}, 0, entry
    for i, eqn in enumerate(equations):
        live = {v for v in {*live, *eqn.outvars} if last_use.get(v, -1) > i}
        if len(live) == 1 and all(_is_real(v) for v in live):
            (sink,) = live
            stretch = tuple(equations[start : i + 1])
            pieces.append(Piece(stretch, prove(stretch, source, sink), source, sink, known))
            start, source = i + 1, sink
    return pieces


def _is_real(v: Var) -> bool:
    return bool(jnp.issubdtype(struct(v).dtype, jnp.floating))


def _group(pieces: Sequence[Piece]) -> tuple[Segment, ...]:
    """Join neighbours of a kind; a scaling or a shift is of both kinds and joins either."""
    groups: list[tuple[set[Kind], list[Piece]]] = []
    for piece in pieces:
        fits: set[Kind] = set()
        if piece.fact.affine:
            fits.add("affine")
        if piece.fact.elementwise:
            fits.add("elementwise")
        fits = fits or {"opaque"}
        if groups and groups[-1][0] & fits:
            groups[-1][0].intersection_update(fits)
            groups[-1][1].append(piece)
        else:
            groups.append((fits, [piece]))
    order: tuple[Kind, ...] = ("elementwise", "affine", "opaque")
    found = [
        Segment(next(kind for kind in order if kind in fits), tuple(members))
        for fits, members in groups
    ]
    return tuple(_absorb(found))


def _absorb(segments: Sequence[Segment]) -> list[Segment]:
    """Join an elementwise segment between two opaque ones with them: nothing is gained by it."""
    joined: list[Segment] = []
    for i, segment in enumerate(segments):
        between = joined and joined[-1].kind == "opaque" and segment.kind == "elementwise"
        followed = i + 1 < len(segments) and segments[i + 1].kind == "opaque"
        if (between and followed) or (
            joined and joined[-1].kind == "opaque" and segment.kind == "opaque"
        ):
            joined[-1] = Segment("opaque", joined[-1].pieces + segment.pieces)
        else:
            joined.append(segment)
    return joined
