"""Reconstruction losses: one value per sample, summed over features unless told otherwise."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxcae.errors import unknown_name

ReconstructionLoss = Callable[[Any, Any], Float[Array, ""]]
Reduction = Literal["sum", "mean"]


def squared_error(x: Float[Array, "..."], x_hat: Float[Array, "..."]) -> Float[Array, ""]:
    """Compute ‖x − x̂‖², the sum over features of one sample.

    Raises:
        ValueError: If the two differ in shape.
    """
    _check_shapes(x, x_hat)
    with jax.numpy_dtype_promotion("standard"):  # whatever is set: samples may be the wider ones
        return jnp.sum(jnp.square(x - x_hat), dtype=accumulator(x_hat))


def bernoulli_cross_entropy(
    x: Float[Array, "..."], logits: Float[Array, "..."]
) -> Float[Array, ""]:
    """Compute −Σ_j [x_j log σ(a_j) + (1 − x_j) log(1 − σ(a_j))] of one sample.

    Args:
        x: Targets in [0, 1].
        logits: The decoder's output *before* any sigmoid (`output="identity"`).

    Returns:
        The sum over features, in nats.

    Raises:
        ValueError: If the two differ in shape.
    """
    _check_shapes(x, logits)
    with jax.numpy_dtype_promotion("standard"):
        errors = optax.sigmoid_binary_cross_entropy(logits, x)
        return jnp.sum(errors, dtype=accumulator(logits))


RECONSTRUCTION_LOSSES: dict[str, ReconstructionLoss] = {
    "squared_error": squared_error,
    "bernoulli": bernoulli_cross_entropy,
}


def reconstruction_loss(
    name: str | ReconstructionLoss, features: Reduction = "sum"
) -> ReconstructionLoss:
    """Make `loss(x, x_hat) -> scalar` for one sample.

    Args:
        name: `"squared_error"`, `"bernoulli"`, or a function of `(x, x_hat)` that sums.
        features: `"sum"`, or `"mean"` to divide by the number of features. A mean makes the same
            λ weigh d times more against the reconstruction.

    Raises:
        ValueError: If a name is unknown.
    """
    if features not in ("sum", "mean"):
        raise unknown_name("reduction over features", features, ("sum", "mean"))
    if isinstance(name, str):
        if name not in RECONSTRUCTION_LOSSES:
            raise unknown_name("reconstruction loss", name, RECONSTRUCTION_LOSSES)
        summed = RECONSTRUCTION_LOSSES[name]
    else:
        summed = name
    if features == "sum":
        return summed
    return lambda x, x_hat: summed(x, x_hat) / jnp.size(x)


def _check_shapes(x: Float[Array, "..."], x_hat: Float[Array, "..."]) -> None:
    # Broadcasting (d,) against (d, 1) would compare every feature with every other.
    if jnp.shape(x) != jnp.shape(x_hat):
        raise ValueError(
            f"a sample has shape {jnp.shape(x)} and its reconstruction {jnp.shape(x_hat)}: they "
            "must be equal. Let decode return the shape of a sample."
        )


def accumulator(x: Float[Array, "..."]) -> Any:
    """Return the dtype to add such values up in: float32 at least."""
    return x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.float32
