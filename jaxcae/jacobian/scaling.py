"""Recognise normalisations: an affine function of an array times one scalar of the same array.

y = σ(a) · (K a + b), with σ = s(a)^e for a scalar s, however it is computed: LayerNorm, RMSNorm,
L2 normalisation, standardisation. Its Jacobian is σ K + y (∇ log σ)ᵀ, a shared matrix times a
number and one outer product, so that a plan passes through it as through the matrix alone (see
`corrections.py`).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from jax.extend.core import JaxprEqn, Literal, Var

from jaxcae.jacobian.jaxprs import effects_of, shape_of, variables
from jaxcae.jacobian.rules import floating, rule_of

# Homogeneous of degree one in their only operand that moves: no constant part.
_HOMOGENEOUS = frozenset(
    """broadcast_in_dim convert_element_type copy div dot_general expand_dims mul neg reduce_sum
    reshape squeeze transpose""".split()
)
_POSITIVE = frozenset({"rsqrt", "exp", "exp2", "logistic"})


class Scale(NamedTuple):
    """A scalar factor.

    Attributes:
        scalar: The variable s.
        exponent: The e of σ = s^e.
        head: The equations that compute s from the stretch's input.
        body: Those that compute the stretch's output from its input and s.
    """

    scalar: Var
    exponent: float
    head: tuple[JaxprEqn, ...]
    body: tuple[JaxprEqn, ...]


class _Degree(NamedTuple):
    """A variable is s^scale times something constant (power 0) or affine in the input (1)."""

    scale: float
    power: int


def find_scale(equations: Sequence[JaxprEqn], source: Var, sink: Var) -> Scale | None:
    """Find s and e such that the sink is s^e times an affine function of the source."""
    if any(effects_of(eqn) for eqn in equations):
        return None
    made_by = {v: eqn for eqn in equations for v in eqn.outvars}
    scalars = [v for v in made_by if math.prod(shape_of(v)) == 1 and floating(v.aval)]
    for scalar in reversed(scalars[-_TRIALS:]):
        body = _needed(equations, [sink], {scalar})
        found = _degrees(body, {source: _Degree(0, 1), scalar: _Degree(1, 0)}).get(sink)
        if found is None or found.power != 1 or found.scale == 0:
            continue
        # Where σ may be 0 its logarithm has no derivative.
        if found.scale > 0 and not _is_positive(scalar, made_by):
            continue
        return Scale(scalar, found.scale, tuple(_needed(equations, [scalar], set())), tuple(body))
    return None


_TRIALS = 12


def _degrees(equations: Sequence[JaxprEqn], at: dict[Var, _Degree]) -> dict[Var, _Degree | None]:
    """Carry degrees forward: None where it is something else, absent where nothing moves."""
    found: dict[Var, _Degree | None] = dict(at)
    for eqn in equations:
        moving = {
            i: found[a] for i, a in enumerate(eqn.invars) if isinstance(a, Var) and a in found
        }
        if moving:
            found.update(dict.fromkeys(eqn.outvars, _degree(eqn, moving)))
    return found


def _degree(eqn: JaxprEqn, moving: dict[int, _Degree | None]) -> _Degree | None:
    name = eqn.primitive.name
    degrees = list(moving.values())
    if any(d is None for d in degrees) or not floating(*(v.aval for v in eqn.outvars)):
        return None
    known = [d for d in degrees if d is not None]
    if all(d == _Degree(0, 1) for d in known):
        return _Degree(0, 1) if rule_of(eqn).linear(eqn, frozenset(moving)) else None
    if name in ("mul", "div") and len(known) == 2:
        (a, b), sign = known, 1 if name == "mul" else -1
        if a.power + b.power > 1 or (name == "div" and b.power):
            return None
        return _Degree(a.scale + sign * b.scale, a.power + b.power)
    if len(known) != 1:
        return None
    (d,) = known
    if d.power == 0 and name in ("integer_pow", "rsqrt", "sqrt", "square"):
        power = {"rsqrt": -0.5, "sqrt": 0.5, "square": 2.0}.get(name) or float(eqn.params["y"])
        return _Degree(d.scale * power, 0)
    if d.power == 0 and name == "div" and 1 in moving:
        return _Degree(-d.scale, 0)
    if name in _HOMOGENEOUS and rule_of(eqn).linear(eqn, frozenset(moving)):
        return d
    return None


def _needed(
    equations: Sequence[JaxprEqn], outputs: Sequence[Var], given: set[Var]
) -> list[JaxprEqn]:
    needed = set(outputs) - given
    kept = []
    for eqn in reversed(equations):
        if not needed.isdisjoint(eqn.outvars):
            kept.append(eqn)
            needed.update(set(variables(eqn.invars)) - given)
    return kept[::-1]


def _is_positive(v: Var, made_by: dict[Var, JaxprEqn]) -> bool:
    while v in made_by:
        eqn = made_by[v]
        if eqn.primitive.name in _POSITIVE:
            return True
        if eqn.primitive.name not in ("broadcast_in_dim", "reshape", "squeeze", "copy"):
            return False
        if isinstance(eqn.invars[0], Literal):
            return False
        v = eqn.invars[0]
    return False
