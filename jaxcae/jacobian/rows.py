"""Rows of a matrix that are known by where their entries go, by a formula, or in full."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Var
from jaxtyping import Array, Float

from jaxcae.jacobian.jaxprs import struct
from jaxcae.jacobian.structure import size_of

Known = Mapping[Var, Any]
"""Values of what equations read."""
Matrix = Callable[[Known], Any]


class Rows:
    """What the n basis vectors of an array become further on: n rows of `size` elements.

    Attributes:
        flops: Operations to compute them.
        entries: Where each row has its only entry (−1: none), if it has at most one.
        is_identity: Whether they are the basis vectors themselves.
    """

    def __init__(self, n: int, v: Any) -> None:
        self.n, self.size, self.like = n, size_of(v), v
        self.flops = 0.0
        self.entries: np.ndarray | None = None
        self.factors: Matrix | None = None  # of the entries; 1 if None
        self.dense: Matrix | None = None
        self.push: Callable[[Known, Any], Any] | None = None  # applies them to one vector
        self.push_flops = 0.0

    @property
    def is_identity(self) -> bool:
        return (
            self.entries is not None
            and self.factors is None
            and self.n == self.size
            and bool((self.entries == np.arange(self.n)).all())
        )

    def matrix(self, known: Known) -> Float[Array, "n size"]:
        """Compute the rows as one matrix."""
        if self.dense is not None:
            return self.dense(known)
        dtype = struct(self.like).dtype
        if self.entries is not None:
            hot = jnp.asarray(self.entries)[:, None] == jnp.arange(self.size)[None, :]
            placed = hot.astype(dtype)
            return placed if self.factors is None else placed * self.factors(known)[:, None]
        return self._applied(known, self.n <= self.size)

    def times(self, known: Known, parameter: Float[Array, "size s"]) -> Float[Array, "n s"]:
        """Multiply the rows with a parameter."""
        if self.entries is not None:
            found = parameter if self.is_identity else parameter[np.maximum(self.entries, 0)]
            if (self.entries < 0).any():
                found = jnp.where((self.entries < 0)[:, None], 0, found)
            return found if self.factors is None else found * self.factors(known)[:, None]
        if self.dense is None and parameter.shape[1] < self.n:
            pull = self._transpose(known)
            return jax.vmap(pull, 1, 1)(parameter)
        return self.matrix(known) @ parameter

    def times_flops(self, columns: int) -> float:
        """Count the operations of `times`, beside those of the rows."""
        if self.entries is not None:
            return 0.0
        if self.dense is None and columns < self.n:
            return columns * self.push_flops - self.flops
        return 2.0 * self.n * self.size * columns

    def _applied(self, known: Known, forward: bool) -> Any:
        if forward:
            return jax.vmap(lambda t: self._push(known, t))(jnp.eye(self.n, dtype=self._dtype))
        return jax.vmap(self._transpose(known), 1, 1)(
            jnp.eye(self.size, dtype=struct(self.like).dtype)
        )

    def _push(self, known: Known, t: Any) -> Any:
        assert self.push is not None
        return self.push(known, t).reshape(-1)

    def _transpose(self, known: Known) -> Callable[[Any], Any]:
        source = jax.ShapeDtypeStruct((self.n,), self._dtype)
        transposed = jax.linear_transpose(lambda t: self._push(known, t), source)
        return lambda column: transposed(column.astype(struct(self.like).dtype))[0]

    _dtype: Any = None
