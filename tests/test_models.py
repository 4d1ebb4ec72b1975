"""The built-in models: shapes, parameters, both directions against NumPy, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcae
from tests import reference as ref
from tests.encoders import randomised
from tests.tolerances import assert_close


def _float64(tree):
    return jax.tree.map(jnp.asarray, tree)


def _dense(group, names):
    return [ref.Dense(group[name]["kernel"], group[name]["bias"]) for name in names]


# --------------------------------------------------------------------------- mlp


def test_mlp_parameters_are_nested_dicts_of_kernels_in_out():
    """Names, shapes, dtype and zero biases, as converters and checkpoints rely on them."""
    params = jaxcae.mlp((7, 5, 3)).init(jax.random.key(0))
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), params)
    assert shapes == {
        "encoder": {
            "layer_0": {"kernel": ((7, 5), "float32"), "bias": ((5,), "float32")},
            "layer_1": {"kernel": ((5, 3), "float32"), "bias": ((3,), "float32")},
        },
        "decoder": {
            "layer_0": {"kernel": ((3, 5), "float32"), "bias": ((5,), "float32")},
            "layer_1": {"kernel": ((5, 7), "float32"), "bias": ((7,), "float32")},
        },
    }
    for group in params.values():
        for layer in group.values():
            assert not np.any(layer["bias"])
            assert np.std(layer["kernel"]) > 0


def test_init_depends_on_the_key_alone():
    """One key, one set of parameters; another key, others; no two kernels alike."""
    model = jaxcae.mlp((4, 4, 4))
    one, again, other = (model.init(jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    kernels = [leaf for tree in (one, other) for leaf in jax.tree.leaves(tree) if leaf.ndim == 2]
    for i, a in enumerate(kernels):
        assert all(np.any(a != b) for b in kernels[i + 1 :])


def test_dtype_and_initializer_are_the_callers():
    """`dtype` reaches every leaf; `kernel_init` draws every kernel."""
    model = jaxcae.mlp((4, 3), dtype=jnp.bfloat16, kernel_init=jax.nn.initializers.constant(0.5))
    params = model.init(jax.random.key(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    assert np.all(np.asarray(params["encoder"]["layer_0"]["kernel"], np.float32) == 0.5)


@pytest.mark.parametrize("sizes", [(4, 3), (4, 5, 3), (4, 5, 6, 3)])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_mlp_both_directions(rng, sizes, tied, x64):
    """Encode and decode equal NumPy's, with activations in the right places."""
    model = jaxcae.mlp(sizes, "silu", tied=tied, latent_activation="tanh", output="sigmoid")
    params = randomised(model.init(jax.random.key(0)))
    names = [f"layer_{i}" for i in range(len(sizes) - 1)]
    encoder = _dense(params["encoder"], names)
    if tied:
        assert all(set(layer) == {"bias"} for layer in params["decoder"].values())
        kernels = [layer.kernel.T for layer in reversed(encoder)]
        decoder = [
            ref.Dense(kernel, params["decoder"][name]["bias"])
            for kernel, name in zip(kernels, names, strict=True)
        ]
    else:
        decoder = _dense(params["decoder"], names)
    x = rng.normal(size=sizes[0])
    z = model.encode(_float64(params), jnp.asarray(x))
    assert_close(z, ref.mlp(encoder, x, "silu", "tanh"), "float64", "code")
    want = ref.mlp(decoder, np.asarray(z), "silu", "sigmoid")
    assert_close(model.decode(_float64(params), z), want, "float64", "reconstruction")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jaxcae.mlp((784,)), "sizes needs features and at least one layer"),
        (lambda: jaxcae.mlp((784, 0)), "every entry of sizes must be a positive int, got 0"),
        (lambda: jaxcae.mlp((784, True)), "positive int, got True"),
        (lambda: jaxcae.mlp((784, 64), "relux"), "Did you mean 'relu'?"),
        (lambda: jaxcae.mlp((784, 64), latent_activation="x"), "unknown activation 'x'"),
        (lambda: jaxcae.mlp((784, 64), output="x"), "unknown activation 'x'"),
        (lambda: jaxcae.conv((28, 28), (4,), 3), r"input_shape must be \(height, width, chan"),
        (lambda: jaxcae.conv((28, 28, 1), (), 3), "features needs at least one convolution"),
        (lambda: jaxcae.conv((28, 0, 1), (4,), 3), "every entry of input_shape must be a posi"),
        (lambda: jaxcae.conv((28, 28, 1), (0,), 3), "every entry of features must be a positive"),
        (lambda: jaxcae.conv((28, 28, 1), (4,), 0), "latent must be a positive int, got 0"),
        (lambda: jaxcae.conv((8, 8, 1), (4,), 3, stride=0), "stride must be a positive int"),
        (lambda: jaxcae.conv((4, 1, 1), (4,), 3, kernel_size=2), "does not fit a map of 4×1"),
    ],
)
def test_unusable_options_are_refused_when_the_model_is_made(call, message):
    """Before any data is touched, with a message that says what came and what to do."""
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        call()


# --------------------------------------------------------------------------- conv

SHAPES = [
    ((6, 6, 1), (2, 3), 3, 2),  # even, twice halved: 6, 3, 2
    ((7, 5, 2), (3,), 3, 2),  # odd: the stride drops nothing
    ((8, 6, 1), (2,), 4, 2),  # an even kernel
    pytest.param((7, 8, 1), (2,), 5, 3, marks=pytest.mark.slow),  # a stride that does not divide
    pytest.param((5, 4, 2), (3,), 2, 1, marks=pytest.mark.slow),
]


def _conv(shape, features, size, stride, **options):
    return jaxcae.conv(
        shape, features, 4, "silu", kernel_size=size, stride=stride, output="tanh", **options
    )


def _pad(x, low, high):
    return np.pad(x, [*zip(low, high, strict=True), (0, 0)])


def _transposed(y, kernel, size, stride, image):
    """Spread every entry of the map over the kernel's window: the definition, as loops."""
    padding = (size - 1) // 2
    out = np.zeros((image[0] + 2 * padding + size, image[1] + 2 * padding + size, kernel.shape[2]))
    for i, j, f in np.ndindex(y.shape):
        window = np.s_[i * stride : i * stride + size, j * stride : j * stride + size]
        out[window] += y[i, j, f] * kernel[..., f]
    return out[padding : padding + image[0], padding : padding + image[1]]


@pytest.mark.parametrize(("shape", "features", "size", "stride"), SHAPES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_conv_both_directions(rng, shape, features, size, stride, tied, x64):
    """Encode and decode equal NumPy loops written from the docstring."""
    model = _conv(shape, features, size, stride, tied=tied)
    params = randomised(model.init(jax.random.key(0)))
    silu, padding = ref.ACTIVATIONS["silu"].function, (size - 1) // 2
    count = len(features)
    x = rng.normal(size=shape)

    maps = [x]
    for i in range(count):
        layer = params["encoder"][f"conv_{i}"]
        padded = _pad(maps[-1], (padding, padding), (padding, padding))
        out = ref.convolve(padded, layer["kernel"], stride, "VALID") + layer["bias"]
        maps.append(silu(out))
    top = params["encoder"]["dense"]
    want = maps[-1].reshape(-1) @ top["kernel"] + top["bias"]
    z = model.encode(_float64(params), jnp.asarray(x))
    assert_close(z, want, "float64", "code")

    kernels = [params["encoder" if tied else "decoder"][f"conv_{i}"].get("kernel")
               for i in (reversed(range(count)) if tied else range(count))]  # fmt: skip
    dense = top["kernel"].T if tied else params["decoder"]["dense"]["kernel"]
    y = silu(np.asarray(z) @ dense + params["decoder"]["dense"]["bias"]).reshape(maps[-1].shape)
    for i, (kernel, like) in enumerate(zip(kernels, reversed(maps[:-1]), strict=True)):
        y = _transposed(y, kernel, size, stride, like.shape[:2])
        y = y + params["decoder"][f"conv_{i}"]["bias"]
        y = silu(y) if i < count - 1 else np.tanh(y)
    got = model.decode(_float64(params), z)
    assert got.shape == shape
    assert_close(got, y, "float64", "reconstruction")


@pytest.mark.parametrize(("shape", "features", "size", "stride"), SHAPES)
def test_tied_linear_conv_decoder_is_the_transpose_of_its_encoder(
    rng, shape, features, size, stride, x64
):
    """⟨encode(x), z⟩ = ⟨x, decode(z)⟩ for every x and z, when nothing but kernels is left."""
    model = jaxcae.conv(shape, features, 4, "identity", kernel_size=size, stride=stride, tied=True)
    params = model.init(
        jax.random.key(0),
    )
    x, z = jnp.asarray(rng.normal(size=shape)), jnp.asarray(rng.normal(size=4))
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, x.dtype), params)
    there, back = model.encode(params, x) @ z, jnp.sum(x * model.decode(params, z))
    assert_close(there, back, "float64")


def test_conv_kernels_are_hwio_and_mirrored():
    """The decoder's kernels have the shapes of the encoder's, last first."""
    params = jaxcae.conv((28, 28, 1), (16, 32), 64).init(jax.random.key(0))
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes["encoder"] == {
        "conv_0": {"kernel": (3, 3, 1, 16), "bias": (16,)},
        "conv_1": {"kernel": (3, 3, 16, 32), "bias": (32,)},
        "dense": {"kernel": (7 * 7 * 32, 64), "bias": (64,)},
    }
    assert shapes["decoder"] == {
        "dense": {"kernel": (64, 7 * 7 * 32), "bias": (7 * 7 * 32,)},
        "conv_0": {"kernel": (3, 3, 16, 32), "bias": (16,)},
        "conv_1": {"kernel": (3, 3, 1, 16), "bias": (1,)},
    }
