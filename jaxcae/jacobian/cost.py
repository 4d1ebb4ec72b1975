"""Count the floating-point operations and the peak bytes of a traced program."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal, Var, jaxprs_in_params

from jaxcae.jacobian.jaxprs import shape_of

# Primitives that XLA writes to memory. The rest it fuses into the loops that read them, unless
# one of these reads them.
_MATERIALIZED = frozenset(
    """conv_general_dilated dot_general scan while cond gather scatter scatter-add sort cumsum
    custom_linear_solve triangular_solve cholesky eigh lu qr svd concatenate pad
    dynamic_update_slice""".split()
)
_REDUCTIONS = frozenset(
    """argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum
    reduce_window_sum cumsum cumprod cumlogsumexp cummax cummin""".split()
)
_FREE = frozenset(
    """broadcast_in_dim bitcast_convert_type concatenate copy copy_p convert_element_type
    dynamic_slice dynamic_update_slice expand_dims gather iota pad reshape rev slice split squeeze
    stop_gradient transpose""".split()
)


@dataclass(frozen=True)
class Cost:
    """What a program takes: floating-point operations and bytes alive at the peak."""

    flops: float
    bytes: float


def estimate(function: Callable[..., Any], *arguments: Any) -> Cost:
    """Predict the cost of `jit(function)(*arguments)` without compiling it.

    FLOPs count 2mnk for a matrix product and one an element for elementwise operations; a scan's
    body counts as often as it runs. Bytes are those of the arrays that XLA has to hold between
    operations at the worst moment, arguments and results apart, fused loops taken as free.

    Args:
        function: Any JAX function.
        *arguments: Arrays or `jax.ShapeDtypeStruct`s.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    jaxpr = getattr(closed, "jaxpr", closed)
    return Cost(flops(jaxpr.eqns, jaxpr.outvars), peak_bytes(jaxpr))


def flops(equations: Sequence[JaxprEqn], outputs: Iterable[Any] | None = None) -> float:
    """Count the operations of the equations that the outputs need (all, if None)."""
    needed = None if outputs is None else {v for v in outputs if isinstance(v, Var)}
    total = 0.0
    for eqn in reversed(equations):
        if needed is not None:
            if needed.isdisjoint(eqn.outvars) and not eqn.effects:
                continue
            needed.update(atom for atom in eqn.invars if isinstance(atom, Var))
        total += _equation_flops(eqn)
    return total


def _equation_flops(eqn: JaxprEqn) -> float:
    name = eqn.primitive.name
    inner = sum(flops(j.eqns, j.outvars) for j in _bodies(eqn))
    if name == "scan":
        return inner * eqn.params["length"]
    if inner or name in _FREE:
        return inner
    out = sum(_size(v) for v in eqn.outvars)
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2.0 * out * math.prod(shape_of(eqn.invars[0])[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel = shape_of(eqn.invars[1])
        features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * out * math.prod(kernel) / features
    if name in _REDUCTIONS:
        return float(_size(eqn.invars[0]))
    if name == "integer_pow":
        return float(out * max(1, abs(eqn.params["y"]) - 1))
    return float(out)


def peak_bytes(jaxpr: Any) -> float:
    """Find the most bytes alive at once, the program's own arguments and results not counted."""
    equations = list(jaxpr.eqns)
    stored = _stored(equations)
    last_use = {
        atom: i for i, eqn in enumerate(equations) for atom in eqn.invars if isinstance(atom, Var)
    }
    results = {v for v in jaxpr.outvars if isinstance(v, Var)}
    # A fused value is recomputed from what it reads, which therefore lives as long as it does.
    for i in reversed(range(len(equations))):
        eqn = equations[i]
        ends = [last_use.get(v, i) for v in eqn.outvars if v not in stored]
        for atom in eqn.invars:
            if ends and isinstance(atom, Var):
                last_use[atom] = max(last_use[atom], *ends)
    alive = peak = 0.0
    ending: dict[int, float] = {}
    for i, eqn in enumerate(equations):
        inner = max((peak_bytes(j) for j in _bodies(eqn)), default=0.0)
        new = {v: _bytes(v) for v in eqn.outvars if v in stored and v not in results}
        alive += sum(new.values())
        for v, size in new.items():
            ending[last_use.get(v, i)] = ending.get(last_use.get(v, i), 0.0) + size
        peak = max(peak, alive + inner)
        alive -= ending.pop(i, 0.0)
    return peak


def _stored(equations: Sequence[JaxprEqn]) -> set[Var]:
    stored: set[Var] = set()
    for eqn in equations:
        if eqn.primitive.name in _MATERIALIZED or _bodies(eqn):
            stored.update(eqn.outvars)
            stored.update(atom for atom in eqn.invars if isinstance(atom, Var))
        elif eqn.primitive.name in _REDUCTIONS:
            stored.update(eqn.outvars)
    return stored


def _bodies(eqn: JaxprEqn) -> list[Any]:
    return list(jaxprs_in_params(eqn.params))


def _size(atom: Any) -> int:
    return math.prod(shape_of(atom))


def _bytes(atom: Any) -> float:
    if isinstance(atom, Literal) or not hasattr(atom.aval, "dtype"):
        return 0.0
    try:
        return float(_size(atom) * jnp.dtype(atom.aval.dtype).itemsize)
    except TypeError:  # a typed random key
        return 0.0
