"""Two shared sweeps that meet across an elementwise segment, or across one of low rank."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcae.jacobian.carried import Carried
from jaxcae.jacobian.low_rank import LowRank
from jaxcae.jacobian.products import matmul, quadratic_form


class Across(NamedTuple):
    """Two shared sweeps that meet across an elementwise segment: ‖A₀‖² + 2mᵀc + mᵀCm.

    The slopes m are multiplied by the scales of the two grams that C is made of; see `Carried`.
    """

    matrix: Float[Array, "edges edges"]
    before: Float[Array, " edges"]
    after: Float[Array, " edges"]
    vector: Float[Array, " edges"] | None = None
    constant: Float[Array, ""] | None = None

    def inner(self, first: Sequence[Any], second: Sequence[Any]) -> Float[Array, ""]:
        """Compute it for the slopes of two samples."""
        m = self._scaled(first)
        if second is first:
            n, total = m, quadratic_form(m, self.matrix)
        else:
            n = self._scaled(second)
            total = jnp.sum(matmul(m, self.matrix) * n)
        if self.vector is None or self.constant is None:
            return total
        return total + matmul(m + n, self.vector) + self.constant

    def apart(self, slopes: Sequence[Any]) -> Float[Array, ""]:
        """Compute what it would be if no two units met: Σ_u m_u² C_uu, and ‖A₀‖²."""
        total = jnp.sum(jnp.square(self._scaled(slopes)) * jnp.diag(self.matrix))
        return total if self.constant is None else total + self.constant

    def _scaled(self, slopes: Sequence[Any]) -> Any:
        m = concatenate([s for s in slopes if s is not None])
        return m * self.before * self.after  # in turn: their product may overflow, times 0


class Coupling(NamedTuple):
    """The inner products M = NᵀN of what units see on one side.

    Attributes:
        gram: M, its scales divided out; None for the identity.
        scales: Powers of two, or the entries of a diagonal N.
        stack: N, likewise, where two products with it cost less than one with M.
    """

    gram: Any
    scales: Any
    stack: Any = None

    @staticmethod
    def of(side: Carried, size: int) -> "Coupling":
        """Take what a sweep has carried: a gram, or a diagonal, whose entries become scales."""
        if side.is_gram:
            return Coupling(side.first, side.divisors)
        return Coupling(None, jnp.ones(size) if side.first is None else side.first)

    def meet(self, other: "Coupling") -> Any:
        """Compute M ∘ M′, or its diagonal, if it is all that is not 0."""
        present = [each.gram for each in (self, other) if each.gram is not None]
        if len(present) == 2:
            return present[0] * present[1]
        return jnp.diag(present[0]) if present else jnp.ones_like(self.scales)

    def times(self, columns: Float[Array, "c b m"], rank: LowRank) -> Float[Array, "c b units"]:
        """Multiply columns, each of which has entries in its own block of units alone."""
        blocks, order = rank.blocks, rank.order
        matrix = self.gram if self.stack is None else self.stack.T
        if matrix is None:
            return expanded(columns, rank)
        if order is not None:
            matrix = matrix[order]
        matrix = matrix.reshape(blocks, -1, matrix.shape[1])
        found = jnp.swapaxes(matmul(jnp.swapaxes(columns, 0, 1), matrix), 0, 1)
        return found if self.stack is None else _product(found, self.stack)


class RankAcross(NamedTuple):
    """Two shared sweeps that meet across D + UVᵀ.

    With G = TTᵀ and H = RᵀR of the two sides, and m the diagonal of D,

        ‖R (D + UVᵀ) T‖² = mᵀ(G ∘ H)m + 2 Σ_i u_iᵀ H D G v_i + Σ_ij (u_iᵀ H u_j)(v_iᵀ G v_j).

    Attributes:
        rank: The segment's numbers.
        before: G.
        after: H.
        matrix: G ∘ H; its diagonal alone where one side is the identity.
    """

    rank: LowRank
    before: Coupling
    after: Coupling
    matrix: Any

    def inner(self, first: Sequence[Any], second: Sequence[Any]) -> Float[Array, ""]:
        """Compute it for the slopes and columns of two samples."""
        a = self._at(first)
        b = a if second is first else self._at(second)
        if self.matrix.ndim == 1:
            total = jnp.sum(a.slopes * self.matrix * b.slopes)
        elif b is a:
            total = quadratic_form(a.slopes, self.matrix)
        else:
            total = jnp.sum(matmul(a.slopes, self.matrix) * b.slopes)
        crossed = jnp.sum(_crossed(b) * a.slopes)
        other = crossed if b is a else jnp.sum(_crossed(a) * b.slopes)
        lefts, rights = self._pairs(a.lefts, b.left_images), self._pairs(a.rights, b.right_images)
        return total + crossed + other + jnp.sum(lefts * rights)

    def _at(self, found: Sequence[Any]) -> "_Columns":
        slopes, count = found[0], len(self.rank.hidden)
        lefts, rights = found[1 : 1 + count], found[1 + count :]
        us = [self._sorted(u * self.after.scales[None]) for u in lefts]
        vs = [self._sorted(v * self.before.scales[None]) for v in rights]
        # One array at a time: what all samples share among them is then computed once.
        left_images = [self.after.times(u, self.rank) for u in us]
        right_images = [self.before.times(v, self.rank) for v in vs]
        return _Columns(
            slopes * self.before.scales * self.after.scales,
            *(jnp.concatenate(parts) for parts in (us, vs, left_images, right_images)),
        )

    def _sorted(self, columns: Float[Array, "c units"]) -> Float[Array, "c b m"]:
        if self.rank.order is not None:
            columns = columns[:, self.rank.order]
        return columns.reshape(len(columns), self.rank.blocks, -1)

    def _pairs(self, columns: Any, images: Any) -> Float[Array, "c b c b"]:
        """Compute all u_iᵀ H u_j."""
        c, b, units = images.shape
        apart = self._sorted(images.reshape(c * b, units)).reshape(c, b, b, -1)
        return jnp.einsum("agm,bhgm->agbh", columns, apart, precision="highest")


class _Columns(NamedTuple):
    """One sample's D, U, V, HU and GV, all scaled."""

    slopes: Any
    lefts: Any
    rights: Any
    left_images: Any
    right_images: Any


def _crossed(columns: _Columns) -> Any:
    """Compute Σ_i Hu_i ∘ Gv_i."""
    return jnp.sum(columns.left_images * columns.right_images, (0, 1))


def _product(columns: Any, matrix: Any) -> Any:
    c, b, rows = columns.shape
    return matmul(columns.reshape(c * b, rows), matrix).reshape(c, b, -1)


def expanded(columns: Float[Array, "c b m"], rank: LowRank) -> Float[Array, "c b units"]:
    """Write columns with the zeros outside of their blocks."""
    c, b, _ = columns.shape
    own = jnp.eye(b, dtype=columns.dtype)[None, :, :, None]
    found = (columns[:, :, None, :] * own).reshape(c, b, -1)
    return found if rank.order is None else found[:, :, np.argsort(rank.order)]


def along(scales: Any, parts: Sequence[slice]) -> Any:
    return concatenate([scales[part] for part in parts])


def concatenate(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)
