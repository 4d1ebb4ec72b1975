"""How far a sample is from the nearest training sample, in units of the input (experimental).

Codes are compared where an encoder of small Jacobian has put them, but a distance between codes
says nothing by itself: the encoder may shrink one direction a hundred times as much as another.
N(x) = δᵀ(J Jᵀ + εI)⁻¹δ with δ = z − zᵢ undoes that. zᵢ is the nearest training code and J the
Jacobian of the encoder *there*, so that N is the squared length of the shortest step from xᵢ that
would, to first order, move its code to z. ε keeps directions that the code ignores from counting
without bound.

On one real electrocardiogram it was far above any other score; on short anomalies in long windows
it fails. It says little of a network without contraction. Look at it on labelled data first.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxcae.penalty import encode_and_penalty
from jaxcae.results.scores import score_in_chunks
from jaxcae.types import Autoencoder, Params

MOST = 10_000
"""Training samples that are kept to compare with; of more, as many at even distances."""
_RIDGE = 1e-3


class Neighbours(NamedTuple):
    """Training samples and their codes.

    Attributes:
        samples: In rows, as the encoder sees them, shape (kept, features).
        codes: Shape (kept, latent), less their mean.
        mean: That of the codes, shape (latent,).
        epsilon: 10⁻³ of the median of tr(J Jᵀ) / latent over the samples.
    """

    samples: Float[np.ndarray, "kept features"]
    codes: Float[np.ndarray, "kept latent"]
    mean: Float[np.ndarray, " latent"]
    epsilon: float

    @classmethod
    def of(cls, model: Autoencoder, params: Params, samples: Any) -> "Neighbours":
        """Encode training samples in rows."""
        places = np.linspace(0, len(samples) - 1, min(len(samples), MOST)).astype(int)
        kept = np.ascontiguousarray(samples[places], np.float32)
        parts = list(score_in_chunks(encode_and_penalty(model.encode), params, [kept]))
        codes, norms = (np.concatenate(part) for part in zip(*parts, strict=True))
        mean = codes.mean(0)
        # Where no code moves at all, any ridge will do.
        epsilon = _RIDGE * float(np.median(norms)) / codes.shape[1] or 1.0
        return cls(kept, codes - mean[None], mean, epsilon)


def to_neighbour(model: Autoencoder) -> Callable[..., tuple[Any, Any]]:
    """Make `(params, samples, codes, zs) -> (deltas, grams)`.

    For each of the codes zs, less the mean of the training codes, that is its δ and the J Jᵀ of the
    encoder at its neighbour, shapes (batch, latent) and (batch, latent, latent). The Jacobian of
    each is held at once: latent × features numbers a sample.
    """
    highest = jax.lax.Precision.HIGHEST

    def relate(params: Params, samples: Any, codes: Any, zs: Any) -> tuple[Any, Any]:
        products = jnp.matmul(zs, codes.T, precision=highest)
        nearest = jnp.argmin(jnp.sum(codes**2, -1)[None] - 2 * products, axis=-1)
        jacobian = jax.vmap(jax.jacrev(model.encode, argnums=1), (None, 0))(
            params, samples[nearest]
        )
        grams = jnp.einsum("bkd,bld->bkl", jacobian, jacobian, precision=highest)
        return zs - codes[nearest], grams

    return relate


def distances(
    deltas: Float[np.ndarray, "batch latent"],
    grams: Float[np.ndarray, "batch latent latent"],
    epsilon: float,
) -> Float[np.ndarray, " batch"]:
    """Compute δᵀ(J Jᵀ + εI)⁻¹δ in float64: the gram's condition is up to a thousand and more."""
    wide = deltas.astype(np.float64)
    ridged = grams.astype(np.float64) + epsilon * np.eye(deltas.shape[1])
    return np.einsum("bk,bk->b", wide, np.linalg.solve(ridged, wide[..., None])[..., 0])
