"""Derivatives of the penalty beyond the first gradient, and where derivatives are delicate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

import jaxcae
from jaxcae import data
from jaxcae.jacobian.products import HALVED_FROM, gram, quadratic_form
from jaxcae.penalty import jacobian_norm
from tests.tolerances import TOLERANCES

slow = pytest.mark.slow


def model_and_data(*sizes, **options):
    model = jaxcae.mlp(sizes, dtype=jnp.float64, **options)
    params = model.init(jax.random.key(0))
    params = jax.tree.map(
        lambda a: a + 0.3 * jax.random.normal(jax.random.key(a.size), a.shape, a.dtype), params
    )
    return model, params, jax.random.normal(jax.random.key(1), (3, sizes[0]), jnp.float64)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("method", "sizes"),
    [
        ("chain", (5, 4)),
        pytest.param("chain", (5, 4, 3, 2), marks=slow),
        pytest.param("reverse", (5, 4), marks=slow),
    ],
)
def test_derivatives_to_second_order_in_both_modes(method, sizes):
    model, params, xs = model_and_data(*sizes, activation="tanh", latent_activation="sigmoid")
    penalty = jaxcae.contractive_penalty(model.encode, method)
    total = jax.jit(lambda p: penalty(p, xs).sum())
    check_grads(total, (params,), order=2, modes=("fwd", "rev"))


@pytest.mark.usefixtures("x64")
def test_hessian_vector_products_agree_across_methods():
    model, params, xs = model_and_data(6, 5, 4, activation="softplus")
    direction = jax.tree.map(jnp.ones_like, params)

    @jax.jit
    def products(params, direction):
        losses = [jaxcae.contractive_penalty(model.encode, m) for m in ("chain", "reverse")]
        return [
            jax.jvp(jax.grad(lambda p, f=f: f(p, xs).mean()), (params,), (direction,))[1]
            for f in losses
        ]

    chain, reverse = products(params, direction)
    for a, b in zip(jax.tree.leaves(chain), jax.tree.leaves(reverse), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_the_penalty_has_a_gradient_by_the_sample_too():
    model, params, xs = model_and_data(6, 5, 4, activation="tanh")

    @jax.jit
    def gradients(xs):
        losses = [jaxcae.contractive_penalty(model.encode, m) for m in ("chain", "reverse")]
        return [jax.grad(lambda x, f=f: f(params, x).sum())(xs) for f in losses]

    chain, reverse = gradients(xs)
    np.testing.assert_allclose(chain, reverse, rtol=1e-10, atol=1e-12)
    assert np.abs(chain).max() > 1e-3


def test_a_jacobian_of_zeros_has_a_gradient_of_zeros():
    """The gradient of a norm is NaN there; that of a sum of squares is not."""
    model = jaxcae.mlp((4, 3, 2), "relu")
    params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0)))

    @jax.jit
    def jacobian_of_all(params):
        penalties = [
            jaxcae.contractive_penalty(model.encode, m) for m in ("chain", "forward", "reverse")
        ]
        return jax.jacrev(lambda p: jnp.stack([f(p, jnp.ones((1, 4))) for f in penalties]))(params)

    for leaf in jax.tree.leaves(jacobian_of_all(params)):
        assert leaf.shape[0] == 3
        assert (leaf == 0).all()


@pytest.mark.usefixtures("x64")
def test_symmetric_products_have_the_derivatives_of_what_they_compute():
    a = jax.random.normal(jax.random.key(0), (5, 3), jnp.float64)
    v = jax.random.normal(jax.random.key(1), (4, 3), jnp.float64)
    form = jax.jit(lambda v, a: quadratic_form(v, gram(a)))
    check_grads(form, (v, a), order=2, modes=("fwd", "rev"))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("width", [HALVED_FROM, HALVED_FROM + 1])
def test_a_wide_shared_gram_is_the_same_by_halves(width):
    a = jax.random.normal(jax.random.key(0), (7, width), jnp.float64)
    weights = jax.random.normal(jax.random.key(1), (width, width), jnp.float64)
    whole, halved = (
        jax.value_and_grad(lambda a, s=shared: jnp.sum(gram(a, s) * weights))(a)
        for shared in (False, True)
    )
    for got, expected in zip(halved, whole, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-9)
    assert (gram(a, True) == gram(a, True).T).all()


def count_products(function, *arguments):
    """Count matrix products in the traced gradient."""
    jaxpr = jax.make_jaxpr(
        jax.grad(lambda *a: function(*a).sum(), argnums=(0, 1)[: len(arguments)])
    )
    return str(jaxpr(*arguments)).count("dot_general")


def test_symmetric_products_take_one_product_backward():
    a, v, c = jnp.ones((5, 3)), jnp.ones((4, 3)), jnp.ones((3, 3))
    assert count_products(lambda a: gram(a), a) == 2
    assert count_products(lambda a: a.T @ a, a) == 3
    assert count_products(quadratic_form, v, c) == 2
    assert count_products(lambda v, c: jnp.sum((v @ c) * v, -1), v, c) == 3


def test_reconstruction_and_penalty_share_one_forward_trace():
    """Apart, each would differentiate the first kernel by itself: one more product with x."""
    model = jaxcae.mlp((96, 32, 8))
    params = jax.eval_shape(model.init, jax.random.key(0))
    xs = jax.ShapeDtypeStruct((512, 96), jnp.float32)
    loss = jaxcae.cae_loss(model, 0.1)

    def apart(params, xs):
        penalty = jaxcae.contractive_penalty(model.encode)
        return jaxcae.cae_loss(model, None)(params, xs)[0] + 0.1 * penalty(params, xs).mean()

    shared, separate = (
        jax.jit(jax.grad(f)).lower(params, xs).compile().cost_analysis()["flops"]
        for f in (lambda p, x: loss(p, x)[0], apart)
    )
    one_product = 2 * 512 * 96 * 32
    assert separate - shared > 0.9 * one_product


def cancelling_pairs(r):
    """Make two-layer weights whose units come in pairs that cancel to a fraction r."""
    rng = np.random.default_rng(0)
    w1, w2, noise = rng.normal(size=(40, 24)), rng.normal(size=(24, 8)), rng.normal(size=(24, 8))
    w1 = np.concatenate([w1, w1], 1)
    w2 = np.concatenate([w2, r * noise - w2])
    return np.float32(w1 / 6), np.float32(w2 / 5)


def encode_pairs(weights, x):
    return jnp.tanh(x @ weights[0]) @ weights[1]


@pytest.mark.parametrize("r", [1e-1, 1e-2, 1e-3])
def test_units_that_cancel_cost_the_digits_that_are_promised(r):
    """Relative errors of ε/r² by whole layers and of ε/r by single directions, up to a factor."""
    weights = cancelling_pairs(r)
    xs = np.float32(np.random.default_rng(1).uniform(size=(16, 40)))
    slopes = 1 - np.tanh(np.float64(xs) @ weights[0]) ** 2
    jacobians = np.einsum("dh,nh,hk->ndk", weights[0], slopes, weights[1])
    expected = np.sum(jacobians**2, (1, 2))
    eps = np.finfo(np.float32).eps
    for method, promised in (("chain", eps / r**2), ("forward", eps / r), ("reverse", eps / r)):
        norms = jax.jit(jaxcae.contractive_penalty(encode_pairs, method))(weights, xs)
        assert np.max(np.abs(norms / expected - 1)) < 10 * promised


def test_a_norm_below_zero_counts_as_zero():
    """An estimate of ‖J‖² may be negative."""
    assert jacobian_norm(jnp.asarray([-1e-6, 4.0])).tolist() == [0.0, 2.0]


@pytest.mark.parametrize(
    ("activation", "contraction"),
    [
        pytest.param(name, value, marks=slow)
        for name in ("relu", "softplus", "sigmoid", "tanh")
        for value in (None, 0.03, 1.0, 30.0)
    ],
)
def test_training_does_not_make_units_cancel(activation, contraction):
    """What cancellation may cost in principle it does not cost on digits, however strong λ is."""
    xs = jnp.asarray(data.load("mnist5k").features[:3840])
    model = jaxcae.mlp((784, 256, 64), activation, output="sigmoid")
    loss, optimizer = jaxcae.cae_loss(model, contraction), optax.adam(1e-3)
    params = model.init(jax.random.key(0))
    state = jaxcae.TrainState.create(params, optimizer, jax.random.key(1))
    step = jaxcae.make_train_step(loss, optimizer)
    for i in range(600):
        state, _ = step(state, jax.lax.dynamic_slice_in_dim(xs, i * 128 % 3840, 128))
    norms = jax.jit(jaxcae.contractive_penalty(model.encode, "chain"))(state.params, xs[:64])
    with jax.enable_x64(True):
        params, few = jax.tree.map(lambda a: jnp.asarray(np.float64(a)), (state.params, xs[:64]))
        exact = jax.jit(jaxcae.contractive_penalty(model.encode, "reverse"))(params, few)
        # 4.1e-6 for sigmoid at 30 is the worst of the sixteen here: what one sample keeps changes
        # with the rounding of 600 steps, so the claim is that of any float32 result.
        np.testing.assert_allclose(np.float64(norms), exact, rtol=TOLERANCES["float32"].relative)
