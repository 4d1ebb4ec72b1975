"""The objective: reconstruction plus penalties, and the one place that reduces over the batch."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, Scalar

from jaxcae.errors import check_nonnegative, unknown_name
from jaxcae.objective.losses import ReconstructionLoss, Reduction, reconstruction_loss
from jaxcae.objective.weight_penalties import l1_penalty, l2_penalty
from jaxcae.penalty import encode_and_penalty
from jaxcae.types import Autoencoder, Loss, Metrics, Params

Corruption = Literal["gaussian", "masking"]


def cae_loss(
    model: Autoencoder,
    contraction: float | None = 0.1,
    *,
    method: str = "auto",
    reconstruction: str | ReconstructionLoss = "squared_error",
    features: Reduction = "sum",
    l1: float = 0.0,
    l2: float = 0.0,
    corruption: Corruption = "gaussian",
    noise_scale: float = 0.0,
    **method_options: Any,
) -> Loss:
    """Make the loss of a contractive autoencoder.

    L = mean over the batch of [ rec(x, x̂) + λ‖J_h(x̃)‖²_F ] + l1·Σ|w| + l2·Σw²

    where x̃ is the corrupted sample (x itself without noise), x̂ = decode(encode(x̃)), and the
    code and its Jacobian come from one forward trace.

    Args:
        model: The autoencoder; any `encode`/`decode` pair of pure functions will do.
        contraction: λ, at least 0. At 0.0 the norms are measured but carry no gradient; None is a
            plain autoencoder whose norms are not computed at all.
        method: How to compute the norms; see `contractive_penalty`.
        reconstruction: `"squared_error"`, `"bernoulli"` (from logits), or `f(x, x_hat) -> scalar`.
        features: Whether `rec` is a `"sum"` (default) or a `"mean"` over features.
        l1: Weight of Σ|w| over the kernels.
        l2: Weight of Σw² over the kernels.
        corruption: `"gaussian"` adds noise of standard deviation `noise_scale`; `"masking"` sets
            each feature to zero with probability `noise_scale`.
        noise_scale: 0 for no corruption. Above 0 the loss needs its `key`.
        **method_options: Passed on to `contractive_penalty`, such as `chunk_size`.

    Returns:
        `loss(params, xs, key=None) -> (scalar, metrics)`; metrics holds `loss`, `reconstruction`
        (batch mean of rec), `contraction` (batch mean of ‖J‖²_F, before λ), and `l1` and `l2`
        (before their weights) where used.

    Raises:
        ValueError: If an option is not usable, or the loss is called without the key it needs.

    References:
        Rifai et al., "Contractive Auto-Encoders", ICML 2011. Vincent et al., "Extracting and
        composing robust features with denoising autoencoders", doi:10.1145/1390156.1390294.
    """
    if contraction is not None:
        check_nonnegative("contraction", contraction)
    for name, value in (("l1", l1), ("l2", l2), ("noise_scale", noise_scale)):
        check_nonnegative(name, value)
    if corruption not in ("gaussian", "masking"):
        raise unknown_name("corruption", corruption, ("gaussian", "masking"))
    if corruption == "masking" and noise_scale > 1:
        raise ValueError(f"noise_scale is a probability for masking, got {noise_scale!r}.")
    rec = reconstruction_loss(reconstruction, features)
    encode_and_norms = encode_and_penalty(model.encode, method, **method_options)

    def loss(params: Params, xs: Any, key: PRNGKeyArray | None = None) -> tuple[Scalar, Metrics]:
        noise_key, probe_key = (None, None) if key is None else jax.random.split(key)
        inputs = xs if noise_scale == 0 else _corrupt(noise_key, xs, corruption, noise_scale)

        if contraction is None:
            codes = jax.vmap(model.encode, (None, 0))(params, inputs)
        else:
            codes, norms = encode_and_norms(params, inputs, probe_key)
        x_hats = jax.vmap(model.decode, (None, 0))(params, codes)

        metrics = {"reconstruction": jnp.mean(jax.vmap(rec)(xs, x_hats))}
        total = metrics["reconstruction"]
        if contraction is not None:
            metrics["contraction"] = jnp.mean(norms)
            if contraction > 0:
                total = total + contraction * metrics["contraction"]
        if l1 > 0:
            metrics["l1"] = l1_penalty(params)
            total = total + l1 * metrics["l1"]
        if l2 > 0:
            metrics["l2"] = l2_penalty(params)
            total = total + l2 * metrics["l2"]
        return total, {"loss": total, **metrics}

    return loss


def _corrupt(key: PRNGKeyArray | None, xs: Any, corruption: Corruption, noise_scale: float) -> Any:
    if key is None:
        raise ValueError("noise_scale > 0 draws random numbers: call loss(params, xs, key).")
    if corruption == "gaussian":
        return xs + noise_scale * jax.random.normal(key, xs.shape, xs.dtype)
    return xs * jax.random.bernoulli(key, 1 - noise_scale, xs.shape)
