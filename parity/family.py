"""Compare the contractive family: which functionals of which models, and how far they are apart."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from parity.cases import DTYPES, Case, Dtype
from parity.compare import Row, flatten, row_of
from parity.convert import as_numpy, params_from_torch
from parity.functionals import FUNCTIONALS, Functional, Ours, Values, draw, drawn_to_torch
from parity.materials import batch_of, jax_model, params_of, to_torch, torch_model
from parity.reference import CAE

CURVED = ("tanh", "sigmoid", "softplus", "gelu", "silu", "elu")
CORE = ("noise-form", "trace", "loss")
OF_IMAGES = ("curvature-metric", "noise-form", "map", "trace")


class Outcome(NamedTuple):
    """The values of a batch, and the gradients of their mean by the leaves of params."""

    values: NDArray[Any]
    gradients: dict[str, NDArray[Any]]


def table() -> Iterator[Case]:
    """List what is compared: curvature of every activation, the others of two each."""
    for case in (*_curvatures(), *_others()):
        for dtype in DTYPES:
            yield replace(case, dtype=dtype)
    yield from _images()


def _curvatures() -> Iterator[Case]:
    """Through one elementwise layer, and through a second one on the code."""
    for i, activation in enumerate(CURVED):
        name, tied = f"family/curvature/{activation}", i % 2 == 1
        core: tuple[Dtype, ...] = DTYPES[:1] if activation == "tanh" else ()
        case = Case(name, (12, 9, 5), activation, tied, batch=4, core=core)
        yield case
        core = DTYPES[:1] if activation == "silu" else ()
        yield replace(case, name=f"{name}/on-the-code", latent_activation=activation, core=core)


def _others() -> Iterator[Case]:
    for i, functional in enumerate(FUNCTIONALS):
        if functional != "curvature":
            activation, tied = CURVED[i % len(CURVED)], i % 2 == 1
            core = (DTYPES[i // 2 % 2],) if functional in CORE else ()
            name = f"family/{functional}/{activation}"
            yield Case(name, (12, 9, 5), activation, tied, batch=4, core=core)
    one = Case("", (12, 5), "sigmoid", True, "sigmoid", batch=4, core=())
    for functional in ("order-3", "noise-form", "trace", "loss"):
        yield replace(one, name=f"family/{functional}/one-layer")


def _images() -> Iterator[Case]:
    """Samples whose features the two sides have in another order."""
    image = Case("", (4,), "softplus", image=(5, 4, 2), maps=(3,), batch=3, core=())
    for i, functional in enumerate(OF_IMAGES):
        yield replace(image, name=f"family/{functional}/conv", dtype=DTYPES[i % 2])


def functional_of(case: Case) -> Functional:
    """Look up what a case of this table compares."""
    return FUNCTIONALS[case.name.split("/")[1]]


def compare(
    case: Case,
    ours: Ours | None = None,
    device: str = "cpu",
) -> Iterator[Row]:
    """Compare a functional by every method with PyTorch, and PyTorch's ways with each other.

    Args:
        case: A case of this table.
        ours: In place of what jaxcae computes; the tests put in what is wrong.
        device: Of PyTorch.
    """
    functional = functional_of(case)
    params, xs = params_of(case), batch_of(case)
    with jax.enable_x64(case.dtype == "float64"), jax.default_matmul_precision("highest"):
        drawn = draw(xs, case.sizes[-1])
        methods = (ours or functional.ours)(jax_model(case), drawn)
        found = jax_outcomes(methods, params, xs)
    model, batch = torch_model(case, params, device), to_torch(xs, device)
    given = drawn_to_torch(drawn, case.shape, device)
    first, *others = (
        (mode, torch_outcome(model, functional.theirs(model, batch, given, mode)))
        for mode in functional.modes
    )
    for mode, outcome in others:
        yield from _rows(case, functional, f"torch, {mode} mode", outcome, first[1])
    for method, outcome in found.items():
        yield from _rows(case, functional, method, outcome, first[1])


def torch_outcome(model: CAE, values: Tensor) -> Outcome:
    """Differentiate the mean of the values; a leaf on which they do not depend has zeros."""
    model.zero_grad()
    values.mean().backward()
    grads = {
        name: leaf.new_zeros(leaf.shape) if leaf.grad is None else leaf.grad
        for name, leaf in model.named_parameters()
    }
    return Outcome(as_numpy(values), flatten(params_from_torch(grads)))


def jax_outcomes(methods: dict[str, Values], params: Any, xs: NDArray[Any]) -> dict[str, Outcome]:
    """Compute values and gradients by every method under one `jit`."""

    def mean(params: Any, xs: Any, values_of: Values) -> Any:
        values = values_of(params, xs)
        return jnp.mean(values), values

    @jax.jit
    def by_method(params: Any, xs: Any) -> Any:
        return {
            name: jax.grad(mean, has_aux=True)(params, xs, values_of)
            for name, values_of in methods.items()
        }

    arrays = jax.tree.map(jnp.asarray, (params, xs))
    found = jax.tree.map(np.asarray, by_method(*arrays))
    return {name: Outcome(values, flatten(grads)) for name, (grads, values) in found.items()}


def _rows(
    case: Case, functional: Functional, method: str, ours: Outcome, theirs: Outcome
) -> Iterator[Row]:
    yield row_of(case, method, functional.quantity, "", ours.values, theirs.values)
    for leaf, gradient in theirs.gradients.items():
        for quantity in ("gradient", "gradient elements"):
            yield row_of(case, method, quantity, leaf, ours.gradients[leaf], gradient)
