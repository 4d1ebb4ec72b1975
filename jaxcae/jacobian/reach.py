"""Which elements of one array an element of another can depend on, axis by axis: boxes.

A unit of a convolution sees a window. The windows of a whole chain of convolutions, poolings and
elementwise functions are read off the equations, as one small boolean matrix for each axis: element
j of an array depends on element i of the source only if every axis that is known lets i through to
j. What is not known of an axis restricts nothing, and what is not known of an equation leaves no
axis known: a window may be taken too large, never too small.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import JaxprEqn, Var

from jaxcae.jacobian.jaxprs import effects_of, shape_of
from jaxcae.jacobian.proofs import EVERYTHING, facts_of, keeps_order


class Axis(NamedTuple):
    """What lies behind an axis: the axis of the source, and which of its places reach which."""

    source: int
    matrix: np.ndarray  # (places in the source, places here), of booleans


class Reach(NamedTuple):
    """What the elements of an array can depend on.

    Attributes:
        shape: The shape that its elements, in row-major order, are thought to have.
        axes: By the axes of this shape, those that are known.
    """

    shape: tuple[int, ...]
    axes: Mapping[int, Axis]


LONGEST_AXIS = 8192
"""What reaches what is not followed along longer axes: its tables would take the memory."""


def whole(shape: Sequence[int]) -> Reach:
    """Start from the source itself."""
    axes = {i: Axis(i, np.eye(n, dtype=bool)) for i, n in enumerate(shape) if n <= LONGEST_AXIS}
    return Reach(tuple(shape), axes)


def follow(equations: Sequence[JaxprEqn], source: Reach, entry: Var) -> dict[Any, Reach]:
    """Carry what is known of the source through equations; what does not move has no entry."""
    found: dict[Any, Reach] = {entry: source}
    for eqn in equations:
        moving = [i for i, v in enumerate(eqn.invars) if isinstance(v, Var) and v in found]
        if moving:
            inputs = [found[eqn.invars[i]] for i in moving]
            for out in eqn.outvars:
                found[out] = _through(eqn, moving, inputs, shape_of(out))
    return found


def _through(eqn: JaxprEqn, moving: list[int], inputs: list[Reach], shape: Any) -> Reach:
    if effects_of(eqn):
        return _nothing(shape)
    atoms = [eqn.invars[i] for i in moving]
    if len(moving) == 1 and keeps_order(eqn):
        return inputs[0]
    facts = [EVERYTHING if i in moving else None for i in range(len(eqn.invars))]
    if all(shape_of(v) == shape for v in atoms) and all(
        fact.elementwise for fact in facts_of(eqn, facts)
    ):
        return _either(inputs, shape)
    rule = _RULES.get(eqn.primitive.name)
    if rule is None or len(eqn.outvars) != 1 or len(moving) != 1:
        return _nothing(shape)
    at = _aligned(inputs[0], shape_of(atoms[0]))
    return Reach(tuple(shape), rule(eqn, moving[0], at.axes)) if at.axes else _nothing(shape)


def _nothing(shape: Any) -> Reach:
    return Reach(tuple(shape), {})


def _either(inputs: list[Reach], shape: Any) -> Reach:
    """Find what is known of something that depends on the same element of several arrays."""
    first = inputs[0]
    if any(other.shape != first.shape for other in inputs):
        inputs = [_aligned(each, shape) for each in inputs]
        first = inputs[0]
    axes = {}
    for b, axis in first.axes.items():
        others = [each.axes.get(b) for each in inputs]
        if all(other is not None and other.source == axis.source for other in others):
            matrices = [other.matrix for other in others if other is not None]
            axes[b] = Axis(axis.source, np.asarray(np.stack(matrices).any(0)))
    return Reach(first.shape, axes)


def _aligned(reach: Reach, shape: tuple[int, ...]) -> Reach:
    """Read an array by the axes that it has, if they are those it is thought to have, but ones."""
    if reach.shape == shape:
        return reach
    wide = [i for i, n in enumerate(reach.shape) if n != 1]
    here = [i for i, n in enumerate(shape) if n != 1]
    if [reach.shape[i] for i in wide] != [shape[i] for i in here]:
        return _nothing(shape)
    places = dict(zip(wide, here, strict=True))
    return Reach(shape, {places[b]: axis for b, axis in reach.axes.items() if b in places})


# --------------------------------------------------------------------------- primitives

Axes = Mapping[int, Axis]
Rule = Callable[[JaxprEqn, int, Axes], dict[int, Axis]]


def _taken(axis: Axis, places: np.ndarray) -> Axis:
    """Take places of an axis, several for each new one: (new places, taps); −1 is nothing."""
    padded = np.concatenate([axis.matrix, np.zeros_like(axis.matrix[:, :1])], 1)
    return Axis(axis.source, np.asarray(padded[:, places].any(-1)))


def _window(n: int, size: int, taps: int, step: int, low: int, hole: int, spread: int) -> Any:
    """List the places that each of n windows covers, of an axis of that size."""
    at = np.arange(n)[:, None] * step - low + np.arange(taps)[None, :] * hole
    inside = (at >= 0) & (at <= (size - 1) * spread) & (at % spread == 0)
    return np.where(inside, at // spread, -1)


def _convolution(eqn: JaxprEqn, position: int, axes: Axes) -> dict[int, Axis]:
    if position != 0:
        return {}
    p, numbers = eqn.params, eqn.params["dimension_numbers"]
    image, kernel, out = map(shape_of, (*eqn.invars, *eqn.outvars))
    found = {}
    if p["batch_group_count"] == 1 and numbers.lhs_spec[0] in axes:
        found[numbers.out_spec[0]] = axes[numbers.lhs_spec[0]]
    for i, (low, _) in enumerate(p["padding"]):
        b, c, taps = (
            numbers.lhs_spec[2 + i],
            numbers.out_spec[2 + i],
            kernel[numbers.rhs_spec[2 + i]],
        )
        if b in axes:
            places = _window(
                out[c], image[b], taps, p["window_strides"][i], low,
                p["rhs_dilation"][i], p["lhs_dilation"][i],
            )  # fmt: skip
            found[c] = _taken(axes[b], places)
    return found


def _pooling(eqn: JaxprEqn, _: int, axes: Axes) -> dict[int, Axis]:
    p, before, after = eqn.params, shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    return {
        b: _taken(
            axis,
            _window(
                after[b], before[b], p["window_dimensions"][b], p["window_strides"][b],
                p["padding"][b][0], p["window_dilation"][b], p["base_dilation"][b],
            ),
        )
        for b, axis in axes.items()
    }  # fmt: skip


def _reduction(eqn: JaxprEqn, _: int, axes: Axes) -> dict[int, Axis]:
    gone = set(eqn.params["axes"])
    left = [b for b in range(len(shape_of(eqn.invars[0]))) if b not in gone]
    return {left.index(b): axis for b, axis in axes.items() if b not in gone}


def _product(eqn: JaxprEqn, position: int, axes: Axes) -> dict[int, Axis]:
    """Keep what is not summed over: batch axes first, then the left operand's, then the right's."""
    contracted, batch = eqn.params["dimension_numbers"]
    free = [
        [b for b in range(len(shape_of(v))) if b not in (*contracted[i], *batch[i])]
        for i, v in enumerate(eqn.invars)
    ]
    order = [*batch[position], *([None] * len(free[0]) if position else []), *free[position]]
    return {order.index(b): axis for b, axis in axes.items() if b in order}


def _broadcast(eqn: JaxprEqn, _: int, axes: Axes) -> dict[int, Axis]:
    before, after = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    where = eqn.params["broadcast_dimensions"]
    return {where[b]: axis for b, axis in axes.items() if before[b] == after[where[b]]}


def _transpose(eqn: JaxprEqn, _: int, axes: Axes) -> dict[int, Axis]:
    order = eqn.params["permutation"]
    return {c: axes[b] for c, b in enumerate(order) if b in axes}


def _reverse(eqn: JaxprEqn, _: int, axes: Axes) -> dict[int, Axis]:
    turned = eqn.params["dimensions"]
    return {
        b: Axis(axis.source, axis.matrix[:, ::-1]) if b in turned else axis
        for b, axis in axes.items()
    }


def _slice(eqn: JaxprEqn, _: int, axes: Axes) -> dict[int, Axis]:
    p = eqn.params
    steps = p["strides"] or [1] * len(p["start_indices"])
    return {
        b: Axis(
            axis.source,
            axis.matrix[:, p["start_indices"][b] : p["limit_indices"][b] : steps[b]],
        )
        for b, axis in axes.items()
    }


def _pad(eqn: JaxprEqn, position: int, axes: Axes) -> dict[int, Axis]:
    if position != 0:
        return {}
    before, after = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    return {
        b: _taken(axis, _window(after[b], before[b], 1, 1, int(low), 1, int(inner) + 1))
        for (b, axis), (low, _, inner) in (
            (item, eqn.params["padding_config"][item[0]]) for item in axes.items()
        )
    }


_RULES: dict[str, Rule] = {
    "conv_general_dilated": _convolution,
    "reduce_window_sum": _pooling,
    "reduce_window_max": _pooling,
    "reduce_window_min": _pooling,
    "reduce_sum": _reduction,
    "reduce_max": _reduction,
    "reduce_min": _reduction,
    "dot_general": _product,
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "rev": _reverse,
    "slice": _slice,
    "pad": _pad,
}


# --------------------------------------------------------------------------- what follows


def touching(matrix: np.ndarray) -> np.ndarray:
    """Tell which two places of an axis share a place of the source."""
    return (matrix.T.astype(np.int32) @ matrix.astype(np.int32)) > 0


def colours(meets: np.ndarray) -> np.ndarray:
    """Colour places so that none of a colour meet, as few colours as come first."""
    found = np.zeros(len(meets), int)
    for j in range(1, len(meets)):
        taken = set(found[:j][meets[j, :j]])
        found[j] = next(c for c in range(j + 1) if c not in taken)
    return found


def group(shape: tuple[int, ...], meets: Mapping[int, np.ndarray]) -> np.ndarray:
    """Number the elements of an array so that no two of a number meet, on some axis that is known.

    Elements meet only if their places do on every axis that is known: of two that differ on one,
    places of a colour there are enough.
    """
    labels = np.zeros((), int)
    for b, n in enumerate(shape):
        own = colours(meets[b]) if b in meets else np.arange(n)
        labels = labels[..., None] * (own.max(initial=0) + 1) + own
    _, numbers = np.unique(labels.reshape(-1), return_inverse=True)
    return numbers.reshape(-1)
