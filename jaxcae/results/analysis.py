"""Look into a trained encoder: spectra of its Jacobian, contraction curves, filters, saturation.

Constructors take what is static and return a function of `(params, xs)`, as in the rest of the
library; nothing here is jitted, so wrap the returned function in `jax.jit` to call it repeatedly.
Every function gives one row per sample and leaves the averaging to the caller, except
`average_spectrum`, which is an average by definition.

The symbols: h the encoder, x a sample of d features, J(x) the k × d Jacobian of h at x, and
σ₁ ≥ σ₂ ≥ … its min(d, k) singular values.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxcae.activations import get_activation
from jaxcae.errors import check_positive_int
from jaxcae.jacobian.methods import Method
from jaxcae.penalty import contractive_penalty, encode_and_penalty, jacobian_norm
from jaxcae.results.spectra import (
    PerSample,
    Spectrum,
    active_dimensions,
    average_spectrum,
    effective_dimension,
    singular_values,
    tangents,
)
from jaxcae.types import Encode, Params

__all__ = [
    "PerSample",
    "Spectrum",
    "active_dimensions",
    "average_spectrum",
    "contraction_ratios",
    "curvature_curves",
    "effective_dimension",
    "encoder_slopes",
    "first_layer_activity",
    "first_layer_filters",
    "jacobian_norms",
    "saturation",
    "singular_values",
    "tangents",
    "typical_distance",
]


def jacobian_norms(
    encode: Encode, method: str | Method = "auto", *, chunk_size: int = 256, **method_options: Any
) -> PerSample:
    """Make `(params, xs) -> (batch,)`, the squared norms ‖J(x)‖²_F of any number of samples.

    The same figure as `contractive_penalty`, in chunks so that a whole data set fits in memory.
    Its mean is the contraction term of the objective. The mean of its *root* is mean ‖J‖_F, which
    is never more than the root of the mean.

    Args:
        encode: `encode(params, x) -> z` for one sample.
        method: How to compute the norms; see `contractive_penalty`.
        chunk_size: Samples at a time; memory grows with it.
        **method_options: Passed on to `contractive_penalty`.
    """
    check_positive_int("chunk_size", chunk_size)
    encode_and_norms = encode_and_penalty(encode, method, **method_options)

    def norms(params: Params, xs: Any) -> Float[Array, " batch"]:
        # In chunks of whole batches, since a method may share work between samples.
        return _in_chunks(lambda chunk: encode_and_norms(params, chunk)[1], xs, chunk_size)

    return norms


def contraction_ratios(
    encode: Encode, radii: Sequence[float], *, num_directions: int = 16, chunk_size: int = 32
) -> Callable[..., Float[Array, "batch radii"]]:
    """Make `(params, xs, key) -> (batch, radii)`, how much the encoder shrinks a distance r.

    For each sample, over directions u drawn uniformly from the unit sphere (the same ones at every
    radius, so that the curve is smooth):

        ρ(x, r) = mean over u of ‖h(x + r u) − h(x)‖ / r

    A value below 1 means that the code space is tighter than the input space at that distance. As
    r → 0 the mean of ρ² over directions tends to ‖J(x)‖²_F / d. In a CAE the curve rises with r:
    contraction is local, between neighbours, while separate examples stay apart.

    Args:
        encode: `encode(params, x) -> z` for one sample.
        radii: The distances r, in the units of the features (Euclidean over all features).
            Rounding makes ρ noise where r is below about 1e-5 times ‖x‖ in float32.
        num_directions: Directions per sample.
        chunk_size: Samples at a time: O(chunk_size · radii · directions · d) memory.

    Raises:
        ValueError: If a radius is not positive and finite.

    References:
        Rifai et al., "Contractive Auto-Encoders", ICML 2011, section 5.3 (contraction curves).
    """
    distances = _distances(radii, num_directions, chunk_size)

    def ratios(params: Params, xs: Any, key: PRNGKeyArray) -> Float[Array, "batch radii"]:
        rs = jnp.asarray(distances, xs.dtype)

        def per_sample(sample: tuple[Any, PRNGKeyArray]) -> Float[Array, " radii"]:
            x, sample_key = sample
            code = encode(params, x)

            def shrinkage(r: Any, unit: Any) -> Float[Array, ""]:
                return jnp.linalg.norm((encode(params, x + r * unit) - code).ravel()) / r

            over_directions = jax.vmap(shrinkage, (None, 0))
            units = _units(sample_key, num_directions, x)
            return jnp.mean(jax.vmap(over_directions, (0, None))(rs, units), axis=1)

        keys = jax.random.split(key, xs.shape[0])
        return jax.lax.map(per_sample, (xs, keys), batch_size=chunk_size)

    return ratios


def curvature_curves(
    encode: Encode,
    radii: Sequence[float],
    method: str | Method = "auto",
    *,
    num_directions: int = 16,
    chunk_size: int = 32,
) -> Callable[..., Float[Array, "batch radii"]]:
    """Make `(params, xs, key) -> (batch, radii)`, how much the encoder bends at a distance r.

    For each sample, at the points of `contraction_ratios` with the same key:

        κ(x, r) = mean over u of ‖∇²h(x + r u)‖_F

    A curvature penalty lowers it at the samples; the curve tells how far around them it holds.

    Args:
        encode: `encode(params, x) -> z` for one sample.
        radii: The distances r, in the units of the features.
        method: How to compute ‖∇²h‖²; see `contractive_penalty`.
        num_directions: Directions per sample.
        chunk_size: Samples at a time: O(chunk_size · radii · directions · d) memory.

    Raises:
        ValueError: If a radius is not positive and finite, or the encoder has no curvature by that
            method.
    """
    distances = _distances(radii, num_directions, chunk_size)
    curvature = contractive_penalty(encode, method, order=2)

    def curves(params: Params, xs: Any, key: PRNGKeyArray) -> Float[Array, "batch radii"]:
        rs = jnp.asarray(distances, xs.dtype)

        def per_sample(sample: tuple[Any, PRNGKeyArray]) -> Float[Array, " radii"]:
            x, sample_key = sample
            units = _units(sample_key, num_directions, x)
            steps = rs[None, :, None] * units.reshape(num_directions, 1, -1)
            points = x[None] + steps.reshape(-1, *x.shape)
            norms = jacobian_norm(curvature(params, points, key))
            return jnp.mean(norms.reshape(num_directions, -1), axis=0)

        keys = jax.random.split(key, xs.shape[0])
        return jax.lax.map(per_sample, (xs, keys), batch_size=chunk_size)

    return curves


def _distances(radii: Sequence[float], num_directions: int, chunk_size: int) -> np.ndarray:
    check_positive_int("num_directions", num_directions)
    check_positive_int("chunk_size", chunk_size)
    distances = np.asarray(radii, dtype=float)
    if distances.ndim != 1 or not (np.isfinite(distances) & (distances > 0)).all():
        raise ValueError(f"radii must be a sequence of positive numbers, got {radii!r}.")
    return distances


def _units(key: PRNGKeyArray, count: int, x: Any) -> Any:
    """Draw directions uniformly from the unit sphere."""
    normal = jax.random.normal(key, (count, *x.shape), x.dtype)
    return jax.vmap(lambda direction: direction / jnp.linalg.norm(direction.ravel()))(normal)


def typical_distance(xs: Float[Array, "batch ..."]) -> Float[Array, ""]:
    """Compute the root-mean-square distance between two samples, √(2 Σ_j var x_j).

    A natural unit for the radii of `contraction_ratios`: at this distance lies another sample.
    """
    variances = jnp.var(xs.reshape(xs.shape[0], -1), axis=0)
    return jnp.sqrt(2 * jnp.sum(variances))


def encoder_slopes(
    activation: str, latent_activation: str = "identity"
) -> Callable[[Params, Float[Array, "batch features"]], tuple[Float[Array, "batch _"], ...]]:
    """Make `(params, xs) -> slopes`, the derivative s'(a) of every unit of a built-in encoder.

    These are the diagonals D of J = … D₂ W₂ D₁ W₁, in each sample.

    Args:
        activation: The hidden activation that `jaxcae.mlp` was made with.
        latent_activation: Its activation on the code; a linear code has no slopes and is left out.

    Returns:
        A function that gives one array `(batch, width)` per layer with an activation.
    """
    hidden, latent = get_activation(activation), get_activation(latent_activation)

    def slopes(params: Params, xs: Any) -> tuple[Any, ...]:
        layers = _encoder_layers(params)

        def per_sample(x: Any) -> tuple[Any, ...]:
            found = []
            for layer in layers:
                unit = hidden if layer is not layers[-1] else latent
                pre_activation = x @ layer["kernel"] + layer["bias"]
                found.append(unit.slope(pre_activation))
                x = unit.function(pre_activation)
            return tuple(found[:-1] if latent_activation == "identity" else found)

        return jax.vmap(per_sample)(xs)

    return slopes


def saturation(
    slopes: Float[Array, "batch units"], activation: str, threshold: float = 0.1
) -> Float[Array, " batch"]:
    """Compute the fraction of units whose slope is small, |s'(a)| < threshold · max |s'|.

    A saturated unit hardly moves with its input, whatever its weights: one of the two ways, beside
    small weights, in which an encoder contracts. The largest slope is ¼ for a sigmoid and 1 for
    tanh, softplus and ReLU, where a saturated unit is one that is off.

    Args:
        slopes: One array of `encoder_slopes`.
        activation: The activation that they are slopes of.
        threshold: What counts as small, as a share of the activation's largest slope.

    Returns:
        A fraction between 0 and 1 per sample.

    References:
        Rifai et al., "Contractive Auto-Encoders", ICML 2011, table 1, column SAT: the mean of this
        over samples, for sigmoid units.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold is a share of the largest slope, got {threshold!r}.")
    # A grid finds the maxima of all known activations to 1e-6: they are flat there.
    steepest = jnp.max(jnp.abs(get_activation(activation).slope(jnp.linspace(-8.0, 8.0, 3201))))
    return jnp.mean(jnp.abs(slopes) < threshold * steepest.astype(slopes.dtype), axis=-1)


def first_layer_filters(params: Params) -> Float[Array, "units features"]:
    """Give the input weights of each unit of a built-in encoder's first layer, one row per unit."""
    return jnp.asarray(_encoder_layers(params)[0]["kernel"]).T


def first_layer_activity(
    activation: str,
) -> Callable[[Params, Float[Array, "batch features"]], Float[Array, " units"]]:
    """Make `(params, xs) -> deviations`: how much each first unit of a built-in encoder varies.

    It is the standard deviation of the unit's output over the samples, in units of the output; 0
    for a ReLU that is off on all of them, whose weights training no longer moves.

    Args:
        activation: The activation of the first layer.
    """
    unit = get_activation(activation)

    def activity(params: Params, xs: Any) -> Any:
        layer = _encoder_layers(params)[0]
        return jnp.std(unit.function(xs @ layer["kernel"] + layer["bias"][None]), axis=0)

    return activity


def _encoder_layers(params: Params) -> list[Any]:
    try:
        encoder = params["encoder"]
        layers = [encoder[f"layer_{i}"] for i in range(len(encoder))]
        return [{"kernel": layer["kernel"], "bias": layer["bias"]} for layer in layers]
    except (KeyError, TypeError, IndexError):
        raise ValueError(
            "filters and slopes are read from the parameters of jaxcae.mlp, "
            "{'encoder': {'layer_0': {'kernel', 'bias'}, …}}; got another tree. "
            "jacobian_norms, singular_values and contraction_ratios take any encoder."
        ) from None


def _in_chunks(function: Callable[[Any], Any], xs: Any, chunk_size: int) -> Any:
    """Map a function of a batch over chunks of it; the last, shorter chunk is its own call."""
    whole = xs.shape[0] // chunk_size
    parts = []
    if whole:
        chunks = xs[: whole * chunk_size].reshape(whole, chunk_size, *xs.shape[1:])
        mapped = jax.lax.map(function, chunks)
        parts.append(mapped.reshape(whole * chunk_size, *mapped.shape[2:]))
    if xs.shape[0] % chunk_size:
        parts.append(function(xs[whole * chunk_size :]))
    return jnp.concatenate(parts)
