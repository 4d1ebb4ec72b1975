"""Bring what only reorders elements out from between activations, to where matrices are.

An activation, a transpose, an activation: E₂ Π E₁ = (E₂ · Π E₁ Π⁻¹) Π, where Π E₁ Π⁻¹ is
elementwise as E₁ is. So the two activations become one elementwise stretch, and Π joins the affine
one before.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Var

from jaxcae.jacobian.jaxprs import shape_of, struct
from jaxcae.jacobian.proofs import keeps_order

Equations = tuple[JaxprEqn, ...]
Change = Callable[[Any], Any]


class Stretch(NamedTuple):
    """Equations from one array to another, and all that they are proved to be."""

    equations: Equations
    source: Var
    sink: Var
    kinds: frozenset[str]


def reorder(stretches: Sequence[Stretch]) -> list[Stretch]:
    """Rewrite every reordering that stands between two elementwise stretches."""
    found = list(stretches)
    for j in range(1, len(found) - 1):
        if not all("elementwise" in stretch.kinds for stretch in (found[j - 1], found[j + 1])):
            continue
        change = _reordering(found[j])
        if change is None:
            continue
        i = j
        while i and "elementwise" in found[i - 1].kinds:
            i -= 1
        if all("affine" in stretch.kinds for stretch in found[i:j]):
            continue  # which joins the affine stretch before as it is
        found[i : j + 1] = _before(found[i : j + 1], change)
        return reorder(found)
    return found


def _reordering(stretch: Stretch) -> tuple[Change, Change] | None:
    """Find what a stretch does to the order of elements, and undoes it; None for anything else."""
    steps: list[tuple[Change, Change]] = []
    at, moved = stretch.source, False
    for eqn in stretch.equations:
        name = eqn.primitive.name
        if len(eqn.invars) != 1 or eqn.invars[0] is not at:
            return None
        if keeps_order(eqn):
            shapes = shape_of(at), shape_of(eqn.outvars[0])
            there, back = (partial(jnp.reshape, shape=shape) for shape in shapes[::-1])
        elif name == "transpose":
            axes = eqn.params["permutation"]
            inverse = tuple(int(i) for i in np.argsort(axes))
            there, back = (partial(jnp.transpose, axes=a) for a in (axes, inverse))
        elif name == "rev":
            there = back = partial(jax.lax.rev, dimensions=eqn.params["dimensions"])
        else:
            return None
        steps.append((there, back))
        moved |= name in ("transpose", "rev")
        at = eqn.outvars[0]
    if not moved:
        return None
    return _all([there for there, _ in steps]), _all([back for _, back in steps[::-1]])


def _all(changes: Sequence[Change]) -> Change:
    def change(v: Any) -> Any:
        for step in changes:
            v = step(v)
        return v

    return change


def _before(stretches: Sequence[Stretch], changes: tuple[Change, Change]) -> list[Stretch]:
    """Put the last of the stretches, which reorders, before the others, which are elementwise."""
    first, last = stretches[0], stretches[-1]
    (change, back), source = changes, first.source
    shape, inner = shape_of(source), shape_of(last.source)
    ahead, moved = _trace(lambda v: change(v.reshape(inner)), source, first)
    undone, restored = _trace(lambda v: back(v).reshape(shape), moved, first)
    equations = [eqn for stretch in stretches for eqn in stretch.equations]
    renamed = [
        eqn.replace(invars=[restored if a is source else a for a in eqn.invars])
        if any(a is source for a in eqn.invars)
        else eqn
        for eqn in equations
    ]
    return [
        Stretch(ahead, source, moved, frozenset({"affine"})),
        Stretch((*undone, *renamed), moved, last.sink, frozenset({"elementwise"})),
    ]


def _trace(function: Change, source: Var, of: Stretch) -> tuple[Equations, Var]:
    """Write a function of one array as equations that stand where a stretch does."""
    closed = jax.make_jaxpr(function)(struct(source))
    names = {closed.jaxpr.invars[0]: source}
    info = of.equations[0].source_info
    equations = tuple(
        eqn.replace(invars=[_renamed(a, names) for a in eqn.invars], source_info=info)
        for eqn in closed.jaxpr.eqns
    )
    (out,) = closed.jaxpr.outvars
    return equations, _renamed(out, names)


def _renamed(atom: Any, names: dict[Var, Var]) -> Any:
    return names.get(atom, atom) if isinstance(atom, Var) else atom
