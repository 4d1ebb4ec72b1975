"""The means of a loss over many samples."""

import weakref
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from jaxcae.devices.layout import Layout
from jaxcae.devices.placement import Placement
from jaxcae.errors import check_positive_int
from jaxcae.objective.side_by_side import call_loss, takes, whole
from jaxcae.training.samples import as_samples
from jaxcae.training.step import reference
from jaxcae.types import Loss, Metrics, Params


def evaluate(
    loss: Loss,
    params: Params,
    xs: Any,
    batch_size: int = 1024,
    key: PRNGKeyArray | None = None,
    step: int | None = None,
    layout: Layout | None = None,
) -> dict[str, float]:
    """Average the metrics of `loss` over all samples, in batches.

    Every sample counts once: a short last batch is weighed by its size. With a layout, or of
    samples that are spread over devices, each device takes its share of every batch.

    Args:
        loss: `(params, xs, key) -> (scalar, metrics)`, each a mean over its batch.
        params: The parameters.
        xs: Samples in rows.
        batch_size: How many samples to hold on the device's way at a time.
        key: For a loss that draws random numbers; each batch folds in its index.
        step: For a loss whose weights are schedules of the step. Lazy terms are taken always.
        layout: Which devices hold what; see `jaxcae.layout`.

    Returns:
        Means by name, `loss` among them.

    Raises:
        ValueError: If there are no samples, one is not finite, or `batch_size` is not positive.
    """
    check_positive_int("batch_size", batch_size)
    return means(loss, params, as_samples("xs", xs), batch_size, key, step, layout)


def means(
    loss: Loss,
    params: Params,
    xs: Any,
    batch_size: int = 1024,
    key: PRNGKeyArray | None = None,
    step: int | None = None,
    layout: Layout | None = None,
) -> dict[str, float]:
    """Do what `evaluate` does, for samples that were checked."""
    loss = whole(loss)
    measure = _measure(loss)
    placement = Placement.of(xs, layout)
    weighed = takes(loss, "weights")
    if placement is not None:
        params = placement.placed(params)
    there = placement if placement is not None and placement.holds(xs) else None
    totals: dict[str, float] = {}
    for index, start in enumerate(range(0, len(xs), batch_size)):
        size = min(batch_size, len(xs) - start)
        batch, rows, weights = xs, None, None
        if there is not None:  # what lies on the mesh is cut where it is
            rows = np.arange(start, start + size)
            if weighed:
                rows, weights = there.padded(rows)
        elif placement is not None:
            batch, weights = placement.share(np.asarray(xs[start : start + size]), weighed)
        else:
            batch = xs[start : start + size]
        batch_key = None if key is None else jax.random.fold_in(key, index)
        found = measure(there, params, batch, rows, batch_key, step, weights)
        for name, value in jax.device_get(found).items():
            totals[name] = totals.get(name, 0.0) + float(value) * size
    return {name: total / len(xs) for name, total in totals.items()}


_MEASURES: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _measure(loss: Loss) -> Callable[..., Metrics]:
    """Compile a loss once while it lives."""
    its_loss = reference(loss)

    def measure(
        placement: Placement | None,
        params: Params,
        xs: Any,
        rows: Any,
        key: Any,
        step: Any,
        weights: Any,
    ) -> Metrics:
        batch = xs if placement is None else placement.gather(xs, rows)
        value, metrics = call_loss(its_loss(), params, batch, key, step=step, weights=weights)
        return {"loss": value, **metrics}

    compiled = jax.jit(measure, static_argnums=0)
    try:
        return _MEASURES.setdefault(loss, compiled)
    except TypeError:  # it allows no weak reference
        return compiled
