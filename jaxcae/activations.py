"""Activations with exact slopes, and the conventions of PyTorch where libraries differ.

Values are those of `jax.nn`, bit for bit; the derivatives are our own. JAX differentiates tanh as
1 − tanh², a sigmoid as σ(1 − σ) and eˣ − 1 as (eˣ − 1) + 1, which leave no digits once a unit
saturates: in float32 tanh's slope is 10 % wrong at 8 and 0 from 10 on, and a contractive penalty is
made of squares of just these slopes. Here each slope has full relative accuracy in both tails, and
so has its own derivative, which the gradient of the penalty takes.

An encoder that calls `jnp.tanh` or `jax.nn.sigmoid` itself keeps JAX's derivative, in every method.
Call `get_activation("tanh").function` instead for the exact one.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from jaxcae.errors import unknown_name

Elementwise = Callable[[Float[Array, "..."]], Float[Array, "..."]]


class Activation(NamedTuple):
    """An elementwise function and its derivative, both of the pre-activation.

    No value lies below `least` or above `greatest`.
    """

    function: Elementwise
    slope: Elementwise
    least: float = -math.inf
    greatest: float = math.inf


def _with_slope(function: Elementwise, slope: Elementwise) -> Elementwise:
    """Give an elementwise function this derivative; what it computes is not differentiated."""
    ruled = jax.custom_jvp(function)
    ruled.defjvps(lambda tangent, _, a: tangent * slope(a))
    return ruled


# The slopes are made of t = exp(−|a|), which neither overflows nor cancels:
# σ(|a|) = 1 / (1 + t), σ(−|a|) = t / (1 + t), and softplus(a) = max(a, 0) + log(1 + t), so that a
# compiler takes one exponential for softplus and all its derivatives.


def _logistic(a: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
    t = jnp.exp(-jnp.abs(a))
    return jnp.where(jnp.less(a, 0), t, 1) / (1 + t)


def _logistic_slope(a: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
    t = jnp.exp(-jnp.abs(a))
    return t / jnp.square(1 + t)


# Every slope has a derivative of the same kind: σ″ = σ′(1 − 2σ) and so on, without end.

_sigmoid_slope: Elementwise = _with_slope(
    _logistic_slope, lambda a: _sigmoid_slope(a) * (1 - 2 * sigmoid(a))
)
sigmoid: Elementwise = _with_slope(jax.nn.sigmoid, _sigmoid_slope)

_softplus_slope: Elementwise = _with_slope(_logistic, _sigmoid_slope)
softplus: Elementwise = _with_slope(jax.nn.softplus, _softplus_slope)

_tanh_slope: Elementwise = _with_slope(
    lambda a: 4 * _logistic_slope(2 * a), lambda a: -2 * tanh(a) * _tanh_slope(a)
)
tanh: Elementwise = _with_slope(jnp.tanh, _tanh_slope)

_silu_slope: Elementwise = _with_slope(
    lambda a: sigmoid(a) + a * _sigmoid_slope(a),
    lambda a: _sigmoid_slope(a) * (2 + a * (1 - 2 * sigmoid(a))),
)
silu: Elementwise = _with_slope(jax.nn.silu, _silu_slope)


def _elu_slope(a: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
    return jnp.exp(jnp.where(jnp.greater(a, 0), 0, a))


@jax.custom_jvp
def elu(a: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
    """Compute a where it is positive, eᵃ − 1 elsewhere."""
    return jax.nn.elu(a)


elu.defjvps(lambda tangent, _, a: tangent * _elu_slope(a))


@jax.named_scope("gelu")  # in JAX it is no jit function, so that a trace would show no name
def gelu(a: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
    """Compute a Φ(a) by erfc, as PyTorch does; `jax.nn.gelu` approximates unless told otherwise."""
    return jax.nn.gelu(a, approximate=False)  # whose own derivatives do not cancel


def _gelu_slope(a: Float[Array, "..."]) -> Float[Array, "..."]:
    # d/da [a Φ(a)] = Φ(a) + a φ(a), with Φ by erfc, which keeps its accuracy in the left tail.
    cdf = 0.5 * jax.lax.erfc(-a * math.sqrt(0.5))
    return cdf + a * jnp.exp(-0.5 * jnp.square(a)) / math.sqrt(2 * math.pi)


def _relu_slope(a: Float[Array, "..."]) -> Float[Array, "..."]:
    return (a > 0).astype(a.dtype)


ACTIVATIONS: dict[str, Activation] = {
    "sigmoid": Activation(sigmoid, _sigmoid_slope, 0, 1),
    "tanh": Activation(tanh, _tanh_slope, -1, 1),
    "softplus": Activation(softplus, _softplus_slope, 0),
    "elu": Activation(elu, _elu_slope, -1),
    "gelu": Activation(gelu, _gelu_slope, -0.16998),
    "silu": Activation(silu, _silu_slope, -0.27847),
    # relu'(0) = 0, as in PyTorch: jax.nn.relu has that rule, jnp.maximum would give ½.
    "relu": Activation(jax.nn.relu, _relu_slope, 0),
    "identity": Activation(lambda a: a, jnp.ones_like),
}
"""Every activation by name."""


def get_activation(name: str) -> Activation:
    """Look up an activation by name.

    Raises:
        ValueError: If the name is unknown; the message lists the names and the closest one.
    """
    if name not in ACTIVATIONS:
        raise unknown_name("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]
