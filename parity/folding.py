"""Eval-mode BatchNorm folded into the layer beside it: exact, and the network computes the same.

A BatchNorm that is evaluated is y = s·x + t for every feature, with s = γ / √(var + eps) and
t = β − s·mean. Behind a layer, s(Wx + b) + t = (sW)x + (sb + t); in front of one,
W(sx + t) + b = (Ws)x + (Wt + b). The numbers are computed in float64 and rounded once, to the
dtype of the layer.

Reference:
    Ioffe, Szegedy, "Batch Normalization", ICML 2015, arXiv:1502.03167, algorithm 2.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from parity.layers import Array, ConversionError, Layer

BatchNorm = Literal["before", "after"] | None
"""Where every BatchNorm stands to the activation; None where a state dict itself can tell."""


class Placed(NamedTuple):
    """A layer and the BatchNorms folded into it.

    Attributes:
        layer: The layer as it was read.
        before: BatchNorms of what it takes: they stand in front of it.
        after: BatchNorms of what it makes: they stand behind it, before the activation.
    """

    layer: Layer
    before: tuple[Layer, ...] = ()
    after: tuple[Layer, ...] = ()

    @property
    def norms(self) -> tuple[Layer, ...]:
        """All that is folded into it."""
        return self.before + self.after


def place(layers: Sequence[Layer], batch_norm: BatchNorm = None) -> list[Placed]:
    """Decide into which layer each BatchNorm of a half goes.

    In an `nn.Sequential` the numbers tell: an activation between two layers leaves a number out.
    A BatchNorm goes into the one layer that stands directly beside it.

    Raises:
        ConversionError: If the names do not tell and `batch_norm` does not either, or if there is
            no layer on the side where it could go.
    """
    placed = {layer.name: Placed(layer) for layer in layers if layer.kind != "BatchNorm"}
    for i, norm in enumerate(layers):
        if norm.kind != "BatchNorm":
            continue
        behind = layers[i - 1] if i > 0 else None  # what it may stand behind
        front = layers[i + 1] if i + 1 < len(layers) else None
        into = _choose(norm, behind, front, batch_norm)
        if into.kind == "BatchNorm":
            raise ConversionError(f"{norm.name} and {into.name} are two BatchNorms in a row.")
        home = placed[into.name]
        if into is behind:
            home = home._replace(after=(*home.after, norm))
        else:
            home = home._replace(before=(*home.before, norm))
        placed[into.name] = home
    return list(placed.values())


def _choose(norm: Layer, behind: Layer | None, front: Layer | None, batch_norm: BatchNorm) -> Layer:
    if batch_norm is None:
        near = [layer for layer in (behind, front) if layer and _adjacent(layer.name, norm.name)]
        if len(near) == 1 or any(layer.kind == "BatchNorm" for layer in near):
            return next((layer for layer in near if layer.kind == "BatchNorm"), near[0])
        raise ConversionError(
            f"{norm.name} is a BatchNorm, and whether an activation stands between it and "
            f"{' or '.join(layer.name for layer in (behind, front) if layer)} cannot be told from "
            "their names: say whether BatchNorm comes before or after the activation.",
            "batch_norm",
        )
    chosen = behind or front if batch_norm == "before" else front
    if chosen is None:
        raise ConversionError(
            f"{norm.name} is a BatchNorm after the last activation of the {norm.half}: there is no "
            "layer behind it into which it could be folded."
        )
    return chosen


def _adjacent(one: str, two: str) -> bool:
    """Tell whether two names are those of neighbours in one `nn.Sequential`."""
    (parent, _, i), (other, _, j) = one.rpartition("."), two.rpartition(".")
    return parent == other and i.isdecimal() and j.isdecimal() and abs(int(i) - int(j)) == 1


def fold(placed: Placed, eps: float, flattens: bool = False) -> Layer:
    """Make one layer with a weight and a bias of a layer and its BatchNorms.

    Args:
        placed: The layer, and what is folded into it.
        eps: What PyTorch adds to every variance; a state dict does not hold it.
        flattens: Whether this is the linear layer of a half of convolutions, so that one feature
            of a BatchNorm on the other side of the flattening is many of its own.

    Raises:
        ConversionError: If no layer of that kind can compute the same.
    """
    layer = placed.layer
    if not placed.norms:
        return layer
    if layer.kind == "bias":
        raise ConversionError(
            f"{placed.norms[0].name} is a BatchNorm beside {layer.name}, whose weight is the "
            "encoder's: it cannot be folded into one and leave the other as it is."
        )
    dtype = layer.arrays["weight"].dtype
    weight = layer.arrays["weight"].astype(np.float64)
    made, taken = (1, 0) if layer.transposed else (0, 1)
    bias = layer.arrays.get("bias", np.zeros(layer.widths[1])).astype(np.float64)
    for norm in placed.before:
        spread = flattens and layer.half == "encoder"
        scale, shift = _affine(norm, eps, weight.shape[taken], spread)
        if layer.kind != "Linear" and weight[0, 0].size > 1 and shift.any():
            raise ConversionError(
                f"{norm.name} is a BatchNorm in front of {layer.name}, a {layer.what} that pads "
                "with zeros: at the edges no bias can replace its shift."
            )
        # A kernel of one pixel, or any kernel where nothing is shifted: its sum does either way.
        sums = weight.sum(tuple(range(2, weight.ndim)))
        bias = bias + (shift @ sums if layer.transposed else sums @ shift)
        weight = weight * _along(scale, taken, weight.ndim)
    for norm in placed.after:
        spread = flattens and layer.half == "decoder"
        scale, shift = _affine(norm, eps, weight.shape[made], spread)
        weight = weight * _along(scale, made, weight.ndim)
        bias = scale * bias + shift
    with np.errstate(over="ignore"):
        arrays = {"weight": weight.astype(dtype), "bias": bias.astype(dtype)}
    for name, wide in (("weight", weight), ("bias", bias)):
        if not np.isfinite(arrays[name].astype(np.float64)).all() and np.isfinite(wide).all():
            raise ConversionError(
                f"{layer.name}.{name} exceeds {dtype} with {placed.norms[0].name} folded into it: "
                "convert the weights to float32 first."
            )
    return layer._replace(arrays=arrays)


def _along(values: Array, axis: int, ndim: int) -> Array:
    return values.reshape([-1 if i == axis else 1 for i in range(ndim)])


def _affine(norm: Layer, eps: float, features: int, spread: bool) -> tuple[Array, Array]:
    """Compute s and t of a BatchNorm, once for every position where its map is flattened."""
    wide = {name: array.astype(np.float64) for name, array in norm.arrays.items()}
    mean, variance = wide["running_mean"], wide["running_var"]
    shapes = {array.shape for name, array in wide.items() if name != "num_batches_tracked"}
    fits = mean.ndim == 1 and (features % len(mean) == 0 if spread else features == len(mean))
    if len(shapes) != 1 or not fits:
        raise ConversionError(
            f"{norm.name} is a BatchNorm of {mean.size} features beside a layer of {features}."
        )
    if not (variance >= 0).all():
        raise ConversionError(f"{norm.name}.running_var has values that are no variances.")
    scale = wide.get("weight", 1.0) / np.sqrt(variance + eps)
    shift = wide.get("bias", 0.0) - scale * mean
    positions = features // len(mean)  # (feature, row, column) order, as PyTorch flattens
    return np.repeat(scale, positions), np.repeat(shift, positions)
