"""Recipes for the rest of the family: curvature of a sum, one noise for all, a point that moves."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from parity.materials import digits
from parity.museum.exhibit import Exhibit
from parity.museum.ground import (
    Recipe,
    against_truth,
    batch,
    encoder_gradient,
    train,
    tutorial_model,
    unit_derivatives,
)
from parity.reference import DenseCAE, weight_of

SIGMA, DRAWS, PLAIN_STEPS = 0.3, 32, 50


def true_curvatures(model: DenseCAE, xs: Tensor) -> Tensor:
    """Compute ‖∇²h(x)‖²_F = s″ᵀ(W₂ᵀW₂ ∘ (W₁W₁ᵀ)²)s″ per sample: two layers, s″ of hidden units."""
    bends = unit_derivatives(model, xs, 2)
    rows, columns = (weight_of(layer) for layer in model.encoder)
    return ((bends @ ((columns.T @ columns) * (rows @ rows.T).square())) * bends).sum(1)


def exact_curvature(model: DenseCAE, xs: Tensor) -> Tensor:
    """Sum ‖∇²h(x)‖²_F over a batch."""
    return true_curvatures(model, xs).sum()


def hessian_of_summed_outputs(model: DenseCAE, xs: Tensor) -> Tensor:
    """Square the Hessian of Σ_i h_i(x), `torch.func.hessian(lambda x: encode(x).sum())`.

    A test holds it against that line; by this closed form 784 inputs can be trained with it.
    """
    rows, columns = (weight_of(layer) for layer in model.encoder)
    bends = unit_derivatives(model, xs, 2) * columns.sum(0)
    return ((bends @ (rows @ rows.T).square()) * bends).sum()


def noise_form(model: DenseCAE, xs: Tensor, noise: Tensor) -> Tensor:
    """Sum ‖J(x + ε) − J(x)‖²_F / σ² over a batch."""
    change = unit_derivatives(model, xs + noise, 1) - unit_derivatives(model, xs, 1)
    rows, columns = (weight_of(layer) for layer in model.encoder)
    return ((change @ ((columns.T @ columns) * (rows @ rows.T))) * change).sum() / SIGMA**2


def with_noise(shared: bool) -> Recipe:
    """Make the noise form that draws an ε for each sample, or one for the whole batch."""
    generator = torch.Generator().manual_seed(2)  # 0 is that of the weights

    def recipe(model: DenseCAE, xs: Tensor) -> Tensor:
        shape = (1 if shared else len(xs), xs.shape[1])
        return noise_form(model, xs, SIGMA * torch.randn(shape, generator=generator))

    return recipe


def along_metric(model: DenseCAE, xs: Tensor, metric: Tensor) -> Tensor:
    """Sum ‖J(x)Fᵀ‖²_F over a batch."""
    slopes = unit_derivatives(model, xs, 1)
    rows, columns = (weight_of(layer) for layer in model.encoder)
    rows = rows @ metric.T
    return ((slopes @ ((columns.T @ columns) * (rows @ rows.T))) * slopes).sum()


def at_the_wrong_point(model: DenseCAE, xs: Tensor, metric: Tensor) -> Tensor:
    """Differentiate u ↦ h(Fᵀu) at u = x: by the chain rule J Fᵀ, but of the point Fᵀx."""
    return along_metric(model, xs @ metric, metric)


def exhibits() -> Iterator[Exhibit]:
    """Measure the recipes of this room."""
    yield _summed()
    yield _one_noise()
    yield _moved_point()


def _summed() -> Exhibit:
    model = tutorial_model("softplus")
    ratio, cosine = against_truth(model, batch(), hessian_of_summed_outputs, exact_curvature)
    opposite = tutorial_model("tanh", (4, 3, 2))
    with torch.no_grad():
        first, second = (weight_of(layer) for layer in opposite.encoder)
        first.fill_(1.0)
        second.copy_(torch.tensor([[1.0] * 3, [-1.0] * 3]))
    xs = torch.full((1, 4), 0.25)
    zero = hessian_of_summed_outputs(opposite, xs).item()
    true = exact_curvature(opposite, xs).item()
    return Exhibit(
        "Hessian of the summed outputs",
        "torch.func.hessian(lambda x: encode(x).sum())",
        "the units' curvatures are added before they are squared and cancel: it can be "
        f"{zero:.0f} where ‖∇²h‖² is {true:.0f}",
        ratio,
        cosine,
        "one Hessian for each output; or jaxcae.contractive_penalty(encode, order=2)",
        "Hessian of the summed outputs",
        {"zero": zero, "true": true},
    )


def _one_noise() -> Exhibit:
    model, xs = tutorial_model("softplus"), batch()
    truth = exact_curvature(model, xs)
    gradient = encoder_gradient(model, truth)

    def draws(shared: bool) -> tuple[Tensor, float]:
        recipe = with_noise(shared)
        values = [recipe(model, xs) for _ in range(DRAWS)]
        cosines = [
            F.cosine_similarity(encoder_gradient(model, value), gradient, dim=0) for value in values
        ]
        return torch.stack(values).detach() / truth.detach(), torch.stack(cosines).mean().item()

    (own, own_cosine), (one, one_cosine) = draws(shared=False), draws(shared=True)
    return Exhibit(
        "noise form with one ε for the batch",
        "torch.randn_like(x[0]), or a vmap whose key is not mapped",
        "right on average and in no single step: a batch of 128 sees one direction, so that its "
        f"mean scatters by {one.std().item():.0%} in place of {own.std().item():.0%}, and its "
        f"gradient has cosine {one_cosine:.2f} in place of {own_cosine:.2f} with that of ‖∇²h‖²",
        one.mean().item(),
        one_cosine,
        "an ε for each sample, jaxcae.jacobian_difference; or no ε at all: order=2 is exact",
        "noise form, one ε for the batch",
        {
            "own ratio": own.mean().item(),
            "own cosine": own_cosine,
            "own spread": own.std().item(),
            "spread": one.std().item(),
        },
    )


def deviations() -> Tensor:
    """Compute the symmetric root of the digits' covariance: F of the denoising penalty."""
    covariance = torch.cov(torch.from_numpy(digits().T.copy()))
    values, vectors = torch.linalg.eigh(covariance)
    return ((vectors * values.clamp(min=0).sqrt()) @ vectors.T).float()


def _moved_point() -> Exhibit:
    model, xs, metric = tutorial_model("tanh"), batch(), deviations()
    train(model, None, PLAIN_STEPS)
    found = []
    for factor in (1.0, 10.0):
        scaled = factor * metric
        wrong, right = (partial(f, metric=scaled) for f in (at_the_wrong_point, along_metric))
        found.append(against_truth(model, xs, wrong, right))
    return Exhibit(
        "a metric that moves the point",
        "the penalty of u ↦ encode(F @ u), taken at x, to have ‖J Fᵀ‖²",
        "the Jacobian is that of another point, Fᵀx; with F in units a tenth as large, which can "
        f"only multiply the penalty by 100, it is {found[1].ratio:.1g} of the truth with cosine "
        f"{found[1].cosine:.2f} (tanh, F the root of the digits' covariance, after {PLAIN_STEPS} "
        "steps without a penalty)",
        found[0].ratio,
        found[0].cosine,
        "jaxcae.contractive_penalty(encode, input_metric=F): the point stays",
        None,
        {"other units": found[1].ratio, "other units cosine": found[1].cosine},
    )
