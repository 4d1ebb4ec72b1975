"""The truth, by brute force: NumPy float64, explicit Jacobians, no JAX and nothing of jaxcae.

Two independent roads lead to the same numbers, and tests/test_reference.py holds them together.

- `Dual` carries a value and its d derivatives with respect to the sample through any encoder
  written in NumPy. Every operation is holomorphic, so an imaginary step of 1e-30 in a parameter
  yields the derivative of ‖J‖²_F with respect to it without any cancellation (complex step).
  The cost is one pass per parameter: toy sizes only.
- `mlp_penalty` and `mlp_penalty_gradient` multiply the chain of matrices of a dense encoder,
  sample by sample, and differentiate it by hand. Real sizes take a second.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from scipy import special

Array = np.ndarray
Encode = Callable[[Sequence[Array], Any], Any]
"""`encode(arrays, x)` for ONE sample, where x is a Dual or an array."""

STEP = 1e-30  # an imaginary step may be this small: nothing is subtracted


# --------------------------------------------------------------------------- activations


class Activation(NamedTuple):
    """An elementwise function with its first and second derivative."""

    function: Callable[[Array], Array]
    slope: Callable[[Array], Array]
    curvature: Callable[[Array], Array]


def _sigmoid(a: Array) -> Array:
    small = np.exp(-np.where(a.real >= 0, a, -a))
    return np.where(a.real >= 0, 1, small) / (1 + small)


def _sigmoid_slope(a: Array) -> Array:
    return _sigmoid(a) * _sigmoid(-a)


def _softplus(a: Array) -> Array:
    return np.where(a.real > 0, a, 0) + np.log1p(np.exp(-np.where(a.real >= 0, a, -a)))


def _normal_cdf(a: Array) -> Array:
    return special.erfc(-a / np.sqrt(2)) / 2


def _normal_pdf(a: Array) -> Array:
    return np.exp(-a * a / 2) / np.sqrt(2 * np.pi)


ACTIVATIONS = {
    "sigmoid": Activation(
        _sigmoid, _sigmoid_slope, lambda a: _sigmoid_slope(a) * (1 - 2 * _sigmoid(a))
    ),
    "tanh": Activation(
        np.tanh, lambda a: 1 / np.cosh(a) ** 2, lambda a: -2 * np.tanh(a) / np.cosh(a) ** 2
    ),
    "softplus": Activation(_softplus, _sigmoid, _sigmoid_slope),
    "elu": Activation(
        lambda a: np.where(a.real > 0, a, np.expm1(np.where(a.real > 0, 0, a))),
        lambda a: np.where(a.real > 0, 1, np.exp(np.where(a.real > 0, 0, a))),
        lambda a: np.where(a.real > 0, 0, np.exp(np.where(a.real > 0, 0, a))),
    ),
    "gelu": Activation(
        lambda a: a * _normal_cdf(a),
        lambda a: _normal_cdf(a) + a * _normal_pdf(a),
        lambda a: _normal_pdf(a) * (2 - a * a),
    ),
    "silu": Activation(
        lambda a: a * _sigmoid(a),
        lambda a: _sigmoid(a) + a * _sigmoid_slope(a),
        lambda a: _sigmoid_slope(a) * (2 + a * (1 - 2 * _sigmoid(a))),
    ),
    "relu": Activation(
        lambda a: np.where(a.real > 0, a, 0),
        lambda a: np.where(a.real > 0, 1.0, 0.0),
        np.zeros_like,
    ),
    "identity": Activation(lambda a: a, np.ones_like, np.zeros_like),
}


# --------------------------------------------------------------------------- dual numbers


class Dual:
    """A value of any shape and its derivatives along d directions: `tangent` has one axis more."""

    __array_ufunc__ = None  # `array @ dual` and `array * dual` come to the methods below

    def __init__(self, value: Array, tangent: Array) -> None:
        """Pair a value with its derivatives."""
        self.value, self.tangent = value, tangent

    @classmethod
    def seed(cls, x: Array) -> "Dual":
        """Make the identity: every entry of x moves along its own direction."""
        return cls(x, np.eye(x.size).reshape(*x.shape, x.size))

    @property
    def shape(self) -> tuple[int, ...]:
        """Give the shape of the value."""
        return self.value.shape

    def map(self, function: Callable[[Array], Array]) -> "Dual":
        """Apply a linear function that works on the leading axes, such as a reshape."""
        columns = [function(self.tangent[..., j]) for j in range(self.tangent.shape[-1])]
        return Dual(function(self.value), np.stack(columns, axis=-1))

    def elementwise(self, name: str) -> "Dual":
        """Apply an activation by name."""
        activation = ACTIVATIONS[name]
        slope = activation.slope(self.value)
        return Dual(activation.function(self.value), slope[..., None] * self.tangent)

    def reshape(self, *shape: int) -> "Dual":
        """Reshape the value."""
        return self.map(lambda a: a.reshape(*shape))

    def sum(self, axis: int | None = None, keepdims: bool = False) -> "Dual":
        """Sum over one axis, or over all."""
        return self.map(lambda a: a.sum(axis=axis, keepdims=keepdims))

    def __getitem__(self, index: Any) -> "Dual":
        """Index the value."""
        return self.map(lambda a: a[index])

    def __neg__(self) -> "Dual":
        return Dual(-self.value, -self.tangent)

    def __add__(self, other: Any) -> "Dual":
        if isinstance(other, Dual):
            return Dual(self.value + other.value, self.tangent + other.tangent)
        value = self.value + other
        return Dual(value, np.broadcast_to(self.tangent, (*value.shape, self.tangent.shape[-1])))

    __radd__ = __add__

    def __sub__(self, other: Any) -> "Dual":
        return self + (-other)

    def __rsub__(self, other: Any) -> "Dual":
        return -self + other

    def __mul__(self, other: Any) -> "Dual":
        if isinstance(other, Dual):
            return Dual(
                self.value * other.value,
                self.value[..., None] * other.tangent + other.value[..., None] * self.tangent,
            )
        return Dual(self.value * other, self.tangent * np.asarray(other)[..., None])

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> "Dual":
        return self * (other**-1.0 if isinstance(other, Dual) else 1 / np.asarray(other))

    def __pow__(self, exponent: float) -> "Dual":
        slope = exponent * self.value ** (exponent - 1)
        return Dual(self.value**exponent, slope[..., None] * self.tangent)

    def __matmul__(self, matrix: Array) -> "Dual":
        return self.map(lambda a: a @ matrix)

    def __rmatmul__(self, matrix: Array) -> "Dual":
        return self.map(lambda a: matrix @ a)


def exp(x: Dual) -> Dual:
    """Exponentiate a dual number."""
    value = np.exp(x.value)
    return Dual(value, value[..., None] * x.tangent)


def concatenate(parts: Sequence[Dual], axis: int = 0) -> Dual:
    """Concatenate dual numbers along a leading axis."""
    axis %= parts[0].value.ndim
    return Dual(
        np.concatenate([part.value for part in parts], axis),
        np.concatenate([part.tangent for part in parts], axis),
    )


def convolve(x: Any, kernel: Array, stride: int, padding: str = "SAME") -> Any:
    """Correlate an image (H, W, C) with a kernel (height, width, C, out), as explicit loops.

    SAME pads so that the output has ceil(H / stride) rows, the odd zero at the end.
    """
    if isinstance(x, Dual):
        parts = (convolve(part, kernel, stride, padding) for part in (x.value, x.tangent))
        return Dual(*parts)
    size = kernel.shape[:2]
    if padding == "SAME":
        lost = [(-(-n // stride) - 1) * stride + k - n for n, k in zip(x.shape, size, strict=False)]
        pads = [(max(n, 0) // 2, max(n, 0) - max(n, 0) // 2) for n in lost]
        x = np.pad(x, [*pads, *[(0, 0)] * (x.ndim - 2)])
    rows, columns = ((n - k) // stride + 1 for n, k in zip(x.shape, size, strict=False))
    # The tangent has one axis more than (H, W, C), which stays at the end.
    shape = (rows, columns, kernel.shape[-1], *x.shape[3:])
    out = np.zeros(shape, np.result_type(x, kernel))
    for i in range(rows):
        for j in range(columns):
            patch = x[i * stride : i * stride + size[0], j * stride : j * stride + size[1]]
            out[i, j] = np.tensordot(kernel, patch, axes=([0, 1, 2], [0, 1, 2]))
    return out


# --------------------------------------------------------------------------- any encoder


def jacobian(encode: Encode, arrays: Sequence[Array], x: Array) -> Array:
    """Compute the Jacobian of one sample, flattened to (code entries, features)."""
    return encode(arrays, Dual.seed(x)).tangent.reshape(-1, x.size)


def penalty(encode: Encode, arrays: Sequence[Array], xs: Array) -> Array:
    """Compute Σ_ij J_ij² of every sample."""
    # J² and not |J|²: the complex step needs a holomorphic function.
    return np.array([np.sum(jacobian(encode, arrays, x) ** 2) for x in xs])


def hessian(encode: Encode, arrays: Sequence[Array], x: Array) -> Array:
    """Compute all second derivatives of one sample: (code entries, features, features).

    A complex step of the sample through its Jacobian: as exact as the Jacobian itself.
    """
    columns = []
    for index in np.ndindex(x.shape):
        moved = np.asarray(x, np.complex128)
        moved[index] += 1j * STEP
        columns.append(jacobian(encode, arrays, moved).imag / STEP)
    return np.stack(columns, axis=-1)


def penalty_gradient(
    encode: Encode, arrays: Sequence[Array], xs: Array, weights: Array
) -> list[Array]:
    """Compute the gradient of Σ_b weights_b P(x_b) with respect to every array."""
    return gradient(lambda moved: np.sum(weights * penalty(encode, moved, xs)), arrays)


def gradient(function: Callable[[list[Array]], Any], arrays: Sequence[Array]) -> list[Array]:
    """Differentiate a scalar function of arrays by the complex step, entry by entry."""
    gradients = []
    for number, array in enumerate(arrays):
        result = np.zeros(array.shape)
        for index in np.ndindex(array.shape):
            moved = [np.asarray(a, np.complex128) for a in arrays]
            moved[number] = moved[number].copy()
            moved[number][index] += 1j * STEP
            result[index] = function(moved).imag / STEP
        gradients.append(result)
    return gradients


def black_box_jacobian(function: Callable[[Array], Array], x: Array) -> Array:
    """Differentiate a function that only takes real arrays: central differences, order six."""
    step = 1e-2
    columns = []
    for index in np.ndindex(x.shape):
        unit = np.zeros(x.shape)
        unit[index] = step
        first, second, third = (
            (function(x + n * unit) - function(x - n * unit)).ravel() for n in (1, 2, 3)
        )
        columns.append((45 * first - 9 * second + third) / (60 * step))
    return np.stack(columns, axis=-1)


# --------------------------------------------------------------------------- dense encoders


class Dense(NamedTuple):
    """One layer a = x W + b."""

    kernel: Array  # (in, out)
    bias: Array  # (out,)


def _layer_activations(depth: int, activation: str, latent: str) -> list[Activation]:
    return [ACTIVATIONS[activation]] * (depth - 1) + [ACTIVATIONS[latent]]


def mlp(layers: Sequence[Dense], x: Any, activation: str, latent: str = "identity") -> Any:
    """Apply dense layers to one sample, a Dual or an array."""
    names = [activation] * (len(layers) - 1) + [latent]
    for layer, name in zip(layers, names, strict=True):
        x = x @ layer.kernel + layer.bias
        x = x.elementwise(name) if isinstance(x, Dual) else ACTIVATIONS[name].function(x)
    return x


BLOCK = 16  # samples whose Jacobians are held at once


def mlp_penalty(
    layers: Sequence[Dense], xs: Array, activation: str, latent: str = "identity"
) -> tuple[Array, Array]:
    """Compute (codes, norms) by the chain of matrices J = D_L W_Lᵀ … D_1 W_1ᵀ."""
    acts = _layer_activations(len(layers), activation, latent)
    codes, norms = [], []
    for start in range(0, len(xs), BLOCK):
        z, chain = xs[start : start + BLOCK], None
        for layer, act in zip(layers, acts, strict=True):
            product = layer.kernel.T[None] if chain is None else layer.kernel.T @ chain
            pre = z @ layer.kernel + layer.bias
            z, chain = act.function(pre), act.slope(pre)[..., None] * product
        codes.append(z)
        norms.append(np.sum(chain**2, axis=(1, 2)))
    return np.concatenate(codes), np.concatenate(norms)


def mlp_penalty_gradient(
    layers: Sequence[Dense], xs: Array, weights: Array, activation: str, latent: str = "identity"
) -> list[Dense]:
    """Differentiate Σ_b weights_b P(x_b) by hand, with every Jacobian multiplied out."""
    acts = _layer_activations(len(layers), activation, latent)
    totals = [Dense(np.zeros_like(w), np.zeros_like(b)) for w, b in layers]
    for start in range(0, len(xs), BLOCK):
        zs, chains, pres, products = [xs[start : start + BLOCK]], [None], [], []
        for layer, act in zip(layers, acts, strict=True):
            chain = chains[-1]
            products.append(layer.kernel.T[None] if chain is None else layer.kernel.T @ chain)
            pres.append(zs[-1] @ layer.kernel + layer.bias)
            zs.append(act.function(pres[-1]))
            chains.append(act.slope(pres[-1])[..., None] * products[-1])
        # A trailing `bar` is the derivative of the result with respect to the name before it.
        chain_bar = 2 * weights[start : start + BLOCK, None, None] * chains[-1]
        z_bar = np.zeros_like(zs[-1])
        for i in reversed(range(len(layers))):
            slope, curvature = acts[i].slope(pres[i]), acts[i].curvature(pres[i])
            pre_bar = slope * z_bar + curvature * np.sum(chain_bar * products[i], axis=2)
            product_bar = slope[..., None] * chain_bar  # (block, out, features)
            if chains[i] is None:
                totals[i].kernel[...] += np.sum(product_bar, axis=0).T
            else:
                totals[i].kernel[...] += np.tensordot(chains[i], product_bar, ((0, 2), (0, 2)))
            totals[i].kernel[...] += zs[i].T @ pre_bar
            totals[i].bias[...] += np.sum(pre_bar, axis=0)
            z_bar = pre_bar @ layers[i].kernel.T
            if i > 0:
                chain_bar = layers[i].kernel @ product_bar
    return totals


# --------------------------------------------------------------------------- the whole loss


def squared_error(x: Array, x_hat: Array) -> Any:
    """Sum (x − x̂)² over the features of one sample."""
    return np.sum((x - x_hat) ** 2)


def bernoulli_cross_entropy(x: Array, logits: Array) -> Any:
    """Sum −x log σ(a) − (1 − x) log σ(−a) over the features of one sample."""
    return np.sum(x * _softplus(-logits) + (1 - x) * _softplus(logits))


def mlp_loss(
    encoder: Sequence[Dense],
    decoder: Sequence[Dense],
    xs: Array,
    activation: str,
    contraction: float,
    *,
    latent: str = "identity",
    output: str = "identity",
    reconstruction: Callable[[Array, Array], Any] = squared_error,
    mean_over_features: bool = False,
) -> Any:
    """Compute the mean over the batch of rec(x, x̂) + λ‖J(x)‖²_F."""
    total = 0
    for x in xs:
        code = mlp(encoder, Dual.seed(x), activation, latent)
        rec = reconstruction(x, mlp(decoder, code.value, activation, output))
        total += rec / (x.size if mean_over_features else 1)
        total += contraction * np.sum(code.tangent**2)
    return total / len(xs)


def random_layers(rng: np.random.Generator, sizes: Sequence[int]) -> list[Dense]:
    """Draw layers whose outputs are of order one, with biases that are not zero."""
    return [
        Dense(rng.normal(size=(m, n)) / np.sqrt(m), 0.5 * rng.normal(size=n))
        for m, n in pairwise(sizes)
    ]
