"""The engine's tests can fail: each proof or term broken on purpose gives another number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcae
from jaxcae.jacobian import (
    carried,
    chain,
    control_variate,
    corrections,
    proofs,
    reorder,
    rules,
    structure,
)

RNG = np.random.default_rng(0)
SHAPES = ((6, 5), (6, 5), (5, 3), (6, 3), (5, 5), (5, 5), (6, 8), (8, 3))


def normalised(z):
    return (z - z.mean()) * jax.lax.rsqrt(z.var() + 1e-6)


def residual(h, w):
    return h + jnp.tanh(h @ w)


@jax.custom_vjp
def clipped(v):
    return v


clipped.defvjp(lambda v: (v, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))

ENCODERS = {
    "layers": lambda p, x: jnp.tanh(x @ p[0]) @ p[2],
    "bilinear": lambda p, x: (x @ p[0]) * (x @ p[1]) @ p[2],
    "gate": lambda p, x: (x @ p[0]) * jax.nn.sigmoid(x @ p[1]) @ p[2],
    "skip": lambda p, x: x @ p[3] + jnp.tanh(x @ p[0]) @ p[2],
    "norm": lambda p, x: normalised(jnp.tanh(normalised(x @ p[0]))) @ p[2],
    "sorted": lambda p, x: jnp.sort(x @ p[0]) @ p[2],
    "turned": lambda p, x: (
        jax.nn.softplus(jnp.tanh(x @ p[6]).reshape(2, 2, 2).transpose(2, 0, 1)).reshape(-1) @ p[7]
    ),
    "residual": lambda p, x: residual(residual(x @ p[0], p[4]), p[5]) @ p[2],
    "clipped": lambda p, x: clipped(jnp.tanh(x @ p[0])) @ p[2],
}


def told(name, **what):
    """Tell the engine something untrue of a primitive."""
    return lambda patch: patch.setitem(
        rules._TABLE, name, rules.Rule(what.get("linear", rules._linear(False)), "same" in what)
    )


def without(owner, name, change):
    """Replace a function by one whose result is changed."""

    def apply(patch):
        whole = getattr(owner, name)
        patch.setattr(owner, name, lambda *a, **k: change(whole(*a, **k)))

    return apply


def dropped(*fields):
    """Leave out terms of a sample's share of the normalisations."""

    def apply(patch):
        inner = corrections.Corrections.inner

        def less(self, found, a, b):
            zero = {name: [0 * v for v in getattr(a, name)] for name in fields}
            return inner(self, found, *[a._replace(**zero)] * 2)

        patch.setattr(corrections.Corrections, "inner", less)

    return apply


MUTANTS = {
    "a product is linear in both": (
        "bilinear", "chain", told("mul", linear=rules._linear(True))),
    "sorting is elementwise": ("sorted", "chain", told("sort", same=True)),
    "sorting is linear": ("sorted", "chain", told("sort", linear=rules._linear(True))),
    "every rule is linear": (
        "clipped", "chain",
        lambda patch: patch.setattr(proofs._RuleTrace, "holds", lambda *_: True)),
    "nothing undoes a reordering": (
        "turned", "chain",
        without(reorder, "_reordering", lambda found: found and (found[0], found[0]))),
    "a skip adds nothing by itself": (
        "skip", "chain", without(chain.Prepared, "_meet_across", lambda a: a._replace(
            constant=a.constant * 0))),
    "a skip and a layer do not meet": (
        "skip", "chain", without(chain.Prepared, "_meet_across", lambda a: a._replace(
            vector=a.vector * 0))),
    "the edges of a gate do not meet": (
        "gate", "chain", without(chain.Prepared, "_meet_across", lambda a: a._replace(
            matrix=a.matrix * jnp.kron(jnp.eye(2), jnp.ones((5, 5)))))),
    "scales are forgotten": (
        "layers", "chain", without(carried, "balanced", lambda found: (found[0], found[1] ** 0))),
    "a normalisation is a scaling": ("norm", "chain", dropped("tails", "heads", "images")),
    "normalisations do not meet": ("norm", "chain", dropped("heads")),
    "a norm's exponent": (
        "norm", "chain", without(structure, "find_scale", lambda s: s and s._replace(
            exponent=2 * s.exponent))),
    "an anchor's gram": (
        "residual", "control_variate",
        without(control_variate, "_columns", lambda found: (found[0], 1.1 * found[1]))),
    "an anchor's constant": (
        "residual", "control_variate",
        without(control_variate, "_columns", lambda found: (1.1 * found[0], found[1]))),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_engine_gives_other_numbers(name, monkeypatch, x64):
    encoder, method, breaks = MUTANTS[name]
    encode = ENCODERS[encoder]
    params = [jnp.asarray(RNG.normal(size=shape)) for shape in SHAPES]
    xs = jnp.asarray(RNG.normal(size=(64, 6)))
    options = {}
    if method == "control_variate":  # with all probes it is exact, whatever its anchor
        options = {"num_probes": 3, "distribution": "orthonormal"}

    def error():
        key = jax.random.key(0)
        norms = jaxcae.contractive_penalty(encode, method, **options)(params, xs, key)
        return float(jnp.max(jnp.abs(norms / expected - 1)))

    expected = jaxcae.contractive_penalty(encode, "reverse")(params, xs)
    assert error() < 1e-11
    breaks(monkeypatch)
    assert error() > 1e-3
