"""The noise form of curvature, ‖J(x + ε) − J(x)‖²_F over Gaussian ε."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxcae.errors import check_positive, check_positive_int
from jaxcae.jacobian import batches, choose
from jaxcae.jacobian.bound import Bound
from jaxcae.jacobian.chain import Prepared
from jaxcae.jacobian.directions import sum_of_squares
from jaxcae.jacobian.jaxprs import typed_like
from jaxcae.jacobian.program import trace_encoder
from jaxcae.jacobian.structure import read_structure
from jaxcae.types import Encode, Params, Penalty


def jacobian_difference(encode: Encode, noise_scale: float, *, num_samples: int = 1) -> Penalty:
    """Make the noise form of curvature: the mean over ε of ‖J(x + ε) − J(x)‖²_F, ε ~ N(0, σ²I).

    It is the regulariser of CAE+H. For small σ it tends to σ²‖∇²h‖²_F, the exact curvature of
    `contractive_penalty(encode, order=2)`; at a larger σ it is another functional (at σ = 0.3 often
    half of σ²‖∇²h‖²), to which all orders contribute, relu's jumps of slope included.

    Args:
        encode: As for `contractive_penalty`.
        noise_scale: σ, in the units of the features.
        num_samples: Draws of ε for each sample, of which the mean is taken.

    Returns:
        `penalty(params, xs, key) -> (batch,)`: exact for the ε that the key draws.

    Raises:
        ValueError: If an option is not usable, or there is no key.

    References:
        Rifai et al., "Higher Order Contractive Auto-Encoder", ECML 2011,
        doi:10.1007/978-3-642-23783-6_41.
    """
    check_positive("noise_scale", noise_scale)
    check_positive_int("num_samples", num_samples)

    def penalty(params: Params, xs: Any, key: PRNGKeyArray | None = None) -> Float[Array, " batch"]:
        if key is None:
            raise ValueError("the noise is random: call it with a key, such as jax.random.key(0).")
        encoder, xs = trace_encoder(encode, params, xs)
        structure = read_structure(encoder.program)
        layers = [s for s in structure.segments if s.kind != "affine" or s.scale is not None]
        noise = noise_scale * jax.random.normal(key, (num_samples, *xs.shape), xs.dtype)
        if not layers:
            return jnp.zeros(xs.shape[0], jnp.promote_types(xs.dtype, jnp.float32))
        plan = choose.plan_for(structure, encoder, *batches.share_of(xs))
        (first, *more) = layers
        in_slopes = first.kind == "elementwise" and first.scale is None and not more
        if in_slopes and (plan.across or first.is_diagonal):
            prepared = Prepared(Bound(structure, encoder), plan)

            def difference(x: Any, epsilon: Any) -> Any:
                a, b = prepared.at(x), prepared.at(x + epsilon)
                return prepared.difference(a, b)

        else:

            def difference(x: Any, epsilon: Any) -> Any:
                """By single directions, which differ before they are squared: nothing cancels."""
                code, pull = jax.vjp(encoder.encode, x)
                _, pull_there = jax.vjp(encoder.encode, x + epsilon)

                def row(i: Any) -> Any:
                    v = typed_like(jax.nn.one_hot(i, code.size, dtype=code.dtype), code)
                    return sum_of_squares(pull_there(v)[0] - pull(v)[0])

                return jnp.sum(jax.vmap(row)(jnp.arange(code.size)))

        over_noise = jax.vmap(jax.vmap(difference), (None, 0))
        return jnp.mean(over_noise(xs, noise), 0)

    return penalty
