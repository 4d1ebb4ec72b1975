"""The thin door to JAX's own intermediate form: trace a function flat, and run pieces of it."""

import functools
import itertools
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var, gensym, jaxprs_in_params

TRANSPARENT = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}
)
"""Calls whose derivative is the derivative of their body."""
CUSTOM_RULES = frozenset({"custom_jvp_call", "custom_vjp_call"})
"""Calls whose derivative is their rule's: the body tells their value alone."""

BROADCASTING = frozenset("add add_any atan2 div max min mul pow rem sub".split())
"""Arithmetic whose operands JAX may leave to be broadcast."""

_TRANSFORMED = re.compile(r"(?:\w+\()+(.*?)\)+")  # vmap(name)


class Call(NamedTuple):
    """A function call by its name, such as `softplus`, its scope, and the equations of its body."""

    name: str
    scope: tuple[str, ...]
    equations: tuple[JaxprEqn, ...]


class FlatProgram(NamedTuple):
    """A traced function as a list of equations without calls inside, and without values.

    Attributes:
        equations: In order of evaluation; only those the outputs need.
        inputs: The variables of the arguments.
        outputs: The variables (or literals) of the results.
        constants: The variables of what tracing closed over.
        calls: The named calls that were inlined, each with the equations it consisted of.
        effects: The equations that have an effect but no result that an output needs, such as a
            `jax.debug.callback`, and all that they need, in order.
        checkpoints: The `jax.checkpoint` that an equation stood in, by the equation's identity:
            a number for each, and its parameters.
    """

    equations: tuple[JaxprEqn, ...]
    inputs: tuple[Var, ...]
    outputs: tuple[Any, ...]
    constants: tuple[Var, ...]
    calls: tuple[Call, ...]
    effects: tuple[JaxprEqn, ...]
    checkpoints: dict[int, tuple[int, dict[str, Any]]]


def trace(
    function: Callable[..., Any], *arguments: Any, values_only: bool = False
) -> tuple[FlatProgram, list[Any]]:
    """Trace `function(*arguments)` and inline its calls; return the program and its constants.

    What the function closes over, tracers of an outer transformation included, become constants,
    so derivatives flow through them.

    Args:
        function: Any JAX function.
        *arguments: Arrays or their shapes and dtypes.
        values_only: Inline custom derivative rules too: the result then says how values depend
            on values, and must not be differentiated.
    """
    return flatten(jax.make_jaxpr(function)(*arguments), values_only=values_only)


def flatten(closed: Any, *, values_only: bool = False) -> tuple[FlatProgram, list[Any]]:
    """Inline the calls of a traced function; see `trace`."""
    inlining = _Inlining(TRANSPARENT | CUSTOM_RULES if values_only else TRANSPARENT)
    jaxpr = closed.jaxpr
    inlining.constants.update(zip(jaxpr.constvars, closed.consts, strict=True))
    outputs = inlining.inline(jaxpr, {}, None)
    pure = _live(inlining.equations, outputs)
    needed = {id(eqn) for eqn in pure}
    acting = [e for e in inlining.equations if effects_of(e) and id(e) not in needed]
    program = FlatProgram(
        tuple(pure),
        tuple(jaxpr.invars),
        tuple(outputs),
        tuple(inlining.constants),
        tuple(inlining.calls),
        tuple(_live(inlining.equations, [], {id(eqn) for eqn in acting})),
        inlining.checkpoints,
    )
    return program, list(inlining.constants.values())


def effects_of(eqn: JaxprEqn) -> list[Any]:
    """List what an equation does beside its results; to stand in a named axis is no effect."""
    return [effect for effect in eqn.effects if type(effect).__name__ != "NamedAxisEffect"]


def variables(atoms: Iterable[Any]) -> list[Any]:
    """Keep the variables among variables and literals."""
    return [atom for atom in atoms if isinstance(atom, Var)]


def shape_of(atom: Any) -> tuple[int, ...]:
    """Shape of a variable or literal; () for what is no array."""
    return tuple(getattr(atom.aval, "shape", ()))


def struct(like: Any, *, of_sample: bool = False) -> jax.ShapeDtypeStruct:
    """Type of an array, a variable, a literal or an abstract value, or of one sample of a batch.

    Inside a `jax.shard_map` the mesh axes that an array varies over belong to its type: a program
    traced for one type cannot be run on another.
    """
    if not isinstance(like, jax.ShapeDtypeStruct | jax.core.ShapedArray):
        like = like.aval if hasattr(like, "aval") else jax.typeof(like)
    shape = like.shape[1:] if of_sample else like.shape
    if not _varying(like):
        return jax.ShapeDtypeStruct(shape, like.dtype)
    whole = jax.sharding.NamedSharding(like.sharding.mesh, jax.sharding.PartitionSpec())
    return jax.ShapeDtypeStruct(
        shape, like.dtype, sharding=whole, manual_axis_type=like.manual_axis_type
    )


def at_hand(array: Any) -> bool:
    """Tell whether an array has values now, under derivatives or not: nothing is being traced."""
    while isinstance(array, jax.core.Tracer) and hasattr(array, "primal"):
        array = array.primal
    return not isinstance(array, jax.core.Tracer)


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


def gathered(array: Any) -> Any:
    """Give every device of a mesh of explicit axes the whole of an array, the batch's axis apart.

    What is laid over devices by weights that are (tensor parallelism) has a product with itself
    that JAX asks to be told about.
    """
    spec = jax.typeof(array).sharding.spec
    if all(axis is None for axis in spec):
        return array
    return jax.sharding.reshard(array, jax.sharding.PartitionSpec(*[None] * array.ndim))


def vary_like(codes: Iterable[Any], xs: Any) -> Any:
    """Let samples vary over all mesh axes of a `jax.shard_map` that their codes vary over.

    To JAX, one sample shared by devices that hold different weights is one variable: the pullback
    to it would sum over the devices.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return xs
    return _vary_over(frozenset().union(*(_varying(code.aval) for code in codes)), xs)


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


def scan_arguments(eqn: JaxprEqn) -> tuple[int, int]:
    """Count the constants and the carries of a scan, which precede its slices."""
    if "ft_in" in eqn.params:  # from JAX 0.12 on
        constants, carries, _ = map(len, eqn.params["ft_in"].unpack())
        return constants, carries
    return eqn.params["num_consts"], eqn.params["num_carry"]


def scope(eqn: JaxprEqn) -> tuple[str, ...]:
    """List the `jax.named_scope`s around an equation in its function, outer first."""
    names = str(getattr(eqn.source_info, "name_stack", "")).split("/")
    bare = (_TRANSFORMED.sub(r"\1", name) for name in names)
    return tuple(filter(None, bare))


def evaluate(
    equations: Sequence[JaxprEqn], outputs: Sequence[Var], known: Mapping[Var, Any]
) -> list[Any]:
    """Run the equations on known values of what they read, and return the outputs' values."""
    computed = {var for eqn in equations for var in eqn.outvars}
    read = dict.fromkeys(var for eqn in equations for var in variables(eqn.invars))
    inputs = [var for var in dict.fromkeys([*read, *outputs]) if var not in computed]
    effects = frozenset().union(*(eqn.effects for eqn in equations))
    jaxpr = _empty().replace(
        invars=inputs, outvars=list(outputs), eqns=list(equations), effects=effects
    )
    return jax.core.eval_jaxpr(jaxpr, (), *(known[var] for var in inputs))


def evaluate_checkpointed(
    program: FlatProgram,
    equations: Sequence[JaxprEqn],
    outputs: Sequence[Var],
    known: Mapping[Var, Any],
) -> list[Any]:
    """Run equations; those of one `jax.checkpoint` run together under another like it."""
    if not program.checkpoints:
        return evaluate(equations, outputs, known)
    values = dict(known)
    last_use = {v: i for i, eqn in enumerate(equations) for v in variables(eqn.invars)}
    last_use.update(dict.fromkeys(outputs, len(equations)))

    def number(eqn: JaxprEqn) -> int | None:
        return program.checkpoints.get(id(eqn), (None,))[0]

    start = 0
    for mark, members in itertools.groupby(equations, number):
        group = list(members)
        start += len(group)
        results = [v for eqn in group for v in eqn.outvars if last_use.get(v, -1) >= start]
        if mark is None:
            found = evaluate(group, results, values)
        else:
            params = program.checkpoints[id(group[0])][1]
            made = {v for eqn in group for v in eqn.outvars}
            needs = [
                v
                for v in dict.fromkeys(v for e in group for v in variables(e.invars))
                if v not in made
            ]

            def run(
                *arrays: Any, group: Any = group, results: Any = results, needs: Any = needs
            ) -> Any:
                return evaluate(group, results, dict(zip(needs, arrays, strict=True)))

            kept = jax.checkpoint(run, prevent_cse=params["prevent_cse"], policy=params["policy"])
            found = kept(*(values[v] for v in needs))
        values.update(zip(results, found, strict=True))
    return [values[v] for v in outputs]


@functools.cache
def _empty() -> Jaxpr:
    """Trace nothing: a program to put equations into."""
    return jax.make_jaxpr(lambda: ())().jaxpr


class _Inlining:
    """Collects the equations of a program, calls inlined.

    One inner jaxpr may stand in several calls, so its variables are renamed at each.
    """

    def __init__(self, inlined: frozenset[str]) -> None:
        self.inlined = inlined
        self.fresh = gensym()
        self.equations: list[JaxprEqn] = []
        self.constants: dict[Var, Any] = {}
        self.calls: list[Call] = []
        self.checkpoints: dict[int, tuple[int, dict[str, Any]]] = {}

    def inline(self, jaxpr: Any, names: dict[Var, Any], checkpoint: Any) -> list[Any]:
        """Append the equations of `jaxpr` and return its outputs."""

        def rename(atom: Any) -> Any:
            return atom if isinstance(atom, Literal) else names.get(atom, atom)

        for eqn in jaxpr.eqns:
            inputs = [rename(atom) for atom in eqn.invars]
            if eqn.primitive.name in BROADCASTING and len(inputs) > 1:
                inputs = [self._broadcast(atom, eqn, checkpoint) for atom in inputs]
            if eqn.primitive.name in self.inlined:
                outputs = self._call(eqn, inputs, checkpoint)
            else:
                outputs = [self.fresh(var.aval) for var in eqn.outvars]
                self.equations.append(eqn.replace(invars=inputs, outvars=outputs))
                if checkpoint is not None:
                    self.checkpoints[id(self.equations[-1])] = checkpoint
            names.update(zip(eqn.outvars, outputs, strict=True))
        return [rename(atom) for atom in jaxpr.outvars]

    def _broadcast(self, atom: Any, reader: JaxprEqn, checkpoint: Any) -> Any:
        """Write out that an operand is broadcast, which arithmetic may leave unsaid."""
        shape = shape_of(reader.outvars[0])
        if isinstance(atom, Literal) or shape_of(atom) == shape:
            return atom
        axes = tuple(range(len(shape) - len(shape_of(atom)), len(shape)))
        closed = jax.make_jaxpr(lambda a: jax.lax.broadcast_in_dim(a, shape, axes))(struct(atom))
        (eqn,) = closed.jaxpr.eqns
        out = self.fresh(eqn.outvars[0].aval)
        source = reader.source_info
        self.equations.append(eqn.replace(invars=[atom], outvars=[out], source_info=source))
        if checkpoint is not None:
            self.checkpoints[id(self.equations[-1])] = checkpoint
        return out

    def _call(self, eqn: JaxprEqn, inputs: list[Any], checkpoint: Any) -> list[Any]:
        call = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
        body, consts = getattr(call, "jaxpr", call), getattr(call, "consts", ())
        inner: dict[Var, Any] = dict(zip(body.invars, inputs, strict=True))
        for var, value in zip(body.constvars, consts, strict=True):
            inner[var] = self.fresh(var.aval)
            self.constants[inner[var]] = value
        if "policy" in eqn.params and checkpoint is None:
            checkpoint = (len(self.equations), eqn.params)
        start = len(self.equations)
        outputs = self.inline(body, inner, checkpoint)
        name = eqn.params.get("name", "")
        self.calls.append(Call(name, scope(eqn), tuple(self.equations[start:])))
        return outputs


def _live(
    equations: Sequence[JaxprEqn], outputs: Iterable[Any], also: Container[int] = ()
) -> list[JaxprEqn]:
    """Keep what the outputs need, and the equations of the identities in `also`."""
    needed = set(variables(outputs))
    kept = []
    for eqn in reversed(equations):
        if id(eqn) in also or not needed.isdisjoint(eqn.outvars):
            kept.append(eqn)
            needed.update(variables(eqn.invars))
    return kept[::-1]
