"""Carry out a plan: codes, ⟨J(x), J(y)⟩ and ‖J(x)‖²_F, from one forward trace of each sample."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcae.jacobian import edges
from jaxcae.jacobian.across import Across, Coupling, RankAcross, along
from jaxcae.jacobian.affine import recipe
from jaxcae.jacobian.bound import Arrays, Bound
from jaxcae.jacobian.carried import Carried, dense, gathered, gram_of, meet, push, start, times
from jaxcae.jacobian.corrections import Corrections, Passed
from jaxcae.jacobian.directions import sum_of_squares
from jaxcae.jacobian.local import Band
from jaxcae.jacobian.low_rank import LowRank
from jaxcae.jacobian.plan import Move, Plan, Sweep
from jaxcae.jacobian.products import balanced, gram_apart, matmul, quadratic_form, together

Step = tuple[Move, int]
_BEFORE = -1  # where a given matrix becomes a gram before any segment is passed


class At(NamedTuple):
    """One sample, passed through the encoder.

    Attributes:
        code: Its code.
        local: By segment: slopes of elementwise ones (by edge), products of opaque ones.
        passed: What normalisations add; None if there are none.
    """

    code: Any
    local: dict[int, Any]
    passed: Passed | None

    @property
    def slopes(self) -> list[list[Any]]:
        """The slopes of each elementwise segment, edge by edge, in order."""
        return [found for found in self.local.values() if not callable(found)]


class Prepared:
    """An encoder prepared by a plan: what samples share is computed here, once.

    `at(x)` passes a sample through the encoder; `inner(a, b)` is ⟨J(x), J(y)⟩_F of two samples so
    passed and `norm(a)` is ‖J(x)‖²_F, both without any of the shared work. With matrices at the
    ends, J stands for A J Fᵀ. `across` is what the two sweeps meet by, if across a segment.
    """

    def __init__(
        self,
        bound: Bound,
        plan: Plan,
        from_input: Float[Array, "..."] | None = None,
        from_output: Float[Array, "..."] | None = None,
    ) -> None:
        """Compute what samples share.

        Args:
            bound: The structure with its values.
            plan: A plan for it, made for ends like these.
            from_input: F, of shape (r, d), or (d,) if diagonal; the identity if None.
            from_output: A, of shape (m, k), or (k,) if diagonal; the identity if None.
        """
        self.bound, self.plan = bound, plan
        if plan.groups is not None:
            # A barrier, or XLA would convolve constants while it compiles, slowly.
            matrix = jax.lax.optimization_barrier(jnp.asarray(plan.groups.matrix, bound.dtype))
            if plan.groups.side == "input":
                from_input = matrix
            else:
                from_output = matrix
        self._from_input, self._from_output = from_input, from_output
        self.segments = bound.structure.segments
        left = _steps(plan.from_input, range(len(self.segments)))
        right = _steps(plan.from_output, reversed(range(len(self.segments))))
        self._forward = {i for _, i in left}
        self._shared: dict[int, Any] = {}  # kernels and operators of affine segments
        for move, i in [*left, *right]:
            if move == "matrix":
                kernel = bound.kernel(i)
                self._shared[i] = kernel if i in self._forward else kernel.T
            elif move == "operator" and self.segments[i].kind == "affine":
                _, self._shared[i] = bound.linearize(
                    i, bound.origin(i), forward=i in self._forward, linear=True
                )
        shared_left, self._left = self._split_shared(left)
        shared_right, self._right = self._split_shared(right)
        self._a = start(from_input, bound.dtype)
        grams: dict[int, Any] = {}  # from the input, by the segment passed last
        for step in shared_left:
            self._a = self._advance(gathered(self._a), [step])
            if step[0] == "gram":
                grams[step[1]] = gathered(self._a).gram
        self._b = start(from_output, bound.dtype)
        stack: Any = None  # what the last gram was made of
        for step in shared_right:
            stack = self._b.first if step[0] == "gram" else None
            self._b = self._advance(gathered(self._b), [step])
        self.across: Across | Band | RankAcross | None = None
        if plan.across:
            rank = self.segments[plan.position].rank
            if rank is not None:
                self._a, self._b = gathered(self._a), gathered(self._b)
                self.across = self._meet_across_rank(rank, stack)
            else:
                self.across = Band(plan.local, bound) if plan.local else self._meet_across()
        else:
            self._a, self._b = gathered(self._a), gathered(self._b)
        self._corrections = Corrections.of(bound, plan.batch, from_input, from_output, grams)

    def at(self, x: Any) -> At:
        """Pass one sample through the encoder."""
        local: dict[int, Any] = {}
        images: dict[int, Any] = {}
        values: list[Arrays] = [(x,)]
        for i, segment in enumerate(self.segments):
            after = self._corrections.run(i, values[-1]) if self._corrections else None
            if after is not None:
                found, images[i] = after
            elif segment.kind == "affine":
                found = self.bound.run(i, values[-1])
            elif segment.kind == "elementwise":
                found, local[i] = self.bound.slopes(i, values[-1])
            else:
                found, local[i] = self.bound.linearize(
                    i, values[-1], forward=i in self._forward, rows=self.plan.from_output.rows
                )
            values.append(found)
        passed = self._corrections.passed(values, local, images) if self._corrections else None
        (code,) = values[-1]
        return At(code, local, passed)

    def norm(self, a: At) -> Float[Array, ""]:
        """Compute ‖J(x)‖²_F."""
        return self.inner(a, a)

    def inner(self, a: At, b: At) -> Float[Array, ""]:
        """Compute ⟨J(x), J(y)⟩_F = tr J(x)ᵀJ(y)."""
        if self.across is not None:
            position = self.plan.position
            found = self.across.inner(a.local[position], b.local[position])
        else:
            left = self._advance(self._a, self._left, a.local, b.local)
            right = self._advance(self._b, self._right, a.local, b.local)
            found = meet(left, right, a.code.size).astype(self.bound.dtype)
        if self._corrections is None:
            return found
        assert a.passed is not None
        assert b.passed is not None
        return self._corrections.inner(found, a.passed, b.passed)

    def difference(self, a: At, b: At) -> Float[Array, ""]:
        """Compute ‖J(x) − J(y)‖²_F of an encoder of one elementwise segment.

        J is then a constant plus what is linear in the slopes, so that theirs differ first and
        nothing cancels. The segment is met across by the plan, or it is diagonal.
        """
        (at,) = a.local
        pairs = zip(a.local[at], b.local[at], strict=True)
        moved = [None if m is None else m - n for m, n in pairs]
        if isinstance(self.across, Across):  # what passes unchanged adds nothing
            return self.across._replace(vector=None, constant=None).inner(moved, moved)
        return self.norm(At(a.code, {at: moved}, None))

    def _split_shared(self, steps: list[Step]) -> tuple[list[Step], list[Step]]:
        local = (i != _BEFORE and self.segments[i].kind != "affine" for _, i in steps)
        n = next((j for j, found in enumerate(local) if found), len(steps))
        return steps[:n], steps[n:]

    def _advance(
        self,
        state: Carried,
        steps: list[Step],
        first: dict[int, Any] | None = None,
        second: dict[int, Any] | None = None,
    ) -> Carried:
        """Take the steps; without anything local, what they give is shared by all samples."""
        for move, i in steps:
            if move == "pass":
                continue
            if move == "gram":
                state = gram_of(state, shared=first is None)
            elif move == "scale":
                assert first is not None
                assert second is not None
                state = self._scale(state, i, first[i], second[i])
            else:
                a = self._shared[i] if i in self._shared else (first or {})[i]
                b = self._shared[i] if i in self._shared else (second or {})[i]
                if move == "matrix":
                    state = times(state, a)
                else:
                    forward = i in self._forward
                    segment = self.segments[i]
                    width = segment.in_size if forward else segment.out_size
                    state = push(state, a, b, width, self.bound.dtype)
        return state

    def _scale(self, state: Carried, i: int, first: Any, second: Any) -> Carried:
        segment, same = self.segments[i], second is first
        if segment.is_diagonal:
            (a,), (b,) = first, second
            if a is None:
                return state
            if state.is_gram:
                return Carried(state.gram * jnp.outer(a, b), is_gram=True)
            if state.first is None:
                return Carried(a, a if same else b)
            one = state.first * jnp.broadcast_to(a, state.first.shape)
            same = same and state.second is state.first
            other = one if same else state.second * jnp.broadcast_to(b, state.second.shape)
            return Carried(one, other)
        forward = i in self._forward
        if state.is_gram:
            half = edges.apply(segment, second, state.gram, forward=forward)
            return Carried(edges.apply(segment, first, half.T, forward=forward).T, is_gram=True)
        width = segment.in_size if forward else segment.out_size
        state = dense(state, width, self.bound.dtype)
        one = edges.apply(segment, first, state.first, forward=forward)
        if same and state.second is state.first:
            return Carried(one, one)
        return Carried(one, edges.apply(segment, second, state.second, forward=forward))

    def _meet_across(self) -> "Across":
        segment = self.segments[self.plan.position]
        a, b = self._a, self._b
        if segment.is_diagonal:
            return Across(together(a.first * b.first), a.divisors, b.divisors)
        inside, outside = edges.spans(segment.in_sizes), edges.spans(segment.out_sizes)
        own, passing = edges.own(segment), edges.passing(segment)
        sources, targets = ([inside[e.source] for e in own], [outside[e.target] for e in own])
        past, beyond = [inside[e.source] for e in passing], [outside[e.target] for e in passing]
        if a.is_gram:
            a, b = gathered(a), gathered(b)

            def block(rows: int, columns: int) -> Any:
                left, right = (sources, past), (targets, beyond)
                return edges.tile(a.first, left[rows], left[columns]) * edges.tile(
                    b.first, right[rows], right[columns]
                )

            before, after = along(a.divisors, sources), along(b.divisors, targets)
            if not passing:
                return Across(block(0, 0), before, after)
            ones = along(a.divisors, past) * along(b.divisors, beyond)
            vector, constant = matmul(block(0, 1), ones), quadratic_form(ones, block(1, 1))
            return Across(block(0, 0), before, after, vector, constant)
        a = dense(a, segment.in_size, self.bound.dtype)
        b = dense(b, segment.out_size, self.bound.dtype)
        (left, scales), (right, others) = balanced(a.first), balanced(b.first)
        c = together(_gram_of_edges(left, sources) * _gram_of_edges(right, targets))
        before, after = along(scales, sources), along(others, targets)
        if not passing:
            return Across(c, before, after)
        passed = sum(
            _product(
                None if self._starts_with(e.source) else a.first[:, p],
                None if self._ends_with(e) else b.first[:, q],
            )
            for e, p, q in zip(passing, past, beyond, strict=True)
        )
        through = [
            jnp.sum(matmul(left[:, s].T, passed) * right[:, t].T, 1)
            for s, t in zip(sources, targets, strict=True)
        ]
        return Across(c, before, after, jnp.concatenate(through), sum_of_squares(passed))

    def _meet_across_rank(self, rank: LowRank, stack: Any) -> RankAcross:
        size = self.segments[self.plan.position].in_size
        before, after = (Coupling.of(side, size) for side in (self._a, self._b))
        if stack is not None and len(stack) * (1 + rank.blocks) < size:
            after = after._replace(stack=stack / after.scales[None])
        return RankAcross(rank, before, after, before.meet(after))

    def _starts_with(self, source: int) -> bool:
        """Tell whether an array in is the sample itself, so that T is the identity there."""
        at = self.plan.position
        if self._a.first is None:
            return len(self.segments[at].inputs) == 1
        if self.plan.from_input.moves != ("matrix",) or self._from_input is not None:
            return False
        rows = recipe(self.segments[0])[0][source]
        return rows is not None and rows.is_identity

    def _ends_with(self, edge: edges.Edge) -> bool:
        """Tell whether an array out is the code itself, unless the sample is that array, too."""
        if self.plan.from_output.moves != ("matrix",) or self._from_output is not None:
            return False
        rows = recipe(self.segments[-1])[edge.target][0]
        identity = rows is not None and rows.is_identity
        return identity and not self._starts_with(edge.source)


def _gram_of_edges(stack: Any, parts: list[slice]) -> Any:
    """Compute the inner products of a stack's columns, edge by edge; each array's only once."""
    unique = list(dict.fromkeys((p.start, p.stop) for p in parts))
    pieces = [slice(*p) for p in unique]
    whole = gram_apart(edges.columns(stack, pieces))
    places = dict(zip(unique, edges.spans([p.stop - p.start for p in pieces]), strict=True))
    if len(unique) == len(parts):
        return whole
    where = [places[p.start, p.stop] for p in parts]
    return edges.tile(together(whole), where, where)


def _product(left: Any, right: Any) -> Any:
    """Multiply T with Rᵀ, where None stands for the identity."""
    if left is None:
        return right.T
    return left if right is None else matmul(left, right.T)


def _steps(sweep: Sweep, order: Iterable[int]) -> list[Step]:
    """Pair each move with the segment it passes; a gram stays where the last segment ended."""
    steps: list[Step] = []
    indices = iter(order)
    for move in sweep.moves:
        if move == "gram":
            steps.append((move, steps[-1][1] if steps else _BEFORE))
        else:
            steps.append((move, next(indices)))
    return steps
