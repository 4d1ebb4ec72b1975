"""The objective: by hand, against the reference, every option, corruption, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcae
from tests import reference as ref
from tests.encoders import randomised
from tests.tolerances import assert_close, assert_each_close

SIZES = (5, 4, 3)


@pytest.fixture
def case(rng, x64):
    """Give a model with its float64 parameters, in JAX and as NumPy layers, and samples."""
    model = jaxcae.mlp(SIZES, "tanh", latent_activation="sigmoid")
    tree = randomised(model.init(jax.random.key(0)))
    xs = rng.uniform(size=(4, 5))
    return model, jax.tree.map(jnp.asarray, tree), jnp.asarray(xs)


def _groups(leaves):
    layers = [ref.Dense(leaves[i + 1], leaves[i]) for i in range(0, len(leaves), 2)]
    return layers[2:], layers[:2]  # leaves come in the order of names: decoder, then encoder


@pytest.mark.parametrize("reconstruction", ["squared_error", "bernoulli"])
@pytest.mark.parametrize("features", ["sum", "mean"])
@pytest.mark.parametrize("method", ["auto", "reverse"])
def test_value_and_gradient_against_the_reference(case, reconstruction, features, method):
    """The whole loss of a network with every part in use, decoder gradients included."""
    model, params, xs = case
    loss = jaxcae.cae_loss(
        model, 0.3, method=method, reconstruction=reconstruction, features=features
    )
    (value, metrics), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, xs)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    rec = {"squared_error": ref.squared_error, "bernoulli": ref.bernoulli_cross_entropy}

    def truth(leaves, contraction=0.3):
        return ref.mlp_loss(
            *_groups(leaves),
            np.asarray(xs),
            "tanh",
            contraction,
            latent="sigmoid",
            reconstruction=rec[reconstruction],
            mean_over_features=features == "mean",
        )

    assert value.shape == ()
    assert_each_close(value, truth(leaves), "float64")
    assert_each_close(metrics["loss"], truth(leaves), "float64")
    assert_each_close(metrics["reconstruction"], truth(leaves, 0.0), "float64")
    norms = (truth(leaves) - truth(leaves, 0.0)) / 0.3
    assert_close(metrics["contraction"], norms, "float64")
    for got, want in zip(jax.tree.leaves(gradients), ref.gradient(truth, leaves), strict=True):
        assert_close(got, want, "float64")


def test_by_hand(x64):
    """X = (1, 2): z = 3·1 + 1·2 + 1 = 6, x̂ = (3, 0) + 1, ‖J‖² = 10, kernels 3, 1 and ½, 0."""
    model = jaxcae.mlp((2, 1), output="identity")
    params = {
        "encoder": {"layer_0": {"kernel": jnp.asarray([[3.0], [1.0]]), "bias": jnp.ones(1)}},
        "decoder": {"layer_0": {"kernel": jnp.asarray([[0.5, 0.0]]), "bias": jnp.ones(2)}},
    }
    xs = jnp.asarray([[1.0, 2.0]])
    value, metrics = jaxcae.cae_loss(model, 0.1, l1=2.0, l2=4.0)(params, xs)
    want = {"reconstruction": 10.0, "contraction": 10.0, "l1": 4.5, "l2": 10.25}
    assert {name: float(metrics[name]) for name in want} == want
    assert float(value) == float(metrics["loss"]) == pytest.approx(10 + 1 + 9 + 41, rel=1e-15)


def test_plain_and_measured_autoencoders(case):
    """None computes no norms; 0.0 measures them, and both have the gradient of a plain one."""
    model, params, xs = case
    plain = jax.grad(jaxcae.cae_loss(model, None), has_aux=True)
    measured = jax.grad(jaxcae.cae_loss(model, 0.0), has_aux=True)
    (gradient, metrics), (same, more) = plain(params, xs), measured(params, xs)
    assert set(metrics) == {"loss", "reconstruction"}
    norms = jaxcae.contractive_penalty(model.encode)(params, xs)
    assert_each_close(more["contraction"], jnp.mean(norms), "float64")
    jax.tree.map(lambda a, b: assert_close(a, b, "float64"), gradient, same)


def test_loss_does_not_depend_on_how_samples_are_batched(case):
    """The loss of a batch is the mean of its samples' losses."""
    model, params, xs = case
    loss = jaxcae.cae_loss(model, 0.3)
    alone = [loss(params, x[None])[0] for x in xs]
    assert_each_close(loss(params, xs)[0], np.mean(alone), "float64")


def test_method_options_reach_the_penalty(case):
    """chunk_size is passed on, and checked when the loss is made."""
    model, params, xs = case
    want, _ = jaxcae.cae_loss(model, 0.3)(params, xs)
    got, _ = jaxcae.cae_loss(model, 0.3, method="reverse", chunk_size=2)(params, xs)
    assert_each_close(got, want, "float64")
    with pytest.raises(ValueError, match="chunk_size must be a positive int, got 0"):
        jaxcae.cae_loss(model, 0.3, method="reverse", chunk_size=0)


# --------------------------------------------------------------------------- corruption


class _Probe:
    """An identity autoencoder that shows what its encoder was given."""

    model = jaxcae.Autoencoder(lambda key: {}, lambda params, x: x, lambda params, z: z)


@pytest.mark.parametrize("corruption", ["gaussian", "masking"])
def test_corruption_is_drawn_from_the_key_alone(rng, corruption):
    """One key, one corruption; another key, another; without noise the key does nothing."""
    xs = jnp.asarray(rng.uniform(0.5, 1.0, size=(8, 16)), jnp.float32)
    loss = jaxcae.cae_loss(_Probe.model, None, corruption=corruption, noise_scale=0.3)
    one, again, other = (loss({}, xs, jax.random.key(seed))[0] for seed in (0, 0, 1))
    assert float(one) == float(again) != float(other)
    clean = jaxcae.cae_loss(_Probe.model, None, corruption=corruption)
    assert float(clean({}, xs, jax.random.key(0))[0]) == float(clean({}, xs)[0]) == 0.0


def test_noise_may_be_traced():
    """One program for a whole sweep of the scale."""
    xs, key = jnp.ones((2, 3)), jax.random.key(0)
    value = lambda scale: jaxcae.cae_loss(_Probe.model, None, noise_scale=scale)({}, xs, key)[0]  # noqa: E731
    np.testing.assert_allclose(jax.jit(value)(0.3), value(0.3), rtol=1e-6)


def test_gaussian_corruption_has_the_stated_scale():
    """The identity's reconstruction error is the noise: σ²d, here 0.25·64, over 4,096 samples."""
    xs = jnp.zeros((4096, 64))
    loss = jaxcae.cae_loss(_Probe.model, None, noise_scale=0.5)
    error = float(loss({}, xs, jax.random.key(0))[0])
    # Each sample's Σε² has mean σ²d and variance 2σ⁴d.
    assert abs(error - 16) < 5 * np.sqrt(2 * 0.5**4 * 64 / 4096)


def test_masking_sets_the_stated_share_to_zero():
    """On samples of ones the reconstruction error counts the masked features."""
    xs = jnp.ones((4096, 64))
    loss = jaxcae.cae_loss(_Probe.model, None, corruption="masking", noise_scale=0.25)
    masked = float(loss({}, xs, jax.random.key(0))[0])
    assert abs(masked - 16) < 5 * np.sqrt(64 * 0.25 * 0.75 / 4096)


def test_norms_are_taken_at_the_corrupted_sample_and_error_against_the_clean_one():
    """With everything masked the encoder sees 0, while the target stays x."""
    model = jaxcae.Autoencoder(lambda key: {}, lambda params, x: x**3, lambda params, z: z)
    xs = jnp.full((3, 4), 2.0)
    loss = jaxcae.cae_loss(model, 1.0, corruption="masking", noise_scale=1.0)
    _, metrics = loss({}, xs, jax.random.key(0))
    assert float(metrics["contraction"]) == 0.0  # (3x²)² at 0; it is 4·144 at 2
    assert float(metrics["reconstruction"]) == 16.0


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contraction": -1.0}, "contraction must be finite and at least 0, got -1.0"),
        ({"contraction": float("nan")}, "contraction must be finite"),
        ({"contraction": float("inf")}, "contraction must be finite"),
        ({"l1": -1.0}, "l1 must be finite"),
        ({"l2": float("nan")}, "l2 must be finite"),
        ({"noise_scale": -0.1}, "noise_scale must be finite"),
        ({"corruption": "salt"}, "unknown corruption 'salt'; choose from gaussian, masking"),
        ({"corruption": "masking", "noise_scale": 1.5}, "noise_scale is a probability"),
        ({"reconstruction": "mse"}, "unknown reconstruction loss 'mse'"),
        ({"features": "max"}, "unknown reduction"),
        ({"method": "exactly"}, "unknown method 'exactly'"),
    ],
)
def test_unusable_options_are_refused_when_the_loss_is_made(untyped, options, message):
    """A negative λ would train towards expansion, and nothing would say so."""
    with pytest.raises(ValueError, match=message):
        jaxcae.cae_loss(jaxcae.mlp((2, 1)), **options)


def test_noise_without_a_key_is_refused():
    """Rather than drawing the same noise at every step."""
    loss = jaxcae.cae_loss(_Probe.model, None, noise_scale=0.1)
    with pytest.raises(ValueError, match=r"call loss\(params, xs, key\)"):
        loss({}, jnp.ones((2, 3)))
