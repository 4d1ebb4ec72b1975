"""The family in PyTorch: every functional of a Jacobian and of higher derivatives, written out.

Whole arrays of derivatives are formed, by `torch.func` and nothing else, and then squared, summed
or traced as the definition says. Each can be formed in two ways that share no step, by reverse mode
first or by forward mode alone, which must agree before anything else is compared with them.

References:
    Rifai et al., "Higher Order Contractive Auto-Encoder", ECML 2011,
    doi:10.1007/978-3-642-23783-6_41, for the noise form. Alain, Bengio, arXiv:1211.4246, for the
    reconstruction map. Hyvärinen, "Estimation of Non-Normalized Statistical Models by Score
    Matching", JMLR 2005, for the divergence.
"""

import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from parity.reference import CAE, Encode

# PyTorch scripts rules for forward mode when it is first used, and warns that scripting is old.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))

Mode = Literal["reverse", "forward"]
"""Whether the first derivative is taken by `jacrev` or `jacfwd`; all further ones by `jacfwd`."""


def derivatives(function: Encode, xs: Tensor, order: int, mode: Mode = "reverse") -> Tensor:
    """Form ∂ⁿf_i/∂x_j…∂x_l of every sample, shape (batch, k, d, …, d), features in a row."""

    def one(x: Tensor) -> Tensor:
        return function(x.reshape(1, *xs.shape[1:])).flatten()

    found: Callable[[Tensor], Tensor] = one
    for n in range(order):
        first = torch.func.jacrev if mode == "reverse" and n == 0 else torch.func.jacfwd
        found = first(found)
    formed: Tensor = torch.func.vmap(found)(xs.flatten(1))
    return formed


def squared(array: Tensor) -> Tensor:
    """Sum the squares of each sample's array."""
    return array.square().flatten(1).sum(1)


def along(array: Tensor, metric: Tensor) -> Tensor:
    """Multiply every index of a direction, all but the first two, by F: J Fᵀ for a Jacobian."""
    factor = torch.diag(metric) if metric.ndim == 1 else metric
    for axis in range(2, array.ndim):
        array = torch.movedim(torch.tensordot(array, factor, ([axis], [1])), -1, axis)
    return array


def difference(function: Encode, xs: Tensor, noise: Tensor, mode: Mode = "reverse") -> Tensor:
    """Compute the mean over ε of ‖J(x + ε) − J(x)‖²_F; noise has shape (samples, batch, …)."""
    here = derivatives(function, xs, 1, mode)
    return torch.stack(
        [squared(derivatives(function, xs + epsilon, 1, mode) - here) for epsilon in noise]
    ).mean(0)


def trace(function: Encode, xs: Tensor, mode: Mode = "reverse") -> Tensor:
    """Compute tr J_f(x)."""
    return derivatives(function, xs, 1, mode).diagonal(dim1=1, dim2=2).sum(1)


def score_matching(function: Encode, xs: Tensor, sigma: float, mode: Mode = "reverse") -> Tensor:
    """Compute ½‖ψ‖² + div ψ of ψ = (r(x) − x)/σ²."""
    psi = (function(xs) - xs) / sigma**2
    return squared(psi) / 2 + (trace(function, xs, mode) - xs[0].numel()) / sigma**2


def reconstruct(model: CAE) -> Encode:
    """Take the reconstruction map r = g ∘ h of a model."""
    return lambda xs: model.decode(model.encode(xs))


def squared_along_probes(encode: Encode, xs: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    """Compute the mean over probes of ‖∂_u ∇(vᵀh)‖², by `jvp` of `grad`.

    Args:
        encode: Any encoder.
        xs: The batch.
        outer: v, shape (batch, probes, k).
        inner: u, shape (batch, probes, d).
    """

    def one(x: Tensor, v: Tensor, u: Tensor) -> Tensor:
        def projected(x: Tensor) -> Tensor:
            return encode(x.reshape(1, *xs.shape[1:])).flatten() @ v

        bend: Tensor = torch.func.jvp(torch.func.grad(projected), (x,), (u,))[1]
        return bend.square().sum()

    over_probes = torch.func.vmap(one, (None, 0, 0))
    found: Tensor = torch.func.vmap(over_probes)(xs.flatten(1), outer, inner)
    return found.mean(1)


def trace_along_probes(function: Encode, xs: Tensor, probes: Tensor) -> Tensor:
    """Compute the mean over probes v of vᵀJv; probes have shape (batch, probes, d)."""

    def one(x: Tensor, v: Tensor) -> Tensor:
        def flat(x: Tensor) -> Tensor:
            return function(x.reshape(1, *xs.shape[1:])).flatten()

        pushed: Tensor = torch.func.jvp(flat, (x,), (v,))[1]
        return pushed @ v

    found: Tensor = torch.func.vmap(torch.func.vmap(one, (None, 0)))(xs.flatten(1), probes)
    return found.mean(1)
