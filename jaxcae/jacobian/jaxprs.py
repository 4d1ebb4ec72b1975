"""The thin door to JAX's own intermediate form: trace a function flat, and run pieces of it."""

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var, gensym, jaxprs_in_params

# Calls whose derivative is the derivative of their body.
_TRANSPARENT = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}
)
CUSTOM_RULES = frozenset({"custom_jvp_call", "custom_vjp_call"})
"""Calls whose derivative is their rule's: the body tells their value alone."""

_TRANSFORMED = re.compile(r"(?:\w+\()+(.*?)\)+")  # vmap(name)


class Call(NamedTuple):
    """A function call by its name, such as `softplus`, its scope, and the equations of its body."""

    name: str
    scope: tuple[str, ...]
    equations: tuple[JaxprEqn, ...]


class FlatProgram(NamedTuple):
    """A traced function as a list of equations without calls inside.

    Attributes:
        equations: In order of evaluation; only those the outputs need.
        inputs: The variables of the arguments.
        outputs: The variables (or literals) of the results.
        constants: Values of what tracing closed over, such as parameters.
        calls: The named calls that were inlined, each with the equations it consisted of.
    """

    equations: list[JaxprEqn]
    inputs: list[Var]
    outputs: list[Any]
    constants: dict[Var, Any]
    calls: list[Call]


def trace(function: Callable[..., Any], *arguments: Any, values_only: bool = False) -> FlatProgram:
    """Trace `function(*arguments)` and inline its calls.

    What the function closes over, tracers of an outer transformation included, become constants,
    so derivatives flow through them.

    Args:
        function: Any JAX function.
        *arguments: Arrays or their shapes and dtypes.
        values_only: Inline custom derivative rules too: the result then says how values depend
            on values, and must not be differentiated.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    jaxpr = closed.jaxpr
    constants = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    equations: list[JaxprEqn] = []
    calls: list[Call] = []
    inlined = _TRANSPARENT | CUSTOM_RULES if values_only else _TRANSPARENT
    outputs = _inline(jaxpr, {}, gensym(), equations, constants, calls, inlined)
    return FlatProgram(_live(equations, outputs), list(jaxpr.invars), outputs, constants, calls)


def variables(atoms: Iterable[Any]) -> list[Any]:
    """Keep the variables among variables and literals."""
    return [atom for atom in atoms if isinstance(atom, Var)]


def shape_of(atom: Any) -> tuple[int, ...]:
    """Shape of a variable or literal; () for what is no array."""
    return tuple(getattr(atom.aval, "shape", ()))


def struct(like: Any, *, of_sample: bool = False) -> jax.ShapeDtypeStruct:
    """Type of an array, a variable or a literal, or of one sample of a batch.

    Inside a `jax.shard_map` the mesh axes that an array varies over belong to its type: a program
    traced for one type cannot be run on another.
    """
    if not isinstance(like, jax.ShapeDtypeStruct):
        like = like.aval if hasattr(like, "aval") else jax.typeof(like)
    shape = like.shape[1:] if of_sample else like.shape
    if not _varying(like):
        return jax.ShapeDtypeStruct(shape, like.dtype)
    whole = jax.sharding.NamedSharding(like.sharding.mesh, jax.sharding.PartitionSpec())
    return jax.ShapeDtypeStruct(
        shape, like.dtype, sharding=whole, manual_axis_type=like.manual_axis_type
    )


def typed_like(array: Any, like: Any) -> Any:
    """Give an array the shape, the dtype and the varying mesh axes of another."""
    target = struct(like)
    return _vary_over(_varying(target), array.astype(target.dtype).reshape(target.shape))


def placed_with(xs: Any, array: Any) -> Any:
    """Place an array of one row a sample where the samples are, in a mesh of explicit axes."""
    spec = jax.typeof(xs).sharding.spec
    if not spec or spec[0] is None:
        return array
    return jax.sharding.reshard(array, jax.sharding.PartitionSpec(spec[0]))


def vary_as_code(encode: Callable[[Any], Any], xs: Any) -> Any:
    """Let samples vary over all mesh axes of a `jax.shard_map` that their codes vary over.

    To JAX, one sample shared by devices that hold different weights is one variable: the pullback
    to it would sum over the devices.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return xs
    codes = jax.make_jaxpr(encode)(struct(xs, of_sample=True)).out_avals
    return _vary_over(frozenset().union(*map(_varying, codes)), xs)


def _varying(kind: Any) -> frozenset[Any]:
    """Tell which mesh axes a type (an abstract value or a `jax.ShapeDtypeStruct`) varies over."""
    axes = kind.manual_axis_type
    return axes.varying if axes is not None else frozenset()


def _vary_over(axes: frozenset[Any], array: Any) -> Any:
    missing = axes - _varying(jax.typeof(array))
    return jax.lax.pcast(array, tuple(missing), to="varying") if missing else array


def calls_primitive(eqn: JaxprEqn, name: str) -> bool:
    """Tell whether differentiating the equation meets the primitive of that name."""
    if eqn.primitive.name == name:
        return True
    return eqn.primitive.name not in CUSTOM_RULES and any(
        calls_primitive(inner, name)
        for jaxpr in jaxprs_in_params(eqn.params)
        for inner in jaxpr.eqns
    )


def scope(eqn: JaxprEqn) -> tuple[str, ...]:
    """List the `jax.named_scope`s around an equation in its function, outer first."""
    names = str(getattr(eqn.source_info, "name_stack", "")).split("/")
    bare = (_TRANSFORMED.sub(r"\1", name) for name in names)
    return tuple(filter(None, bare))


def evaluate(
    equations: Sequence[JaxprEqn], outputs: Sequence[Var], known: dict[Var, Any]
) -> list[Any]:
    """Run the equations on known values of what they read, and return the outputs' values."""
    computed = {var for eqn in equations for var in eqn.outvars}
    read = dict.fromkeys(var for eqn in equations for var in variables(eqn.invars))
    inputs = [var for var in dict.fromkeys([*read, *outputs]) if var not in computed]
    jaxpr = _empty().replace(invars=inputs, outvars=list(outputs), eqns=list(equations))
    return jax.core.eval_jaxpr(jaxpr, (), *(known[var] for var in inputs))


@functools.cache
def _empty() -> Jaxpr:
    """Trace nothing: a program to put equations into."""
    return jax.make_jaxpr(lambda: ())().jaxpr


def _inline(
    jaxpr: Any,
    names: dict[Var, Any],
    fresh: Callable[[Any], Var],
    equations: list[JaxprEqn],
    constants: dict[Var, Any],
    calls: list[Call],
    inlined: frozenset[str],
) -> list[Any]:
    """Append the equations of `jaxpr`, calls inlined, and return its outputs.

    One inner jaxpr may stand in several calls, so its variables are renamed at each.
    """

    def rename(atom: Any) -> Any:
        return atom if isinstance(atom, Literal) else names.get(atom, atom)

    for eqn in jaxpr.eqns:
        inputs = [rename(atom) for atom in eqn.invars]
        if eqn.primitive.name in inlined:
            call = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
            body, consts = getattr(call, "jaxpr", call), getattr(call, "consts", ())
            inner: dict[Var, Any] = dict(zip(body.invars, inputs, strict=True))
            if consts:
                for var, value in zip(body.constvars, consts, strict=True):
                    inner[var] = fresh(var.aval)
                    constants[inner[var]] = value
            start = len(equations)
            outputs = _inline(body, inner, fresh, equations, constants, calls, inlined)
            calls.append(Call(eqn.params.get("name", ""), scope(eqn), tuple(equations[start:])))
        else:
            outputs = [fresh(var.aval) for var in eqn.outvars]
            equations.append(eqn.replace(invars=inputs, outvars=outputs))
        names.update(zip(eqn.outvars, outputs, strict=True))
    return [rename(atom) for atom in jaxpr.outvars]


def _live(equations: Sequence[JaxprEqn], outputs: Iterable[Any]) -> list[JaxprEqn]:
    needed = set(variables(outputs))
    kept = []
    for eqn in reversed(equations):
        if not needed.isdisjoint(eqn.outvars):
            kept.append(eqn)
            needed.update(variables(eqn.invars))
    return kept[::-1]
