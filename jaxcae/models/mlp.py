"""A fully connected autoencoder of any depth."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxcae.activations import get_activation
from jaxcae.errors import check_positive_int
from jaxcae.models.layers import Initializer, dense, init_dense
from jaxcae.types import Autoencoder, Params


def mlp(
    sizes: Sequence[int],
    activation: str = "softplus",
    *,
    tied: bool = False,
    latent_activation: str = "identity",
    output: str = "identity",
    kernel_init: Initializer | None = None,
    dtype: Any = jnp.float32,
) -> Autoencoder:
    """Make a fully connected autoencoder whose decoder mirrors its encoder.

    For sizes (d, h, k) the encoder is z = W₂ s(W₁ x + b₁) + b₂ and the decoder is
    x̂ = o(V₂ s(V₁ z + c₁) + c₂), with s the activation and o the output function.

    Args:
        sizes: Widths from the features to the code, such as `(784, 256, 64)`; at least two.
        activation: Name of the hidden activation s.
        tied: Decode with the encoder's kernels transposed; the decoder then owns biases only.
        latent_activation: Activation on the code; `"identity"` for a linear code.
        output: Activation o on the reconstruction. Keep `"identity"` with the Bernoulli loss,
            which takes logits.
        kernel_init: A `jax.nn.initializers` function; Glorot uniform by default. (PyTorch's
            `Linear` draws from U(−1/√fan_in, 1/√fan_in) for kernels and biases.)
        dtype: Dtype of the parameters.

    Returns:
        `Autoencoder(init, encode, decode)`. Params are
        `{"encoder": {"layer_0": {"kernel": (in, out), "bias": (out,)}, …}, "decoder": …}`.

    Raises:
        ValueError: If sizes or a name are not usable.

    Example:
        >>> import jax, jaxcae
        >>> model = jaxcae.mlp((784, 256, 64))
        >>> params = model.init(jax.random.key(0))
        >>> model.encode(params, jax.numpy.zeros(784)).shape
        (64,)
    """
    widths = tuple(sizes)
    if len(widths) < 2:
        raise ValueError(f"sizes needs features and at least one layer, got {widths!r}.")
    for width in widths:
        check_positive_int("every entry of sizes", width)
    hidden, latent = get_activation(activation).function, get_activation(latent_activation).function
    out = get_activation(output).function
    kernel_init = kernel_init or jax.nn.initializers.glorot_uniform()
    depth = len(widths) - 1

    def init(key: PRNGKeyArray) -> Params:
        encoder_key, decoder_key = jax.random.split(key)
        encoder = _init_layers(encoder_key, widths, kernel_init, dtype)
        decoder = _init_layers(decoder_key, widths[::-1], kernel_init, dtype)
        if tied:
            decoder = {name: {"bias": layer["bias"]} for name, layer in decoder.items()}
        return {"encoder": encoder, "decoder": decoder}

    def encode(params: Params, x: Float[Array, " features"]) -> Float[Array, " latent"]:
        for i in range(depth):
            x = dense(params["encoder"][f"layer_{i}"], x)
            x = hidden(x) if i < depth - 1 else latent(x)
        return x

    def decode(params: Params, z: Float[Array, " latent"]) -> Float[Array, " features"]:
        for i in range(depth):
            layer = params["decoder"][f"layer_{i}"]
            if tied:
                mirrored = params["encoder"][f"layer_{depth - 1 - i}"]
                layer = {"kernel": mirrored["kernel"].T, "bias": layer["bias"]}
            z = dense(layer, z)
            z = hidden(z) if i < depth - 1 else out(z)
        return z

    return Autoencoder(init, encode, decode)


def _init_layers(
    key: PRNGKeyArray, widths: Sequence[int], kernel_init: Initializer, dtype: Any
) -> Params:
    keys = jax.random.split(key, len(widths) - 1)
    return {
        f"layer_{i}": init_dense(keys[i], fan_in, fan_out, kernel_init, dtype)
        for i, (fan_in, fan_out) in enumerate(pairwise(widths))
    }
