"""Weights between jaxcae's params and PyTorch's state dicts, bit for bit and both ways.

PyTorch keeps (out, in) weights and (out, in, height, width) convolutions, jaxcae (in, out) kernels
and (height, width, in, out); a flattened map is in (feature, row, column) order there and in
(row, column, feature) order here. Only the order of the elements changes, never a bit of one.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = dict[str, Array]
Names = Sequence[str] | None
HALVES = ("encoder", "decoder")


class ConversionError(ValueError):
    """Weights that do not make an autoencoder; the message says which and why."""


def params_from_torch(
    weights: Mapping[str, Any], encoder: Names = None, decoder: Names = None
) -> dict[str, Any]:
    """Make jaxcae params from the named weights of a PyTorch autoencoder.

    Args:
        weights: A `state_dict()`, or the content of a safetensors file: `<layer>.weight` and
            `<layer>.bias`. A tied decoder has biases only.
        encoder: Names of the encoder's layers in order, such as `("fc1", "fc2")`. By default every
            name that begins with `encoder.`, in natural order, so that `encoder.10` follows
            `encoder.2`: this fits an `nn.Sequential` and an `nn.ModuleList`.
        decoder: The same for the decoder.

    Returns:
        Nested dicts of NumPy arrays, in the form of the params of `jaxcae.mlp`, or of
        `jaxcae.conv` where the encoder is convolutions and then one linear layer.

    Raises:
        ConversionError: If a weight is left over, missing, or of a shape that does not fit.
    """
    arrays = {name: as_numpy(value) for name, value in weights.items()}
    theirs = dict(zip(HALVES, torch_layers(arrays, encoder, decoder), strict=True))
    first = arrays.get(f"{theirs['encoder'][0]}.weight")
    convolutional = first is not None and first.ndim == 4
    params: dict[str, Any] = {}
    for half in HALVES:
        ours = _jax_layers(half, len(theirs[half]), convolutional)
        params[half] = {
            name: _take_layer(arrays, layer) for name, layer in zip(ours, theirs[half], strict=True)
        }
    params = _reorder_flattened(params, to_torch=False)
    _check_widths(params)
    return params


def params_to_torch(
    params: Mapping[str, Any], encoder: Names = None, decoder: Names = None
) -> Arrays:
    """Make the named weights of a PyTorch autoencoder from jaxcae params.

    Args:
        params: Params of `jaxcae.mlp` or `jaxcae.conv`.
        encoder: Names for the encoder's layers, in order; `encoder.0`, `encoder.1`, … by default.
        decoder: The same for the decoder.

    Returns:
        NumPy arrays by name; `as_tensors` makes a state dict of them.

    Raises:
        ConversionError: If the params are not of that form, or the names do not fit them.
    """
    if set(params) != set(HALVES):
        raise ConversionError(f"expected params of an encoder and a decoder, got {sorted(params)}.")
    _check_widths(params)
    params = _reorder_flattened(params, to_torch=True)
    arrays: Arrays = {}
    for half, given in zip(HALVES, (encoder, decoder), strict=True):
        ours = _jax_layers(half, len(params[half]), "dense" in params["encoder"])
        theirs = given or [f"{half}.{i}" for i in range(len(ours))]
        if len(theirs) != len(ours):
            raise ConversionError(
                f"the {half} has {len(ours)} layers, got {len(theirs)} names: {', '.join(theirs)}."
            )
        for name, layer in zip(ours, theirs, strict=True):
            if "kernel" in params[half][name]:
                arrays[f"{layer}.weight"] = kernel_to_torch(params[half][name]["kernel"])
            arrays[f"{layer}.bias"] = as_numpy(params[half][name]["bias"])
    return arrays


def kernel_from_torch(weight: Array) -> Array:
    """Reorder (out, in) to (in, out), or (out, in, h, w) to (h, w, in, out)."""
    return np.ascontiguousarray(weight.transpose(*range(2, weight.ndim), 1, 0))


def kernel_to_torch(kernel: Any) -> Array:
    """Reorder (in, out) to (out, in), or (h, w, in, out) to (out, in, h, w)."""
    last = np.ndim(kernel) - 1
    return np.ascontiguousarray(as_numpy(kernel).transpose(last, last - 1, *range(last - 1)))


def torch_layers(
    weights: Mapping[str, Any], encoder: Names = None, decoder: Names = None
) -> tuple[list[str], list[str]]:
    """Name the layers of both halves of a PyTorch autoencoder in order, accounting for all.

    Raises:
        ConversionError: If a half has no layers, or a weight belongs to none.
    """
    modules = {name.rpartition(".")[0] for name in weights}
    found = []
    for half, given in zip(HALVES, (encoder, decoder), strict=True):
        names = list(
            given or sorted((m for m in modules if m.startswith(half + ".")), key=_natural)
        )
        if not names:
            raise ConversionError(
                f"no weights are named {half}.<layer>.weight; there are "
                f"{', '.join(sorted(weights)[:4]) or 'none'}. Name the {half}'s layers in order."
            )
        found.append(names)
    known = {f"{layer}.{leaf}" for layer in found[0] + found[1] for leaf in ("weight", "bias")}
    if left := sorted(set(weights) - known):
        raise ConversionError(
            f"{left[0]!r} belongs to no layer of the encoder or decoder; name the layers in order, "
            "and leave out what is not a weight or bias of the autoencoder."
        )
    return found[0], found[1]


def as_numpy(value: Any) -> Array:
    """Copy a tensor or array to NumPy without touching a bit, bfloat16 included."""
    if not hasattr(value, "detach"):
        return np.array(value)
    tensor = value.detach().cpu().contiguous()
    if str(tensor.dtype) != "torch.bfloat16":
        return np.array(tensor.numpy())
    import ml_dtypes
    import torch

    return np.array(tensor.view(torch.int16).numpy()).view(ml_dtypes.bfloat16)


def as_tensors(arrays: Mapping[str, Array]) -> dict[str, Any]:
    """Copy NumPy arrays to tensors without touching a bit: a state dict."""
    import torch

    return {
        name: torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        if array.dtype.name == "bfloat16"
        else torch.from_numpy(array.copy())
        for name, array in arrays.items()
    }


def _take_layer(arrays: Arrays, layer: str) -> dict[str, Array]:
    if f"{layer}.bias" not in arrays:
        raise ConversionError(
            f"{layer!r} has no bias, which jaxcae's layers have: add one of zeros."
        )
    taken = {"bias": arrays[f"{layer}.bias"]}
    if f"{layer}.weight" in arrays:
        weight = arrays[f"{layer}.weight"]
        if weight.ndim not in (2, 4):
            raise ConversionError(
                f"{layer}.weight has shape {weight.shape}; only Linear, Conv2d and ConvTranspose2d "
                "are known here."
            )
        taken["kernel"] = kernel_from_torch(weight)
    return taken


def _jax_layers(half: str, count: int, convolutional: bool) -> list[str]:
    if not convolutional:
        return [f"layer_{i}" for i in range(count)]
    convolutions = [f"conv_{i}" for i in range(count - 1)]
    return [*convolutions, "dense"] if half == "encoder" else ["dense", *convolutions]


def _reorder_flattened(params: Mapping[str, Any], to_torch: bool) -> dict[str, Any]:
    """Permute what touches the flattened map; only its number of features is needed for that."""
    if "dense" not in params["encoder"]:
        return dict(params)
    maps = params["encoder"][f"conv_{len(params['encoder']) - 2}"]["bias"].shape[0]

    def reorder(array: Any, axis: int) -> Array:
        array = np.moveaxis(as_numpy(array), axis, 0)
        split = (-1, maps) if to_torch else (maps, -1)
        swapped = array.reshape(*split, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)
        return np.ascontiguousarray(np.moveaxis(swapped, 0, axis))

    encoder, decoder = dict(params["encoder"]), dict(params["decoder"])
    encoder["dense"] = encoder["dense"] | {"kernel": reorder(encoder["dense"]["kernel"], 0)}
    decoder["dense"] = {name: reorder(leaf, -1) for name, leaf in decoder["dense"].items()}
    return {"encoder": encoder, "decoder": decoder}


def _check_widths(params: Mapping[str, Any]) -> None:
    """Raise ConversionError unless every layer's input is the output of the layer before."""
    convolutional = "dense" in params["encoder"]
    ends = []
    for half in HALVES:
        for name in _jax_layers(half, len(params[half]), convolutional):
            if name not in params[half]:
                raise ConversionError(
                    f"expected a layer {half}/{name}, got {sorted(params[half])}."
                )
            layer = params[half][name]
            if "kernel" not in layer:
                continue
            taken, made = np.shape(layer["kernel"])[-2:]
            if half == "decoder" and name.startswith("conv"):  # kept in the encoder's direction
                taken, made = made, taken
            if np.shape(layer["bias"]) != (made,):
                raise ConversionError(
                    f"{half}/{name} makes {made} outputs but its bias has shape "
                    f"{np.shape(layer['bias'])}."
                )
            ends.append((f"{half}/{name}", taken, made))
    for (before, _, made), (after, taken, _) in pairwise(ends):
        at_flattening = convolutional and ("dense" in before) != ("dense" in after)
        if (max(made, taken) % min(made, taken) != 0) if at_flattening else made != taken:
            raise ConversionError(
                f"{before} makes {made} outputs but {after} takes {taken}: are the layers in order?"
            )


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
