"""Where batches come from: samples on one or many devices, or batches from the host."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from jaxcae.devices.placement import Placement, shardings_of
from jaxcae.devices.processes import are_many
from jaxcae.jacobian.cost import flops
from jaxcae.objective.side_by_side import takes
from jaxcae.training.samples import check_finite
from jaxcae.training.state import Batches, InParts, Optimizer, TrainState
from jaxcae.training.step import Table, Update, guarded_step, reference, remembered
from jaxcae.types import Loss, Metrics

LONGEST_SEGMENT, LONGEST_STREAMED = 1024, 32
"""Steps between two looks at the results; streamed batches wait in memory until then."""
LONGEST_STACK, STACK_BYTES = 8, 1 << 22
"""Streamed batches that go to the device together, and the bytes they may take."""

_WORK = {"cpu": 1e10}
_WORK_ELSEWHERE = 1e12
"""Operations in a segment: a fraction of a second, that a callback can stop a run in time."""

# A stream of random numbers beside the steps'. A step is an int32, so no step folds it in.
_ORDER = 2**32 - 1


class Resident:
    """Samples on the device, one compiled function for any part of an epoch.

    Attributes:
        steps_per_epoch: Batches of an epoch, a short last one included.
        segment: Steps from one multiple of which to the next a run goes before it is looked at.
    """

    def __init__(
        self,
        loss: Loss,
        optimizer: Optimizer,
        xs: Any,
        batch_size: int,
        placement: Placement | None = None,
    ):
        self._owners = loss, optimizer  # what is compiled holds them weakly
        self._run = remembered(
            _RUNS, loss, optimizer.update, lambda: _make_run(loss, optimizer.update)
        )
        self._placement = placement
        self._xs = jnp.asarray(xs)
        self._batch_size = min(batch_size, len(xs))
        self._full, self._rest = divmod(len(xs), self._batch_size)
        self.steps_per_epoch = self._full + (self._rest > 0)
        self.segment = 1
        self._order: tuple[int, Any] = (-1, None)
        self._pins: tuple[Any, ...] = ()

    def begin(self, state: TrainState, step: int) -> None:
        """Look at the work of a step, with this state at this step."""
        if self._placement is not None:
            self._pins = shardings_of(state)
        traced = self._run.trace(*self._arguments(state, step, 1))
        self.segment = _segment(traced.jaxpr, LONGEST_SEGMENT)

    def run(
        self, state: TrainState, step: int, count: int
    ) -> tuple[TrainState, dict[str, np.ndarray], Sequence[int]]:
        """Take `count` steps, or fewer if one goes wrong; the state given is used up.

        Metrics and sizes of batches are those of the steps tried, one more than steps taken where
        the last went wrong.
        """
        after, buffer = self._run(*self._arguments(state, step, count))
        metrics, reached = jax.device_get((buffer, after.step))
        tried = min(count, int(reached) - step + 1)
        first = step % self.steps_per_epoch
        sizes = [
            self._batch_size if index < self._full else self._rest
            for index in range(first, first + tried)
        ]
        return (
            after,
            {name: np.asarray(values[:tried], np.float64) for name, values in metrics.items()},
            sizes,
        )

    def check(self, step: int) -> None:
        """Do nothing: samples were checked when they came."""

    def _arguments(self, state: TrainState, step: int, count: int) -> tuple[Any, ...]:
        epoch, first = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            order = epoch_order(state.key, epoch, len(self._xs))
            # On a mesh it is to lie on no device of its own.
            self._order = epoch, np.asarray(order) if self._placement else order
        layout = (self._batch_size, self._placement, self._pins)
        return (*layout, state, self._xs, self._order[1], first, first + count)


class Streamed:
    """Batches from the host, a few small ones at a time; otherwise as `Resident`.

    To hand one batch and the state to the device takes a fixed time, which small steps feel. Of
    many processes each reads the rows that its own devices take, if the batches can.
    """

    def __init__(
        self,
        loss: Loss,
        optimizer: Optimizer,
        batches: Batches,
        placement: Placement | None = None,
    ):
        self._owners = loss, optimizer
        self._run = remembered(
            _STACKS, loss, optimizer.update, lambda: _make_stack_run(loss, optimizer.update)
        )
        self._placement, self._weighed = placement, takes(loss, "weights")
        self._pins: tuple[Any, ...] = ()
        if placement is not None and are_many() and isinstance(batches, InParts):
            batches = batches.of_rows(partial(placement.rows_here, weighed=self._weighed))
        self._batches = batches
        self.steps_per_epoch = batches.steps_per_epoch
        self.segment = 1
        self._iterator: Iterator[Any] | None = None
        self._first: Any = None
        self._together = 1

    def begin(self, state: TrainState, step: int) -> None:
        """Look at the work of a step, with this state at this step."""
        self._iterator = self._batches.from_step(step)
        self._first = next(self._iterator)
        self._together = max(1, min(LONGEST_STACK, STACK_BYTES // self._first.nbytes))
        stack = np.empty((self._together, *self._first.shape), self._first.dtype)
        if self._placement is not None:
            self._pins = shardings_of(state)
        traced = self._run.trace(*self._arguments(jnp.asarray(True), state, stack, 1))
        self.segment = _segment(traced.jaxpr, LONGEST_STREAMED)

    def run(
        self, state: TrainState, step: int, count: int
    ) -> tuple[TrainState, dict[str, np.ndarray], Sequence[int]]:
        """Do as `Resident.run`."""
        going, sizes, taken = jnp.asarray(True), [], []
        for stack, used in self._stacks(count):
            sizes += [stack.shape[1]] * used
            arguments = self._arguments(going, state, stack, used)
            going, state, metrics = self._run(*arguments)
            taken.append((metrics, used))
        host, reached = jax.device_get((taken, state.step))
        tried = min(count, int(reached) - step + 1)
        joined = {
            name: np.concatenate([metrics[name][:used] for metrics, used in host])
            for name in host[0][0]
        }
        return (
            state,
            {name: np.asarray(values[:tried], np.float64) for name, values in joined.items()},
            sizes[:tried],
        )

    def _stacks(self, count: int) -> Iterator[tuple[np.ndarray, int]]:
        """Yield the next batches, equal ones together, and how many of each stack are batches.

        Every stack of batches of one size is as high, so that one compiled function serves all.
        """
        assert self._iterator is not None
        while count:
            batch = next(self._iterator) if self._first is None else self._first
            self._first, used, count = None, 1, count - 1
            if self._together == 1:
                yield batch[None], 1
                continue
            stack = np.zeros((self._together, *batch.shape), batch.dtype)
            stack[0] = batch
            while count and used < self._together:
                batch = next(self._iterator)
                if batch.shape != stack.shape[1:]:
                    self._first = batch
                    break
                stack[used], used, count = batch, used + 1, count - 1
            yield stack, used

    def _arguments(self, going: Any, state: TrainState, stack: Any, used: int) -> tuple[Any, ...]:
        weights = None
        if self._placement is not None:
            stack, weights = self._placement.share(stack, self._weighed, stacked=True)
        return self._placement, self._pins, going, state, stack, weights, used

    def check(self, step: int) -> None:
        """Raise InputError if the batch of a step holds what is not finite."""
        check_finite(f"the batch of step {step + 1}", next(self._batches.from_step(step)))


def _segment(jaxpr: Any, longest: int) -> int:
    """Choose how many steps to run at a time, by their work and not by the clock.

    So a run is cut at the same steps whoever repeats it and wherever it is resumed.
    """
    work = _WORK.get(jax.default_backend(), _WORK_ELSEWHERE)
    return max(1, min(longest, int(work / max(1.0, flops(jaxpr.eqns)))))


@jax.jit(static_argnums=2)
def epoch_order(key: PRNGKeyArray, epoch: Any, samples: int) -> Int[Array, " samples"]:
    """Draw the order in which `fit` visits the samples in an epoch, 0 for the first."""
    epoch_key = jax.random.fold_in(jax.random.fold_in(key, _ORDER), epoch)
    return jax.random.permutation(epoch_key, samples)


_RUNS: Table = weakref.WeakKeyDictionary()


def _make_run(loss: Loss, update: Update) -> Any:
    its_loss, its_update = reference(loss), reference(update)

    def run(batch_size: int, placement: Placement | None, pins: Any, *arguments: Any) -> Any:
        return _run_batches(its_loss(), its_update(), batch_size, placement, pins, *arguments)

    return jax.jit(run, static_argnums=(0, 1, 2), donate_argnums=3)


def _run_batches(
    loss: Loss,
    update: Update,
    batch_size: int,
    placement: Placement | None,
    pins: tuple[Any, ...],
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
    entries are filled. It stops before a step whose loss or parameters are not finite.
    """
    full, rest = divmod(len(order), batch_size)
    batch_of = _gatherer(loss, placement, xs)

    def step(going: Any, state: TrainState, rows: Any) -> tuple[Any, TrainState, Metrics]:
        return guarded_step(loss, update, going, state, *batch_of(rows))

    shapes = jax.eval_shape(step, True, state, order[:batch_size])[2]
    buffer = {
        name: jnp.zeros((min(full, LONGEST_SEGMENT) + (rest > 0),), shape.dtype)
        for name, shape in shapes.items()
    }

    def body(carry: Any) -> Any:
        index, going, state, buffer = carry
        rows = jax.lax.dynamic_slice(order, (index * batch_size,), (batch_size,))
        going, state, metrics = step(going, state, rows)
        return index + 1, going, state, _record(buffer, index - first, metrics)

    end = jnp.minimum(last, full)
    start = (jnp.asarray(first, end.dtype), jnp.asarray(True), state, buffer)
    carry = jax.lax.while_loop(lambda carry: carry[1] & (carry[0] < end), body, start)
    if rest:

        def short_batch(carry: Any) -> Any:
            index, going, state, buffer = carry
            going, state, metrics = step(going, state, order[full * batch_size :])
            return index + 1, going, state, _record(buffer, full - first, metrics)

        carry = jax.lax.cond(carry[1] & (last > full), short_batch, lambda carry: carry, carry)
    _, _, state, buffer = carry
    return (state if placement is None else placement.pinned(state, pins)), buffer


_STACKS: Table = weakref.WeakKeyDictionary()


def _make_stack_run(loss: Loss, update: Update) -> Any:
    its_loss, its_update = reference(loss), reference(update)

    def run(
        placement: Placement | None,
        pins: tuple[Any, ...],
        going: Any,
        state: TrainState,
        stack: Any,
        weights: Any,
        used: Any,
    ) -> Any:
        """Take a step on each of the first `used` batches of a stack, if all before were sound."""

        def step(carry: Any) -> Any:
            index, going, state, buffer = carry
            batch = jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)
            going, state, metrics = guarded_step(
                its_loss(), its_update(), going, state, batch, weights
            )
            return index + 1, going, state, _record(buffer, index, metrics)

        shapes = jax.eval_shape(step, (0, going, state, {}))[3]
        buffer = {name: jnp.zeros(stack.shape[:1], kind.dtype) for name, kind in shapes.items()}
        carry = (jnp.asarray(0), going, state, buffer)
        _, going, state, buffer = jax.lax.while_loop(lambda carry: carry[0] < used, step, carry)
        return going, (state if placement is None else placement.pinned(state, pins)), buffer

    return jax.jit(run, static_argnums=(0, 1), donate_argnums=(2, 3))


def _record(buffer: dict[str, Array], index: Any, metrics: Metrics) -> dict[str, Array]:
    """Put a step's metrics at their place, or give their shapes where there is no place yet."""
    if not buffer:
        return dict(metrics)
    return {name: buffer[name].at[index].set(value) for name, value in metrics.items()}


def _gatherer(loss: Loss, placement: Placement | None, xs: Any) -> Callable[[Any], tuple[Any, Any]]:
    """Make `rows -> (batch, weights)`."""

    def gather(rows: Any) -> tuple[Any, Any]:
        if placement is None:
            return xs[rows], None
        rows, weights = placement.padded(rows) if takes(loss, "weights") else (rows, None)
        return placement.gather(xs, rows), weights

    return gather
