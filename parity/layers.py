"""What a state dict holds: layers of known kinds, and how many features each takes and makes."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = dict[str, Array]
Kind = Literal["Linear", "Conv1d", "Conv2d", "BatchNorm", "bias"]
HALVES = ("encoder", "decoder")
DTYPES = ("float64", "float32", "float16", "bfloat16")
_NORM = {"running_mean", "running_var"}
_PARTS = (("weight_g", "weight_v"), tuple(f"parametrizations.weight.original{i}" for i in "01"))


class ConversionError(ValueError):
    """Weights that do not make an autoencoder; the message says which and why.

    Attributes:
        argument: What would help: `names` of the layers, or `batch_norm`; else empty.
    """

    def __init__(self, message: str, argument: str = "") -> None:
        """Say what came and what was expected."""
        super().__init__(message)
        self.argument = argument


class Layer(NamedTuple):
    """One module of a state dict.

    Attributes:
        name: Its whole name there, such as `module.encoder.0`.
        kind: What its arrays show it to be; `bias` is a tied decoder's, which has no weight.
        arrays: `weight` and `bias` as far as it has them; of a BatchNorm the statistics, too.
        half: `encoder` or `decoder`.
        normed: Whether the weight was put together from a weight_norm's direction and length.
    """

    name: str
    kind: Kind
    arrays: Arrays
    half: str
    normed: bool = False

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution: every convolution of a decoder is."""
        return self.half == "decoder" and self.kind.startswith("Conv")

    @property
    def what(self) -> str:
        """Name it as PyTorch does."""
        return self.kind.replace("Conv", "ConvTranspose") if self.transposed else self.kind

    @property
    def widths(self) -> tuple[int, int]:
        """How many features it takes, and how many it makes."""
        out, taken = self.arrays["weight"].shape[:2]
        return (out, taken) if self.transposed else (taken, out)


def fits(one: Layer, two: Layer) -> bool:
    """Tell whether a layer can take what the layer before it makes, flattened maps included."""
    (_, made), (taken, _) = one.widths, two.widths
    if one.half != two.half or (one.kind == "Linear") == (two.kind == "Linear"):
        return made == taken
    if two.kind == "Linear":
        return one.half == "encoder" and taken % made == 0
    return one.half == "decoder" and made % taken == 0


def check_chain(layers: Sequence[Layer]) -> None:
    """Raise ConversionError unless every layer takes what the layer before it makes."""
    for layer in layers:
        if layer.kind in ("BatchNorm", "bias") or "bias" not in layer.arrays:
            continue
        made, shape = layer.widths[1], layer.arrays["bias"].shape
        if shape != (made,):
            conv = layer.transposed and shape == (layer.widths[0],)
            raise ConversionError(
                f"{layer.name} is a {layer.kind} in a decoder: only ConvTranspose is known there."
                if conv
                else f"{layer.name} makes {made} outputs but its bias has shape {shape}."
            )
    for one, two in pairwise(layer for layer in layers if layer.kind not in ("BatchNorm", "bias")):
        if not fits(one, two):
            raise ConversionError(
                f"{one.name} makes {one.widths[1]} outputs but {two.name} takes {two.widths[0]}: "
                "are the layers in order?"
            )


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


def as_arrays(weights: Mapping[str, Any]) -> Arrays:
    if not isinstance(weights, Mapping):
        raise ConversionError(
            f"expected a state dict, got a {type(weights).__name__}; give model.state_dict()."
        )
    arrays = {}
    for name, value in weights.items():
        dtype = str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")
        if dtype not in DTYPES and not name.endswith("num_batches_tracked"):
            raise ConversionError(
                f"{name!r} is {dtype}; expected an array of {', '.join(DTYPES)}. Give the state "
                "dict itself, and of weights that are not quantised."
            )
        arrays[name] = as_numpy(value)
    return arrays


def modules_of(arrays: Arrays) -> dict[str, Arrays]:
    """Group arrays by the module they belong to, in order."""
    modules: dict[str, Arrays] = {}
    for name, array in arrays.items():
        module, dot, rest = name.partition(".parametrizations.")
        module, leaf = (module, dot[1:] + rest) if dot else name.rpartition(".")[::2]
        modules.setdefault(module, {})[leaf] = array
    return modules


def layer_of(name: str, arrays: Arrays, half: str) -> Layer:
    """Tell the kind of a module by the arrays it has."""
    normed = False
    for length, direction in _PARTS:
        if {length, direction} <= set(arrays):
            arrays = dict(arrays)
            arrays["weight"] = _weight_norm(arrays.pop(length), arrays.pop(direction))
            normed = True
    leaves = set(arrays)
    if _NORM <= leaves <= {*_NORM, "num_batches_tracked", "weight", "bias"}:
        return Layer(name, "BatchNorm", arrays, half)
    weight = arrays.get("weight")
    if leaves == {"bias"} and half == "decoder":
        return Layer(name, "bias", arrays, half)
    if weight is None or not leaves <= {"weight", "bias"} or not 2 <= weight.ndim <= 4:
        shown = ", ".join(f"{leaf} {array.shape}" for leaf, array in arrays.items())
        hint = (
            " Take the parametrization away with torch.nn.utils.parametrize.remove_parametrizations"
            " and save again."
            if any(leaf.startswith("parametrizations.") for leaf in leaves)
            else ""
        )
        raise ConversionError(
            f"{name!r} holds {shown}: only Linear, Conv1d, Conv2d, their transposes, weight_norm "
            f"and BatchNorm with running statistics are known here.{hint}"
        )
    kinds: dict[int, Kind] = {2: "Linear", 3: "Conv1d", 4: "Conv2d"}
    return Layer(name, kinds[weight.ndim], arrays, half, normed)


def _weight_norm(length: Array, direction: Array) -> Array:
    """Compute g · v / ‖v‖ as PyTorch does, to the bit; the shape of g tells the axis."""
    import torch

    axes = [axis for axis, size in enumerate(length.shape) if size > 1]
    tensors = as_tensors({"g": length, "v": direction})
    axis = axes[0] if axes else (0 if length.ndim else -1)
    if length.ndim and length.shape != tuple(
        size if i == axis else 1 for i, size in enumerate(direction.shape)
    ):
        raise ConversionError(
            f"a weight_norm of lengths {length.shape} and directions {direction.shape} is not one "
            "length for each slice of an axis."
        )
    return as_numpy(torch._weight_norm(tensors["v"], tensors["g"], axis))


def check_kinds(layers: list[Layer]) -> None:
    """Raise ConversionError unless a half is linear, or convolutions and one linear layer."""
    tied = [layer for layer in layers if layer.kind == "bias"]
    if tied and any(layer.kind not in ("BatchNorm", "bias") for layer in layers):
        raise ConversionError(
            f"{tied[0].name} has a bias and no weight: a decoder is tied to its encoder in every "
            "layer or in none."
        )
    kinds = [layer.kind for layer in layers if layer.kind not in ("BatchNorm", "bias")]
    if layers[0].half == "decoder":
        kinds = kinds[::-1]
    convolutions = [kind for kind in kinds if kind != "Linear"]
    if convolutions and kinds != [convolutions[0]] * (len(kinds) - 1) + ["Linear"]:
        listed = ", ".join(f"{layer.name} ({layer.what})" for layer in layers)
        order = (
            "one Linear and then" if layers[0].half == "decoder" else "and then one Linear after"
        )
        raise ConversionError(
            f"the {layers[0].half} holds {listed}; expected Linear layers alone, or {order} "
            "convolutions of one kind."
        )
