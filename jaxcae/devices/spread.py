"""Over which devices a batch is spread: told by the types of arrays, inside `jit` as well."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcae.devices.layout import DATA


class Spread(NamedTuple):
    """An axis of a mesh over which devices share work.

    Attributes:
        mesh: The mesh.
        axis: The axis, or several.
        shares: How many devices share.
        explicit: Whether shardings are part of types there.
    """

    mesh: Any
    axis: Any
    shares: int
    explicit: bool

    @classmethod
    def of(cls, array: Any) -> "Spread | None":
        """Read it off an array: the axes of its rows where types tell them, else `data`.

        None on one device, and inside `shard_map`, where each device is on its own already.
        """
        sharding = getattr(jax.typeof(array), "sharding", None)
        if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
            return None
        mesh = sharding.mesh
        kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
        if AxisType.Manual in kinds.values() or DATA not in kinds:
            return None
        first = next(iter(sharding.spec), None)
        axis = DATA if first is None else first
        names = axis if isinstance(axis, tuple) else (axis,)
        shares = int(np.prod([mesh.shape[name] for name in names], dtype=int))
        explicit = kinds[names[0]] == AxisType.Explicit
        return cls(mesh, axis, shares, explicit) if shares > 1 else None

    def parts(self, xs: Any) -> Any:
        """Cut an array in as many equal parts as there are devices, on a new first axis."""
        parts = xs.reshape(self.shares, xs.shape[0] // self.shares, *xs.shape[1:])
        return parts if self.explicit else self.lay(parts, self._first(parts.ndim))

    def copies(self, array: Any) -> Any:
        """Give each device a copy of its own, on a new first axis."""
        if self.explicit:
            spec = jax.typeof(array).sharding.spec
            sharding = NamedSharding(self.mesh, P(self.axis, *spec))
            return jax.lax.broadcast(array, (self.shares,), out_sharding=sharding)
        copies = jnp.broadcast_to(array, (self.shares, *array.shape))
        return self.lay(copies, self._first(copies.ndim))

    def _first(self, ndim: int) -> P:
        return P(self.axis, *[P.UNCONSTRAINED] * (ndim - 1))

    def lay(self, array: Any, spec: P) -> Any:
        """Lay an array over the mesh inside a compiled function."""
        sharding = NamedSharding(self.mesh, spec)
        if self.explicit:
            return jax.sharding.reshard(array, sharding)
        return jax.lax.with_sharding_constraint(array, sharding)
