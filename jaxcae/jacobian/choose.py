"""Choose how to compute ‖J‖²_F: the plan of least work, in chunks that fit a memory budget."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcae.jacobian import directions
from jaxcae.jacobian.chain import chain
from jaxcae.jacobian.cost import Cost, estimate
from jaxcae.jacobian.jaxprs import calls_primitive, struct
from jaxcae.jacobian.plan import Plan, make_plan
from jaxcae.jacobian.structure import Structure, read_structure
from jaxcae.types import Encode, Params

MEMORY_BUDGET = 2**31
"""Bytes of temporaries that `auto` allows value and gradient to take, unless told otherwise."""

NOMINAL_BATCH = 1024
"""The batch to plan for where its size is symbolic, as in `jax.export`."""

CodesAndNorms = tuple[Any, Float[Array, " batch"]]


class Choice(NamedTuple):
    """What `auto` does.

    Attributes:
        method: `"chain"`, or `"forward"` or `"reverse"` where an opaque part makes them cheaper.
        chunk_size: Samples (chain) or directions (forward, reverse) at a time; None for all.
        structure: What was found in the encoder.
        plan: How the chain is contracted.
    """

    method: str
    chunk_size: int | None
    structure: Structure
    plan: Plan


def run(
    method: str, encode: Callable[[Any], Any], xs: Any, chunk_size: int | None
) -> CodesAndNorms:
    """Compute codes and norms of a batch by one of the exact methods, nothing chosen."""
    if method == "forward":
        return jax.vmap(directions.forward(encode, chunk_size))(xs)
    if method == "reverse":
        return jax.vmap(directions.reverse(encode, chunk_size))(xs)
    structure = read_structure(encode, struct(xs, of_sample=True))
    batch = _batch_size(xs)
    per_sample = chain(structure, make_plan(structure, batch))
    if chunk_size is None or chunk_size >= batch:
        return jax.vmap(per_sample)(xs)
    # Rematerialised, or the backward pass would hold what the chunks were to avoid.
    return jax.lax.map(jax.checkpoint(per_sample), xs, batch_size=chunk_size)


def choose(
    encode: Encode, params: Params, xs: Any, memory_budget: int | float = MEMORY_BUDGET
) -> Choice:
    """Choose method and chunk for a batch of this shape; `xs` may be a `jax.ShapeDtypeStruct`.

    Raises:
        TypeError: If samples or codes are not floating point, or the code is not one array.
        ValueError: If JAX cannot differentiate the encoder in reverse mode.
    """
    batch = _batch_size(xs)
    xs = struct(xs)
    xs = xs.update(shape=(batch, *xs.shape[1:]))
    structure = read_structure(lambda x: encode(params, x), struct(xs, of_sample=True))
    if any(calls_primitive(eqn, "while") for s in structure.segments for eqn in s.equations):
        raise ValueError(
            "the encoder runs a lax.while_loop (or a fori_loop without static bounds), which has "
            "no reverse mode, so the penalty has no gradient. Use lax.scan or static bounds; for "
            "values alone, method='forward'."
        )
    plan = make_plan(structure, batch)
    method = "chain"
    if any(segment.kind == "opaque" for segment in structure.segments):
        # A plan counts every product through an opaque part alike; the traced program knows which
        # of them the batch shares. (A chain without opaque parts never loses to the other two.)
        method = min(
            ("chain", *directional_methods(structure)),
            key=lambda m: predict(m, encode, params, xs, None, gradient=True).flops,
        )
    limit = {"chain": batch, "forward": structure.in_size, "reverse": structure.code_size}
    chunk_size = _fit(method, limit[method], encode, params, xs, memory_budget)
    return Choice(method, chunk_size, structure, plan)


def directional_methods(structure: Structure) -> tuple[str, ...]:
    """List the methods by single directions that exist for the encoder."""
    forward_mode = all(segment.forward_mode for segment in structure.segments)
    return ("forward", "reverse") if forward_mode else ("reverse",)


def _fit(
    method: str, limit: int, encode: Encode, params: Params, xs: Any, memory_budget: int | float
) -> int | None:
    """Find a chunk, at most `limit`, whose predicted peak fits the budget; None for no chunks."""
    chunk: int | None = None
    size = limit
    while size > 1:
        peak = predict(method, encode, params, xs, chunk, gradient=True).bytes
        if peak <= memory_budget:
            break
        size = max(1, min(size // 2, int(size * memory_budget / peak)))
        chunk = size
    return chunk


def predict(
    method: str, encode: Encode, params: Params, xs: Any, chunk_size: int | None, gradient: bool
) -> Cost:
    """Predict FLOPs and peak bytes of the norms, or of norms and the gradient of their sum."""
    leaves, treedef = jax.tree.flatten(params)
    moving = [i for i, leaf in enumerate(leaves) if _is_float(leaf)]

    def program(values: list[Any], xs: Any) -> Any:
        at = list(leaves)
        for i, value in zip(moving, values, strict=True):
            at[i] = value
        bound = jax.tree.unflatten(treedef, at)
        return run(method, lambda x: encode(bound, x), xs, chunk_size)[1]

    def total(values: list[Any], xs: Any) -> Any:
        return jnp.sum(program(values, xs))

    values = [struct(leaves[i]) for i in moving]
    return estimate(jax.value_and_grad(total) if gradient and moving else program, values, xs)


def _batch_size(xs: Any) -> int:
    return xs.shape[0] if isinstance(xs.shape[0], int) else NOMINAL_BATCH


def _is_float(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
