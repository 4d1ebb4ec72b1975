"""GroupNorm and squeeze gates: what is elementwise but for a few numbers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcae
from jaxcae.jacobian import across, bound, low_rank
from jaxcae.jacobian.bound import Bound
from jaxcae.jacobian.chain import Prepared
from jaxcae.jacobian.plan import End, make_plan
from jaxcae.jacobian.program import trace_encoder
from jaxcae.jacobian.readings import readings
from tests.some import some
from tests.test_engine_graphs import LAYERS, D, H, K, step_flops

RNG = np.random.default_rng(0)
WIDTHS = (10, 12, 5)


def group_norm(a, groups):
    z = a.reshape(groups, -1)
    centred = z - z.mean(1, keepdims=True)
    return (centred * jax.lax.rsqrt(z.var(1, keepdims=True) + 0.1)).reshape(-1)


def interleaved(a, groups):
    z = a.reshape(-1, groups)
    return ((z - z.mean(0)[None]) * jax.lax.rsqrt(z.var(0) + 0.1)[None]).reshape(-1)


def squeeze(a, p):
    return a * jax.nn.sigmoid(jax.nn.relu(a @ p[2]) @ p[3])


def rolled(a, groups):
    """Gate each group by the mean of another."""
    z = a.reshape(groups, -1)
    return (z * jnp.roll(jax.nn.sigmoid(z.mean(1)), 1)[:, None]).reshape(-1)


def summed(a, groups):
    """Gate each group by its mean and all others'."""
    z = a.reshape(groups, -1)
    return (z * jax.nn.sigmoid(jnp.cumsum(z.mean(1)))[:, None]).reshape(-1)


# Name, encoder, the blocks and the columns that are found.
ENCODERS = {
    "group norm": (lambda p, x: group_norm(jnp.tanh(x @ p[0]), 3) @ p[1], 3, 2),
    "group norm before": (lambda p, x: jnp.tanh(group_norm(x @ p[0], 4) * p[4]) @ p[1], 4, 2),
    "interleaved groups": (lambda p, x: interleaved(jnp.tanh(x @ p[0]), 3) @ p[1], 3, 2),
    "Flax": (
        lambda p, x: nn.silu(
            nn.GroupNorm(3).apply({"params": {"scale": p[4], "bias": p[4]}}, (x @ p[0])[None])[0]
        )
        @ p[1],
        3,
        2,
    ),
    "squeeze": (lambda p, x: squeeze(jnp.tanh(x @ p[0]), p) @ p[1], 1, 3),
    "squeeze before": (lambda p, x: jnp.tanh(squeeze(x @ p[0], p)) @ p[1], 1, 3),
    "both": (lambda p, x: squeeze(group_norm(jnp.tanh(x @ p[0]), 3), p) @ p[1], 1, 9),
    "norm of a linear code": (lambda p, x: group_norm(x @ p[0], 3), 3, 2),
    "norm of the input": (lambda p, x: group_norm(x, 2) @ p[0], 2, 2),
    "gate of a linear code": (lambda p, x: squeeze(x @ p[0], p), 1, 3),
    "softmax": (lambda p, x: jax.nn.softmax(jnp.tanh(x @ p[0])) @ p[1], 1, 2),
    "the largest": (
        lambda p, x: (lambda a: a + a**2 * jnp.tanh(a[jnp.argmax(a)]))(x @ p[0]) @ p[1], 1, 1
    ),
    "groups gate one another": (lambda p, x: rolled(x @ p[0], 3) @ p[1], 1, 3),
    "groups gate those after": (lambda p, x: summed(jnp.tanh(x @ p[0]), 3) @ p[1], 1, 3),
}  # fmt: skip


def drawn(*shapes):
    return [jnp.asarray(RNG.normal(size=shape)) for shape in shapes]


def parameters():
    d, h, k = WIDTHS
    return drawn((d, h), (h, k), (h, 3), (3, h), (h,))


def reading(encode, params, xs):
    """Read an encoder as matrix, one stretch of low rank, and matrix."""
    encoder, xs = trace_encoder(encode, params, xs)
    (structure,) = (
        s for s in readings(encoder.program) if any(segment.rank for segment in s.segments)
    )
    return encoder, structure


KEPT = ["interleaved groups", "squeeze before", "norm of the input", "groups gate one another"]


@pytest.mark.parametrize("name", some(ENCODERS, KEPT))
@pytest.mark.parametrize("metric", some([None, (7, WIDTHS[0]), WIDTHS[:1]], [WIDTHS[:1]]))
def test_inner_products_are_exact_with_any_metric(name, metric, x64):
    encode, blocks, columns = ENCODERS[name]
    params, (xs,) = parameters(), drawn((2, WIDTHS[0]))
    factor = None if metric is None else drawn(metric)[0]
    encoder, structure = reading(encode, params, xs)
    (rank,) = (segment.rank for segment in structure.segments if segment.rank)
    assert (rank.blocks, rank.columns) == (blocks, columns)

    def jacobian(x):
        j = jax.jacrev(lambda x: encode(params, x))(x)
        if factor is None:
            return j
        return j * factor[None] if factor.ndim == 1 else j @ factor.T

    @jax.jit
    def found_and_true(xs):
        end = None if factor is None else End(factor.shape[0], factor.ndim == 1)
        prepared = Prepared(Bound(structure, encoder), make_plan(structure, 100, end), factor)
        a, b = (prepared.at(x) for x in xs)
        first, second = (jacobian(x) for x in xs)
        return (
            (prepared.norm(a), prepared.inner(a, b), a.code),
            (jnp.sum(first**2), jnp.sum(first * second), encode(params, xs[0])),
        )

    for found, true in zip(*found_and_true(xs), strict=True):
        np.testing.assert_allclose(found, true, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", some(["group norm", "squeeze", "Flax"], ["group norm"]))
def test_auto_takes_it_and_its_gradient_is_exact(name, x64):
    d, h, k = 60, 48, 24
    params, (xs,) = drawn((d, h), (h, k), (h, 3), (3, h), (h,)), drawn((64, d))
    encode = ENCODERS[name][0]
    plan = jaxcae.explain(encode, params, xs)
    assert "low rank" in [segment.kind for segment in plan.segments]
    assert "columns" in str(plan)

    def both(method):
        penalty = jaxcae.contractive_penalty(encode, method)
        return jax.jit(jax.value_and_grad(lambda p: jnp.sum(penalty(p, xs) * jnp.arange(64.0))))

    for a, b in zip(*(jax.tree.leaves(both(m)(params)) for m in ("auto", "reverse")), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


NARROW = (*LAYERS, (H, 8), (8, H))
COSTS = {
    "group norm, before": (lambda p, x: jnp.tanh(group_norm(x @ p[0], 8)) @ p[1], LAYERS, 2.6),
    "group norm, after": (lambda p, x: group_norm(jnp.tanh(x @ p[0]), 8) @ p[1], LAYERS, 2.8),
    "squeeze to 8, after": (lambda p, x: squeeze(jnp.tanh(x @ p[0]), p) @ p[1], NARROW, 4.3),
    "squeeze to 16, before": (
        lambda p, x: jnp.tanh(squeeze(x @ p[0], p)) @ p[1],
        (*LAYERS, (H, 16), (16, H)),
        3.8,
    ),
}


@pytest.mark.parametrize("name", some(COSTS, ["group norm, before"]))
def test_a_step_keeps_to_its_price(name):
    """Times a plain step, 784-256-64, batch 128; reverse mode takes 5 to 37."""
    assert (D, H, K) == (784, 256, 64)
    encode, shapes, allowed = COSTS[name]
    plain, exact = (step_flops(encode, shapes, wanted) for wanted in (False, True))
    assert exact / plain <= allowed


def changed(owner, name, change):
    def apply(patch):
        whole = getattr(owner, name)
        patch.setattr(owner, name, lambda *a, **k: change(whole(*a, **k)))

    return apply


MUTANTS = {
    "columns do not meet": ("squeeze", changed(across.RankAcross, "_pairs", lambda m: 0 * m)),
    "columns do not meet the diagonal": (
        "group norm",
        changed(across.RankAcross, "_at", lambda c: c._replace(left_images=0 * c.left_images)),
    ),
    "numbers are held": (
        "squeeze",
        changed(bound.Bound, "_low_rank", lambda f: (f[0], [f[1][0], *(0 * c for c in f[1][1:])])),
    ),
    "blocks are in another order": (
        "interleaved groups",
        changed(low_rank, "_blocks", lambda order: np.arange(12)),
    ),
    "every number has a block": (
        "groups gate one another",
        changed(low_rank, "_blocks", lambda order: np.arange(12)),
    ),
    "all is elementwise once numbers are held": (
        "sorted beside a number",
        lambda patch: patch.setattr(low_rank, "propagate", _everything),
    ),
}


def sorted_beside(p, x):
    a = x @ p[0]
    return jnp.sort(a) * jnp.tanh(a.mean()) @ p[1]


WRONG = {"sorted beside a number": sorted_beside}


def _everything(equations, facts):
    for eqn in equations:
        facts.update(dict.fromkeys(eqn.outvars, low_rank.EVERYTHING))


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_form_gives_other_numbers(name, monkeypatch, x64):
    encoder, breaks = MUTANTS[name]
    encode = WRONG[encoder] if encoder in WRONG else ENCODERS[encoder][0]
    params, (xs,) = parameters(), drawn((2, WIDTHS[0]))
    expected = jax.jit(jaxcae.contractive_penalty(encode, "reverse"))(params, xs)

    def error():
        traced, x = trace_encoder(encode, params, xs)
        structure = readings(traced.program)[-1]

        def norms(x):
            prepared = Prepared(Bound(structure, traced), make_plan(structure, 100))
            return jax.vmap(lambda x: prepared.norm(prepared.at(x)))(x)

        return float(jnp.max(jnp.abs(jax.jit(norms)(x) / expected - 1)))

    assert error() < 1e-11
    breaks(monkeypatch)
    assert error() > 1e-3
