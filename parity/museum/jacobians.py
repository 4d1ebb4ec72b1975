"""Recipes that form the Jacobian, by differences or by autograd."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from parity.museum.exhibit import Exhibit
from parity.museum.ground import (
    Recipe,
    against_truth,
    batch,
    exact,
    train,
    tutorial_model,
)
from parity.reference import DenseCAE, weight_of


def finite_differences(model: DenseCAE, xs: Tensor, step: float = 1e-6) -> Tensor:
    """Shift one input at a time by 1e-6, divide, and square the norm over the batch.

    In float32 the difference of two codes is rounding noise: near 1 the spacing of numbers is
    1.2e-7, so each quotient carries an error of some 0.1, as large as the derivative. Above 32 the
    shift is lost altogether and every quotient is 0.
    """
    codes = model.encode(xs)
    columns = []
    for i in range(xs.shape[1]):
        shifted = xs.clone()
        shifted[:, i] += step
        columns.append((model.encode(shifted) - codes) / step)
    return torch.norm(torch.stack(columns, dim=-1)) ** 2


def finite_differences_that_work(model: DenseCAE, xs: Tensor) -> Tensor:
    """Shift by 1e-2 instead: rounding and curvature are both far below the derivative.

    Still d + 1 encodings of the batch, where the exact penalty needs one.
    """
    return finite_differences(model, xs, step=1e-2)


def jacobian_without_graph(model: DenseCAE, xs: Tensor) -> Tensor:
    """Take `autograd.functional.jacobian` of the batch as it comes: a constant to the optimizer."""
    jacobian = torch.autograd.functional.jacobian(model.encode, xs, vectorize=True)
    return torch.norm(jacobian)


def jacobian_with_graph(model: DenseCAE, xs: Tensor) -> Tensor:
    """Keep the graph, all else being the same."""
    jacobian = torch.autograd.functional.jacobian(
        model.encode, xs, create_graph=True, vectorize=True
    )
    return torch.norm(jacobian)


def jacobian_without_zeros(model: DenseCAE, xs: Tensor) -> Tensor:
    """Drop the zero blocks of (B, k, B, d) by their being zero, and go back to (B, k, d)."""
    jacobian = torch.autograd.functional.jacobian(model.encode, xs, create_graph=True)
    batch, code, _, features = jacobian.shape
    return jacobian[jacobian != 0].view(batch, code, features).square().sum()


def exhibits() -> Iterator[Exhibit]:
    """Measure the recipes of this room."""
    model, xs = tutorial_model(), batch()
    yield _tiny_step(model, xs)
    yield _working_step(model, xs)
    yield _without_graph()
    yield _without_zeros()


def _tiny_step(model: DenseCAE, xs: Tensor) -> Exhibit:
    at_start = against_truth(model, xs, finite_differences)
    contracted = tutorial_model()
    with torch.no_grad():
        for layer in contracted.encoder:
            weight_of(layer).mul_(0.1)
    later = against_truth(contracted, xs, finite_differences)
    bytes_as_they_come = (255 * xs[:4]).round()
    in_pixels = against_truth(model, bytes_as_they_come.clamp(min=32), finite_differences)
    return Exhibit(
        "one finite difference per input, step 1e-6",
        "tutorials, in float32",
        f"rounding noise: {at_start.ratio:.2g} times the truth, {later.ratio:,.0f} times once the "
        f"weights are a tenth; exactly {in_pixels.ratio:.0f} for inputs from 32 up; and d + 1 = "
        "785 encodings of the batch, with λ times the batch size by norm(J)**2",
        at_start.ratio,
        at_start.cosine,
        "differentiate: jaxcae.contractive_penalty(encode)",
        "finite differences, step 1e-6",
        {"contracted": later.ratio, "pixels": in_pixels.ratio, "encodings": 785},
    )


def _working_step(model: DenseCAE, xs: Tensor) -> Exhibit:
    relu = against_truth(model, xs, finite_differences_that_work)
    smooth = against_truth(tutorial_model("softplus"), xs, finite_differences_that_work)
    double = against_truth(model.double(), xs.double(), finite_differences)
    model.float()
    return Exhibit(
        "the same with a step of 1e-2",
        "the repaired tutorial",
        "the value is right; a hidden ReLU that crosses 0 within a step adds 1/step to the "
        "gradient, which so points elsewhere on any one batch, though training averages it out; "
        f"softplus has none of that (cosine {smooth.cosine:.6f}), nor float64 with steps "
        f"of 1e-6 ({double.cosine:.6f}); still 785 encodings",
        relu.ratio,
        relu.cosine,
        "differentiate; to check a value, central differences on a smooth encoder in float64",
        "finite differences, step 1e-2",
        {
            "softplus ratio": smooth.ratio,
            "softplus cosine": smooth.cosine,
            "float64": double.cosine,
        },
    )


def _without_graph() -> Exhibit:
    model, xs = tutorial_model(), batch(4)
    value = jacobian_without_graph(model, xs)
    true = exact(model, xs)
    blocks = torch.autograd.functional.jacobian(model.encode, xs, vectorize=True)
    recipes: dict[str, Recipe] = {"without": jacobian_without_graph, "with": jacobian_with_graph}
    apart = distances_trained(recipes, PROOF_STEPS)
    return Exhibit(
        "autograd.functional.jacobian without create_graph",
        "tutorials",
        f"a constant to the optimizer: after {PROOF_STEPS} steps the parameters differ from those "
        f"of no penalty by {apart['without']:.0f} (with create_graph=True by {apart['with']:.2g}); "
        f"shape {tuple(blocks.shape)} where (4, 64, 784) is meant, and not squared",
        value.item() ** 2 / true.item(),
        0.0,
        "torch.func.vmap(jacrev(encode)), squared and summed, or jaxcae.cae_loss(model)",
        "no penalty",
        {"requires grad": float(value.requires_grad), **apart},
    )


PROOF_STEPS, PROOF_BATCH = 200, 2


def distances_trained(recipes: Mapping[str, Recipe], steps: int) -> dict[str, float]:
    """Train with each recipe and without a penalty; the largest difference of a parameter, by name.

    The batch holds 2 digits: the cost of these recipes grows with the square of the batch.
    """
    plain = train(tutorial_model(), None, steps, PROOF_BATCH)
    found = {}
    for name, recipe in recipes.items():
        other = train(tutorial_model(), recipe, steps, PROOF_BATCH)
        pairs = zip(plain.parameters(), other.parameters(), strict=True)
        found[name] = max((a - b).abs().max().item() for a, b in pairs)
    return found


def _without_zeros() -> Exhibit:
    # One hidden unit, and so one column of code, is dead for the samples of this batch.
    model, xs = tutorial_model(latent_activation="relu"), batch(2)
    try:
        jacobian_without_zeros(model, xs)
        breaks = 0.0
    except RuntimeError:
        breaks = 1.0
    alive = tutorial_model("softplus")
    ratio, cosine = against_truth(alive, xs, jacobian_without_zeros)
    return Exhibit(
        "the zero blocks masked by J[J != 0]",
        "forum answers",
        "right while nothing else is zero; with one dead unit or sample the shape no longer fits "
        f"and it {'raises' if breaks else 'does not raise'}",
        ratio,
        cosine,
        "take the diagonal blocks, or never make the others: torch.func.vmap",
        None,
        {"breaks": breaks},
    )
