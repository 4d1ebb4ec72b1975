"""Batches spread over devices: sharded under `jit`, in explicit meshes and inside `shard_map`."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcae
from jaxcae.devices.placement import Placement
from jaxcae.training.sources import Resident

BATCH = 8


def encoders():
    two = jaxcae.mlp((10, 6, 3), "softplus")
    yield "two layers", two.encode, two.init(jax.random.key(0)), (10,)
    deep = jaxcae.mlp((10, 8, 6, 3), "tanh", latent_activation="sigmoid")
    yield "deep", deep.encode, deep.init(jax.random.key(0)), (10,)
    conv = jaxcae.conv((6, 6, 1), (4,), 3)
    yield "convolutional", conv.encode, conv.init(jax.random.key(0)), (6, 6, 1)
    opaque = nn.Sequential([nn.Dense(6), nn.gelu, nn.LayerNorm(), nn.Dense(3)])
    yield "opaque", opaque.apply, opaque.init(jax.random.key(0), jnp.ones(10)), (10,)


@functools.cache
def encoder(wanted):
    """Make one when it is asked for: every test process imports this file, and one runs it."""
    return next(rest for name, *rest in encoders() if name == wanted)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))


def batch_of(shape):
    return jax.random.normal(jax.random.key(1), (BATCH, *shape))


def assert_trees_close(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        ("two layers", "auto", {}),
        ("deep", "chain", {"chunk_size": 1}),
        ("convolutional", "auto", {}),
        pytest.param("opaque", "forward", {"chunk_size": 3}, marks=pytest.mark.slow),
    ],
)
def test_value_and_gradient_inside_shard_map(name, method, options, mesh):
    """Each device has a part of the batch; the gradient of replicated weights is summed."""
    encode, params, shape = encoder(name)
    xs = batch_of(shape)
    penalty = jaxcae.contractive_penalty(encode, method, **options)

    def mean(params, xs):
        return penalty(params, xs).mean()

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P(), P("data")), out_specs=(P("data"), P()))
    def apart(params, xs):
        gradient = jax.grad(lambda p: jax.lax.pmean(mean(p, xs), "data"))(params)
        return penalty(params, xs), gradient

    together = jax.jit(penalty)(params, xs), jax.jit(jax.grad(mean))(params, xs)
    assert_trees_close(apart(params, xs), together)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("hutchinson", {"num_probes": 2}),
        pytest.param("hutchinson", {"distribution": "orthonormal"}, marks=pytest.mark.slow),
        ("control_variate", {}),
        pytest.param("finite_difference", {"step": 1e-2}, marks=pytest.mark.slow),
    ],
)
def test_estimators_inside_shard_map(method, options, mesh):
    """Each device estimates as if its part were a batch, by a key that it folds its index into."""
    encode, params, shape = encoder("deep")
    xs = batch_of(shape)
    penalty = jaxcae.contractive_penalty(encode, method, **options)

    def part(params, xs, key, index):
        return penalty(params, xs, jax.random.fold_in(key, index))

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P(), P("data"), P()), out_specs=P("data"))
    def apart(params, xs, key):
        return part(params, xs, key, jax.lax.axis_index("data"))

    key = jax.random.key(0)
    parts = [jax.jit(part)(params, xs[2 * i : 2 * i + 2], key, i) for i in range(4)]
    np.testing.assert_allclose(apart(params, xs, key), np.concatenate(parts), rtol=1e-4)


def test_an_ensemble_with_a_member_on_each_device(mesh):
    """The weights vary over the mesh, and the samples do not."""
    model = jaxcae.mlp((10, 6, 3))
    members = jax.vmap(model.init)(jax.random.split(jax.random.key(0), 4))
    xs = batch_of((10,))
    penalty = jaxcae.contractive_penalty(model.encode, "reverse")

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    def apart(members, xs):
        member = jax.tree.map(lambda leaf: leaf[0], members)
        hidden = jaxcae.contractive_penalty(lambda _, x: model.encode(member, x), "reverse")
        return jnp.stack([penalty(member, xs), hidden((), xs)])[None]

    together = jax.jit(jax.vmap(penalty, (0, None)))(members, xs)
    np.testing.assert_allclose(apart(members, xs), together[:, None].repeat(2, 1), rtol=2e-5)


@pytest.mark.parametrize(
    "method", ["auto", "hutchinson", pytest.param("control_variate", marks=pytest.mark.slow)]
)
def test_a_sharded_training_step_gathers_nothing(method, mesh):
    """Data parallelism by placement: the compiled step sums over devices and gathers nothing."""
    model = jaxcae.mlp((10, 8, 6, 3), "tanh")
    optimizer = optax.sgd(0.1)
    step = jaxcae.make_train_step(jaxcae.cae_loss(model, 0.1, method=method), optimizer)
    xs = batch_of((10,))

    def start():
        params = model.init(jax.random.key(0))
        return jaxcae.TrainState.create(params, optimizer, jax.random.key(1))

    alone, _ = step(start(), xs)
    everywhere = jax.device_put(start(), NamedSharding(mesh, P()))
    spread = jax.device_put(xs, NamedSharding(mesh, P("data")))
    program = jax.jit(step).lower(everywhere, spread).compile().as_text()
    assert "all-reduce" in program
    assert "all-gather" not in program
    assert "all-to-all" not in program
    together, metrics = step(everywhere, spread)
    assert metrics["loss"].sharding.is_fully_replicated
    assert_trees_close(together.params, alone.params)


@pytest.mark.parametrize("method", ["auto", "forward", "hutchinson", "control_variate"])
def test_explicit_meshes_keep_the_batch_where_it_is(method):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    encode, params, shape = encoder("deep")
    xs = batch_of(shape)
    penalty = jaxcae.contractive_penalty(encode, method)
    alone = jax.jit(penalty)(params, xs, jax.random.key(0))
    with jax.set_mesh(mesh):
        spread = jax.device_put(xs, NamedSharding(mesh, P("data")))
        norms = jax.jit(penalty)(
            jax.device_put(params, NamedSharding(mesh, P())), spread, jax.random.key(0)
        )
    assert norms.sharding.spec == P("data")
    np.testing.assert_allclose(norms, alone, rtol=2e-5)


# --------------------------------------------------------------------------- fit and evaluate


def spread_over(kind, spec, xs):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    return jax.device_put(xs, NamedSharding(mesh, spec))


@pytest.mark.parametrize(
    ("kind", "spec", "batch"),
    [
        pytest.param(AxisType.Explicit, P("data"), 8, marks=pytest.mark.slow),
        (AxisType.Explicit, P("data"), 6),  # which four devices do not divide
        pytest.param(AxisType.Auto, P("data"), 6, marks=pytest.mark.slow),
        pytest.param(AxisType.Auto, P(), 8, marks=pytest.mark.slow),
        pytest.param(AxisType.Explicit, P(), 6, marks=pytest.mark.slow),
    ],
)
def test_fit_and_evaluate_on_placed_samples(kind, spec, batch):
    """As on one device, up to rounding, wherever state and samples lie; every row counts once."""
    model, optimizer = jaxcae.mlp((10, 6, 3)), optax.sgd(0.1)
    loss = jaxcae.cae_loss(model, 0.1, method="reverse")
    xs = jax.random.normal(jax.random.key(1), (20, 10))
    start = jaxcae.TrainState.create(model.init(jax.random.key(0)), optimizer, jax.random.key(1))
    spread = spread_over(kind, spec, xs)
    (state, history), (alone, own) = (
        jaxcae.fit(loss, optimizer, start, rows, epochs=2, batch_size=batch, held_out=rows)
        for rows in (spread, xs)
    )
    assert_trees_close(state.params, alone.params)
    assert [record["step"] for record in history] == [record["step"] for record in own]
    for record, expected in zip(history, own, strict=True):
        assert record == pytest.approx(expected, rel=1e-4)
    assert jaxcae.evaluate(loss, start.params, spread, batch) == pytest.approx(
        jaxcae.evaluate(loss, start.params, xs, batch), rel=1e-4
    )


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        (AxisType.Auto, P("data")),
        (AxisType.Explicit, P("data")),
        pytest.param(AxisType.Auto, P(), marks=pytest.mark.slow),
        pytest.param(AxisType.Explicit, P(), marks=pytest.mark.slow),
    ],
)
def test_each_device_does_its_share_of_fit(kind, spec):
    """XLA's own count for one device, against that of one device alone."""
    model, optimizer = jaxcae.mlp((64, 32, 8)), optax.sgd(0.1)
    loss = jaxcae.cae_loss(model, 0.1, method="reverse")
    start = jaxcae.TrainState.create(model.init(jax.random.key(0)), optimizer, jax.random.key(1))
    xs = jnp.ones((128, 64))

    def flops(rows):
        placement = Placement.of(rows)
        source = Resident(loss, optimizer, rows, 64, placement)
        state = start if placement is None else placement.placed(start)
        source.begin(state, 0)
        compiled = source._run.lower(*source._arguments(state, 0, 1)).compile()
        return compiled.cost_analysis()["flops"]

    assert flops(spread_over(kind, spec, xs)) < 0.3 * flops(xs)


@pytest.mark.parametrize("method", ["auto", "chain", "reverse"])
def test_weights_laid_over_explicit_axes_give_the_same(method):
    """Tensor parallelism: hidden units over one axis, samples over the other."""
    rng = np.random.default_rng(0)
    params = [jnp.float32(rng.normal(size=shape)) for shape in ((6, 8), (8, 4))]
    xs = jnp.float32(rng.normal(size=(4, 6)))
    alone = jaxcae.contractive_penalty(lambda p, x: jnp.tanh(x @ p[0]) @ p[1])(params, xs)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)

    def encode(p, x):
        return jnp.dot(jnp.tanh(x @ p[0]), p[1], out_sharding=P())

    with jax.set_mesh(mesh):
        specs = (P(None, "model"), P("model", None))
        spread = [
            jax.device_put(a, NamedSharding(mesh, spec))
            for a, spec in zip(params, specs, strict=True)
        ]
        rows = jax.device_put(xs, NamedSharding(mesh, P("data", None)))
        penalty = jaxcae.contractive_penalty(encode, method)
        norms, gradient = jax.jit(
            lambda p, xs: (penalty(p, xs), jax.grad(lambda p: penalty(p, xs).sum())(p))
        )(spread, rows)
    np.testing.assert_allclose(norms, alone, rtol=1e-5)
    assert [g.shape for g in gradient] == [p.shape for p in params]
