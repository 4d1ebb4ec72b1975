"""What a sweep holds for one or two samples, and how it is carried on."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcae.jacobian.bound import Operator
from jaxcae.jacobian.directions import sum_of_squares
from jaxcae.jacobian.products import balanced, gram, gram_apart, matmul, quadratic_form, together


class Carried(NamedTuple):
    """What a sweep holds for two samples: a diagonal, a stack of vectors each, or their gram.

    Attributes:
        first: The first sample's; None for the identity. A gram is that of the first's columns with
            the second's.
        second: The second sample's; the first's own object where the two are one sample.
        is_gram: Whether it is a gram.
        scales: Of a gram: powers of two s that its vectors were divided by, so that products of
            large and small units neither overflow nor vanish; the gram itself is ssᵀ ∘ first.
    """

    first: Any = None
    second: Any = None
    is_gram: bool = False
    scales: Any = None

    @property
    def is_diagonal(self) -> bool:
        """Whether it stands for a diagonal matrix."""
        return self.first is None or self.first.ndim == 1

    @property
    def divisors(self) -> Any:
        """The scales of a gram; 1 where it has none, having been carried past a segment."""
        return jnp.ones(len(self.first), self.first.dtype) if self.scales is None else self.scales

    @property
    def gram(self) -> Any:
        """The gram, its scales multiplied out."""
        if self.scales is None:
            return self.first
        return self.scales[:, None] * self.first * self.scales[None, :]


def gram_of(state: Carried, shared: bool) -> Carried:
    """Turn a stack into its gram; one that the batch shares is scaled to a diagonal near 1.

    Where devices share the batch, the columns of such a gram are left apart: see `gathered`.
    """
    if state.second is not state.first:
        return Carried(matmul(state.first.T, state.second), is_gram=True)
    if not shared:
        return Carried(gram(state.first), is_gram=True)
    scaled, scales = balanced(state.first)
    return Carried(gram_apart(scaled), is_gram=True, scales=scales)


def gathered(state: Carried) -> Carried:
    """Gather a gram whose columns are on several devices."""
    return state._replace(first=together(state.first)) if state.is_gram else state


def start(matrix: Any, dtype: Any) -> Carried:
    """Start from a matrix, or from the identity if None."""
    array = None if matrix is None else jnp.asarray(matrix).astype(dtype)
    return Carried(array, array)


def dense(state: Carried, width: int, dtype: Any) -> Carried:
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


def times(state: Carried, kernel: Any) -> Carried:
    """Carry a sweep through a kernel."""
    if state.is_gram:
        if state.scales is not None:
            kernel = state.scales[:, None] * kernel
        return Carried(matmul(matmul(kernel.T, state.first), kernel), is_gram=True)
    if state.first is None:
        return Carried(kernel, kernel)
    if state.is_diagonal:
        return _both(state, lambda d: d[:, None] * kernel)
    return _both(state, lambda stack: stack @ kernel)


def push(state: Carried, a: Operator, b: Operator, width: int, dtype: Any) -> Carried:
    """Carry a sweep through an operator for each sample."""
    if state.is_gram:
        half = jax.vmap(b)(state.gram)
        return Carried(jax.vmap(a)(half.T).T, is_gram=True)
    state = dense(state, width, dtype)
    first = jax.vmap(a)(state.first)
    same = b is a and state.second is state.first
    return Carried(first, first if same else jax.vmap(b)(state.second))


def meet(a: Carried, b: Carried, size: int) -> Float[Array, ""]:
    """Compute ⟨RTᵀ, R′T′ᵀ⟩ from what the two sweeps carry."""
    if a.is_diagonal and not a.is_gram and b.is_diagonal and not b.is_gram:
        present = [s for s in (a, b) if s.first is not None]
        if not present:
            return jnp.float32(size)
        first, second = (_all(getattr(s, name) for s in present) for name in ("first", "second"))
        return jnp.sum(first * second)
    if a.is_gram and b.is_gram:
        return jnp.sum(a.gram * b.gram)
    if a.is_gram or b.is_gram:
        symmetric, other = (a, b) if a.is_gram else (b, a)
        if other.is_diagonal:
            weights = _weights(other)
            squares = jnp.diag(symmetric.first)
            if symmetric.scales is not None:
                squares = squares * symmetric.scales * symmetric.scales
            return jnp.sum(squares if weights is None else weights * squares)
        if symmetric.scales is not None:
            other = _both(other, lambda stack: stack * symmetric.scales[None, :])
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
