"""Metrics, traces, differences and terms of the Jacobian, by the reference and by known answers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcae
from jaxcae.objective import decoder_term, noise_curvature_term, reconstruction_map_term
from jaxcae.penalty import METHODS
from tests import reference as ref
from tests.encoders import all_encoders
from tests.some import some
from tests.test_curvature import KEY, MATRICES, branches, gate, mlp
from tests.tolerances import assert_close, assert_each_close

RNG = np.random.default_rng(5)
METRICS = {"diagonal": RNG.normal(size=5), "wide": RNG.normal(size=(2, 5)),
           "tall": RNG.normal(size=(7, 5))}  # fmt: skip
EXACT = ("auto", "chain", "forward", "reverse")


def jacobians(encode, params, xs):
    """Compute the Jacobians of a batch by JAX alone, codes and samples in a row."""
    found = jax.vmap(jax.jacfwd(partial(encode, params)))(xs)
    return found.reshape(len(xs), -1, xs[0].size)


def measured(metric):
    return np.diag(metric) if metric.ndim == 1 else metric


# --------------------------------------------------------------------------- metrics


ENCODERS = {
    "two layers": (5, 4, 3),
    "code activation": (5, 4, 3, "sigmoid"),
    "one layer": (5, 3, "sigmoid"),
    "gate": gate,
    "branches": branches,
    "opaque": lambda p, x: jnp.sort(x @ p[0]) @ p[2],
    "normalised": lambda p, x: x / jnp.sqrt(jnp.sum(x * x)) @ p[0],
    "the sample itself": lambda p, x: x,
}
MORE = {
    "normalised layer": lambda p, x: jnp.tanh(x / jnp.sqrt(jnp.sum(x * x)) @ p[0]) @ p[2],
}


def encoder(name):
    found = (ENCODERS | MORE)[name]
    if callable(found):
        return found, list(map(jnp.asarray, MATRICES)), mlp(5, 4)[2]
    *sizes, latent = (*found, "identity") if isinstance(found[-1], int) else found
    model, params, xs = mlp(*sizes, latent_activation=latent)
    return model.encode, params, xs


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", some(ENCODERS, ("two layers", "opaque")))
def test_a_metric_is_in_every_exact_method(name):
    encode, params, xs = encoder(name)
    jacobian = jacobians(encode, params, xs)
    made = {
        (kind, method): jaxcae.contractive_penalty(encode, method, input_metric=metric)
        for kind, metric in METRICS.items()
        for method in EXACT
    }
    weights = jnp.arange(1.0, 4)

    @jax.jit
    def every(params):
        return {
            case: (norms(params, xs), jax.grad(lambda p, f=norms: f(p, xs) @ weights)(params))
            for case, norms in made.items()
        }

    got = every(params)
    for kind, metric in METRICS.items():
        want = np.sum((jacobian @ measured(metric).T) ** 2, (1, 2))
        for method in EXACT:
            assert_each_close(got[kind, method][0], want, "float64", f"{kind}, {method}")
            for a, b in zip(
                jax.tree.leaves(got[kind, method][1]),
                jax.tree.leaves(got[kind, "reverse"][1]),
                strict=True,
            ):
                assert_close(np.append(a, 1.0), np.append(b, 1.0), "float64")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", some(METRICS, ("wide",)))
def test_a_metric_is_in_every_estimator_and_order(kind):
    model, params, xs = mlp(5, 4, 3, latent_activation="sigmoid")
    metric = METRICS[kind]
    jacobian = jacobians(model.encode, params, xs)
    want = np.sum((jacobian @ measured(metric).T) ** 2, (1, 2))
    keys = jax.random.split(KEY, 2000)
    for method in set(METHODS).difference(EXACT):
        penalty = jaxcae.contractive_penalty(model.encode, method, input_metric=metric)
        draws = jax.jit(jax.vmap(penalty, (None, None, 0)))(params, xs, keys)
        error = np.std(draws, 0) / np.sqrt(len(keys))
        assert np.all(np.abs(draws.mean(0) - want) <= 5 * error + 1e-7 * want), method
    second = jax.vmap(jax.hessian(partial(model.encode, params)))(xs)
    f = measured(metric)
    want = np.sum(np.einsum("bkij,ri,sj->bkrs", second, f, f) ** 2, (1, 2, 3))
    of_order_two = partial(jaxcae.contractive_penalty, model.encode, order=2, input_metric=metric)
    assert_each_close(jax.jit(of_order_two())(params, xs), want, "float64")
    probes = jax.vmap(of_order_two("hutchinson"), (None, None, 0))
    draws = jax.jit(probes)(params, xs, keys)
    error = np.std(draws, 0) / np.sqrt(len(keys))
    assert np.all(np.abs(draws.mean(0) - want) <= 5 * error)


def test_a_metric_that_does_not_fit_is_refused():
    model, params, xs = mlp(5, 4, 3, dtype=jnp.float32)
    for metric in (np.ones(4), np.ones((5, 4)), np.ones((2, 2, 5)), np.ones((0, 5)), 2.0):
        with pytest.raises(ValueError, match=r"input_metric must have shape \(r, 5\), or \(5,\)"):
            jaxcae.contractive_penalty(model.encode, input_metric=np.float32(metric))(params, xs)
    with pytest.raises(TypeError, match="input_metric must be floating point, got int"):
        jaxcae.contractive_penalty(model.encode, input_metric=np.ones(5, int))(params, xs)


def test_a_metric_of_few_rows_costs_no_more_than_none():
    model = jaxcae.mlp((784, 256, 64))
    params = jax.eval_shape(model.init, KEY)

    def flops(metric):
        both = jaxcae.encode_and_penalty(model.encode, input_metric=metric)
        xs = jax.ShapeDtypeStruct((128, 784), jnp.float32)
        step = jax.jit(jax.value_and_grad(lambda p, xs: both(p, xs)[1].mean()))
        return step.lower(params, xs).compile().cost_analysis()["flops"]

    assert flops(np.ones((100, 784), np.float32)) <= flops(None)


def test_with_the_datas_covariance_it_is_the_denoising_penalty_of_small_noise():
    """E‖h(x + ε) − h(x)‖² by Monte Carlo, with noise of the data's covariance."""
    model, params, xs = mlp(5, 4, 3, dtype=jnp.float32)
    data = RNG.normal(size=(40, 5)) @ RNG.normal(size=(5, 5))
    sigma = 0.02
    factor = jaxcae.covariance_factor(data, noise_scale=sigma)
    np.testing.assert_allclose(factor.T @ factor, sigma**2 * np.cov(data.T), rtol=1e-12, atol=1e-15)
    few = jaxcae.covariance_factor(np.float32(data[:4]), 2)
    assert few.shape == (2, 5)
    assert few.dtype == np.float32
    noise = jnp.float32(RNG.multivariate_normal(np.zeros(5), sigma**2 * np.cov(data.T), 40_000))
    one = jax.vmap(partial(model.encode, params))
    moved = np.float64(one(xs[:1] + noise) - one(xs[:1])) ** 2
    changes = moved.sum(1)
    penalty = jaxcae.contractive_penalty(model.encode, input_metric=jnp.float32(factor))
    want = float(penalty(params, xs[:1])[0])
    error = changes.std() / np.sqrt(len(changes))
    assert abs(changes.mean() - want) <= 5 * error + 0.01 * want
    assert error < 0.02 * want
    with pytest.raises(ValueError, match="rank must be at most 3 for 4 samples of 5 features"):
        jaxcae.covariance_factor(data[:4], 4)
    with pytest.raises(ValueError, match="two samples or more"):
        jaxcae.covariance_factor(data[:1])


# --------------------------------------------------------------------------- traces


def square(p, x):
    return jnp.tanh(x @ p[0]) @ p[1].T


TRACED = {
    "linear": lambda p, x: x @ p[0] @ p[1].T,
    "constant": lambda p, x: jnp.ones(5) * p[0][0, 0],
    "itself": lambda p, x: x,
    "one layer": square,
    "elementwise": lambda p, x: jnp.sin(x),
    "one between skips": lambda p, x: 2 * x - square(p, x),
    "two layers": lambda p, x: jnp.tanh(jnp.tanh(x @ p[0]) @ p[2]) @ p[2].T @ p[1].T,
    "two in a row": lambda p, x: jnp.tanh(jnp.sin(x @ p[0]) @ p[1].T),
    "gates": lambda p, x: gate(p, x) @ p[2].T @ p[1].T,
    "skips": lambda p, x: jnp.tanh(x + square(p, x)) @ p[0] @ p[1].T + x,
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", some(TRACED, ("constant", "two layers", "skips")))
def test_a_trace_is_that_of_the_jacobian(name):
    params, xs = list(map(jnp.asarray, MATRICES)), mlp(5, 4)[2]
    weights = jnp.arange(1.0, 4)

    @jax.jit
    def both(params):
        values, got = jaxcae.value_and_trace(TRACED[name])(params, xs)
        gradients = [
            jax.grad(lambda p, f=f: f(p) @ weights)(params)
            for f in (
                lambda p: jaxcae.jacobian_trace(TRACED[name])(p, xs),
                lambda p: jnp.trace(jacobians(TRACED[name], p, xs), axis1=1, axis2=2),
            )
        ]
        return values, got, jacobians(TRACED[name], params, xs), gradients

    values, got, want, gradients = both(params)
    assert_close(values, jax.vmap(partial(TRACED[name], params))(xs), "float64")
    assert_close(got, np.trace(want, axis1=1, axis2=2), "float64")
    for a, b in zip(*gradients, strict=True):
        assert_close(np.append(a, 1.0), np.append(b, 1.0), "float64")


@pytest.mark.usefixtures("x64")
def test_probes_of_a_trace_are_unbiased():
    params, xs = list(map(jnp.asarray, MATRICES)), mlp(5, 4)[2]
    function = lambda p, x: jax.nn.softmax(square(p, x)) * x  # noqa: E731
    want = np.trace(jacobians(function, params, xs), axis1=1, axis2=2)
    trace = jaxcae.jacobian_trace(function, "hutchinson", num_probes=2)
    draws = jax.jit(jax.vmap(trace, (None, None, 0)))(params, xs, jax.random.split(KEY, 2000))
    error = np.std(draws, 0) / np.sqrt(2000)
    assert np.all(np.abs(draws.mean(0) - want) <= 5 * error)
    assert np.all(error > 0)


def test_what_has_no_trace_is_refused():
    params, xs = [jnp.float32(m) for m in MATRICES], jnp.ones((3, 5))
    with pytest.raises(ValueError, match="takes 5 to 3"):
        jaxcae.jacobian_trace(gate)(params, xs)
    with pytest.raises(ValueError, match=r"exact through two.*has 3.*'hutchinson'"):
        jaxcae.jacobian_trace(lambda p, x: square(p, jnp.sin(jnp.cumsum(square(p, x)))))(params, xs)
    with pytest.raises(ValueError, match=r"neither.*'hutchinson'"):
        jaxcae.jacobian_trace(lambda p, x: jnp.sort(x))(params, xs)
    with pytest.raises(ValueError, match="call it with a key"):
        jaxcae.jacobian_trace(square, "hutchinson")(params, xs)
    with pytest.raises(ValueError, match=r"unknown method 'hutchison'.*Did you mean 'hutchinson'"):
        jaxcae.jacobian_trace(square, "hutchison")
    with pytest.raises(ValueError, match="num_probes belong to 'hutchinson' alone"):
        jaxcae.jacobian_trace(square, num_probes=2)


# --------------------------------------------------------------------------- differences and terms


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name",
    some(("two layers", "code activation", "one layer", "normalised layer"), ("two layers",)),
)
def test_the_noise_form_is_the_difference_of_two_jacobians(name):
    encode, params, xs = encoder(name)
    xs = jnp.tile(xs, (12, 1))
    got = jax.jit(jaxcae.jacobian_difference(encode, 0.3, num_samples=2))(params, xs, KEY)
    noise = 0.3 * jax.random.normal(KEY, (2, *xs.shape), xs.dtype)
    here = jacobians(encode, params, xs)
    there = [jacobians(encode, params, xs + epsilon) for epsilon in noise]
    assert_each_close(got, np.mean([((j - here) ** 2).sum((1, 2)) for j in there], 0), "float64")


PRICES = {
    "784-256": ((784, 256), "sigmoid", 128, 1.66),
    "784-256-64": ((784, 256, 64), "identity", 128, 2.92),
    "784-256-64, batch 1,024": ((784, 256, 64), "identity", 1024, 1.97),
}


@pytest.mark.parametrize("name", some(PRICES, ("784-256",)))
def test_the_noise_forms_price(name):
    """Beside the penalty, by XLA's count of a whole step over the plain one's."""
    sizes, latent, batch, allowed = PRICES[name]
    model = jaxcae.mlp(sizes, latent_activation=latent, tied=latent != "identity")
    params = jax.eval_shape(model.init, KEY)

    def flops(contraction, *terms):
        loss = jaxcae.cae_loss(model, contraction, terms=terms)
        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        xs = jax.ShapeDtypeStruct((batch, 784), jnp.float32)
        return step.lower(params, xs, KEY).compile().cost_analysis()["flops"]

    assert flops(0.1, noise_curvature_term(model, 0.1, 0.3)) / flops(None) <= allowed


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_the_noise_form_tends_to_the_curvature_and_is_another_beyond():
    model, params, xs = mlp(5, 4, 3)
    curvature = jax.jit(jaxcae.contractive_penalty(model.encode, order=2))(params, xs)

    def ratio(sigma):
        difference = jaxcae.jacobian_difference(model.encode, sigma, num_samples=20_000)
        return np.asarray(jax.jit(difference)(params, xs, KEY) / (sigma**2 * curvature))

    np.testing.assert_allclose(ratio(1e-3), 1, atol=0.06)
    assert np.all(ratio(1.0) < 0.95)


@pytest.mark.usefixtures("x64")
def test_terms_of_the_decoder_the_map_and_the_noise():
    model, params, xs = mlp(5, 4, 3)
    reconstruct = lambda p, x: model.decode(p, model.encode(p, x))  # noqa: E731
    codes = jax.vmap(partial(model.encode, params))(xs)
    want = {
        "decoder_contraction": (jacobians(model.decode, params, codes) ** 2).sum((1, 2)).mean(),
        "map_contraction": (jacobians(reconstruct, params, xs) ** 2).sum((1, 2)).mean(),
    }
    terms = (decoder_term(0.1), reconstruction_map_term(0.2), noise_curvature_term(model, 0.3, 0.1))
    plain, _ = jax.jit(jaxcae.cae_loss(model, None))(params, xs)
    factor = jaxcae.covariance_factor(np.asarray(xs), 2)
    both = jaxcae.cae_loss(model, 0.1, curvature=0.1, input_metric=factor)
    _, metrics = jax.jit(both)(params, xs)
    for name, order in (("contraction", 1), ("curvature", 2)):
        along = jaxcae.contractive_penalty(model.encode, order=order, input_metric=factor)
        assert_close(metrics[name], jax.jit(along)(params, xs).mean(), "float64")
    loss, metrics = jax.jit(jaxcae.cae_loss(model, None, terms=terms))(params, xs, KEY)
    for name, value in want.items():
        assert_close(metrics[name], value, "float64", name)
    assert metrics["noise_curvature"] > 0
    total = plain + 0.1 * want["decoder_contraction"] + 0.2 * want["map_contraction"]
    assert_close(loss, total + 0.3 * metrics["noise_curvature"], "float64")


# --------------------------------------------------------------------------- the contract


FUNCTIONALS = {
    "curvature": (
        lambda e: jaxcae.contractive_penalty(e, order=2),
        lambda e, leaves, x, _: np.sum(ref.hessian(e, leaves, x) ** 2),
    ),
    "metric": (
        lambda e: (
            lambda p, xs: jaxcae.contractive_penalty(
                e, input_metric=jnp.linspace(0.5, 1.5, xs[0].size)
            )(p, xs)
        ),
        lambda e, leaves, x, _: np.sum(
            (ref.jacobian(e, leaves, x) * np.linspace(0.5, 1.5, x.size)) ** 2
        ),
    ),
    "trace": (
        lambda e: jaxcae.jacobian_trace(e),
        lambda e, leaves, x, _: np.trace(ref.jacobian(e, leaves, x)),
    ),
    "noise form": (
        lambda e: partial(jaxcae.jacobian_difference(e, 0.3), key=KEY),
        lambda e, leaves, x, noise: np.sum(
            (ref.jacobian(e, leaves, x + 0.3 * noise) - ref.jacobian(e, leaves, x)) ** 2
        ),
    ),
}
BY_DEFAULT = {("metric", "linen layer norm")}
CELLS = [
    pytest.param(
        name,
        e,
        dtype,
        marks=[] if (name, e.name) in BY_DEFAULT and dtype != "bfloat16" else [pytest.mark.slow],
        id=f"{name}-{e.name}-{dtype}",
    )
    for name in FUNCTIONALS
    for e in all_encoders()
    for dtype in ("float64", "float32", "bfloat16")
    if (name, dtype) != ("noise form", "bfloat16")  # a difference of what has three digits
]


def derivative(function, leaves, along, by_differences):
    """Differentiate a function of arrays along arrays: complex step, or differences of order six.

    (The Hessian of the reference takes the imaginary step for itself.)
    """
    if not by_differences:
        return function(
            [a + 1j * ref.STEP * d for a, d in zip(leaves, along, strict=True)]
        ).imag / (ref.STEP)
    step, total = 1e-3, 0.0
    for n, weight in ((1, 45), (2, -9), (3, 1)):
        for sign in (1, -1):
            moved = [a + sign * n * step * d for a, d in zip(leaves, along, strict=True)]
            total += sign * weight * function(moved)
    return total / (60 * step)


@pytest.mark.parametrize(("name", "encoder", "dtype"), CELLS)
def test_every_functional_of_every_encoder(name, encoder, dtype):
    """By the reference; where there is no exact form or no value, a sentence says so."""
    make, want = FUNCTIONALS[name]
    precision = "bfloat16" if dtype == "bfloat16" else "float32"
    rng = np.random.default_rng(7)

    def rounded(a):
        return np.float64(np.asarray(a, jnp.dtype(precision)))

    leaves = [rounded(leaf) for leaf in jax.tree.leaves(encoder.params)]
    xs = rounded(rng.normal(size=(3, *encoder.input_shape)))
    with jax.enable_x64(dtype == "float64"):
        cast = [jnp.asarray(a.astype(jnp.dtype(dtype))) for a in leaves]
        params = jax.tree.unflatten(jax.tree.structure(encoder.params), cast)
        samples = jnp.asarray(xs.astype(jnp.dtype(dtype)))
        function = make(encoder.encode)
        try:
            got = jax.jit(function)(params, samples)
        except ValueError as error:
            told = str(error)
            assert "hutchinson" in told or "no derivative" in told or "as many results" in told
            return
        assert got.dtype == jnp.promote_types(dtype, jnp.float32)
        kind = "bfloat16 curvature" if (name, dtype) == ("curvature", "bfloat16") else dtype
        noise = np.float64(jax.random.normal(KEY, (1, *xs.shape), jnp.dtype(dtype))[0])

        def values(leaves):
            pairs = zip(xs, noise, strict=True)
            return np.array([want(encoder.numpy, leaves, *pair) for pair in pairs])

        assert_close(got, values(leaves), kind, name)
        weights = np.array([1.0, -0.5, 2.0])
        gradient = jax.jit(
            jax.grad(lambda p: function(p, samples) @ jnp.asarray(weights, got.dtype))
        )(params)
    found = [np.float64(leaf) for leaf in jax.tree.leaves(gradient)]
    along = [rng.normal(size=leaf.shape) for leaf in leaves]
    product = sum(np.sum(a * b) for a, b in zip(found, along, strict=True))
    true = derivative(lambda moved: weights @ values(moved), leaves, along, name == "curvature")
    scale = np.sqrt(sum(np.sum(a**2) for a in found))
    if name == "curvature" and dtype == "float64":
        kind = "differences"
    assert_close([product, scale], [true, scale], kind, f"{name}: gradient")
