"""Training: a loop over epochs that can stop and go on at any step.

Where a run stands is told by its step alone. Epoch and batch follow from it, the order of an epoch
is drawn from the state's key and the epoch, and the key of a step from the state's key and the
step. A run that is resumed from a saved state therefore repeats the uninterrupted one bit for bit.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxcae.errors import check_positive_int
from jaxcae.training.sources import LONGEST_SEGMENT, Resident, Source, Streamed
from jaxcae.training.state import Batches, DivergedError, TrainState
from jaxcae.training.step import evaluate
from jaxcae.types import Loss, Params

Record = dict[str, float]
"""One epoch: `epoch`, `step`, training means by name, and `held_out_` means."""

# A stream of random numbers beside the steps'. A step is an int32, so no step folds it in.
_HELD_OUT = 2**32 - 2


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
    source: Source
    if isinstance(xs, Batches):
        source = Streamed(loss, optimizer, xs)
    else:
        source = Resident(loss, optimizer, xs, batch_size)
    monitor = monitor or ("loss" if held_out is None else "held_out_loss")
    held_out_key = jax.random.fold_in(state.key, _HELD_OUT)

    def held_out_record(params: Params, step: int) -> Record:
        if held_out is None:
            return {}
        means = evaluate(measure or loss, params, held_out, key=held_out_key, step=step)
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
        count = min(pace.steps, per_epoch - first, LONGEST_SEGMENT)
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
        self.steps = max(1, min(int(fitting), 8 * self.steps, LONGEST_SEGMENT))


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
