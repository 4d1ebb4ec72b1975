"""Symmetric products with derivative rules of their own: one product backward, not two.

Where units cancel one another, a gram cancels where the encoder itself does not. So these products
ask for full precision on accelerators, whose default keeps 8 to 11 bits.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxcae.devices.spread import Spread

matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

HALVED_FROM = 256
"""Width from which a shared gram is computed in halves; smaller products lose speed by it."""


def balanced(
    stack: Float[Array, "n s"],
) -> tuple[Float[Array, "n s"], Float[Array, " s"]]:
    """Divide columns by powers of two near their largest entries; return them and those powers.

    The quotients are exact, so that nothing changes but where squares would overflow or vanish.
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(stack), 0))
    info = jnp.finfo(stack.dtype)
    power = jax.lax.reduce_precision(jnp.minimum(largest, info.max / 4), info.nexp, 0)
    power = jnp.where(power >= info.tiny, power, 1)
    return stack / jnp.broadcast_to(power, stack.shape), power


def gram(a: Float[Array, "n s"], shared: bool = False) -> Float[Array, "s s"]:
    """Compute aᵀa, the inner products of the columns.

    The derivative is S + Sᵀ with S = aᵀȧ, so that the gradient of a is a(Ḡ + Ḡᵀ): one product,
    where differentiating `a.T @ a` as any product of two matrices would take two. If it is shared
    by the batch and wide, the block below the diagonal is copied, not computed: a quarter less; or,
    where devices share the batch, each computes its own columns.
    (For a gram of each sample, moving the blocks takes longer than what is saved.)
    """
    return together(gram_apart(a)) if shared else _gram(a, False)


def gram_apart(a: Float[Array, "n s"]) -> Float[Array, "s s"]:
    """Compute aᵀa that a batch shares, its columns left on the devices that computed them."""
    return _gram(a, True) if _sharing(a) is None else _split_gram(a)


def together(a: Float[Array, "s s"]) -> Float[Array, "s s"]:
    """Gather what devices computed a part of each, where they did."""
    over = _sharing(a)
    return a if over is None else over.lay(a, P())


def _sharing(a: Float[Array, "n s"]) -> Spread | None:
    """Find the devices among which the columns of a gram are divided, if it is worth it.

    Each saves about 7ns² operations and hands on 4s(n + s) bytes.
    """
    over = Spread.of(a)
    return over if over is not None and shared_out(a.shape[1], over.shares) else None


def shared_out(width: int, shares: int) -> bool:
    """Tell whether so many devices divide the columns of a gram of that width among them."""
    return shares > 1 and width >= HALVED_FROM and width % shares == 0


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _gram(a: Float[Array, "n s"], shared: bool) -> Float[Array, "s s"]:
    half = a.shape[1] // 2
    if not shared or a.shape[1] < HALVED_FROM:
        return matmul(a.T, a)
    first, last = a[:, :half], a[:, half:]
    corner = matmul(first.T, last)
    return jnp.block([[matmul(first.T, first), corner], [corner.T, matmul(last.T, last)]])


@_gram.defjvp
def _gram_jvp(
    shared: bool, primals: tuple[Float[Array, "n s"]], tangents: tuple[Any]
) -> tuple[Float[Array, "s s"], Float[Array, "s s"]]:
    (a,), (a_dot,) = primals, tangents
    half = matmul(a.T, a_dot)
    return _gram(a, shared), half + half.T


@jax.custom_jvp
def _split_gram(a: Float[Array, "n s"]) -> Float[Array, "s s"]:
    return _own_columns(a, a)


@_split_gram.defjvp
def _split_gram_jvp(
    primals: tuple[Float[Array, "n s"]], tangents: tuple[Any]
) -> tuple[Float[Array, "s s"], Float[Array, "s s"]]:
    (a,), (a_dot,) = primals, tangents
    half = _own_columns(a, a_dot)
    over = _sharing(a)
    assert over is not None
    # Transposed, each device multiplies a with its own columns of Ḡ + Ḡᵀ.
    return _split_gram(a), half + over.lay(half.T, P(None, over.axis))


def _own_columns(a: Float[Array, "n s"], b: Float[Array, "n s"]) -> Float[Array, "s s"]:
    """Compute aᵀb, each device its own columns."""
    over = _sharing(a)
    assert over is not None
    kept = None if over.explicit else P.UNCONSTRAINED
    # Laid whole first, and so is b's gradient: what stands before and after stays undivided.
    a, b = over.lay(a, P(kept, None)), over.lay(b, P(kept, None))
    return over.lay(matmul(a.T, over.lay(b, P(kept, over.axis))), P(None, over.axis))


@jax.custom_jvp
def quadratic_form(v: Float[Array, "... s"], symmetric: Float[Array, "s s"]) -> Float[Array, "..."]:
    """Compute vᵀCv along the last axis, for C symmetric.

    The derivative is 2(Cv)ᵀv̇ + vᵀĊv: Cv is at hand from the value, so the gradient takes one
    product (that of C), not two. A C that is not symmetric gives a wrong gradient.
    """
    return jnp.sum(matmul(v, symmetric) * v, -1)


@quadratic_form.defjvp
def _quadratic_form_jvp(
    primals: tuple[Float[Array, "... s"], Float[Array, "s s"]],
    tangents: tuple[Any, Any],
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    (v, symmetric), (v_dot, symmetric_dot) = primals, tangents
    image = matmul(v, symmetric)
    value = jnp.sum(image * v, -1)
    return value, 2 * jnp.sum(image * v_dot, -1) + jnp.sum(matmul(v, symmetric_dot) * v, -1)
