"""Common ground of the exhibits: the tutorials' model on real digits, the truth, two measures.

The model is 784-256-64 with PyTorch's default initial weights, ReLU and a sigmoid output; the
objective is the mean squared error plus 0.001 times the penalty of a batch of 128, under Adam at
1e-3. Penalties of a batch are sums over its samples here, as in those recipes.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parity.materials import digits
from parity.reference import ACTIVATIONS, DenseCAE, bias_of, norms_by_code_unit, weight_of

SIZES = (784, 256, 64)
LAMBDA, RATE, BATCH = 0.001, 1e-3, 128
HELD_OUT = 512

Recipe = Callable[[DenseCAE, Tensor], Tensor]
"""`(model, batch) -> penalty`, one number for the whole batch."""


class Against(NamedTuple):
    """A recipe against the truth at one set of weights."""

    ratio: float
    cosine: float


def tutorial_model(
    activation: str = "relu", sizes: tuple[int, ...] = SIZES, latent_activation: str = "identity"
) -> DenseCAE:
    """Make the model with PyTorch's default initial weights from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DenseCAE(sizes, activation, latent_activation=latent_activation, output="sigmoid")


def batch(size: int = BATCH) -> Tensor:
    """Take real digits in [0, 1], the first of the training order."""
    return torch.from_numpy(digits()[:size].astype("float32"))


def held_out() -> Tensor:
    """Take the digits on which the true norms are followed; no batch of training has them."""
    return torch.from_numpy(digits()[-HELD_OUT:].astype("float32"))


def batches(steps: int, size: int = BATCH) -> Iterator[Tensor]:
    """Draw batches without end of the digits that are not held out, in a fixed order."""
    pool = torch.from_numpy(digits()[:-HELD_OUT].astype("float32"))
    order = torch.Generator().manual_seed(1)
    rows: Tensor = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(rows) < size:
            rows = torch.randperm(len(pool), generator=order)
        yield pool[rows[:size]]
        rows = rows[size:]


def unit_derivatives(model: DenseCAE, xs: Tensor, order: int) -> Tensor:
    """Compute s⁽ⁿ⁾(a) of the units of the first hidden layer, (batch, h)."""
    first = model.encoder[0]
    a = F.linear(xs, weight_of(first), bias_of(first))
    if not a.requires_grad:
        a.requires_grad_()
    found = model.hidden(a)
    for _ in range(order):
        (found,) = torch.autograd.grad(found.sum(), a, create_graph=True)
    return found


def true_norms(model: DenseCAE, xs: Tensor) -> Tensor:
    """Compute ‖J(x)‖²_F = mᵀ(W₁W₁ᵀ ∘ W₂ᵀW₂)m per sample: two layers, m the hidden slopes.

    A test holds it against the explicit Jacobian; here it keeps the truth cheap enough to train
    with and to follow.
    """
    slopes = unit_derivatives(model, xs, 1)
    rows, columns = (weight_of(layer) for layer in model.encoder)
    return ((slopes @ ((rows @ rows.T) * (columns.T @ columns))) * slopes).sum(1)


def exact(model: DenseCAE, xs: Tensor) -> Tensor:
    """Sum ‖J(x)‖²_F over a batch: what the recipes mean to compute."""
    if len(model.encoder) == 2 and model.latent is ACTIVATIONS["identity"]:
        return true_norms(model, xs).sum()
    return norms_by_code_unit(model.encode, xs).sum()


def against_truth(model: DenseCAE, xs: Tensor, recipe: Recipe, truth: Recipe = exact) -> Against:
    """Divide a recipe's value by the true one, and compare the directions of the gradients."""
    value, true = recipe(model, xs), truth(model, xs)
    one, two = encoder_gradient(model, value), encoder_gradient(model, true)
    cosine = F.cosine_similarity(one, two, dim=0).item() if one.any() else 0.0
    return Against(value.item() / true.item(), cosine)


def encoder_gradient(model: nn.Module, value: Tensor) -> Tensor:
    """Lay the gradient of a value by the encoder's parameters end to end; zeros if it has none."""
    parameters = list(model.get_submodule("encoder").parameters())
    if not value.requires_grad:
        return torch.cat([torch.zeros_like(p).flatten().double() for p in parameters])
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten().double()
            for p, g in zip(parameters, grads, strict=True)
        ]
    )


def train(
    model: DenseCAE,
    penalty: Recipe | None,
    steps: int,
    size: int = BATCH,
    after: Callable[[int, DenseCAE], None] = lambda step, model: None,
    strength: float = LAMBDA,
) -> DenseCAE:
    """Train as the tutorials do: MSE + λ · penalty, Adam; `after` sees the model at each step."""
    update = torch.optim.Adam(model.parameters(), lr=RATE)
    after(0, model)
    for step, xs in enumerate(batches(steps, size), start=1):
        loss = F.mse_loss(model.decode(model.encode(xs)), xs)
        if penalty is not None:
            loss = loss + strength * penalty(model, xs)
        update.zero_grad()
        loss.backward()
        update.step()
        after(step, model)
    return model
