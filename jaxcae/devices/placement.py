"""Where the rows of a batch belong, for samples that are spread over the devices of a mesh."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcae.devices.layout import DATA, Layout, batch_sharding, place
from jaxcae.errors import InputError


@dataclass(frozen=True)
class Placement:
    """A mesh, and how a batch lies on it; it has a hash, so programs can depend on it.

    Attributes:
        rows: The sharding of a batch whose rows the devices share.
        whole: The same with the rows on every device.
        shards: Into how many parts rows are divided.
        layout: How a state lies on the mesh, where that is given.
    """

    rows: NamedSharding
    whole: NamedSharding
    shards: int
    layout: Layout | None = None

    @classmethod
    def of(cls, xs: Any, layout: Layout | None = None) -> "Placement | None":
        """Read it off samples, where they lie on a mesh already, or a layout; None on one device.

        The rows of samples that are placed are shared along their own axes, else along `data`.
        """
        sharding = getattr(xs, "sharding", None)
        if layout is not None and getattr(sharding, "mesh", None) != layout.mesh:
            return cls._by(layout)
        if not isinstance(sharding, NamedSharding):
            return None
        mesh, spec = sharding.mesh, tuple(sharding.spec)
        explicit = AxisType.Explicit in mesh.axis_types
        if mesh.size == 1 and not explicit and layout is None:
            return None
        first, rest = (spec[0], spec[1:]) if spec else (None, ())
        if first is None and DATA in set(mesh.axis_names) - set(_names(rest)):
            first = DATA
        names = _names((first,))
        shards = int(np.prod([mesh.shape[name] for name in names], dtype=int))
        rows, whole = (NamedSharding(mesh, P(axis, *rest)) for axis in (first, None))
        return cls(rows, whole, shards, layout)

    @classmethod
    def _by(cls, layout: Layout) -> "Placement":
        rows = batch_sharding(layout)
        whole = NamedSharding(layout.mesh, P(None, *rows.spec[1:]))
        shards = layout.mesh.shape[DATA] if DATA in layout.mesh.axis_names else 1
        return cls(rows, whole, shards, layout)

    def put(self, xs: Any) -> Any:
        """Put samples on every device, each its part of their features; placed ones stay.

        Raises:
            InputError: If the devices cannot share the features.
        """
        if self.holds(xs):
            return xs
        self._check(xs.shape)
        return _put(xs, self.whole)

    def holds(self, xs: Any) -> bool:
        """Tell whether samples lie on this mesh already."""
        sharding = getattr(xs, "sharding", None)
        return isinstance(sharding, NamedSharding) and sharding.mesh == self.rows.mesh

    def share(self, batch: Any, weighed: bool, *, stacked: bool = False) -> tuple[Any, Any]:
        """Put a batch from the host on the devices, to each its rows; return weights, too.

        Args:
            batch: Samples in rows.
            weighed: Whether the rows may be made up to a number that the devices can share.
            stacked: Whether it is a stack of batches of one size.
        """
        self._check(batch.shape[stacked:])
        size = batch.shape[stacked]
        rows, weights = np.arange(size), None
        if weighed:
            rows, weights = self.padded(rows)
        if len(rows) > size:
            batch = np.take(batch, rows, axis=int(stacked))
        sharding = self.rows if len(rows) % self.shards == 0 else self.whole
        if stacked:
            sharding = NamedSharding(sharding.mesh, P(None, *sharding.spec))
        return _put(batch, sharding), weights

    def rows_here(self, size: int, weighed: bool) -> Any:
        """Number the rows of a batch of so many that the devices of this process take."""
        rows = np.arange(size)
        if weighed:
            rows, _ = self.padded(rows)
        if len(rows) % self.shards:
            return rows
        along = NamedSharding(self.rows.mesh, P(self.rows.spec[0]))
        parts = along.addressable_devices_indices_map((len(rows),)).values()
        return np.unique(np.concatenate([rows[part] for part in parts if part is not None]))

    def _check(self, shape: tuple[int, ...]) -> None:
        for size, entry in zip(shape[1:], self.rows.spec[1:], strict=False):
            count = int(np.prod([self.rows.mesh.shape[n] for n in _names((entry,))], dtype=int))
            if size % count:
                raise InputError(
                    f"{size} features cannot be split over {count} devices. Split them over a "
                    "number that divides them."
                )

    def gather(self, xs: Any, rows: Any) -> Any:
        """Take rows of the samples, each device its share if they can be shared equally."""
        sharding = self.rows if len(rows) % self.shards == 0 else self.whole
        if AxisType.Explicit in sharding.mesh.axis_types:
            return xs.at[rows].get(out_sharding=sharding)
        return jax.lax.with_sharding_constraint(xs[rows], sharding)

    def padded(self, rows: Any) -> tuple[Any, Any]:
        """Repeat rows until the devices can share them; the weights of the copies are 0."""
        size = len(rows)
        if size % self.shards == 0:
            return rows, None
        whole = -(-size // self.shards) * self.shards
        weights = (np.arange(whole) < size).astype(np.float32)
        resize = np.resize if isinstance(rows, np.ndarray) else jnp.resize
        return resize(rows, (whole,)), weights

    def placed(self, tree: Any) -> Any:
        """Put a state where its layout says; without one, what is spread already stays.

        The rest goes to every device of the mesh.
        """
        if self.layout is not None:
            return place(self.layout, tree)
        everywhere = NamedSharding(self.rows.mesh, P())

        def put(leaf: Any) -> Any:
            there = isinstance(getattr(leaf, "sharding", None), NamedSharding)
            return leaf if there else jax.device_put(leaf, everywhere)

        return jax.tree.map(put, tree)

    def pinned(self, tree: Any, shardings: tuple[Any, ...]) -> Any:
        """Keep the leaves of a tree where they were, which the compiler need not do by itself."""
        if AxisType.Explicit in self.rows.mesh.axis_types:
            return tree
        leaves, structure = jax.tree.flatten(tree)
        kept = [
            jax.lax.with_sharding_constraint(leaf, sharding)
            for leaf, sharding in zip(leaves, shardings, strict=True)
        ]
        return jax.tree.unflatten(structure, kept)


def _put(array: Any, sharding: NamedSharding) -> Any:
    """Put an array on the devices of a mesh, of those of other processes not asking for it.

    `jax.device_put` would first send all of it around to see that it is the same in all processes.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])


def _names(spec: tuple[Any, ...]) -> list[str]:
    entries = [entry if isinstance(entry, tuple) else (entry,) for entry in spec]
    return [name for entry in entries for name in entry if name is not None]


def shardings_of(tree: Any) -> tuple[Any, ...]:
    """List the shardings of a tree's leaves."""
    return tuple(leaf.sharding for leaf in jax.tree.leaves(tree))
