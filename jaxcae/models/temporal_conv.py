"""A convolutional autoencoder of windows of a series, causal and strided in time."""

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from jaxcae.activations import get_activation
from jaxcae.errors import check_positive_int
from jaxcae.models.layers import Initializer, dense, init_dense
from jaxcae.types import Autoencoder, Params

_LAYOUT = ("NWC", "WIO", "NWC")


class _Stage(NamedTuple):
    """One convolution from (rows, channels) to (kept, features)."""

    kernel_shape: tuple[int, int, int]  # (lags, in, out), of the encoder's direction
    before: int  # zeros before the first row; rows that are cut off there if negative
    kept: int  # rows of its map


def temporal_conv(
    input_shape: Sequence[int],
    features: Sequence[int],
    latent: int,
    activation: str = "softplus",
    *,
    kernel_size: int = 3,
    stride: int = 2,
    latent_activation: str = "identity",
    output: str = "identity",
    kernel_init: Initializer | None = None,
    dtype: Any = jnp.float32,
) -> Autoencoder:
    """Make a convolutional autoencoder of windows whose decoder mirrors its encoder.

    The encoder is a causal convolution over time and s for every entry of `features`, then a dense
    map to the code. No value of a map depends on a row after its own time. Of n rows every
    `stride`-th is kept, counted back from the last, m = ⌈n / stride⌉, and only these are computed:
    their maps are those of a causal network of dilations 1, stride, stride² …, evaluated where the
    code reads it and nowhere else, which takes about (1 − 1/stride) · depth times less. The decoder
    is a dense map and s, then the exact transpose of each stage with s between them and o at the
    end.

    Args:
        input_shape: `(rows, channels)` of one window.
        features: Features of each convolution, such as `(16, 32)`; at least one.
        latent: Units of the code.
        activation: Name of the hidden activation s.
        kernel_size: Lags of every kernel, its own row included.
        stride: Stride in time of every convolution, at most `kernel_size`, so that each row is
            read.
        latent_activation: Activation on the code; `"identity"` for a linear code.
        output: Activation o on the reconstruction.
        kernel_init: A `jax.nn.initializers` function; Glorot uniform by default.
        dtype: Dtype of the parameters.

    Returns:
        `Autoencoder(init, encode, decode)`. Params are `{"encoder": {"conv_0": …, "dense": …},
        "decoder": {"dense": …, "conv_0": …}}`, each in the order of use, with a `kernel` and a
        `bias`. A convolution's kernel is (lags, in, out) in the *encoder's* direction, the last lag
        being the row itself.

    Raises:
        ValueError: If a shape, a size or a name is not usable.

    Example:
        >>> import jax, jaxcae
        >>> model = jaxcae.temporal_conv((128, 3), (16, 32), 8)
        >>> params = model.init(jax.random.key(0))
        >>> model.encode(params, jax.numpy.zeros((128, 3))).shape
        (8,)

    References:
        Bai, Kolter and Koltun, "An Empirical Evaluation of Generic Convolutional and Recurrent
        Networks for Sequence Modeling", arXiv:1803.01271, without its residual blocks.
    """
    shape = tuple(input_shape)
    if len(shape) != 2:
        raise ValueError(f"input_shape must be (rows, channels), got {shape!r}.")
    if not features:
        raise ValueError("features needs at least one convolution; jaxcae.mlp has none.")
    for size in shape:
        check_positive_int("every entry of input_shape", size)
    for size in features:
        check_positive_int("every entry of features", size)
    for name, size in (("latent", latent), ("kernel_size", kernel_size), ("stride", stride)):
        check_positive_int(name, size)
    if stride > kernel_size:
        raise ValueError(
            f"stride {stride} is above kernel_size {kernel_size}: rows between would never be "
            "read. Use a stride of at most kernel_size."
        )
    hidden, code = get_activation(activation).function, get_activation(latent_activation).function
    out = get_activation(output).function
    kernel_init = kernel_init or jax.nn.initializers.glorot_uniform()
    stages = _plan(shape, features, kernel_size, stride)
    top = (stages[-1].kept, features[-1])

    def init(key: PRNGKeyArray) -> Params:
        keys = iter(jax.random.split(key, 2 * len(stages) + 2))
        encoder: dict[str, Params] = {}
        for i, stage in enumerate(stages):
            kernel = kernel_init(next(keys), stage.kernel_shape, dtype)
            bias = jnp.zeros(stage.kernel_shape[2], dtype)
            encoder[f"conv_{i}"] = {"kernel": kernel, "bias": bias}
        encoder["dense"] = init_dense(next(keys), prod(top), latent, kernel_init, dtype)
        decoder = {"dense": init_dense(next(keys), latent, prod(top), kernel_init, dtype)}
        for i, stage in enumerate(reversed(stages)):
            lags, made, taken = stage.kernel_shape
            # Drawn with the fans of the direction in which the decoder uses it.
            kernel = jnp.swapaxes(kernel_init(next(keys), (lags, taken, made), dtype), 1, 2)
            decoder[f"conv_{i}"] = {"kernel": kernel, "bias": jnp.zeros(made, dtype)}
        return {"encoder": encoder, "decoder": decoder}

    def encode(params: Params, x: Float[Array, "rows channels"]) -> Float[Array, " latent"]:
        for i, stage in enumerate(stages):
            layer = params["encoder"][f"conv_{i}"]
            x = hidden(_convolve(x, layer["kernel"], stride, stage) + layer["bias"][None])
        return code(dense(params["encoder"]["dense"], x.reshape(-1)))

    def decode(params: Params, z: Float[Array, " latent"]) -> Float[Array, "rows channels"]:
        x = hidden(dense(params["decoder"]["dense"], z)).reshape(top)
        for i, stage in enumerate(reversed(stages)):
            layer = params["decoder"][f"conv_{i}"]
            x = _transpose_convolve(x, layer["kernel"], stride, stage) + layer["bias"][None]
            x = hidden(x) if i < len(stages) - 1 else out(x)
        return x

    return Autoencoder(init, encode, decode)


def _plan(
    shape: tuple[int, ...], features: Sequence[int], kernel_size: int, stride: int
) -> list[_Stage]:
    stages = []
    rows = shape[0]
    for channels, made in pairwise((shape[1], *features)):
        kept = -(-rows // stride)
        before = (kept - 1) * stride + kernel_size - rows
        stages.append(_Stage((kernel_size, channels, made), before, kept))
        rows = kept
    return stages


def _convolve(x: Array, kernel: Array, stride: int, stage: _Stage) -> Array:
    return lax.conv_general_dilated(
        x[None], kernel, (stride,), [(stage.before, 0)], dimension_numbers=_LAYOUT
    )[0]


def _transpose_convolve(x: Array, kernel: Array, stride: int, stage: _Stage) -> Array:
    # The transpose of p zeros before is k − 1 − p before the input that the stride spreads out.
    edges = (kernel.shape[0] - 1 - stage.before, kernel.shape[0] - 1)
    return lax.conv_transpose(
        x[None],
        kernel,
        (stride,),
        [edges],
        dimension_numbers=_LAYOUT,
        transpose_kernel=True,
    )[0]
