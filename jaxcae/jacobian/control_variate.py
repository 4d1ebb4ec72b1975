"""An unbiased estimate of ‖J‖²_F for deep chains, with a control variate from mean slopes.

Let D_l be the diagonal of the slopes m_l of the l-th of n elementwise segments, D̄_l its mean over
the batch, U_l and V_l the products of kernels and mean slopes after and before it, and C the
product with mean slopes throughout, U_l D̄_l V_l for any l. Let s_l D̄_l be the multiple of the mean
nearest to a sample's own slopes, each unit weighed by what passes through it,

    s_l = Σ_i w_i m̄_i m_i / Σ_i w_i m̄_i²,    w_i = ‖U_l e_i‖² ‖e_iᵀV_l‖²,

and let J_A keep the terms of J with at most one deviation D_l − s_l D̄_l. With s = Π s_j, that is

    J_A = Σ_l (s/s_l) U_l D_l V_l − (n − 1) s C = Σ_l U_l E_l V_l = U E V,
    e_l = (s/s_l) m_l − (1 − 1/n) s m̄_l                (with s/s_l the product of the others),

the Jacobian of a *two-layer* network as wide as all elementwise segments together. Its norm is
exact and cheap, eᵀ(UᵀU ∘ VVᵀ)e, and for a probe v with E[vvᵀ] = I

    P̂ = ‖J_A‖²_F + ‖Jᵀv‖² − ‖J_Aᵀv‖²

is unbiased whatever means and scales are, since v is independent of them: E[P̂] = ‖J_A‖² + ‖J‖² −
‖J_A‖². That holds identically in the parameters with means and scales held fixed, so gradients are
unbiased too, and neither needs one of its own. The noise comes from products of two or more
deviations only. (Without the scales, segments that saturate together would be extrapolated far
beyond: four of slopes 0.3 m̄ multiply to 0.008 C, where 1 − 4 · 0.7 is −1.8.)
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxcae.jacobian.bound import Bound
from jaxcae.jacobian.directions import wide
from jaxcae.jacobian.estimators import Distribution, draw_probes
from jaxcae.jacobian.products import gram, quadratic_form
from jaxcae.jacobian.program import Encoder
from jaxcae.jacobian.structure import Structure, read_structure


def control_variate(
    encoder: Encoder,
    xs: Any,
    key: PRNGKeyArray,
    num_probes: int = 1,
    distribution: Distribution = "rademacher",
) -> tuple[Any, Float[Array, " batch"]]:
    """Compute codes and P̂ for a batch; P̂ is the mean over probes, each sample with its own.

    Exact if there is at most one elementwise segment, or where the samples' slopes are multiples of
    one another in each. The cost of a sample grows neither with d nor with the Jacobian's size: it
    is (Σ h_l)² + h_1² + 2 Σ h_l h_{l+1} + k Σ h_l multiplications for one probe, with h_l the
    widths of the elementwise segments.

    Raises:
        ValueError: If a segment of the encoder is opaque.
    """
    structure = read_structure(encoder.program)
    _require_chain(structure)
    if encoder.program.flat.effects:
        jax.vmap(encoder.act)(xs)
    if not structure.depends:
        codes = jax.vmap(encoder.encode)(xs)
        return codes, jnp.zeros(xs.shape[0], wide(codes.dtype))
    codes, kernels, slopes = _forward(Bound(structure, encoder), xs)
    if not slopes:
        return codes, jnp.full(xs.shape[0], jnp.sum(jnp.square(kernels[0])))

    means = [jax.lax.stop_gradient(jnp.mean(m, 0)) for m in slopes]
    first_gram = gram(kernels[0], shared=True)
    rows = _rows(kernels, means)  # the matrices U_l
    columns_gram = _columns_gram(first_gram, kernels, means)
    interaction = columns_gram * gram(jnp.concatenate(rows, -1), shared=True)  # UᵀU ∘ VVᵀ
    e = _anchor_slopes(slopes, means, _scales(slopes, means, jnp.diag(interaction)))
    anchor = quadratic_form(jnp.concatenate(e, -1), interaction)
    if len(slopes) == 1:
        return codes, anchor

    def correct(probe: Float[Array, " latent"], m: Any, e: Any) -> Float[Array, ""]:
        """Compute ‖Jᵀv‖² − ‖J_Aᵀv‖² as ⟨(J − J_A)ᵀv, (J + J_A)ᵀv⟩, before the first kernel."""
        through = [probe @ u for u in rows]
        pulled, anchored = m[-1] * through[-1], e[-1] * through[-1]
        for i in reversed(range(len(m) - 1)):
            pulled = m[i] * (pulled @ kernels[i + 1].T)
            anchored = e[i] * through[i] + means[i] * (anchored @ kernels[i + 1].T)
        return jnp.sum(((pulled - anchored) @ first_gram) * (pulled + anchored))

    probes = draw_probes(key, xs, num_probes, rows[-1].shape[0], distribution)
    corrections = jax.vmap(jax.vmap(correct, (0, None, None)))(probes, slopes, e)
    return codes, anchor + jnp.mean(corrections, -1)


def _scales(slopes: Sequence[Any], means: Sequence[Any], weights: Any) -> list[Any]:
    """Compute s_1 … s_n of a batch, which need no gradient; 1 where nothing passes."""
    ends = itertools.accumulate(mean.size for mean in means)
    found = []
    for m, mean, end in zip(slopes, means, ends, strict=True):
        weighed = weights[end - mean.size : end] * mean
        norm = weighed @ mean
        found.append(jnp.where(norm > 0, m @ weighed / jnp.where(norm > 0, norm, 1), 1))
    return list(jax.lax.stop_gradient(found))


def _anchor_slopes(slopes: Sequence[Any], means: Sequence[Any], scales: list[Any]) -> list[Any]:
    """Compute e_1 … e_n of a batch."""
    n = len(slopes)
    e = []
    for i, (m, mean) in enumerate(zip(slopes, means, strict=True)):
        others = math.prod(scales[:i] + scales[i + 1 :], start=jnp.ones_like(scales[i]))
        whole = others * scales[i]
        e.append(others[:, None] * m - (1 - 1 / n) * whole[:, None] * mean[None, :])
    return e


def _require_chain(structure: Structure) -> None:
    opaque = [
        segment
        for segment in structure.segments
        if segment.scale is not None or not (segment.kind == "affine" or segment.is_diagonal)
    ]
    if opaque:
        names = dict.fromkeys(eqn.primitive.name for s in opaque for eqn in s.equations)
        raise ValueError(
            "control_variate needs an encoder of affine and elementwise parts, but found an "
            f"opaque part ({', '.join(names)}). Use method='auto' or 'hutchinson'."
        )


def _forward(bound: Bound, xs: Any) -> tuple[Any, list[Any], list[Any]]:
    """Compute codes, kernels K_1 … K_{n+1} and slopes m_1 … m_n, so that Jᵀ = K_1 D_1 K_2 … ."""
    kernels: list[Any] = []
    slopes: list[Any] = []
    pending: Any = None  # the product of kernels since the last slopes
    v: Any = (xs,)
    for i, segment in enumerate(bound.structure.segments):
        if segment.kind == "affine":
            own = bound.kernel(i)
            pending = own if pending is None else pending @ own
            v = jax.vmap(lambda *u, i=i: bound.run(i, u))(*v)
        else:
            kernels.append(
                jnp.eye(segment.in_size, dtype=bound.dtype) if pending is None else pending
            )
            pending = None
            v, (m,) = jax.vmap(lambda *u, i=i: bound.slopes(i, u))(*v)
            slopes.append(m)
    (codes,) = v
    size = math.prod(codes.shape[1:])
    kernels.append(jnp.eye(size, dtype=bound.dtype) if pending is None else pending)
    return codes, kernels, slopes


def _rows(kernels: Sequence[Any], means: Sequence[Any]) -> list[Any]:
    rows = [kernels[-1].T]
    for inner, mean in zip(kernels[-2:0:-1], means[:0:-1], strict=True):
        rows.append((rows[-1] * mean[None, :]) @ inner.T)
    return rows[::-1]


def _columns_gram(
    first_gram: Float[Array, "h h"], kernels: Sequence[Any], means: Sequence[Any]
) -> Float[Array, "widths widths"]:
    """Compute VVᵀ from K_1ᵀK_1 alone: every V_l passes the first kernel, so d is paid once."""
    columns: list[Any] = []
    for inner, mean in zip(kernels[1:-1], means[:-1], strict=True):
        scaled = mean[:, None] * inner
        columns.append(scaled if not columns else (columns[-1] * mean[None, :]) @ inner)
    if not columns:
        return first_gram
    rest = jnp.concatenate(columns, -1)
    image = first_gram @ rest
    return jnp.block([[first_gram, image], [image.T, rest.T @ image]])
