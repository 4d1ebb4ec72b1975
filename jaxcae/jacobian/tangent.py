"""An unbiased estimate of ‖J‖²_F with little noise, for any depth, without large matrices.

The Jacobian J of affine and elementwise stretches is a function of their slopes m_1 … m_n alone,
linear in each. Let T be the first-order Taylor polynomial around multiples s_l m̄_l of the batch's
mean slopes, taken at a sample's own. For a probe v with E[vvᵀ] = I

    P̂ = ‖Jᵀv‖² − T[‖J(·)ᵀv‖²] + T[‖J(·)‖²]

is unbiased whatever means and scales are: T is linear, so E[T[‖J(·)ᵀv‖²]] = T[‖J(·)‖²]. That holds
identically in the parameters with means and scales held fixed, so gradients are unbiased too. With
J̄ the Jacobian of the mean slopes, N = ‖J̄‖², g_l = ½ ∂N/∂m̄_l, s = Π s_l and e_l = (s/s_l) m_l −
s m̄_l, both polynomials take little:

    T[‖J(·)‖²] = s²N + 2s Σ_l g_l·e_l,    T[‖J(·)ᵀv‖²] = s c·(s c + 2t),

c = J̄ᵀv, and t = Σ_l V_l E_l w_l the same with e_l in the place of m̄_l in one factor at a time: V_l
is what the units of a segment see of the features at mean slopes, w_l = U_lᵀv what they give to v.
J̄ is k pull-backs of *one* sample, so N and g_l are had once a batch; c and t go with v through the
sweep that gives Jᵀv. (Directions of the code that share no feature are pulled back together.) The
scales s_l = g_l·m_l / N leave Σ g_l·e_l = 0: none of the deviation is along J̄.

What is left is of second order: with a = s c + t, what the anchor in `control_variate.py` knows,
P̂ is T[‖J(·)‖²] + ‖Jᵀv‖² − ‖a‖² + ‖t‖². The larger share is in ‖t‖², whose expectation has as many
terms as pairs of units that see the same feature. Any part of it may be exchanged for its own:

- all of the first segment's, e_1ᵀ(U_1ᵀU_1 ∘ V_1V_1ᵀ)e_1, behind a convolution a band (`local.py`);
- of the others the units' own terms, Σ_i e_i² ν_i ‖u_i‖² for Σ_i e_i² ν_i w_i². Any ν will do; the
  best is ‖v_i‖², found near enough by a few random inputs pushed through the mean slopes, fixed.

What passes unchanged (skips) has a slope of 1 that nothing scales, so there s_l = 1. A
normalisation, σK + y(∇ log σ)ᵀ (`scaling.py`), stands in J̄ with K alone, and σ in s.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcae.jacobian import affine, edges
from jaxcae.jacobian.bound import Arrays, Bound, Operator
from jaxcae.jacobian.edges import Slopes
from jaxcae.jacobian.local import Band, Local
from jaxcae.jacobian.plan import groups_of
from jaxcae.jacobian.structure import Segment

Stack = Float[Array, "rows size"]

_INPUTS = 16
"""Random inputs by which the ‖v_i‖² are found, to about a third."""


class Sample(NamedTuple):
    """What a sample needs of its own, a batch of them along a first axis.

    Attributes:
        slopes: The slopes of each elementwise segment.
        entering: What goes into each normalisation.
        e: The e_l.
        scale: s.
    """

    slopes: list[Slopes]
    entering: dict[int, Arrays]
    e: Any = None
    scale: Any = None


class Shared(NamedTuple):
    """What samples share.

    Attributes:
        means: The m̄_l.
        given: ‖u_i‖² of each segment's outputs.
        seen: ν of each segment's inputs.
    """

    means: list[Slopes]
    given: list[Any]
    seen: list[Any]


class Tangent:
    """The estimate for a bound structure without opaque parts.

    Args:
        bound: The structure with its values.
        metric: F of ‖J Fᵀ‖², of shape (r, d), or (d,) if diagonal; None for the identity.
        first: The band of the first elementwise segment, if it is to be used.
    """

    def __init__(self, bound: Bound, metric: Any, first: Local | None = None) -> None:
        self.bound, self.metric, self.first = bound, metric, first
        self.segments = bound.structure.segments
        self.layers = [s for s in self.segments if s.kind == "elementwise"]
        self._pulls: dict[int, Operator] = {
            i: bound.linearize(i, bound.origin(i), forward=False, linear=True)[1]
            for i, segment in enumerate(self.segments)
            if segment.kind == "affine"
        }

    def forward(self, x: Any) -> tuple[Any, Sample]:
        """Pass a sample through the encoder."""
        arrays: Arrays = (x,)
        sample = Sample([], {})
        for i, segment in enumerate(self.segments):
            if segment.scale is not None:
                sample.entering[i] = arrays
            if segment.kind == "elementwise":
                arrays, found = self.bound.slopes(i, arrays)
                sample.slopes.append(found)
            else:
                arrays = self.bound.run(i, arrays)
        (code,) = arrays
        return code, sample

    def estimate(
        self, probes: Float[Array, "batch probes code"], samples: Sample
    ) -> Float[Array, " batch"]:
        """Compute P̂ of a batch, the mean over its probes."""
        means = jax.lax.stop_gradient(jax.tree.map(lambda m: jnp.mean(m, 0), samples.slopes))
        (half, rows), gradients = jax.value_and_grad(self._half_norm, has_aux=True)(means)
        samples = self._anchored(samples, means, gradients, 2 * half)
        along = jax.tree.leaves(jax.tree.map(lambda g, e: e @ g, gradients, samples.e))
        expected = 2 * samples.scale * (samples.scale * half + sum(along))
        if self.first is not None:
            band = Band(self.first, self.bound, rows[0])
            expected += jax.vmap(lambda e: band.inner(e, e))(samples.e[0])
        given = [jnp.sum(jnp.square(stack), 0) for stack in rows]
        shared = Shared(means, given, jax.lax.stop_gradient(self._seen(means)))
        excess = jax.vmap(self._excess, (0, None, None))
        return expected + jnp.mean(jax.vmap(excess, (0, 0, None))(probes, samples, shared), -1)

    def _anchored(
        self, samples: Sample, means: list[Slopes], gradients: list[Slopes], norm: Any
    ) -> Sample:
        """Compute e_l and s of a batch."""
        scales = []
        for layer, own, gradient in zip(self.layers, samples.slopes, gradients, strict=True):
            along = jax.tree.leaves(jax.tree.map(lambda m, g: m @ g, own, gradient))
            scale = jnp.where(norm > 0, sum(along) / jnp.where(norm > 0, norm, 1), 1)
            scales.append(jnp.ones_like(scale) if edges.passing(layer) else scale)
        for i, arrays in samples.entering.items():
            exponent = getattr(self.segments[i].scale, "exponent", 1)
            scales.append(jax.vmap(lambda *a, i=i: self.bound.scalar(i, a))(*arrays) ** exponent)
        scales = list(jax.lax.stop_gradient(scales))
        e = []
        for i, (own, mean) in enumerate(zip(samples.slopes, means, strict=True)):
            ones = jnp.ones_like(scales[i])
            others = math.prod((*scales[:i], *scales[i + 1 :]), start=ones)[:, None]
            share = others * scales[i][:, None]
            e.append(jax.tree.map(lambda m, c, o=others, s=share: o * m - s * c[None], own, mean))
        return samples._replace(e=e, scale=math.prod(scales))

    def _excess(
        self, probe: Float[Array, " code"], sample: Sample, shared: Shared
    ) -> Float[Array, ""]:
        """Compute ‖Jᵀv‖² − ‖a‖², and ‖t‖² less what is exchanged, and what that was for."""
        # Jᵀv, c, t and the first segment's part of t; there is no row until they differ
        pulled, mean, moved, first = probe[None], None, None, None
        exchanged = jnp.zeros((), self.bound.dtype)
        place = len(self.layers)
        for i in reversed(range(len(self.segments))):
            segment = self.segments[i]
            if segment.kind == "elementwise":
                place -= 1
                before = pulled if mean is None else mean
                found = edges.pull(segment, sample.e[place], before, 0.0)
                if moved is not None:
                    moved = edges.pull(segment, shared.means[place], moved)
                if not place and self.first is not None:
                    first = found
                else:
                    exchanged += self._own_terms(segment, place, sample, shared, before[0])
                    moved = found if moved is None else moved + found
                mean = edges.pull(segment, shared.means[place], before)
                pulled = edges.pull(segment, sample.slopes[place], pulled)
                continue
            if segment.scale is not None and mean is None:
                mean = pulled
            anchor = [row for row in (mean, moved, first) if row is not None]
            if segment.scale is None:
                together = jax.vmap(self._pulls[i])(jnp.concatenate([pulled, *anchor]))
                pulled, parts = together[:1], list(together[1:, None])
            else:
                _, own = self.bound.linearize(i, sample.entering[i], forward=False)
                pulled = own(pulled[0])[None]
                parts = list(jax.vmap(self._pulls[i])(jnp.concatenate(anchor))[:, None])
            mean, moved, first = (
                None if row is None else parts.pop(0) for row in (mean, moved, first)
            )
        pulled = self._measured(pulled)
        mean = pulled if mean is None else self._measured(mean)
        moved, first = (
            jnp.zeros_like(pulled) if row is None else self._measured(row) for row in (moved, first)
        )
        anchor = sample.scale * mean + moved + first
        return exchanged + jnp.sum(
            (pulled - anchor) * (pulled + anchor) + moved * (moved + 2 * first)
        )

    def _own_terms(
        self, segment: Segment, place: int, sample: Sample, shared: Shared, w: Any
    ) -> Float[Array, ""]:
        """Compute Σ_i e_i² ν_i (‖u_i‖² − w_i²), over the edges of a segment."""
        if not shared.seen:
            return jnp.zeros((), self.bound.dtype)
        inside, outside = edges.spans(segment.in_sizes), edges.spans(segment.out_sizes)
        left = shared.given[place] - jnp.square(w)
        total = jnp.zeros((), self.bound.dtype)
        for edge, e in zip(segment.edges, sample.e[place], strict=True):
            if e is not None:
                seen = shared.seen[place][inside[edge.source]]
                total += jnp.sum(jnp.square(e) * seen * left[outside[edge.target]])
        return total

    def _half_norm(self, means: list[Slopes]) -> tuple[Float[Array, ""], list[Stack]]:
        """Compute ½‖J̄‖², and the U_l (or those of a group at a time)."""
        stack: Any = None  # the identity
        if self.metric is None:
            for groups in groups_of(self.bound.structure):
                if groups.side == "output":
                    stack = jnp.asarray(groups.matrix, self.bound.dtype)
                    stack = jax.lax.optimization_barrier(stack)  # or XLA convolves constants
        rows: list[Stack] = []
        place = len(self.layers)
        for i in reversed(range(len(self.segments))):
            segment = self.segments[i]
            if stack is None and segment.kind == "affine" and affine.kernel_flops(segment) == 0:
                stack = self.bound.kernel(i).T
                continue
            if stack is None:
                stack = jax.lax.optimization_barrier(
                    jnp.eye(segment.out_size, dtype=self.bound.dtype)
                )
            if segment.kind == "affine":
                stack = jax.vmap(self._pulls[i])(stack)
            else:
                place -= 1
                rows.insert(0, stack)
                stack = edges.pull(segment, means[place], stack)
        return jnp.sum(jnp.square(self._measured(stack))) / 2, rows

    def _seen(self, means: list[Slopes]) -> list[Any]:
        """Estimate ‖v_i‖² of each segment's units, from random inputs; none without jvp."""
        if not all(segment.forward_mode for segment in self.segments):
            return []
        count = self.bound.structure.in_size if self.metric is None else self.metric.shape[0]
        stack = jax.random.rademacher(jax.random.key(0), (_INPUTS, count), self.bound.dtype)
        if self.metric is not None:
            metric = self.metric.astype(stack.dtype)
            stack = stack * metric[None] if metric.ndim == 1 else stack @ metric
        found: list[Any] = []
        for i, segment in enumerate(self.segments):
            if segment.kind == "elementwise":
                found.append(jnp.mean(jnp.square(stack), 0))
                stack = edges.apply(segment, means[len(found) - 1], stack, forward=True)
            elif len(found) < len(self.layers):
                origin = self.bound.origin(i)
                push = self.bound.linearize(i, origin, forward=True, linear=True)[1]
                stack = jax.vmap(push)(stack)
        return found

    def _measured(self, stack: Stack) -> Float[Array, "rows directions"]:
        if self.metric is None:
            return stack
        metric = self.metric.astype(stack.dtype)
        return stack * metric[None] if metric.ndim == 1 else stack @ metric.T
