"""The trace of a Jacobian, tr J_f(x) = div f(x), of any function from ℝᵈ to ℝᵈ."""

import math
from typing import Any, cast

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from jaxcae.errors import unknown_name
from jaxcae.jacobian import divergence
from jaxcae.jacobian.estimators import Distribution
from jaxcae.jacobian.methods import Hutchinson
from jaxcae.jacobian.program import trace_encoder
from jaxcae.types import Encode, EncodeAndPenalty, Params, Penalty


def jacobian_trace(function: Encode, method: str | Hutchinson = "auto", **options: Any) -> Penalty:
    """Make the trace of a function's Jacobian, such as that of a reconstruction map.

    tr J_f(x) = Σ_i ∂f_i(x)/∂x_i, one number per sample, of either sign. With f(x) = r(x) − x and
    r = decode ∘ encode it is the divergence that exact score matching needs:
    E[½‖ψ‖² + div ψ] of ψ = (r(x) − x)/σ² is least for ψ = ∇ log p.

    Args:
        function: Any JAX function of `(params, x)`, ONE sample to an array of as many elements.
        method: `"auto"`: exact, through up to two elementwise layers (a two-layer encoder and its
            decoder have two) at the price of a few products of the batch. `"hutchinson"`: the mean
            of vᵀJv over random probes v, unbiased for any function. Needs the key.
        **options: `num_probes` and `distribution` of `Hutchinson`.

    Returns:
        `trace(params, xs, key=None) -> traces`, xs of shape (batch, *features), traces (batch,).

    Raises:
        ValueError: If a name or an option is not usable, the numbers of elements differ, the key is
            missing where needed, or structure does not allow an exact trace (auto).

    References:
        Hyvärinen, "Estimation of Non-Normalized Statistical Models by Score Matching", JMLR 2005.
        Sliced score matching: Song et al., arXiv:1905.07088.

    Example:
        >>> import jax, jaxcae
        >>> trace = jaxcae.jacobian_trace(lambda w, x: x @ w)
        >>> float(trace(jax.numpy.eye(3), jax.numpy.zeros((1, 3)))[0])
        3.0
    """
    both = value_and_trace(function, method, **options)

    def trace(params: Params, xs: Any, key: PRNGKeyArray | None = None) -> Float[Array, " batch"]:
        return both(params, xs, key)[1]

    return trace


def value_and_trace(
    function: Encode, method: str | Hutchinson = "auto", **options: Any
) -> EncodeAndPenalty:
    """Make `(params, xs, key=None) -> (values, traces)`, both from one forward trace.

    Arguments and errors are those of `jacobian_trace`; values have shape (batch, *features).
    """
    if method == "hutchinson":
        method = Hutchinson(**options)
    elif options:
        raise ValueError(f"options {', '.join(sorted(options))} belong to 'hutchinson' alone.")
    if method != "auto" and not isinstance(method, Hutchinson):
        raise unknown_name("method", method, ("auto", "hutchinson"))
    probes = method if isinstance(method, Hutchinson) else None

    def compute(params: Params, xs: Any, key: PRNGKeyArray | None = None) -> tuple[Any, Any]:
        traced, xs = trace_encoder(function, params, xs)
        features = math.prod(traced.program.x.shape)
        if traced.code_size != features:
            raise ValueError(
                f"a trace needs as many results as features: the function takes {features} to "
                f"{traced.code_size}."
            )
        if probes is None:
            values, traces = divergence.exact(traced, xs)
        elif key is None:
            raise ValueError(
                "method 'hutchinson' draws random probes: call it with a key, "
                "such as jax.random.key(0)."
            )
        else:
            count, kind = int(probes.num_probes or 1), probes.distribution or "rademacher"
            values, traces = divergence.estimate(traced, xs, key, count, cast(Distribution, kind))
        return jax.tree.unflatten(traced.code_tree, [values]), traces

    return compute
