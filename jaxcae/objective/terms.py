"""Terms of an objective: a weight times a function of the forward pass."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Array

from jaxcae.difference import jacobian_difference
from jaxcae.errors import check_positive_int
from jaxcae.objective.forward import Forward
from jaxcae.objective.weight_penalties import l1_penalty, l2_penalty
from jaxcae.types import Autoencoder

Weight: TypeAlias = Any
"""A number, a scalar array of NumPy or JAX, a traced scalar, or a schedule `step -> scalar`."""

_TAKEN = ("loss", "reconstruction")


@dataclass(frozen=True, eq=False)
class Term:
    """One term of an objective, λ times the batch mean of a value per sample.

    Attributes:
        name: What the metrics call it; they report the mean before the weight.
        weight: λ, at least 0: a number, a scalar array, a traced scalar, or a schedule of the step
            (as optax makes them). At 0 the term is measured and carries no gradient.
        values: `values(forward) -> (batch,)`, or a scalar where it does not depend on the sample.
        every: Take it at every n-th step only, at n times its weight (lazy regularisation). Its
            metric is n times the mean at these steps and 0 at the others, so that the average
            over steps is right. A loss called without a step takes every term, at its weight.

    Raises:
        ValueError: If the name is taken, the weight is not usable, or `every` is not positive.

    References:
        Lazy regularisation: Karras et al., arXiv:1912.04958, appendix B.
    """

    name: str
    weight: Weight
    values: Callable[[Forward], Array]
    every: int = 1

    def __post_init__(self) -> None:
        if self.name in _TAKEN:
            raise ValueError(f"a term cannot be called {self.name!r}: every loss reports that.")
        check_weight(self.name, self.weight)
        check_positive_int("every", self.every)

    @property
    def only_measured(self) -> bool:
        """Whether its weight is a known 0."""
        return is_known(self.weight) and float(self.weight) == 0

    def weight_at(self, step: Any) -> Any:
        """Return the weight at a step.

        Raises:
            ValueError: If it is a schedule and there is no step.
        """
        if not callable(self.weight):
            return self.weight
        if step is None:
            raise ValueError(
                f"the weight of {self.name!r} is a schedule: call loss(params, xs, key, step=...)."
            )
        return self.weight(step)


def contraction_term(weight: Weight, every: int = 1) -> Term:
    """Make the term λ‖J‖²_F; see `Term`."""
    return Term("contraction", weight, lambda forward: forward.norms, every)


def curvature_term(weight: Weight) -> Term:
    """Make the term γ‖∇²h‖²_F, the squared sum of the encoder's second derivatives; see `Term`."""
    return Term("curvature", weight, lambda forward: forward.curvatures)


def noise_curvature_term(
    model: Autoencoder, weight: Weight, noise_scale: float, *, num_samples: int = 1
) -> Term:
    """Make the term γ‖J(x + ε) − J(x)‖²_F of CAE+H, ε ~ N(0, σ²I); see `jacobian_difference`.

    It needs the loss's key, and is not γσ²‖∇²h‖², to which it tends for small σ alone.
    """
    difference = jacobian_difference(model.encode, noise_scale, num_samples=num_samples)

    def values(forward: Forward) -> Array:
        key = None if forward.key is None else jax.random.fold_in(forward.key, 3)
        return difference(forward.params, forward.inputs, key)

    return Term("noise_curvature", weight, values)


def decoder_term(weight: Weight) -> Term:
    """Make the term λ‖J_g(h)‖²_F of the decoder g at the code, by the method of the loss."""
    return Term("decoder_contraction", weight, lambda forward: forward.decoder_norms)


def reconstruction_map_term(weight: Weight) -> Term:
    """Make the term λ‖J_r(x)‖²_F of the reconstruction map r = g ∘ h, by the method of the loss.

    With λ = σ² and squared errors it is what small noise adds to a denoising loss.

    References:
        Alain and Bengio, "What Regularized Auto-Encoders Learn from the Data-Generating
        Distribution", arXiv:1211.4246.
    """
    return Term("map_contraction", weight, lambda forward: forward.map_norms)


def l1_term(weight: Weight) -> Term:
    """Make the term λ·Σ|w| over the kernels."""
    return Term("l1", weight, lambda forward: l1_penalty(forward.params))


def l2_term(weight: Weight) -> Term:
    """Make the term λ·Σw² over the kernels."""
    return Term("l2", weight, lambda forward: l2_penalty(forward.params))


def check_weight(name: str, weight: Weight) -> None:
    """Raise ValueError if a weight is known to be unusable."""
    if callable(weight) or isinstance(weight, jax.core.Tracer):
        return
    try:
        shape, value = np.shape(weight), float(weight) if np.ndim(weight) == 0 else math.nan
    except (TypeError, ValueError):
        shape, value = (), math.nan
    if isinstance(weight, str | bytes) or not (
        isinstance(weight, int | float) or hasattr(weight, "dtype")
    ):
        raise ValueError(
            f"{name} must be a number, a scalar array or a schedule of the step, got "
            f"{weight!r:.80}."
        )
    if shape:
        raise ValueError(f"{name} must be a scalar, got an array of shape {shape}.")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and at least 0, got {weight!r}.")


def is_absent(weight: Weight | None) -> bool:
    """Whether a weight is None or a known 0."""
    return weight is None or (is_known(weight) and float(weight) == 0)


def is_known(weight: Weight) -> bool:
    """Whether a weight is a number now: no schedule, and not traced."""
    return not callable(weight) and not isinstance(weight, jax.core.Tracer)
