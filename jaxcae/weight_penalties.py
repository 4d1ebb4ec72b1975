"""Penalties on the weights alone. Useful regularisers, but blind to saturation: not contractions."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcae.types import Params


def l1_penalty(params: Params) -> Float[Array, ""]:
    """Compute Σ|w| over the kernels; biases do not count."""
    return sum((jnp.sum(jnp.abs(kernel)) for kernel in kernels(params)), start=jnp.zeros(()))


def l2_penalty(params: Params) -> Float[Array, ""]:
    """Compute Σw² over the kernels; biases do not count. (optax's weight decay is half of it.)"""
    return sum((jnp.sum(jnp.square(kernel)) for kernel in kernels(params)), start=jnp.zeros(()))


def kernels(params: Params) -> list[Array]:
    """Collect the weights of affine maps: every leaf of two or more dimensions."""
    return [leaf for leaf in jax.tree.leaves(params) if jnp.ndim(leaf) >= 2]
