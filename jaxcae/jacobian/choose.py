"""Choose how to compute ‖J‖²_F: the plan of least work, in chunks that fit a memory budget."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcae.jacobian import directions, footprint
from jaxcae.jacobian.batches import map_batch, share_of
from jaxcae.jacobian.bound import Bound
from jaxcae.jacobian.chain import Prepared
from jaxcae.jacobian.cost import Cost, estimate
from jaxcae.jacobian.jaxprs import at_hand, struct
from jaxcae.jacobian.modes import require_reverse
from jaxcae.jacobian.plan import End, Plan, make_plan
from jaxcae.jacobian.products import shared_out
from jaxcae.jacobian.program import Encoder, same_program, trace_encoder
from jaxcae.jacobian.readings import readings
from jaxcae.jacobian.structure import Structure, read_structure
from jaxcae.types import Encode, Params

MEMORY_BUDGET = 2**31
"""Bytes of temporaries that `auto` allows value and gradient to take, unless told otherwise."""

CodesAndNorms = tuple[Any, Float[Array, " batch"]]


class Choice(NamedTuple):
    """What `auto` does.

    Attributes:
        method: `"chain"`, or `"forward"` or `"reverse"` where an opaque part makes them cheaper.
        chunk_size: Samples (chain) or directions (forward, reverse) at a time; None for all.
        structure: What was found in the encoder.
        plan: How the chain is contracted.
        samples: Samples at a time by single directions; None for all.
        fits: Whether the budget is expected to be kept.
    """

    method: str
    chunk_size: int | None
    structure: Structure
    plan: Plan
    samples: int | None = None
    fits: bool = True


def run_choice(choice: Choice, encoder: Encoder, xs: Any) -> CodesAndNorms:
    """Compute codes and norms of a batch as chosen."""
    # What was proved of one trace holds for another of the same program.
    encoder = encoder._replace(program=choice.structure.program)
    if choice.method == "chain":
        return run_chain(choice.structure, choice.plan, encoder, xs, choice.chunk_size)
    return run_directions(choice.method, encoder, xs, choice.chunk_size, choice.samples)


def run_directions(
    method: str, encoder: Encoder, xs: Any, chunk_size: int | None, samples: int | None = None
) -> CodesAndNorms:
    """Compute codes and norms by single directions: chunks of them, and of samples."""
    make = {"forward": directions.forward, "reverse": directions.reverse}[method]
    return map_batch(make(encoder, chunk_size), xs, samples)


def run_chain(
    structure: Structure, plan: Plan, encoder: Encoder, xs: Any, chunk_size: int | None
) -> CodesAndNorms:
    """Compute codes and norms by a plan, so many samples at a time."""
    if structure.acts:  # what the code needs must happen once, in its place
        return run_directions("reverse", encoder, xs, None, chunk_size)
    if encoder.program.flat.effects:
        jax.vmap(encoder.act)(xs)
    if not structure.depends:
        codes = jax.vmap(encoder.encode)(xs)
        return codes, jnp.zeros(xs.shape[0], directions.wide(codes.dtype))
    prepared = Prepared(Bound(structure, encoder), plan, encoder.metric)

    def per_sample(x: Any) -> tuple[Any, Float[Array, ""]]:
        at = prepared.at(x)
        return at.code, _nonnegative(prepared.norm(at))

    return map_batch(per_sample, xs, chunk_size)


def _nonnegative(norm: Float[Array, ""]) -> Float[Array, ""]:
    """Return 0 for what rounding took below it; the derivative stays that of the norm."""
    return norm + jax.lax.stop_gradient(jnp.maximum(norm, 0) - norm)


def choose(
    encode: Encode,
    params: Params,
    xs: Any,
    memory_budget: int | float = MEMORY_BUDGET,
    gradient: bool = True,
) -> Choice:
    """Choose method and chunk for a batch of this shape; `xs` may be a `jax.ShapeDtypeStruct`.

    Raises:
        TypeError: If samples or codes are not floating point, or the code is not one array.
        ValueError: If JAX cannot differentiate the encoder in reverse mode.
    """
    encoder, xs = trace_encoder(encode, params, xs)
    batch, shares = share_of(xs)
    return choose_for(encoder, batch, memory_budget, gradient, shares)


def choose_for(
    encoder: Encoder,
    batch: int,
    memory_budget: int | float = MEMORY_BUDGET,
    gradient: bool = True,
    shares: int = 1,
) -> Choice:
    """Choose method and chunk for a traced encoder; with or without a gradient to come.

    With several `shares`, batch and budget are those of a device that has one of them.
    """
    require_reverse(encoder)
    structure, plan = read_and_plan(encoder, batch, shares)
    candidates = {"chain": None, **_rivals(structure, plan, encoder.directions)}
    method = "chain"
    if len(candidates) > 1:
        # A plan counts every product through an opaque part alike; the traced program knows which
        # of them the batch shares.
        xs = _batch_struct(encoder, batch)
        method = min(
            candidates, key=lambda m: predict_for(m, encoder, xs, None, True, structure, plan).flops
        )
        if method != "chain":
            structure = read_structure(encoder.program)
            plan = plan_for(structure, encoder, batch)
    return _fit(method, structure, plan, batch, memory_budget, gradient, encoder.directions)


def read_and_plan(encoder: Encoder, batch: int, shares: int = 1) -> tuple[Structure, Plan]:
    """Read the structure whose plan is the cheapest for a device's share, and make it."""
    pairs = [(s, plan_for(s, encoder, batch, shares)) for s in readings(encoder.program)]
    return min(pairs, key=lambda pair: pair[1].cost(batch))


def plan_for(structure: Structure, encoder: Encoder, batch: int, shares: int = 1) -> Plan:
    """Make the cheapest plan for a device's share of a batch, from the encoder's metric on."""
    if any(s.kind == "elementwise" and shared_out(s.in_size, shares) for s in structure.segments):
        batch *= shares  # what is done once is shared out as well
    metric = encoder.metric
    return make_plan(
        structure, batch, None if metric is None else End(metric.shape[0], metric.ndim == 1)
    )


class Remembered(NamedTuple):
    """A choice, and the program that carries it out, compiled for calls outside of any other.

    Attributes:
        choice: The choice.
        compiled: `run_choice` of the encoder's arrays and a batch.
    """

    choice: Choice
    compiled: Callable[..., CodesAndNorms]

    def run(self, encoder: Encoder, xs: Any) -> CodesAndNorms:
        """Compute codes and norms of a batch as chosen; of arrays at hand by one program."""
        arrays = (encoder.params, encoder.constants, encoder.flat_constants, encoder.metric)
        if not all(at_hand(leaf) for leaf in jax.tree.leaves((arrays, xs))):
            return run_choice(self.choice, encoder, xs)
        return self.compiled(*arrays, xs)


Memory: TypeAlias = dict[Any, Remembered]
"""What was chosen before, by what was found; it lives as long as the penalty that owns it."""


def choose_again(
    encoder: Encoder, xs: Any, memory_budget: int | float, gradient: bool, memory: Memory
) -> Remembered:
    """Choose as `choose_for`, or as for the same program before."""
    batch, shares = share_of(xs)
    key = (batch, shares, memory_budget, gradient, getattr(encoder.metric, "shape", None))
    found = memory.get(key)
    if found is None or not same_program(found.choice.structure.program, encoder.program):
        choice = choose_for(encoder, batch, memory_budget, gradient, shares)
        program, code_tree = choice.structure.program, encoder.code_tree

        def run(*arrays: Any) -> CodesAndNorms:
            params, constants, flat_constants, metric, xs = arrays
            encoder = Encoder(program, params, constants, flat_constants, code_tree, metric)
            return run_choice(choice, encoder, xs)

        found = Remembered(choice, jax.jit(run))
        while len(memory) >= _REMEMBERED:
            del memory[next(iter(memory))]
        memory[key] = found
    return found


_REMEMBERED = 8


def _rivals(structure: Structure, plan: Plan, rows: int) -> dict[str, None]:
    """List the methods by single directions that could take less work than the plan.

    A chain without opaque parts never loses to them. With one, they could share more: but only a
    method of few more directions than the plan pushes through its opaque parts anyway, and not one
    that does the same pushing. So could they where a low rank is not much lower than their number.
    """
    if structure.acts or structure.loops:
        return {}
    found: dict[str, None] = {}
    columns = sum(s.rank.columns for s in structure.segments if s.rank is not None)
    pushed = footprint.opaque_rows(structure, plan)
    for method, count, side in (
        ("forward", rows, "input"),
        ("reverse", structure.code_size, "output"),
    ):
        if method not in directional_methods(structure):
            continue
        if count <= 4 * columns or any(
            count <= 2 * rows and (end != side or rows > count) for end, rows in pushed
        ):
            found[method] = None
    return found


def directional_methods(structure: Structure) -> tuple[str, ...]:
    """List the methods by single directions that exist for the encoder."""
    forward_mode = all(segment.forward_mode for segment in structure.segments)
    return ("forward", "reverse") if forward_mode else ("reverse",)


def _fit(
    method: str,
    structure: Structure,
    plan: Plan,
    batch: int,
    memory_budget: int | float,
    gradient: bool,
    rows: int,
) -> Choice:
    """Find chunks whose expected peak fits the budget."""
    if method == "chain" and not structure.acts:
        once, each = footprint.of_plan(structure, plan, gradient)
        if once + batch * each <= memory_budget:
            return Choice(method, None, structure, plan)
        samples = int((memory_budget - once) / each)
        if samples >= 1:
            return Choice(method, samples, structure, plan)
        if not structure.has_opaque or not gradient:
            return Choice(method, 1 if batch > 1 else None, structure, plan, fits=False)
    # Not even one sample at a time: single directions need least.
    names = directional_methods(structure) if method == "chain" else (method,)
    counts = {"forward": rows, "reverse": structure.code_size}
    method = min(names, key=counts.__getitem__)
    base, each = footprint.of_directions(structure, gradient)
    whole = batch * (base + counts[method] * each)
    if whole <= memory_budget:
        return Choice(method, None, structure, plan)
    chunk = int((memory_budget / batch - base) / each)
    if chunk >= 1:
        return Choice(method, min(chunk, counts[method]), structure, plan)
    samples = int(memory_budget / (base + each))
    return Choice(method, 1, structure, plan, max(1, samples), samples >= 1)


def warn_if_unmet(choice: Choice, memory_budget: int | float) -> None:
    """Say that a budget cannot be kept."""
    if not choice.fits:
        warnings.warn(
            f"memory_budget of {memory_budget:g} bytes cannot be met: one sample at a time is "
            "expected to take more. Give more, or use method='hutchinson' or 'control_variate'.",
            stacklevel=4,
        )


def predict(
    method: str, encode: Encode, params: Params, xs: Any, chunk_size: int | None, gradient: bool
) -> Cost:
    """Predict FLOPs and peak bytes of the norms, or of norms and the gradient of their sum."""
    encoder, xs = trace_encoder(encode, params, xs)
    structure, plan = read_and_plan(encoder, *share_of(xs))
    return predict_for(method, encoder, struct(xs), chunk_size, gradient, structure, plan)


def predict_for(
    method: str,
    encoder: Encoder,
    xs: Any,
    chunk_size: int | None,
    gradient: bool,
    structure: Structure,
    plan: Plan,
    samples: int | None = None,
) -> Cost:
    """Predict the cost of a method for a traced encoder; see `predict`."""
    moving = [i for i, leaf in enumerate(encoder.params) if _is_float(leaf)]

    def program(values: list[Any], xs: Any) -> Any:
        params = list(encoder.params)
        for i, value in zip(moving, values, strict=True):
            params[i] = value
        bound = encoder._replace(params=tuple(params))
        if method == "chain":
            return run_chain(structure, plan, bound, xs, chunk_size)[1]
        return run_directions(method, bound, xs, chunk_size, samples)[1]

    def total(values: list[Any], xs: Any) -> Any:
        return jnp.sum(program(values, xs))

    values = [struct(encoder.params[i]) for i in moving]
    return estimate(jax.value_and_grad(total) if gradient and moving else program, values, xs)


def _batch_struct(encoder: Encoder, batch: int) -> jax.ShapeDtypeStruct:
    x = encoder.program.x
    return x.update(shape=(batch, *x.shape))


def _is_float(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
