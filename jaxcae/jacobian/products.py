"""Symmetric products with derivative rules of their own: one product backward, not two.

Where units cancel one another, a gram cancels where the encoder itself does not. So these products
ask for full precision on accelerators, whose default keeps 8 to 11 bits.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def gram(a: Float[Array, "n s"], shared: bool = False) -> Float[Array, "s s"]:
    """Compute aᵀa, the inner products of the columns.

    The derivative is S + Sᵀ with S = aᵀȧ, so that the gradient of a is a(Ḡ + Ḡᵀ): one product,
    where differentiating `a.T @ a` as any product of two matrices would take two. If it is shared
    by the batch and wide, the block below the diagonal is copied, not computed: a quarter less.
    (For a gram of each sample, moving the blocks takes longer than what is saved.)
    """
    half = a.shape[1] // 2
    if not shared or a.shape[1] < HALVED_FROM:
        return matmul(a.T, a)
    first, last = a[:, :half], a[:, half:]
    corner = matmul(first.T, last)
    return jnp.block([[matmul(first.T, first), corner], [corner.T, matmul(last.T, last)]])


@gram.defjvp
def _gram_jvp(
    shared: bool, primals: tuple[Float[Array, "n s"]], tangents: tuple[Any]
) -> tuple[Float[Array, "s s"], Float[Array, "s s"]]:
    (a,), (a_dot,) = primals, tangents
    half = matmul(a.T, a_dot)
    return gram(a, shared), half + half.T


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
