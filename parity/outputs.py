"""Whether two networks compute the same: codes and reconstructions of both, in float64.

Equal bytes prove that nothing was lost, and not that anything is in its place. So the PyTorch
network is built again from its own state dict, by PyTorch's own functions, BatchNorm and all; the
jaxcae model takes the converted params; and both see the same random inputs.

A state dict holds neither activations nor strides nor the size of images. What is not given is
made up, alike on both sides, and told.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import jaxcae
from parity.convert import EPS, Network, names_in, params_of_network, read
from parity.folding import Placed
from parity.layers import Array, ConversionError, Layer, as_numpy
from parity.reference import ACTIVATIONS

BATCH, STRIDE, BOUND = 4, 2, 1e-9


class Activations(NamedTuple):
    """Names of the activations; `hidden` None where nobody has said."""

    hidden: str | None = None
    latent: str = "identity"
    output: str = "identity"


UNKNOWN = Activations()


class Model(NamedTuple):
    """The model of jaxcae that takes some params: the function, in words, and its inputs."""

    functions: jaxcae.Autoencoder
    words: str
    shape: tuple[int, ...]


class Compared(NamedTuple):
    """How far apart the outputs are, relative to the largest.

    Attributes:
        exact: All in float64, folding included: rounding in another order.
        stored: With the params as they are stored, rounded to their dtype where folded.
        how: What was made up, in words.
        model: The model that was run, in words.
    """

    exact: float
    stored: float
    how: str
    model: str


class NoModelError(ConversionError):
    """Params that no model of jaxcae takes."""


def compare_outputs(
    weights: Mapping[str, Any],
    params: Any,
    activations: Activations = UNKNOWN,
    **reading: Any,
) -> Compared:
    """Compare codes and reconstructions of a state dict's network and of converted params.

    Args:
        weights: The state dict.
        params: What it was converted to, or came from.
        activations: Those of both networks; tanh stands in for a hidden one that is not given.
        **reading: How the state dict is read; see `parity.convert.read`.

    Raises:
        NoModelError: If no model of jaxcae takes the params, or the outputs are not finite.
        ConversionError: If the two do not compute the same.
    """
    arrays = {name: as_numpy(value) for name, value in weights.items()}
    wide = {n: a if a.dtype.kind == "i" else a.astype(np.float64) for n, a in arrays.items()}
    network = read(wide, **reading)
    model = model_of(params, activations)
    xs = np.random.default_rng(0).uniform(-1, 1, (BATCH, *model.shape))
    eps = reading.get("eps", EPS)
    theirs = _run_torch(network, activations, xs, eps)
    if not all(np.isfinite(values).all() for values in theirs):
        raise NoModelError("they are not finite")
    exact = _apart(_run_jax(model, params_of_network(network), xs), theirs)
    stored = _apart(_run_jax(model, params, xs), theirs)
    folded = any(p.norms or p.layer.normed for half in network.placed.values() for p in half)
    if exact > BOUND or (stored > BOUND and not folded):
        raise ConversionError(
            f"the networks differ: codes or reconstructions are up to {max(exact, stored):.1e} "
            "apart, relative to the largest."
        )
    made_up = [] if activations.hidden else ["tanh for the activation"]
    if len(model.shape) == 3:
        made_up.append(f"stride {STRIDE} on images of {model.shape[0]}×{model.shape[1]}")
    how = f"with {' and '.join(made_up)}, which weights do not tell" if made_up else ""
    return Compared(exact, stored, how, model.words)


def model_of(params: Any, activations: Activations = UNKNOWN) -> Model:
    """Find the model of jaxcae that takes params of this form.

    Raises:
        NoModelError: If there is none, with the reason.
    """
    encoder, decoder = params["encoder"], params["decoder"]
    tied = not any("kernel" in layer for layer in decoder.values())
    options: dict[str, Any] = {"tied": tied} if tied else {}
    if activations.latent != "identity":
        options["latent_activation"] = activations.latent
    if activations.output != "identity":
        options["output"] = activations.output
    hidden = activations.hidden or "tanh"
    kernels = [np.shape(encoder[name]["kernel"]) for name in names_in(encoder, "encoder")]
    if "dense" not in encoder:
        sizes = (kernels[0][0], *(kernel[1] for kernel in kernels))
        shown, shape = f"jaxcae.mlp({sizes}", sizes[:1]
        made = jaxcae.mlp(sizes, hidden, **options)
    else:
        *convolutions, (flat, latent) = kernels
        if len({kernel[:-2] for kernel in convolutions}) > 1 or len(set(convolutions[0][:-2])) > 1:
            raise NoModelError("jaxcae.conv has square kernels of one size")
        if len(convolutions[0]) != 4:
            raise NoModelError("no model of jaxcae has Conv1d layers")
        size = convolutions[0][0]
        maps = tuple(kernel[-1] for kernel in convolutions)
        shape = _image(flat // maps[-1], len(maps), size, convolutions[0][2])
        if size != 3:
            options["kernel_size"] = size
        shown = f"jaxcae.conv((height, width, {shape[2]}), {maps}, {latent}"
        made = jaxcae.conv(shape, maps, latent, hidden, stride=STRIDE, **options)
    like = jax.eval_shape(made.init, jax.random.key(0))
    if jax.tree.map(jnp.shape, like) != jax.tree.map(np.shape, params):
        widths = [np.shape(decoder[n]["bias"])[0] for n in names_in(decoder, "decoder")]
        raise NoModelError(
            f"the decoder, of widths {', '.join(map(str, widths))}, does not mirror the encoder"
        )
    if activations.hidden:
        shown += f", {activations.hidden!r}"
    words = "".join(f", {name}={value!r}" for name, value in options.items())
    return Model(made, f"{shown}{words})", shape)


def _image(positions: int, depth: int, size: int, channels: int) -> tuple[int, int, int]:
    """Find an image whose last map has that many positions, as square as can be."""
    rows = max(r for r in range(1, int(positions**0.5) + 1) if positions % r == 0)
    padding = (size - 1) // 2
    sides = [rows, positions // rows]
    for _ in range(depth):
        sides = [(n - 1) * STRIDE + size - 2 * padding for n in sides]
    return (sides[0], sides[1], channels)


def _run_jax(model: Model, params: Any, xs: Array) -> tuple[Array, Array]:
    @jax.jit
    def run(params: Any, xs: Any) -> Any:
        codes = jax.vmap(model.functions.encode, (None, 0))(params, xs)
        return codes, jax.vmap(model.functions.decode, (None, 0))(params, codes)

    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), params)
        codes, x_hats = run(wide, xs)
        return np.asarray(codes), np.asarray(x_hats)


def _run_torch(
    network: Network, activations: Activations, xs: Array, eps: float
) -> tuple[Array, Array]:
    hidden, latent, output = (ACTIVATIONS[name or "tanh"] for name in activations)
    encoder, decoder = network.placed["encoder"], network.placed["decoder"]
    x = torch.from_numpy(np.array(np.moveaxis(xs, -1, 1), order="C"))
    sides = [np.array(x.shape[2:])]
    with torch.no_grad():
        for i, placed in enumerate(encoder):
            x = _apply(placed, x, eps)
            sides.append(np.array(x.shape[2:]))
            x = hidden(x) if i < len(encoder) - 1 else latent(x)
        codes = x
        for i, placed in enumerate(decoder):
            mirrored = encoder[-1 - i].layer if placed.layer.kind == "bias" else None
            x = _apply(placed, x, eps, mirrored, sides[len(decoder) - 1 - i])
            x = hidden(x) if i < len(decoder) - 1 else output(x)
    return codes.numpy(), np.moveaxis(x.numpy(), 1, -1)


def _apply(
    placed: Placed,
    x: Tensor,
    eps: float,
    mirrored: Layer | None = None,
    sides: Array | None = None,
) -> Tensor:
    """Run one layer and its BatchNorms by PyTorch; a decoder's ends in maps of the given sides."""
    layer = placed.layer
    arrays = {name: torch.from_numpy(array) for name, array in layer.arrays.items()}
    weight = arrays.get("weight")
    if mirrored is not None:
        weight = torch.from_numpy(mirrored.arrays["weight"])
        weight = weight.T if weight.ndim == 2 else weight
    assert weight is not None
    for norm in placed.before:
        x = _norm(norm, x, eps)
    bias = arrays.get("bias")
    if weight.ndim == 2:
        x = F.linear(x.flatten(1), weight, bias)
        if sides is not None and sides.size:
            x = x.unflatten(1, (-1, *(int(n) for n in sides)))
    elif layer.half == "encoder":
        x = F.conv2d(x, weight, bias, STRIDE, (weight.shape[-1] - 1) // 2)
    else:
        size = weight.shape[-1]
        padding = (size - 1) // 2
        extra = [int((n + 2 * padding - size) % STRIDE) for n in (() if sides is None else sides)]
        x = F.conv_transpose2d(x, weight, bias, STRIDE, padding, output_padding=extra)
    for norm in placed.after:
        x = _norm(norm, x, eps)
    return x


def _norm(norm: Layer, x: Tensor, eps: float) -> Tensor:
    """Evaluate a BatchNorm of a map, or of the vector that a map was flattened to."""
    arrays = {name: torch.from_numpy(array) for name, array in norm.arrays.items()}
    mean, variance = arrays["running_mean"], arrays["running_var"]
    scale, shift = arrays.get("weight"), arrays.get("bias")
    flat = x if len(mean) == x.shape[1] else x.flatten(1)
    return F.batch_norm(flat, mean, variance, scale, shift, eps=eps).reshape(x.shape)


def _apart(ours: tuple[Array, Array], theirs: tuple[Array, Array]) -> float:
    """Measure the largest difference of codes or reconstructions, relative to the largest."""
    return max(
        float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), np.finfo(float).tiny))
        for a, b in zip(ours, theirs, strict=True)
    )
