"""Estimators: unbiased in units of their standard error, exact where theory says so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcae
from jaxcae.jacobian.estimators import DISTRIBUTIONS, balanced_signs, draw_probes

DRAWS = 2000


def case(*sizes, batch=6, **options):
    """Make an encoder with slopes that vary from sample to sample, and data."""
    model = jaxcae.mlp(sizes, **options)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda a: jnp.float32(0.5 * rng.normal(size=a.shape)), shapes)
    return model.encode, params, jnp.float32(rng.normal(size=(batch, sizes[0])))


def norms_of(encode, *arguments, method="chain", **options):
    """Compute norms in one compiled call; many small eager ones would each compile."""
    return jax.jit(jaxcae.contractive_penalty(encode, method, **options))(*arguments)


def draws(function, seed=2):
    """Evaluate a function of a key at `DRAWS` keys in one compiled call."""
    keys = jax.random.split(jax.random.key(seed), DRAWS)
    return jax.jit(lambda keys: jax.lax.map(function, keys, batch_size=100))(keys)


def assert_unbiased(samples, truth):
    """Hold the mean over draws to the truth within five standard errors, entry by entry."""
    samples, truth = np.asarray(samples, np.float64), np.asarray(truth, np.float64)
    error = samples.std(0, ddof=1) / np.sqrt(len(samples))
    assert np.all(np.abs(samples.mean(0) - truth) <= 5 * error + 1e-5 * np.abs(truth).max())
    assert error.max() > 0  # it is random at all


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_probes_have_the_identity_for_second_moment(distribution):
    probes = draws(lambda key: draw_probes(key, jnp.ones((3, 1)), 2, 4, distribution)).reshape(
        -1, 4
    )
    assert_unbiased(probes[:, :, None] * probes[:, None, :], np.eye(4))


def test_orthonormal_probes_are_orthogonal_and_no_more_than_dimensions():
    probes = draw_probes(jax.random.key(0), jnp.ones((2, 1)), 3, 5, "orthonormal")
    inner = np.broadcast_to(5 * np.eye(3), (2, 3, 3))
    np.testing.assert_allclose(probes @ probes.mT, inner, atol=1e-5)
    with pytest.raises(ValueError, match="at most the code's size 5"):
        draw_probes(jax.random.key(0), jnp.ones((2, 1)), 6, 5, "orthonormal")


def assert_uniform(signs):
    """Hold all patterns of signs in a row to be as frequent as one another, by their χ²."""
    kinds = 1 << signs.shape[-1]
    counts = np.bincount((signs > 0) @ (1 << np.arange(signs.shape[-1])), minlength=kinds)
    expected = len(signs) / kinds
    chi_square = np.sum((counts - expected) ** 2) / expected
    assert abs(chi_square - (kinds - 1)) <= 5 * np.sqrt(2 * (kinds - 1))


@pytest.mark.parametrize("size", [1, 3, 8])
def test_signs_are_random_in_a_sample_and_balanced_over_a_batch(size):
    order = {1: 1, 3: 4, 8: 8}[size]
    probes = np.asarray(draws(lambda key: balanced_signs(key, 2 * order + 1, size)))
    assert (np.abs(probes) == 1).all()
    for group in (probes[:, :order], probes[:, order : 2 * order]):
        second = np.broadcast_to(order * np.eye(size), (DRAWS, size, size))
        np.testing.assert_array_equal(group.mT @ group, second)
    for b in (0, order - 1, 2 * order):
        assert_uniform(probes[:, b])
    assert_uniform(probes[:, 0] * probes[:, order])  # groups draw their signs apart


@pytest.mark.parametrize("samples", [4, 3])
def test_balanced_signs_leave_only_what_samples_do_not_share(samples):
    """The variance that the docstring states, of a whole group and of a part of one."""
    rng = np.random.default_rng(0)
    matrices = rng.normal(size=(1, 4, 4)) + 0.3 * rng.normal(size=(samples, 4, 4))
    matrices = (matrices + matrices.transpose(0, 2, 1)) * (1 - np.eye(4))
    probes = np.asarray(draws(lambda key: balanced_signs(key, samples, 4)), np.float64)
    sums = np.einsum("nbi,bij,nbj->n", probes, matrices, probes)
    shared = samples**2 / 4 * np.sum(matrices.mean(0) ** 2)
    variance = 2 * 4 / 3 * (np.sum(matrices**2) - shared)
    # The standard error of a variance is less than √(κ/n) of it, with κ the kurtosis.
    kurtosis = np.mean(sums**4) / np.mean(sums**2) ** 2
    assert abs(np.mean(sums**2) / variance - 1) < 5 * np.sqrt(kurtosis / DRAWS)
    assert variance < 0.5 * 2 * np.sum(matrices**2)


def test_probes_cancel_over_a_batch_what_its_samples_share():
    """A linear encoder: all Jacobians alike, so one probe a sample gives their mean exactly."""
    kernel = jnp.float32(np.random.default_rng(0).normal(size=(8, 5)))
    norms = norms_of(
        lambda w, x: x @ w, kernel, jnp.ones((16, 8)), jax.random.key(0), method="hutchinson"
    )
    assert np.std(norms) > 1
    np.testing.assert_allclose(np.mean(norms), np.sum(kernel**2), rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "options", "sizes"),
    [
        ("hutchinson", {"distribution": "rademacher"}, (8, 6, 4)),
        ("hutchinson", {"distribution": "sphere", "num_probes": 2}, (8, 6, 4)),
        ("control_variate", {}, (8, 7, 6, 5)),
        ("control_variate", {"num_probes": 2, "distribution": "orthonormal"}, (8, 7, 6, 5, 4)),
    ],
)
@pytest.mark.parametrize("activation", ["tanh", pytest.param("relu", marks=pytest.mark.slow)])
def test_values_and_gradients_are_unbiased(method, options, sizes, activation):
    encode, params, xs = case(*sizes, activation=activation, latent_activation="sigmoid")
    kernel = params["encoder"]["layer_0"]["kernel"]

    def total(kernel, norms, *key):
        layers = {**params["encoder"], "layer_0": {**params["encoder"]["layer_0"]}}
        layers["layer_0"]["kernel"] = kernel
        per_sample = norms({**params, "encoder": layers}, xs, *key)
        return per_sample.sum(), per_sample

    both = jax.grad(total, has_aux=True)
    estimate = jaxcae.contractive_penalty(encode, method, **options)
    gradient, values = jax.jit(lambda k: both(k, jaxcae.contractive_penalty(encode, "chain")))(
        kernel
    )
    gradients, estimates = draws(lambda key: both(kernel, estimate, key))
    assert_unbiased(estimates, values)
    assert_unbiased(gradients, gradient)


@pytest.mark.parametrize(
    ("method", "options", "sizes", "model"),
    [
        # A full orthonormal set of probes leaves nothing out.
        ("hutchinson", {"num_probes": 4, "distribution": "orthonormal"}, (8, 6, 4), {}),
        ("control_variate", {"num_probes": 4, "distribution": "orthonormal"}, (8, 6, 5, 4), {}),
        # One elementwise segment: no product of two deviations exists.
        ("control_variate", {}, (8, 6, 4), {}),
        ("control_variate", {}, (8, 6), {"latent_activation": "tanh"}),
        # Linear: nothing deviates.
        ("control_variate", {}, (8, 6, 5, 4), {"activation": "identity"}),
    ],
)
def test_estimators_that_have_nothing_left_to_estimate_are_exact(method, options, sizes, model):
    encode, params, xs = case(*sizes, **model)
    np.testing.assert_allclose(
        norms_of(encode, params, xs, jax.random.key(3), method=method, **options),
        norms_of(encode, params, xs),
        rtol=2e-5,
    )


def test_equal_slopes_leave_the_control_variate_no_noise():
    """All samples alike: the mean slopes are every sample's slopes."""
    encode, params, xs = case(8, 7, 6, 5, activation="tanh")
    xs = jnp.broadcast_to(xs[:1], xs.shape)
    estimate = norms_of(encode, params, xs, jax.random.key(0), method="control_variate")
    np.testing.assert_allclose(estimate, norms_of(encode, params, xs), rtol=2e-5)


def test_slopes_that_are_multiples_of_one_another_leave_the_control_variate_no_noise():
    """Slopes 2|a| of layers without biases: a sample times c scales them by c, c² and c⁴."""

    def encode(kernels, x):
        for kernel in kernels[:-1]:
            a = x @ kernel
            x = a * jnp.abs(a)
        return x @ kernels[-1]

    rng = np.random.default_rng(0)
    kernels = [jnp.float32(rng.normal(size=shape)) for shape in ((8, 7), (7, 6), (6, 5), (5, 4))]
    xs = jnp.float32(rng.normal(size=(1, 8))) * jnp.array([[0.2], [0.5], [1.0], [1.5]])
    exact = norms_of(encode, kernels, xs)
    estimate = norms_of(encode, kernels, xs, jax.random.key(0), method="control_variate")
    assert exact.max() > 1000 * exact.min()
    np.testing.assert_allclose(estimate, exact, rtol=1e-4)


def test_a_layer_that_is_off_for_the_whole_batch_leaves_zero_and_finite_gradients():
    encode, params, xs = case(8, 7, 6, 5, activation="relu")
    params["encoder"]["layer_1"]["bias"] -= 1e3
    penalty = jaxcae.contractive_penalty(encode, "control_variate")
    total = jax.jit(jax.value_and_grad(lambda p: penalty(p, xs, jax.random.key(0)).sum()))
    norm, gradient = total(params)
    assert norm == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


def test_the_control_variate_is_far_less_noisy_than_a_probe():
    model = jaxcae.mlp((48, 32, 24, 16), "softplus")
    params, xs = model.init(jax.random.key(0)), jax.random.uniform(jax.random.key(1), (16, 48))
    probe, anchored = (
        jaxcae.contractive_penalty(model.encode, m) for m in ("hutchinson", "control_variate")
    )
    one, other = draws(lambda key: (probe(params, xs, key), anchored(params, xs, key)))
    assert np.median(one.std(0) / other.std(0)) > 20


def test_the_control_variate_names_what_it_cannot_pass():
    with pytest.raises(ValueError, match=r"opaque part \(.*sort.*\).*hutchinson"):
        jaxcae.contractive_penalty(lambda p, x: jnp.sort(x), "control_variate")(
            (), jnp.ones((2, 3)), jax.random.key(0)
        )


@pytest.mark.parametrize("distribution", ["rademacher", "orthonormal"])
def test_the_standard_error_is_the_standard_deviation_of_the_mean(distribution):
    encode, params, xs = case(8, 6, 4)
    estimate = jaxcae.hutchinson_with_error(encode, 3, distribution)
    means, errors = draws(lambda key: estimate(params, xs, key))
    np.testing.assert_allclose(np.sqrt((errors**2).mean(0)), means.std(0), rtol=0.1)
    assert_unbiased(means, norms_of(encode, params, xs))


def test_a_full_orthonormal_set_has_no_standard_error():
    encode, params, xs = case(8, 6, 4)
    estimate = jax.jit(jaxcae.hutchinson_with_error(encode, 4, "orthonormal"))
    _, error = estimate(params, xs, jax.random.key(0))
    assert (error == 0).all()


@pytest.mark.usefixtures("x64")
def test_finite_differences_converge_to_second_order():
    encode, params, xs = case(5, 4, 3, activation="tanh")
    params, xs = jax.tree.map(lambda a: a.astype(jnp.float64), (params, xs))
    exact = norms_of(encode, params, xs)

    def error(step):
        norms = norms_of(encode, params, xs, method="finite_difference", step=step)
        return np.abs(norms - exact).max()

    steps = np.array([1e-1, 1e-2, 1e-3])
    slope = np.polyfit(np.log(steps), np.log([error(step) for step in steps]), 1)[0]
    assert slope == pytest.approx(2, abs=0.1)


def test_the_default_step_of_finite_differences_suits_the_dtype_and_large_inputs():
    encode, params, xs = case(5, 4, 3, activation="tanh")
    params["encoder"]["layer_0"]["kernel"] /= 40
    for scale in (1, 40):  # a fixed step of 1e-6 vanishes beside 40 in float32
        norms = norms_of(encode, params, scale * xs, method="finite_difference", chunk_size=2)
        np.testing.assert_allclose(norms, norms_of(encode, params, scale * xs), rtol=2e-3)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("hutchison", {}, "Did you mean 'hutchinson'"),
        ("chain", {"num_probes": 2}, "method 'chain' takes chunk_size; got 'num_probes'"),
        ("auto", {"chunk_size": 2}, "takes gradient, memory_budget"),
        ("reverse", {"chunk_size": 0}, "positive int, got 0"),
        ("hutchinson", {"num_probes": True}, "positive int, got True"),
        ("hutchinson", {"distribution": "gaussian"}, "unknown distribution 'gaussian'"),
        ("finite_difference", {"step": 0.0}, "above 0"),
    ],
)
def test_unusable_options_are_refused_when_the_penalty_is_made(method, options, message):
    with pytest.raises(ValueError, match=message):
        jaxcae.contractive_penalty(lambda p, x: x, method, **options)


def test_a_missing_key_and_a_missing_batch_axis_are_refused():
    with pytest.raises(ValueError, match=r"call it with a key"):
        jaxcae.contractive_penalty(lambda p, x: x, "hutchinson")((), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"Use xs\[None\] for one sample"):
        jaxcae.contractive_penalty(lambda p, x: x)((), jnp.ones(3))


GRAPHS = {
    "residual": (
        lambda p, x: residual(residual(x @ p[0], p[1:3]), p[3:5]) @ p[5],
        [(6, 5), (5, 7), (7, 5), (5, 7), (7, 5), (5, 3)],
    ),
    "residual after a layer": (
        lambda p, x: residual(residual(jnp.tanh(x @ p[0]), p[1:3]), p[3:5]) @ p[5],
        [(6, 5), (5, 7), (7, 5), (5, 7), (7, 5), (5, 3)],
    ),
    "gated": (
        lambda p, x: gated(gated(x, p[:2]), p[2:4]) @ p[4],
        [(6, 5), (6, 5), (5, 4), (5, 4), (4, 3)],
    ),
    "dense connections": (
        lambda p, x: widened(widened(x, p[0]), p[1]) @ p[2],
        [(6, 5), (11, 4), (15, 3)],
    ),
}


def residual(h, weights):
    return h + jnp.tanh(h @ weights[0]) @ weights[1]


def gated(h, weights):
    return (h @ weights[0]) * jax.nn.sigmoid(h @ weights[1])


def widened(h, weights):
    return jnp.concatenate([h, jnp.tanh(h @ weights)])


@pytest.mark.slow
@pytest.mark.parametrize("name", GRAPHS)
def test_control_variates_of_graphs_are_exact_with_all_probes_and_quiet_with_one(name, x64):
    """Orthonormal probes as many as code units leave no noise: then any anchor must cancel out."""
    encode, shapes = GRAPHS[name]
    keys = jax.random.split(jax.random.key(0), len(shapes) + 1)
    params = [jax.random.normal(k, s) / s[0] ** 0.5 for k, s in zip(keys, shapes, strict=False)]
    xs = jax.random.normal(keys[-1], (5, 6))

    def values(method, key=None, **options):
        penalty = jaxcae.contractive_penalty(encode, method, **options)
        return lambda p: penalty(p, xs, key)

    def both(norms):
        return jax.jit(lambda p: (norms(p), jax.grad(lambda p: jnp.sum(norms(p)))(p)))(params)

    expected = both(values("reverse"))
    whole = jaxcae.ControlVariate(num_probes=3, distribution="orthonormal")
    found = both(values(whole, jax.random.key(1)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)
    noise = {
        method: jnp.std(
            jax.jit(jax.vmap(lambda key, m=method: values(m, key)(params)))(
                jax.random.split(jax.random.key(2), 20)
            )
            / expected[0][None],
            0,
        ).mean()
        for method in ("control_variate", "hutchinson")
    }
    assert noise["control_variate"] < noise["hutchinson"] / 4
