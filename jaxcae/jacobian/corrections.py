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
from jaxcae.jacobian.bound import Arrays, Bound, Operator
from jaxcae.jacobian.cost import flops
from jaxcae.jacobian.jaxprs import typed_like
from jaxcae.jacobian.products import gram, matmul


class Passed(NamedTuple):
    """One sample's share.

    Attributes:
        scale: S.
        tails: The x_j.
        heads: The γ_j.
        images: The Gγ_j.
        push: Applies J₀, from where the γ_j are, to vectors.
    """

    scale: Float[Array, ""]
    tails: list[Float[Array, " code"]]
    heads: list[Float[Array, " width"]]
    images: list[Float[Array, " width"]]
    push: Callable[[list[Any]], list[Any]]


class Corrections:
    """The corrections of a bound structure; what samples share is computed here, once."""

    @staticmethod
    def of(
        bound: Bound, batch: int, from_input: Any, from_output: Any, grams: dict[int, Any]
    ) -> "Corrections | None":
        """Prepare them, if any segment is a normalisation.

        `grams` are those that the plan has computed, by the segment that they stand after.
        """
        if all(segment.scale is None for segment in bound.structure.segments):
            return None
        return Corrections(bound, batch, from_input, from_output, grams)

    def __init__(
        self,
        bound: Bound,
        batch: int,
        from_input: Any,
        from_output: Any,
        grams: dict[int, Any],
    ) -> None:
        self.bound, self.segments = bound, bound.structure.segments
        self.from_input, self.from_output = from_input, from_output
        plain = [s.kind == "affine" and s.scale is None for s in self.segments]
        self.base = plain.index(False)
        self._push: dict[int, Any] = {}
        self._pull: dict[int, Any] = {}
        self._constant: dict[int, Arrays] = {}
        for i, segment in enumerate(self.segments):
            if segment.kind == "affine":
                for forward, found in ((True, self._push), (False, self._pull)):
                    self._constant[i], found[i] = bound.linearize(
                        i, bound.origin(i), forward=forward, linear=True
                    )
        self._gram = grams.get(self.base - 1)
        if self._gram is None and self._gram_pays(batch):
            self._gram = self._shared_gram()

    def run(self, i: int, arrays: Arrays) -> tuple[Arrays, Any] | None:
        """Compute an affine segment after a normalisation, and what it makes of the vector alone.

        K y + c is the encoder's own product K y, which the tail y needs, too: so it is taken once,
        and so is its gradient. None for any other segment.
        """
        segment = self.segments[i]
        if segment.kind != "affine" or segment.scale or not i or not self.segments[i - 1].scale:
            return None
        image = self._push[i](self.bound.join(arrays))
        parts = zip(edges.spans(segment.out_sizes), self._constant[i], strict=True)
        return tuple(typed_like(image[part], c) + c for part, c in parts), image

    def passed(self, values: list[Arrays], local: dict[int, Any], images: dict[int, Any]) -> Passed:
        """Compute a sample's share from what goes into each segment and comes out.

        `images` are those that `run` gave.
        """
        marked = [i for i, s in enumerate(self.segments) if s.scale is not None]
        scales, directions = {}, {}
        for i in marked:
            scales[i], directions[i] = self._scale(i, values[i])
        heads = self._heads(values, local, scales, directions)

        def push(vectors: list[Any]) -> list[Any]:
            return self._through(vectors, values, local)

        ends = self._through([], values, local, images)
        after = [
            math.prod((scales[i] for i in marked[j + 1 :]), start=1.0) for j in range(len(marked))
        ]
        return Passed(
            math.prod(scales.values()),
            [tail * factor for tail, factor in zip(ends, after, strict=True)],
            heads,
            [self._image(head) for head in heads],
            push,
        )

    def inner(self, found: Any, a: Passed, b: Passed) -> Float[Array, ""]:
        """Complete ⟨J₀, J₀′⟩ to ⟨J, J′⟩."""
        total = a.scale * b.scale * found
        first = a.scale * _dot(b.tails, a.push(b.images))
        second = first if b is a else b.scale * _dot(a.tails, b.push(a.images))
        crossed = sum(
            jnp.sum(x * y) * jnp.sum(g * h)
            for x, g in zip(a.tails, a.heads, strict=True)
            for y, h in zip(b.tails, b.images, strict=True)
        )
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
    ) -> list[Any]:
        """Pull each ∇ log σ back to the base."""
        vectors: list[Any] = []
        for i in reversed(range(self.base, max(scales) + 1)):
            pull = self._operator(i, values, local, forward=False) if vectors else None
            for j, vector in enumerate(vectors):
                assert pull is not None
                vectors[j] = pull(vector)
                if i in scales:
                    along = jnp.sum(vector * self.bound.join(values[i + 1]))
                    vectors[j] = scales[i] * vectors[j] + along * directions[i]
            if i in scales:
                vectors.insert(0, directions[i])
        return vectors

    def _through(
        self,
        vectors: list[Any],
        values: list[Arrays],
        local: dict[int, Any],
        images: dict[int, Any] | None = None,
    ) -> list[Any]:
        """Push vectors through J₀; or what each normalisation puts out, from images of it."""
        for i in range(self.base, len(self.segments)):
            known = [] if images is None or i not in images else [images[i]]
            waiting = vectors[: len(vectors) - len(known)]
            if waiting:
                push = self._operator(i, values, local, forward=True)
                waiting = [push(vector) for vector in waiting]
            vectors = waiting + known
            if images is not None and self.segments[i].scale is not None:
                vectors = [*vectors, self.bound.join(values[i + 1])]
        if self.from_output is not None:
            matrix = jnp.asarray(self.from_output).astype(self.bound.dtype)
            vectors = [matrix * v if matrix.ndim == 1 else matrix @ v for v in vectors]
        return vectors

    def _operator(
        self, i: int, values: list[Arrays], local: dict[int, Any], *, forward: bool
    ) -> Operator:
        """Make the product of a segment's share of J₀ with a vector."""
        segment = self.segments[i]
        if segment.kind == "elementwise":
            return lambda v: edges.apply(segment, local[i], v[None], forward=forward)[0]
        shared = self._push if forward else self._pull
        return shared[i] if i in shared else self.bound.linearize(i, values[i], forward=forward)[1]

    def _image(self, head: Any) -> Any:
        """Compute a Gγ."""
        if self._gram is not None:
            return matmul(head, self._gram)
        vector = head
        for i in reversed(range(self.base)):
            vector = self._pull[i](vector)
        if self.from_input is not None:
            metric = jnp.asarray(self.from_input).astype(self.bound.dtype)
            if metric.ndim == 1:
                vector = vector * jnp.square(metric)
            else:
                vector = matmul(metric.T, matmul(metric, vector))
        for i in range(self.base):
            vector = self._push[i](vector)
        return vector

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


def _dot(a: list[Any], b: list[Any]) -> Any:
    return sum(jnp.sum(x * y) for x, y in zip(a, b, strict=True))
