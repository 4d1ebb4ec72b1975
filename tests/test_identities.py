"""What must hold for every exact method, whatever the numbers: identities, by hypothesis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcae
from jaxcae import penalty as penalty_module
from tests.encoders import randomised
from tests.tolerances import assert_close, assert_each_close

pytestmark = pytest.mark.usefixtures("x64")

D, H, K, B = 6, 5, 4, 3  # few shapes: each one compiles

over_methods = pytest.mark.parametrize("method", penalty_module.EXACT_METHODS)
# Seeds rather than arrays: numbers of order one, which the identities hold for to 1e-12.
seeds = st.integers(0, 2**32 - 1)
scales = st.floats(-8, 8).filter(lambda c: abs(c) > 1e-3)


def encode(params, x):
    """Two layers and then a matrix on the code, the identity unless a test says otherwise."""
    (w1, b1, w2, b2), code = params
    return (jnp.tanh(x @ w1 + b1) @ w2 + b2) @ code


_jitted = {
    method: jax.jit(jaxcae.contractive_penalty(encode, method))
    for method in penalty_module.EXACT_METHODS
}


def _draw(seed):
    rng = np.random.default_rng(seed)
    shapes = [(D, H), (H,), (H, K), (K,)]
    weights = randomised([np.zeros(shape) for shape in shapes], seed)
    return rng, [jnp.asarray(a) for a in weights], jnp.asarray(rng.normal(size=(B, D)))


def _norms(method, weights, xs, code=None):
    return _jitted[method]((weights, jnp.eye(K) if code is None else jnp.asarray(code)), xs)


@over_methods
@given(seed=seeds)
def test_linear_encoder_gives_the_norm_of_its_matrix(method, seed):
    """P(x) = ‖W‖²_F at every x, and its gradient is 2W."""
    rng = np.random.default_rng(seed)
    w, xs = jnp.asarray(rng.normal(size=(D, K))), jnp.asarray(rng.normal(size=(B, D)))
    norms, gradient = _linear[method](w, xs)
    assert_each_close(norms, np.full(B, np.sum(np.square(w))), "float64")
    assert_close(gradient, 2 * B * w, "float64")


def _of_linear(method):
    penalty = jaxcae.contractive_penalty(lambda w, x: x @ w, method)

    def both(w, xs):
        gradient = jax.grad(lambda w: jnp.sum(penalty(w, xs)))(w)
        return penalty(w, xs), gradient

    return jax.jit(both)


_linear = {method: _of_linear(method) for method in penalty_module.EXACT_METHODS}


@over_methods
@given(seed=seeds)
def test_rotating_the_code_changes_nothing(method, seed):
    """‖QJ‖_F = ‖J‖_F for an orthogonal Q."""
    rng, weights, xs = _draw(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(K, K)))
    turned = _norms(method, weights, xs, rotation)
    assert_each_close(turned, _norms(method, weights, xs), "float64")


@over_methods
@given(seed=seeds, c=scales)
def test_scaling_the_code_scales_by_the_square(method, seed, c):
    """‖cJ‖²_F = c²‖J‖²_F."""
    _, weights, xs = _draw(seed)
    scaled = _norms(method, weights, xs, c * np.eye(K))
    assert_each_close(scaled, c**2 * _norms(method, weights, xs), "float64")


@over_methods
@given(seed=seeds, c=st.floats(-100, 100))
def test_shifting_the_code_changes_nothing(method, seed, c):
    """A constant has no derivative."""
    _, (w1, b1, w2, b2), xs = _draw(seed)
    shifted = _norms(method, [w1, b1, w2, b2 + c], xs)
    assert_each_close(shifted, _norms(method, [w1, b1, w2, b2], xs), "float64")


@over_methods
@given(seed=seeds)
def test_a_sample_does_not_see_its_batch(method, seed):
    """Each norm is the sample's own: alone, and in any order."""
    rng, weights, xs = _draw(seed)
    norms = _norms(method, weights, xs)
    alone = jnp.concatenate([_norms(method, weights, x[None]) for x in xs])
    assert_each_close(alone, norms, "float64")
    order = rng.permutation(B)
    assert_each_close(_norms(method, weights, xs[order]), norms[order], "float64")


@over_methods
@given(seed=seeds)
def test_permuting_the_features_changes_nothing(method, seed):
    """Columns of J move with the features."""
    rng, (w1, *rest), xs = _draw(seed)
    order = rng.permutation(D)
    permuted = _norms(method, [w1[order], *rest], xs[:, order])
    assert_each_close(permuted, _norms(method, [w1, *rest], xs), "float64")


# Larger inputs saturate tanh, whose derivative in JAX, 1 − tanh², then has no digits to compare;
# and the square of a tiny c underflows.
@over_methods
@given(seed=seeds, c=st.floats(-2, 2).filter(lambda c: c == 0 or abs(c) > 1e-3))
def test_scaling_the_input_is_the_chain_rule(method, seed, c):
    """X ↦ h(cx) has the Jacobian cJ(cx)."""
    _, (w1, *rest), xs = _draw(seed)
    scaled = _norms(method, [c * w1, *rest], xs)
    assert_each_close(scaled, c**2 * _norms(method, [w1, *rest], c * xs), "float64")


@settings(max_examples=5)  # λ is static, so every example is a function of its own
@given(seed=seeds, c=st.floats(0, 10))
def test_the_loss_is_linear_in_lambda(seed, c):
    """L(λ) = L(0) + λ mean P, for any λ."""
    _, _, xs = _draw(seed)
    params = jax.tree.map(jnp.asarray, randomised(_MODEL_PARAMS, seed))
    _, plain = jaxcae.cae_loss(_MODEL, 0.0)(params, xs)
    value, _ = jaxcae.cae_loss(_MODEL, c)(params, xs)
    assert_each_close(value, plain["loss"] + c * plain["contraction"], "float64")


_MODEL = jaxcae.mlp((D, H, K), "softplus")
_MODEL_PARAMS = jax.eval_shape(_MODEL.init, jax.random.key(0))
