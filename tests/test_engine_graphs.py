"""Graphs: what skips, gates and normalisations cost, and inner products between any two ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

import jaxcae
from jaxcae.jacobian import rules
from jaxcae.jacobian.bound import Bound
from jaxcae.jacobian.chain import Prepared
from jaxcae.jacobian.plan import End, make_plan
from jaxcae.jacobian.program import trace_encoder
from jaxcae.jacobian.structure import read_structure
from tests.some import some

BATCH, D, H, K = 128, 784, 256, 64
LAYERS = ((D, H), (H, K))


def two(params, x):
    return jnp.tanh(x @ params[0]) @ params[1]


def layer_norm(z):
    return (z - z.mean()) * jax.lax.rsqrt(z.var() + 1e-6)


def placed(x):
    mesh = jax.make_mesh((1,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.lax.with_sharding_constraint(x, everywhere)


def solved(a):
    lower = jnp.tril(jnp.ones((H, H))) / H + jnp.eye(H)
    return jax.scipy.linalg.solve_triangular(lower, a, lower=True)


# Name, encoder, shapes of its parameters, and how many times a plain step the exact one may take.
COSTS = {
    "sharding constraint": (lambda p, x: two(p, placed(x)), LAYERS, 1.85),
    "reshape between activations": (
        lambda p, x: jax.nn.softplus(jnp.tanh(x @ p[0]).reshape(16, 16)).reshape(-1) @ p[1],
        LAYERS,
        1.85,
    ),
    "cumulative sum": (lambda p, x: two(p, jnp.cumsum(x[::-1])), LAYERS, 1.85),
    "concatenated skip": (
        lambda p, x: jnp.concatenate([x, jnp.tanh(x @ p[1])]) @ jnp.concatenate([p[0], p[2]]),
        ((D, K), (D, H), (H, K)),
        2.1,
    ),
    "gated linear unit": (
        lambda p, x: (x @ p[0]) * jax.nn.sigmoid(x @ p[1]) @ p[2],
        ((D, H), (D, H), (H, K)),
        3.3,
    ),
    "normalised code": (lambda p, x: layer_norm(two(p, x)), LAYERS, 2.1),
    "normalised hidden": (lambda p, x: layer_norm(jnp.tanh(x @ p[0])) @ p[1], LAYERS, 2.4),
    "waist": (lambda p, x: jnp.tanh(two(p, x) @ p[2]) @ p[3], (*LAYERS, (K, H), (H, D)), 32),
}
MORE_COSTS = {
    "transpose between activations": (
        lambda p, x: (
            jax.nn.softplus(jnp.tanh(x @ p[0] + p[0][0]).reshape(32, 8).T).reshape(-1) @ p[1]
        ),
        LAYERS,
        1.85,
    ),
    "device put": (lambda p, x: two(p, jax.device_put(x)), LAYERS, 1.85),
    "checkpoint name": (
        lambda p, x: checkpoint_name(jnp.tanh(x @ p[0]), "h") @ p[1],
        LAYERS,
        1.85,
    ),
    "barrier": (
        lambda p, x: jax.lax.optimization_barrier(jnp.tanh(x @ p[0])) @ p[1],
        LAYERS,
        1.85,
    ),
    "scatter": (
        lambda p, x: two(p, jnp.zeros(D).at[(jnp.arange(D) * 5) % D].add(x)),
        LAYERS,
        1.85,
    ),
    "triangular solve": (lambda p, x: jnp.tanh(solved(x @ p[0])) @ p[1], LAYERS, 1.85),
    "linear solve": (
        lambda p, x: jnp.tanh(jnp.linalg.solve(jnp.eye(H) * 2 + jnp.ones((H, H)), x @ p[0])) @ p[1],
        LAYERS,
        1.85,
    ),
    "cumulative sum of a hidden array": (
        lambda p, x: jnp.tanh(jnp.cumsum(x @ p[0])) @ p[1],
        LAYERS,
        1.85,
    ),
    "condition on a constant": (
        lambda p, x: jax.lax.cond(p[1].sum() > 0, jnp.tanh, jax.nn.sigmoid, x @ p[0]) @ p[1],
        LAYERS,
        1.85,
    ),
    "affine scan": (
        lambda p, x: two(p, jax.lax.scan(lambda c, w: (c * w, None), x, jnp.ones(3))[0]),
        LAYERS,
        1.85,
    ),
    "Fourier filter": (
        lambda p, x: two(p, jnp.fft.irfft(jnp.fft.rfft(x) * jnp.ones(D // 2 + 1), n=D)),
        LAYERS,
        1.95,
    ),
    "linear skip": (
        lambda p, x: x @ p[0] + jnp.tanh(x @ p[1]) @ p[2],
        ((D, K), (D, H), (H, K)),
        2.1,
    ),
    "two branches": (
        lambda p, x: jnp.concatenate([jnp.tanh(x @ p[0]), jax.nn.softplus(x @ p[1])]) @ p[2],
        ((D, H // 2), (D, H // 2), (H, K)),
        2.1,
    ),
    "maxout": (
        lambda p, x: jnp.maximum(x @ p[0], x @ p[1]) @ p[2],
        ((D, H), (D, H), (H, K)),
        3.3,
    ),
    "unit code": (
        lambda p, x: (lambda z: z / jnp.sqrt(jnp.sum(z * z) + 1e-12))(two(p, x)),
        LAYERS,
        2.1,
    ),
    "unit input": (lambda p, x: two(p, x / jnp.sqrt(jnp.sum(x * x))), LAYERS, 2.3),
    "normalised before": (lambda p, x: jnp.tanh(layer_norm(x @ p[0])) @ p[1], LAYERS, 2.4),
}


def step_flops(encode, shapes, with_penalty):
    """Count a training step with a mirrored two-layer decoder, by XLA."""
    xs = jax.ShapeDtypeStruct((BATCH, D), jnp.float32)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    size = jax.eval_shape(encode, shapes, jax.ShapeDtypeStruct((D,), jnp.float32)).size
    decoder = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((size, H), (H, D))]

    def loss(params, decoder, xs):
        if with_penalty:
            codes, norms = jaxcae.encode_and_penalty(encode)(params, xs)
        else:
            codes, norms = jax.vmap(encode, (None, 0))(params, xs), jnp.zeros(BATCH)
        x_hats = jax.nn.softplus(codes @ decoder[0]) @ decoder[1]
        return jnp.mean(jnp.sum((x_hats - xs) ** 2, -1)) + jnp.mean(norms)

    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    return step.lower(shapes, decoder, xs).compile().cost_analysis()["flops"]


@pytest.mark.parametrize(
    "name", [*COSTS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_COSTS)]
)
def test_a_step_keeps_to_its_price(name):
    encode, shapes, allowed = (COSTS | MORE_COSTS)[name]
    plain, exact = (step_flops(encode, shapes, wanted) for wanted in (False, True))
    assert exact / plain <= allowed


def test_a_gram_is_carried_past_a_normalisation(x64):
    def encode(p, x):
        return jnp.tanh(layer_norm(x @ p[0])) @ p[1]

    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.normal(size=shape)) for shape in ((30, 12), (12, 10))]
    xs = jnp.asarray(rng.normal(size=(64, 30)))
    assert "meet             at 3" in str(jaxcae.explain(encode, params, xs))

    def values(method):
        penalty = jaxcae.contractive_penalty(encode, method)
        return jax.jit(lambda p: (penalty(p, xs), jax.grad(lambda p: penalty(p, xs).sum())(p)))

    for a, b in zip(
        *(jax.tree.leaves(values(m)(params)) for m in ("chain", "reverse")), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


# --------------------------------------------------------------------------- inner products

RNG = np.random.default_rng(0)


def arrays(*shapes):
    return [jnp.asarray(RNG.normal(size=shape)) for shape in shapes]


ENCODERS = {
    "two layers": (two, [(6, 5), (5, 3)]),
    "deep": (lambda p, x: jnp.tanh(jnp.tanh(x @ p[0]) @ p[1]), [(6, 5), (5, 3)]),
    "gated": (lambda p, x: (x @ p[0]) * jax.nn.sigmoid(x @ p[1]) @ p[2],
              [(6, 5), (6, 5), (5, 3)]),
    "skip": (lambda p, x: x @ p[0] + jnp.tanh(x @ p[1]) @ p[2], [(6, 3), (6, 5), (5, 3)]),
    "normalised": (lambda p, x: layer_norm(jnp.tanh(layer_norm(x @ p[0])) @ p[1]),
                   [(6, 5), (5, 3)]),
    "unit input": (lambda p, x: jnp.tanh(x / jnp.sqrt(jnp.sum(x * x)) @ p[0] + p[2]) @ p[1],
                   [(6, 5), (5, 3), (5,)]),
    "opaque": (lambda p, x: jnp.sort(x @ p[0]) @ p[1], [(6, 5), (5, 3)]),
    "reordered": (lambda p, x: jax.nn.softplus(
        (jnp.tanh(x @ p[0]).reshape(2, 3, 1).T[:, ::-1] + p[2]) * p[3]).reshape(-1)[::-1] @ p[1],
        [(6, 6), (6, 3), (1, 3, 2), (1, 3, 2)]),
}  # fmt: skip


@pytest.mark.parametrize("name", some(ENCODERS, {*ENCODERS} - {"normalised", "reordered"}))
@pytest.mark.parametrize(
    "ends", some([(None, None), ((4, 6), (2, 3)), ((6,), (3,))], [((4, 6), (2, 3))])
)
def test_inner_products_between_any_two_ends(name, ends, x64):
    """⟨A J(x) Fᵀ, A J(y) Fᵀ⟩ by matrices multiplied out."""
    encode, shapes = ENCODERS[name]
    params = arrays(*shapes)
    metric, outer = (None if shape is None else arrays(shape)[0] for shape in ends)
    xs, ys = arrays((2, 6), (2, 6))
    encoder, xs = trace_encoder(encode, params, xs)
    structure = read_structure(encoder.program)
    given = [None if m is None else End(m.shape[0], m.ndim == 1) for m in (metric, outer)]

    def jacobian(x):
        j = jax.jacrev(lambda x: encode(params, x))(x)
        if metric is not None:
            j = j * metric[None] if metric.ndim == 1 else j @ metric.T
        if outer is not None:
            j = outer[:, None] * j if outer.ndim == 1 else outer @ j
        return j

    for batch in (1, 1000):
        prepared = Prepared(
            Bound(structure, encoder), make_plan(structure, batch, *given), metric, outer
        )
        for x, y in zip(xs, ys, strict=True):
            a, b = prepared.at(x), prepared.at(y)
            np.testing.assert_allclose(a.code, encode(params, x), rtol=1e-12)
            expected = jnp.sum(jacobian(x) * jacobian(y))
            np.testing.assert_allclose(prepared.inner(a, b), expected, rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(prepared.norm(a), jnp.sum(jacobian(x) ** 2), rtol=1e-11)


def test_grams_and_forms_ask_for_full_precision_and_the_encoder_does_not():
    params, (x,) = arrays((6, 5), (5, 3)), arrays((4, 6))
    text = str(jax.make_jaxpr(jaxcae.contractive_penalty(two, "chain"))(params, x))
    products = text.split("dot_general[")[1:]
    asked = ["HIGHEST" in product.split("preferred_element_type")[0] for product in products]
    assert sum(asked) == 3  # two grams and a form
    assert len(asked) - sum(asked) == 2  # the encoder's own


# --------------------------------------------------------------------------- registration


def test_a_primitive_of_ones_own_can_be_registered():
    """As in the README: an encoder that calls it is opaque before, and a chain after."""
    turn = Primitive("quarter_turn")
    turn.def_impl(lambda x: x[::-1] * 2.0)
    turn.def_abstract_eval(lambda x: jax.core.ShapedArray(x.shape, x.dtype))
    ad.deflinear2(turn, lambda t, _: [turn.bind(t)])
    batching.defvectorized(turn)
    mlir.register_lowering(turn, mlir.lower_fun(lambda x: x[..., ::-1] * 2.0, False))
    batching.primitive_batchers[turn] = lambda args, dims: (
        jnp.flip(args[0], -1) * 2.0 if dims[0] == 0 else NotImplemented,
        dims[0],
    )

    def encode(params, x):
        return jnp.tanh(turn.bind(x @ params[0])) @ params[1]

    params, (xs,) = arrays((6, 5), (5, 3)), arrays((4, 6))
    params, xs = jax.tree.map(jnp.float32, (params, xs))

    def kinds():
        return [s.kind for s in jaxcae.explain(encode, params, xs).segments]

    expected = jaxcae.contractive_penalty(encode, "reverse")(params, xs)
    try:
        assert kinds() == ["affine", "opaque", "affine"]
        before = jaxcae.register(turn, linear=True)
        assert before is None
        assert kinds() == ["affine", "elementwise", "affine"]
        norms = jaxcae.contractive_penalty(encode)(params, xs)
        np.testing.assert_allclose(norms, expected, rtol=1e-4)
    finally:
        rules._TABLE.pop("quarter_turn", None)
    with pytest.raises(ValueError, match="say what 'x' is"):
        jaxcae.register("x")
