"""Prove functions affine or elementwise from their equations. What is not proved is neither."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Var

from jaxcae.jacobian.jaxprs import CUSTOM_RULES, evaluate, shape_of, struct, trace, variables

# Each output element depends on the inputs' elements at the same index and on no others.
_ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp
    convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor
    ge gt integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not or
    pow reduce_precision rem round rsqrt select_n sign sin sinh sqrt square stop_gradient sub tan
    tanh xor""".split()
)
# Linear in all array operands together.
_LINEAR = frozenset(
    """add add_any broadcast_in_dim concatenate copy copy_p cumsum expand_dims neg pad reduce_sum
    reduce_window_sum reshape rev slice split squeeze sub transpose""".split()
)
# Linear in one operand while the other is constant.
_BILINEAR = frozenset({"mul", "dot_general", "conv_general_dilated"})
# Linear in the operands at these positions while the rest (divisors, indices) is constant.
_LINEAR_AT = {
    "div": {0},
    "gather": {0},
    "dynamic_slice": {0},
    "dynamic_update_slice": {0, 1},
}


class Fact(NamedTuple):
    """What is proved of a variable as a function of a stretch's input."""

    affine: bool
    elementwise: bool


_NOTHING = Fact(affine=False, elementwise=False)
_EVERYTHING = Fact(affine=True, elementwise=True)


def prove(equations: Sequence[JaxprEqn], source: Var, sink: Var) -> Fact:
    """Prove what can be proved of `sink` as a function of `source`."""
    return _propagate(equations, {source: _EVERYTHING}, shape_of(source))[sink]


def _propagate(
    equations: Sequence[JaxprEqn], facts: dict[Var, Fact], shape: tuple[int, ...]
) -> dict[Var, Fact]:
    """Carry facts forward; a variable without a fact does not depend on the sources.

    `shape` is the shape of the sources, whose indices an elementwise function keeps.
    """
    for eqn in equations:
        inputs = [facts.get(atom) if isinstance(atom, Var) else None for atom in eqn.invars]
        if any(inputs):
            fact = _of_rule if eqn.primitive.name in CUSTOM_RULES else _of_primitive
            found = fact(eqn, inputs, shape)
            facts = {**facts, **dict.fromkeys(eqn.outvars, found)}
    return facts


def _of_primitive(eqn: JaxprEqn, inputs: Sequence[Fact | None], shape: tuple[int, ...]) -> Fact:
    name = eqn.primitive.name
    moving = {i for i, fact in enumerate(inputs) if fact is not None}
    linear = (
        name in _LINEAR
        or (name in _BILINEAR and len(moving) == 1)
        or moving <= _LINEAR_AT.get(name, set())
        or (name == "select_n" and 0 not in moving)
        or (name == "convert_element_type" and _floating(eqn.invars[0].aval, eqn.outvars[0].aval))
    )
    # Scalars (shape ()) stand at every index.
    aligned = {shape_of(atom) for atom in eqn.invars} <= {shape, ()}
    aligned = aligned and all(shape_of(var) == shape for var in eqn.outvars)
    return Fact(
        affine=linear and all(fact.affine for fact in inputs if fact),
        elementwise=aligned
        and (name in _ELEMENTWISE or _is_trivial_broadcast(eqn))
        and all(fact.elementwise for fact in inputs if fact),
    )


def _is_trivial_broadcast(eqn: JaxprEqn) -> bool:
    return eqn.primitive.name == "broadcast_in_dim" and shape_of(eqn.invars[0]) == shape_of(
        eqn.outvars[0]
    )


def _of_rule(eqn: JaxprEqn, inputs: Sequence[Fact | None], shape: tuple[int, ...]) -> Fact:
    """Judge a function with its own derivative rule by that rule.

    The rule maps values v and directions t to directions. If it is elementwise in v and t
    together, the Jacobian is diagonal. If it does not read v and is linear in t, the function is
    affine (which only a forward rule gets credit for: kernels are taken by forward products).
    """
    reads = list(dict.fromkeys(variables(eqn.invars)))
    moving: list[Any] = list(
        dict.fromkeys(
            atom for atom, fact in zip(eqn.invars, inputs, strict=True) if fact is not None
        )
    )
    forward = eqn.primitive.name == "custom_jvp_call"
    if len(eqn.outvars) != 1 or not _floating(*(v.aval for v in [*moving, *eqn.outvars])):
        return _NOTHING

    def rule(*arguments: Any) -> Any:
        values, directions = arguments[: len(reads)], arguments[len(reads) :]
        known = dict(zip(reads, values, strict=True))

        def call(*moved: Any) -> Any:
            at = {**known, **dict(zip(moving, moved, strict=True))}
            return evaluate([eqn], eqn.outvars, at)[0]

        primals = tuple(known[v] for v in moving)
        if forward:
            return jax.jvp(call, primals, directions)[1]
        return jax.vjp(call, *primals)[1](*directions)

    directions = moving if forward else eqn.outvars
    program = trace(rule, *(struct(v) for v in [*reads, *directions]), values_only=True)
    at_value = {program.inputs[reads.index(v)] for v in moving}
    along = set(program.inputs[len(reads) :])
    facts = [fact for fact in inputs if fact is not None]

    def holds(of_values: Fact, of_directions: Fact, name: str) -> bool:
        seeds = dict.fromkeys(at_value, of_values) | dict.fromkeys(along, of_directions)
        found = _propagate(program.equations, seeds, shape)
        results = [found.get(v, _EVERYTHING) for v in variables(program.outputs)]
        return all(getattr(fact, name) for fact in [*results, *facts])

    same_shape = all(shape_of(v) == shape for v in [*moving, *eqn.outvars])
    return Fact(
        affine=forward and holds(_NOTHING, _EVERYTHING, "affine"),
        elementwise=same_shape and holds(_EVERYTHING, _EVERYTHING, "elementwise"),
    )


def _floating(*avals: Any) -> bool:
    return all(jnp.issubdtype(aval.dtype, jnp.floating) for aval in avals)
