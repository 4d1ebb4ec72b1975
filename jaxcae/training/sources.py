"""Where batches come from: samples on the device, or batches from the host."""

from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from jaxcae.training.state import Batches, TrainState
from jaxcae.training.step import make_train_step, take_step
from jaxcae.types import Loss, Metrics

LONGEST_SEGMENT = 1024
# A stream of random numbers beside the steps'. A step is an int32, so no step folds it in.
_ORDER = 2**32 - 1


class Source(Protocol):
    """Where batches come from, and how a run of steps over them is executed."""

    steps_per_epoch: int

    def run(
        self, state: TrainState, step: int, count: int
    ) -> tuple[TrainState, dict[str, np.ndarray]]: ...

    def sizes(self, first: int, count: int) -> list[int]: ...


class Resident:
    """Samples on the device, one compiled function for any part of an epoch."""

    def __init__(
        self, loss: Loss, optimizer: optax.GradientTransformation, xs: Any, batch_size: int
    ):
        if len(xs) == 0:
            raise ValueError("fit needs at least one sample, got none.")
        self._loss, self._optimizer = loss, optax.with_extra_args_support(optimizer)
        self._xs = jnp.asarray(xs)
        self._batch_size = min(batch_size, len(xs))
        self._full, self._rest = divmod(len(xs), self._batch_size)
        self.steps_per_epoch = self._full + (self._rest > 0)
        self._order: tuple[int, Any] = (-1, None)

    def run(
        self, state: TrainState, step: int, count: int
    ) -> tuple[TrainState, dict[str, np.ndarray]]:
        epoch, first = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, epoch_order(state.key, epoch, len(self._xs))
        after, metrics = _run_batches(
            self._loss,
            self._optimizer,
            self._batch_size,
            state,
            self._xs,
            self._order[1],
            first,
            first + count,
        )
        return after, {
            name: np.asarray(values[:count], np.float64)
            for name, values in jax.device_get(metrics).items()
        }

    def sizes(self, first: int, count: int) -> list[int]:
        return [
            self._batch_size if index < self._full else self._rest
            for index in range(first, first + count)
        ]


class Streamed:
    """Batches from the host, one compiled step each."""

    def __init__(self, loss: Loss, optimizer: optax.GradientTransformation, batches: Batches):
        self._step = make_train_step(loss, optimizer)
        self._batches = batches
        self.steps_per_epoch = batches.steps_per_epoch
        self._iterator: Iterator[Any] | None = None
        self._sizes: list[int] = []

    def run(
        self, state: TrainState, step: int, count: int
    ) -> tuple[TrainState, dict[str, np.ndarray]]:
        if self._iterator is None:
            self._iterator = self._batches.from_step(step)
        self._sizes, taken = [], []
        for _ in range(count):
            batch = next(self._iterator)
            self._sizes.append(len(batch))
            state, metrics = self._step(state, batch)
            taken.append(metrics)
        host = jax.device_get(taken)
        return state, {
            name: np.asarray([one[name] for one in host], np.float64) for name in host[0]
        }

    def sizes(self, first: int, count: int) -> list[int]:
        return self._sizes


def epoch_order(key: PRNGKeyArray, epoch: Any, samples: int) -> Int[Array, " samples"]:
    """Draw the order in which `fit` visits the samples in an epoch, 0 for the first."""
    epoch_key = jax.random.fold_in(jax.random.fold_in(key, _ORDER), epoch)
    return jax.random.permutation(epoch_key, samples)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run_batches(
    loss: Loss,
    optimizer: optax.GradientTransformationExtraArgs,
    batch_size: int,
    state: TrainState,
    xs: Any,
    order: Int[Array, " samples"],
    first: Any,
    last: Any,
) -> tuple[TrainState, dict[str, Array]]:
    """Take the steps `first` to `last` (exclusive) of an epoch in the given order.

    The bounds are traced. A scan would need a length known to the compiler, hence one executable
    per length, and two executables need not round alike; this one serves whole epochs, segments,
    and what is left after a resume. Metrics come in a buffer of which the first `last - first`
    entries are filled.
    """
    full, rest = divmod(len(order), batch_size)
    step = partial(take_step, loss, optimizer)
    shapes = jax.eval_shape(step, state, xs[:batch_size])[1]
    buffer = {
        name: jnp.zeros((min(full, LONGEST_SEGMENT) + (rest > 0),), shape.dtype)
        for name, shape in shapes.items()
    }

    def record(buffer: dict[str, Array], index: Any, metrics: Metrics) -> dict[str, Array]:
        return {name: buffer[name].at[index].set(value) for name, value in metrics.items()}

    def body(index: Any, carry: Any) -> Any:
        state, buffer = carry
        rows = jax.lax.dynamic_slice(order, (index * batch_size,), (batch_size,))
        state, metrics = step(state, xs[rows])
        return state, record(buffer, index - first, metrics)

    carry = jax.lax.fori_loop(first, jnp.minimum(last, full), body, (state, buffer))
    if rest == 0:
        return carry

    def short_batch(carry: Any) -> Any:
        state, buffer = carry
        state, metrics = step(state, xs[order[full * batch_size :]])
        return state, record(buffer, full - first, metrics)

    return jax.lax.cond(last > full, short_batch, lambda carry: carry, carry)
