"""‖J‖²_F one direction at a time: columns by forward mode, rows by reverse mode."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcae.jacobian.jaxprs import typed_like
from jaxcae.jacobian.program import Encoder

PerSample = Callable[[Any], tuple[Any, Float[Array, ""]]]
"""`x -> (code, ‖J(x)‖²_F)` for one sample."""


def forward(encoder: Encoder, chunk_size: int | None = None) -> PerSample:
    """Sum the squares of the d columns J e_j, each a Jacobian-vector product.

    Memory is O(d · width) per sample, or O(chunk_size · width) when chunked.
    """

    def code_and_norm(x: Any) -> tuple[Any, Float[Array, ""]]:
        code, push = jax.linearize(encoder.encode, x)

        def product(u: Any) -> Any:
            return push(typed_like(encoder.along(u), x))

        return code, _sum_of_squares(product, encoder.directions, x.dtype, chunk_size)

    return code_and_norm


def reverse(encoder: Encoder, chunk_size: int | None = None) -> PerSample:
    """Sum the squares of the k rows e_iᵀJ, each a vector-Jacobian product.

    Memory is O(k · width) per sample, or O(chunk_size · width) when chunked.
    """

    def code_and_norm(x: Any) -> tuple[Any, Float[Array, ""]]:
        code, pull = jax.vjp(encoder.encode, x)

        def product(v: Any) -> Any:
            return encoder.measured(pull(typed_like(v, code))[0])

        return code, _sum_of_squares(product, code.size, code.dtype, chunk_size)

    return code_and_norm


def _sum_of_squares(
    product: Callable[[Any], Any], count: int, dtype: Any, chunk_size: int | None
) -> Float[Array, ""]:
    def squared_norm(index: Any) -> Float[Array, ""]:
        return sum_of_squares(product(jax.nn.one_hot(index, count, dtype=dtype)))

    indices = jnp.arange(count)
    if chunk_size is None or chunk_size >= count:
        return jnp.sum(jax.vmap(squared_norm)(indices))
    # Rematerialised: the backward pass would otherwise store every chunk after all.
    return jnp.sum(jax.lax.map(jax.checkpoint(squared_norm), indices, batch_size=chunk_size))


def sum_of_squares(x: Float[Array, "..."]) -> Float[Array, ""]:
    """Sum x² in float32 at least; never norm(x)², whose gradient at x = 0 is NaN."""
    return jnp.sum(jnp.square(accurate(x)))


def accurate(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Convert to float32 if the dtype is narrower, so that sums of squares keep their digits."""
    return x.astype(wide(x.dtype))


def wide(*dtypes: Any) -> Any:
    """Find the dtype to accumulate in: float64 if any is, float32 otherwise.

    By hand, since under strict promotion of dtypes JAX refuses to mix them.
    """
    widest = max(jnp.finfo(dtype).bits for dtype in dtypes)
    return jnp.dtype("float64" if widest > 32 else "float32")
