"""Training steps of PyTorch on parity's reference model, and the recipes of a tutorial.

The exact ones are as people write them, and the two-layer closed form beside them. The recipes
stand as published: they are timed for what they cost, and do not compute ‖J‖²_F.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parity.convert import as_tensors, params_from_torch, params_to_torch
from parity.reference import (
    CAE,
    ConvCAE,
    DenseCAE,
    norms_by_code_unit,
    norms_by_jacobian,
    weight_of,
)

Norms = Callable[[CAE, Tensor], tuple[Tensor, Tensor]]
"""`(model, xs) -> (codes, norms)`."""

FINITE_STEP = 1e-6


def use_threads() -> int:
    """Give PyTorch as many threads as JAX takes: all cores that the process may use."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(threads or 1)
    return threads or 1


def network(sizes: Sequence[int], activation: str, params: Any) -> DenseCAE:
    """Make parity's reference model with the weights of jaxcae's."""
    model = DenseCAE(sizes, activation)
    model.load_state_dict(as_tensors(params_to_torch(params)))
    return model


def convolutional_network(
    image: tuple[int, int, int], maps: Sequence[int], latent: int, activation: str, params: Any
) -> ConvCAE:
    """Make parity's convolutional model with the weights of jaxcae's."""
    model = ConvCAE(image, maps, latent, activation)
    model.load_state_dict(as_tensors(params_to_torch(params)))
    return model


def by_jacrev(model: CAE, xs: Tensor) -> tuple[Tensor, Tensor]:
    """Take the explicit Jacobian, row by row: `vmap(jacrev)`."""
    return model.encode(xs), norms_by_jacobian(model.encode, xs)


def by_jacfwd(model: CAE, xs: Tensor) -> tuple[Tensor, Tensor]:
    """Take the explicit Jacobian, column by column: `vmap(jacfwd)`."""

    def one(x: Tensor) -> Tensor:
        return torch.func.jacfwd(lambda x: model.encode(x[None])[0])(x).square().sum()

    return model.encode(xs), torch.func.vmap(one)(xs)


def by_code_unit(model: CAE, xs: Tensor) -> tuple[Tensor, Tensor]:
    """Take one `autograd.grad` for each code unit, with a graph through it."""
    return model.encode(xs), norms_by_code_unit(model.encode, xs)


def by_closed_form(model: CAE, xs: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mᵀ(W₁W₁ᵀ ∘ W₂ᵀW₂)m for softplus units, whose slopes m are sigmoids."""
    first, second = model.encoder
    before = first(xs)
    slopes = torch.sigmoid(before)
    w1, w2 = weight_of(first), weight_of(second)
    norms = ((slopes @ ((w1 @ w1.T) * (w2.T @ w2))) * slopes).sum(1)
    return second(model.hidden(before)), norms


def by_projection(model: CAE, xs: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate by one random projection, ‖Jᵀv‖² with v of entries ±1."""
    inputs = xs.detach().requires_grad_()
    codes = model.encode(inputs)
    probe = torch.randint(0, 2, codes.shape).to(codes.dtype) * 2 - 1
    (pulled,) = torch.autograd.grad(codes, inputs, probe, create_graph=True)
    return codes, pulled.square().sum(1)


def by_tutorial_differences(model: CAE, xs: Tensor) -> tuple[Tensor, Tensor]:
    """Difference one feature at a time, forwards, by 1e-6, and square the norm over the batch."""
    codes = model.encode(xs)
    columns = []
    for j in range(xs.shape[1]):
        moved = xs.clone()
        moved[:, j] += FINITE_STEP
        columns.append((model.encode(moved) - codes) / FINITE_STEP)
    return codes, torch.norm(torch.stack(columns, -1)) ** 2


def by_tutorial_jacobian(model: CAE, xs: Tensor) -> tuple[Tensor, Tensor]:
    """Take `autograd.functional.jacobian` of the whole batch, (B, k, B, d), without a graph."""
    jacobian: Any = torch.autograd.functional.jacobian(model.encode, xs)
    return model.encode(xs), torch.norm(jacobian)


def by_functional_jacobian(model: CAE, xs: Tensor) -> tuple[Tensor, Tensor]:
    """Mend that recipe so that it trains: with a graph, and squares summed for each sample."""
    jacobian: Any = torch.autograd.functional.jacobian(model.encode, xs, create_graph=True)
    return model.encode(xs), jacobian.square().sum((1, 2, 3))


def step(model: CAE, xs: Tensor, contraction: float, norms: Norms | None) -> Callable[[], Any]:
    """Make loss, mean norm and gradients of one step; the gradients land in the parameters."""

    def loss_and_mean() -> tuple[Tensor, Tensor]:
        codes, penalties = norms(model, xs) if norms else (model.encode(xs), xs.new_zeros(1))
        errors = (xs - model.decode(codes)).square().flatten(1).sum(1)
        mean = penalties.mean()
        return errors.mean() + contraction * mean, mean

    return _step_of(model, loss_and_mean)


def compiled_step(model: CAE, xs: Tensor, contraction: float, norms: Norms) -> Callable[[], Any]:
    """Make the step with its loss through `torch.compile`; the first call compiles.

    Raises:
        RuntimeError: On the first call, if this machine cannot compile.
    """
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # no pool of workers left behind while others run

    def loss_and_mean(xs: Tensor) -> tuple[Tensor, Tensor]:
        codes, penalties = norms(model, xs)
        errors = (xs - model.decode(codes)).square().flatten(1).sum(1)
        mean = penalties.mean()
        return errors.mean() + contraction * mean, mean

    return _step_of(model, partial(torch.compile(loss_and_mean), xs))


def _step_of(model: CAE, loss_and_mean: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[], Any]:
    def run() -> tuple[Tensor, Tensor]:
        model.zero_grad(set_to_none=True)
        loss, mean = loss_and_mean()
        loss.backward()
        return loss.detach(), mean.detach()

    return run


def gradients(model: CAE) -> Any:
    """Read the gradients in the form of jaxcae's params, zero where there is none."""
    found: dict[str, NDArray[Any] | Tensor] = {
        name: np.zeros(tuple(p.shape), np.float32) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }
    return params_from_torch(found)
