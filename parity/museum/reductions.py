"""Recipes that have the right norms and lose them on the way to the loss; and two in JAX."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

import jaxcae
from parity.convert import params_from_torch
from parity.museum.exhibit import Exhibit
from parity.museum.ground import against_truth, batch, true_norms, tutorial_model
from parity.reference import DenseCAE, weight_of


def floored_mean(model: DenseCAE, xs: Tensor) -> Tensor:
    """Divide by the batch size as integers are: the floor of the mean, whose gradient is zero."""
    return len(xs) * torch.div(true_norms(model, xs).sum(), len(xs), rounding_mode="floor")


def halved(model: DenseCAE, xs: Tensor) -> Tensor:
    """Halve the penalty, as a widely used Jacobian regulariser does."""
    return 0.5 * true_norms(model, xs).sum()


def mean_over_code(model: DenseCAE, xs: Tensor) -> Tensor:
    """Average over code units where the definition sums."""
    return true_norms(model, xs).sum() / weight_of(model.encoder[-1]).shape[0]


def exhibits() -> Iterator[Exhibit]:
    """Measure the recipes of this room."""
    model, xs = tutorial_model(), batch()
    ratio, cosine = against_truth(model, xs, floored_mean)
    mean = true_norms(model, xs).mean().item()
    yield Exhibit(
        "integer division by the batch size",
        "penalty.sum() // len(x), or div(rounding_mode='floor')",
        "the mean is floored and the gradient of a floor is zero: "
        f"{mean:.2f} becomes {ratio * mean:.0f}; once ‖J‖² is below 1 the loss shows 0",
        ratio,
        cosine,
        "penalty.mean()",
        None,
    )
    yield _closure()
    ratio, cosine = against_truth(model, xs, halved)
    other, _ = against_truth(model, xs, mean_over_code)
    yield Exhibit(
        "factor ½, or a mean over outputs",
        "a widely used Jacobian regulariser; .mean() over all axes",
        f"the right direction with λ off by {1 / ratio:.0f}, or by the {1 / other:.0f} outputs",
        ratio,
        cosine,
        "jaxcae.convert_lambda",
        None,
        {"outputs": 1 / other},
    )


def _closure() -> Exhibit:
    """A JAX loss that closes over `params` instead of taking them."""
    params = jax.tree.map(jnp.asarray, params_from_torch(tutorial_model().state_dict()))
    model = jaxcae.mlp((784, 256, 64), "relu", output="sigmoid")
    xs = jnp.asarray(batch(16).numpy())
    penalty = jaxcae.contractive_penalty(model.encode)

    def stale(params: Any, xs: Any, closed_over: Any = params) -> Any:
        return jnp.mean(penalty(closed_over, xs))

    value, gradient = jax.jit(jax.value_and_grad(stale))(params, xs)
    moved = jax.tree.map(lambda leaf: 0.5 * leaf, params)
    after = jax.jit(stale)(moved, xs)
    true = jnp.mean(penalty(moved, xs))
    size = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    return Exhibit(
        "a JAX loss that closes over params",
        "notebooks: def loss(x) with params from the cell above",
        f"its gradient is {size:.0f}, and jit bakes the weights in: with the weights halved it "
        f"still says {float(after):.3f}, where the truth is {float(true):.3f}",
        float(after / true),
        0.0,
        "pass params as the first argument: loss(params, xs)",
        None,
        {"gradient": size, "moved": float(after / value)},
    )
