"""A model of samples of any shape as one of rows, which tables and files hold."""

from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from jaxcae.types import Autoencoder, Params


def of_rows(model: Autoencoder, shape: tuple[int, ...]) -> Autoencoder:
    """Make a model of rows `(features,)` with codes `(latent,)`; ‖J‖_F does not change.

    Args:
        model: A model of samples of `shape`.
        shape: The shape of one sample.

    Raises:
        ValueError: If it does not encode and decode samples of that shape.
    """
    params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    sample = jax.ShapeDtypeStruct(shape, jnp.float32)
    code = jax.eval_shape(model.encode, params, sample)
    if not hasattr(code, "shape"):
        raise ValueError(f"encode returned a {type(code).__name__}, expected one array.")
    x_hat = jax.eval_shape(model.decode, params, code)
    if getattr(x_hat, "shape", None) != shape:
        given = getattr(x_hat, "shape", type(x_hat).__name__)
        raise ValueError(f"decode gives {given} for samples of shape {shape}.")
    if len(shape) == len(code.shape) == 1:
        return model

    def encode(params: Params, x: Any) -> Any:
        return model.encode(params, x.reshape(shape)).reshape(prod(code.shape))

    def decode(params: Params, z: Any) -> Any:
        return model.decode(params, z.reshape(code.shape)).reshape(prod(shape))

    return Autoencoder(model.init, encode, decode)
