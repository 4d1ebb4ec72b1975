"""An encoder traced once: every method evaluates this trace, and none calls the encoder again."""

import math
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Trace
from jax.extend.core import JaxprEqn, Var

from jaxcae.jacobian import jaxprs
from jaxcae.jacobian.jaxprs import FlatProgram, struct
from jaxcae.jacobian.samples import blamed_on_samples, is_array, one_array
from jaxcae.types import Encode, Params

_NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


class Program(NamedTuple):
    """What an encoder computes for one sample, without the values of its parameters.

    Attributes:
        flat: The equations, calls inlined. Its inputs are the parameters' arrays and the sample.
        jaxpr: The same as it was traced: calls, checkpoints and effects in their places.
        x: Shape and dtype of a sample.
    """

    flat: FlatProgram
    jaxpr: Any
    x: jax.ShapeDtypeStruct

    @property
    def sample(self) -> Var:
        """The variable of the sample."""
        return self.flat.inputs[-1]

    @property
    def code(self) -> Any:
        """The variable (or literal) of the code."""
        return self.flat.outputs[0]


def of_sample(program: Program) -> list[JaxprEqn]:
    """List the equations that depend on the sample, in order."""
    reached = {program.sample}
    found = []
    for eqn in program.flat.equations:
        if not reached.isdisjoint(jaxprs.variables(eqn.invars)):
            found.append(eqn)
            reached.update(eqn.outvars)
    return found


class Encoder(NamedTuple):
    """A program and the values that it reads: the parameters and what the function closed over.

    Attributes:
        program: The program.
        params: The arrays among the parameters, in order.
        constants: What the function closed over, for the program as traced.
        flat_constants: The same for the program with its calls inlined.
        code_tree: The pytree of one leaf that the code is.
        metric: F of the input metric ‖J Fᵀ‖², of shape (r, d), or (d,) if diagonal; None for none.
    """

    program: Program
    params: tuple[Any, ...]
    constants: tuple[Any, ...]
    flat_constants: tuple[Any, ...]
    code_tree: Any
    metric: Any = None

    def with_metric(self, given: Any) -> "Encoder":
        """Return the encoder with an input metric; None leaves it as it is.

        Raises:
            ValueError: If it has not one column for each feature.
            TypeError: If it is not floating point.
        """
        if given is None:
            return self
        metric, features = jnp.asarray(given), math.prod(self.program.x.shape)
        if metric.ndim not in (1, 2) or metric.shape[-1] != features or not metric.size:
            raise ValueError(
                f"input_metric must have shape (r, {features}), or ({features},) if diagonal, one "
                f"column for each feature, got {metric.shape}."
            )
        if not jnp.issubdtype(metric.dtype, jnp.floating):
            raise TypeError(f"input_metric must be floating point, got {metric.dtype}.")
        return self._replace(metric=metric)

    def along(self, vector: Any) -> Any:
        """Compute Fᵀu, the direction of a sample that u stands for."""
        if self.metric is None:
            return vector
        metric = self.metric.astype(vector.dtype)
        return metric * vector if metric.ndim == 1 else metric.T @ vector

    def measured(self, gradient: Any) -> Any:
        """Compute Fg of a gradient g by the sample."""
        if self.metric is None:
            return gradient
        flat, metric = gradient.reshape(-1), self.metric.astype(gradient.dtype)
        return metric * flat if metric.ndim == 1 else metric @ flat

    @property
    def directions(self) -> int:
        """Number of directions of the sample that count: its features, or the rows of F."""
        return math.prod(self.program.x.shape) if self.metric is None else self.metric.shape[0]

    def encode(self, x: Any) -> Any:
        """Encode one sample, as the function itself would; the code is an array."""
        (code,) = jax.core.eval_jaxpr(self.program.jaxpr, self.constants, *self.params, x)
        return code

    def act(self, x: Any) -> None:
        """Do what the encoder does beside computing the code, such as a `jax.debug.callback`."""
        flat = self.program.flat
        if flat.effects:
            jaxprs.evaluate(flat.effects, [], {**self.known, self.program.sample: x})

    @property
    def code_size(self) -> int:
        """Number of code units."""
        return math.prod(self.program.code.aval.shape)

    @property
    def epsilon(self) -> float:
        """The spacing at 1 of the coarsest dtype on the way from the sample to the code."""
        met = [self.program.sample, *(v for eqn in of_sample(self.program) for v in eqn.outvars)]
        kinds = [struct(v).dtype for v in met]
        return max(float(jnp.finfo(k).eps) for k in kinds if jnp.issubdtype(k, jnp.floating))

    @property
    def known(self) -> dict[Var, Any]:
        """Values of the parameters and constants, by their variables."""
        flat = self.program.flat
        known = dict(zip(flat.inputs[:-1], self.params, strict=True))
        return known | dict(zip(flat.constants, self.flat_constants, strict=True))


def trace_encoder(encode: Encode, params: Params, xs: Any) -> tuple[Encoder, Any]:
    """Trace an encoder for one sample of a batch; return it and the batch as one array.

    Arrays among the parameters become arguments of the program, so that it holds for any values;
    anything else in them (numbers, functions, strings) is part of it. An encoder that looks at its
    parameters' values, to index by a mask for instance, is traced with these values inside.

    Raises:
        TypeError: If samples or codes are not floating point, or either is not one array.
        ValueError: If xs is not a batch.
    """
    xs, x_tree = one_array(xs)
    leaves, treedef = jax.tree.flatten(params)
    moving = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

    def function(values: list[Any], x: Any) -> Any:
        at = list(leaves)
        for i, value in zip(moving, values, strict=True):
            at[i] = value
        return encode(jax.tree.unflatten(treedef, at), jax.tree.unflatten(x_tree, [x]))

    arrays = [leaves[i] for i in moving]
    try:
        encoder = _trace(function, arrays, xs)
    except _NEEDS_VALUES:
        if not all(isinstance(a, np.ndarray | np.generic | jax.Array) for a in arrays) or any(
            isinstance(a, jax.core.Tracer) for a in arrays
        ):
            raise
        encoder = _trace(lambda _, x: function(arrays, x), [], xs)
    varying = jaxprs.vary_like(encoder.program.jaxpr.outvars, xs)
    if varying is not xs:
        encoder, xs = _trace(function, arrays, varying), varying
    return encoder, xs


def same_program(a: Program, b: Program) -> bool:
    """Tell whether two traces are surely of one program, so that what is proved of one holds."""
    return a.x == b.x and _same(a.jaxpr, b.jaxpr)


def _same(a: Any, b: Any) -> bool:
    """Compare jaxprs; rules that are functions must be the same object, so doubt means no."""
    a, b = getattr(a, "jaxpr", a), getattr(b, "jaxpr", b)
    if a is b:
        return True
    if len(a.eqns) != len(b.eqns) or len(a.invars) != len(b.invars):
        return False
    number: dict[Any, Any] = {}
    for v, w in zip([*a.constvars, *a.invars], [*b.constvars, *b.invars], strict=False):
        number[v] = w
        if v.aval != w.aval:
            return False

    def match(u: Any, v: Any) -> bool:
        if isinstance(u, Var):
            return number.get(u) is v
        return (
            not isinstance(v, Var)
            and type(u.val) is type(v.val)
            and bool(np.array_equal(u.val, v.val))
        )

    for e, f in zip(a.eqns, b.eqns, strict=True):
        if e.primitive is not f.primitive or e.params.keys() != f.params.keys():
            return False
        if not all(map(match, e.invars, f.invars)) or len(e.outvars) != len(f.outvars):
            return False
        if not all(_same_param(e.params[name], f.params[name]) for name in e.params):
            return False
        number.update(zip(e.outvars, f.outvars, strict=True))
        if any(v.aval != w.aval for v, w in zip(e.outvars, f.outvars, strict=True)):
            return False
    return all(map(match, a.outvars, b.outvars))


def _same_param(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if hasattr(a, "eqns") or hasattr(getattr(a, "jaxpr", None), "eqns"):
        return type(a) is type(b) and not getattr(a, "consts", ()) and _same(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same_param, a, b))
    if type(a) is type(b) and hasattr(a, "transforms"):
        return _same_function(a, b)
    try:
        return bool(a == b)
    except (TypeError, ValueError):
        return False


def _same_function(a: Any, b: Any, depth: int = 3) -> bool:
    """Compare two functions made by one definition: by what they close over."""
    if a is b:
        return True
    if type(a) is type(b) and hasattr(a, "transforms"):  # a derivative rule, wrapped anew
        made = [[step[0] for step in f.transforms] for f in (a, b)]
        return made[0] == made[1] and _same_function(a.f, b.f, depth)
    if not (isinstance(a, FunctionType) and isinstance(b, FunctionType) and depth):
        return False
    cells = [[c.cell_contents for c in f.__closure__ or ()] for f in (a, b)]
    return a.__code__ is b.__code__ and all(
        _same_function(u, v, depth - 1) or _same_value(u, v) for u, v in zip(*cells, strict=True)
    )


def _same_value(a: Any, b: Any) -> bool:
    """Compare what a rule's wrapping closes over, but for its trace and what it keeps."""
    if type(a) is type(b) and (isinstance(a, Trace | dict) or type(a) is object):
        return True
    try:
        return bool(a == b)
    except (TypeError, ValueError):
        return False


def _trace(function: Callable[..., Any], arrays: list[Any], xs: Any) -> Encoder:
    x = struct(xs, of_sample=True)
    with blamed_on_samples(x):
        closed, out = jax.make_jaxpr(function, return_shape=True)(arrays, x)
    codes, code_tree = jax.tree.flatten(out)
    if len(codes) != 1:
        raise TypeError(
            f"encode must return one array per sample, got a pytree of {len(codes)} arrays. "
            "Return the code alone, or concatenate its parts."
        )
    if not jnp.issubdtype(codes[0].dtype, jnp.floating):
        raise TypeError(f"the code must be floating point, got {codes[0].dtype}.")
    flat, constants = jaxprs.flatten(closed)
    program = Program(flat, closed.jaxpr, x)
    return Encoder(program, tuple(arrays), tuple(closed.consts), tuple(constants), code_tree)
