"""What the built-in models share: initial parameters and the affine map."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxcae.types import Params

Initializer = Callable[..., Array]
"""A function of `(key, shape, dtype)`, such as those of `jax.nn.initializers`."""


def init_dense(
    key: PRNGKeyArray, fan_in: int, fan_out: int, kernel_init: Initializer, dtype: Any
) -> Params:
    """Draw the kernel (in, out) of x W + b; the bias starts at zero."""
    return {"kernel": kernel_init(key, (fan_in, fan_out), dtype), "bias": jnp.zeros(fan_out, dtype)}


def dense(layer: Params, x: Float[Array, " fan_in"]) -> Float[Array, " fan_out"]:
    """Compute x W + b of one sample."""
    return x @ layer["kernel"] + layer["bias"]
