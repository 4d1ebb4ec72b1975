"""The objective: reconstruction plus terms, and the one place that reduces over the batch."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray, Scalar

from jaxcae.errors import unknown_name
from jaxcae.jacobian.methods import Method
from jaxcae.jacobian.samples import is_array, one_array
from jaxcae.objective.forward import Forward, forward_pass
from jaxcae.objective.losses import ReconstructionLoss, Reduction, reconstruction_loss
from jaxcae.objective.terms import (
    Term,
    Weight,
    check_weight,
    contraction_term,
    curvature_term,
    is_absent,
    is_known,
    l1_term,
    l2_term,
)
from jaxcae.types import Autoencoder, Metrics, Params

Corruption = Literal["gaussian", "masking"]


class Objective:
    """A loss: `loss(params, xs, key=None, *, step=None, weights=None) -> (scalar, metrics)`.

    Attributes:
        forward: `(params, xs, key, inputs) -> Forward`.
        reconstruction: `rec(x, x_hat) -> scalar`, one sample.
        terms: What is added to it.
        corrupt: `(key, xs) -> inputs`, or None.
    """

    def __init__(
        self,
        forward: Callable[..., Forward],
        reconstruction: ReconstructionLoss,
        terms: Sequence[Term] = (),
        corrupt: Callable[[PRNGKeyArray | None, Any], Any] | None = None,
    ) -> None:
        names = [term.name for term in terms]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two terms are called {name!r}: their metrics need two names.")
        self.forward, self.reconstruction = forward, reconstruction
        self.terms, self.corrupt = tuple(terms), corrupt

    @cached_property
    def whole(self) -> "Objective":
        """The same loss with no term left out at any step, for evaluation."""
        if all(term.every == 1 for term in self.terms):
            return self
        terms = [replace(term, every=1) for term in self.terms]
        return Objective(self.forward, self.reconstruction, terms, self.corrupt)

    def __call__(
        self,
        params: Params,
        xs: Any,
        key: PRNGKeyArray | None = None,
        *,
        step: Any = None,
        weights: Any = None,
    ) -> tuple[Scalar, Metrics]:
        """Compute the loss of a batch.

        Args:
            params: The parameters; of `optax.LookaheadParams` the fast ones.
            xs: Samples, shape (batch, *features).
            key: For corruption and for methods that draw probes.
            step: The step, for schedules and lazy terms; an int, or an integer scalar.
            weights: A weight per sample, shape (batch,), for the means over the batch; equal if
                None. Samples of weight 0 do not count.

        Returns:
            The scalar, and metrics by name: `loss`, `reconstruction`, and the batch mean of each
            term before its weight.

        Raises:
            ValueError: If the key or the step is missing where needed, there are no samples, or a
                term or the reconstruction loss does not give one value per sample.
        """
        if not is_array(xs):
            one_array(xs)  # which says what it is
            raise TypeError(f"xs must be one array of samples, got a {type(xs).__name__}.")
        if xs.shape[0] == 0:
            raise ValueError(f"a batch of no samples has no mean: xs has shape {xs.shape}.")
        if isinstance(params, optax.LookaheadParams):
            params = params.fast
        noise_key, probe_key = (None, None) if key is None else jax.random.split(key)
        inputs = None if self.corrupt is None else self.corrupt(noise_key, xs)
        forward = self.forward(params, xs, probe_key, inputs)

        # Terms first: where one asks for norms, the codes come from their trace.
        means = {
            term.name: _term_mean(term, forward, weights)
            for term in self.terms
            if term.every == 1 or step is None
        }
        errors = jax.vmap(self.reconstruction)(xs, forward.x_hats)
        total = _mean("the reconstruction loss", errors, weights, xs.shape[:1])
        metrics = {"reconstruction": total}
        for term in self.terms:
            mean = means.get(term.name)
            if mean is None:
                mean = _lazy_mean(term, forward, weights, step, total.dtype)
            metrics[term.name] = mean
            if not term.only_measured:
                total = total + term.weight_at(step) * mean
        return total, {"loss": total, **metrics}


def cae_loss(
    model: Autoencoder,
    contraction: Weight | None = 0.1,
    *,
    method: str | Method = "auto",
    curvature: Weight | None = None,
    curvature_method: str | Method | None = None,
    input_metric: Any = None,
    reconstruction: str | ReconstructionLoss = "squared_error",
    features: Reduction = "sum",
    l1: Weight = 0.0,
    l2: Weight = 0.0,
    corruption: Corruption = "gaussian",
    noise_scale: Any = 0.0,
    contraction_every: int = 1,
    terms: Sequence[Term] = (),
    **method_options: Any,
) -> Objective:
    """Make the loss of a contractive autoencoder.

    L = mean over the batch of [ rec(x, x̂) + λ‖J_h(x̃)‖²_F + γ‖∇²h(x̃)‖²_F + Σ_t λ_t·term_t ]
        + l1·Σ|w| + l2·Σw²

    where x̃ is the corrupted sample (x itself without noise), x̂ = decode(encode(x̃)), and the
    code and its Jacobian come from one forward trace.

    Args:
        model: The autoencoder; any `encode`/`decode` pair of pure functions will do.
        contraction: λ, at least 0: a number, a scalar array, a traced scalar, or a schedule of the
            step. At 0.0 the norms are measured but carry no gradient; None is a plain autoencoder
            whose norms are not computed at all.
        method: How to compute the norms; see `contractive_penalty`.
        curvature: γ, the weight of the curvature ‖∇²h‖²_F, of the same kinds as λ; None, or
            0.0 to measure alone. With the norms it shares slopes and products of the weights.
            (The CAE+H of ECML 2011 has the noise form instead: `noise_curvature_term`.)
        curvature_method: How to compute it: `"auto"` (exact where structure allows it, an error
            elsewhere) or `"hutchinson"`; by default `method` where it is one of these, else auto.
        input_metric: F of shape (r, d) or (d,): ‖J Fᵀ‖² in place of ‖J‖², and so for the curvature;
            see `contractive_penalty` and `covariance_factor`.
        reconstruction: `"squared_error"`, `"bernoulli"` (from logits), or `f(x, x_hat) -> scalar`.
        features: Whether `rec` is a `"sum"` (default) or a `"mean"` over features.
        l1: Weight of Σ|w| over the kernels, of the same kinds as λ; at 0.0 it is not computed.
        l2: Weight of Σw² over the kernels.
        corruption: `"gaussian"` adds noise of standard deviation `noise_scale`; `"masking"` sets
            each feature to zero with probability `noise_scale`.
        noise_scale: 0 for no corruption; it may be traced. Above 0 the loss needs its `key`.
        contraction_every: Take the contraction at every n-th step only, at n times its weight; see
            `Term`. The steps between cost what a plain autoencoder costs.
        terms: Terms of your own.
        **method_options: Passed on to `contractive_penalty`, such as `chunk_size`.

    Returns:
        `loss(params, xs, key=None, *, step=None, weights=None) -> (scalar, metrics)`; metrics holds
        `loss`, `reconstruction` (batch mean of rec), and before their weights `contraction` and
        `curvature` (batch means of ‖J‖²_F and ‖∇²h‖²_F), `l1` and `l2` where used, and each term
        by its name.

    Raises:
        ValueError: If an option is not usable, or the loss is called without the key it needs.

    References:
        Rifai et al., "Contractive Auto-Encoders", ICML 2011. Vincent et al., "Extracting and
        composing robust features with denoising autoencoders", doi:10.1145/1390156.1390294.
    """
    for name, value in (("l1", l1), ("l2", l2), ("noise_scale", noise_scale)):
        check_weight(name, value)
    if corruption not in ("gaussian", "masking"):
        raise unknown_name("corruption", corruption, ("gaussian", "masking"))
    if corruption == "masking" and is_known(noise_scale) and noise_scale > 1:
        raise ValueError(f"noise_scale is a probability for masking, got {noise_scale!r}.")
    chosen = [] if contraction is None else [contraction_term(contraction, contraction_every)]
    chosen += [] if curvature is None else [curvature_term(curvature)]
    chosen += [] if is_absent(l1) else [l1_term(l1)]
    chosen += [] if is_absent(l2) else [l2_term(l2)]
    # A lazy term asks for norms in a branch of its own, so the codes must not wait for them.
    with_norms = contraction is not None and contraction_every == 1
    forward = forward_pass(
        model,
        method,
        with_norms=with_norms,
        with_curvatures=curvature is not None,
        curvature_method=curvature_method,
        input_metric=input_metric,
        **method_options,
    )
    rec = reconstruction_loss(reconstruction, features)
    corrupt = None if is_absent(noise_scale) else _corruption(corruption, noise_scale)
    return Objective(forward, rec, [*chosen, *terms], corrupt)


def _term_mean(term: Term, forward: Forward, weights: Any) -> Scalar:
    values = jnp.asarray(term.values(forward))
    if not values.ndim:  # it does not depend on the sample
        return values
    return _mean(f"the term {term.name!r}", values, weights, forward.xs.shape[:1])


def _lazy_mean(term: Term, forward: Forward, weights: Any, step: Any, dtype: Any) -> Scalar:
    def taken() -> Scalar:
        return (term.every * _term_mean(term, forward.fork(), weights)).astype(dtype)

    return jax.lax.cond(step % term.every == 0, taken, lambda: jnp.zeros((), dtype))


def _mean(what: str, values: Array, weights: Any, shape: tuple[int, ...]) -> Scalar:
    if values.shape != shape:
        raise ValueError(
            f"{what} must give one number per sample, shape {shape} for this batch, "
            f"got shape {values.shape}."
        )
    if weights is None:
        return jnp.mean(values)
    return jnp.sum(weights * values) / jnp.sum(weights)


def _corruption(kind: Corruption, scale: Any) -> Callable[[PRNGKeyArray | None, Any], Any]:
    def corrupt(key: PRNGKeyArray | None, xs: Any) -> Any:
        if key is None:
            raise ValueError("noise_scale > 0 draws random numbers: call loss(params, xs, key).")
        if kind == "gaussian":
            return xs + scale * jax.random.normal(key, xs.shape, xs.dtype)
        return xs * jax.random.bernoulli(key, 1 - scale, xs.shape)

    return corrupt
