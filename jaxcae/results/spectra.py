"""Spectra of an encoder's Jacobian: how many directions of the data the code follows, and which."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcae.errors import check_positive_int
from jaxcae.jacobian.bound import Bound
from jaxcae.jacobian.directions import accurate
from jaxcae.jacobian.jaxprs import typed_like
from jaxcae.jacobian.program import trace_encoder
from jaxcae.jacobian.structure import Segment, read_structure
from jaxcae.types import Encode, Params

PerSample = Callable[[Params, Float[Array, "batch ..."]], Float[Array, "..."]]
"""`(params, xs) -> values`: one value, or one row of values, per sample."""


class Spectrum(NamedTuple):
    """Singular values by rank, over many samples; each field has shape `(min(d, k),)`.

    Attributes:
        mean: The mean of the i-th largest singular value.
        low: A low quantile of it over samples.
        high: A high quantile of it over samples.
    """

    mean: Float[Array, " rank"]
    low: Float[Array, " rank"]
    high: Float[Array, " rank"]


def singular_values(encode: Encode, *, chunk_size: int = 32) -> PerSample:
    """Make `(params, xs) -> (batch, min(d, k))`, the singular values of J(x), largest first.

    J is built row by row (k backward passes) where k ≤ d and column by column (d forward passes)
    otherwise, from the first layer on, whose kernel is factored once a batch. It is decomposed as
    it is: the eigenvalues of JJᵀ would be cheaper, and would lose every σ below √ε σ₁. Values below
    about 1e-7 σ₁ are rounding in float32.

    Units are those of the code over those of the features: σ₁ is the furthest that a unit step in
    the input can move the code, to first order.

    Args:
        encode: `encode(params, x) -> z` for one sample; samples and codes may have any shape.
        chunk_size: Samples at a time: O(chunk_size · d · k) memory.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxcae.results.analysis import singular_values
        >>> encode = lambda params, x: jnp.array([3.0, 0.5]) * x
        >>> jax.jit(singular_values(encode))(None, jnp.ones((1, 2)))
        Array([[3. , 0.5]], dtype=float32)
    """
    check_positive_int("chunk_size", chunk_size)

    def values(params: Params, xs: Any) -> Float[Array, "batch rank"]:
        reduced = _reduced(encode, params, xs)

        def per_sample(x: Any) -> Float[Array, " rank"]:
            jacobian = reduced.jacobian(x)
            tall = jacobian.T if jacobian.shape[0] <= jacobian.shape[1] else jacobian
            # The small square factor R has the same singular values, as accurately (doi:
            # 10.1145/355984.355990), in about half the time for 64 × 784.
            found = jnp.linalg.svd(jnp.linalg.qr(tall, mode="r"), compute_uv=False)
            return jnp.pad(found, (0, reduced.rank - found.size))

        return jax.lax.map(per_sample, xs, batch_size=chunk_size)

    return values


def tangents(
    encode: Encode, rank: int, *, chunk_size: int = 32
) -> Callable[[Params, Any], tuple[Float[Array, "batch rank"], Float[Array, "batch rank ..."]]]:
    """Make `(params, xs) -> (values, directions)`: where a step in the input moves the code most.

    The largest singular values σ₁ ≥ … ≥ σ_r of J(x) and its right singular vectors, orthonormal
    directions in the space of samples. In a contractive encoder they span the tangent plane of the
    data at x. The sign of a direction says nothing.

    Args:
        encode: `encode(params, x) -> z` for one sample.
        rank: r, at most min(d, k).
        chunk_size: Samples at a time: O(chunk_size · d · r) memory.

    Returns:
        A function that gives values (batch, r) and directions (batch, r, *features).

    Raises:
        ValueError: If `rank` is not positive, or more than min(d, k).

    References:
        Rifai et al., "The Manifold Tangent Classifier", NeurIPS 2011.
    """
    check_positive_int("rank", rank)
    check_positive_int("chunk_size", chunk_size)

    def found(params: Params, xs: Any) -> Any:
        reduced = _reduced(encode, params, xs)
        if rank > reduced.rank:
            raise ValueError(f"rank must be at most {reduced.rank}, min(d, k), got {rank}.")

        def per_sample(x: Any) -> Any:
            _, values, directions = jnp.linalg.svd(reduced.jacobian(x), full_matrices=False)
            short = max(0, rank - values.size)
            values = jnp.pad(values[:rank], (0, short))
            along = jnp.pad(directions[:rank], ((0, short), (0, 0)))
            if reduced.basis is not None:
                along = along @ reduced.basis.T
            return values, along.reshape(rank, *x.shape)

        return jax.lax.map(per_sample, xs, batch_size=chunk_size)

    return found


class _Reduced(NamedTuple):
    """An encoder's Jacobian without the directions that its first layer does not pass.

    Attributes:
        jacobian: `x -> J(x) Q`, (k, width), with the singular values of J(x) that are not 0.
        basis: Q, (d, width), with orthonormal columns; None for the identity.
        rank: min(d, k).
    """

    jacobian: Callable[[Any], Float[Array, "latent width"]]
    basis: Float[Array, "features width"] | None
    rank: int


def _reduced(encode: Encode, params: Params, xs: Any) -> _Reduced:
    """Factor the first kernel K = QR once a batch, so that J(x) = J_rest(x) Rᵀ Qᵀ.

    Where the encoder does not begin with an affine layer that narrows, it is taken as it is.
    """
    encoder, _ = trace_encoder(encode, params, xs)
    structure = read_structure(encoder.program)
    bound = Bound(structure, encoder)
    segments = structure.segments
    rank = min(structure.in_size, structure.code_size)
    first = 0
    while first < len(segments) - 1 and _is_plain(segments[first]):
        first += 1
    narrows = first > 0 and segments[first].in_size < structure.in_size
    if structure.acts or not narrows:
        return _Reduced(lambda x: _jacobian(encoder.encode, x), None, rank)
    kernel = bound.kernel(0)
    for i in range(1, first):
        kernel = kernel @ bound.kernel(i)
    basis, factor = jnp.linalg.qr(kernel)

    def jacobian(x: Any) -> Any:
        arrays: Any = (x,)
        for i in range(first):
            arrays = bound.run(i, arrays)

        def rest(flat: Any) -> Any:
            values: Any = _split(segments[first], arrays, flat)
            for i in range(first, len(segments)):
                values = bound.run(i, values)
            return values[0]

        return _jacobian(rest, bound.join(arrays)) @ factor.T

    return _Reduced(jacobian, basis, rank)


def _split(segment: Segment, like: Any, flat: Any) -> tuple[Any, ...]:
    ends = list(itertools.accumulate(segment.in_sizes))
    parts = zip(like, [0, *ends], ends, strict=False)
    return tuple(typed_like(flat[start:end], array) for array, start, end in parts)


def _is_plain(segment: Segment) -> bool:
    return segment.kind == "affine" and segment.scale is None


def _jacobian(function: Callable[[Any], Any], x: Any) -> Float[Array, "latent width"]:
    code = jax.eval_shape(function, x)
    differentiate = jax.jacrev if code.size <= x.size else jax.jacfwd
    jacobian = differentiate(function)(x).reshape(code.size, x.size)
    return accurate(jacobian)  # there is no decomposition in half precision


def average_spectrum(
    values: Float[Array, "batch rank"], quantiles: tuple[float, float] = (0.1, 0.9)
) -> Spectrum:
    """Average singular values over samples, rank by rank: s̄_i = mean over x of σ_i(x).

    Args:
        values: From `singular_values`, over held-out data.
        quantiles: Which quantiles over samples to give beside the mean.

    References:
        Rifai et al., "Contractive Auto-Encoders", ICML 2011, section 5.3: a spectrum that falls
        off fast shows that the code follows few directions, those along the data.
    """
    low, high = jnp.quantile(values, jnp.array(quantiles, values.dtype), axis=0)
    return Spectrum(jnp.mean(values, axis=0), low, high)


def effective_dimension(values: Float[Array, "batch rank"]) -> Float[Array, " batch"]:
    """Count the directions that the code follows, weighed by how closely it follows them.

    The participation ratio of the squared singular values:

        D(x) = (Σ_i σ_i²)² / Σ_i σ_i⁴ = ‖J‖⁴_F / ‖JᵀJ‖²_F

    between 1 (one direction) and min(d, k) (all alike); n equal values and zeros otherwise give n.
    It does not change when the code is scaled or rotated. 0 where J = 0.

    Args:
        values: From `singular_values`.

    Returns:
        A number of dimensions per sample, not an integer.
    """
    squares = jnp.square(_relative(values))
    total, fourth = jnp.sum(squares, -1), jnp.sum(jnp.square(squares), -1)
    return jnp.where(fourth > 0, jnp.square(total) / jnp.where(fourth > 0, fourth, 1), 0)


def active_dimensions(
    values: Float[Array, "batch rank"], threshold: float = 0.1
) -> Int[Array, " batch"]:
    """Count the singular values that are not small: #{i : σ_i ≥ threshold · σ₁}.

    With a threshold near the rounding error this is the numerical rank of J. 0 where J = 0.

    Args:
        values: From `singular_values`.
        threshold: What counts as active, as a share of the largest value; above 0, at most 1.

    Returns:
        A whole number of dimensions per sample.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is a share of the largest value, got {threshold!r}.")
    return jnp.sum(_relative(values) >= threshold, axis=-1)


def _relative(values: Float[Array, "batch rank"]) -> Float[Array, "batch rank"]:
    """Divide by the largest value, so that no square over- or underflows; 0 where all are 0."""
    largest = jnp.max(values, axis=-1, keepdims=True)
    return values / jnp.where(largest > 0, largest, 1)
