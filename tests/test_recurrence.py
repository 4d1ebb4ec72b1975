"""Recurrent encoders: which steps are read, what they cost, and that norms are exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcae
from jaxcae.jacobian import recurrence
from jaxcae.jacobian.bound import Bound
from jaxcae.jacobian.cost import estimate
from jaxcae.jacobian.program import trace_encoder
from jaxcae.jacobian.step import pays
from jaxcae.jacobian.structure import read_structure

T, C, N, K = 4, 2, 3, 2


def split(a, n):
    return jnp.split(a, n)


def gru_cell(p, h, x):
    (u, r, m), (du, dr, dm) = split(x @ p["x"] + p["b"], 3), split(h @ p["h"], 3)
    u, r = jax.nn.sigmoid(u + du), jax.nn.sigmoid(r + dr)
    return u * h + (1 - u) * jnp.tanh(m + r * dm)


def reset_first_cell(p, h, x):
    """As published: the reset gate stands before the product."""
    u, r, m = split(x @ p["x"] + p["b"], 3)
    n = h.shape[0]
    u, r = (jax.nn.sigmoid(g) for g in split(jnp.concatenate([u, r]) + h @ p["h"][:, : 2 * n], 2))
    return u * h + (1 - u) * jnp.tanh(m + (r * h) @ p["h"][:, 2 * n :])


def run(cell, p, x, h=None, **options):
    h = jnp.zeros(p["h"].shape[0], x.dtype) if h is None else h
    return jax.lax.scan(lambda h, v: (cell(p, h, v),) * 2, h, x, **options)


def gru(p, x):
    return run(gru_cell, p, x)[0] @ p["c"]


def lstm(p, x):
    def cell(carry, v):
        h, c = carry
        i, f, g, o = split(v @ p["x4"] + h @ p["h4"], 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

    zeros = jnp.zeros(N, x.dtype)
    return jax.lax.scan(cell, (zeros, zeros), x)[0][0] @ p["c"]


def stacked(p, x):
    """Two layers, all states of the second averaged; the first starts from the sample."""
    first = run(gru_cell, p, x, jnp.tanh(x[0, :1] * p["c"][:, 0]))[1]
    second = run(gru_cell, p | {"x": p["h"]}, first)[1]
    return jnp.mean(second, 0) @ p["c"]


def both_ways(p, x):
    """A forward and a backward scan, joined; products with x stand before the scans."""
    q = p | {"x": jnp.eye(3 * N, dtype=x.dtype), "b": 0 * p["b"]}
    ends = [run(gru_cell, q, x @ p["x"], reverse=reverse)[0] for reverse in (False, True)]
    return jnp.concatenate(ends) @ jnp.concatenate([p["c"], p["c"][::-1]])


def masked(p, x):
    """Steps after the fourth do not count; a counter is carried, and constants are sliced."""
    mask = jnp.arange(x.shape[0]) != 2

    def cell(carry, at):
        h, n = carry
        v, keep = at
        return (jnp.where(keep, gru_cell(p, h, v) * (1 + 0.1 * n), h), n + 1), None

    start = (jnp.zeros(N, x.dtype), jnp.zeros((), jnp.int32))
    return jax.lax.scan(cell, start, (x, mask))[0][0] @ p["c"]


def projected(p, x):
    """A product after the gates: the carry is narrower than the units."""

    def cell(h, v):
        new = jnp.tanh(v @ p["x"][:, :N] + h @ p["h"][:K, :N])
        return new @ p["c"], new[:1] * 2

    code, ys = jax.lax.scan(cell, jnp.zeros(K, x.dtype), x)
    return jnp.concatenate([code, ys.reshape(-1)])


def in_rows(p, x):
    """A carry of two rows, elementwise alone: a leaky sum."""

    def cell(s, v):
        s = 0.7 * s + jnp.tanh(v)[None] * jnp.ones((2, 1), x.dtype)
        return jnp.sin(s), None

    return jax.lax.scan(cell, jnp.zeros((2, C), x.dtype), x)[0].reshape(-1) * p["c"].reshape(-1)[:4]


def normalised(p, x):
    """A step with a LayerNorm in it: stages, whose kernels would take more work than the step."""

    def cell(h, v):
        z = v @ p["x"][:, :N] + h @ p["h"][:, :N]
        return jnp.tanh((z - z.mean()) / jnp.sqrt(z.var() + 1e-3)), None

    return jax.lax.scan(cell, jnp.zeros(N, x.dtype), x)[0] @ p["c"]


def attending(p, x):
    """The sample is read whole in every step: it is a constant of the scan."""

    def cell(h, v):
        return jnp.tanh(v @ p["x"][:, :N] + h @ p["h"][:, :N] + x[-1] @ p["x"][:, :N]), None

    return jax.lax.scan(cell, jnp.zeros(N, x.dtype), x)[0] @ p["c"]


def own_kernels(p, x):
    """Every step has a kernel of its own."""

    def cell(h, at):
        v, w = at
        return jnp.tanh(v @ p["x"][:, :N] + h @ w), None

    kernels = jnp.stack([p["h"][:, :N]] * T)
    return jax.lax.scan(cell, jnp.zeros(N, x.dtype), (x, kernels))[0] @ p["c"]


READ = {"gru": gru, "lstm": lstm, "stacked": stacked, "both ways": both_ways, "masked": masked,
        "normalised": normalised, "projected": projected, "in rows": in_rows,
        "reset first": lambda p, x: run(reset_first_cell, p, x)[0] @ p["c"],
        "all states": lambda p, x: run(gru_cell, p, x)[1].reshape(-1)}  # fmt: skip
OPAQUE = {"attending": attending, "own kernels": own_kernels}


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


def params():
    names = {"x": (C, 3 * N), "h": (N, 3 * N), "b": (3 * N,), "c": (N, K),
             "x4": (C, 4 * N), "h4": (N, 4 * N)}  # fmt: skip
    return dict(zip(names, arrays(*names.values()), strict=True))


def cells(encode):
    p = jax.tree.map(jnp.float32, params())
    encoder, _ = trace_encoder(encode, p, jnp.zeros((1, T, C)))
    segments = read_structure(encoder.program).segments
    found = [recurrence._cells(s) for s in segments if s.kind == "opaque"]
    return [cell for each in found for cell in each.values()]


@pytest.mark.parametrize("name", READ | OPAQUE)
def test_a_step_is_read_where_it_is_proved_and_else_stays_opaque(name):
    found = cells((READ | OPAQUE)[name])
    assert len(found) == {"stacked": 2, "both ways": 2}.get(name, 1)
    assert all((cell is not None) == (name in READ) for cell in found)


@pytest.mark.slow  # a GRU and an LSTM stand in the contract table, before an independent reference
@pytest.mark.parametrize("name", READ | OPAQUE)
def test_norms_and_gradients_are_those_of_explicit_jacobians(name, x64):
    encode = (READ | OPAQUE)[name]
    p, (xs,) = params(), arrays((3, T, C))
    penalty = jaxcae.contractive_penalty(encode, "chain")
    weights = jnp.array([1.0, -0.5, 2.0])

    def explicit(p, xs):
        return jax.vmap(lambda x: jnp.sum(jax.jacrev(lambda x: encode(p, x))(x) ** 2))(xs)

    def both(f):
        return jax.value_and_grad(lambda p: jnp.sum(weights * f(p, xs)))

    expected, found = (jax.jit(both(f))(p) for f in (explicit, penalty))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-11, atol=1e-11)


def test_vectors_pass_kernels_or_one_matrix_made_of_them(x64, monkeypatch):
    """One vector passes four kernels from each of h and x; many, two matrices made of these."""
    monkeypatch.setattr(recurrence, "pays", lambda *_: True)  # for one vector it does not
    encoder, xs = trace_encoder(lstm, params(), arrays((1, T, C))[0])
    bound = Bound(read_structure(encoder.program), encoder)

    def pull(rows):
        return bound.linearize(0, (xs[0],), forward=False, rows=rows)[1]

    one, many = (jax.jit(jax.vmap(pull(rows)))(jnp.eye(N)) for rows in (1, 100))
    np.testing.assert_allclose(one, many, rtol=1e-11, atol=1e-12)
    for rows, products in ((1, 8), (100, 4)):
        assert str(jax.make_jaxpr(pull(rows))(jnp.ones(N))).count("dot_general[") == products


def test_a_step_that_more_work_would_come_of_stays_opaque():
    for encode, expected in ((gru, True), (normalised, False)):
        (cell,) = cells(encode)
        assert pays(cell.stages, 8) is expected


# Steps, units and code, the most plain steps that the exact one may take, and what it took when
# every vector passed the scan alone.
COSTS = {"gru": (gru, 64, 1, 32, 8, 5.0, 9.2), "large gru": (gru, 128, 3, 64, 16, 8.0, 17.3)}


@pytest.mark.parametrize("name", COSTS)
def test_a_step_of_training_keeps_to_its_price(name):
    """Operations of the traced programs, where a scan's body counts as often as it runs."""
    encode, steps, features, units, code, most, before = COSTS[name]
    names = {"x": (features, 3 * units), "h": (units, 3 * units), "b": (3 * units,),
             "c": (units, code)}  # fmt: skip
    p = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in names.items()}
    xs = jax.ShapeDtypeStruct((64, steps, features), jnp.float32)
    decoder = jax.ShapeDtypeStruct((code, steps * features), jnp.float32)

    def loss(method):
        def value(p, decoder, xs):
            if method:
                codes, norms = jaxcae.encode_and_penalty(encode, method)(p, xs)
            else:
                codes, norms = jax.vmap(encode, (None, 0))(p, xs), 0.0
            return jnp.mean((codes @ decoder - xs.reshape(64, -1)) ** 2) + jnp.mean(norms)

        return jax.value_and_grad(value, (0, 1))

    plain, auto, reverse = (estimate(loss(m), p, decoder, xs) for m in ("", "auto", "reverse"))
    assert auto.flops / plain.flops <= most
    assert reverse.flops / plain.flops >= before
    assert auto.bytes <= reverse.bytes / 2
