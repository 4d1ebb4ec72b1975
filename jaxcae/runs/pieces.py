"""Leaves that several processes hold together: digests that no process needs the whole leaf for.

Where a leaf is split along one axis, each slice across that axis is digested where it lies, with
its place, and the digests are added up modulo 2²⁵⁶. The sum does not depend on who held which
slices, so a leaf that two processes have saved is verified by one, or by four. A leaf that is split
along two axes, or along another one than it was saved along, is put together for a moment.
"""

import hashlib
from typing import Any

import jax
import numpy as np

from jaxcae.devices.processes import everyone

_MODULUS = 2**256


def is_split(leaf: Any) -> bool:
    """Tell whether no process holds all of an array."""
    return isinstance(leaf, jax.Array) and not (
        leaf.is_fully_addressable or leaf.is_fully_replicated
    )


def pieces(leaf: Any) -> list[np.ndarray]:
    """Return the parts of a leaf that this process holds, on the host."""
    if not is_split(leaf):
        return [leaf]
    return [np.asarray(shard.data) for shard in leaf.addressable_shards]


def split_axis(leaf: Any) -> int | None:
    """Return the one axis along which processes share a leaf, or None if it is another case."""
    if not is_split(leaf):
        return None
    shard = leaf.sharding.shard_shape(leaf.shape)
    axes = [axis for axis, size in enumerate(leaf.shape) if shard[axis] != size]
    return axes[0] if len(axes) == 1 else None


def whole(leaf: Any) -> np.ndarray:
    """Return all of a leaf on the host; all processes must call it for one that is split."""
    if not is_split(leaf):
        return np.asarray(leaf)
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(leaf, tiled=True))


def digests_along(leaves: dict[str, tuple[Any, int]]) -> dict[str, str]:
    """Digest leaves slice by slice, each along its axis; `{name: (leaf, axis)}` to hex digests.

    All processes must call it, if one of the leaves is split.
    """
    sums, shared = {}, False
    for name, (leaf, axis) in leaves.items():
        if split_axis(leaf) == axis:
            shared = True
            # Of copies on several devices the first counts, wherever it is.
            mine = (s for s in leaf.addressable_shards if s.replica_id == 0)
            parts = [(s.index[axis].start or 0, np.asarray(s.data)) for s in mine]
            sums[name] = sum(_sum(data, axis, start) for start, data in parts) % _MODULUS
        else:
            sums[name] = _sum(whole(leaf), axis, 0)
    if shared:
        own = {name for name, (leaf, axis) in leaves.items() if split_axis(leaf) == axis}
        parts_of_all = everyone({name: hex(sums[name]) for name in own})
        for name in own:
            sums[name] = sum(int(found[name], 16) for found in parts_of_all) % _MODULUS
    return {name: f"{value:064x}" for name, value in sums.items()}


def _sum(data: np.ndarray, axis: int, start: int) -> int:
    slices = np.ascontiguousarray(np.moveaxis(data, axis, 0))
    head = f"{data.dtype} {axis} ".encode()
    total = 0
    for number, row in enumerate(slices.reshape(len(slices), -1).view(np.uint8), start):
        digest = hashlib.sha256(head + f"{number} ".encode())
        digest.update(row.data)
        total += int.from_bytes(digest.digest(), "big")
    return total % _MODULUS
