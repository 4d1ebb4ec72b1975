"""A layout: which device holds what. It is data; whatever computes stays a pure function."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcae.errors import InputError, check_positive_int

DATA, FEATURES = "data", "features"
"""The axes of a mesh: over one the devices share the rows of a batch, over the other a row's
features. Meshes of your own are understood where they use these names."""


@dataclass(frozen=True)
class Layout:
    """A mesh, and how the leaves of a state lie on it.

    A leaf lies as the first rule says whose pattern is found in its name, which is its path, such
    as `params/encoder/layer_0/kernel`; the optimizer's moments carry the path of their parameter.
    What no rule names is on every device, but for two things: where the mesh has an axis
    `features`, the widest axis found among the leaves (the features of the samples: encoder's
    first kernel, decoder's last) is split over it; and with `shard_params` the longest other axis
    of every matrix that the axis `data` divides is split over that.

    Attributes:
        mesh: The devices; its axes are `data` and, where wanted, `features`.
        rules: Pairs of a regular expression and a `PartitionSpec`.
        shard_params: Whether parameters and the optimizer's state are split over the axis `data`.
    """

    mesh: Mesh
    rules: tuple[tuple[str, P], ...] = ()
    shard_params: bool = False

    def shardings(self, tree: Any) -> Any:
        """Say where each leaf of a state lies; its leaves may be `jax.ShapeDtypeStruct`s.

        Raises:
            InputError: If the devices do not divide an axis that is to be split over them.
        """
        sizes = [size for leaf in jax.tree.leaves(tree) for size in np.shape(leaf)]
        widest = max(sizes, default=0)

        def one(path: Any, leaf: Any) -> NamedSharding:
            name, shape = jax.tree_util.keystr(path, simple=True, separator="/"), np.shape(leaf)
            ruled = (spec for pattern, spec in self.rules if re.search(pattern, name))
            spec = next(ruled, None)
            if spec is None:
                spec = self._by_shape(shape, widest)
            _check_divides(self.mesh, name, shape, spec)
            return NamedSharding(self.mesh, spec)

        return jax.tree_util.tree_map_with_path(one, tree)

    def _by_shape(self, shape: tuple[int, ...], widest: int) -> P:
        axes: list[str | None] = [None] * len(shape)
        if FEATURES in self.mesh.axis_names and widest in shape:
            axes[shape.index(widest)] = FEATURES
        if self.shard_params and len(shape) > 1 and DATA in self.mesh.axis_names:
            count = self.mesh.shape[DATA]
            free = [i for i, size in enumerate(shape) if axes[i] is None and size % count == 0]
            if free:
                axes[max(free, key=lambda i: shape[i])] = DATA
        while axes and axes[-1] is None:  # so that equal specs are equal
            axes.pop()
        return P(*axes)


def layout(
    devices: int | Sequence[jax.Device] | None = None,
    features: int = 1,
    shard_params: bool = False,
) -> Layout:
    """Lay training and scoring out over devices, for `fit(..., layout=)` and its like.

    Every device takes an equal share of the rows of each batch. A layout changes where a run is
    computed, not what it is: results are those of one device up to rounding.

    Args:
        devices: How many of `jax.devices()`, or which; all by default.
        features: Over how many of them each row is split, for samples wider than any hidden layer:
            a product with the first kernel is then a sum of parts, and no device holds that kernel
            whole. It divides the number of devices and of features.
        shard_params: Split parameters and the optimizer's state over the devices, too ("FSDP"):
            each step gathers what it needs. For models too large for one device.

    Returns:
        The layout, on a mesh of axes that XLA lays out by itself (`AxisType.Auto`).

    Raises:
        InputError: If there are not so many devices, or `features` does not divide them.

    Example:
        >>> import jaxcae
        >>> jaxcae.layout(devices=1).mesh.axis_names
        ('data',)
    """
    chosen = _devices(devices)
    check_positive_int("features", features)
    if len(chosen) % features:
        raise InputError(
            f"features cannot be split over {features} of {len(chosen)} devices. Split them over "
            f"{', '.join(str(n) for n in range(1, len(chosen) + 1) if len(chosen) % n == 0)}."
        )
    if features == 1:
        shape: tuple[int, ...] = (len(chosen),)
        names: tuple[str, ...] = (DATA,)
    else:
        shape, names = (len(chosen) // features, features), (DATA, FEATURES)
    # What the user's own functions are traced with must not ask them for shardings.
    kinds = (AxisType.Auto,) * len(names)
    mesh = jax.make_mesh(shape, names, axis_types=kinds, devices=chosen)
    return Layout(mesh, (), shard_params)


def place(layout: Layout, state: Any) -> Any:
    """Put a state, or any tree of arrays, where the layout says; what lies there already stays.

    Raises:
        InputError: If the devices do not divide an axis that is to be split over them.
    """
    return jax.device_put(state, layout.shardings(state))


def gather(tree: Any) -> Any:
    """Bring a tree of arrays whole to one device; what is on no mesh stays."""

    def one(leaf: Any) -> Any:
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            return leaf
        return jax.device_put(leaf, NamedSharding(sharding.mesh, P())).addressable_data(0)

    return jax.tree.map(one, tree)


def batch_sharding(layout: Layout) -> NamedSharding:
    """Say how a batch of samples in rows lies: rows over `data`, their features over `features`."""
    names = [name if name in layout.mesh.axis_names else None for name in (DATA, FEATURES)]
    return NamedSharding(layout.mesh, P(*names) if names[1] else P(names[0]))


def _devices(devices: int | Sequence[jax.Device] | None) -> list[jax.Device]:
    there = jax.devices()
    if devices is None:
        return there
    if not isinstance(devices, int | np.integer):
        if not len(devices):
            raise InputError("devices must name at least one device, got none.")
        return list(devices)
    check_positive_int("devices", devices)
    if devices > len(there):
        raise InputError(
            f"`devices={devices}`: there {'is' if len(there) == 1 else 'are'} {len(there)} here "
            f"({there[0].platform}). Ask for at most {len(there)}."
        )
    return there[:devices]


def _check_divides(mesh: Mesh, name: str, shape: tuple[int, ...], spec: P) -> None:
    for size, entry in zip(shape, spec, strict=False):
        names = entry if isinstance(entry, tuple) else (entry,)
        count = int(np.prod([mesh.shape[n] for n in names if n is not None], dtype=int))
        if size % count:
            raise InputError(
                f"{name} of shape {shape} cannot be split over {'×'.join(map(str, names))}: "
                f"{count} devices do not divide {size}. Choose a number that does."
            )
