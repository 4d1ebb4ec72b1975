"""Weights between jaxcae's params and PyTorch's state dicts, both ways.

PyTorch keeps (out, in) weights and (out, in, height, width) convolutions, jaxcae (in, out) kernels
and (height, width, in, out); a flattened map is in (feature, row, column) order there and in
(row, column, feature) order here. Only the order of the elements changes, never a bit of one,
except where a BatchNorm is folded into a layer.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from parity.folding import BatchNorm, Placed, fold, place
from parity.layers import (
    DTYPES,
    HALVES,
    Array,
    Arrays,
    ConversionError,
    Kind,
    Layer,
    as_numpy,
    as_tensors,
    check_chain,
)
from parity.order import Names, read_layers

__all__ = [
    "ConversionError",
    "as_numpy",
    "as_tensors",
    "params_from_torch",
    "params_to_torch",
    "torch_layers",
]

EPS = 1e-5  # PyTorch's default


class Network(NamedTuple):
    """A state dict that was understood.

    Attributes:
        placed: By half, every layer as it was read, and the BatchNorms that go into it.
        layers: By half, the layers with all that is folded into them.
    """

    placed: dict[str, list[Placed]]
    layers: dict[str, list[Layer]]

    @property
    def names(self) -> dict[str, list[str]]:
        """Whole names of the layers that are left, by half."""
        return {half: [layer.name for layer in self.layers[half]] for half in HALVES}

    @property
    def without_bias(self) -> list[str]:
        """Names of the layers that have a weight and no bias."""
        return [
            layer.name
            for half in HALVES
            for layer in self.layers[half]
            if "bias" not in layer.arrays
        ]

    @property
    def arrays(self) -> Arrays:
        """What is left to convert, by the names that PyTorch would give it."""
        return {
            f"{layer.name}.{leaf}": layer.arrays[leaf]
            for half in HALVES
            for layer in self.layers[half]
            for leaf in ("weight", "bias")
            if leaf in layer.arrays
        }


def params_from_torch(
    weights: Mapping[str, Any],
    encoder: Names = None,
    decoder: Names = None,
    *,
    batch_norm: BatchNorm = None,
    eps: float = EPS,
) -> dict[str, Any]:
    """Make jaxcae params from the named weights of a PyTorch autoencoder.

    Linear, Conv1d, Conv2d and ConvTranspose layers are known, with or without a bias, and with
    weight_norm, old or new. A BatchNorm is folded as it is evaluated. A tied decoder has biases
    only. `module.`, `_orig_mod.`, `model.` and whatever else stands before `encoder.` in all names
    may stay there.

    Args:
        weights: A `state_dict()`, or the content of a safetensors file.
        encoder: Names of the encoder's layers in order, BatchNorms among them, such as
            `("fc1", "bn1", "fc2")`. By default every layer under `encoder.`, in the order of the
            state dict, of the numbers in the names, and of the widths; it is refused if these
            leave a choice or disagree.
        decoder: The same for the decoder.
        batch_norm: `"before"` or `"after"` the activation is where every BatchNorm stands. By
            default the numbers of an `nn.Sequential` tell.
        eps: What every BatchNorm adds to its variance; a state dict does not hold it.

    Returns:
        Nested dicts of NumPy arrays in the form of the params of `jaxcae.mlp`; of `jaxcae.conv`
        where the encoder is convolutions and then one linear layer. (Of a Conv1d the kernel is
        (width, in, out): no model of jaxcae takes it.) A layer without a bias gets one of zeros.

    Raises:
        ConversionError: If a weight is left over, missing, of a shape that does not fit, or of a
            layer that cannot be converted; it names the layer.
    """
    return params_of_network(read(weights, encoder, decoder, batch_norm=batch_norm, eps=eps))


def read(
    weights: Mapping[str, Any],
    encoder: Names = None,
    decoder: Names = None,
    *,
    batch_norm: BatchNorm = None,
    eps: float = EPS,
) -> Network:
    """Understand a state dict; see `params_from_torch` for the arguments and what is refused."""
    if not (math.isfinite(eps) and eps >= 0):
        raise ConversionError(f"eps must be finite and at least 0, got {eps!r}.")
    halves = read_layers(weights, encoder, decoder)
    placed = {half: place(halves[half], batch_norm) for half in HALVES}
    layers = {
        half: [fold(p, eps, flattens=_is_flattening(p.layer, halves[half])) for p in placed[half]]
        for half in HALVES
    }
    network = Network(placed, layers)
    _check_tied(network)
    return network


def torch_layers(
    weights: Mapping[str, Any], encoder: Names = None, decoder: Names = None, **options: Any
) -> tuple[list[str], list[str]]:
    """Name the layers of both halves in order, as `read` understands them, BatchNorms left out."""
    names = read(weights, encoder, decoder, **options).names
    return names["encoder"], names["decoder"]


def params_of_network(network: Network) -> dict[str, Any]:
    """Reorder the elements of the layers that were read into jaxcae's params."""
    params: dict[str, Any] = {}
    for half, layers in network.layers.items():
        params[half] = {}
        for name, layer in zip(jax_names(network, half), layers, strict=True):
            arrays = layer.arrays
            if layer.kind == "bias":
                params[half][name] = {"bias": arrays["bias"]}
                continue
            zeros = np.zeros(layer.widths[1], arrays["weight"].dtype)
            kernel = kernel_from_torch(arrays["weight"])
            params[half][name] = {"kernel": kernel, "bias": arrays.get("bias", zeros)}
    return _reorder_flattened(params, to_torch=False)


def params_to_torch(
    params: Mapping[str, Any],
    encoder: Names = None,
    decoder: Names = None,
    *,
    without_bias: Collection[str] = (),
) -> Arrays:
    """Make the named weights of a PyTorch autoencoder from jaxcae params.

    Args:
        params: Params of `jaxcae.mlp` or `jaxcae.conv`.
        encoder: Names for the encoder's layers, in order; `encoder.0`, `encoder.1`, … by default.
        decoder: The same for the decoder.
        without_bias: Names of layers that had no bias there: left out again while it is zero.

    Returns:
        NumPy arrays by name; `as_tensors` makes a state dict of them.

    Raises:
        ConversionError: If the params are not of that form, or the names do not fit them.
    """
    if set(params) != set(HALVES):
        raise ConversionError(f"expected params of an encoder and a decoder, got {sorted(params)}.")
    ours = {half: names_in(params[half], half) for half in HALVES}
    _check_widths(params, ours)
    params = _reorder_flattened(params, to_torch=True)
    arrays: Arrays = {}
    for half, given in zip(HALVES, (encoder, decoder), strict=True):
        theirs = given or [f"{half}.{i}" for i in range(len(ours[half]))]
        if len(theirs) != len(ours[half]):
            raise ConversionError(
                f"the {half} has {len(ours[half])} layers, got {len(theirs)} names: "
                f"{', '.join(theirs)}."
            )
        for name, layer in zip(ours[half], theirs, strict=True):
            if "kernel" in params[half][name]:
                arrays[f"{layer}.weight"] = kernel_to_torch(params[half][name]["kernel"])
            bias = as_numpy(params[half][name]["bias"])
            if layer not in without_bias or bias.any():
                arrays[f"{layer}.bias"] = bias
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES:
            raise ConversionError(f"{name} is {array.dtype}; expected one of {', '.join(DTYPES)}.")
    return arrays


def kernel_from_torch(weight: Array) -> Array:
    """Reorder (out, in) to (in, out), or (out, in, h, w) to (h, w, in, out)."""
    return np.ascontiguousarray(weight.transpose(*range(2, weight.ndim), 1, 0))


def kernel_to_torch(kernel: Any) -> Array:
    """Reorder (in, out) to (out, in), or (h, w, in, out) to (out, in, h, w)."""
    last = np.ndim(kernel) - 1
    return np.ascontiguousarray(as_numpy(kernel).transpose(last, last - 1, *range(last - 1)))


def jax_names(network: Network, half: str) -> list[str]:
    """Name a half's layers as jaxcae does; a tied decoder's after the encoder that it mirrors."""
    layers = network.layers[half]
    model = network.layers["encoder"] if layers[0].kind == "bias" else layers
    return _names(half, len(layers), any(layer.kind.startswith("Conv") for layer in model))


def _names(half: str, count: int, convolutional: bool) -> list[str]:
    if not convolutional:
        return [f"layer_{i}" for i in range(count)]
    convolutions = [f"conv_{i}" for i in range(count - 1)]
    return [*convolutions, "dense"] if half == "encoder" else ["dense", *convolutions]


def names_in(layers: Mapping[str, Any], half: str) -> list[str]:
    """List the layers of a half of params in order, all of the names that they must have."""
    names = _names(half, len(layers), "dense" in layers)
    if missing := [name for name in names if name not in layers]:
        raise ConversionError(f"expected a layer {half}/{missing[0]}, got {sorted(layers)}.")
    return names


def _is_flattening(layer: Layer, half: list[Layer]) -> bool:
    return layer.kind == "Linear" and any(other.kind.startswith("Conv") for other in half)


def _check_tied(network: Network) -> None:
    """Raise ConversionError unless a decoder without weights mirrors the encoder."""
    encoder, decoder = (network.layers[half] for half in HALVES)
    if decoder[0].kind != "bias":
        return
    if len(decoder) != len(encoder):
        raise ConversionError(
            f"the decoder's {len(decoder)} layers have biases alone, as if tied to the encoder's, "
            f"which are {len(encoder)}."
        )
    if norm := next((p.norms[0] for p in network.placed["encoder"] if p.norms), None):
        raise ConversionError(
            f"{norm.name} is a BatchNorm, and the decoder uses the encoder's weights: it cannot be "
            "folded into one of them and not into the other."
        )
    for layer, mirrored in zip(decoder, encoder[::-1], strict=True):
        (made,), (taken, _) = layer.arrays["bias"].shape, mirrored.widths
        if made != taken:
            raise ConversionError(
                f"{layer.name} has {made} biases, but {mirrored.name}, which it mirrors, takes "
                f"{taken} inputs."
            )


def _reorder_flattened(params: Mapping[str, Any], to_torch: bool) -> dict[str, Any]:
    """Permute what touches the flattened map; only its number of features is needed for that."""

    def reorder(array: Any, axis: int, maps: int) -> Array:
        array = np.moveaxis(as_numpy(array), axis, 0)
        split = (-1, maps) if to_torch else (maps, -1)
        swapped = array.reshape(*split, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)
        return np.ascontiguousarray(np.moveaxis(swapped, 0, axis))

    encoder, decoder = dict(params["encoder"]), dict(params["decoder"])
    if "dense" in encoder:
        maps = np.shape(encoder[f"conv_{len(encoder) - 2}"]["kernel"])[-1]
        encoder["dense"] = encoder["dense"] | {
            "kernel": reorder(encoder["dense"]["kernel"], 0, maps)
        }
    if "dense" in decoder:
        tied = "kernel" not in decoder["dense"]
        maps = maps if tied else np.shape(decoder["conv_0"]["kernel"])[-1]
        decoder["dense"] = {n: reorder(a, -1, maps) for n, a in decoder["dense"].items()}
    return {"encoder": encoder, "decoder": decoder}


def _check_widths(params: Mapping[str, Any], names: Mapping[str, list[str]]) -> None:
    """Raise ConversionError unless every layer's input is the output of the layer before."""
    kinds: dict[int, Kind] = {2: "Linear", 3: "Conv1d", 4: "Conv2d"}
    layers = []
    for half in HALVES:
        for name in names[half]:
            leaves = params[half][name]
            if "kernel" in leaves:
                weight = kernel_to_torch(leaves["kernel"])
                arrays = {"weight": weight, "bias": np.asarray(leaves["bias"])}
                layers.append(Layer(f"{half}/{name}", kinds[weight.ndim], arrays, half))
    check_chain(layers)
