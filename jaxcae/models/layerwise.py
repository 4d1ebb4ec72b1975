"""A fully connected autoencoder as a stack of one-layer autoencoders, and back."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from jaxcae.errors import check_positive_int
from jaxcae.models.mlp import mlp
from jaxcae.types import Autoencoder, Params


def mlp_layers(
    sizes: Sequence[int],
    activation: str = "softplus",
    *,
    latent_activation: str = "identity",
    output: str = "identity",
    **options: Any,
) -> list[Autoencoder]:
    """Make an autoencoder for each layer of `mlp(sizes, …)`, in the same units.

    Layer i maps widths i to i + 1 and back with the activations that the deep network has there:
    its code is what the deep encoder computes at that depth. `mlp_params` puts them together.

    Args:
        sizes: As for `mlp`; at least two.
        activation: As for `mlp`.
        latent_activation: As for `mlp`: that of the last layer's code.
        output: As for `mlp`: that of the first layer's reconstruction.
        **options: As for `mlp`.

    Raises:
        ValueError: If sizes or a name are not usable.
    """
    widths = tuple(sizes)
    if len(widths) < 2:
        raise ValueError(f"sizes needs features and at least one layer, got {widths!r}.")
    for width in widths:
        check_positive_int("every entry of sizes", width)
    last = len(widths) - 2
    return [
        mlp(
            pair,
            activation,
            latent_activation=latent_activation if index == last else activation,
            output=output if index == 0 else activation,
            **options,
        )
        for index, pair in enumerate(pairwise(widths))
    ]


def mlp_params(layers: Sequence[Params]) -> Params:
    """Put the parameters of `mlp_layers` together as those of `mlp` with the same options.

    Args:
        layers: Parameters of each layer, the one next to the samples first.

    Returns:
        `{"encoder": {"layer_0": …}, "decoder": …}`; the decoder mirrors the encoder.
    """
    encoders = [layer["encoder"]["layer_0"] for layer in layers]
    decoders = [layer["decoder"]["layer_0"] for layer in reversed(layers)]
    return {
        "encoder": {f"layer_{i}": layer for i, layer in enumerate(encoders)},
        "decoder": {f"layer_{i}": layer for i, layer in enumerate(decoders)},
    }
