"""One step of gradient descent, and the means of a loss over many samples."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import optax
from jaxtyping import PRNGKeyArray

from jaxcae.errors import check_positive_int
from jaxcae.objective.side_by_side import call_loss, whole
from jaxcae.training.state import TrainState
from jaxcae.types import Loss, Metrics, Params


def make_train_step(
    loss: Loss, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """Make one step of gradient descent, jitted.

    The step's key is `fold_in(state.key, state.step)`. Optimizers that ask for more than the
    gradient get `value`, `grad` and `value_fn`, as optax names them.

    Args:
        loss: `(params, xs, key) -> (scalar, metrics)`, such as `cae_loss(model)`.
        optimizer: Any optax gradient transformation.

    Returns:
        `step(state, xs) -> (state, metrics)`; metrics holds `loss` and what the loss reports.
    """
    return partial(_jitted_step, loss, optax.with_extra_args_support(optimizer))


def evaluate(
    loss: Loss,
    params: Params,
    xs: Any,
    batch_size: int = 1024,
    key: PRNGKeyArray | None = None,
    step: int | None = None,
) -> dict[str, float]:
    """Average the metrics of `loss` over all samples, in batches.

    Every sample counts once: a short last batch is weighed by its size.

    Args:
        loss: `(params, xs, key) -> (scalar, metrics)`, each a mean over its batch.
        params: The parameters.
        xs: Samples in rows.
        batch_size: How many samples to hold on the device's way at a time.
        key: For a loss that draws random numbers; each batch folds in its index.
        step: For a loss whose weights are schedules of the step. Lazy terms are taken always.

    Returns:
        Means by name, `loss` among them.

    Raises:
        ValueError: If there are no samples, or `batch_size` is not positive.
    """
    check_positive_int("batch_size", batch_size)
    if len(xs) == 0:
        raise ValueError("evaluate needs at least one sample, got none.")
    totals: dict[str, float] = {}
    for index, start in enumerate(range(0, len(xs), batch_size)):
        batch = xs[start : start + batch_size]
        batch_key = None if key is None else jax.random.fold_in(key, index)
        metrics = jax.device_get(_jitted_metrics(whole(loss), params, batch, batch_key, step))
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + float(value) * len(batch)
    return {name: total / len(xs) for name, total in totals.items()}


def take_step(
    loss: Loss,
    optimizer: optax.GradientTransformationExtraArgs,
    state: TrainState,
    xs: Any,
) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(state.key, state.step)

    def value_of(params: Params) -> tuple[Any, Metrics]:
        return call_loss(loss, params, xs, key, step=state.step)

    (value, metrics), grads = jax.value_and_grad(value_of, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(
        grads,
        state.opt_state,
        state.params,
        value=value,
        grad=grads,
        value_fn=lambda params: value_of(params)[0],
    )
    params = optax.apply_updates(state.params, updates)
    state = replace(state, params=params, opt_state=opt_state, step=state.step + 1)
    return state, {"loss": value, **metrics}


_jitted_step = jax.jit(take_step, static_argnums=(0, 1))


@partial(jax.jit, static_argnums=0)
def _jitted_metrics(
    loss: Loss, params: Params, xs: Any, key: PRNGKeyArray | None, step: Any
) -> Metrics:
    value, metrics = call_loss(loss, params, xs, key, step=step)
    return {"loss": value, **metrics}
