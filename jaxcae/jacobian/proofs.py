"""Prove functions affine or elementwise from their equations. What is not proved is neither."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import JaxprEqn, Var

from jaxcae.jacobian.jaxprs import (
    CUSTOM_RULES,
    TRANSPARENT,
    calls_primitive,
    effects_of,
    evaluate,
    scan_arguments,
    shape_of,
    struct,
    trace,
    variables,
)
from jaxcae.jacobian.rules import floating, rule_of


class Fact(NamedTuple):
    """What is proved of a variable as a function of the sources.

    Attributes:
        affine: Its Jacobian does not depend on them.
        elementwise: It has as many elements as each source, and its i-th depends on the i-th
            element of each and on no others, elements counted in row-major order.
    """

    affine: bool
    elementwise: bool


NOTHING = Fact(affine=False, elementwise=False)
EVERYTHING = Fact(affine=True, elementwise=True)
_ONLY_AFFINE = Fact(affine=True, elementwise=False)


def prove(equations: Sequence[JaxprEqn], source: Var, sink: Var) -> Fact:
    """Prove what can be proved of `sink` as a function of `source`."""
    facts = {source: EVERYTHING}
    propagate(equations, facts)
    return facts[sink]


def propagate(equations: Sequence[JaxprEqn], facts: dict[Var, Fact]) -> None:
    """Carry facts forward; a variable without a fact does not depend on the sources."""
    for eqn in equations:
        inputs = [facts.get(atom) if isinstance(atom, Var) else None for atom in eqn.invars]
        if any(fact is not None for fact in inputs):
            facts.update(zip(eqn.outvars, facts_of(eqn, inputs), strict=True))


def facts_of(eqn: JaxprEqn, inputs: Sequence[Fact | None]) -> list[Fact]:
    """Prove what can be proved of an equation's results from facts about its operands."""
    name = eqn.primitive.name
    if name == "stop_gradient":  # a Jacobian of zeros, whatever comes in
        (fact,) = inputs
        return [Fact(True, fact is None or fact.elementwise)]
    if effects_of(eqn) or all(fact in (None, NOTHING) for fact in inputs):
        return [NOTHING] * len(eqn.outvars)
    if name in CUSTOM_RULES:
        return [_of_rule(eqn, inputs)] * len(eqn.outvars)
    if name == "cond" and inputs[0] is None:
        return _of_branches(eqn, inputs)
    if name == "scan":
        return [_of_scan(eqn, inputs)] * len(eqn.outvars)
    if name == "custom_linear_solve":
        return [_of_solve(eqn, inputs)] * len(eqn.outvars)
    return [_of_primitive(eqn, inputs)] * len(eqn.outvars)


def linear_rule(eqn: JaxprEqn) -> bool:
    """Tell whether a `custom_vjp` is proved linear in the direction, as derivatives are.

    JAX does not demand it. One that is not (a clipped gradient) has no Jacobian: what comes of it
    depends on which directions are asked for.
    """
    moving = [v for v in dict.fromkeys(variables(eqn.invars)) if floating(v.aval)]
    if not moving or not floating(*(v.aval for v in eqn.outvars)):
        return False
    return _RuleTrace(eqn, moving).holds(None, _ONLY_AFFINE, "affine")


def _of_primitive(eqn: JaxprEqn, inputs: Sequence[Fact | None]) -> Fact:
    moving = frozenset(i for i, fact in enumerate(inputs) if fact is not None)
    facts = [fact for fact in inputs if fact is not None]
    rule = rule_of(eqn)
    return Fact(
        affine=all(fact.affine for fact in facts) and rule.linear(eqn, moving),
        elementwise=all(fact.elementwise for fact in facts)
        and (
            (rule.elementwise and _aligned(eqn, moving)) or (len(moving) == 1 and keeps_order(eqn))
        ),
    )


def _aligned(eqn: JaxprEqn, moving: frozenset[int]) -> bool:
    """Tell whether operands stand element by element over the results; constants may be scalars."""
    if eqn.primitive.name == "optimization_barrier":  # each result is its own operand
        return len(eqn.outvars) == 1
    (shape,) = {shape_of(var) for var in eqn.outvars}
    return all(
        shape_of(atom) == shape or (i not in moving and shape_of(atom) == ())
        for i, atom in enumerate(eqn.invars)
    )


def keeps_order(eqn: JaxprEqn) -> bool:
    """Tell whether the result has the first operand's elements in the same row-major order."""
    name, before, after = eqn.primitive.name, shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    if name == "reshape":
        return eqn.params.get("dimensions") is None
    if name in ("broadcast_in_dim", "squeeze", "expand_dims"):
        return [n for n in before if n != 1] == [n for n in after if n != 1]
    return False


def _of_branches(eqn: JaxprEqn, inputs: Sequence[Fact | None]) -> list[Fact]:
    """Judge a condition on a constant: whichever branch is taken, it is one of these."""
    results = [EVERYTHING] * len(eqn.outvars)
    for branch in eqn.params["branches"]:
        found = _of_body(branch.jaxpr, inputs[1:])
        results = [
            Fact(a.affine and b.affine, a.elementwise and b.elementwise)
            for a, b in zip(results, found, strict=True)
        ]
    return results


def _of_body(jaxpr: Any, inputs: Sequence[Fact | None]) -> list[Fact]:
    facts = {v: fact for v, fact in zip(jaxpr.invars, inputs, strict=True) if fact is not None}
    for eqn in jaxpr.eqns:
        known = [facts.get(atom) if isinstance(atom, Var) else None for atom in eqn.invars]
        if not any(fact is not None for fact in known):
            continue
        if eqn.primitive.name in TRANSPARENT:
            call = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
            found = _of_body(getattr(call, "jaxpr", call), known)
            facts.update(zip(eqn.outvars, found, strict=True))
        else:
            facts.update(zip(eqn.outvars, facts_of(eqn, known), strict=True))
    return [
        facts.get(atom, EVERYTHING) if isinstance(atom, Var) else EVERYTHING
        for atom in jaxpr.outvars
    ]


def _of_scan(eqn: JaxprEqn, inputs: Sequence[Fact | None]) -> Fact:
    """Judge a scan by its body, with every carry taken to move once one does."""
    if not all(fact is None or fact.affine for fact in inputs):
        return NOTHING
    constants, carries = scan_arguments(eqn)
    moving = [None if fact is None else _ONLY_AFFINE for fact in inputs]
    moving[constants : constants + carries] = [_ONLY_AFFINE] * carries
    jaxpr = eqn.params["jaxpr"].jaxpr
    for i, v in enumerate(jaxpr.invars):  # counters move, but not with the sample
        if moving[i] is not None and not floating(v.aval):
            if inputs[i] is not None:
                return NOTHING
            moving[i] = None
    return Fact(all(fact.affine for fact in _of_body(jaxpr, moving)), False)


def _of_solve(eqn: JaxprEqn, inputs: Sequence[Fact | None]) -> Fact:
    """Judge a linear solve: linear in the right-hand side while the matrix is held."""
    held = sum(eqn.params["const_lengths"])
    return Fact(
        all(f is None for f in inputs[:held]) and all(f is None or f.affine for f in inputs[held:]),
        False,
    )


def _of_rule(eqn: JaxprEqn, inputs: Sequence[Fact | None]) -> Fact:
    """Judge a function with its own derivative rule by that rule.

    The rule maps values v and directions t to directions. If it is elementwise in v and t
    together, and linear in t, the Jacobian is diagonal. If it does not read v and is linear in t,
    the function is affine (which only a forward rule gets credit for: kernels are taken by forward
    products).
    """
    moving: list[Any] = list(
        dict.fromkeys(
            atom for atom, fact in zip(eqn.invars, inputs, strict=True) if fact is not None
        )
    )
    facts = [fact for fact in inputs if fact is not None]
    if len(eqn.outvars) != 1 or not floating(*(v.aval for v in [*moving, *eqn.outvars])):
        return NOTHING
    rule = _RuleTrace(eqn, moving)
    same_shape = len({shape_of(v) for v in [*moving, *eqn.outvars]}) == 1
    return Fact(
        affine=rule.forward
        and all(fact.affine for fact in facts)
        and rule.holds(NOTHING, EVERYTHING, "affine"),
        elementwise=same_shape
        and all(fact.elementwise for fact in facts)
        and rule.holds(EVERYTHING, EVERYTHING, "elementwise")
        and rule.holds(None, EVERYTHING, "affine"),
    )


class _RuleTrace:
    """A derivative rule traced as a function of values and directions."""

    def __init__(self, eqn: JaxprEqn, moving: Sequence[Any]) -> None:
        self.forward = eqn.primitive.name == "custom_jvp_call"
        reads = list(dict.fromkeys(variables(eqn.invars)))

        def rule(*arguments: Any) -> Any:
            values, directions = arguments[: len(reads)], arguments[len(reads) :]
            known = dict(zip(reads, values, strict=True))

            def call(*moved: Any) -> Any:
                at = {**known, **dict(zip(moving, moved, strict=True))}
                return evaluate([eqn], eqn.outvars, at)

            primals = tuple(known[v] for v in moving)
            if self.forward:
                return jax.jvp(call, primals, directions)[1]
            return jax.vjp(call, *primals)[1](list(directions))

        directions = moving if self.forward else eqn.outvars
        self.program, _ = trace(rule, *(struct(v) for v in [*reads, *directions]), values_only=True)
        self.at = [self.program.inputs[reads.index(v)] for v in moving]
        self.along = self.program.inputs[len(reads) :]

    def holds(self, of_values: Fact | None, of_directions: Fact, name: str) -> bool:
        """Prove the property of all results, from these facts about values and directions."""
        facts: dict[Var, Fact] = dict.fromkeys(self.along, of_directions)
        if of_values is not None:
            facts.update(dict.fromkeys(self.at, of_values))
        propagate(self.program.equations, facts)
        results = [facts.get(v, EVERYTHING) for v in variables(self.program.outputs)]
        return all(getattr(fact, name) for fact in results)


def rules_are_linear(equations: Sequence[JaxprEqn]) -> bool:
    """Tell whether every reverse rule met by the equations is proved linear in the direction."""
    return all(
        linear_rule(eqn)
        if eqn.primitive.name == "custom_vjp_call"
        else not calls_primitive(eqn, "custom_vjp_call")
        for eqn in equations
    )
