"""tr J of a function from ℝᵈ to ℝᵈ: exact through up to two elementwise layers.

With T what stands before a layer of slopes m, and R what stands after it, both shared by the batch,

    tr J = Σ_u m_u (TᵀR)_uu,

and with two layers of slopes m, m′ and the kernel N between them tr J = mᵀ (N ∘ TᵀR) m′: no product
of a sample is wider than a layer. Layers of several arrays have slopes for each edge.
"""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcae.jacobian import edges
from jaxcae.jacobian.bound import Arrays, Bound
from jaxcae.jacobian.directions import accurate, wide
from jaxcae.jacobian.estimators import Distribution, draw_probes
from jaxcae.jacobian.jaxprs import typed_like
from jaxcae.jacobian.products import matmul
from jaxcae.jacobian.program import Encoder
from jaxcae.jacobian.structure import Segment, read_structure

_ADVICE = "Use method='hutchinson', which estimates it without bias for any function."


def exact(function: Encoder, xs: Any) -> tuple[Any, Float[Array, " batch"]]:
    """Compute values and tr J of a batch.

    Raises:
        ValueError: If the function has more than two elementwise layers, or any other part.
    """
    structure = read_structure(function.program)
    segments = structure.segments
    layers = [i for i, s in enumerate(segments) if s.kind == "elementwise"]
    if any(s.kind == "opaque" or s.scale is not None for s in segments):
        raise ValueError(
            "tr J is exact for affine and elementwise layers, but the function has a part that is "
            f"neither. {_ADVICE}"
        )
    if len(layers) > 2:
        raise ValueError(
            f"tr J is exact through two elementwise layers, the function has {len(layers)}. "
            f"{_ADVICE}"
        )
    if function.program.flat.effects:
        jax.vmap(function.act)(xs)
    if not structure.depends:
        values = jax.vmap(function.encode)(xs)
        return values, jnp.zeros(xs.shape[0], wide(values.dtype))
    bound = Bound(structure, function)
    ends = [-1, *layers, len(segments)]
    size = structure.in_size
    kernels = [_kernel(bound, a + 1, b) for a, b in pairwise(ends)]
    shared = _shared([segments[i] for i in layers], kernels, size)

    def per_sample(x: Any) -> tuple[Any, Float[Array, ""]]:
        values: list[Arrays] = [(x,)]
        slopes = []
        for i in range(len(segments)):
            if i in layers:
                found, local = bound.slopes(i, values[-1])
                slopes.append(_slopes(segments[i], local, bound.dtype))
            else:
                found = bound.run(i, values[-1])
            values.append(found)
        (code,) = values[-1]
        if not slopes:
            return code, shared
        total = slopes[0] @ shared if len(slopes) == 1 else matmul(slopes[0], shared) @ slopes[1]
        return code, total

    return jax.vmap(per_sample)(xs)


def _kernel(bound: Bound, first: int, last: int) -> Any:
    """Multiply the kernels of the affine segments from one index up to another; None for none."""
    product = None
    for i in range(first, last):
        kernel = bound.kernel(i)
        product = kernel if product is None else matmul(product, kernel)
    return product


def _shared(layers: list[Segment], kernels: list[Any], size: int) -> Any:
    """Compute what the slopes are contracted with: tr K, diag(TᵀR) or N ∘ TᵀR over edges."""
    before, *between, after = kernels if layers else [*kernels, None]
    eye = jnp.eye(size)
    before = eye if before is None else before
    after = (eye if after is None else after).T  # (features, width)
    if not layers:
        return jnp.sum(before * after.T)
    first, last = layers[0], layers[-1]
    sources = [edges.spans(first.in_sizes)[e.source] for e in first.edges]
    targets = [edges.spans(last.out_sizes)[e.target] for e in last.edges]
    if len(layers) == 1:
        t, r = edges.columns(before, sources), edges.columns(after, targets)
        return jnp.sum(t * r, 0)
    crossed = matmul(before.T, after)
    (kernel,) = between
    kernel = jnp.eye(first.out_size) if kernel is None else kernel
    inner = edges.tile(
        kernel,
        [edges.spans(first.out_sizes)[e.target] for e in first.edges],
        [edges.spans(last.in_sizes)[e.source] for e in last.edges],
    )
    return inner * edges.tile(crossed, sources, targets)


def _slopes(segment: Segment, local: list[Any], dtype: Any) -> Any:
    sizes = segment.in_sizes
    parts = [
        jnp.ones(sizes[edge.source], dtype) if slope is None else slope
        for edge, slope in zip(segment.edges, local, strict=True)
    ]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def estimate(
    function: Encoder, xs: Any, key: Any, num_probes: int, distribution: Distribution
) -> tuple[Any, Float[Array, " batch"]]:
    """Compute values and the mean of vᵀJv over probes of each sample."""
    size = function.code_size

    def project(x: Any, probes: Any) -> tuple[Any, Float[Array, ""]]:
        value, push = jax.linearize(function.encode, x)

        def product(v: Any) -> Any:
            pushed = push(typed_like(v, x))
            return jnp.sum(accurate(v) * accurate(pushed).reshape(-1))

        return value, jnp.mean(jax.vmap(product)(probes))

    return jax.vmap(project)(xs, draw_probes(key, xs, num_probes, size, distribution))
