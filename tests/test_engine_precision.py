"""Digits: coarse products on accelerators, units that cancel, very large and small weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Literal

import jaxcae
from jaxcae.jacobian import products
from jaxcae.penalty import METHODS

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


def two(params, x):
    return jnp.tanh(x @ params[0]) @ params[1]


def three(params, x):
    return jnp.tanh(two(params, x)) @ params[2]


def exact(params, xs):
    """‖J‖² in float64, by matrices multiplied out: NumPy alone."""
    first, *others = (np.asarray(w, np.float64) for w in params)
    a = np.asarray(xs, np.float64) @ first
    jacobians = np.broadcast_to(first, (len(xs), *first.shape))
    for w in others:
        jacobians = jacobians * (1 - np.tanh(a) ** 2)[:, None] @ w
        a = np.tanh(a) @ w
    return np.sum(jacobians**2, (1, 2))


def rounded(x, bits):
    """Keep so many bits of a float32's 23, to the nearest."""
    i, k = jax.lax.bitcast_convert_type(x, jnp.uint32), 23 - bits
    i = i + (jnp.uint32(1) << (k - 1)) - 1 + ((i >> k) & 1)
    return jax.lax.bitcast_convert_type((i >> k) << k, jnp.float32)


def simulate(jaxpr, consts, arguments, bits):
    """Run a program as an accelerator does: operands of products rounded, unless told HIGHEST."""
    values = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        body = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
        if body is not None:
            found = simulate(
                getattr(body, "jaxpr", body), getattr(body, "consts", ()), inputs, bits
            )
        else:
            if eqn.primitive.name == "dot_general" and "HIGHEST" not in str(
                eqn.params["precision"]
            ):
                inputs = [rounded(a, bits) for a in inputs]
            found = eqn.primitive.bind(*inputs, **eqn.params)
            found = found if eqn.primitive.multiple_results else [found]
        values.update(zip(eqn.outvars, found, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


D, H, K, BATCH = 24, 16, 6, 8


def rows():
    """Two-layer networks: ordinary, saturated, units that cancel, a direction that all share."""
    for scale in (0.05, 1, 5):
        yield scale * RNG.normal(size=(D, H)) / 5, RNG.normal(size=(H, K)) / 4
    for remainder in (0.1, 0.03, 0.01, 0.001):
        w, v, z = (RNG.normal(size=s) / 5 for s in ((D, H // 2), (H // 2, K), (H // 2, K)))
        yield np.concatenate([w, w], 1), np.concatenate([v, remainder * z - v])
    for common in (10, 100):
        v = RNG.normal(size=(H, K)) / 4
        w = 1e-3 * (RNG.normal(size=(D, H)) + common * RNG.normal(size=(D, 1)))
        yield w, v - v.mean(0)


@pytest.fixture(scope="module")
def errors():
    """Find the largest relative errors by method: (networks, 3), in float32, TF32 and bfloat16."""
    networks = [tuple(np.float32(w) for w in row) for row in rows()]
    xs = np.float32(RNG.uniform(size=(BATCH, D)))
    expected = np.stack([exact(params, xs) for params in networks])
    stacked = tuple(np.stack(ws) for ws in zip(*networks, strict=True))
    found = {}
    for method in ("chain", "reverse"):
        closed = jax.make_jaxpr(jaxcae.contractive_penalty(two, method))(networks[0], xs)

        def run(first, last, bits, closed=closed):
            return simulate(closed.jaxpr, closed.consts, [first, last, jnp.asarray(xs)], bits)[0]

        by_bits = jax.jit(jax.vmap(jax.vmap(run, (0, 0, None)), (None, None, 0)))
        norms = np.asarray(by_bits(*stacked, jnp.array([22, 10, 7], jnp.uint32)), np.float64)
        assert (norms >= 0).all()
        found[method] = np.abs(norms / expected - 1).max(-1).T
    return found


def test_products_of_few_bits_cost_chain_no_more_digits_than_reverse(errors):
    """TF32 and bfloat16, in every row: what cancels asks for full precision."""
    assert (errors["chain"][:, 1:] <= 3 * errors["reverse"][:, 1:]).all()


def test_ordinary_units_keep_all_digits_of_float32(errors):
    assert errors["chain"][:3, 0].max() < 3e-6


@pytest.mark.slow
def test_grams_without_full_precision_would_lose_them(errors, monkeypatch):
    """Remove the request: units that cancel to a hundredth then cost ten times reverse's error."""
    params = [np.float32(w) for w in list(rows())[5]]
    xs = np.float32(RNG.uniform(size=(BATCH, D)))
    monkeypatch.setattr(products, "matmul", jnp.matmul)
    closed = jax.make_jaxpr(jaxcae.contractive_penalty(two, "chain"))(params, xs)
    norms = simulate(closed.jaxpr, closed.consts, [*params, jnp.asarray(xs)], 10)[0]
    error = np.abs(np.asarray(norms, np.float64) / exact(params, xs) - 1).max()
    assert error > 10 * errors["reverse"][5, 1]


@pytest.mark.parametrize("encode", [two, three])
def test_large_and_small_weights_neither_overflow_nor_vanish(encode):
    """Norms are ordinary numbers throughout; the squares of the weights are not."""
    shapes = ((6, 5), (5, 4), (4, 3))[: 2 if encode is two else 3]
    plain = [RNG.normal(size=shape) for shape in shapes]
    penalty = jaxcae.contractive_penalty(encode, "chain")
    reverse = jax.jit(jaxcae.contractive_penalty(encode, "reverse"))
    value_and_grad = jax.jit(
        lambda p, x: (penalty(p, x), jax.grad(lambda p: penalty(p, x).sum())(p))
    )
    mixed = np.array([1e19, 1e-19, 1, 1e12, 1e-12])
    for first in (1e19, 1e-19, 1e30, 1e-30, mixed):
        factors = np.broadcast_to(first, 5)
        params = [plain[0] * factors, plain[1] / factors[:, None], *plain[2:]]
        params = [np.float32(w) for w in params]
        xs = np.float32(RNG.normal(size=(4, 6)) / np.max(factors))
        norms, gradient = value_and_grad(params, xs)
        # Where tanh saturates, slopes keep few digits in every method.
        error, floor = np.abs(reverse(params, xs) - exact(params, xs)), 1e-5 * exact(params, xs)
        assert (np.abs(norms - exact(params, xs)) <= np.maximum(3 * error, floor)).all()
        assert all(np.isfinite(g).all() for g in gradient)


def test_no_norm_is_negative_and_gradients_do_not_stop_at_zero():
    """Units that cancel to nothing but rounding."""
    w, v = (np.float32(RNG.normal(size=s)) for s in ((30, 20), (20, 4)))
    params = [np.concatenate([w, w], 1), np.concatenate([v, -v])]
    xs = np.float32(RNG.uniform(size=(64, 30)))
    penalty = jaxcae.contractive_penalty(two, "chain")
    assert (penalty(params, xs) >= 0).all()
    shifted = [params[0], params[1] + np.float32(1e-3)]
    by_chain, by_reverse = (
        jax.grad(lambda p, m=m: jaxcae.contractive_penalty(two, m)(p, xs).sum())(shifted)[1]
        for m in ("chain", "reverse")
    )
    np.testing.assert_allclose(by_chain, by_reverse, atol=1e-2 * np.abs(by_reverse).max())


@pytest.mark.parametrize(("of_params", "of_xs"), [("float64", "float32"), ("float32", "float64")])
def test_norms_have_one_dtype_by_every_method(of_params, of_xs, x64):
    params = [jnp.asarray(RNG.normal(size=s), of_params) for s in ((6, 5), (5, 4), (4, 3))]
    xs = jnp.asarray(RNG.normal(size=(3, 6)), of_xs)
    for method in METHODS:
        norms = jax.eval_shape(jaxcae.contractive_penalty(three, method), params, xs, KEY)
        assert norms.dtype == jnp.float64, method
    for dtype in (jnp.bfloat16, jnp.float32):
        half = [w.astype(dtype) for w in params]
        for method in METHODS:
            penalty = jaxcae.contractive_penalty(three, method)
            assert jax.eval_shape(penalty, half, xs.astype(dtype), KEY).dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float64", marks=pytest.mark.slow)])
@pytest.mark.parametrize("activation", ["gelu", pytest.param("elu", marks=pytest.mark.slow)])
def test_strict_promotion_with_activations_of_ours(dtype, activation, x64):
    model = jaxcae.mlp((6, 5, 4, 3), activation)
    params = jax.tree.map(lambda a: a.astype(dtype), model.init(KEY))
    xs = jnp.ones((3, 6), dtype)
    for method in METHODS:
        penalty = jaxcae.contractive_penalty(model.encode, method)
        with jax.numpy_dtype_promotion("strict"):
            jax.eval_shape(jax.grad(lambda p, f=penalty: f(p, xs, KEY).sum()), params)
