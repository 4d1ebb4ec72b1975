"""Run one case on both sides and measure how far they are apart, quantity by quantity."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from numpy.typing import NDArray

import jaxcae
from jaxcae.objective.losses import reconstruction_loss
from jaxcae.penalty import METHODS
from jaxcae.types import Loss
from parity.cases import Case
from parity.convert import as_numpy, params_from_torch
from parity.materials import batch_of, from_torch, jax_model, params_of, to_torch, torch_model
from parity.reference import (
    CAE,
    norms_by_code_unit,
    norms_by_jacobian,
    norms_of_sigmoid_layer,
    reconstruction_errors,
    weight_penalties,
)
from parity.tolerances import error, find

EXACT_METHODS = tuple(m for m in ("auto", "chain", "forward", "reverse") if m in METHODS)


class Outcome(NamedTuple):
    """Everything that a side computes for one case; `gradients` by leaf."""

    codes: NDArray[Any]
    reconstructions: NDArray[Any]
    sample_losses: NDArray[Any]
    norms: NDArray[Any]
    loss: NDArray[Any]
    gradients: dict[str, NDArray[Any]]


NormsOf = Callable[[CAE, torch.Tensor], torch.Tensor]
"""`(model, batch) -> norms`, one exact penalty of the reference."""


class Row(NamedTuple):
    """One measurement: the error of one quantity of one case by one method."""

    case: str
    method: str
    dtype: str
    quantity: str
    leaf: str
    measure: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        """Whether the error is within its bound; NaN is not."""
        return self.error <= self.bound

    @property
    def epsilons(self) -> float:
        """The error in units of the dtype's epsilon."""
        return self.error / float(np.finfo(self.dtype).eps)


class Subject(NamedTuple):
    """What is held against PyTorch: the pieces of jaxcae that one method goes through.

    The mutation test replaces one of them by a broken one and expects the suite to say which.
    """

    model: jaxcae.Autoencoder
    norms: Callable[[Any, Any], Any]
    loss: Loss


def jaxcae_subject(case: Case, method: str) -> Subject:
    """Take the model, the penalty and the loss of a case from jaxcae's public names."""
    model = jax_model(case)
    loss = jaxcae.cae_loss(
        model,
        case.contraction,
        method=method,
        curvature=case.curvature or None,
        reconstruction=case.reconstruction,
        features=case.features,
        l1=case.l1,
        l2=case.l2,
    )
    return Subject(model, jaxcae.contractive_penalty(model.encode, method), loss)


def compare(
    case: Case,
    methods: tuple[str, ...] = EXACT_METHODS,
    subject: Callable[[Case, str], Subject] = jaxcae_subject,
    device: str = "cpu",
) -> Iterator[Row]:
    """Compare every method of one case with PyTorch, and PyTorch's penalties with each other."""
    params, xs = params_of(case), batch_of(case)
    reference = torch_outcome(case, params, xs, device)
    if case.against == "float64":
        wide = jax.tree.map(lambda leaf: leaf.astype("float64"), (params, xs))
        reference = torch_outcome(case, wide[0], wide[1], device)
    for name, outcome in torch_cross_checks(case, params, xs, device):
        # What does not depend on the penalty is the same computation, and says nothing.
        rows = measure(case, name, outcome, reference)
        yield from (row for row in rows if row.quantity not in ("codes", "reconstructions"))
    with jax.enable_x64(case.dtype == "float64"), jax.default_matmul_precision("highest"):
        subjects = {method: subject(case, method) for method in methods}
        for method, outcome in jax_outcomes(case, subjects, params, xs).items():
            yield from measure(case, method, outcome, reference)


def measure(case: Case, method: str, ours: Outcome, theirs: Outcome) -> Iterator[Row]:
    """Measure each quantity of two outcomes against its bound."""
    for field, quantity in QUANTITIES.items():
        one, two = getattr(ours, field), getattr(theirs, field)
        if one is not None:
            yield row_of(case, method, quantity, "", one, two)
    for leaf, gradient in theirs.gradients.items():
        for quantity in ("gradient", "gradient elements"):
            yield row_of(case, method, quantity, leaf, ours.gradients[leaf], gradient)


QUANTITIES = {
    "codes": "codes",
    "reconstructions": "reconstructions",
    "sample_losses": "sample losses",
    "norms": "norms",
    "loss": "loss",
}


def row_of(case: Case, method: str, quantity: str, leaf: str, ours: Any, theirs: Any) -> Row:
    """Measure one quantity against its bound.

    Raises:
        TypeError: If it is of another dtype or shape than the case.
    """
    tolerance = find(quantity, case.name, method)
    bound = tolerance.bound(case.dtype)
    if ours.dtype != case.dtype or ours.shape != theirs.shape:
        raise TypeError(
            f"{case.id}/{method}: {quantity} is {ours.dtype}{ours.shape}, "
            f"expected {case.dtype}{theirs.shape}"
        )
    wide = np.asarray(ours, "float64"), np.asarray(theirs, "float64")
    far = error(tolerance.measure, *wide)
    return Row(case.id, method, case.dtype, quantity, leaf, tolerance.measure, far, bound)


def torch_outcome(
    case: Case,
    params: Any,
    xs: NDArray[Any],
    device: str = "cpu",
    norms_of: NormsOf = lambda model, batch: norms_by_jacobian(model.encode, batch),
) -> Outcome:
    """Compute a case in PyTorch, the norms from the explicit Jacobian unless told otherwise."""
    model = torch_model(case, params, device)
    batch = to_torch(xs, device)
    codes = model.encode(batch)
    x_hats = model.decode(codes)
    norms = norms_of(model, batch)
    errors = reconstruction_errors(case.reconstruction, case.features, batch, x_hats)
    sample_losses = errors + case.contraction * norms
    loss = sample_losses.mean() + weight_penalties(model, case.l1, case.l2)
    loss.backward()
    grads = {name: leaf.grad for name, leaf in model.named_parameters()}
    return Outcome(
        codes=as_numpy(codes),
        reconstructions=from_torch(x_hats),
        sample_losses=as_numpy(sample_losses),
        norms=as_numpy(norms),
        loss=as_numpy(loss),
        gradients=flatten(params_from_torch(grads)),
    )


def torch_cross_checks(
    case: Case, params: Any, xs: NDArray[Any], device: str
) -> Iterator[tuple[str, Outcome]]:
    """Compute a case in PyTorch again by its other exact penalties."""
    others: dict[str, NormsOf] = {
        "torch, by code unit": lambda model, batch: norms_by_code_unit(model.encode, batch)
    }
    if len(case.sizes) == 2 and case.latent_activation == "sigmoid":
        others["torch, closed form"] = lambda model, batch: norms_of_sigmoid_layer(
            model.encoder[0], batch
        )
    for name, norms_of in others.items():
        yield name, torch_outcome(case, params, xs, device, norms_of)


def jax_outcomes(
    case: Case, subjects: Mapping[str, Subject], params: Any, xs: NDArray[Any]
) -> dict[str, Outcome]:
    """Compute a case in JAX by every method under one `jit`, as a training step would.

    One program for all of them compiles in little more than half the time of one for each.
    """
    reconstruction = reconstruction_loss(case.reconstruction, case.features)

    def everything(subject: Subject, params: Any, xs: Any) -> Any:
        codes = jax.vmap(subject.model.encode, (None, 0))(params, xs)
        x_hats = jax.vmap(subject.model.decode, (None, 0))(params, codes)
        norms = subject.norms(params, xs)
        sample_losses = jax.vmap(reconstruction)(xs, x_hats) + case.contraction * norms
        (loss, _), grads = jax.value_and_grad(subject.loss, has_aux=True)(params, xs)
        return codes, x_hats, sample_losses, norms, loss, grads

    @jax.jit
    def by_method(params: Any, xs: Any) -> Any:
        return {name: everything(subject, params, xs) for name, subject in subjects.items()}

    found = jax.tree.map(np.asarray, by_method(jax.tree.map(jnp.asarray, params), jnp.asarray(xs)))
    return {name: Outcome._make((*found[name][:-1], flatten(found[name][-1]))) for name in subjects}


def flatten(tree: Any, prefix: str = "") -> dict[str, NDArray[Any]]:
    """Name every leaf of nested dicts by its path."""
    if not isinstance(tree, dict):
        return {prefix: np.asarray(tree)}
    flat: dict[str, NDArray[Any]] = {}
    for name in sorted(tree):
        flat |= flatten(tree[name], f"{prefix}/{name}" if prefix else name)
    return flat
