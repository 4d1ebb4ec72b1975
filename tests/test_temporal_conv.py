"""The temporal convolution: a dilated causal network, evaluated only where its code reads it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jaxcae
from tests.encoders import randomised, shapes
from tests.tolerances import assert_close


def _params(model, dtype=jnp.float32):
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), randomised(shapes(model.init)))


def _dilated(params, x, stride):
    """Evaluate every map at every row, each layer dilated by what the ones before have skipped."""
    dilation = 1
    encoder = params["encoder"]
    for i in range(len(encoder) - 1):
        layer = encoder[f"conv_{i}"]
        pad = (len(layer["kernel"]) - 1) * dilation
        x = lax.conv_general_dilated(
            x[None], layer["kernel"], (1,), [(pad, 0)], rhs_dilation=(dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
        )[0] + layer["bias"][None]  # fmt: skip
        x = jnp.logaddexp(x, 0.0)
        dilation *= stride
    rows = x[::-1][::dilation][::-1]
    return rows.reshape(-1) @ encoder["dense"]["kernel"] + encoder["dense"]["bias"]


@pytest.mark.parametrize(("rows", "kernel_size", "stride"), [(13, 3, 2), (11, 4, 3), (1, 3, 2)])
def test_the_code_is_that_of_a_dilated_causal_network(rows, kernel_size, stride, rng, x64):
    """At every length, whole or not, with zeros before the first row."""
    options = {"kernel_size": kernel_size, "stride": stride, "dtype": jnp.float64}
    model = jaxcae.temporal_conv((rows, 2), (3, 4, 2), 5, **options)
    params = _params(model, jnp.float64)
    x = jnp.asarray(rng.normal(size=(rows, 2)))
    got, want, x_hat = jax.jit(
        lambda params, x: (
            code := model.encode(params, x),
            _dilated(params, x, stride),
            model.decode(params, code),
        )
    )(params, x)
    # Below the first row the dilated maps see their own zeros, as the strided ones do.
    assert_close(got, want, "float64")
    assert x_hat.shape == (rows, 2)


def test_only_what_the_code_reads_is_computed():
    """The dilated network, evaluated everywhere, takes more than twice the operations."""
    model = jaxcae.temporal_conv((128, 2), (16, 16, 16, 16), 8)
    params, x = _params(model), jnp.zeros((128, 2))

    def work(f):
        return jax.jit(f).lower(params, x).compile().cost_analysis()["flops"]

    assert work(model.encode) < 0.4 * work(lambda p, x: _dilated(p, x, 2))


def test_its_decoder_is_the_exact_transpose_of_its_encoder():
    """With the same kernels and no activation, one Jacobian is the other's transpose."""
    model = jaxcae.temporal_conv((11, 2), (3, 4), 5, "identity")
    params = _params(model)
    encoder, decoder = params["encoder"], params["decoder"]
    decoder["dense"]["kernel"] = encoder["dense"]["kernel"].T
    for i in range(2):
        decoder[f"conv_{i}"]["kernel"] = encoder[f"conv_{1 - i}"]["kernel"]
    jacobians = jax.jit(
        lambda x, z: (
            jax.jacrev(model.encode, 1)(params, x).reshape(5, -1),
            jax.jacfwd(model.decode, 1)(params, z).reshape(-1, 5),
        )
    )
    there, back = jacobians(jnp.zeros((11, 2)), jnp.zeros(5))
    assert_close(back, there.T, "float32")


def test_parameters_lie_as_documented():
    """(lags, in, out) in the encoder's direction, the decoder's stages in the order of use."""
    drawn = shapes(jaxcae.temporal_conv((10, 2), (3, 4), 5).init)
    assert jax.tree.map(lambda leaf: leaf.shape, drawn) == {
        "encoder": {
            "conv_0": {"kernel": (3, 2, 3), "bias": (3,)},
            "conv_1": {"kernel": (3, 3, 4), "bias": (4,)},
            "dense": {"kernel": (12, 5), "bias": (5,)},
        },
        "decoder": {
            "dense": {"kernel": (5, 12), "bias": (12,)},
            "conv_0": {"kernel": (3, 3, 4), "bias": (3,)},
            "conv_1": {"kernel": (3, 2, 3), "bias": (2,)},
        },
    }


@pytest.mark.slow
def test_it_trains_with_the_exact_penalty():
    """Loss and norms fall together on waves."""
    xs = np.sin(np.arange(16)[None, :, None] / 3 + np.arange(64)[:, None, None]).astype("f4")
    model = jaxcae.temporal_conv((16, 1), (4, 4), 2)
    loss = jaxcae.cae_loss(model, contraction=0.1)
    optimizer = optax.adam(1e-2)
    state = jaxcae.TrainState.create(
        jax.jit(model.init)(jax.random.key(0)), optimizer, jax.random.key(1)
    )
    before = jaxcae.evaluate(loss, state.params, xs)
    state, _ = jaxcae.fit(loss, optimizer, state, xs, epochs=20, batch_size=64)
    after = jaxcae.evaluate(loss, state.params, xs)
    assert after["loss"] < 0.7 * before["loss"]


BAD = {
    "rank": (((16,), (4,), 3), {}, r"input_shape must be \(rows, channels\)"),
    "no rows": (((0, 2), (4,), 3), {}, "every entry of input_shape must be a positive int"),
    "no convolution": (((16, 2), (), 3), {}, "needs at least one convolution"),
    "no features": (((16, 2), (0,), 3), {}, "every entry of features must be a positive int"),
    "no code": (((16, 2), (4,), 0), {}, "latent must be a positive int"),
    "no kernel": (((16, 2), (4,), 3), {"kernel_size": 0}, "kernel_size must be a positive"),
    "rows that nothing reads": (((16, 2), (4,), 3), {"stride": 4}, "would never be read"),
    "unknown activation": (((16, 2), (4,), 3, "sofplus"), {}, "Did you mean 'softplus'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_makes_no_network_is_refused_in_one_line(name):
    """With what came and what was expected."""
    arguments, options, words = BAD[name]
    with pytest.raises(ValueError, match=words) as error:
        jaxcae.temporal_conv(*arguments, **options)
    assert "\n" not in str(error.value)
