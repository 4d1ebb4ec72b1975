"""Recipes that use a closed form or a short cut: of another activation, layer or sum."""

from collections.abc import Iterator

import torch
from torch import Tensor

from parity.museum.exhibit import Exhibit
from parity.museum.ground import against_truth, batch, exact, tutorial_model
from parity.reference import DenseCAE, bias_of, weight_of


def l1_of_weights(model: DenseCAE, xs: Tensor) -> Tensor:
    """Sum |W| over the encoder: says nothing about the slopes, so nothing about the Jacobian."""
    return torch.stack([weight_of(layer).abs().sum() for layer in model.encoder]).sum()


def gradient_of_summed_outputs(model: DenseCAE, xs: Tensor) -> Tensor:
    """Square the gradient of Σ_i h_i(x): ‖Jᵀ1‖², where positive and negative rows cancel."""
    xs = xs.detach().requires_grad_()
    (summed,) = torch.autograd.grad(model.encode(xs).sum(), xs, create_graph=True)
    return summed.square().sum()


def detached_weights(model: DenseCAE, xs: Tensor) -> Tensor:
    """Use the right formula of one sigmoid layer on `W.data`: slopes learn, weights do not.

    Also what `state_dict()`, `.detach()` and a copy taken when the loss was built give.
    """
    h = model.encode(xs)
    return ((h * (1 - h)).square() @ weight_of(model.encoder[-1]).data.square().sum(1)).sum()


def detached_weights_of_two_layers(model: DenseCAE, xs: Tensor) -> Tensor:
    """Do the same with two layers: mᵀ(W₁W₁ᵀ ∘ W₂ᵀW₂)m on `W.data`, m the hidden slopes."""
    first, second = model.encoder
    a = first(xs)
    (slopes,) = torch.autograd.grad(model.hidden(a).sum(), a, create_graph=True)
    rows, columns = weight_of(first).data, weight_of(second).data
    return ((slopes @ ((rows @ rows.T) * (columns.T @ columns))) * slopes).sum()


def sigmoid_formula(model: DenseCAE, xs: Tensor) -> Tensor:
    """Use Σ_i (h_i(1 − h_i))² ‖w_i‖² on the code and the last weights, whatever came before."""
    h = model.encode(xs)
    return ((h * (1 - h)).square() @ weight_of(model.encoder[-1]).square().sum(1)).sum()


def first_layer_only(model: DenseCAE, xs: Tensor) -> Tensor:
    """Use the one-layer formula on the first of several layers: ∂h/∂x, not ∂z/∂x."""
    h = model.hidden(model.encoder[0](xs))
    return ((h * (1 - h)).square() @ weight_of(model.encoder[0]).square().sum(1)).sum()


def sum_then_square(model: DenseCAE, xs: Tensor) -> Tensor:
    """Square the sum of a unit's weights, (Σ_j w_ij)², where Σ_j w_ij² is meant."""
    h = model.encode(xs)
    return ((h * (1 - h)).square() @ weight_of(model.encoder[-1]).sum(1).square()).sum()


def one_layer(activation: str = "sigmoid") -> DenseCAE:
    """Make the one-layer encoder 784-64 that these formulas are written for."""
    return tutorial_model(activation, (784, 64), latent_activation=activation)


def exhibits() -> Iterator[Exhibit]:
    """Measure the recipes of this room."""
    yield _l1()
    yield _summed()
    yield _detached()
    yield _other_activation()
    yield _one_of_two_layers()
    yield _swapped()


def saturate(
    steps: tuple[float, ...] = (0.0, 2.5, 5.0, 7.5, 10.0),
) -> list[tuple[float, float, float]]:
    """Move the bias of a sigmoid layer with its weights fixed: (bias, L1, mean true norm)."""
    model, xs = one_layer(), batch().double()
    model.double()
    rows = []
    for bias in steps:
        with torch.no_grad():
            bias_of(model.encoder[0]).fill_(bias)
        l1 = l1_of_weights(model, xs).item()
        rows.append((bias, l1, exact(model, xs).item() / len(xs)))
    return rows


def _l1() -> Exhibit:
    ratio, cosine = against_truth(tutorial_model(), batch(), l1_of_weights)
    (_, before, high), *_, (_, after, low) = saturate()
    return Exhibit(
        "L1 norm of the encoder's weights",
        "tutorials, as the cheap contraction",
        f"blind to saturation: as the bias of a sigmoid layer goes 0 → 10, L1 stays {before:.0f} "
        f"while ‖J‖² falls from {high:.2g} to {low:.1g}; λ is on another scale",
        ratio,
        cosine,
        "a useful regulariser under its own name: jaxcae.cae_loss(model, l1=...)",
        "L1 of the weights",
        {"l1 before": before, "l1 after": after, "norm before": high, "norm after": low},
    )


def _summed() -> Exhibit:
    ratio, cosine = against_truth(tutorial_model(), batch(), gradient_of_summed_outputs)
    opposite = DenseCAE((4, 2), "identity")
    with torch.no_grad():
        weight_of(opposite.encoder[0]).copy_(torch.tensor([[1.0] * 4, [-1.0] * 4]))
    xs = torch.ones(1, 4)
    zero = gradient_of_summed_outputs(opposite, xs).item()
    eight = exact(opposite, xs).item()
    return Exhibit(
        "gradient of the summed outputs, ‖Jᵀ1‖²",
        "published packages: the commonest mistake",
        f"the rows of J are added before they are squared and cancel: it can be {zero:.0f} where "
        f"‖J‖² is {eight:.0f}",
        ratio,
        cosine,
        "one row per output, squared, then summed; or random signs on the outputs (hutchinson)",
        "gradient of the summed outputs",
        {"zero": zero, "eight": eight},
    )


def _detached() -> Exhibit:
    ratio, cosine = against_truth(one_layer(), batch(), detached_weights)
    trained = one_layer()
    with torch.no_grad():
        bias_of(trained.encoder[0]).fill_(-2.0)
    later = against_truth(trained, batch(), detached_weights)
    relu = against_truth(tutorial_model(), batch(), detached_weights_of_two_layers)
    return Exhibit(
        "detached weights: W.data, state_dict(), a snapshot",
        "ports of the paper's formula",
        "the value is right and the gradient is that of the slopes alone (cosine "
        f"{later.cosine:.2f} once the biases are −2); with ReLU, whose slopes are constant, it "
        f"has none at all ({relu.cosine:.0f})",
        ratio,
        cosine,
        "use the layer's own weight, and check one gradient by finite differences",
        None,
        {"biased": later.cosine, "relu ratio": relu.ratio, "relu cosine": relu.cosine},
    )


def _other_activation() -> Exhibit:
    relu = against_truth(one_layer("relu"), batch(), sigmoid_formula)
    tanh = against_truth(one_layer("tanh"), batch(), sigmoid_formula)
    return Exhibit(
        "h(1 − h) for an activation that is not the sigmoid",
        "code that changed its activation",
        f"arbitrary: {relu.ratio:.2g} times the truth for ReLU; for tanh {tanh.ratio:.2g} times, "
        f"cosine {tanh.cosine:.2f}",
        relu.ratio,
        relu.cosine,
        "let autodiff take the slope",
        None,
        {"tanh ratio": tanh.ratio, "tanh cosine": tanh.cosine},
    )


def _one_of_two_layers() -> Exhibit:
    model, xs = tutorial_model("sigmoid", latent_activation="sigmoid"), batch()
    last = against_truth(model, xs, sigmoid_formula)
    first = against_truth(model, xs, first_layer_only)
    return Exhibit(
        "the one-layer formula on the last (or first) of two layers",
        "code that grew a layer",
        f"another function's Jacobian: {last.ratio:.0f} (first layer: {first.ratio:.0f}) times off",
        last.ratio,
        last.cosine,
        "the chain needs both layers: mᵀ(W₁W₁ᵀ ∘ W₂ᵀW₂)m",
        None,
        {"first ratio": first.ratio, "first cosine": first.cosine},
    )


def _swapped() -> Exhibit:
    ratio, cosine = against_truth(one_layer(), batch(), sum_then_square)
    weight = weight_of(one_layer().encoder[0]).detach().double()
    units = weight.sum(1).square() / weight.square().sum(1)
    low, high = units.min().item(), units.max().item()
    return Exhibit(
        "sum and square swapped, (Σ w)²",
        "hand-written closed forms",
        f"between {low:.1g} and {high:.2g} times the truth, unit by unit",
        ratio,
        cosine,
        "(w ** 2).sum(), not w.sum() ** 2",
        None,
        {"lowest": low, "highest": high},
    )
