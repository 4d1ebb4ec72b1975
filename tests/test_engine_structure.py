"""What the tracer proves of an encoder, and above all what it must not."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import jaxcae
from jaxcae.jacobian.program import trace_encoder
from jaxcae.jacobian.structure import read_structure

W = np.linspace(-1, 1, 24).reshape(6, 4).astype(np.float32)
V = np.linspace(1, -2, 24).reshape(4, 6).astype(np.float32)


def structure(encode, shape=(6,)):
    xs = jax.ShapeDtypeStruct((3, *shape), jnp.float32)
    encoder, _ = trace_encoder(lambda _, x: encode(x), (), xs)
    return read_structure(encoder.program)


def kinds(encode):
    """Write a structure as letters: affine, N for affine with a scale, elementwise, opaque."""
    letters = {"affine": "A", "elementwise": "E", "opaque": "O"}
    return "".join("N" if s.scale else letters[s.kind] for s in structure(encode).segments)


@jax.custom_jvp
def honest(x):
    """An elementwise function whose rule is elementwise, but not the derivative of its body."""
    return jnp.tanh(x)


honest.defjvp(lambda primals, tangents: (jnp.tanh(primals[0]), 2 * primals[0] * tangents[0]))


@jax.custom_jvp
def mixing(x):
    """An elementwise body under a rule that mixes elements."""
    return jnp.tanh(x)


mixing.defjvp(
    lambda primals, tangents: (jnp.tanh(primals[0]), jnp.flip(jnp.cos(primals[0]) * tangents[0]))
)


@jax.custom_jvp
def curved(x):
    """A linear body under a rule that depends on where it is."""
    return 3 * x


curved.defjvp(lambda primals, tangents: (3 * primals[0], primals[0] @ primals[0] * tangents[0]))


@jax.custom_jvp
def straight_through(x):
    """A step whose rule is the identity: constant, so affine as far as derivatives go."""
    return jnp.round(x)


straight_through.defjvp(lambda primals, tangents: (jnp.round(primals[0]), tangents[0]))


@jax.custom_vjp
def reversible(x):
    """An elementwise function with a reverse rule only."""
    return jnp.sin(x)


reversible.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (jnp.cos(x) * g,))


@jax.custom_vjp
def mixing_back(x):
    """An elementwise body under a reverse rule that mixes elements."""
    return jnp.sin(x)


mixing_back.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (jnp.flip(jnp.cos(x) * g),))


@pytest.mark.parametrize(
    ("encode", "expected"),
    [
        (lambda x: x, ""),
        (lambda x: jnp.ones(3), ""),
        (lambda x: x @ W, "A"),
        (lambda x: V @ x, "A"),
        (lambda x: x @ W @ V - 1, "AA"),
        (lambda x: (x - 0.5) / 255 @ W, "A"),
        (lambda x: x.reshape(2, 3).T[::-1].reshape(-1) @ W, "A"),
        (lambda x: jnp.cumsum(jnp.concatenate([x, 2 * x])), "A"),
        (lambda x: x @ W + x[:4] @ V[:4, :4], "A"),
        (lambda x: jnp.tanh(x / 255), "E"),
        (lambda x: jnp.tanh(x / 255) @ W, "EA"),
        (lambda x: jax.nn.relu(x @ W) @ V, "AEA"),
        (lambda x: jax.nn.silu(jnp.exp(-jnp.square(x @ W))) @ V, "AEA"),
        (lambda x: jnp.where(x > 0, x, 0.1 * x) @ W, "EA"),
        (lambda x: jnp.clip(jnp.tanh(x @ W), -0.5, 0.5), "AE"),
        (lambda x: jax.jit(jax.nn.gelu)(jax.checkpoint(lambda y: y @ W)(x)), "AE"),
        (lambda x: honest(x @ W) @ V, "AEA"),
        (lambda x: straight_through(x @ W) @ V, "AA"),
        (lambda x: reversible(x @ W) @ V, "AEA"),
        # Branches that meet: sets of arrays.
        (lambda x: x + jnp.tanh(x @ W) @ V, "AEA"),
        (lambda x: jnp.concatenate([x, jnp.tanh(x @ W)]) @ jnp.ones((10, 2)), "AEA"),
        (lambda x: (x @ W) * jax.nn.sigmoid(x @ W[::-1]) @ V, "AEA"),
        (lambda x: jnp.maximum(x @ W, x @ W[::-1]), "AE"),
        (lambda x: x * jnp.sum(x), "AE"),
        (lambda x: x * jnp.flip(x), "AE"),
        (lambda x: jnp.where(x > 0, x, x[::-1]), "AE"),
        (lambda x: jnp.outer(x, x), "AE"),
        (lambda x: jnp.broadcast_to(x[:1], (6,)) * x, "AE"),
        # An affine function times a scalar of its input.
        (lambda x: x / jnp.max(x), "N"),
        (lambda x: jax.nn.standardize(x @ W) @ V, "ANA"),
        (lambda x: jax.nn.softmax(x @ W) @ V, "AENA"),
        (lambda x: x * jax.lax.rsqrt(jnp.mean(x**2) + 1e-6) * W[:, 0], "NE"),
        # Affine, though not by arithmetic alone.
        (lambda x: jnp.fft.irfft(2 * jnp.fft.rfft(x), n=6) @ W, "A"),
        (lambda x: jnp.zeros(6).at[jnp.arange(6)[::-1]].add(x) @ W, "A"),
        (lambda x: jax.scipy.linalg.solve_triangular(jnp.eye(6), x, lower=True), "A"),
        (lambda x: jnp.linalg.solve(jnp.eye(6), x), "A"),
        (lambda x: jax.lax.scan(lambda c, w: (2 * c + w, c.sum()), x, jnp.ones((4, 6)))[0], "A"),
        (lambda x: jax.lax.cond(W.sum() > 0, jnp.tanh, jax.nn.sigmoid, x) @ W, "EA"),
        (lambda x: checkpoint_name(jnp.tanh(x), "h") @ W, "EA"),
        (lambda x: jax.lax.optimization_barrier(jnp.tanh(x)) @ W, "EA"),
        (lambda x: jax.device_put(x) @ W, "A"),
        (lambda x: jnp.tanh(jnp.tanh(x).reshape(2, 3)).reshape(-1) @ W, "EA"),
        (lambda x: x - jax.lax.stop_gradient(jnp.max(x)), "A"),
        # Not affine, not elementwise, whatever they look like:
        (lambda x: x * jax.lax.stop_gradient(jnp.sum(x)), "AE"),
        (lambda x: x * jnp.minimum(jnp.max(x), 0), "O"),  # a factor that may be 0
        (lambda x: jax.lax.cond(jnp.sum(x) > 0, jnp.tanh, jax.nn.sigmoid, x) @ W, "OA"),
        (lambda x: jnp.sort(x) @ W, "OA"),
        (lambda x: x[jnp.argsort(x)] @ W, "OA"),
        (lambda x: jax.lax.dynamic_slice(x, (jnp.argmax(x),), (3,)), "O"),
        (lambda x: jnp.where(jnp.sum(x) > 0, x, -x), "O"),
        # A complex array is no place to cut: neither its slopes nor its kernel are real.
        (lambda x: jnp.abs(jnp.fft.fft(x @ W)) @ V, "AOA"),
        (lambda x: jnp.asarray(V)[jnp.argmax(x[:4])], "AO"),
        (lambda x: mixing(x @ W) @ V, "AOA"),
        (lambda x: curved(x) @ W, "OA"),
        (lambda x: mixing_back(x @ W) @ V, "AOA"),
        (lambda x: jax.lax.scan(lambda z, _: (jnp.tanh(z), None), x, None, 2)[0] @ W, "OA"),
    ],
)
def test_structure(encode, expected):
    assert kinds(encode) == expected


def test_a_custom_rule_is_the_derivative_not_its_body():
    """J is what JAX differentiates: the honest rule says 2x, although tanh has other slopes."""
    norms = jaxcae.contractive_penalty(lambda p, x: honest(x), "chain")((), jnp.ones((1, 6)))
    np.testing.assert_allclose(norms, 4 * 6, rtol=1e-6)
    for encode in (honest, mixing, curved, straight_through, mixing_back, reversible):
        exact = [
            jaxcae.contractive_penalty(lambda p, x, f=encode: f(x @ W), method)(
                (), jnp.ones((2, 6))
            )
            for method in ("chain", "reverse")
        ]
        np.testing.assert_allclose(*exact, rtol=1e-6)


def test_parameters_may_be_hidden_in_the_closure_of_an_outer_transformation():
    xs = jnp.ones((2, 6))

    def by_closure(w):
        return jaxcae.contractive_penalty(lambda p, x: jnp.tanh(x @ w))((), xs).sum()

    def by_argument(w):
        return jaxcae.contractive_penalty(lambda w, x: jnp.tanh(x @ w))(w, xs).sum()

    np.testing.assert_allclose(
        jax.grad(by_closure)(W), jax.jit(jax.grad(by_argument))(W), rtol=1e-6
    )


def test_a_module_with_dropout_off_is_still_a_chain():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.Dropout(0.5, deterministic=True)(nn.relu(nn.Dense(5)(x))))

    params = Net().init(jax.random.key(0), jnp.ones(6))
    assert kinds(lambda x: Net().apply(params, x)) == "AEA"


@pytest.mark.parametrize(
    ("encode", "xs", "message"),
    [
        (lambda p, x: (x, x), jnp.ones((2, 3)), "one array"),
        (lambda p, x: jnp.argsort(x), jnp.ones((2, 3)), "floating point"),
        (lambda p, x: x * 1.0, jnp.ones((2, 3), jnp.int32), "floating point"),
    ],
)
def test_what_has_no_jacobian_is_refused(encode, xs, message):
    with pytest.raises(TypeError, match=message):
        jaxcae.contractive_penalty(encode)((), xs)


def test_a_loop_without_a_reverse_mode_is_named_and_still_has_values():
    def looped(p, x):
        return jax.lax.while_loop(lambda z: jnp.max(z) > 0.1, lambda z: z / 2, x) @ W

    xs = jnp.ones((2, 6))
    with pytest.raises(ValueError, match="while_loop"):
        jaxcae.contractive_penalty(looped)((), xs)
    norms = jaxcae.contractive_penalty(looped, "forward")((), xs)
    np.testing.assert_allclose(norms, np.sum(np.square(W / 16)), rtol=1e-6)
    # Its body runs such a loop, but its derivative does not.
    jaxcae.contractive_penalty(lambda p, x: jax.scipy.special.gammainc(1.5, x) @ W)((), xs)


@pytest.mark.parametrize("method", ["chain", "forward", "reverse"])
def test_encoders_through_complex_numbers(method):
    """A power spectrum, against its Jacobian in full."""

    def encode(w, x):
        return jnp.abs(jnp.fft.rfft(jnp.tanh(x @ w))) ** 2

    xs = jnp.stack([jnp.linspace(-1, 1, 6), jnp.cos(jnp.arange(6.0))])
    jacobians = jax.vmap(jax.jacfwd(lambda x: encode(W, x)))(xs)
    norms = jaxcae.contractive_penalty(encode, method)(W, xs)
    np.testing.assert_allclose(norms, jnp.sum(jacobians**2, (1, 2)), rtol=1e-5)
