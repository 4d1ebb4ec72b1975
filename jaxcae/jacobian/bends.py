"""‖∇ⁿh‖²_F of any encoder, estimated by random directions; and whether there is any."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcae.jacobian.directions import sum_of_squares
from jaxcae.jacobian.estimators import Distribution, draw_probes
from jaxcae.jacobian.jaxprs import calls_primitive, struct, trace, typed_like, variables
from jaxcae.jacobian.program import Encoder

SMOOTH = "softplus, gelu, silu, elu or tanh"


def no_curvature(order: int) -> ValueError:
    """Build the error for an encoder whose derivative of that order is 0 everywhere."""
    return ValueError(
        f"the encoder has no derivative of order {order}: it is 0 wherever it exists, as for relu "
        f"and other pieces of lines, so ‖∇ⁿh‖² is 0 and has no gradient. Use {SMOOTH}."
    )


def moves(function: Callable[..., Any], *arguments: Any) -> bool:
    """Tell whether a linear function of its last argument depends on it at all."""
    program, _ = trace(function, *arguments, values_only=True)
    read = {v for eqn in program.equations for v in variables(eqn.invars)}
    return not {program.inputs[-1]}.isdisjoint(read.union(variables(program.outputs)))


def estimate(
    encoder: Encoder,
    xs: Any,
    key: Any,
    order: int,
    num_probes: int = 1,
    distribution: Distribution = "rademacher",
) -> tuple[Any, Float[Array, " batch"]]:
    """Compute codes and ‖∂ⁿ⁻¹∇(vᵀh)‖² along random directions, the mean over sets of probes.

    They are v for the code and u_1 … u_{n−1} for the sample, all of unit second moment and
    independent of one another, so that the expectation is ‖∇ⁿh‖²_F.

    Raises:
        ValueError: If there is no derivative of that order.
    """
    size = encoder.code_size
    features = encoder.directions
    keys = jax.random.split(key, order)
    outer = draw_probes(keys[0], xs, num_probes, size, distribution)
    inner = jnp.stack([draw_probes(k, xs, num_probes, features, distribution) for k in keys[1:]], 2)
    forward = not any(calls_primitive(e, "custom_vjp_call") for e in encoder.program.flat.equations)
    code = struct(encoder.program.code)

    def gradient(x: Any, v: Any, us: Any) -> Any:
        def pull(x: Any) -> Any:
            value, pulled = jax.vjp(encoder.encode, x)
            return pulled(typed_like(v, value))[0]

        found: Callable[[Any], Any] = pull
        for u in us:
            found = _directional(found, typed_like(encoder.along(u), x), forward)
        return encoder.measured(found(x))

    kinds = [encoder.program.x, jax.ShapeDtypeStruct((size,), code.dtype)]
    along = jax.ShapeDtypeStruct((features,), encoder.program.x.dtype)
    if not moves(lambda x, v, *us: gradient(x, v, us), *kinds, *[along] * (order - 1)):
        raise no_curvature(order)

    def project(x: Any, v: Any, us: Any) -> tuple[Any, Float[Array, " num_probes"]]:
        return encoder.encode(x), jax.vmap(lambda v, us: sum_of_squares(gradient(x, v, list(us))))(
            v, us
        )

    codes, norms = jax.vmap(project)(xs, outer, inner)
    return codes, jnp.mean(norms, -1)


def _directional(function: Callable[[Any], Any], u: Any, forward: bool) -> Callable[[Any], Any]:
    """Differentiate a gradient along u; by reverse mode alone where a rule has no other."""
    if forward:
        return lambda x: jax.jvp(function, (x,), (u,))[1]
    # The derivative of a gradient is symmetric: the products with it from either side are one.
    return lambda x: jax.vjp(function, x)[1](u)[0]
