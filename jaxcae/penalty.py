"""The contractive penalty ‖J_h(x)‖²_F of any encoder, and ‖∇ⁿh(x)‖²_F, by any method."""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxcae.errors import check_positive_int
from jaxcae.jacobian import bends, curvature, estimators
from jaxcae.jacobian.choose import MEMORY_BUDGET
from jaxcae.jacobian.directions import wide
from jaxcae.jacobian.estimators import Distribution
from jaxcae.jacobian.methods import (
    EXACT_METHODS,
    METHODS,
    Auto,
    Chain,
    Hutchinson,
    Method,
    resolve,
)
from jaxcae.jacobian.program import Encoder, trace_encoder
from jaxcae.jacobian.structure import read_structure
from jaxcae.types import Encode, EncodeAndPenalty, Params, Penalty

__all__ = [
    "EXACT_METHODS",
    "METHODS",
    "contractive_penalty",
    "encode_and_penalty",
    "hutchinson_with_error",
    "jacobian_norm",
]


def contractive_penalty(
    encode: Encode,
    method: str | Method = "auto",
    *,
    order: int = 1,
    input_metric: Any = None,
    **options: Any,
) -> Penalty:
    """Make the contractive penalty of an encoder.

    P(x) = ‖J_h(x)‖²_F = Σ_ij (∂h_i(x)/∂x_j)²: one number per sample, squared, never reduced over
    the batch, differentiable any number of times in forward and reverse mode. Norms are summed in
    float32 at least.

    Exact means up to rounding. `"chain"` sums inner products of whole layers: where hidden units
    nearly cancel one another, so that ‖J‖ is a fraction r of what they contribute apart, its
    relative error is about ε/r², against ε/r by forward or reverse; no norm comes out below 0.
    (In float32, networks trained on digits with λ from 0 to 30 stay below 1e-5.)

    Of a higher `order` n it is ‖∇ⁿh(x)‖²_F, the squared sum of all derivatives of that order, such
    as the curvature Σ_ijl (∂²h_i/∂x_j∂x_l)². `"auto"` and `"chain"` are exact through one
    elementwise layer (for order 2 two of them, such as a hidden layer and an activation on the
    code), at little more than the price of order 1; `"hutchinson"` estimates it without bias for
    any encoder, by ‖∂ⁿ⁻¹∇(vᵀh)‖² along n − 1 random directions. It is not the noise form
    of `jacobian_difference`, to which all orders contribute.

    Args:
        encode: Any JAX function of `(params, x)`, ONE floating-point sample to one array: a model
            of this library, the apply of a Flax or Equinox module, a lambda.
        method: How to compute it: one of these names, its options passed beside it, or the method
            as an object, `jaxcae.Auto(memory_budget=2**30)`, `Chain`, `Forward`, `Reverse`,
            `Hutchinson`, `ControlVariate` or `FiniteDifference`.

            - `"auto"`: exact. The cheapest plan for the structure found in the encoder, in chunks
              that fit `memory_budget`; see `explain`.
            - `"chain"`: exact, the same plan with the chunk left to you.
            - `"forward"`: exact, d Jacobian-vector products per sample.
            - `"reverse"`: exact, k vector-Jacobian products per sample.
            - `"hutchinson"`: unbiased estimate, the mean of ‖Jᵀv‖² over random probes v. They are
              balanced: over n samples, n the power of two from the code's size on, what the
              samples' Jacobians share adds no noise to the mean penalty and its gradient. Needs
              the key.
            - `"control_variate"`: unbiased estimate with little noise, for deep encoders of affine,
              elementwise and normalising parts, convolutions among them; `explain` says by which
              form. Needs the key.
            - `"finite_difference"`: central differences, biased by O(step²).
        order: n, the order of the derivatives; 2 and more by auto, chain and hutchinson alone.
        input_metric: F, of shape (r, d), or (d,) if diagonal, of the d features in a row:
            ‖J Fᵀ‖²_F in place of ‖J‖²_F (of order n: F in every direction). A penalty of the
            directions that its rows span, weighed; of the data's own `covariance_factor` it is what
            a small denoising noise of that covariance adds to a loss. The point x stays; few
            rows cost less than no metric.
        **options: As the method takes them.

            - `memory_budget` (auto): bytes of temporaries allowed for value and gradient of the
              penalty; 2 GiB by default. A warning says so where it cannot be met.
            - `gradient` (auto): False plans for values alone, as scoring does.
            - `chunk_size`: samples (chain), features (forward, finite_difference) or code units
              (reverse) at a time, rematerialised; all by default.
            - `num_probes` (hutchinson, control_variate): 1 by default.
            - `distribution`: `"rademacher"` (default; balanced over the batch), `"orthonormal"`
              (exact with as many probes as code units), `"sphere"` or `"normal"`.
            - `step` (finite_difference): relative step, ∛ε by default, with ε that of the
              coarsest dtype that the encoder computes in.

    Returns:
        `penalty(params, xs, key=None) -> norms`, with xs of shape (batch, *features) and norms of
        shape (batch,).

    Raises:
        ValueError: If a name or an option is not usable, the key is missing where needed, JAX
            cannot differentiate the encoder in reverse mode (auto), or the encoder has no exact
            form of that order (auto, chain) or no derivative of it but 0 (relu).
        TypeError: If samples or codes are not floating point, or the code is not one array.

    References:
        Rifai et al., "Contractive Auto-Encoders: Explicit Invariance During Feature Extraction",
        ICML 2011.

    Example:
        >>> import jax, jaxcae
        >>> penalty = jaxcae.contractive_penalty(lambda w, x: x @ w)  # linear: ‖W‖²_F
        >>> float(penalty(jax.numpy.eye(3), jax.numpy.zeros((1, 3)))[0])
        3.0
    """
    encode_and_norms = encode_and_penalty(
        encode, method, order=order, input_metric=input_metric, **options
    )

    def penalty(params: Params, xs: Any, key: PRNGKeyArray | None = None) -> Float[Array, " batch"]:
        return encode_and_norms(params, xs, key)[1]

    return penalty


def encode_and_penalty(
    encode: Encode,
    method: str | Method = "auto",
    *,
    order: int = 1,
    input_metric: Any = None,
    **options: Any,
) -> EncodeAndPenalty:
    """Make `(params, xs, key=None) -> (codes, norms)`, both from one forward trace.

    The encoder is called once, to be traced; every method evaluates the trace. In the way of
    `jax.value_and_grad`: a loss that needs the codes as well as the norms should
    take both from here, or the backward pass computes each weight's gradient twice. Arguments and
    errors are those of `contractive_penalty`; codes have shape (batch, *latent).
    """
    every = encode_and_penalties(encode, (order,), method, input_metric=input_metric, **options)

    def encode_and_norms(
        params: Params, xs: Any, key: PRNGKeyArray | None = None
    ) -> tuple[Any, Float[Array, " batch"]]:
        codes, (norms,) = every(params, xs, key)
        return codes, norms

    return encode_and_norms


def encode_and_penalties(
    encode: Encode,
    orders: Sequence[int],
    method: str | Method = "auto",
    *,
    input_metric: Any = None,
    **options: Any,
) -> Callable[..., tuple[Any, tuple[Float[Array, " batch"], ...]]]:
    """Make `(params, xs, key=None) -> (codes, norms of each order)`, which share what they can.

    Args:
        encode: As for `contractive_penalty`.
        orders: Orders of derivatives, each at least 1.
        method: As for `contractive_penalty`, and so are the options.
        input_metric: As for `contractive_penalty`.
        **options: As the method takes them.

    Raises:
        ValueError: As `contractive_penalty`.
    """
    chosen = resolve(method, options)
    for order in orders:
        check_positive_int("order", order)
    highest = max(orders)
    if highest > 1 and not has_orders(chosen):
        raise ValueError(
            f"method {chosen.name!r} computes derivatives of order 1, got order {highest}. Use "
            "'auto' or 'chain', which are exact where structure allows it, or 'hutchinson'."
        )
    memory: dict[Any, Any] = {}

    def encode_and_norms(
        params: Params, xs: Any, key: PRNGKeyArray | None = None
    ) -> tuple[Any, tuple[Float[Array, " batch"], ...]]:
        if chosen.needs_key and key is None:
            raise ValueError(
                f"method {chosen.name!r} draws random probes: call it with a key, "
                "such as jax.random.key(0)."
            )
        encoder, xs = trace_encoder(encode, params, xs)
        encoder = encoder.with_metric(input_metric)
        if highest == 1:
            codes, norms = chosen.compute(encoder, xs, key, memory)
            found = {1: norms}
        else:
            codes, found = _of_orders(chosen, encoder, xs, key, orders)
        dtype = wide(xs.dtype, codes.dtype)  # by any method
        codes = jax.tree.unflatten(encoder.code_tree, [codes])
        return codes, tuple(found[n].astype(dtype) for n in orders)

    return encode_and_norms


def has_orders(method: Method) -> bool:
    """Tell whether a method computes ‖∇ⁿh‖² of orders n above 1, too."""
    return isinstance(method, Auto | Chain | Hutchinson)


def _of_orders(
    method: Method, encoder: Encoder, xs: Any, key: Any, orders: Sequence[int]
) -> tuple[Any, curvature.Norms]:
    if isinstance(method, Hutchinson):
        probes, kind = int(method.num_probes or 1), method.distribution or "rademacher"
        found = {}
        for n in orders:
            along = jax.random.fold_in(key, n)
            codes, found[n] = (
                bends.estimate(encoder, xs, along, n, probes, cast(Distribution, kind))
                if n > 1
                else method.compute(encoder, xs, along, {})
            )
        return codes, found
    structure = read_structure(encoder.program)
    if isinstance(method, Auto):
        budget = float(MEMORY_BUDGET if method.memory_budget is None else method.memory_budget)
        return curvature.exact(structure, encoder, xs, orders, memory_budget=budget)
    assert isinstance(method, Chain)
    chunk = None if method.chunk_size is None else int(method.chunk_size)
    return curvature.exact(structure, encoder, xs, orders, chunk)


def jacobian_norm(squared: Float[Array, " batch"]) -> Float[Array, " batch"]:
    """Compute ‖J‖_F from ‖J‖²_F, 0 where rounding took the square below 0."""
    return jnp.sqrt(jnp.maximum(squared, 0))


def hutchinson_with_error(
    encode: Encode, num_probes: int, distribution: estimators.Distribution = "rademacher"
) -> Callable[[Params, Any, PRNGKeyArray], tuple[Array, Array]]:
    """Make `(params, xs, key) -> (mean, standard_error)` of the Hutchinson estimate.

    Args:
        encode: As for `contractive_penalty`.
        num_probes: At least 2, to have a spread.
        distribution: As for `contractive_penalty`. Orthonormal probes are drawn without
            replacement, so their standard error shrinks by √((k − p)/k), to 0 at p = k.

    Returns:
        A function whose results have shape (batch,): the mean over probes, and the estimated
        standard deviation of that mean. (Rademacher probes are balanced over the batch, so errors
        of samples are not independent: the mean over the batch has less than their mean square
        suggests.)

    Raises:
        ValueError: If an option is not usable.
    """
    Hutchinson(num_probes, distribution)  # which checks them
    if num_probes < 2:
        raise ValueError(f"num_probes must be at least 2 to estimate an error, got {num_probes}.")

    def estimate(params: Params, xs: Any, key: PRNGKeyArray) -> tuple[Array, Array]:
        encoder, xs = trace_encoder(encode, params, xs)
        codes, norms = estimators.hutchinson(encoder, xs, key, int(num_probes), distribution)
        latent = math.prod(codes.shape[1:])
        correction = (latent - num_probes) / latent if distribution == "orthonormal" else 1.0
        error = jnp.std(norms, -1, ddof=1) * math.sqrt(correction / num_probes)
        return jnp.mean(norms, -1), error

    return estimate
