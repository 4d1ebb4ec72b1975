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

Where branches run beside one another, a segment's D_l has a diagonal block for each edge, and the
units counted are those of all edges. Arrays that pass unchanged (skips) make a segment D_l + I_l
with I_l fixed. Nothing scales it, so s_l = 1 and e_l = s (m_l − m̄_l), and the sum over the other
segments has as many terms fewer. If all are so, J_A = C + U E V, and its norm is ‖C‖² + 2 eᵀγ +
eᵀ(UᵀU ∘ VVᵀ)e with γ_i = u_iᵀ C v_i.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxcae.jacobian import edges
from jaxcae.jacobian.bound import Bound
from jaxcae.jacobian.edges import Slopes
from jaxcae.jacobian.estimators import Distribution, draw_probes
from jaxcae.jacobian.products import gram, matmul, quadratic_form
from jaxcae.jacobian.program import Encoder
from jaxcae.jacobian.structure import Segment


def estimate(
    bound: Bound,
    encoder: Encoder,
    xs: Any,
    key: PRNGKeyArray,
    num_probes: int,
    distribution: Distribution,
) -> tuple[Any, Float[Array, " batch"]]:
    """Compute codes and P̂ for a batch; P̂ is the mean over probes, each sample with its own.

    Exact if there is at most one elementwise segment, or where the samples' slopes are multiples of
    one another in each. The cost of a sample grows neither with d nor with the Jacobian's size: it
    is (Σ h_l)² + h_1² + 2 Σ h_l h_{l+1} + k Σ h_l multiplications for one probe, with h_l the
    widths of the elementwise segments.
    """
    codes, kernels, layers, slopes = _forward(bound, xs)
    if encoder.metric is not None:
        metric = encoder.metric.astype(kernels[0].dtype)
        kernels[0] = metric[:, None] * kernels[0] if metric.ndim == 1 else metric @ kernels[0]
    if not layers:
        return codes, jnp.full(xs.shape[0], jnp.sum(jnp.square(kernels[0])))

    means = [
        [None if m is None else jax.lax.stop_gradient(jnp.mean(m, 0)) for m in found]
        for found in slopes
    ]
    first_gram = gram(kernels[0], shared=True)
    rows = _rows(layers, kernels, means)
    u = jnp.concatenate([_ends(layer, r) for layer, r in zip(layers, rows[1:], strict=True)], 1)
    image, columns_gram = _columns(layers, first_gram, kernels, means)
    interaction = columns_gram * gram(u, shared=True)  # UᵀU ∘ VVᵀ
    scales = _scales(layers, slopes, means, jnp.diag(interaction))
    e = _anchor_slopes(layers, slopes, means, scales)
    joined = jnp.concatenate([m for found in e for m in found if m is not None], -1)
    anchor = quadratic_form(joined, interaction)
    is_shifted = all(edges.passing(layer) for layer in layers)
    if is_shifted:
        anchor += 2 * matmul(joined, jnp.sum(u * matmul(rows[0], image), 0))
        anchor += jnp.sum(quadratic_form(rows[0], first_gram))
    if len(layers) == 1:
        return codes, anchor

    def correct(probe: Float[Array, " latent"], slopes: Any, e: Any) -> Float[Array, ""]:
        """Compute ‖Jᵀv‖² − ‖J_Aᵀv‖² as ⟨(J − J_A)ᵀv, (J + J_A)ᵀv⟩, before the first kernel."""
        through = [probe[None] @ r for r in rows]
        pulled, anchored = through[-1], None
        for i in reversed(range(len(layers))):
            own = edges.pull(layers[i], e[i], through[i + 1], 0.0)
            if anchored is not None:
                own += edges.pull(layers[i], means[i], anchored @ kernels[i + 1].T)
            pulled, anchored = edges.pull(layers[i], slopes[i], pulled), own
            if i:
                pulled = pulled @ kernels[i].T
        if is_shifted:
            anchored += through[0]
        return jnp.sum(matmul(pulled - anchored, first_gram) * (pulled + anchored))

    probes = draw_probes(key, xs, num_probes, rows[-1].shape[0], distribution)
    probes = probes.astype(first_gram.dtype)
    corrections = jax.vmap(jax.vmap(correct, (0, None, None)))(probes, slopes, e)
    return codes, anchor + jnp.mean(corrections, -1)


def _starts(layer: Segment, stack: Any) -> Any:
    """Take the columns where the edges start."""
    inside = edges.spans(layer.in_sizes)
    return edges.columns(stack, [inside[edge.source] for edge in edges.own(layer)])


def _ends(layer: Segment, stack: Any) -> Any:
    """Take the columns where the edges end."""
    outside = edges.spans(layer.out_sizes)
    return edges.columns(stack, [outside[edge.target] for edge in edges.own(layer)])


def _rows(layers: Sequence[Segment], kernels: Sequence[Any], means: Sequence[Slopes]) -> list[Any]:
    """Compute what the code's units are after each segment; first, before all of them."""
    rows = [kernels[-1].T]
    for i in reversed(range(len(layers))):
        rows.append(edges.pull(layers[i], means[i], rows[-1]))
        if i:
            rows[-1] = rows[-1] @ kernels[i].T
    return rows[::-1]


def _columns(
    layers: Sequence[Segment],
    first_gram: Float[Array, "h h"],
    kernels: Sequence[Any],
    means: Sequence[Slopes],
) -> tuple[Float[Array, "h units"], Float[Array, "units units"]]:
    """Compute K_1ᵀV and VVᵀ from K_1ᵀK_1 alone: every V_l passes it, so d is paid once."""
    stack = jnp.eye(first_gram.shape[0], dtype=first_gram.dtype)
    rest: list[Any] = []
    for i in range(1, len(layers)):
        pushed = edges.apply(layers[i - 1], means[i - 1], stack, forward=True)
        stack = pushed @ kernels[i]
        rest.append(_starts(layers[i], stack))
    image = _starts(layers[0], first_gram)
    corner = _starts(layers[0], image.T)
    if not rest:
        return image, corner
    later = jnp.concatenate(rest, 1)
    beyond = matmul(first_gram, later)
    aside = _starts(layers[0], beyond.T)
    square = jnp.block([[corner, aside.T], [aside, matmul(later.T, beyond)]])
    return jnp.concatenate([image, beyond], 1), square


def _scales(
    layers: Sequence[Segment], slopes: Sequence[Slopes], means: Sequence[Slopes], weights: Any
) -> list[Any]:
    """Compute s_1 … s_n of a batch, which need no gradient; 1 where nothing passes, or all does."""
    found, start = [], 0
    for layer, own, mean in zip(layers, slopes, means, strict=True):
        m, center = (
            jnp.concatenate([s for s in several if s is not None], -1) for several in (own, mean)
        )
        weighed = weights[start : start + center.size] * center
        start += center.size
        norm = weighed @ center
        scale = jnp.where(norm > 0, m @ weighed / jnp.where(norm > 0, norm, 1), 1)
        found.append(jnp.ones_like(scale) if edges.passing(layer) else scale)
    return list(jax.lax.stop_gradient(found))


def _anchor_slopes(
    layers: Sequence[Segment],
    slopes: Sequence[Slopes],
    means: Sequence[Slopes],
    scales: Sequence[Any],
) -> list[list[Any]]:
    """Compute e_1 … e_n of a batch, edge by edge."""
    n = sum(not edges.passing(layer) for layer in layers)
    e = []
    for i, layer in enumerate(layers):
        others = math.prod([*scales[:i], *scales[i + 1 :]], start=jnp.ones_like(scales[i]))
        share = (others * scales[i])[:, None] * (1.0 if edges.passing(layer) else 1 - 1 / n)
        e.append(
            [
                None if m is None else others[:, None] * m - share * mean[None, :]
                for m, mean in zip(slopes[i], means[i], strict=True)
            ]
        )
    return e


def _forward(bound: Bound, xs: Any) -> tuple[Any, list[Any], list[Segment], list[Slopes]]:
    """Compute codes, kernels K_1 … K_{n+1}, and the elementwise segments with their slopes."""
    kernels: list[Any] = []
    layers: list[Segment] = []
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
            v, m = jax.vmap(lambda *u, i=i: bound.slopes(i, u))(*v)
            layers.append(segment)
            slopes.append(m)
    (codes,) = v
    size = math.prod(codes.shape[1:])
    kernels.append(jnp.eye(size, dtype=bound.dtype) if pending is None else pending)
    return codes, kernels, layers, slopes
