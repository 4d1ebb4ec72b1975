"""What normalisations add to a plan that passes through them as through shared matrices.

The Jacobian of y_j = σ_j · (K_j a + b_j) is σ_j K_j + y_j w_jᵀ with w_j = ∇ log σ_j (`scaling.py`).
Let J₀ be the encoder's Jacobian with every such segment replaced by its K_j, and S = Π σ_j. Taking
the outer products in turn, the last one first,

    J = S J₀ + Σ_j x_j g_jᵀ,    x_j = (Π_{i>j} σ_i) T_j y_j,    g_j = H_jᵀ w_j,

with T_j the part of J₀ after segment j, and H_j the encoder's own Jacobian before it, g_j = ∇_x log
σ_j. So with J₀ by any plan,

    ‖J‖² = S²‖J₀‖² + 2 S Σ_j x_jᵀ J₀ g_j + Σ_ij (x_iᵀx_j)(g_iᵀg_j):

a few products with vectors for each normalisation, whose number of features does not count: all
g_j = Kᵀγ_j pass the first affine segments, whose gram G = KKᵀ gives g_iᵀg_j = γ_iᵀGγ_j and J₀ g_j =
(the rest of J₀) Gγ_j.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcae.jacobian import affine, edges
from jaxcae.jacobian.bound import Arrays, Bound
from jaxcae.jacobian.cost import flops
from jaxcae.jacobian.products import gram, matmul


class Passed(NamedTuple):
    """One sample's share.

    Attributes:
        scale: S.
        tails: The x_j as rows.
        heads: The γ_j as rows.
        images: The Gγ_j as rows.
        push: Applies J₀, from where the γ_j are, to rows.
    """

    scale: Float[Array, ""]
    tails: Float[Array, "n code"]
    heads: Float[Array, "n width"]
    images: Float[Array, "n width"]
    push: Callable[[Any], Any]


class Corrections:
    """The corrections of a bound structure; what samples share is computed here, once."""

    @staticmethod
    def of(bound: Bound, batch: int, from_input: Any, from_output: Any) -> "Corrections | None":
        """Prepare them, if any segment is a normalisation."""
        if all(segment.scale is None for segment in bound.structure.segments):
            return None
        return Corrections(bound, batch, from_input, from_output)

    def __init__(self, bound: Bound, batch: int, from_input: Any, from_output: Any) -> None:
        self.bound, self.segments = bound, bound.structure.segments
        self.from_input, self.from_output = from_input, from_output
        plain = [s.kind == "affine" and s.scale is None for s in self.segments]
        self.base = plain.index(False)
        self._push: dict[int, Any] = {}
        self._pull: dict[int, Any] = {}
        for i, segment in enumerate(self.segments):
            if segment.kind == "affine":
                for forward, found in ((True, self._push), (False, self._pull)):
                    _, found[i] = bound.linearize(i, bound.origin(i), forward=forward, linear=True)
        self._gram = self._shared_gram() if self._gram_pays(batch) else None

    def passed(self, values: list[Arrays], local: dict[int, Any]) -> Passed:
        """Compute a sample's share from what goes into each segment and comes out."""
        marked = [i for i, s in enumerate(self.segments) if s.scale is not None]
        scales, directions = {}, {}
        for i in marked:
            scales[i], directions[i] = self._scale(i, values[i])
        heads = self._heads(values, local, scales, directions)
        images = self._image(heads)

        def push(rows: Any) -> Any:
            return self._through(rows, values, local, self.base)[0]

        ends = self._through(None, values, local, self.base)[1]
        after = [
            math.prod((scales[i] for i in marked[j + 1 :]), start=1.0) for j in range(len(marked))
        ]
        tails = jnp.stack([tail * factor for tail, factor in zip(ends, after, strict=True)])
        return Passed(math.prod(scales.values()), tails, heads, images, push)

    def inner(self, found: Any, a: Passed, b: Passed) -> Float[Array, ""]:
        """Complete ⟨J₀, J₀′⟩ to ⟨J, J′⟩."""
        total = a.scale * b.scale * found
        first = a.scale * jnp.sum(b.tails * a.push(b.images))
        second = first if b is a else b.scale * jnp.sum(a.tails * b.push(a.images))
        crossed = jnp.sum(matmul(a.tails, b.tails.T) * matmul(a.heads, b.images.T))
        return total + first + second + crossed

    def _scale(self, i: int, arrays: Arrays) -> tuple[Any, Any]:
        """Compute σ and ∇ log σ."""
        scale = self.segments[i].scale
        assert scale is not None
        exponent = scale.exponent

        def log(arrays: Arrays) -> tuple[Any, Any]:
            scalar = self.bound.scalar(i, arrays)
            return jnp.log(jnp.abs(scalar)), scalar

        gradients, scalar = jax.grad(log, has_aux=True)(arrays)
        power = int(exponent) if exponent == int(exponent) else exponent
        return scalar**power, exponent * self.bound.join(gradients)

    def _heads(
        self, values: list[Arrays], local: dict[int, Any], scales: Any, directions: Any
    ) -> Any:
        """Pull each ∇ log σ back to the base."""
        rows: Any = None
        for i in reversed(range(self.base, max(scales) + 1)):
            segment = self.segments[i]
            if rows is not None:
                pulled = self._pulled(rows, i, values, local)
                if i in scales:
                    along = rows @ self.bound.join(values[i + 1])
                    pulled = scales[i] * pulled + along[:, None] * directions[i][None, :]
                rows = pulled
            if segment.scale is not None:
                own = directions[i][None, :]
                rows = own if rows is None else jnp.concatenate([own, rows])
        return rows

    def _pulled(self, rows: Any, i: int, values: list[Arrays], local: dict[int, Any]) -> Any:
        segment = self.segments[i]
        if segment.kind == "elementwise":
            return edges.apply(segment, local[i], rows, forward=False)
        pull = self._pull.get(i) or self.bound.linearize(i, values[i], forward=False)[1]
        return jax.vmap(pull)(rows)

    def _through(
        self, rows: Any, values: list[Arrays], local: dict[int, Any], start: int
    ) -> tuple[Any, list[Any]]:
        """Push rows through J₀; without rows, push what each normalisation puts out instead."""
        collecting = rows is None
        for i in range(start, len(self.segments)):
            segment = self.segments[i]
            if rows is not None:
                if segment.kind == "elementwise":
                    rows = edges.apply(segment, local[i], rows, forward=True)
                else:
                    push = self._push.get(i) or self.bound.linearize(i, values[i], forward=True)[1]
                    rows = jax.vmap(push)(rows)
            if collecting and segment.scale is not None:
                own = self.bound.join(values[i + 1])[None, :]
                rows = own if rows is None else jnp.concatenate([rows, own])
        if self.from_output is not None:
            matrix = jnp.asarray(self.from_output).astype(self.bound.dtype)
            rows = rows * matrix[None, :] if matrix.ndim == 1 else rows @ matrix.T
        return rows, list(rows) if collecting else []

    def _image(self, heads: Any) -> Any:
        """Compute the Gγ_j."""
        if self._gram is not None:
            return matmul(heads, self._gram)
        rows = heads
        for i in reversed(range(self.base)):
            rows = jax.vmap(self._pull[i])(rows)
        if self.from_input is not None:
            metric = jnp.asarray(self.from_input).astype(self.bound.dtype)
            if metric.ndim == 1:
                rows = rows * jnp.square(metric)[None, :]
            else:
                rows = matmul(matmul(rows, metric.T), metric)
        for i in range(self.base):
            rows = jax.vmap(self._push[i])(rows)
        return rows

    def _gram_pays(self, batch: int) -> bool:
        if self.base == 0 and self.from_input is None:
            return False
        before = self.segments[: self.base]
        width = before[-1].out_size if before else self.bound.structure.in_size
        rows = self.bound.structure.in_size
        by_gram = 4 * rows * width**2 + sum(map(affine.kernel_flops, before))
        count = sum(s.scale is not None for s in self.segments)
        apart = 2 * sum(flops(s.equations) for s in before) + 4 * rows**2 * (not before)
        return by_gram + batch * count * 2 * width**2 < batch * count * apart

    def _shared_gram(self) -> Any:
        stack: Any = None
        if self.from_input is not None:
            stack = jnp.asarray(self.from_input).astype(self.bound.dtype)
        for i in range(self.base):
            kernel = self.bound.kernel(i)
            if stack is None:
                stack = kernel
            else:
                stack = stack[:, None] * kernel if stack.ndim == 1 else stack @ kernel
        return jnp.diag(jnp.square(stack)) if stack.ndim == 1 else gram(stack, True)
