"""Carry out a plan: codes, ⟨J(x), J(y)⟩ and ‖J(x)‖²_F, from one forward trace of each sample."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcae.jacobian import edges
from jaxcae.jacobian.affine import recipe
from jaxcae.jacobian.bound import Bound, Operator
from jaxcae.jacobian.corrections import Corrections, Passed
from jaxcae.jacobian.directions import sum_of_squares
from jaxcae.jacobian.plan import Move, Plan, Sweep
from jaxcae.jacobian.products import gram, matmul, quadratic_form

Step = tuple[Move, int]
_BEFORE = -1  # where a given matrix becomes a gram before any segment is passed


class Carried(NamedTuple):
    """What a sweep holds for two samples: a diagonal, a stack of vectors each, or their gram.

    Attributes:
        first: The first sample's; None for the identity. A gram is that of the first's columns with
            the second's.
        second: The second sample's; the first's own object where the two are one sample.
        is_gram: Whether it is a gram.
    """

    first: Any = None
    second: Any = None
    is_gram: bool = False

    @property
    def is_diagonal(self) -> bool:
        """Whether it stands for a diagonal matrix."""
        return self.first is None or self.first.ndim == 1


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
    ends, J stands for A J Fᵀ.
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
        self._a = _start(from_input, bound.dtype)
        grams: dict[int, Any] = {}  # from the input, by the segment passed last
        for step in shared_left:
            self._a = self._advance(self._a, [step])
            if step[0] == "gram":
                grams[step[1]] = self._a.first
        self._b = self._advance(_start(from_output, bound.dtype), shared_right)
        self._across = self._meet_across() if plan.across else None
        self._corrections = Corrections.of(bound, plan.batch, from_input, from_output, grams)

    def at(self, x: Any) -> At:
        """Pass one sample through the encoder."""
        local: dict[int, Any] = {}
        values = [(x,)]
        for i, segment in enumerate(self.segments):
            if segment.kind == "affine":
                found = self.bound.run(i, values[-1])
            elif segment.kind == "elementwise":
                found, local[i] = self.bound.slopes(i, values[-1])
            else:
                found, local[i] = self.bound.linearize(i, values[-1], forward=i in self._forward)
            values.append(found)
        passed = self._corrections.passed(values, local) if self._corrections else None
        (code,) = values[-1]
        return At(code, local, passed)

    def norm(self, a: At) -> Float[Array, ""]:
        """Compute ‖J(x)‖²_F."""
        return self.inner(a, a)

    def inner(self, a: At, b: At) -> Float[Array, ""]:
        """Compute ⟨J(x), J(y)⟩_F = tr J(x)ᵀJ(y)."""
        if self._across is not None:
            position = self.plan.position
            found = self._across.inner(a.local[position], b.local[position])
        else:
            left = self._advance(self._a, self._left, a.local, b.local)
            right = self._advance(self._b, self._right, a.local, b.local)
            found = _meet(left, right, a.code.size).astype(self.bound.dtype)
        if self._corrections is None:
            return found
        assert a.passed is not None
        assert b.passed is not None
        return self._corrections.inner(found, a.passed, b.passed)

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
                state = self._gram(state, shared=first is None)
            elif move == "scale":
                assert first is not None
                assert second is not None
                state = self._scale(state, i, first[i], second[i])
            else:
                a = self._shared[i] if i in self._shared else (first or {})[i]
                b = self._shared[i] if i in self._shared else (second or {})[i]
                if move == "matrix":
                    state = _times(state, a)
                else:
                    forward = i in self._forward
                    segment = self.segments[i]
                    width = segment.in_size if forward else segment.out_size
                    state = _push(state, a, b, width, self.bound.dtype)
        return state

    def _gram(self, state: Carried, shared: bool) -> Carried:
        if state.second is state.first:
            return Carried(gram(state.first, shared), is_gram=True)
        return Carried(matmul(state.first.T, state.second), is_gram=True)

    def _scale(self, state: Carried, i: int, first: Any, second: Any) -> Carried:
        segment, same = self.segments[i], second is first
        if segment.is_diagonal:
            (a,), (b,) = first, second
            if a is None:
                return state
            if state.is_gram:
                return Carried(state.first * jnp.outer(a, b), is_gram=True)
            if state.first is None:
                return Carried(a, a if same else b)
            one = state.first * jnp.broadcast_to(a, state.first.shape)
            same = same and state.second is state.first
            other = one if same else state.second * jnp.broadcast_to(b, state.second.shape)
            return Carried(one, other)
        forward = i in self._forward
        if state.is_gram:
            half = edges.apply(segment, second, state.first, forward=forward)
            return Carried(edges.apply(segment, first, half.T, forward=forward).T, is_gram=True)
        width = segment.in_size if forward else segment.out_size
        state = _dense(state, width, self.bound.dtype)
        one = edges.apply(segment, first, state.first, forward=forward)
        if same and state.second is state.first:
            return Carried(one, one)
        return Carried(one, edges.apply(segment, second, state.second, forward=forward))

    def _meet_across(self) -> "Across":
        segment = self.segments[self.plan.position]
        a, b = self._a, self._b
        if segment.is_diagonal:
            return Across(a.first * b.first)
        inside, outside = edges.spans(segment.in_sizes), edges.spans(segment.out_sizes)
        own, passing = edges.own(segment), edges.passing(segment)
        sources, targets = ([inside[e.source] for e in own], [outside[e.target] for e in own])
        past, beyond = [inside[e.source] for e in passing], [outside[e.target] for e in passing]
        if a.is_gram:

            def block(rows: int, columns: int) -> Any:
                left, right = (sources, past), (targets, beyond)
                return edges.tile(a.first, left[rows], left[columns]) * edges.tile(
                    b.first, right[rows], right[columns]
                )

            if not passing:
                return Across(block(0, 0))
            return Across(block(0, 0), jnp.sum(block(0, 1), 1), jnp.sum(block(1, 1)))
        a = _dense(a, segment.in_size, self.bound.dtype)
        b = _dense(b, segment.out_size, self.bound.dtype)
        c = _gram_of_edges(a.first, sources) * _gram_of_edges(b.first, targets)
        if not passing:
            return Across(c)
        along = sum(
            _product(
                None if self._starts_with(e.source) else a.first[:, p],
                None if self._ends_with(e) else b.first[:, q],
            )
            for e, p, q in zip(passing, past, beyond, strict=True)
        )
        through = [
            jnp.sum(matmul(a.first[:, s].T, along) * b.first[:, t].T, 1)
            for s, t in zip(sources, targets, strict=True)
        ]
        return Across(c, jnp.concatenate(through), sum_of_squares(along))

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


class Across(NamedTuple):
    """Two shared sweeps that meet across an elementwise segment: ‖A₀‖² + 2mᵀc + mᵀCm."""

    matrix: Float[Array, "edges edges"]
    vector: Float[Array, " edges"] | None = None
    constant: Float[Array, ""] | None = None

    def inner(self, first: Sequence[Any], second: Sequence[Any]) -> Float[Array, ""]:
        """Compute it for the slopes of two samples."""
        m, n = (_concatenate([s for s in found if s is not None]) for found in (first, second))
        if second is first:
            total = quadratic_form(m, self.matrix)
        else:
            total = jnp.sum(matmul(m, self.matrix) * n)
        if self.vector is None or self.constant is None:
            return total
        return total + matmul(m + n, self.vector) + self.constant


def _concatenate(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _gram_of_edges(stack: Any, parts: list[slice]) -> Any:
    """Compute the inner products of a stack's columns, edge by edge; each array's only once."""
    unique = list(dict.fromkeys((p.start, p.stop) for p in parts))
    pieces = [slice(*p) for p in unique]
    whole = gram(edges.columns(stack, pieces), True)
    places = dict(zip(unique, edges.spans([p.stop - p.start for p in pieces]), strict=True))
    if len(unique) == len(parts):
        return whole
    where = [places[p.start, p.stop] for p in parts]
    return edges.tile(whole, where, where)


def _product(left: Any, right: Any) -> Any:
    """Multiply T with Rᵀ, where None stands for the identity."""
    if left is None:
        return right.T
    return left if right is None else matmul(left, right.T)


def _start(matrix: Any, dtype: Any) -> Carried:
    array = None if matrix is None else jnp.asarray(matrix).astype(dtype)
    return Carried(array, array)


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


def _dense(state: Carried, width: int, dtype: Any) -> Carried:
    """Write a diagonal as a matrix."""
    if not state.is_diagonal:
        return state
    if state.first is None:
        eye = jnp.eye(width, dtype=dtype)
        return Carried(eye, eye)
    first = jnp.diag(state.first)
    return Carried(first, first if state.second is state.first else jnp.diag(state.second))


def _both(state: Carried, change: Any) -> Carried:
    first = change(state.first)
    return Carried(first, first if state.second is state.first else change(state.second))


def _times(state: Carried, kernel: Any) -> Carried:
    """Carry a sweep through a kernel."""
    if state.is_gram:
        return Carried(matmul(matmul(kernel.T, state.first), kernel), is_gram=True)
    if state.first is None:
        return Carried(kernel, kernel)
    if state.is_diagonal:
        return _both(state, lambda d: d[:, None] * kernel)
    return _both(state, lambda stack: stack @ kernel)


def _push(state: Carried, a: Operator, b: Operator, width: int, dtype: Any) -> Carried:
    """Carry a sweep through an operator for each sample."""
    if state.is_gram:
        half = jax.vmap(b)(state.first)
        return Carried(jax.vmap(a)(half.T).T, is_gram=True)
    state = _dense(state, width, dtype)
    first = jax.vmap(a)(state.first)
    same = b is a and state.second is state.first
    return Carried(first, first if same else jax.vmap(b)(state.second))


def _meet(a: Carried, b: Carried, size: int) -> Float[Array, ""]:
    """Compute ⟨RTᵀ, R′T′ᵀ⟩ from what the two sweeps carry."""
    if a.is_diagonal and not a.is_gram and b.is_diagonal and not b.is_gram:
        present = [s for s in (a, b) if s.first is not None]
        if not present:
            return jnp.float32(size)
        first, second = (_all(getattr(s, name) for s in present) for name in ("first", "second"))
        return jnp.sum(first * second)
    if a.is_gram and b.is_gram:
        return jnp.sum(a.first * b.first)
    if a.is_gram or b.is_gram:
        symmetric, other = (a, b) if a.is_gram else (b, a)
        if other.is_diagonal:
            weights = _weights(other)
            squares = jnp.diag(symmetric.first)
            return jnp.sum(squares if weights is None else weights * squares)
        if other.second is other.first:
            return jnp.sum(quadratic_form(other.first, symmetric.first))
        return _one_sided(symmetric, other)
    if a.is_diagonal or b.is_diagonal:
        diagonal, other = (a, b) if a.is_diagonal else (b, a)
        weights, squares = _weights(diagonal), jnp.sum(other.first * other.second, 0)
        return jnp.sum(squares if weights is None else weights * squares)
    first = b.first @ a.first.T
    if a.second is a.first and b.second is b.first:
        return sum_of_squares(first)
    return jnp.sum(first * (b.second @ a.second.T))


def _one_sided(symmetric: Carried, stack: Carried) -> Float[Array, ""]:
    return jnp.sum(matmul(stack.first, symmetric.first) * stack.second)


def _weights(diagonal: Carried) -> Any:
    return None if diagonal.first is None else diagonal.first * diagonal.second


def _all(factors: Iterable[Any]) -> Any:
    product = None
    for factor in factors:
        product = factor if product is None else product * factor
    return product
