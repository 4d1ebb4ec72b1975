"""Where the rows of a batch belong, for samples that are spread over the devices of a mesh."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

DATA_AXIS = "data"


@dataclass(frozen=True)
class Placement:
    """A mesh, and how a batch lies on it; it has a hash, so programs can depend on it.

    Attributes:
        rows: The sharding of a batch whose rows the devices share.
        whole: The same with the rows on every device.
        shards: Into how many parts rows are divided.
    """

    rows: NamedSharding
    whole: NamedSharding
    shards: int

    @classmethod
    def of(cls, xs: Any) -> "Placement | None":
        """Read it off samples: their rows' axes, else an axis called `data`; None on one device."""
        sharding = getattr(xs, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            return None
        mesh, spec = sharding.mesh, tuple(sharding.spec)
        explicit = AxisType.Explicit in mesh.axis_types
        if mesh.size == 1 and not explicit:
            return None
        first, rest = (spec[0], spec[1:]) if spec else (None, ())
        if first is None and DATA_AXIS in set(mesh.axis_names) - set(_names(rest)):
            first = DATA_AXIS
        names = _names((first,))
        shards = int(np.prod([mesh.shape[name] for name in names], dtype=int))
        rows, whole = (NamedSharding(mesh, P(axis, *rest)) for axis in (first, None))
        return cls(rows, whole, shards)

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
        return jnp.resize(rows, (whole,)), weights

    def replicated(self, tree: Any) -> Any:
        """Put what lies on one device on all of the mesh; what is spread already stays."""
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


def _names(spec: tuple[Any, ...]) -> list[str]:
    entries = [entry if isinstance(entry, tuple) else (entry,) for entry in spec]
    return [name for entry in entries for name in entry if name is not None]


def shardings_of(tree: Any) -> tuple[Any, ...]:
    """List the shardings of a tree's leaves."""
    return tuple(leaf.sharding for leaf in jax.tree.leaves(tree))
