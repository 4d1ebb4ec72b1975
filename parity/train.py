"""Train the same model on the same batches in both frameworks and follow how they drift apart."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
import torch
from numpy.typing import NDArray

import jaxcae
from parity.cases import DTYPES, Case
from parity.compare import Row, flatten, jaxcae_subject
from parity.convert import params_from_torch
from parity.derivatives import derivatives, squared
from parity.materials import digits_of, params_of, to_torch, torch_model
from parity.reference import norms_by_code_unit, reconstruction_errors
from parity.tolerances import error, find

Optimizer = Literal["sgd", "adam", "adam-cosine"]
OPTIMIZERS: tuple[Optimizer, ...] = ("sgd", "adam", "adam-cosine")
STEPS = 30
RATE = 1e-3


# Four of the runs without curvature have each model, dtype and kind of optimizer twice; most others
# are slow tests.
CORE = {
    ("training/softplus-784-256-64", "float32", "adam"),
    ("training/softplus-784-256-64", "float64", "sgd"),
    ("training/sigmoid-784-32/tied", "float64", "adam-cosine"),
    ("training/sigmoid-784-32/tied", "float32", "sgd"),
    ("training/curvature/sigmoid-49-8/tied", "float64", "sgd"),
}


def table() -> Iterator[Case]:
    """List what is trained on real digits: the tutorials' sizes, a tied model, and with curvature.

    (PyTorch forms every second derivative, 49² for each unit of the code in place of 784².)
    """
    deep = Case("training/softplus-784-256-64", (784, 256, 64), "softplus")
    tied = Case("training/sigmoid-784-32/tied", (784, 32), "sigmoid", True, "sigmoid")
    for case in (deep, tied):
        for dtype in DTYPES:
            yield replace(case, dtype=dtype, batch=32, data="digits", reconstruction="bernoulli")
    plain = Case("training/curvature/softplus-49-24-8", (49, 24, 8), "softplus")
    tied = Case("training/curvature/sigmoid-49-8/tied", (49, 8), "sigmoid", True, "sigmoid")
    for case in (plain, tied):
        for dtype in DTYPES:
            case = replace(case, dtype=dtype, batch=32, data="small digits", curvature=0.3)
            yield replace(case, reconstruction="bernoulli")


def optimizers(case: Case) -> tuple[Optimizer, ...]:
    """List what a model is trained by; a schedule of the rate has nothing to do with curvature."""
    return OPTIMIZERS[:2] if case.curvature else OPTIMIZERS


def drift(
    case: Case,
    optimizer: Optimizer,
    method: str = "auto",
    steps: int = STEPS,
    device: str = "cpu",
) -> Iterator[Row]:
    """Measure, after every step, how far the two runs are apart.

    The distance between the parameters is told relative to how far training has moved them, so
    that a run that stands still cannot pass; the losses are compared step by step as well.
    """
    batches = (
        digits_of(case)[: steps * case.batch].astype(case.dtype).reshape(steps, case.batch, -1)
    )
    params = params_of(case)
    theirs = train_torch(case, params, batches, optimizer, device)
    with jax.enable_x64(case.dtype == "float64"), jax.default_matmul_precision("highest"):
        ours = train_jax(case, params, batches, optimizer, method)
    start = as_vector(params)
    kind = optimizer.partition("-")[0]  # a schedule of the rate adds nothing to round
    for i, (one, two) in enumerate(zip(ours, theirs, strict=True), start=1):
        for quantity, a, b in (
            (f"loss under {kind}", one.loss, two.loss),
            (f"drift of {kind}", one.params - start, two.params - start),
        ):
            entry = find(quantity, case.name, method)
            yield Row(
                case.id,
                method,
                case.dtype,
                quantity,
                f"step {i}",
                entry.measure,
                error(entry.measure, a, b),
                entry.bound(case.dtype),
            )


class Step(NamedTuple):
    """The loss that a step began with, and all parameters after it, end to end."""

    loss: NDArray[Any]
    params: NDArray[Any]


def train_jax(
    case: Case, params: Any, batches: NDArray[Any], optimizer: Optimizer, method: str
) -> list[Step]:
    """Train by jaxcae's own step and optax."""
    rate = optax.cosine_decay_schedule(RATE, STEPS) if "cosine" in optimizer else RATE
    update = optax.sgd(rate) if optimizer == "sgd" else optax.adam(rate)
    step = jaxcae.make_train_step(jaxcae_subject(case, method).loss, update)
    params = jax.tree.map(jax.numpy.asarray, params)
    state = jaxcae.TrainState.create(params, update, jax.random.key(0))
    track = []
    for xs in batches:
        state, metrics = step(state, xs)
        track.append(Step(np.asarray(metrics["loss"], "float64"), as_vector(state.params)))
    return track


def train_torch(
    case: Case, params: Any, batches: NDArray[Any], optimizer: Optimizer, device: str = "cpu"
) -> list[Step]:
    """Train the reference by torch's own optimizer."""
    model = torch_model(case, params, device)
    kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam
    update = kind(model.parameters(), lr=RATE)
    share = _cosine if "cosine" in optimizer else lambda step: 1.0
    rate = torch.optim.lr_scheduler.LambdaLR(update, share)
    track = []
    for xs in batches:
        batch = to_torch(xs, device)
        x_hats = model.decode(model.encode(batch))
        errors = reconstruction_errors(case.reconstruction, case.features, batch, x_hats)
        norms = norms_by_code_unit(model.encode, batch)
        loss = (errors + case.contraction * norms).mean()
        if case.curvature:
            bends = squared(derivatives(model.encode, batch, 2))
            loss = loss + case.curvature * bends.mean()
        update.zero_grad()
        loss.backward()
        update.step()
        rate.step()
        after = as_vector(params_from_torch(model.state_dict()))
        track.append(Step(np.asarray(loss.item(), "float64"), after))
    return track


def _cosine(step: int) -> float:
    """Give the share of the rate at a step: (1 + cos(π · step / STEPS)) / 2."""
    return (1 + math.cos(math.pi * step / STEPS)) / 2


def as_vector(params: Any) -> NDArray[Any]:
    """Lay all parameters end to end, in float64."""
    leaves = flatten(params).values()
    return np.concatenate([leaf.astype("float64").ravel() for leaf in leaves])
