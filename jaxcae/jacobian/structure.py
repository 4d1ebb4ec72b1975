"""Read an encoder's structure off its trace: affine and elementwise segments, the rest opaque.

What cannot be *proved* affine or elementwise is opaque. The proof goes by the primitives in
`rules.py`; a function with a derivative rule of its own is judged by that rule. A structure holds
no values: it is proved once for a program, and bound to values as often as they change.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Var

from jaxcae.jacobian.jaxprs import calls_primitive, effects_of, struct, variables
from jaxcae.jacobian.low_rank import LowRank
from jaxcae.jacobian.program import Program, of_sample
from jaxcae.jacobian.proofs import Fact, prove, rules_are_linear
from jaxcae.jacobian.reorder import Stretch, reorder
from jaxcae.jacobian.scaling import Scale, find_scale
from jaxcae.jacobian.stages import split

Kind = Literal["affine", "elementwise", "opaque"]


@dataclass(frozen=True, eq=False)
class Segment:
    """A stretch of the encoder between two sets of arrays, each taken flat and in a row.

    Attributes:
        kind: `"affine"` (its Jacobian does not depend on the sample, but for the `scale`),
            `"elementwise"` (each element of a result depends on the same position of arrays that
            go in) or `"opaque"` (anything else).
        equations: What it computes.
        inputs: The arrays that go in: all that depends on the sample.
        outputs: The arrays that come out.
        scale: The factor of a normalisation, whose Jacobian is that of the affine rest times the
            factor, and one outer product.
        rank: The few numbers without which an elementwise segment is none.
        memory: What others derive from it, kept for as long as it lives.
    """

    kind: Kind
    equations: tuple[JaxprEqn, ...]
    inputs: tuple[Var, ...]
    outputs: tuple[Var, ...]
    scale: Scale | None = None
    rank: LowRank | None = None
    memory: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def in_sizes(self) -> list[int]:
        """Number of elements of each array that goes in."""
        return [size_of(v) for v in self.inputs]

    @property
    def out_sizes(self) -> list[int]:
        """Number of elements of each array that comes out."""
        return [size_of(v) for v in self.outputs]

    @property
    def in_size(self) -> int:
        """Number of elements that go in."""
        return sum(self.in_sizes)

    @property
    def out_size(self) -> int:
        """Number of elements that come out."""
        return sum(self.out_sizes)

    @property
    def linear(self) -> tuple[JaxprEqn, ...]:
        """The equations whose Jacobian is shared: with a scale, those in which it is 1."""
        return self.scale.body if self.scale else self.equations

    @functools.cached_property
    def forward_mode(self) -> bool:
        """Whether Jacobian-vector products exist: a `custom_vjp` rules them out."""
        return not any(calls_primitive(eqn, "custom_vjp_call") for eqn in self.equations)

    @property
    def is_diagonal(self) -> bool:
        """Whether the Jacobian is square and diagonal: elementwise, one array in and one out."""
        return self.kind == "elementwise" and len(self.inputs) == len(self.outputs) == 1

    @functools.cached_property
    def edges(self) -> tuple["Edge", ...]:
        """The diagonal blocks of an elementwise segment's Jacobian that are not zero."""
        reached: dict[Var, set[Var]] = {v: {v} for v in self.inputs}
        unchanged = {v: {v} for v in self.inputs}  # but for something added: of slope 1
        for eqn in self.equations:
            sources = set().union(*(reached.get(v, set()) for v in variables(eqn.invars)))
            reached.update(dict.fromkeys(eqn.outvars, sources))
            if passed := _added(eqn):
                once = [unchanged.get(v, set()) for v in passed]
                others = [reached.get(v, set()) - unchanged.get(v, set()) for v in passed]
                again = set().union(*(a & b for i, a in enumerate(once) for b in once[:i]), *others)
                if len(passed) < len(variables(eqn.invars)):  # what is subtracted
                    again |= set().union(
                        *(reached.get(v, set()) for v in variables(eqn.invars[1:]))
                    )
                unchanged[eqn.outvars[0]] = set().union(*once) - again
        several = len(self.inputs) + len(self.outputs) > 2
        return tuple(
            Edge(i, j, v is w or (several and v in unchanged.get(w, set())))
            for i, v in enumerate(self.inputs)
            for j, w in enumerate(self.outputs)
            if v in reached[w]
        )


def _added(eqn: JaxprEqn) -> list[Var]:
    """List the operands whose derivative is 1, as those of a sum."""
    name = eqn.primitive.name
    if name in ("add", "add_any"):
        return variables(eqn.invars)
    if name == "sub":
        return variables(eqn.invars[:1])
    return variables(eqn.invars) if name in ("copy", "reshape", "squeeze", "name") else []


class Edge(NamedTuple):
    """A diagonal block: from which array in to which array out, and if it is the identity.

    An array that passes unchanged, or with others added, as along a residual connection.
    """

    source: int
    target: int
    is_identity: bool


class Structure(NamedTuple):
    """An encoder as a chain of segments.

    Attributes:
        segments: In order; empty if the code is the input itself or does not depend on it.
        depends: Whether the code depends on the input.
        shared: The equations that do not depend on the sample.
        shared_outputs: What the segments read of their results.
        acts: Whether the code itself needs an equation with an effect, which must run once.
        loops: Whether a `lax.while_loop` is met, whose reverse mode is to be asked for.
        program: The program that was read.
    """

    segments: tuple[Segment, ...]
    depends: bool
    shared: tuple[JaxprEqn, ...]
    shared_outputs: tuple[Var, ...]
    acts: bool
    loops: bool
    program: Program

    @property
    def in_size(self) -> int:
        """Number of features."""
        return math.prod(self.program.x.shape)

    @property
    def code_size(self) -> int:
        """Number of code units."""
        return size_of(self.program.code)

    @property
    def has_opaque(self) -> bool:
        """Whether any segment is opaque."""
        return any(segment.kind == "opaque" for segment in self.segments)


def size_of(atom: Any) -> int:
    """Count the elements of a variable or literal."""
    return math.prod(getattr(atom.aval, "shape", ()))


def read_structure(program: Program) -> Structure:
    """Split a program into segments."""
    entry, exit_ = program.sample, program.code
    per_sample = of_sample(program)
    moving = {id(eqn) for eqn in per_sample}
    once = [eqn for eqn in program.flat.equations if id(eqn) not in moving]
    made_once = {v for eqn in once for v in eqn.outvars}
    read = dict.fromkeys(v for eqn in per_sample for v in variables(eqn.invars))
    shared = tuple(v for v in read if v in made_once)
    depends = bool(per_sample) or exit_ is entry
    acts = any(effects_of(eqn) for eqn in per_sample)
    segments: list[Segment] = []
    loops = any(calls_primitive(eqn, "while") for eqn in per_sample)
    if acts or loops or not rules_are_linear(per_sample):
        # To be differentiated as it stands: JAX knows what a loop without a reverse mode is for.
        segments = [Segment("opaque", tuple(per_sample), (entry,), (exit_,))]
    elif per_sample:
        segments = _read(per_sample, entry, exit_)
    return Structure(tuple(segments), depends, tuple(once), shared, acts, loops, program)


_KINDS: tuple[Kind, ...] = ("elementwise", "affine", "opaque")


class _Piece(NamedTuple):
    """The smallest stretch from one array to the next: one segment, or stages of one.

    Attributes:
        kinds: What it is proved to be; a scaling or a shift is affine and elementwise.
        segments: Its segments.
    """

    kinds: set[Kind]
    segments: list[Segment]

    @property
    def ends(self) -> tuple[tuple[JaxprEqn, ...], Var, Var]:
        """Its equations, and the arrays that go in and come out."""
        equations = tuple(eqn for segment in self.segments for eqn in segment.equations)
        return equations, self.segments[0].inputs[0], self.segments[-1].outputs[0]


def _read(equations: Sequence[JaxprEqn], entry: Var, exit_: Var) -> list[Segment]:
    pieces = [_judge(*piece) for piece in cut(equations, entry, exit_)]
    stretches = [Stretch(*piece.ends, frozenset(piece.kinds)) for piece in pieces]
    judged = {id(stretch): piece for stretch, piece in zip(stretches, pieces, strict=True)}
    segments = _group([judged.get(id(s)) or _as_piece(s) for s in reorder(stretches)])
    if not all(segment.forward_mode for segment in segments):  # which corrections need
        segments = [
            replace(s, kind="opaque", scale=None) if s.scale is not None else s for s in segments
        ]
    return _absorb(segments, min(size_of(entry), size_of(exit_)))


def _as_piece(stretch: Stretch) -> _Piece:
    kinds: set[Kind] = {kind for kind in _KINDS if kind in stretch.kinds}
    equations, source, sink, _ = stretch
    return _Piece(kinds, [Segment(_kind(kinds), equations, (source,), (sink,))])


def cut(
    equations: Sequence[JaxprEqn], entry: Var, exit_: Var
) -> list[tuple[tuple[JaxprEqn, ...], Var, Var]]:
    """Cut wherever one real array carries everything that depends on the sample.

    An array that every path from input to output passes is alone alive at its place in *any*
    order of evaluation, so one scan over the given order finds all of them.
    """
    last_use = {v: i for i, eqn in enumerate(equations) for v in variables(eqn.invars)}
    last_use[exit_] = len(equations)
    pieces = []
    live, start, source = {entry}, 0, entry
    for i, eqn in enumerate(equations):
        live.update(v for v in eqn.outvars if last_use.get(v, -1) > i)
        live.difference_update(v for v in variables(eqn.invars) if last_use[v] <= i)
        if len(live) == 1:
            (sink,) = live
            if jnp.issubdtype(struct(sink).dtype, jnp.floating):
                pieces.append((tuple(equations[start : i + 1]), source, sink))
                start, source = i + 1, sink
    return pieces


def _judge(equations: tuple[JaxprEqn, ...], source: Var, sink: Var) -> _Piece:
    fact: Fact = prove(equations, source, sink)
    kinds: set[Kind] = set()
    if fact.affine:
        kinds.add("affine")
    if fact.elementwise:
        kinds.add("elementwise")
    if kinds:
        return _Piece(kinds, [Segment(min(kinds), equations, (source,), (sink,))])
    scale = find_scale(equations, source, sink)
    if scale is not None:
        return _Piece(set(), [Segment("affine", equations, (source,), (sink,), scale)])
    stages = split(equations, source, sink)
    if stages is None:
        return _Piece({"opaque"}, [Segment("opaque", equations, (source,), (sink,))])
    return _Piece({stages[0].kind}, [Segment(*stage) for stage in stages])


def _group(pieces: Sequence[_Piece]) -> list[Segment]:
    """Join neighbours of a kind; a scaling or a shift is of both kinds and joins either."""
    segments: list[Segment] = []
    kinds: set[Kind] = set()
    for kinds_here, (first, *rest) in pieces:
        if kinds & kinds_here and not _is_waist(segments[-1], first):
            kinds = kinds & kinds_here
            segments[-1] = _join(segments[-1], first, _kind(kinds))
        else:
            kinds = kinds_here
            segments.append(replace(first, kind=_kind(kinds)) if kinds else first)
        if rest:
            segments += rest
            kinds = {rest[-1].kind}
    return segments


def _kind(kinds: set[Kind]) -> Kind:
    return next(kind for kind in _KINDS if kind in kinds)


def _join(first: Segment, last: Segment, kind: Kind) -> Segment:
    return Segment(kind, first.equations + last.equations, first.inputs, last.outputs)


def _is_waist(segment: Segment, follower: Segment) -> bool:
    """Tell whether the array between is narrower than both ends: two products then cost less."""
    if segment.kind != "affine" or follower.kind != "affine":
        return False
    return segment.out_size < min(segment.in_size, follower.out_size)


def _absorb(segments: Sequence[Segment], rows: int) -> list[Segment]:
    """Join what stands around an opaque segment with it, unless something can be gained there.

    As many vectors pass the one as the other. Worth knowing are the affine segments at the ends,
    whose products the batch shares, and arrays narrower than the `rows` that either end starts
    with, where fewer vectors go on.
    """
    plain = [s.kind == "affine" and s.scale is None for s in segments]
    if all(segment.kind != "opaque" for segment in segments):
        return list(segments)
    first, last = plain.index(False), len(plain) - plain[::-1].index(False)
    groups: list[list[Segment]] = [[]]
    for segment in segments[first:last]:
        groups[-1].append(segment)
        if segment.out_size < rows:
            groups.append([])
    joined = list(segments[:first])
    for group in groups:
        if any(segment.kind == "opaque" for segment in group):
            equations = tuple(eqn for segment in group for eqn in segment.equations)
            joined.append(Segment("opaque", equations, group[0].inputs, group[-1].outputs))
        else:
            joined += group
    return joined + list(segments[last:])
