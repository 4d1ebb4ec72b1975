"""What a training step costs on both sides: plain, and with the exact penalty.

The variants take turns and the fastest of many turns counts, so that other work on the machine
weighs on all of them alike. Compilation is told apart. These are the tutorials' sizes; the harness
under `benchmarks/` is the place for anything finer.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import torch
import torch.nn.functional as F

import jaxcae
from parity.convert import params_from_torch
from parity.museum.ground import BATCH, LAMBDA, RATE, Recipe, batch, exact, tutorial_model
from parity.reference import norms_by_code_unit, norms_by_jacobian


class Cost(NamedTuple):
    """One variant: milliseconds of its first step and of its fastest, and that over the plain one.

    The plain step is the one of the same framework.
    """

    name: str
    first: float
    fastest: float
    times_plain: float


def measure(turns: int = 30) -> list[Cost]:
    """Time a step of every variant: value, gradient and Adam, at 784-256-64 and batch 128."""
    variants = {
        "torch, no penalty": _torch_step(None),
        "torch, exact, closed form by hand": _torch_step(exact),
        "torch, exact, one autograd.grad per code unit": _torch_step(
            lambda model, xs: norms_by_code_unit(model.encode, xs).sum()
        ),
        "torch, exact, vmap(jacrev)": _torch_step(
            lambda model, xs: norms_by_jacobian(model.encode, xs).sum()
        ),
        "jaxcae, no penalty": _jax_step(None),
        "jaxcae, exact": _jax_step(LAMBDA * BATCH),
    }
    first = {name: _milliseconds(step) for name, step in variants.items()}
    fastest = dict(first)
    for _ in range(turns):
        for name, step in variants.items():
            fastest[name] = min(fastest[name], _milliseconds(step))
    plain = {name.partition(",")[0]: fastest[name] for name in variants if "no penalty" in name}
    return [
        Cost(name, first[name], fastest[name], fastest[name] / plain[name.partition(",")[0]])
        for name in variants
    ]


def as_markdown(costs: Sequence[Cost], about: Mapping[str, Any]) -> str:
    """Write the table, and the versions that it belongs to."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    where = f"{about['date']}, {about['torch_threads']} threads, {versions}"
    rows = [f"| {c.name} | {c.fastest:.1f} | {c.times_plain:.1f} | {c.first:.0f} |" for c in costs]
    lines = [
        "# What a training step costs on both sides",
        "",
        f"784-256-64, batch {BATCH}; {where}.",
        "",
        "| step | ms | × plain | first step, ms |",
        "| --- | ---: | ---: | ---: |",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def _torch_step(penalty: Recipe | None) -> Callable[[], None]:
    model, xs = tutorial_model(), batch()
    update = torch.optim.Adam(model.parameters(), lr=RATE)

    def step() -> None:
        loss = F.mse_loss(model.decode(model.encode(xs)), xs)
        if penalty is not None:
            loss = loss + LAMBDA * penalty(model, xs)
        update.zero_grad()
        loss.backward()
        update.step()

    return step


def _jax_step(contraction: float | None) -> Callable[[], None]:
    model = jaxcae.mlp((784, 256, 64), "relu", output="sigmoid")
    params = jax.tree.map(jnp.asarray, params_from_torch(tutorial_model().state_dict()))
    update, xs = optax.adam(RATE), jnp.asarray(batch().numpy())
    step = jaxcae.make_train_step(jaxcae.cae_loss(model, contraction, features="mean"), update)
    state: Any = jaxcae.TrainState.create(params, update, jax.random.key(0))

    def once() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(step(state, xs))

    return once


def _milliseconds(step: Callable[[], None]) -> float:
    begin = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - begin)
