"""How a batch is mapped: so many samples at a time, and on each device its own."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcae.devices.spread import Spread
from jaxcae.jacobian.jaxprs import struct

NOMINAL_BATCH = 1024
"""The batch to plan for where its size is symbolic, as in `jax.export`."""


def map_batch(per_sample: Callable[[Any], Any], xs: Any, chunk_size: int | None) -> Any:
    """Map a function of one sample over a batch, so many at a time, on each device of its own.

    Chunks are rematerialised, or the backward pass would hold what they were to avoid. They are
    equal, the last one filled up with the batch's last sample: so there is one program of a chunk,
    whether the batch's size is a number or a symbol.
    """
    batch, over = xs.shape[0], _sharing(xs)
    share = batch if over is None else batch // over.shares
    if chunk_size is None or (isinstance(batch, int) and chunk_size >= share):
        return jax.vmap(per_sample)(xs)
    if over is None:
        return _in_chunks(jax.vmap(per_sample), xs, chunk_size, axis=0)
    # As many copies of what the samples share as there are devices, one on each: so gradients are
    # summed over devices once, after the loop, and not in every turn of it.
    mapped, shared = jax.closure_convert(per_sample, struct(xs, of_sample=True))
    parts, copies = over.parts(xs), [over.copies(leaf) for leaf in shared]

    def own(part: Any, *shared: Any) -> Any:
        return jax.vmap(lambda x: mapped(x, *shared))(part)

    found = _in_chunks(lambda chunk: jax.vmap(own)(chunk, *copies), parts, chunk_size, axis=1)
    return jax.tree.map(lambda a: a.reshape(xs.shape[0], *a.shape[2:]), found)


def _in_chunks(function: Callable[[Any], Any], xs: Any, chunk_size: int, axis: int) -> Any:
    """Map a function of a chunk over the chunks of an axis, the first or the second."""
    batch = xs.shape[axis]
    count = (batch + chunk_size - 1) // chunk_size
    size = (batch + count - 1) // count if isinstance(batch, int) else chunk_size
    before, after = xs.shape[:axis], xs.shape[axis + 1 :]
    last = xs[-1:] if axis == 0 else xs[:, -1:]
    rest = jnp.broadcast_to(last, (*before, count * size - batch, *after))
    chunks = jnp.concatenate([xs, rest], axis).reshape(*before, count, size, *after)
    # Outside the map, a chunk is traced for all of its samples at once; and a loop shares nothing
    # with what it recomputes, so that nothing has to keep XLA from sharing.
    step = jax.checkpoint(function, prevent_cse=False)
    found = jax.lax.map(step, jnp.moveaxis(chunks, axis, 0))

    def joined(a: Any) -> Any:
        a = jnp.moveaxis(a, 0, axis)
        a = a.reshape(*before, count * size, *a.shape[axis + 2 :])
        return a[:batch] if axis == 0 else a[:, :batch]

    return jax.tree.map(joined, found)


def share_of(xs: Any) -> tuple[int, int]:
    """Take the size of a device's share of a batch, nominal where symbolic, and their number."""
    over, batch = _sharing(xs), xs.shape[0]
    shares = 1 if over is None else over.shares
    return (batch // shares if isinstance(batch, int) else NOMINAL_BATCH), shares


def _sharing(xs: Any) -> Spread | None:
    """Find the devices that share a batch equally."""
    over = None if isinstance(xs, jax.ShapeDtypeStruct) else Spread.of(xs)
    batch = xs.shape[0]
    if over is None or not isinstance(batch, int) or batch % over.shares:
        return None
    return over
