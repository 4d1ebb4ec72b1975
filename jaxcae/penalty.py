"""The contractive penalty ‖J_h(x)‖²_F of any encoder, by a method of your choice."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxcae.errors import check_positive_int, unknown_name
from jaxcae.jacobian import choose, estimators
from jaxcae.jacobian.control_variate import control_variate
from jaxcae.jacobian.jaxprs import struct, vary_as_code
from jaxcae.jacobian.structure import read_structure
from jaxcae.types import Encode, EncodeAndPenalty, Params, Penalty

EXACT_METHODS = ("auto", "chain", "forward", "reverse")
"""Methods without error other than rounding."""

METHODS = (*EXACT_METHODS, "hutchinson", "control_variate", "finite_difference")

_OPTIONS: dict[str, set[str]] = {
    "auto": {"memory_budget"},
    "chain": {"chunk_size"},
    "forward": {"chunk_size"},
    "reverse": {"chunk_size"},
    "hutchinson": {"num_probes", "distribution"},
    "control_variate": {"num_probes", "distribution"},
    "finite_difference": {"chunk_size", "step"},
}


def contractive_penalty(encode: Encode, method: str = "auto", **options: Any) -> Penalty:
    """Make the contractive penalty of an encoder.

    P(x) = ‖J_h(x)‖²_F = Σ_ij (∂h_i(x)/∂x_j)²: one number per sample, squared, never reduced over
    the batch, differentiable any number of times in forward and reverse mode. Norms are summed in
    float32 at least.

    Exact means up to rounding. `"chain"` sums inner products of whole layers: where hidden units
    nearly cancel one another, so that ‖J‖ is a fraction r of what they contribute apart, its
    relative error is about ε/r², against ε/r by forward or reverse, and a norm near 0 may come out
    below it. (In float32, networks trained on digits with λ from 0 to 30 stay below 2e-6.)

    Args:
        encode: Any JAX function of `(params, x)`, ONE floating-point sample to one array: a model
            of this library, the apply of a Flax or Equinox module, a lambda.
        method: How to compute it.

            - `"auto"`: exact. The cheapest plan for the structure found in the encoder, in chunks
              that fit `memory_budget`; see `explain`.
            - `"chain"`: exact, the same plan with the chunk left to you.
            - `"forward"`: exact, d Jacobian-vector products per sample.
            - `"reverse"`: exact, k vector-Jacobian products per sample.
            - `"hutchinson"`: unbiased estimate, the mean of ‖Jᵀv‖² over random probes v. They are
              balanced: over n samples, n the power of two from the code's size on, what the
              samples' Jacobians share adds no noise to the mean penalty and its gradient. Needs
              the key.
            - `"control_variate"`: unbiased estimate with little noise, for deep encoders of affine
              and elementwise parts. Needs the key.
            - `"finite_difference"`: central differences, biased by O(step²).
        **options: As the method takes them.

            - `memory_budget` (auto): bytes of temporaries allowed for value and gradient of the
              penalty; 2 GiB by default.
            - `chunk_size`: samples (chain), features (forward, finite_difference) or code units
              (reverse) at a time, rematerialised; all by default.
            - `num_probes` (hutchinson, control_variate): 1 by default.
            - `distribution`: `"rademacher"` (default; balanced over the batch), `"orthonormal"`
              (exact with as many probes as code units), `"sphere"` or `"normal"`.
            - `step` (finite_difference): relative step, ∛ε of the dtype by default.

    Returns:
        `penalty(params, xs, key=None) -> norms`, with xs of shape (batch, *features) and norms of
        shape (batch,).

    Raises:
        ValueError: If a name or an option is not usable, the key is missing where needed, or JAX
            cannot differentiate the encoder in reverse mode (auto).
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
    encode_and_norms = encode_and_penalty(encode, method, **options)

    def penalty(params: Params, xs: Any, key: PRNGKeyArray | None = None) -> Float[Array, " batch"]:
        return encode_and_norms(params, xs, key)[1]

    return penalty


def encode_and_penalty(encode: Encode, method: str = "auto", **options: Any) -> EncodeAndPenalty:
    """Make `(params, xs, key=None) -> (codes, norms)`, both from one forward trace.

    In the way of `jax.value_and_grad`: a loss that needs the codes as well as the norms should
    take both from here, or the backward pass computes each weight's gradient twice. Arguments and
    errors are those of `contractive_penalty`; codes have shape (batch, *latent).
    """
    _check(method, options)
    compute = _METHODS[method]

    def encode_and_norms(
        params: Params, xs: Any, key: PRNGKeyArray | None = None
    ) -> tuple[Any, Float[Array, " batch"]]:
        if xs.ndim < 2:
            raise ValueError(
                f"xs must be a batch of shape (batch, *features), got shape {xs.shape}. "
                "Use xs[None] for one sample."
            )
        if method in _RANDOM and key is None:
            raise ValueError(
                f"method {method!r} draws random probes: call it with a key, "
                "such as jax.random.key(0)."
            )
        return compute(encode, params, vary_as_code(partial(encode, params), xs), key, **options)

    return encode_and_norms


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
    _check("hutchinson", {"num_probes": num_probes, "distribution": distribution})
    if num_probes < 2:
        raise ValueError(f"num_probes must be at least 2 to estimate an error, got {num_probes}.")

    def estimate(params: Params, xs: Any, key: PRNGKeyArray) -> tuple[Array, Array]:
        bound = partial(encode, params)
        codes, norms = estimators.hutchinson(bound, xs, key, num_probes, distribution)
        latent = math.prod(codes.shape[1:])
        correction = (latent - num_probes) / latent if distribution == "orthonormal" else 1.0
        error = jnp.std(norms, -1, ddof=1) * math.sqrt(correction / num_probes)
        return jnp.mean(norms, -1), error

    return estimate


def _check(method: str, options: dict[str, Any]) -> None:
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    for name, value in options.items():
        if name not in _OPTIONS[method]:
            takes = ", ".join(sorted(_OPTIONS[method]))
            raise ValueError(f"method {method!r} takes {takes}; got {name!r}.")
        if value is None:
            continue
        if name in ("chunk_size", "num_probes"):
            check_positive_int(name, value, "Leave it out for the default.")
        if name == "distribution" and value not in estimators.DISTRIBUTIONS:
            raise unknown_name("distribution", value, estimators.DISTRIBUTIONS)
        if name in ("memory_budget", "step") and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a finite number above 0, got {value!r}.")


Computed = tuple[Any, Float[Array, " batch"]]


def _auto(
    encode: Encode, params: Params, xs: Any, key: Any, memory_budget: int | float | None = None
) -> Computed:
    choice = choose.choose(encode, params, xs, memory_budget or choose.MEMORY_BUDGET)
    return choose.run(choice.method, partial(encode, params), xs, choice.chunk_size)


def _exact(
    method: str,
    encode: Encode,
    params: Params,
    xs: Any,
    key: Any,
    chunk_size: int | None = None,
) -> Computed:
    return choose.run(method, partial(encode, params), xs, chunk_size)


def _hutchinson(
    encode: Encode, params: Params, xs: Any, key: PRNGKeyArray, **options: Any
) -> Computed:
    codes, norms = estimators.hutchinson(partial(encode, params), xs, key, **options)
    return codes, jnp.mean(norms, -1)


def _control_variate(
    encode: Encode, params: Params, xs: Any, key: PRNGKeyArray, **options: Any
) -> Computed:
    structure = read_structure(partial(encode, params), struct(xs, of_sample=True))
    return control_variate(structure, xs, key, **options)


def _finite_difference(
    encode: Encode, params: Params, xs: Any, key: Any, **options: Any
) -> Computed:
    return jax.vmap(estimators.finite_difference(partial(encode, params), **options))(xs)


_RANDOM = {"hutchinson", "control_variate"}
_METHODS: dict[str, Callable[..., Computed]] = {
    "auto": _auto,
    "chain": partial(_exact, "chain"),
    "forward": partial(_exact, "forward"),
    "reverse": partial(_exact, "reverse"),
    "hutchinson": _hutchinson,
    "control_variate": _control_variate,
    "finite_difference": _finite_difference,
}
