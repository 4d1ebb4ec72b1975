"""Penalties on the weights alone: useful regularisers, but blind to saturation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcae.types import Params


def l1_penalty(params: Params) -> Float[Array, ""]:
    """Compute Σ|w| over the kernels, not the biases."""
    return sum((jnp.sum(jnp.abs(kernel)) for kernel in kernels(params)), start=jnp.zeros(()))


def l2_penalty(params: Params) -> Float[Array, ""]:
    """Compute Σw² over the kernels, not the biases; twice what optax calls weight decay."""
    return sum((jnp.sum(jnp.square(kernel)) for kernel in kernels(params)), start=jnp.zeros(()))


def kernels(params: Params) -> list[Array]:
    """Collect the weights of affine maps: every leaf of two or more dimensions."""
    return [leaf for leaf in jax.tree.leaves(params) if jnp.ndim(leaf) >= 2]
