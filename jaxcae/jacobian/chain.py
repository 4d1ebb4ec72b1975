"""Carry out a plan: the code and ‖J‖²_F of one sample from one forward trace."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcae.jacobian.affine import kernel
from jaxcae.jacobian.directions import PerSample, accurate, sum_of_squares
from jaxcae.jacobian.jaxprs import typed_like
from jaxcae.jacobian.plan import Move, Plan, Sweep
from jaxcae.jacobian.products import gram, quadratic_form
from jaxcae.jacobian.structure import Segment, Structure


class Carried(NamedTuple):
    """What a sweep holds: the identity (None), a vector, a stack of vectors, or a gram."""

    array: Any = None
    is_gram: bool = False

    @property
    def is_diagonal(self) -> bool:
        """Whether it stands for a diagonal matrix."""
        return self.array is None or self.array.ndim == 1


Step = tuple[Move, int]
Operator = Callable[[Any], Any]


def chain(structure: Structure, plan: Plan) -> PerSample:
    """Make `x -> (code, ‖J(x)‖²_F)` by the plan. What samples share is computed here, once."""
    segments = structure.segments
    if not structure.depends:
        return lambda x: (structure.encode(x), jnp.zeros(()))
    left = _steps(plan.from_input, range(len(segments)))
    right = _steps(plan.from_output, reversed(range(len(segments))))
    forward = {i for _, i in left}
    kernels: dict[int, Any] = {}
    operators: dict[int, Operator] = {}
    for move, i in [*left, *right]:
        if move == "matrix":
            matrix = accurate(kernel(segments[i]))
            kernels[i] = matrix if i in forward else matrix.T
        elif move == "operator" and segments[i].kind == "affine":
            origin = typed_like(jnp.zeros(segments[i].input.shape), segments[i].input)
            _, operators[i] = _linearize(segments[i], origin, i in forward)

    def advance(state: Carried, steps: list[Step], local: dict[int, Any] | None = None) -> Carried:
        """Take the steps; without anything local, what they give is shared by all samples."""
        at = {**kernels, **operators, **(local or {})}
        for move, i in steps:
            width = segments[i].in_size if i in forward else segments[i].out_size
            if move == "gram":
                state = Carried(gram(state.array, local is None), True)
            else:
                state = _advance(state, move, at.get(i), width)
        return state

    shared_left, left = _split_shared(left, segments)
    shared_right, right = _split_shared(right, segments)
    a, b = advance(Carried(), shared_left), advance(Carried(), shared_right)
    across = a.array * b.array if plan.across else None

    def code_and_norm(x: Any) -> tuple[Any, Float[Array, ""]]:
        local: dict[int, Any] = {}  # slopes of elementwise segments, products of opaque ones
        v = x
        for i, segment in enumerate(segments):
            if segment.kind == "affine":
                v = segment.run(v)
            elif segment.kind == "elementwise":
                v, local[i] = value_and_slopes(segment, v)
            else:
                v, local[i] = _linearize(segment, v, i in forward)
        if plan.across:
            return v, quadratic_form(local[plan.position], across)
        return v, _meet(advance(a, left, local), advance(b, right, local), v.size)

    return code_and_norm


def _steps(sweep: Sweep, order: Iterable[int]) -> list[Step]:
    """Pair each move with the segment it passes; a gram stays where the last segment ended."""
    steps: list[Step] = []
    indices = iter(order)
    for move in sweep.moves:
        steps.append((move, steps[-1][1] if move == "gram" else next(indices)))
    return steps


def _split_shared(
    steps: list[Step], segments: tuple[Segment, ...]
) -> tuple[list[Step], list[Step]]:
    n = next((j for j, (_, i) in enumerate(steps) if segments[i].kind != "affine"), len(steps))
    return steps[:n], steps[n:]


def value_and_slopes(segment: Segment, v: Any) -> tuple[Any, Float[Array, " s"]]:
    """Compute an elementwise segment and the diagonal of its Jacobian, for one sample."""
    if segment.forward_mode:
        value, slopes = jax.jvp(segment.run, (v,), (jnp.ones_like(v),))
    else:  # a diagonal Jacobian is its own transpose
        value, pull = jax.vjp(segment.run, v)
        (slopes,) = pull(jnp.ones_like(value))
    return value, accurate(slopes).reshape(-1)


def _linearize(segment: Segment, v: Any, forward: bool) -> tuple[Any, Operator]:
    """Compute the value and the product with J (forward) or Jᵀ, for flat vectors."""
    if forward:
        value, push = jax.linearize(segment.run, v)
        source, product = v, push
    else:
        value, pull = jax.vjp(segment.run, v)
        source, product = value, lambda cotangent: pull(cotangent)[0]

    def operator(vector: Float[Array, " s"]) -> Float[Array, " t"]:
        return accurate(product(typed_like(vector, source))).reshape(-1)

    return value, operator


def _advance(state: Carried, move: Move, through: Any, width: int) -> Carried:
    """Carry a sweep through a segment entered at that width, by its slopes, kernel or operator."""
    array, is_gram = state
    if move == "scale":
        if array is None:
            return Carried(through)
        if is_gram:
            return Carried(array * jnp.outer(through, through), True)
        return Carried(array * jnp.broadcast_to(through, array.shape))
    if move == "matrix":
        if is_gram:
            return Carried(through.T @ array @ through, True)
        if state.is_diagonal:
            return Carried(through if array is None else array[:, None] * through)
        return Carried(array @ through)
    if is_gram:
        half = jax.vmap(through)(array)
        return Carried(jax.vmap(through)(half.T), True)
    if state.is_diagonal:
        array = jnp.diag(_or(array, jnp.ones(width)))
    return Carried(jax.vmap(through)(array))


def _meet(a: Carried, b: Carried, size: int) -> Float[Array, ""]:
    """Compute ‖R Tᵀ‖²_F from what the two sweeps carry."""
    if a.is_diagonal and b.is_diagonal:
        ones = jnp.ones(size)
        return sum_of_squares(_or(a.array, ones) * _or(b.array, ones))
    if a.is_diagonal or b.is_diagonal:
        diagonal, other = (a, b) if a.is_diagonal else (b, a)
        squares = jnp.diag(other.array) if other.is_gram else jnp.sum(other.array**2, 0)
        return jnp.sum(squares if diagonal.array is None else diagonal.array**2 * squares)
    if a.is_gram and b.is_gram:
        return jnp.sum(a.array * b.array)
    if a.is_gram or b.is_gram:
        symmetric, stack = (a, b) if a.is_gram else (b, a)
        return jnp.sum(quadratic_form(stack.array, symmetric.array))
    return sum_of_squares(b.array @ a.array.T)


def _or(array: Any, default: Any) -> Any:
    return default if array is None else array
