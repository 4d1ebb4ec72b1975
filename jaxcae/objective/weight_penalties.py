"""Penalties on the weights alone: useful regularisers, but blind to saturation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcae.types import Params


def l1_penalty(params: Params) -> Float[Array, ""]:
    """Compute Σ|w| over the kernels, not the biases.

    The derivative at w = 0 is 0, as in PyTorch; that of `jnp.abs` is 1.
    """
    return sum(
        (jnp.sum(kernel * jax.lax.stop_gradient(jnp.sign(kernel))) for kernel in kernels(params)),
        start=jnp.zeros(()),
    )


def l2_penalty(params: Params) -> Float[Array, ""]:
    """Compute Σw² over the kernels, not the biases; twice what optax calls weight decay."""
    return sum((jnp.sum(jnp.square(kernel)) for kernel in kernels(params)), start=jnp.zeros(()))


def kernels(params: Params) -> list[Array]:
    """Collect the weights of affine maps: every leaf of two or more dimensions."""
    return [leaf for leaf in jax.tree.leaves(params) if jnp.ndim(leaf) >= 2]
