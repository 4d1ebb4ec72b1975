"""Convolutions in sweeps: one family of three maps, equal to JAX's own in every derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcae
from jaxcae.jacobian import convolutions
from jaxcae.jacobian.cost import estimate

RNG = np.random.default_rng(0)

# Shapes of image and kernel without features, strides, padding, dilation, dimension numbers.
KINDS = {
    "strides": ((7, 8), (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), ("NHWC", "HWIO", "NHWC")),
    "rest": ((8, 9), (3, 2), (3, 2), ((0, 1), (1, 0)), (1, 1), ("NHWC", "HWIO", "NHWC")),
    "kernel below the stride": ((7, 6), (1, 2), (2, 3), ((0, 0), (0, 0)), (1, 1),
                                ("NHWC", "HWIO", "NHWC")),
    "negative padding": ((9, 8), (3, 3), (2, 2), ((-1, 1), (2, -2)), (1, 1),
                         ("NHWC", "HWIO", "NHWC")),
    "torch layout": ((7, 8), (3, 2), (2, 1), ((1, 1), (0, 1)), (1, 1), ("NCHW", "OIHW", "NCHW")),
    "odd layout": ((7, 8), (3, 2), (2, 2), ((1, 1), (0, 1)), (1, 1), ("CHWN", "IHWO", "HWNC")),
    "dilated": ((9, 9), (2, 3), (2, 1), ((1, 0), (2, 2)), (2, 2), ("NHWC", "HWIO", "NHWC")),
    "no stride": ((5, 6), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), ("NHWC", "HWIO", "NHWC")),
    "causal in time": ((9,), (3,), (2,), ((4, 0),), (2,), ("NWC", "WIO", "NWC")),
    "time": ((9,), (3,), (2,), ((2, 0),), (1,), ("NWC", "WIO", "NWC")),
    "volume": ((5, 4, 5), (3, 2, 2), (2, 1, 2), ((1, 1), (0, 1), (1, 0)), (1, 1, 1),
               ("NDHWC", "DHWIO", "NDHWC")),
}  # fmt: skip


def maps(kind):
    """Make JAX's convolution, ours, and operands for both."""
    image, kernel, strides, padding, dilation, layout = KINDS[kind]
    numbers = jax.lax.conv_dimension_numbers((1,) * (len(image) + 2), (1,) * (len(image) + 2),
                                             layout)  # fmt: skip
    options = {"window_strides": strides, "padding": padding, "rhs_dilation": dilation}

    def shape(spec, a, b, sizes):
        places = dict(zip(spec, (a, b, *sizes), strict=True))
        return tuple(places[i] for i in range(len(spec)))

    x = jnp.asarray(RNG.normal(size=shape(numbers.lhs_spec, 4, 3, image)))
    w = jnp.asarray(RNG.normal(size=shape(numbers.rhs_spec, 2, 3, kernel)))

    def own(x, w):
        return jax.lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options)

    params = jax.make_jaxpr(own)(x, w).eqns[0].params
    return own, lambda x, w: convolutions.convolve.bind(x, w, **params), x, w


def derivatives(f, x, w):
    """Take first derivatives, and derivatives of these: each map's in both of its operands."""

    def gradients(x, w):
        return jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), (0, 1))(x, w)

    found, pull = jax.vjp(gradients, x, w)
    return found, pull(jax.tree.map(jnp.cos, found))


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[pytest.mark.slow] * (kind not in ("strides", "rest", "time")))
        for kind in KINDS
    ],
)
def test_every_derivative_is_that_of_jax(kind, x64):
    own, ours, x, w = maps(kind)
    expected, found = (jax.jit(derivatives, static_argnums=0)(f, x, w) for f in (own, ours))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("kind", "chunk"), [("odd layout", 1), ("strides", 64), ("causal in time", 1)]
)
def test_batches_of_images_and_of_kernels(kind, chunk, x64, monkeypatch):
    """Images are merged into more images, in chunks or not; kernels of each sample work, too."""
    monkeypatch.setattr(convolutions, "_PATCHES", chunk * 100)
    own, ours, x, w = maps(kind)
    many = jnp.stack([x, 2 * x, x * x])

    def of_each(f):
        def loss(w, x):
            return jnp.sum(jnp.sin(f(x, w)))

        shared = jax.grad(lambda w: jnp.sum(jax.vmap(loss, (None, 0))(w, many)))(w)
        return (
            shared,
            jax.vmap(jax.grad(loss), (None, 0))(w, many),
            jax.vmap(f)(many, jnp.stack([w, -w, w])),
        )

    for a, b in zip(*(jax.jit(of_each, static_argnums=0)(f) for f in (own, ours)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-11, atol=1e-11)


def test_a_cpu_multiplies_patches_and_other_platforms_keep_their_own():
    """What is lowered for a CPU has no convolution over the images in the kernel's gradient."""
    _, ours, x, w = maps("strides")
    grad = jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.sin(ours(x, w)))))
    texts = {
        platform: jax.export.export(grad, platforms=[platform])(w, x).mlir_module()
        for platform in ("cpu", "cuda")
    }
    assert "dot_general" in texts["cpu"]
    assert "dot_general" not in texts["cuda"]
    assert texts["cuda"].count("stablehlo.convolution") == 2
    assert texts["cpu"].count("stablehlo.convolution") == 1


def test_sweeps_take_them_and_the_encoder_keeps_its_own():
    model = jaxcae.conv((8, 8, 1), (3, 4), 5, "tanh")
    params = jax.eval_shape(model.init, jax.random.key(0))
    xs = jax.ShapeDtypeStruct((3, 8, 8, 1), jnp.float32)
    penalty = jaxcae.contractive_penalty(model.encode)
    text = str(jax.make_jaxpr(jax.grad(lambda p, xs: jnp.sum(penalty(p, xs))))(params, xs))
    assert text.count("convolve_kernel[") == 2  # of both kernels
    assert text.count("convolve_transposed[") >= 2
    reverse = jaxcae.contractive_penalty(model.encode, "reverse")
    assert "convolve" not in str(jax.make_jaxpr(reverse)(params, xs))


def test_they_are_counted_as_the_convolutions_that_they_are():
    own, ours, x, w = maps("strides")
    counts = [
        estimate(jax.grad(lambda w, x, f=f: jnp.sum(jnp.sin(f(x, w))), (0, 1)), w, x).flops
        for f in (own, ours)
    ]
    assert counts[0] == counts[1]
