"""Training: a loop over epochs that can stop and go on at any step.

Where a run stands is told by its step alone. Epoch and batch follow from it, the order of an epoch
is drawn from the state's key and the epoch, and the key of a step from the state's key and the
step. A run that is resumed from a saved state therefore repeats the uninterrupted one bit for bit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcae.devices.layout import Layout
from jaxcae.devices.placement import Placement
from jaxcae.errors import check_positive_int
from jaxcae.training.evaluation import means
from jaxcae.training.samples import as_samples
from jaxcae.training.sources import Resident, Streamed
from jaxcae.training.state import Batches, DivergedError, Optimizer, TrainState, copied
from jaxcae.types import Loss, Params

Record = dict[str, float]
"""One epoch: `epoch`, `step`, training means by name, and `held_out_` means."""

# A stream of random numbers beside the steps'. A step is an int32, so no step folds it in.
_HELD_OUT = 2**32 - 2


class Segment(NamedTuple):
    """What the callback of `fit` sees: the state, and what has happened since its last call.

    Attributes:
        state: The state after the segment, a copy that may be kept.
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
    optimizer: Optimizer,
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
    layout: Layout | None = None,
) -> tuple[TrainState, list[Record]]:
    """Train until `epochs` epochs are done, and print nothing.

    Samples are reshuffled each epoch. Batches run on the device in segments, each one call of one
    compiled function: a loop whose bounds are arguments, so that a segment of any length, at any
    position, repeats the same instructions. Segments end where the step and the work of a step
    say, never the clock. Where the batch size does not divide the samples, the last batch of an
    epoch is short: it is one more step of the same compiled function, and no sample is dropped.

    With a `layout` each device takes its share of the rows of every batch (of rows that they cannot
    share equally, copies of weight 0 make up the number), and the state lies where the layout says.
    Samples are then copied to every device; those that you have spread over its mesh yourself, as
    by `batch_sharding`, stay there. Samples on a mesh tell their layout without being asked: a
    state on one device is copied to all.

    To resume, pass the state, history and totals that a callback has seen.

    Args:
        loss: `(params, xs, key) -> (scalar, metrics)`.
        optimizer: The optimizer that made `state`.
        state: Where to start; `TrainState.create(params, optimizer, key)` for a new run.
        xs: Samples in rows, held on the device: an array, or what NumPy makes one of; or `Batches`
            for what does not fit.
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
        layout: Which devices hold what; see `jaxcae.layout`.

    Returns:
        The state, and one record per epoch. With `held_out` the first is epoch 0, before training.

    Raises:
        DivergedError: If a loss is not finite; it holds the last good state.
        ValueError: If an argument is not usable, a sample or an initial parameter is not finite,
            or state and history are of other samples or another batch size.
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        check_positive_int(name, value)
    for name, optional in (("patience", patience), ("pause_every", pause_every)):
        if optional is not None:
            check_positive_int(name, optional, "Use None for none.")
    source, placement = _source(loss, optimizer, xs, batch_size, layout)
    if held_out is not None:
        held_out = as_samples("held_out", held_out)
        if layout is not None and placement is not None:
            held_out = placement.put(held_out)
    monitor = monitor or ("loss" if held_out is None else "held_out_loss")
    held_out_key = jax.random.fold_in(state.key, _HELD_OUT)
    step = start = int(state.step)
    per_epoch = source.steps_per_epoch
    records, sums = [dict(record) for record in history], dict(totals or {})
    _check_position(records, sums, step, per_epoch)
    best = state.best
    # Steps overwrite the state in place: the caller's own stays his.
    state = copied(replace(placement.placed(state) if placement else state, best=None))

    def shown() -> TrainState:
        return replace(copied(state), best=best)

    def held_out_record() -> Record:
        if held_out is None:
            return {}
        found = means(measure or loss, state.params, held_out, key=held_out_key, step=step)
        for name, value in found.items():
            if not math.isfinite(value):
                _check_params(state.params, step == start)
                raise DivergedError(f"held-out {name}", value, step, shown())
        return {f"held_out_{name}": value for name, value in found.items()}

    if step == 0 and not records:
        if patience is not None:
            best = copied(state.params)
        if held_out is not None:
            records.append({"epoch": 0, "step": 0, **held_out_record()})
        if callback and callback(Segment(shown(), 0, 0, {}, {}, tuple(records), False)):
            return shown(), records

    if step < epochs * per_epoch and not _stalled(records, monitor, patience):
        source.begin(state, step)
    while step < epochs * per_epoch and not _stalled(records, monitor, patience):
        epoch, first = divmod(step, per_epoch)
        count = min(source.segment - first % source.segment, per_epoch - first)
        if pause_every is not None:
            count = min(count, pause_every - step % pause_every)
        state, metrics, sizes = source.run(state, step, count)
        if int(state.step) < step + count:
            source.check(int(state.step))
            _check_params(state.params, int(state.step) == start)
            raise _diverged(metrics, shown())

        for name, values in metrics.items():
            # One addition at a time, in order: the same bits however an epoch is cut.
            for size, value in zip(sizes, values, strict=True):
                sums[name] = sums.get(name, 0.0) + size * float(value)
        sums["samples"] = sums.get("samples", 0.0) + float(sum(sizes))
        step += count
        done = step % per_epoch == 0
        if done:
            samples = sums.pop("samples")
            averages = {name: total / samples for name, total in sums.items()}
            records.append({"epoch": epoch + 1, "step": step, **averages, **held_out_record()})
            sums = {}
        if done and patience is not None and best_record(records, monitor) == len(records) - 1:
            best = copied(state.params)
        if callback and callback(
            Segment(shown(), step, epoch + 1, metrics, dict(sums), tuple(records), done)
        ):
            break
    return replace(state, best=best), records


def _source(
    loss: Loss, optimizer: Optimizer, xs: Any, batch_size: int, layout: Layout | None
) -> tuple[Resident | Streamed, Placement | None]:
    if isinstance(xs, Batches):
        placement = None if layout is None else Placement.of(None, layout)
        return Streamed(loss, optimizer, xs, placement), placement
    samples = as_samples("xs", xs)
    placement = Placement.of(samples, layout)
    if layout is not None and placement is not None:
        samples = placement.put(samples)
    return Resident(loss, optimizer, samples, batch_size, placement), placement


def _check_position(
    records: Sequence[Record], sums: Mapping[str, float], step: int, per_epoch: int
) -> None:
    """Refuse to go on where the steps of the history are not those of this data and batch size."""
    last = records[-1] if records else None
    advice = "Go on with the samples and the batch size of before, or begin with a new state."
    if last is not None and int(last["step"]) != int(last["epoch"]) * per_epoch:
        raise ValueError(
            f"epoch {int(last['epoch'])} of the history ended at step {int(last['step'])}, but "
            f"these samples make {per_epoch} batches an epoch. {advice}"
        )
    behind = step - (int(last["step"]) if last else 0)
    if last is not None and not 0 <= behind < per_epoch:
        raise ValueError(
            f"the state is at step {step}, the history ends at step {int(last['step'])}: they "
            "do not belong together. Pass the history that came with the state."
        )
    if sums and not step % per_epoch:
        raise ValueError(
            f"totals are of an unfinished epoch, but step {step} ends one of {per_epoch} batches. "
            f"{advice}"
        )


def _check_params(params: Params, at_start: bool) -> None:
    """Blame parameters that were not finite before the first step of this call."""
    if not at_start:
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        count = int(np.count_nonzero(~np.isfinite(np.asarray(leaf, np.float64))))
        if count:
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} holds {count} value(s) that are not finite "
                "before the first step. Start from other parameters."
            )


def _diverged(metrics: Mapping[str, np.ndarray], state: TrainState) -> DivergedError:
    loss, step = float(metrics["loss"][-1]), int(state.step) + 1
    if math.isfinite(loss):
        return DivergedError("a parameter", math.nan, step, state)
    return DivergedError("the loss", loss, step, state)


def best_record(history: Sequence[Record], monitor: str) -> int:
    """Find the record with the lowest `monitor`, the first of several."""
    if monitor not in history[-1] and history[-1]["epoch"] > 0:  # epoch 0 has no training means
        raise ValueError(
            f"monitor {monitor!r} is not in the records; they hold {', '.join(history[-1])}."
        )
    values = np.asarray([record.get(monitor, math.inf) for record in history])
    return int(np.argmin(np.where(np.isnan(values), math.inf, values)))


def _stalled(history: Sequence[Record], monitor: str, patience: int | None) -> bool:
    if patience is None or not history:
        return False
    return len(history) - 1 - best_record(history, monitor) >= patience
