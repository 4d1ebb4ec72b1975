"""‖∇ⁿh‖²_F: exact by independent derivatives, estimated without bias, or refused in words."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcae
from jaxcae.penalty import encode_and_penalties
from tests import reference as ref
from tests.encoders import all_encoders, randomised, shapes
from tests.tolerances import assert_close, assert_each_close

KEY = jax.random.key(0)
MATRICES = [
    np.random.default_rng(i).normal(size=size) for i, size in enumerate([(5, 4)] * 2 + [(4, 3)])
]


def mlp(*sizes, activation="tanh", dtype=jnp.float64, **options):
    model = jaxcae.mlp(sizes, activation, **options)
    params = jax.tree.map(lambda a: jnp.asarray(a, dtype), randomised(shapes(model.init)))
    xs = np.random.default_rng(1).normal(size=(3, sizes[0]))
    return model, params, jnp.asarray(xs, dtype)


def derivatives(encode, params, xs, order):
    """Differentiate by JAX alone, order by order."""
    function = partial(encode, params)
    for _ in range(order):
        function = jax.jacfwd(function)
    return jax.vmap(lambda x: jnp.sum(jnp.square(function(x))))(xs)


def value_and_gradient(function, params):
    """Compute norms and a gradient that tells the samples apart, in one compiled program."""
    return jax.jit(
        lambda p: (function(p), jax.grad(lambda p: function(p) @ jnp.arange(1.0, 4))(p))
    )(params)


def assert_exact(encode, params, xs, order, method="auto"):
    penalty = jaxcae.contractive_penalty(encode, method, order=order)
    got = value_and_gradient(lambda p: penalty(p, xs), params)
    want = value_and_gradient(lambda p: derivatives(encode, p, xs, order), params)
    assert_each_close(got[0], want[0], "float64")
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(want[1]))
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        assert_close(np.append(a, scale), np.append(b, scale), "float64")


def estimated(encode, params, xs, order=2, **options):
    penalty = jaxcae.contractive_penalty(encode, "hutchinson", order=order, **options)
    return jax.jit(penalty)(params, xs, KEY)


EXACT = [e for e in all_encoders() if e.name in ("mlp softplus", "nnx", "gated")]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("encoder", EXACT, ids=lambda e: e.name)
def test_curvature_is_that_of_the_independent_reference(encoder, dtype):
    rng = np.random.default_rng(7)
    leaves = [np.float64(np.float32(leaf)) for leaf in jax.tree.leaves(encoder.params)]
    xs = np.float64(np.float32(rng.normal(size=(3, *encoder.input_shape))))
    want = [np.sum(ref.hessian(encoder.numpy, leaves, x) ** 2) for x in xs]
    with jax.enable_x64(dtype == "float64"):
        params = jax.tree.unflatten(
            jax.tree.structure(encoder.params), [jnp.asarray(a, dtype) for a in leaves]
        )
        got = jax.jit(jaxcae.contractive_penalty(encoder.encode, order=2))(
            params, jnp.asarray(xs, dtype)
        )
        assert got.dtype == dtype
        assert_each_close(got, want, dtype)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("order", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_order_through_one_layer(order):
    """A dense layer between others, before the code, and after the sample."""
    for sizes, options in (
        ((5, 4, 3), {}),
        ((5, 3), {"latent_activation": "sigmoid"}),
    ):
        model, params, xs = mlp(*sizes, **options)
        assert_exact(model.encode, params, xs, order)
    assert_exact(lambda w, x: jnp.tanh(x) @ w, jnp.asarray(MATRICES[0]), xs, order)


def gate(p, x):
    return ((x @ p[0]) * jax.nn.sigmoid(x @ p[1])) @ p[2]


def branches(p, x):
    return jnp.concatenate([jnp.tanh(x @ p[0]) @ p[2], jnp.sin(x @ p[1]), x])


@jax.custom_vjp
def sine(a):
    return jnp.sin(a)


sine.defvjp(lambda a: (jnp.sin(a), a), lambda a, g: (g * jnp.cos(a),))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("order", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("encode", [gate, branches], ids=["gate", "branches"])
def test_any_order_through_one_layer_of_several_arrays(encode, order):
    """What passes unchanged has no curvature; a gate has that of each pair of its arrays."""
    assert_exact(encode, list(map(jnp.asarray, MATRICES)), mlp(5, 4)[2], order)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((5, 4, 3), {"latent_activation": "sigmoid"}),
        pytest.param((5, 4, 3, 2), {}, marks=pytest.mark.slow),
        pytest.param(
            (5, 4, 3),
            {"activation": "relu", "latent_activation": "sigmoid"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_curvature_through_two_layers(sizes, options):
    model, params, xs = mlp(*sizes, **options)
    assert_exact(model.encode, params, xs, 2)


@pytest.mark.usefixtures("x64")
def test_a_reverse_rule_alone_is_enough():
    params, xs = list(map(jnp.asarray, MATRICES)), mlp(5, 4)[2]
    encode = lambda p, x: sine(x @ p[0]) @ p[2]  # noqa: E731
    want = derivatives(lambda p, x: jnp.sin(x @ p[0]) @ p[2], params, xs, 2)
    got = jax.jit(jaxcae.contractive_penalty(encode, order=2))(params, xs)
    assert_each_close(got, want, "float64")
    norms = estimated(encode, params, xs, num_probes=200)
    assert 0.7 < norms.sum() / want.sum() < 1.4


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_orders_together_are_the_orders_apart_and_chunks_change_nothing():
    model, params, xs = mlp(5, 4, 3, latent_activation="sigmoid")
    _, together = jax.jit(encode_and_penalties(model.encode, (1, 2)))(params, xs)
    for order, norms in zip((1, 2), together, strict=True):
        for method, options in (("chain", {"chunk_size": 2}), ("auto", {"memory_budget": 3e3})):
            if order == 1 and method == "auto":
                continue  # its own budget is tested elsewhere, and would be too small
            penalty = jaxcae.contractive_penalty(model.encode, method, order=order, **options)
            assert_each_close(jax.jit(penalty)(params, xs), norms, "float64")


@pytest.mark.slow
@pytest.mark.parametrize("order", [2, 3])
def test_probes_are_unbiased_for_any_encoder(order):
    model, params, xs = mlp(5, 4, 3, 2, dtype=jnp.float32, latent_activation="sigmoid")
    penalty = jaxcae.contractive_penalty(model.encode, "hutchinson", order=order)
    draws = jax.jit(jax.vmap(penalty, (None, None, 0)))(params, xs, jax.random.split(KEY, 4000))
    error = np.std(draws, 0) / np.sqrt(len(draws))
    want = derivatives(model.encode, params, xs, order)
    assert np.all(np.abs(np.mean(draws, 0) - want) <= 5 * error)
    assert np.all(error > 0)
    assert np.all(error < 0.1 * want)


NO_CURVATURE = "softplus, gelu, silu, elu or tanh"


@pytest.mark.parametrize("method", ["auto", "chain", "hutchinson"])
@pytest.mark.parametrize(
    "encode",
    [
        lambda p, x: jax.nn.relu(x @ p[0]) @ p[2],
        lambda p, x: jnp.where(x @ p[0] > 0, x @ p[0], 0.1 * (x @ p[0])) @ p[2],
        lambda p, x: jnp.maximum(x @ p[0], x @ p[1]) @ p[2],
        lambda p, x: jnp.abs(x @ p[0]) @ p[2],
        lambda p, x: x @ p[0] @ p[2],
        lambda p, x: jax.nn.relu(jnp.clip(x @ p[0], -1, 1) @ p[2]),
    ],
    ids=["relu", "leaky relu", "maxout", "abs", "linear", "two of them"],
)
def test_what_has_no_curvature_is_refused_with_what_has(encode, method):
    params, xs = [jnp.float32(m) for m in MATRICES], jnp.ones((3, 5))
    with pytest.raises(ValueError, match=NO_CURVATURE):
        jax.eval_shape(jaxcae.contractive_penalty(encode, method, order=2), params, xs, KEY)


def test_curvature_of_relu_after_softmax_is_not_refused():
    params, xs = [jnp.float32(m) for m in MATRICES], jnp.ones((3, 5))
    encode = lambda p, x: jax.nn.softmax(jax.nn.relu(x @ p[0]) @ p[2])  # noqa: E731
    assert np.all(estimated(encode, params, xs) > 0)


def test_what_is_not_exact_names_what_is_possible():
    model, params, xs = mlp(5, 4, 3, 2, dtype=jnp.float32, latent_activation="sigmoid")
    with pytest.raises(ValueError, match=r"order 2.*3 elementwise layers.*'hutchinson'"):
        jaxcae.contractive_penalty(model.encode, order=2)(params, xs)
    with pytest.raises(ValueError, match=r"neither affine nor elementwise.*'hutchinson'"):
        jaxcae.contractive_penalty(lambda p, x: jax.nn.softmax(x), order=2)(None, xs)
    with pytest.raises(ValueError, match=r"'reverse' computes derivatives of order 1.*got order 2"):
        jaxcae.contractive_penalty(model.encode, "reverse", order=2)
    with pytest.raises(ValueError, match="order must be a positive int, got 0"):
        jaxcae.contractive_penalty(model.encode, order=0)
    with pytest.raises(ValueError, match="call it with a key"):
        jaxcae.contractive_penalty(model.encode, "hutchinson", order=2)(params, xs)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", ["auto", pytest.param("reverse", marks=pytest.mark.slow)])
def test_the_loss_takes_curvature_beside_contraction(method):
    model, params, xs = mlp(5, 4, 3)
    plain, _ = jax.jit(jaxcae.cae_loss(model, None))(params, xs)
    loss, metrics = jax.jit(jaxcae.cae_loss(model, 0.1, method=method, curvature=0.5))(params, xs)
    norms, curvatures = (derivatives(model.encode, params, xs, n).mean() for n in (1, 2))
    assert_close(metrics["curvature"], curvatures, "float64")
    assert_close(metrics["contraction"], norms, "float64")
    assert_close(loss, plain + 0.1 * norms + 0.5 * curvatures, "float64")
    measured, metrics = jax.jit(jaxcae.cae_loss(model, None, curvature=0.0))(params, xs)
    assert_close(measured, plain, "float64")
    assert_close(metrics["curvature"], curvatures, "float64")


@pytest.mark.slow
def test_the_loss_estimates_curvature_where_it_is_asked_to():
    model, params, xs = mlp(5, 4, 3, 2, dtype=jnp.float32)
    for chosen in ({"method": "hutchinson"}, {"curvature_method": jaxcae.Hutchinson(2)}):
        loss = jax.jit(jaxcae.cae_loss(model, 0.1, curvature=0.5, **chosen))
        _, metrics = loss(params, xs, KEY)
        assert metrics["curvature"] > 0
    lazy = jaxcae.cae_loss(
        mlp(5, 4, 3, dtype=jnp.float32)[0], 0.1, curvature=0.5, contraction_every=2
    )
    _, metrics = jax.jit(lazy)(mlp(5, 4, 3, dtype=jnp.float32)[1], xs, step=1)
    assert metrics["contraction"] == 0
    assert metrics["curvature"] > 0


def test_exact_curvature_costs_little_more_than_the_penalty():
    """By XLA's count, of a whole step at 784-256-64, the penalty of order 1 included."""
    model = jaxcae.mlp((784, 256, 64))
    params = jax.eval_shape(model.init, KEY)

    def flops(batch, **options):
        step = jax.jit(jax.value_and_grad(jaxcae.cae_loss(model, **options), has_aux=True))
        xs = jax.ShapeDtypeStruct((batch, 784), jnp.float32)
        return step.lower(params, xs).compile().cost_analysis()["flops"]

    for batch, allowed in ((128, 1.94), (1024, 1.33)):
        both, plain = flops(batch, curvature=0.1), flops(batch, contraction=None)
        assert both / plain <= allowed


@pytest.mark.usefixtures("x64")
def test_a_code_of_branches_has_norms_at_any_batch():
    """From some batch on, the plan wants the matrix of what lays branches side by side."""
    params, xs = list(map(jnp.asarray, MATRICES)), jnp.tile(mlp(5, 4)[2], (200, 1))
    norms = jax.jit(jaxcae.contractive_penalty(branches))(params, xs)
    assert_each_close(norms[:3], derivatives(branches, params, xs[:3], 1), "float64")
