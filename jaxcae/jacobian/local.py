"""The quadratic form mᵀ(G ∘ H)m where units interact with their neighbours alone.

G = TTᵀ holds the inner products of what each unit of an elementwise segment sees of the features,
H = RᵀR those of what it gives to the code. Units whose windows share nothing have a product of 0,
so behind a convolution G ∘ H is a band: with p the places of an image, c its features and o the few
offsets between places that share anything on both sides,

    mᵀ(G ∘ H)m = Σ_o w_o Σ_p m_pᵀ C_{o,p} m_{p+o},    w_0 = 1, else 2 (half of the offsets),

places · offsets · c² operations a sample instead of (places · c)², and nothing of the size of G is
ever made. The blocks C come from the windows themselves: units of which no two share a place are
pulled back (or pushed forward) together, as in `groups.py`, and each window is cut out again.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcae.jacobian import affine
from jaxcae.jacobian.bound import Bound
from jaxcae.jacobian.cost import flops
from jaxcae.jacobian.products import matmul
from jaxcae.jacobian.reach import Reach, follow, group, touching, whole
from jaxcae.jacobian.structure import Structure

Offset = tuple[int, ...]


class Side(NamedTuple):
    """How units are coupled through one end.

    Attributes:
        inward: Whether the end is the features, and not the code.
        order: The segments between the end and the units, from the units outwards.
        windows: By axis of places, which places of the end a unit's place shares: (end, places).
            Without any the end is dense.
        sources: The axes of the end that these stand for.
        shape: The shape of the end.
        numbers: The group of each unit, where windows are known.
    """

    inward: bool
    order: tuple[int, ...]
    windows: dict[int, np.ndarray]
    sources: dict[int, int]
    shape: tuple[int, ...]
    numbers: np.ndarray | None

    @property
    def size(self) -> int:
        """How many numbers a window holds."""
        n = math.prod(self.shape)
        for b, matrix in self.windows.items():
            n = n // self.shape[self.sources[b]] * int(matrix.sum(0).max())
        return n


class Local(NamedTuple):
    """The places, features and offsets of a band, and what couples the units on both sides.

    Attributes:
        shape: The shape of the units.
        places: The axes of places; the others are features.
        offsets: Half of the offsets between places that interact, 0 first.
        input: The side of the features.
        output: That of the code.
    """

    shape: tuple[int, ...]
    places: tuple[int, ...]
    offsets: tuple[Offset, ...]
    input: Side
    output: Side

    @property
    def extent(self) -> tuple[int, ...]:
        """The number of places along each axis."""
        return tuple(self.shape[b] for b in self.places)

    @property
    def features(self) -> int:
        """The number of features at a place."""
        return math.prod(self.shape) // math.prod(self.extent)

    @property
    def block(self) -> float:
        """Multiplications of one product with all blocks."""
        return float(math.prod(self.extent) * len(self.offsets) * self.features**2)

    def once(self, structure: Structure) -> float:
        """Count the operations of all blocks."""
        total = 2 * self.block
        for side in (self.input, self.output):
            segments = [structure.segments[i] for i in side.order]
            if side.numbers is None:
                total += sum(map(affine.kernel_flops, segments)) + 2 * self.block * side.size
                for first, last in itertools.pairwise(segments):
                    total += 2 * first.in_size * first.out_size * last.in_size
            else:
                groups = int(side.numbers.max()) + 1
                total += groups * sum(flops(s.linear) for s in segments)
                total += 2 * self.block * side.size
        return total


def find_local(structure: Structure, position: int) -> Local | None:
    """Find the band at an elementwise segment of one array; None where all units interact."""
    segments = structure.segments
    segment = segments[position]
    before, after = range(position), range(position + 1, len(segments))
    if not segment.is_diagonal or any(
        segments[i].kind != "affine" or segments[i].scale is not None for i in (*before, *after)
    ):
        return None
    seen = _seen(structure, position)
    if seen is None:
        return None
    equations = [eqn for i in after for eqn in segments[i].equations]
    (unit,) = segment.outputs
    given = follow(equations, whole(seen.shape), unit).get(structure.program.code)
    if given is None:
        return None
    sides = (
        _side(tuple(reversed(before)), structure.program.x.shape, seen.shape, seen, inward=True),
        _side(tuple(after), given.shape, seen.shape, given, inward=False),
    )
    places = tuple(sorted({b for side in sides for b in side.windows}))
    if not places:
        return None
    offsets = _offsets(seen.shape, places, sides)
    return Local(seen.shape, places, offsets, *sides)


def find_local_input(structure: Structure, position: int) -> Local | None:
    """Find the band of units behind affine segments alone, whatever they give to the code."""
    segment, before = structure.segments[position], structure.segments[:position]
    if not segment.is_diagonal or any(s.kind != "affine" or s.scale is not None for s in before):
        return None
    seen = _seen(structure, position)
    if seen is None:
        return None
    ends = structure.program.x.shape, tuple(seen.shape)
    side = _side(tuple(reversed(range(position))), *ends, seen, inward=True)
    places = tuple(sorted(side.windows))
    if not places:
        return None
    output = Side(False, (), {}, {}, (structure.code_size,), None)
    return Local(seen.shape, places, _offsets(seen.shape, places, [side]), side, output)


def _seen(structure: Structure, position: int) -> Reach | None:
    """Find what the units of an elementwise segment see of the features, if anything is known."""
    if not position:
        return None
    equations = [eqn for s in structure.segments[:position] for eqn in s.equations]
    found = follow(equations, whole(structure.program.x.shape), structure.program.sample)
    seen = found.get(structure.segments[position].inputs[0])
    return seen if seen is not None and seen.axes else None


def _side(
    order: tuple[int, ...], end: Any, units: tuple[int, ...], reach: Reach, *, inward: bool
) -> Side:
    if inward:
        windows = {b: axis.matrix for b, axis in reach.axes.items()}
        sources = {b: axis.source for b, axis in reach.axes.items()}
    else:  # the units are the source, and the code is the end
        windows = {axis.source: axis.matrix.T for axis in reach.axes.values()}
        sources = {axis.source: b for b, axis in reach.axes.items()}
    trivial = [b for b in windows if units[b] == 1 or windows[b].all()]
    for b in trivial:
        del windows[b]
    numbers = group(units, {b: touching(m) for b, m in windows.items()}) if windows else None
    return Side(inward, order, windows, sources, tuple(end), numbers)


def _offsets(
    shape: tuple[int, ...], places: tuple[int, ...], sides: Sequence[Side]
) -> tuple[Offset, ...]:
    """List the offsets, axis by axis, at which any two places interact on every side."""
    choices = []
    for b in places:
        meets = np.ones((shape[b], shape[b]), bool)
        for side in sides:
            if b in side.windows:
                meets &= touching(side.windows[b])
        rows, columns = np.nonzero(meets)
        choices.append(sorted(set((columns - rows).tolist()) | {0}))
    half = [o for o in itertools.product(*choices) if o >= (0,) * len(places)]
    return tuple(sorted(half))


# --------------------------------------------------------------------------- with values


class Band:
    """The blocks of a band, computed once; then forms of the slopes of samples."""

    def __init__(self, local: Local, bound: Bound, rows: Any = None) -> None:
        """Compute the blocks; the `rows` (any, units) are what the code takes, if known."""
        self.local = local
        blocks = self._coupling(local.input, bound)
        blocks *= self._coupling(local.output, bound) if rows is None else self._meeting(rows)
        weights = [1.0 if not any(offset) else 2.0 for offset in local.offsets]
        blocks = blocks * jnp.asarray(weights, blocks.dtype)[:, None, None, None]
        count, n, c, _ = blocks.shape
        self.blocks = jnp.moveaxis(blocks, 0, 2).reshape(n, c, count * c)

    def inner(self, first: Sequence[Any], second: Sequence[Any]) -> Float[Array, ""]:
        """Compute mᵀ(G ∘ H)n for the slopes of two samples."""
        (m,), (n,) = first, second
        found = self._form(m, n)
        return found if second is first else (found + self._form(n, m)) / 2

    def of_difference(self, first: Sequence[Any], second: Sequence[Any]) -> Float[Array, ""]:
        """Compute (m − n)ᵀ(G ∘ H)(m − n), the squared distance of two samples' Jacobians."""
        difference = [m - n for m, n in zip(first, second, strict=True)]
        return self.inner(difference, difference)

    def _form(self, m: Any, n: Any) -> Any:
        here = self._by_place(m[None])[..., 0]
        there = self._neighbours(self._by_place(n[None]))[..., 0]
        there = jnp.moveaxis(there, 0, 1).reshape(here.shape[0], -1)
        image = matmul(here[:, None, :], self.blocks)[:, 0, :]
        return jnp.sum(image * there)

    def _by_place(self, stack: Any) -> Any:
        """Sort the units of rows by place and feature: (places, features, rows)."""
        local = self.local
        array = stack.reshape(-1, *local.shape)
        rest = [b for b in range(len(local.shape)) if b not in local.places]
        found = array.transpose([1 + b for b in (*local.places, *rest)] + [0])
        return found.reshape(math.prod(local.extent), local.features, stack.shape[0])

    def _neighbours(self, array: Any, xp: Any = jnp) -> Any:
        """Take for each place what stands at each offset from it, along a new first axis."""
        extent = self.local.extent
        spread = array.reshape(*extent, *array.shape[1:])
        found = []
        for offset in self.local.offsets:
            pads = [(max(-o, 0), max(o, 0)) for o in offset] + [(0, 0)] * (array.ndim - 1)
            starts = [max(o, 0) for o in offset]
            where = tuple(slice(a, a + n) for a, n in zip(starts, extent, strict=True))
            found.append(xp.pad(spread, pads)[where].reshape(array.shape))
        return xp.stack(found)

    def _coupling(self, side: Side, bound: Bound) -> Float[Array, "offsets places c c"]:
        """Compute the inner products of what units see, or give, at each offset."""
        if side.numbers is None:
            return self._meeting(_dense(side, bound))
        windows, valid, masks = self._windows(side)
        numbers = np.asarray(side.numbers).reshape(1, -1)
        groups = self._by_place(numbers)[..., 0]  # (places, features)
        images = _grouped(side, bound)  # (groups, end)
        own = images[groups[:, :, None], windows[:, None, :]]
        own = jnp.where(valid[:, None, :], own, 0)
        theirs = images[self._neighbours(groups, np)[..., None], windows[None, :, None, :]]
        theirs = jnp.where(masks[:, :, None, :], theirs, 0)
        return matmul(own[None], jnp.swapaxes(theirs, 2, 3))

    def _meeting(self, stack: Float[Array, "rows units"]) -> Float[Array, "offsets places c c"]:
        rows = self._by_place(stack)
        return matmul(rows[None], jnp.swapaxes(self._neighbours(rows), 2, 3))

    def _windows(self, side: Side) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """List the window of each place, flat, what of it is real, and what neighbours share."""
        local, axes = self.local, range(len(side.shape))
        here = {side.sources[b]: b for b in side.windows}
        taken, real = [], []
        for a in axes:
            matrix = side.windows[here[a]] if a in here else np.ones((side.shape[a], 1), bool)
            width = int(matrix.sum(0).max())
            order = np.argsort(~matrix, axis=0, kind="stable")[:width].T  # (places, width)
            taken.append(order)
            real.append(np.take_along_axis(matrix.T, order, 1))
        count = math.prod(local.extent)
        at = np.indices(local.extent).reshape(len(local.places), count)

        def row(a: int, places: np.ndarray) -> np.ndarray:
            return places[local.places.index(here[a])] if a in here else np.zeros(count, int)

        index = np.zeros((count, 1), int)
        valid = np.ones((count, 1), bool)
        for a in axes:
            mine = row(a, at)
            index = index[..., None] * side.shape[a] + taken[a][mine][:, None, :]
            valid = valid[..., None] & real[a][mine][:, None, :]
            index, valid = index.reshape(count, -1), valid.reshape(count, -1)
        shared = np.stack([valid] * len(local.offsets))
        for o, offset in enumerate(local.offsets):
            moved = at + np.array(offset)[:, None]
            extent = np.array(local.extent)[:, None]
            inside = ((moved >= 0) & (moved < extent)).all(0)
            moved = np.clip(moved, 0, extent - 1)
            coordinates = np.unravel_index(index, side.shape)
            shared[o] &= inside[:, None]
            for a, b in here.items():
                shared[o] &= side.windows[b][coordinates[a], row(a, moved)[:, None]]
        return index, valid, shared


def _dense(side: Side, bound: Bound) -> Float[Array, "end units"]:
    """Compute the matrix between a dense end and the units."""
    found: Any = None
    for i in side.order:
        kernel = bound.kernel(i) if side.inward else bound.kernel(i).T
        found = kernel if found is None else kernel @ found
    return found


def _grouped(side: Side, bound: Bound) -> Float[Array, "groups end"]:
    """Send groups of units to the end: pulled back to features, pushed forward to the code."""
    numbers = np.asarray(side.numbers)
    stack = jnp.asarray(np.arange(numbers.max() + 1)[:, None] == numbers[None, :], bound.dtype)
    stack = jax.lax.optimization_barrier(stack)  # or XLA convolves constants, slowly
    for i in side.order:
        forward = not side.inward
        _, operator = bound.linearize(i, bound.origin(i), forward=forward, linear=True)
        stack = jax.vmap(operator)(stack)
    return stack
