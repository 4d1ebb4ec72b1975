"""Training: one jitted step, and a loop over epochs that can stop and go on at any step.

Where a run stands is told by its step alone. Epoch and batch follow from it, the order of an epoch
is drawn from the state's key and the epoch, and the key of a step from the state's key and the
step. A run that is resumed from a saved state therefore repeats the uninterrupted one bit for bit.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from jaxcae.errors import check_positive_int
from jaxcae.types import Loss, Metrics, Params

Record = dict[str, float]
"""One epoch: `epoch`, `step`, training means by name, and `held_out_` means."""

# Streams of random numbers beside the steps'. A step is an int32, so no step folds in these.
_ORDER, _HELD_OUT = 2**32 - 1, 2**32 - 2
_LONGEST_SEGMENT = 1024


@flax.struct.dataclass
class TrainState:
    """All that the next step needs.

    Attributes:
        params: The parameters.
        opt_state: The state of the optimizer.
        step: How many steps have been taken, an int32 scalar.
        key: A typed key. It never changes: step keys are `fold_in(key, step)`.
        best: The parameters of the best epoch so far, where `fit` is told to watch for it.
    """

    # Not annotated by shape: as a pytree it may hold tracers, shapes or shardings in their place.
    params: Params
    opt_state: Any
    step: Any
    key: Any
    best: Any = None

    @classmethod
    def create(
        cls, params: Params, optimizer: optax.GradientTransformation, key: PRNGKeyArray
    ) -> "TrainState":
        """Make the state before the first step."""
        return cls(params, optimizer.init(params), jnp.zeros((), jnp.int32), key)


class Segment(NamedTuple):
    """What the callback of `fit` sees: the state, and what has happened since its last call.

    Attributes:
        state: The state after the segment.
        step: Steps taken so far, as an int.
        epoch: The epoch that the segment belongs to, 1 for the first; 0 before any step.
        metrics: Metrics by name, one value per step of the segment, in float64.
        totals: Sums over the samples that this epoch has seen, by metric; empty once it is done.
        history: Records of the epochs that are done; the last is this epoch's if it just ended.
        epoch_done: Whether the epoch ended with this segment.
    """

    state: TrainState
    step: int
    epoch: int
    metrics: Mapping[str, np.ndarray]
    totals: Mapping[str, float]
    history: Sequence[Record]
    epoch_done: bool


@runtime_checkable
class Batches(Protocol):
    """Training data that does not fit in memory: batches whose position follows from the step."""

    @property
    def steps_per_epoch(self) -> int:
        """How many batches make an epoch, a short last one included."""
        ...

    def from_step(self, step: int) -> Iterator[Any]:
        """Iterate without end over the batches of the steps from `step` on."""
        ...


class DivergedError(ArithmeticError):
    """The loss is no longer finite.

    Attributes:
        step: The step that produced it, counted from 1.
        state: A state from before that step whose losses were all finite.
    """

    def __init__(self, what: str, value: float, step: int, state: TrainState):
        super().__init__(
            f"{what} became {value} at step {step}. Try a smaller learning rate or contraction."
        )
        self.step, self.state = step, state


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
) -> dict[str, float]:
    """Average the metrics of `loss` over all samples, in batches.

    Every sample counts once: a short last batch is weighed by its size.

    Args:
        loss: `(params, xs, key) -> (scalar, metrics)`, each a mean over its batch.
        params: The parameters.
        xs: Samples in rows.
        batch_size: How many samples to hold on the device's way at a time.
        key: For a loss that draws random numbers; each batch folds in its index.

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
        metrics = jax.device_get(_jitted_metrics(loss, params, batch, batch_key))
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + float(value) * len(batch)
    return {name: total / len(xs) for name, total in totals.items()}


def fit(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    xs: Any,
    *,
    epochs: int,
    batch_size: int = 128,
    held_out: Any = None,
    measure: Loss | None = None,
    callback: Callable[[Segment], bool | None] | None = None,
    patience: int | None = None,
    monitor: str | None = None,
    history: Sequence[Record] = (),
    totals: Mapping[str, float] | None = None,
    pause_every: int | None = None,
    pause_seconds: float = 0.5,
) -> tuple[TrainState, list[Record]]:
    """Train until `epochs` epochs are done, and print nothing.

    Samples are reshuffled each epoch. Batches run on the device in segments of about
    `pause_seconds`, each one call of one compiled function: a loop whose bounds are arguments, so
    that a segment of any length, at any position, repeats the same instructions. Where the batch
    size does not divide the samples, the last batch of an epoch is short: it is one more step of
    the same compiled function, and no sample is dropped.

    To resume, pass the state, history and totals that a callback has seen.

    Args:
        loss: `(params, xs, key) -> (scalar, metrics)`.
        optimizer: The optimizer that made `state`.
        state: Where to start; `TrainState.create(params, optimizer, key)` for a new run.
        xs: Samples in rows, held on the device; or `Batches` for what does not fit.
        epochs: Epochs in total, those before a resume included.
        batch_size: Samples per step. One larger than the data means one step per epoch.
        held_out: Samples to evaluate before the first step and after every epoch.
        measure: What to report on held-out samples; `loss` unless given.
        callback: Called after every segment, and once before a new run's first step. To return
            True stops the run there.
        patience: Stop once `monitor` has not improved for this many epochs; never by default. The
            parameters of the best epoch are then kept in `state.best`, whether it stops or not;
            `state.params` are those of the last step, from which a run can go on.
        monitor: The record's entry to watch; `held_out_loss`, or `loss` without held-out data.
        history: Records of earlier epochs.
        totals: Sums over the part of an epoch that is done.
        pause_every: Also end a segment at multiples of this many steps.
        pause_seconds: The length of a segment to aim at.

    Returns:
        The state, and one record per epoch. With `held_out` the first is epoch 0, before training.

    Raises:
        DivergedError: If a loss is not finite.
        ValueError: If an argument is not usable.
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        check_positive_int(name, value)
    for name, optional in (("patience", patience), ("pause_every", pause_every)):
        if optional is not None:
            check_positive_int(name, optional, "Use None for none.")
    source: _Source
    if isinstance(xs, Batches):
        source = _Streamed(loss, optimizer, xs)
    else:
        source = _Resident(loss, optimizer, xs, batch_size)
    monitor = monitor or ("loss" if held_out is None else "held_out_loss")
    held_out_key = jax.random.fold_in(state.key, _HELD_OUT)

    def held_out_record(params: Params, step: int) -> Record:
        if held_out is None:
            return {}
        means = evaluate(measure or loss, params, held_out, key=held_out_key)
        for name, value in means.items():
            if not math.isfinite(value):
                raise DivergedError(f"held-out {name}", value, step, state)
        return {f"held_out_{name}": value for name, value in means.items()}

    records, sums = [dict(record) for record in history], dict(totals or {})
    step = int(state.step)
    if step == 0 and not records:
        if patience is not None:
            state = replace(state, best=state.params)
        if held_out is not None:
            records.append({"epoch": 0, "step": 0, **held_out_record(state.params, 0)})
        if callback and callback(Segment(state, 0, 0, {}, {}, tuple(records), False)):
            return state, records

    per_epoch = source.steps_per_epoch
    pace = _Pace(pause_seconds)
    while step < epochs * per_epoch and not _stalled(records, monitor, patience):
        epoch, first = divmod(step, per_epoch)
        count = min(pace.steps, per_epoch - first, _LONGEST_SEGMENT)
        if pause_every is not None:
            count = min(count, pause_every - step % pause_every)
        started = time.monotonic()
        # What does not change stays out of the compiled loop.
        after, metrics = source.run(replace(state, best=None), step, count)
        pace.took(count, time.monotonic() - started)
        _check_finite(metrics, step, state)

        sizes = source.sizes(first, count)
        for name, values in metrics.items():
            # One addition at a time, in order: the same bits however an epoch is cut.
            for size, value in zip(sizes, values, strict=True):
                sums[name] = sums.get(name, 0.0) + size * float(value)
        sums["samples"] = sums.get("samples", 0.0) + float(sum(sizes))
        step += count
        done = step % per_epoch == 0
        if done:
            samples = sums.pop("samples")
            means = {name: total / samples for name, total in sums.items()}
            validation = held_out_record(after.params, step)
            records.append({"epoch": epoch + 1, "step": step, **means, **validation})
            sums = {}
        best = state.best
        if done and patience is not None and best_record(records, monitor) == len(records) - 1:
            best = after.params
        state = replace(after, best=best)
        if callback and callback(
            Segment(state, step, epoch + 1, metrics, dict(sums), tuple(records), done)
        ):
            break
    return state, records


def side_by_side(losses: Mapping[str, Loss]) -> Loss:
    """Train several networks on the same batches as if each were alone.

    The parameters of the result are a dict with the networks' names as keys. Its value is the sum
    of the losses, so its gradient with respect to one network is the gradient of that network's
    own loss. With an optimizer that treats parameters one by one (SGD, Adam and most others, but
    not clipping by the global norm) each network therefore takes the steps it would take alone.

    Metrics carry the network's name in front: `plain/reconstruction`.
    """

    def loss(params: Params, xs: Any, key: PRNGKeyArray | None = None) -> tuple[Any, Metrics]:
        total: Any = jnp.zeros(())
        metrics: Metrics = {}
        for name, one in losses.items():
            value, own = one(params[name], xs, key)
            total = total + value
            metrics |= {f"{name}/{k}": v for k, v in {"loss": value, **own}.items()}
        return total, {"loss": total, **metrics}

    return loss


class _Source(Protocol):
    """Where batches come from, and how a run of steps over them is executed."""

    steps_per_epoch: int

    def run(
        self, state: TrainState, step: int, count: int
    ) -> tuple[TrainState, dict[str, np.ndarray]]: ...

    def sizes(self, first: int, count: int) -> list[int]: ...


class _Resident:
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


class _Streamed:
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


class _Pace:
    """How many steps make a segment of the wanted length, learnt from those before."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self.steps = 1
        self._warm = False

    def took(self, steps: int, seconds: float) -> None:
        if not self._warm:  # the first call compiles
            self._warm = True
            return
        fitting = self._seconds * steps / max(seconds, 1e-6)
        self.steps = max(1, min(int(fitting), 8 * self.steps, _LONGEST_SEGMENT))


def _step(
    loss: Loss,
    optimizer: optax.GradientTransformationExtraArgs,
    state: TrainState,
    xs: Any,
) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(state.key, state.step)
    (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params, xs, key)
    updates, opt_state = optimizer.update(
        grads,
        state.opt_state,
        state.params,
        value=value,
        grad=grads,
        value_fn=lambda params: loss(params, xs, key)[0],
    )
    params = optax.apply_updates(state.params, updates)
    state = replace(state, params=params, opt_state=opt_state, step=state.step + 1)
    return state, {"loss": value, **metrics}


_jitted_step = jax.jit(_step, static_argnums=(0, 1))


@partial(jax.jit, static_argnums=0)
def _jitted_metrics(loss: Loss, params: Params, xs: Any, key: PRNGKeyArray | None) -> Metrics:
    value, metrics = loss(params, xs, key)
    return {"loss": value, **metrics}


@partial(jax.jit, static_argnums=2)
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
    step = partial(_step, loss, optimizer)
    shapes = jax.eval_shape(step, state, xs[:batch_size])[1]
    buffer = {
        name: jnp.zeros((min(full, _LONGEST_SEGMENT) + (rest > 0),), shape.dtype)
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


def _check_finite(metrics: Mapping[str, np.ndarray], step: int, state: TrainState) -> None:
    bad = np.flatnonzero(~np.isfinite(metrics["loss"]))
    if bad.size:
        raise DivergedError(
            "the loss", float(metrics["loss"][bad[0]]), step + int(bad[0]) + 1, state
        )


def best_record(history: Sequence[Record], monitor: str) -> int:
    """Find the record with the lowest `monitor`, the first of several."""
    if monitor not in history[-1] and history[-1]["epoch"] > 0:  # epoch 0 has no training means
        raise ValueError(
            f"monitor {monitor!r} is not in the records; they hold {', '.join(history[-1])}."
        )
    return int(np.argmin([record.get(monitor, math.inf) for record in history]))


def _stalled(history: Sequence[Record], monitor: str, patience: int | None) -> bool:
    if patience is None or not history:
        return False
    return len(history) - 1 - best_record(history, monitor) >= patience
