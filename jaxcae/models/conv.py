"""A convolutional autoencoder; its decoder runs the transposed maps of its encoder."""

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

_LAYOUT = ("NHWC", "HWIO", "NHWC")


class _Stage(NamedTuple):
    """One strided convolution from `(*image, channels)` to `(*map, features)`."""

    kernel_shape: tuple[int, int, int, int]  # HWIO, of the encoder's direction
    map: tuple[int, int]
    extra: tuple[int, int]  # rows and columns that the stride drops: (n + 2p − k) mod stride


def conv(
    input_shape: Sequence[int],
    features: Sequence[int],
    latent: int,
    activation: str = "softplus",
    *,
    kernel_size: int = 3,
    stride: int = 2,
    tied: bool = False,
    latent_activation: str = "identity",
    output: str = "identity",
    kernel_init: Initializer | None = None,
    dtype: Any = jnp.float32,
) -> Autoencoder:
    """Make a convolutional autoencoder of images whose decoder mirrors its encoder.

    The encoder is a strided convolution and s for every entry of `features`, then a dense map to
    the code. The decoder is a dense map and s, then one transposed convolution per stage with s
    between them and o at the end.

    Every convolution pads p = (kernel_size − 1) // 2 zeros on each side, so n rows become
    m = (n + 2p − kernel_size) // stride + 1. The decoder's stage is the exact transpose of that
    map, from m rows back to n. In PyTorch: `Conv2d(C, F, kernel_size, stride, padding=p)` and
    `ConvTranspose2d(F, C, kernel_size, stride, padding=p, output_padding=e)` with
    e = (n + 2p − kernel_size) mod stride. Both PyTorch weights are `kernel.transpose(3, 2, 0, 1)`.
    The flattened map is in (row, column, feature) order here, (feature, row, column) there.

    Args:
        input_shape: `(height, width, channels)` of one sample.
        features: Features of each convolution, such as `(16, 32)`; at least one.
        latent: Units of the code.
        activation: Name of the hidden activation s.
        kernel_size: Height and width of every kernel.
        stride: Stride of every convolution.
        tied: Decode with the encoder's kernels transposed; the decoder then owns biases only.
        latent_activation: Activation on the code; `"identity"` for a linear code.
        output: Activation o on the reconstruction. Keep `"identity"` with the Bernoulli loss,
            which takes logits.
        kernel_init: A `jax.nn.initializers` function; Glorot uniform by default.
        dtype: Dtype of the parameters.

    Returns:
        `Autoencoder(init, encode, decode)`. Params are `{"encoder": {"conv_0": …, "dense": …},
        "decoder": {"dense": …, "conv_0": …}}`, each in the order of use, with a `kernel` and a
        `bias`. A convolution's kernel is (height, width, in, out) in the *encoder's* direction;
        that of a decoder stage is therefore (height, width, channels it makes, features it takes).

    Raises:
        ValueError: If a shape, a size or a name is not usable.

    Example:
        >>> import jax, jaxcae
        >>> model = jaxcae.conv((28, 28, 1), (16, 32), 64)
        >>> params = model.init(jax.random.key(0))
        >>> model.encode(params, jax.numpy.zeros((28, 28, 1))).shape
        (64,)
    """
    shape = tuple(input_shape)
    if len(shape) != 3:
        raise ValueError(f"input_shape must be (height, width, channels), got {shape!r}.")
    if not features:
        raise ValueError("features needs at least one convolution; jaxcae.mlp has none.")
    for size in shape:
        check_positive_int("every entry of input_shape", size)
    for size in features:
        check_positive_int("every entry of features", size)
    for name, size in (("latent", latent), ("kernel_size", kernel_size), ("stride", stride)):
        check_positive_int(name, size)
    hidden, code = get_activation(activation).function, get_activation(latent_activation).function
    out = get_activation(output).function
    kernel_init = kernel_init or jax.nn.initializers.glorot_uniform()
    padding = (kernel_size - 1) // 2
    stages = _plan(shape, features, kernel_size, stride, padding)
    top = (*stages[-1].map, features[-1])

    def init(key: PRNGKeyArray) -> Params:
        keys = iter(jax.random.split(key, 2 * len(stages) + 2))
        encoder: dict[str, Params] = {}
        for i, stage in enumerate(stages):
            bias = jnp.zeros(stage.kernel_shape[3], dtype)
            encoder[f"conv_{i}"] = {
                "kernel": kernel_init(next(keys), stage.kernel_shape, dtype),
                "bias": bias,
            }
        encoder["dense"] = init_dense(next(keys), prod(top), latent, kernel_init, dtype)
        decoder = {"dense": init_dense(next(keys), latent, prod(top), kernel_init, dtype)}
        for i, stage in enumerate(reversed(stages)):
            height, width, made, taken = stage.kernel_shape
            # Drawn with the fans of the direction in which the decoder uses it.
            kernel = kernel_init(next(keys), (height, width, taken, made), dtype)
            decoder[f"conv_{i}"] = {
                "kernel": jnp.swapaxes(kernel, 2, 3),
                "bias": jnp.zeros(made, dtype),
            }
        if tied:
            decoder = {name: {"bias": layer["bias"]} for name, layer in decoder.items()}
        return {"encoder": encoder, "decoder": decoder}

    def encode(params: Params, x: Float[Array, "height width channels"]) -> Float[Array, " latent"]:
        for i in range(len(stages)):
            layer = params["encoder"][f"conv_{i}"]
            x = hidden(_convolve(x, layer["kernel"], stride, padding) + layer["bias"][None, None])
        return code(dense(params["encoder"]["dense"], x.reshape(-1)))

    def decode(params: Params, z: Float[Array, " latent"]) -> Float[Array, "height width channels"]:
        decoder = params["decoder"]
        if tied:
            decoder = _with_encoder_kernels(params)
        x = hidden(dense(decoder["dense"], z)).reshape(top)
        for i, stage in enumerate(reversed(stages)):
            layer = decoder[f"conv_{i}"]
            x = _transpose_convolve(x, layer["kernel"], stride, padding, stage.extra)
            x = x + layer["bias"][None, None]
            x = hidden(x) if i < len(stages) - 1 else out(x)
        return x

    return Autoencoder(init, encode, decode)


def _plan(
    shape: tuple[int, ...], features: Sequence[int], kernel_size: int, stride: int, padding: int
) -> list[_Stage]:
    stages = []
    image = shape[:2]
    for channels, made in pairwise((shape[2], *features)):
        spare = [n + 2 * padding - kernel_size for n in image]
        if min(spare) < 0:
            raise ValueError(
                f"kernel_size {kernel_size} does not fit a map of {image[0]}×{image[1]}: "
                "use a smaller kernel_size or stride, or fewer features."
            )
        rows, columns = (n // stride + 1 for n in spare)
        extra = (spare[0] % stride, spare[1] % stride)
        stages.append(_Stage((kernel_size, kernel_size, channels, made), (rows, columns), extra))
        image = (rows, columns)
    return stages


def _convolve(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    pads = [(padding, padding)] * 2
    return lax.conv_general_dilated(
        x[None], kernel, (stride, stride), pads, dimension_numbers=_LAYOUT
    )[0]


def _transpose_convolve(
    x: Array, kernel: Array, stride: int, padding: int, extra: tuple[int, int]
) -> Array:
    # The transpose of padding p is k − 1 − p around the input spread out by the stride; `extra`
    # at the end restores the rows that the stride dropped.
    edge = kernel.shape[0] - 1 - padding
    return lax.conv_transpose(
        x[None],
        kernel,
        (stride, stride),
        [(edge, edge + e) for e in extra],
        dimension_numbers=_LAYOUT,
        transpose_kernel=True,
    )[0]


def _with_encoder_kernels(params: Params) -> Params:
    encoder, decoder = params["encoder"], params["decoder"]
    last = len(decoder) - 2
    tied = {
        f"conv_{i}": {
            "kernel": encoder[f"conv_{last - i}"]["kernel"],
            "bias": decoder[f"conv_{i}"]["bias"],
        }
        for i in range(last + 1)
    }
    kernel = encoder["dense"]["kernel"].T
    return {"dense": {"kernel": kernel, "bias": decoder["dense"]["bias"]}, **tied}
