"""How far hidden units cancel one another, and so which digits a form of grams keeps.

mᵀ(G ∘ H)m sums what pairs of units contribute. Where ‖J‖ is a fraction r of what they contribute
apart, r² = mᵀ(G ∘ H)m / Σ_u m_u² G_uu H_uu, rounding by ε costs ε/r² of the form, and ε/r of a norm
by single directions, whose units are added up before they are squared.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcae.jacobian.across import Across
from jaxcae.jacobian.bound import Bound
from jaxcae.jacobian.chain import Prepared
from jaxcae.jacobian.choose import Choice
from jaxcae.jacobian.program import Encoder

_SAMPLES = 8
_TOLD_BELOW = 0.1  # two digits


def fraction(choice: Choice, encoder: Encoder, xs: Any) -> float | None:
    """Find the least r of the first samples; None where there is no such form, or no values."""
    plan, structure = choice.plan, choice.structure
    arrays = (encoder.params, encoder.constants, encoder.flat_constants, encoder.metric)
    if choice.method != "chain" or not plan.across or plan.local is not None:
        return None
    if structure.segments[plan.position].rank is not None:
        return None
    if not all(_has_values(leaf) for leaf in jax.tree.leaves((arrays, xs))):
        return None

    @jax.jit
    def squares(arrays: Any, xs: Any) -> Any:
        params, constants, flat_constants, metric = arrays
        bound = Bound(
            structure, Encoder(structure.program, params, constants, flat_constants, None, metric)
        )
        prepared = Prepared(bound, plan, metric)
        across = prepared.across
        assert isinstance(across, Across)

        def of_sample(x: Any) -> tuple[Any, Any]:
            slopes = prepared.at(x).local[plan.position]
            return across.inner(slopes, slopes), across.apart(slopes)

        return jax.vmap(of_sample)(xs)

    found, apart = (np.asarray(a, np.float64) for a in squares(arrays, xs[:_SAMPLES]))
    floor = float(jnp.finfo(structure.program.x.dtype).eps)
    ratios = np.maximum(found, floor * apart)[apart > 0] / apart[apart > 0]
    return float(np.sqrt(ratios.min())) if ratios.size else None


def told(r: float | None, epsilon: float) -> str:
    """Say in a line which digits are lost, and what keeps them; nothing from r = 0.1 on."""
    if r is None or r >= _TOLD_BELOW:
        return ""
    kept, of_reverse = (max(0, math.floor(-math.log10(epsilon / r**n))) for n in (2, 1))
    more = "" if epsilon <= np.finfo(np.float64).eps else "; float64 keeps more"
    return (
        f"hidden units cancel to {r:.2g} of what they contribute apart: norms keep about {kept} "
        f"digits, {of_reverse} by method='reverse'{more}"
    )


def _has_values(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray | np.generic | jax.Array) and not isinstance(
        leaf, jax.core.Tracer
    )
