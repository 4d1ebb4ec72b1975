"""An unbiased estimate of ‖J‖²_F for deep chains, with a control variate from mean slopes.

Write the slopes of each of the n elementwise segments as their batch mean plus a deviation, and let
J_A keep the terms of J with at most one deviation,

    J_A = Σ_l U_l D_l V_l − (n − 1) C,

with V_l and U_l the products of kernels and mean slopes before and after segment l, and C the
product with mean slopes throughout. Since U_l D̄_l V_l = C for every l, the last term spreads over
the sum:

    J_A = Σ_l U_l E_l V_l = U E V,    e_l = m_l − (1 − 1/n) m̄_l,

the Jacobian of a *two-layer* network as wide as all elementwise segments together. Its norm is
exact and cheap, eᵀ(UᵀU ∘ VVᵀ)e, and for a probe v with E[vvᵀ] = I

    P̂ = ‖J_A‖²_F + ‖Jᵀv‖² − ‖J_Aᵀv‖²

is unbiased whatever the means are, since v is independent of them: E[P̂] = ‖J_A‖² + ‖J‖² − ‖J_A‖².
That holds identically in the parameters with the means held fixed, so gradients are unbiased too,
and the means need none of their own. The noise comes from products of two or more deviations only.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxcae.jacobian.affine import kernel
from jaxcae.jacobian.chain import value_and_slopes
from jaxcae.jacobian.directions import accurate
from jaxcae.jacobian.estimators import Distribution, draw_probes
from jaxcae.jacobian.products import gram, quadratic_form
from jaxcae.jacobian.structure import Structure


def control_variate(
    structure: Structure,
    xs: Any,
    key: PRNGKeyArray,
    num_probes: int = 1,
    distribution: Distribution = "rademacher",
) -> tuple[Any, Float[Array, " batch"]]:
    """Compute codes and P̂ for a batch; P̂ is the mean over probes, each sample with its own.

    Exact if there is at most one elementwise segment, or where slopes do not vary in the batch.
    Neither d nor the Jacobian's size appears in the cost of a sample: with h_l the widths of the
    elementwise segments, it is (Σ h_l)² + h_1² + 2 Σ h_l h_{l+1} multiplications for one probe.

    Raises:
        ValueError: If a segment of the encoder is opaque.
    """
    _require_chain(structure)
    if not structure.depends:
        return jax.vmap(structure.encode)(xs), jnp.zeros(xs.shape[0])
    codes, kernels, slopes = _forward(structure, xs)
    if not slopes:
        return codes, jnp.full(xs.shape[0], jnp.sum(jnp.square(kernels[0])))

    means = [jax.lax.stop_gradient(jnp.mean(m, 0)) for m in slopes]
    e = [m - (1 - 1 / len(slopes)) * mean[None, :] for m, mean in zip(slopes, means, strict=True)]
    first_gram = gram(kernels[0], shared=True)
    rows = _rows(kernels, means)  # the matrices U_l
    anchor = quadratic_form(
        jnp.concatenate(e, -1),
        _columns_gram(first_gram, kernels, means) * gram(jnp.concatenate(rows, -1), shared=True),
    )
    if len(slopes) == 1:
        return codes, anchor

    def correct(probe: Float[Array, " latent"], m: Any, e: Any) -> Float[Array, ""]:
        """Compute ‖Jᵀv‖² − ‖J_Aᵀv‖² as ⟨(J − J_A)ᵀv, (J + J_A)ᵀv⟩, before the first kernel."""
        pulled = m[-1] * (probe @ rows[-1])
        anchored = e[-1] * (probe @ rows[-1])
        for i in reversed(range(len(m) - 1)):
            pulled = m[i] * (pulled @ kernels[i + 1].T)
            anchored = e[i] * (probe @ rows[i]) + means[i] * (anchored @ kernels[i + 1].T)
        return jnp.sum(((pulled - anchored) @ first_gram) * (pulled + anchored))

    probes = draw_probes(key, xs.shape[0], num_probes, rows[-1].shape[0], distribution)
    corrections = jax.vmap(jax.vmap(correct, (0, None, None)))(probes, slopes, e)
    return codes, anchor + jnp.mean(corrections, -1)


def _require_chain(structure: Structure) -> None:
    opaque = [segment for segment in structure.segments if segment.kind == "opaque"]
    if opaque:
        names = dict.fromkeys(eqn.primitive.name for s in opaque for eqn in s.equations)
        raise ValueError(
            "control_variate needs an encoder of affine and elementwise parts, but found an "
            f"opaque part ({', '.join(names)}). Use method='auto' or 'hutchinson'."
        )


def _forward(structure: Structure, xs: Any) -> tuple[Any, list[Any], list[Any]]:
    """Compute codes, kernels K_1 … K_{n+1} and slopes m_1 … m_n, so that Jᵀ = K_1 D_1 K_2 … ."""
    kernels: list[Any] = []
    slopes: list[Any] = []
    v = xs
    for segment in structure.segments:
        if segment.kind == "affine":
            kernels.append(accurate(kernel(segment)))
            v = jax.vmap(segment.run)(v)
        else:
            if len(kernels) == len(slopes):
                kernels.append(jnp.eye(segment.in_size))
            v, m = jax.vmap(lambda u, s=segment: value_and_slopes(s, u))(v)
            slopes.append(m)
    if len(kernels) == len(slopes):
        kernels.append(jnp.eye(v[0].size))
    return v, kernels, slopes


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
