"""Weights between jaxcae's params and PyTorch's state dicts, bit for bit and both ways.

PyTorch keeps (out, in) weights and (out, in, height, width) convolutions, jaxcae (in, out) kernels
and (height, width, in, out). Only the order of the elements changes, never a bit of one.
Files are safetensors on both sides: reading one cannot run code.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
HALVES = ("encoder", "decoder")


class ConversionError(ValueError):
    """Weights that do not make an autoencoder; the message says which and why."""


def params_from_torch(
    weights: Mapping[str, Any],
    encoder: Sequence[str] | None = None,
    decoder: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Make jaxcae params from the named weights of a PyTorch autoencoder.

    Args:
        weights: A `state_dict()` or the content of a safetensors file: `<layer>.weight` and
            `<layer>.bias`. A tied decoder has biases only.
        encoder: Names of the encoder's layers in order, such as `("fc1", "fc2")`. By default every
            name that begins with `encoder.`, in natural order, so that `encoder.10` follows
            `encoder.2`: this fits an `nn.Sequential` or `nn.ModuleList`.
        decoder: The same for the decoder.

    Returns:
        Nested dicts of NumPy arrays, as `jaxcae.mlp(...).init` returns of JAX arrays.

    Raises:
        ConversionError: If a weight is left over, missing, or of a shape that does not fit.
    """
    arrays = {name: as_numpy(value) for name, value in weights.items()}
    layers = layer_names(arrays, encoder, decoder)
    used = {f"{layer}.{leaf}" for half in layers.values() for layer in half for leaf in LEAVES}
    if left := sorted(set(arrays) - used):
        raise ConversionError(
            f"no layer for {left[0]!r} (of {len(left)} such); name the layers in order with "
            "encoder= and decoder=, or drop what is not a weight of the autoencoder."
        )
    params = {
        half: {f"layer_{i}": _layer_from_torch(arrays, name) for i, name in enumerate(names)}
        for half, names in layers.items()
    }
    check_chain(params)
    return params


def params_to_torch(
    params: Mapping[str, Any],
    encoder: Sequence[str] | None = None,
    decoder: Sequence[str] | None = None,
) -> Arrays:
    """Make the named weights of a PyTorch autoencoder from jaxcae params.

    Args:
        params: Nested dicts with `encoder` and `decoder`.
        encoder: Names for the encoder's layers, in order; `encoder.0`, `encoder.1`, … by default.
        decoder: The same for the decoder.

    Returns:
        NumPy arrays by name; `as_tensors` makes a state dict of them.

    Raises:
        ConversionError: If the layers do not follow one another, or the names do not fit them.
    """
    check_chain(params)
    arrays: Arrays = {}
    for half, names in zip(HALVES, (encoder, decoder), strict=True):
        layers = params[half]
        names = names or [f"{half}.{i}" for i in range(len(layers))]
        if len(names) != len(layers):
            raise ConversionError(
                f"the {half} has {len(layers)} layers, got {len(names)} names: {', '.join(names)}."
            )
        for i, name in enumerate(names):
            for leaf, value in layers[f"layer_{i}"].items():
                array = np.asarray(value)
                arrays[f"{name}.{LEAVES_OF_JAX[leaf]}"] = (
                    kernel_to_torch(array) if leaf == "kernel" else array
                )
    return arrays


LEAVES = {"weight": "kernel", "bias": "bias"}
LEAVES_OF_JAX = {ours: theirs for theirs, ours in LEAVES.items()}


def kernel_from_torch(weight: NDArray[Any]) -> NDArray[Any]:
    """Reorder (out, in) to (in, out), or (out, in, h, w) to (h, w, in, out)."""
    return np.ascontiguousarray(weight.transpose(*range(2, weight.ndim), 1, 0))


def kernel_to_torch(kernel: NDArray[Any]) -> NDArray[Any]:
    """Reorder (in, out) to (out, in), or (h, w, in, out) to (out, in, h, w)."""
    last = kernel.ndim - 1
    return np.ascontiguousarray(kernel.transpose(last, last - 1, *range(last - 1)))


def layer_names(
    names: Mapping[str, Any], encoder: Sequence[str] | None, decoder: Sequence[str] | None
) -> dict[str, list[str]]:
    """Find the layers of both halves in the names of the weights, in order."""
    found = {}
    for half, given in zip(HALVES, (encoder, decoder), strict=True):
        layers = {name.rpartition(".")[0] for name in names}
        found[half] = list(
            given or sorted((n for n in layers if n.startswith(f"{half}.")), key=_natural)
        )
        if not found[half]:
            raise ConversionError(
                f"no weights named {half}.<layer>.weight among {', '.join(sorted(names)[:4])}, …; "
                f"name the layers in order with {half}=."
            )
    return found


def check_chain(params: Mapping[str, Any]) -> None:
    """Raise ConversionError unless each dense layer's input is the output of the one before."""
    kernels = [
        (f"{half}/layer_{i}", np.shape(params[half][f"layer_{i}"].get("kernel", ())))
        for half in HALVES
        for i in range(len(params[half]))
    ]
    for (before, one), (after, two) in zip(kernels, kernels[1:], strict=False):
        if len(one) == len(two) == 2 and one[1] != two[0]:
            raise ConversionError(
                f"{before} gives {one[1]} outputs but {after} takes {two[0]} inputs; "
                "are the layers in order?"
            )


def as_numpy(value: Any) -> NDArray[Any]:
    """Copy a tensor or array to NumPy without touching a bit, bfloat16 included."""
    if hasattr(value, "detach"):
        tensor = value.detach().cpu().contiguous()
        if str(tensor.dtype) == "torch.bfloat16":
            import ml_dtypes
            import torch

            return np.array(tensor.view(torch.int16).numpy()).view(ml_dtypes.bfloat16)
        return np.array(tensor.numpy())
    return np.array(value)


def as_tensors(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Copy NumPy arrays to tensors without touching a bit: a state dict."""
    import torch

    return {
        name: torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        if array.dtype.name == "bfloat16"
        else torch.from_numpy(array.copy())
        for name, array in arrays.items()
    }


def read(path: Path) -> Arrays:
    """Read a safetensors file, on NumPy's side of both frameworks.

    Raises:
        ConversionError: If it is another kind of file, with the line that saves it as this one.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except FileNotFoundError:
        raise ConversionError(f"{path}: no such file.") from None
    except (SafetensorError, IsADirectoryError) as cause:
        raise ConversionError(
            f"{path}: not a safetensors file ({cause}). A file of torch.save can run code when it "
            "is read, so it is not read here. Where it was made, save it again with "
            "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')."
        ) from None


def _layer_from_torch(arrays: Arrays, name: str) -> dict[str, NDArray[Any]]:
    layer = {
        ours: arrays[f"{name}.{leaf}"]
        for leaf, ours in LEAVES.items()
        if f"{name}.{leaf}" in arrays
    }
    if "bias" not in layer:
        raise ConversionError(f"layer {name!r} has no bias; add one of zeros before converting.")
    if "kernel" in layer:
        if layer["kernel"].ndim < 2:
            raise ConversionError(
                f"{name}.weight has shape {layer['kernel'].shape}: not an affine or convolution."
            )
        layer["kernel"] = kernel_from_torch(layer["kernel"])
    return layer


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in name.split(".")]
