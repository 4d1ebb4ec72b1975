"""Symmetric products with derivative rules of their own: one product backward, not two."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_jvp
def gram(a: Float[Array, "n s"]) -> Float[Array, "s s"]:
    """Compute aᵀa, the inner products of the columns.

    The derivative is S + Sᵀ with S = aᵀȧ, so that the gradient of a is a(Ḡ + Ḡᵀ): one product,
    where differentiating `a.T @ a` as any product of two matrices would take two.
    """
    return a.T @ a


@gram.defjvp
def _gram_jvp(
    primals: tuple[Float[Array, "n s"]], tangents: tuple[Any]
) -> tuple[Float[Array, "s s"], Float[Array, "s s"]]:
    (a,), (a_dot,) = primals, tangents
    half = a.T @ a_dot
    return gram(a), half + half.T


@jax.custom_jvp
def quadratic_form(v: Float[Array, "... s"], symmetric: Float[Array, "s s"]) -> Float[Array, "..."]:
    """Compute vᵀCv along the last axis, for C symmetric.

    The derivative is 2(Cv)ᵀv̇ + vᵀĊv: Cv is at hand from the value, so the gradient takes one
    product (that of C), not two. A C that is not symmetric gives a wrong gradient.
    """
    return jnp.sum((v @ symmetric) * v, -1)


@quadratic_form.defjvp
def _quadratic_form_jvp(
    primals: tuple[Float[Array, "... s"], Float[Array, "s s"]],
    tangents: tuple[Any, Any],
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    (v, symmetric), (v_dot, symmetric_dot) = primals, tangents
    image = v @ symmetric
    value = jnp.sum(image * v, -1)
    return value, 2 * jnp.sum(image * v_dot, -1) + jnp.sum((v @ symmetric_dot) * v, -1)
