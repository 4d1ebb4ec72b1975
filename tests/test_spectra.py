"""Tangents and spectra by an explicit Jacobian, and the recipes that are made of the family."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcae
from benchmarks.examples import moved_along, walk
from jaxcae.results.analysis import singular_values, tangents

KEY = jax.random.key(0)
RNG = np.random.default_rng(2)
MATRICES = [RNG.normal(size=size) for size in ((12, 5), (5, 4), (12, 20), (20, 4), (5, 9))]
ENCODERS = {
    "narrowing": lambda p, x: jnp.tanh(x.reshape(-1) @ p[0]) @ p[1],
    "wide": lambda p, x: jnp.tanh(x.reshape(-1) @ p[2]) @ p[3],
    "of less rank than its code": lambda p, x: jnp.tanh(x.reshape(-1) @ p[0]) @ p[4],
    "branches": lambda p, x: jnp.concatenate(
        [jnp.tanh(x.reshape(-1) @ p[0]), jnp.sin(x.reshape(-1) @ p[0] @ p[1])]
    ),
    "opaque": lambda p, x: jnp.sort(x.reshape(-1) @ p[0]) @ p[1],
    "linear": lambda p, x: x.reshape(-1) @ p[0] @ p[1],
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name",
    [
        n if n in ("narrowing", "opaque") else pytest.param(n, marks=pytest.mark.slow)
        for n in ENCODERS
    ],
)
def test_tangents_are_the_right_singular_vectors(name):
    encode, params = ENCODERS[name], list(map(jnp.asarray, MATRICES))
    xs = jnp.asarray(RNG.normal(size=(3, 4, 3)))
    jacobians = jax.vmap(jax.jacrev(partial(encode, params)))(xs).reshape(3, -1, 12)
    want = np.linalg.svd(jacobians, compute_uv=False)
    np.testing.assert_allclose(jax.jit(singular_values(encode))(params, xs), want, atol=1e-12)
    values, directions = jax.jit(tangents(encode, 3))(params, xs)
    assert directions.shape == (3, 3, 4, 3)
    np.testing.assert_allclose(values, want[:, :3], rtol=1e-12)
    flat = np.asarray(directions).reshape(3, 3, 12)
    np.testing.assert_allclose(flat @ flat.transpose(0, 2, 1), np.eye(3) + np.zeros((3, 1, 1)),
                               atol=1e-12)  # fmt: skip
    images = np.einsum("bkd,brd->brk", jacobians, flat)
    np.testing.assert_allclose(np.linalg.norm(images, axis=2), values, rtol=1e-10)


def test_more_tangents_than_directions_are_refused():
    params, xs = [jnp.float32(m) for m in MATRICES], jnp.ones((2, 4, 3))
    with pytest.raises(ValueError, match=r"rank must be at most 4, min\(d, k\), got 5"):
        tangents(ENCODERS["narrowing"], 5)(params, xs)
    with pytest.raises(ValueError, match="rank must be a positive int"):
        tangents(ENCODERS["narrowing"], 0)


def test_the_manifold_tangent_classifier():
    """The NeurIPS 2011 recipe: a classifier that changes little along the encoder's tangents."""
    params, xs = [jnp.float32(m) for m in MATRICES], jnp.float32(RNG.normal(size=(6, 4, 3)))
    encode = ENCODERS["narrowing"]
    _, directions = jax.jit(tangents(encode, 2))(params, xs)

    moved = partial(moved_along, lambda readout, x: encode(params, x) @ readout)

    def loss(readout, weight):
        logits = jax.vmap(partial(encode, params))(xs) @ readout
        error = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(6) % 3)
        return jnp.mean(error + weight * jax.vmap(moved, (None, 0, 0))(readout, xs, directions))

    def trained(weight):
        step = lambda _, w: w - 0.05 * jax.grad(loss)(w, weight)  # noqa: E731
        return jax.lax.fori_loop(0, 40, step, jnp.zeros((4, 3)))

    along = lambda w: jnp.mean(jax.vmap(moved, (None, 0, 0))(w, xs, directions))  # noqa: E731
    plain, tangent = jax.jit(lambda: [along(trained(weight)) for weight in (0.0, 0.3)])()
    assert tangent < 0.5 * plain


def test_the_sampler_steps_along_the_tangents():
    """The ICML 2012 sampler, h + J Jᵀε: one vector-Jacobian product and one Jacobian-vector one."""
    params, x = [jnp.float32(m) for m in MATRICES], jnp.float32(RNG.normal(size=(4, 3)))
    encode = partial(ENCODERS["narrowing"], params)
    decode = lambda params, z: jnp.tile(z[:, None], 3)  # noqa: E731
    model = jaxcae.Autoencoder(lambda key: params, ENCODERS["narrowing"], decode)
    (moved,) = walk(model, params, x, KEY, 1, 0.3)
    epsilon = 0.3 * jax.random.normal(jax.random.split(KEY, 1)[0], (4,))
    jacobian = jax.jacrev(encode)(x).reshape(4, 12)
    want = encode(x) + jacobian @ (jacobian.T @ epsilon)
    np.testing.assert_allclose(moved[:, 0], jax.nn.sigmoid(want), rtol=2e-4, atol=1e-6)


@pytest.mark.slow
def test_exact_score_matching_finds_a_known_score():
    """E[½‖ψ‖² + div ψ] over a correlated Gaussian, whose score is −Σ⁻¹x."""
    root = np.array([[1.0, 0.3], [0.0, 0.7]])
    draw = lambda key, n: jax.random.normal(key, (n, 2)) @ jnp.float32(root)  # noqa: E731
    model = jaxcae.mlp((2, 32, 16), "tanh")
    scale = 0.5  # σ² of ψ = (r(x) − x)/σ²
    both = jaxcae.value_and_trace(lambda p, x: model.decode(p, model.encode(p, x)))

    def loss(params, xs):
        values, traces = both(params, xs)
        return jnp.mean(0.5 * jnp.sum((values - xs) ** 2, 1) / scale**2 + (traces - 2) / scale)

    optimizer = optax.adam(3e-3)

    def step(carry, key):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, draw(key, 256)), state)
        return (optax.apply_updates(params, updates), state), None

    def error(params):
        xs = draw(jax.random.key(9), 2000)
        score = -xs @ jnp.float32(np.linalg.inv(root.T @ root))
        psi = (both(params, xs)[0] - xs) / scale
        return jnp.mean(jnp.sum((psi - score) ** 2, 1)) / jnp.mean(jnp.sum(score**2, 1))

    @jax.jit
    def errors(key):
        params = model.init(KEY)
        trained, _ = jax.lax.scan(
            step, (params, optimizer.init(params)), jax.random.split(key, 1000)
        )
        return error(params), error(trained[0])

    before, after = errors(KEY)
    assert after < 0.1 < before
