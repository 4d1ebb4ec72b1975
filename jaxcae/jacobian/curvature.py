"""‖∇ⁿh‖²_F: exact through one elementwise layer, for n = 2 through two, estimated elsewhere.

Write t_u for the columns of what stands before an elementwise layer s, r_u for those of what stands
after it, G = TᵀT and M = RᵀR. Then ∇ⁿh = Σ_u s⁽ⁿ⁾(a_u) r_u ⊗ t_u ⊗ … ⊗ t_u, so that

    ‖∇ⁿh‖²_F = s⁽ⁿ⁾ᵀ (M ∘ G^∘n) s⁽ⁿ⁾,

and every order costs one more form of the batch's own two grams. A layer of several arrays (a gate)
has a term for each result and each choice of n of the arrays that it depends on. With a second
layer of slopes r and curvatures q after a kernel K, and A = Kᵀ diag(s′), B = Kᵀ diag(s″), P = AG:

    ‖∇²h‖²_F = Σ_ij M_ij [q_i q_j (PAᵀ)²_ij + 2 q_i r_j (P∘P Bᵀ)_ij + r_i r_j (B (G∘G) Bᵀ)_ij].
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcae.jacobian import batches, choose, edges
from jaxcae.jacobian.bends import moves, no_curvature
from jaxcae.jacobian.bound import Arrays, Bound
from jaxcae.jacobian.carried import Carried, dense, start, times
from jaxcae.jacobian.jaxprs import gathered, struct, typed_like
from jaxcae.jacobian.products import gram, matmul, quadratic_form
from jaxcae.jacobian.program import Encoder
from jaxcae.jacobian.structure import Segment, Structure

Norms = dict[int, Float[Array, " batch"]]
"""‖∇ⁿh‖²_F of each sample, by order n."""


class Path(NamedTuple):
    """A result of an elementwise layer, and the arrays by which it is differentiated, sorted."""

    target: int
    sources: tuple[int, ...]


def exact(
    structure: Structure,
    encoder: Encoder,
    xs: Any,
    orders: Sequence[int],
    chunk_size: int | None = None,
    memory_budget: float | None = None,
) -> tuple[Any, Norms]:
    """Compute codes and ‖∇ⁿh‖² of these orders, which share slopes and grams.

    Args:
        structure: What was found in the encoder.
        encoder: The encoder.
        xs: The batch.
        orders: Positive; 1 is the penalty itself.
        chunk_size: Samples at a time, rematerialised; all by default.
        memory_budget: Bytes of temporaries in place of a chunk size.

    Raises:
        ValueError: If structure does not allow it, or there is no derivative of that order.
    """
    layers = _layers(structure, max(orders))
    bound = Bound(structure, encoder)
    left = _side(bound, range(layers[0]), from_input=True)
    last = len(structure.segments) - 1
    right = _side(bound, range(last, layers[-1], -1), from_input=False)
    make = _one_layer if len(layers) == 1 else _two_layers
    prepared = make(bound, layers, left, right, orders)
    if encoder.program.flat.effects:
        jax.vmap(encoder.act)(xs)

    def per_sample(x: Any) -> tuple[Any, dict[int, Any]]:
        values = [(x,)]
        for i in range(len(structure.segments)):
            values.append(bound.run(i, values[-1]))
        (code,) = values[-1]
        return code, prepared.norms(values)

    if memory_budget is not None and prepared.numbers:
        each = prepared.numbers * bound.dtype.itemsize
        chunk_size = max(1, int(memory_budget / each))
    codes, norms = batches.map_batch(per_sample, xs, chunk_size)
    if 1 in orders and prepared.lacks_first:  # what passes unchanged counts in ‖J‖² alone
        plan = choose.plan_for(structure, encoder, *batches.share_of(xs))
        codes, norms[1] = choose.run_chain(structure, plan, encoder, xs, chunk_size)
    return codes, norms


class _Prepared(NamedTuple):
    """What samples share, as a function of the values that one sample takes along the chain.

    Attributes:
        norms: Computes ‖∇ⁿh‖² by order.
        numbers: How many numbers it holds for a sample at the worst; 0 for few.
        lacks_first: Whether ‖J‖² is left out.
    """

    norms: Callable[[list[Arrays]], dict[int, Any]]
    numbers: int = 0
    lacks_first: bool = False


def _layers(structure: Structure, order: int) -> list[int]:
    """List the elementwise segments if the order is exact with them."""
    segments = structure.segments
    found = [i for i, s in enumerate(segments) if s.kind == "elementwise"]
    plain = all(s.kind != "opaque" and s.scale is None for s in segments)
    if plain and not found:
        raise no_curvature(order)
    if plain and len(found) == 1:
        return found
    if plain and len(found) == 2 and order == 2 and all(segments[i].is_diagonal for i in found):
        return found
    what = (
        f"{len(found)} elementwise layers"
        if plain
        else "a part that is neither affine nor elementwise"
    )
    raise ValueError(
        f"‖∇ⁿh‖² of order {order} is exact through one elementwise layer (order 2: two, each of "
        f"one array), but the encoder has {what}. Use the method 'hutchinson', which estimates it "
        "without bias for any encoder."
    )


def _side(bound: Bound, indices: Sequence[int], *, from_input: bool) -> Carried:
    """Multiply the kernels from one end of the chain up to a layer."""
    state = start(bound.encoder.metric if from_input else None, bound.dtype)
    for i in indices:
        kernel = bound.kernel(i)
        state = times(state, kernel if from_input else kernel.T)
    return state


def _derivative(bound: Bound, i: int, target: int, sources: Sequence[int]) -> Callable[..., Any]:
    """Differentiate one result of an elementwise segment by these of its arrays in turn."""

    def value(*arrays: Any) -> Any:
        return bound.run(i, arrays)[target]

    found: Callable[..., Any] = value
    for source in sources:
        found = _along(found, source, bound.structure.segments[i].forward_mode)
    return found


def _along(function: Callable[..., Any], source: int, forward: bool) -> Callable[..., Any]:
    """Differentiate an elementwise function by one of its arrays, every element its own.

    A direction may be given after the arrays, in place of ones.
    """

    def derivative(*arrays: Any, direction: Any = None) -> Any:
        def of_source(a: Any) -> Any:
            return function(*arrays[:source], a, *arrays[source + 1 :])

        at = arrays[source]
        if forward:
            return jax.jvp(
                of_source, (at,), (jnp.ones_like(at) if direction is None else direction,)
            )[1]
        value, pull = jax.vjp(of_source, at)
        along = jnp.ones_like(value)
        return pull(along if direction is None else typed_like(direction, value))[0]

    return derivative


def _paths(bound: Bound, i: int, order: int) -> list[Path]:
    """List each result of a layer with each n of its arrays by which its derivative is not 0."""
    segment = bound.structure.segments[i]
    kinds = [struct(v) for v in segment.inputs]
    found = []
    for target in range(len(segment.outputs)):
        own = [e.source for e in segment.edges if e.target == target and not e.is_identity]
        for sources in itertools.combinations_with_replacement(own, order):
            *before, last = sources
            function = _along(_derivative(bound, i, target, before), last, segment.forward_mode)

            def along(*arrays: Any, f: Any = function) -> Any:
                return f(*arrays[:-1], direction=arrays[-1])

            if moves(along, *kinds, kinds[last]):
                found.append(Path(target, sources))
    return found


def _one_layer(
    bound: Bound, layers: list[int], left: Carried, right: Carried, orders: Sequence[int]
) -> _Prepared:
    (i,) = layers
    segment = bound.structure.segments[i]
    paths = {n: _paths(bound, i, n) for n in orders}
    for n in orders:
        if n > 1 and not paths[n]:
            raise no_curvature(n)
    skips = any(edge.is_identity for edge in segment.edges)
    diagonal = segment.is_diagonal and (left.is_diagonal or right.is_diagonal)
    weigh = _diagonal_forms if diagonal else _full_forms
    wanted = {n: paths[n] for n in orders if n > 1 or not skips}
    forms = weigh(bound, segment, left, right, wanted)

    def norms(values: list[Arrays]) -> dict[int, Any]:
        def derivatives(path: Path) -> Any:
            found = _derivative(bound, i, path.target, path.sources)(*values[i])
            return gathered(found).astype(bound.dtype).reshape(-1)

        return {n: form([derivatives(path) for path in paths[n]]) for n, form in forms.items()}

    return _Prepared(norms, lacks_first=skips)


Form = Callable[[list[Any]], Any]
"""Computes ‖∇ⁿh‖² from the derivatives along each path."""


def _diagonal_forms(
    bound: Bound, segment: Segment, left: Carried, right: Carried, paths: dict[int, list[Path]]
) -> dict[int, Form]:
    """Σ_u s_u² M_uu G_uuⁿ: one of the two grams has nothing beside its diagonal."""
    inner, outer = _squares(left), _squares(right)

    def form(weights: Any, found: list[Any]) -> Any:
        return sum(jnp.sum(jnp.broadcast_to(weights, s.shape) * jnp.square(s)) for s in found)

    return {n: partial(form, outer * inner**n) for n in paths}


def _squares(state: Carried) -> Any:
    if state.first is None:
        return jnp.ones(1)
    return jnp.square(state.first) if state.is_diagonal else jnp.sum(jnp.square(state.first), 0)


def _full_forms(
    bound: Bound, segment: Segment, left: Carried, right: Carried, paths: dict[int, list[Path]]
) -> dict[int, Form]:
    """s⁽ⁿ⁾ᵀ (M ∘ G^∘n) s⁽ⁿ⁾ over the paths, each in every order of its arrays."""
    every = [path for found in paths.values() for path in found]
    inner = _Gram(
        dense(left, segment.in_size, bound.dtype).first,
        segment.in_sizes,
        {source for path in every for source in path.sources},
    )
    outer = _Gram(
        dense(right, segment.out_size, bound.dtype).first,
        segment.out_sizes,
        {path.target for path in every},
    )

    def block(a: Path, b: Path) -> Any:
        orders = set(itertools.permutations(a.sources))
        products = [
            math.prod(itertools.starmap(inner.between, zip(order, other, strict=True)))
            for order in sorted(orders)
            for other in sorted(set(itertools.permutations(b.sources)))
        ]
        return outer.between(a.target, b.target) * sum(products)

    def form(blocks: dict[tuple[int, int], Any], found: list[Any]) -> Any:
        # Block by block: one form of all blocks laid together has a wrong gradient by XLA's
        # fusion on CPU in jaxlib 0.10.1 (not in 0.12).
        return sum(
            quadratic_form(found[a], c) if a == b else 2 * jnp.sum(matmul(found[a], c) * found[b])
            for (a, b), c in blocks.items()
        )

    return {
        n: partial(
            form,
            {
                (a, b): block(found[a], found[b])
                for a in range(len(found))
                for b in range(a, len(found))
            },
        )
        for n, found in paths.items()
    }


class _Gram:
    """Inner products of the columns of a stack, those of some of its arrays."""

    def __init__(self, stack: Any, sizes: Sequence[int], used: set[int]) -> None:
        spans, kept = edges.spans(sizes), sorted(used)
        self._places = dict(zip(kept, edges.spans([sizes[i] for i in kept]), strict=True))
        self._is_one = len(kept) == 1
        whole = len(kept) == len(sizes)
        self._gram = gram(stack if whole else edges.columns(stack, [spans[i] for i in kept]), True)

    def between(self, a: int, b: int) -> Any:
        """Give the inner products of one array's columns with another's."""
        return self._gram if self._is_one else self._gram[self._places[a], self._places[b]]


def _two_layers(
    bound: Bound, layers: list[int], left: Carried, right: Carried, orders: Sequence[int]
) -> _Prepared:
    first, second = layers
    curved = [bool(_paths(bound, i, 2)) for i in layers]
    if not any(curved):
        raise no_curvature(2)
    segments = bound.structure.segments
    between = start(None, bound.dtype)
    for i in range(first + 1, second):
        between = times(between, bound.kernel(i))
    rows = dense(between, segments[first].out_size, bound.dtype).first.T  # (k, h)
    inner = gram(dense(left, segments[first].in_size, bound.dtype).first, True)
    outer = (
        None
        if right.first is None
        else gram(dense(right, segments[second].out_size, bound.dtype).first, True)
    )

    def slope(i: int, order: int, values: list[Arrays]) -> Any:
        found = _derivative(bound, i, 0, (0,) * order)(*values[i])
        return gathered(found).astype(bound.dtype).reshape(-1)

    def contract(weights: Any, other: Any, products: Any) -> Any:
        """Σ_ij M_ij w_i v_j X_ij, of which X's diagonal is given where M is the identity."""
        if outer is None:
            return jnp.sum(weights * other * products)
        return jnp.sum(matmul(weights, outer * products) * other)

    def inner_products(a: Any, b: Any) -> Any:
        return jnp.sum(a * b, -1) if outer is None else matmul(a, b.T)

    def norms(values: list[Arrays]) -> dict[int, Any]:
        r, q = slope(second, 1, values), slope(second, 2, values)
        a, b = (rows * slope(first, n, values)[None] for n in (1, 2))
        p = matmul(a, inner)
        n = inner_products(p, a)
        found = {1: contract(r, r, n), 2: 0.0}
        if curved[1]:
            found[2] += contract(q, q, jnp.square(n))
        if curved[0]:
            squares = jnp.square(inner)
            bends = quadratic_form(b, squares) if outer is None else matmul(b, squares) @ b.T
            found[2] += contract(r, r, bends)
        if all(curved):
            found[2] += 2 * contract(q, r, inner_products(jnp.square(p), b))
        return {order: found[order] for order in orders}

    return _Prepared(norms, numbers=8 * rows.size)
