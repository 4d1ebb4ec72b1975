"""Recognise one nonlinear stretch between matrices whose Jacobian is diagonal plus low rank.

y = g(a, z(a)), elementwise in a once the few numbers z are held: GroupNorm (a mean and a scale of
each group), squeeze-and-excite gates (z a narrow layer of a), a softmax between layers. With
D = ∂g/∂a, U = ∂g/∂z and V = ∂z/∂a its Jacobian is D + U Vᵀ; how that meets the matrices on both
sides is in `across.py`.

Numbers of which each belongs to one block of units alone, as those of GroupNorm do, cost what one
number costs: the columns of U share no unit, nor do those of V.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jax.extend.core import JaxprEqn, Var

from jaxcae.jacobian.jaxprs import shape_of, variables
from jaxcae.jacobian.proofs import EVERYTHING, Fact, facts_of, keeps_order, propagate
from jaxcae.jacobian.rules import floating

_SEVERAL = -1  # the label of what depends on more than one block


class Hidden(NamedTuple):
    """One of the arrays z.

    Attributes:
        variable: The array.
        head: The equations that compute it from the stretch's input.
    """

    variable: Var
    head: tuple[JaxprEqn, ...]


class LowRank(NamedTuple):
    """How a stretch is elementwise but for a few numbers.

    Attributes:
        hidden: What the numbers are.
        body: The equations that compute the output from the input and the numbers.
        order: The units sorted by the block that they belong to, if all arrays have a number for
            each of some blocks of one size, and its units alone.
        blocks: How many blocks there are; 1 where every number may touch every unit.
    """

    hidden: tuple[Hidden, ...]
    body: tuple[JaxprEqn, ...]
    order: np.ndarray | None = None
    blocks: int = 1

    @property
    def columns(self) -> int:
        """How many columns U and V have, those of different blocks counted as one."""
        if self.blocks > 1:
            return len(self.hidden)
        return sum(_size(each.variable) for each in self.hidden)


def find_low_rank(equations: Sequence[JaxprEqn], source: Var, sink: Var) -> LowRank | None:
    """Find few numbers without which the sink is elementwise in the source."""
    size = _size(source)
    if _size(sink) != size:
        return None
    moving = {source}
    for eqn in equations:
        if not moving.isdisjoint(variables(eqn.invars)):
            moving.update(eqn.outvars)
    needed, hidden = {sink}, dict[Var, None]()
    for eqn in reversed(equations):  # up to the last narrow array on every way
        wanted = needed.intersection(eqn.outvars)
        if not wanted:
            continue
        if all(2 * _size(v) <= size for v in wanted):
            if not floating(*(v.aval for v in wanted)):
                return None
            hidden.update(dict.fromkeys(wanted))
        else:
            needed.update(v for v in variables(eqn.invars) if v in moving and v is not source)
    if not hidden:
        return None
    hidden = _earlier(equations, moving, source, hidden)
    body = _needed(equations, sink, set(hidden))
    facts: dict[Var, Fact] = {source: EVERYTHING}
    propagate(body, facts)
    fact = facts.get(sink)
    if fact is None or not fact.elementwise:
        return None
    found = tuple(Hidden(v, tuple(_needed(equations, v))) for v in reversed(list(hidden)))
    order = _blocks(body, found, source, sink)
    if order is None:
        return LowRank(found, tuple(body))
    return LowRank(found, tuple(body), order, _size(found[0].variable))


def _earlier(
    equations: Sequence[JaxprEqn], moving: set[Var], source: Var, hidden: Iterable[Var]
) -> dict[Var, None]:
    """Go back to what the numbers are functions of alone: often affine, of one V for a batch."""
    made_by = {v: eqn for eqn in equations for v in eqn.outvars}
    found = dict[Var, None]()
    for each in hidden:
        v = each
        while v in made_by:
            reads = [a for a in dict.fromkeys(variables(made_by[v].invars)) if a in moving]
            if reads == [source] or len(reads) != 1 or _size(reads[0]) > _size(each):
                break
            if not floating(reads[0].aval):
                break
            (v,) = reads
        found[v] = None
    return found


def _needed(
    equations: Sequence[JaxprEqn], output: Var, given: Collection[Var] = ()
) -> list[JaxprEqn]:
    needed, kept = {output}, []
    for eqn in reversed(equations):
        if not needed.isdisjoint(eqn.outvars):
            kept.append(eqn)
            needed.update(v for v in variables(eqn.invars) if v not in given)
    return kept[::-1]


# --------------------------------------------------------------------------- blocks


def _blocks(
    body: Sequence[JaxprEqn], hidden: Sequence[Hidden], source: Var, sink: Var
) -> np.ndarray | None:
    """Sort the units by block, if each number reads and moves the units of one block alone."""
    (count, *others) = {_size(each.variable) for each in hidden}
    size = _size(sink)
    if others or count == 1 or size % count:
        return None
    numbers = np.arange(count)
    known = {h.variable: numbers.reshape(shape_of(h.variable)) for h in hidden}
    labels = _label(body, known).get(sink)
    if labels is None:
        return None
    labels = labels.reshape(-1)
    if (labels < 0).any() or (np.bincount(labels, minlength=count) != size // count).any():
        return None
    for each in hidden:
        start = {source: labels.reshape(shape_of(source))}
        found = _label(each.head, start).get(each.variable)
        if found is None or (found.reshape(-1) != numbers).any():
            return None
    return np.argsort(labels, kind="stable")


def _label(equations: Sequence[JaxprEqn], labels: dict[Var, np.ndarray]) -> dict[Var, np.ndarray]:
    """Carry forward to which block elements belong; absent where none, or nothing is known."""
    found = dict(labels)
    unknown: set[Var] = set()
    for eqn in equations:
        reads = variables(eqn.invars)
        marked = [i for i, a in enumerate(eqn.invars) if isinstance(a, Var) and a in found]
        if not unknown.isdisjoint(reads):
            unknown.update(eqn.outvars)
        elif marked:
            after = _moved(eqn, marked, [found[a] for a in reads if a in found])
            if after is None:
                unknown.update(eqn.outvars)
            else:
                found[eqn.outvars[0]] = after
    return found


def _moved(eqn: JaxprEqn, marked: list[int], labels: list[np.ndarray]) -> np.ndarray | None:
    if len(eqn.outvars) != 1:
        return None
    name, shape = eqn.primitive.name, shape_of(eqn.outvars[0])
    if len(marked) == 1:
        (before,) = labels
        if keeps_order(eqn):
            return before.reshape(shape)
        if name == "broadcast_in_dim":
            kept = dict(zip(eqn.params["broadcast_dimensions"], before.shape, strict=True))
            wide = before.reshape([kept.get(i, 1) for i in range(len(shape))])
            return np.broadcast_to(wide, shape)
        if name == "transpose":
            return before.transpose(eqn.params["permutation"])
        if name in ("reduce_sum", "reduce_max", "reduce_min"):
            return _agreed(before, tuple(eqn.params["axes"]))
    facts = [EVERYTHING if i in marked else None for i in range(len(eqn.invars))]
    if any(each.shape != shape for each in labels):
        return None
    if not all(fact.elementwise for fact in facts_of(eqn, facts)):
        return None
    return _agreed(np.stack(labels), (0,))


def _agreed(labels: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Find the one block of several elements."""
    highest = labels.max(axes)
    return np.where(labels.min(axes) == highest, highest, _SEVERAL)


def _size(v: Var) -> int:
    return math.prod(shape_of(v))
