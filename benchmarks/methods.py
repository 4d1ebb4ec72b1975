"""Training steps of jaxcae, compiled ahead of time and ready to be checked and timed."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import jaxcae
from benchmarks.harness import DRAWS, Check, Subject
from jaxcae.timing import Answer, compile_ahead, tolerance_of

# Large enough for the penalty to be a good share of the gradient: with 0.1 it is half a percent at
# these sizes, and an error in it would hide. Times do not depend on it.
CONTRACTION = 10.0
UNBIASED = ("hutchinson", "control_variate")


def network(
    sizes: Sequence[int], batch: int, activation: str = "softplus", dtype: Any = jnp.float32
) -> tuple[jaxcae.Autoencoder, Any, Any]:
    """Make a model with initial weights, and a batch of samples in [0, 1]."""
    model = jaxcae.mlp(sizes, activation, dtype=dtype)
    xs = jax.random.uniform(jax.random.key(1), (batch, sizes[0])).astype(dtype)
    return model, model.init(jax.random.key(0)), xs


def step(model: jaxcae.Autoencoder, method: str, **options: Any) -> Callable[..., Any]:
    """Make value and gradient of the whole training loss; `"plain"` has no penalty."""
    if method == "plain":
        loss = jaxcae.cae_loss(model, None)
    else:
        loss = jaxcae.cae_loss(model, CONTRACTION, method=method, **options)
    return jax.value_and_grad(loss, has_aux=True)


def penalty(model: jaxcae.Autoencoder, method: str, **options: Any) -> Callable[..., Any]:
    """Make value and gradient of the mean penalty alone, in the shape of `step`."""
    norms = jaxcae.contractive_penalty(model.encode, method, **options)

    def mean(encoder: Any, xs: Any, key: Any) -> Any:
        value = jnp.mean(norms({"encoder": encoder}, xs, key))
        return value, {"contraction": value}

    value_and_grad = jax.value_and_grad(mean, has_aux=True)
    return lambda params, xs, key: value_and_grad(params["encoder"], xs, key)


def textbook(model: jaxcae.Autoencoder, jacobian: Callable[..., Any]) -> Callable[..., Any]:
    """Make the step that JAX users write: codes, and `vmap` of `jacfwd` or `jacrev`."""

    def loss(params: Any, xs: Any, key: Any) -> Any:
        encode = partial(model.encode, params)
        x_hats = jax.vmap(model.decode, (None, 0))(params, jax.vmap(encode)(xs))
        norms = jax.vmap(lambda x: jnp.sum(jacobian(encode)(x) ** 2))(xs)
        mean = jnp.mean(norms)
        errors = jnp.mean(jnp.sum((xs - x_hats) ** 2, -1))
        return errors + CONTRACTION * mean, {"contraction": mean}

    return jax.value_and_grad(loss, has_aux=True)


def answer(
    function: Callable[..., Any], params: Any, xs: Any, key: Any = None, *, cut: int | None = None
) -> Answer:
    """Run a step and keep what is compared: loss, mean norm, gradients."""
    (value, metrics), gradient = jax.jit(function)(params, xs[:cut], key)
    return Answer((value, metrics["contraction"]), jax.device_get(gradient))


def subject(
    name: str,
    function: Callable[..., Any],
    params: Any,
    xs: Any,
    *,
    check: Check = "exact",
    cut: int | None = None,
    note: str = "",
) -> Subject:
    """Compile a step for these shapes.

    Args:
        name: What to call it.
        function: `(params, xs, key) -> ((value, metrics), gradient)`.
        params: The parameters.
        xs: The batch.
        check: How to hold it against the reference.
        cut: Check on that many samples, where the reference would take too long on all.
        note: What a reader has to know.
    """
    key = jax.random.key(2)
    program = compile_ahead(function, params, xs, key)

    def answers() -> list[Answer]:
        run: Any = program.call if cut is None else jax.jit(function)
        keys = jax.random.split(key, DRAWS) if check == "unbiased" else key[None]
        found = []
        for k in keys:
            (value, metrics), gradient = run(params, xs[:cut], k)
            found.append(Answer((value, metrics["contraction"]), jax.device_get(gradient)))
        return found

    return Subject(
        name,
        lambda: program.call(params, xs, key),
        check,
        answers,
        tolerance_of(xs.dtype),
        note,
        program.seconds,
        program.flops,
        program.temp_bytes,
    )


def step_subject(
    model: jaxcae.Autoencoder,
    params: Any,
    xs: Any,
    method: str,
    name: str | None = None,
    *,
    cut: int | None = None,
    note: str = "",
    **options: Any,
) -> Subject:
    """Compile the training step of a method by name."""
    check: Check = "exact"
    if method == "plain":
        check = "unit"
    elif method in UNBIASED:
        check = "unbiased"
    function = step(model, method, **options)
    return subject(name or method, function, params, xs, check=check, cut=cut, note=note)
