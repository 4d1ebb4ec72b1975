"""The reference is held to itself: two roads, and differences of each."""

import numpy as np
import pytest

from tests import reference as ref
from tests.tolerances import assert_close, assert_each_close

SMOOTH = sorted(set(ref.ACTIVATIONS) - {"relu", "elu"})


@pytest.mark.parametrize("name", sorted(ref.ACTIVATIONS))
def test_slope_and_curvature_are_derivatives(name):
    """A complex step of the function gives its slope, one of the slope its curvature."""
    function, slope, curvature = ref.ACTIVATIONS[name]
    a = np.array([-30.0, -3.1, -1.0, -0.2, 0.3, 0.9, 2.7, 30.0])
    moved = a + 1j * ref.STEP
    assert_each_close(function(moved).imag / ref.STEP, slope(a), "float64", "slope")
    assert_close(np.imag(slope(moved)) / ref.STEP, curvature(a), "float64", "curvature")


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("sizes", [(5, 3), (5, 4, 3), (3, 4, 5, 2)])
def test_the_two_roads_agree(rng, name, sizes):
    """Dual numbers with a complex step equal the chain of matrices differentiated by hand."""
    layers, xs, weights = ref.random_layers(rng, sizes), rng.normal(size=(3, sizes[0])), [1, -2, 3]
    arrays = [array for layer in layers for array in layer]

    def encode(arrays, x):
        pairs = [ref.Dense(*arrays[i : i + 2]) for i in range(0, len(arrays), 2)]
        return ref.mlp(pairs, x, name, "tanh")

    codes, norms = ref.mlp_penalty(layers, xs, name, "tanh")
    assert_close(codes, [ref.mlp(layers, x, name, "tanh") for x in xs], "float64")
    assert_each_close(ref.penalty(encode, arrays, xs), norms, "float64")
    by_hand = ref.mlp_penalty_gradient(layers, xs, np.array(weights), name, "tanh")
    by_step = ref.penalty_gradient(encode, arrays, xs, np.array(weights))
    for got, want in zip((a for layer in by_hand for a in layer), by_step, strict=True):
        assert_close(got, want, "float64")


def test_dual_operations_have_the_derivatives_of_what_they_compute(rng):
    """Differences of the plain NumPy function agree with the dual numbers."""
    w, x = rng.normal(size=(4, 4)), rng.normal(size=4)

    def convolved(a):
        return ref.convolve(a.reshape(2, 2, 1), w.reshape(2, 2, 1, 4), 1)

    operations = {
        "affine": lambda a: w @ (a @ w + 1.0) - a / 2,
        "product": lambda a: a * a[::-1] * w[0] - (3.0 - a) * a.sum(),
        "power": lambda a: (a * a + 1.0) ** -0.5 / (a * a + 2.0),
        "sums": lambda a: a.reshape(2, 2).sum(axis=0, keepdims=True) + a.reshape(2, 2),
        "convolution": convolved,
        "strided": lambda a: ref.convolve(a.reshape(4, 1, 1), w[:3].reshape(3, 1, 1, 4), 2),
    }
    for name, operation in operations.items():
        got = operation(ref.Dual.seed(x))
        assert_close(got.value, operation(x), "float64", name)
        want = ref.black_box_jacobian(operation, x)
        assert_close(got.tangent.reshape(want.shape), want, "differences", name)
    got = ref.concatenate([ref.exp(ref.Dual.seed(x)), ref.Dual.seed(x)])
    assert_close(got.tangent, np.concatenate([np.diag(np.exp(x)), np.eye(4)]), "float64")


def test_loss_of_a_known_case():
    """One unit, one sample, all by hand: x=2, z=3·2+1=7, x̂=7·0.5=3.5, J=3."""
    encoder = [ref.Dense(np.array([[3.0]]), np.array([1.0]))]
    decoder = [ref.Dense(np.array([[0.5]]), np.array([0.0]))]
    got = ref.mlp_loss(encoder, decoder, np.array([[2.0]]), "tanh", contraction=0.1)
    assert got == pytest.approx(1.5**2 + 0.1 * 9, rel=1e-15)
