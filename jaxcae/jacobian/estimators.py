"""Estimates of ‖J‖²_F for a black-box encoder: random projections and finite differences."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxcae.jacobian.directions import accurate, sum_of_squares
from jaxcae.jacobian.jaxprs import typed_like

Distribution = Literal["rademacher", "orthonormal", "sphere", "normal"]
DISTRIBUTIONS = ("rademacher", "orthonormal", "sphere", "normal")


def draw_probes(
    key: PRNGKeyArray, num_probes: int, size: int, distribution: Distribution
) -> Float[Array, "num_probes size"]:
    """Draw probes v with E[vvᵀ] = I.

    `"rademacher"` has entries ±1 (the least variance of independent entries), `"normal"` standard
    normal ones, `"sphere"` is uniform on the sphere of radius √size, and `"orthonormal"` draws
    mutually orthogonal vectors of that length (Haar), so that `size` of them leave no error.

    Raises:
        ValueError: If more orthonormal probes are asked for than there are dimensions.
    """
    if distribution == "rademacher":
        return jax.random.rademacher(key, (num_probes, size), jnp.float32)
    normal = jax.random.normal(key, (num_probes, size))
    if distribution == "normal":
        return normal
    if distribution == "sphere":
        return normal * jnp.sqrt(size / jnp.sum(normal**2, -1, keepdims=True))
    if num_probes > size:
        raise ValueError(
            f"num_probes must be at most the code's size {size} for orthonormal probes, got "
            f"{num_probes}. With {size} the result is exact."
        )
    # Signs are irrelevant to vᵀJJᵀv, so the QR factor serves as it is.
    basis, _ = jnp.linalg.qr(normal.T)
    return basis.T * jnp.sqrt(size)


def projected_norms(
    encode: Callable[[Any], Any], num_probes: int, distribution: Distribution
) -> Callable[[Any, PRNGKeyArray], tuple[Any, Float[Array, " num_probes"]]]:
    """Make `(x, key) -> (code, ‖Jᵀv‖² for each probe v)`, each of expectation ‖J‖²_F.

    References:
        Hutchinson, "A stochastic estimator of the trace of the influence matrix",
        doi:10.1080/03610919008812866.
    """

    def code_and_norms(x: Any, key: PRNGKeyArray) -> tuple[Any, Float[Array, " num_probes"]]:
        code, pull = jax.vjp(encode, x)
        probes = draw_probes(key, num_probes, code.size, distribution)
        return code, jax.vmap(lambda v: sum_of_squares(pull(typed_like(v, code))[0]))(probes)

    return code_and_norms


def finite_difference(
    encode: Callable[[Any], Any], step: float | None = None, chunk_size: int | None = None
) -> Callable[[Any], tuple[Any, Float[Array, ""]]]:
    """Make `x -> (code, Σ_j ‖h(x + s_j e_j) − h(x − s_j e_j)‖² / (2 s_j)²)`.

    Central differences: the error of a column is O(s²) from the formula and O(ε/s) from rounding,
    balanced at s_j = ∛ε · max(1, |x_j|).

    Args:
        encode: The encoder of one sample.
        step: Relative step in place of ∛ε, with ε the spacing of x's dtype at 1.
        chunk_size: Features differenced at a time; all of them if None.
    """

    def code_and_norm(x: Any) -> tuple[Any, Float[Array, ""]]:
        relative = step or float(jnp.finfo(x.dtype).eps) ** (1 / 3)
        flat = x.reshape(-1)

        def column(j: Any) -> Float[Array, ""]:
            s = relative * jnp.maximum(1, jnp.abs(flat[j]))
            above, below = flat[j] + s, flat[j] - s
            at = [encode(flat.at[j].set(value).reshape(x.shape)) for value in (above, below)]
            # The step that was taken, after rounding, not the one that was asked for.
            return sum_of_squares((accurate(at[0]) - accurate(at[1])) / accurate(above - below))

        indices = jnp.arange(x.size)
        if chunk_size is None or chunk_size >= x.size:
            return encode(x), jnp.sum(jax.vmap(column)(indices))
        columns = jax.lax.map(jax.checkpoint(column), indices, batch_size=chunk_size)
        return encode(x), jnp.sum(columns)

    return code_and_norm
