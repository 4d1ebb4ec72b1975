"""Estimates of ‖J‖²_F for a black-box encoder: random projections and finite differences."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxcae.jacobian.directions import accurate, sum_of_squares
from jaxcae.jacobian.jaxprs import placed_with, typed_like
from jaxcae.jacobian.program import Encoder

Distribution = Literal["rademacher", "orthonormal", "sphere", "normal"]
DISTRIBUTIONS = ("rademacher", "orthonormal", "sphere", "normal")


def draw_probes(
    key: PRNGKeyArray, xs: Any, num_probes: int, size: int, distribution: Distribution
) -> Float[Array, "batch num_probes size"]:
    """Draw probes v with E[vvᵀ] = I for every sample of a batch, and place them with it.

    `"rademacher"` has entries ±1 (the least variance of independent entries), balanced over the
    batch as `balanced_signs` explains. The others are independent between samples: `"normal"` has
    standard normal entries, `"sphere"` is uniform on the sphere of radius √size, and
    `"orthonormal"` draws mutually orthogonal vectors of that length (Haar) for each sample, so that
    `size` of them leave no error.

    Raises:
        ValueError: If more orthonormal probes are asked for than there are dimensions.
    """
    if distribution == "orthonormal" and num_probes > size:
        raise ValueError(
            f"num_probes must be at most the code's size {size} for orthonormal probes, got "
            f"{num_probes}. With {size} the result is exact."
        )
    batch = xs.shape[0]
    if distribution == "rademacher":
        keys = jax.random.split(key, num_probes)
        probes = jax.vmap(lambda key: balanced_signs(key, batch, size), out_axes=1)(keys)
    else:
        probes = jax.random.normal(key, (batch, num_probes, size))
    if distribution == "sphere":
        probes *= jnp.sqrt(size / jnp.sum(probes**2, -1, keepdims=True))
    elif distribution == "orthonormal":
        # Signs are irrelevant to vᵀJJᵀv, so the QR factor serves as it is.
        basis, _ = jnp.linalg.qr(probes.mT)
        probes = basis.mT * jnp.sqrt(size)
    return placed_with(xs, probes)


def balanced_signs(key: PRNGKeyArray, batch: int, size: int) -> Float[Array, "batch size"]:
    """Draw one Rademacher probe a sample, such that what samples have in common cancels.

    Take `size` columns, at random, of the Hadamard matrix whose order n is the power of two from
    `size` on. Each n samples in turn get its n rows, the columns under random signs, drawn anew for
    each such group. So every v_b alone is an ordinary Rademacher vector, and Σ v_b v_bᵀ = n I over
    a group. For symmetric A_b without diagonals (which add no variance) Σ_b v_bᵀA_b v_b over
    the group has the variance

        2n/(n − 1) Σ_b ‖A_b − Ā‖²_F    in place of    2 Σ_b ‖A_b‖²_F

    with Ā their mean: none where all are equal, and never more than n/(n − 1) times as much. Of a
    group of m < n samples only the share m/n of what is common cancels: the sum is then
    Σ_b ‖A_b‖² − (m²/n) ‖Ā‖². The same holds for gradients, which are sums of such forms.

    (By the signs the covariance of rows b and b' is 2 Σ_{i≠j} A_ij A'_ij H_cd, with c and d the
    exclusive or of the rows' and of the columns' numbers; and over the columns' choice, which makes
    every d ≠ 0 as likely as another, H_cd averages −1/(n − 1). Between groups it is 0.)
    """
    order = 1 << (size - 1).bit_length()
    sign_key, column_key = jax.random.split(key)
    signs = jax.random.rademacher(sign_key, (-(-batch // order), size), jnp.float32)
    columns = jax.random.permutation(column_key, order)[:size]
    samples = jnp.arange(batch)
    # H_ij = (−1)^(the number of binary ones that i and j share).
    shared = jax.lax.population_count((samples % order)[:, None] & columns[None, :])
    return (1 - 2 * (shared & 1)).astype(jnp.float32) * signs[samples // order]


def hutchinson(
    encoder: Encoder,
    xs: Any,
    key: PRNGKeyArray,
    num_probes: int = 1,
    distribution: Distribution = "rademacher",
) -> tuple[Any, Float[Array, "batch num_probes"]]:
    """Compute codes and ‖Jᵀv‖² for each probe v of each sample, each of expectation ‖J‖²_F.

    References:
        Hutchinson, "A stochastic estimator of the trace of the influence matrix",
        doi:10.1080/03610919008812866.
    """
    size = encoder.code_size

    def project(x: Any, probes: Any) -> tuple[Any, Float[Array, " num_probes"]]:
        code, pull = jax.vjp(encoder.encode, x)
        return code, jax.vmap(
            lambda v: sum_of_squares(encoder.measured(pull(typed_like(v, code))[0]))
        )(probes)

    return jax.vmap(project)(xs, draw_probes(key, xs, num_probes, size, distribution))


def finite_difference(
    encoder: Encoder, step: float | None = None, chunk_size: int | None = None
) -> Callable[[Any], tuple[Any, Float[Array, ""]]]:
    """Make `x -> (code, Σ_j ‖h(x + s_j e_j) − h(x − s_j e_j)‖² / (2 s_j)²)`.

    Central differences: the error of a column is O(s²) from the formula and O(ε/s) from rounding,
    balanced at s_j = ∛ε · max(1, |x_j|).

    Args:
        encoder: The encoder.
        step: Relative step in place of ∛ε, with ε the spacing at 1 of the coarsest dtype that the
            encoder computes in: in mixed precision the samples' own is too fine.
        chunk_size: Features differenced at a time; all of them if None.
    """

    def code_and_norm(x: Any) -> tuple[Any, Float[Array, ""]]:
        relative = step or encoder.epsilon ** (1 / 3)
        flat = x.reshape(-1)

        def column(j: Any) -> Float[Array, ""]:
            if encoder.metric is not None:
                return along(encoder.along(jax.nn.one_hot(j, count, dtype=x.dtype)))
            s = relative * jnp.maximum(1, jnp.abs(flat[j]))
            above, below = flat[j] + s, flat[j] - s
            at = [
                encoder.encode(flat.at[j].set(value).reshape(x.shape)) for value in (above, below)
            ]
            # The step that was taken, after rounding, not the one that was asked for.
            return sum_of_squares((accurate(at[0]) - accurate(at[1])) / accurate(above - below))

        def along(direction: Any) -> Float[Array, ""]:
            """Step along a direction of any length; one of 0 adds nothing."""
            length = jnp.max(jnp.abs(direction))
            s = relative * jnp.maximum(1, jnp.max(jnp.abs(flat)))
            unit = direction / jnp.where(length > 0, length, 1)
            at = [encoder.encode((flat + t * unit).reshape(x.shape)) for t in (s, -s)]
            scale = accurate(length) / accurate(2 * s)
            return sum_of_squares((accurate(at[0]) - accurate(at[1])) * scale)

        count = encoder.directions
        indices = jnp.arange(count)
        if chunk_size is None or chunk_size >= count:
            return encoder.encode(x), jnp.sum(jax.vmap(column)(indices))
        columns = jax.lax.map(jax.checkpoint(column), indices, batch_size=chunk_size)
        return encoder.encode(x), jnp.sum(columns)

    return code_and_norm
