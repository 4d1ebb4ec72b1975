"""Layouts: what lies where, and that no result depends on it beyond rounding."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcae
from jaxcae.devices import Layout, batch_sharding, place
from jaxcae.devices.placement import Placement
from jaxcae.errors import InputError
from jaxcae.jacobian.products import gram
from jaxcae.results.scores import score_array, scores
from tests.some import some

LAYOUTS = {
    "data": {},
    "two devices": {"devices": 2},
    "features": {"features": 2},
    "split": {"shard_params": True},
    "features, split": {"features": 2, "shard_params": True},
}


def network(sizes=(12, 8, 4)):
    model, optimizer = jaxcae.mlp(sizes), optax.adam(1e-2)
    loss = jaxcae.cae_loss(model, 0.1, method="reverse")
    params = model.init(jax.random.key(0))
    return loss, optimizer, jaxcae.TrainState.create(params, optimizer, jax.random.key(1))


def assert_close(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


class Stream:
    """Batches of 6 of some samples, in order."""

    def __init__(self, xs):
        self.xs, self.steps_per_epoch = xs, -(-len(xs) // 6)

    def from_step(self, step):
        while True:
            first = 6 * (step % self.steps_per_epoch)
            yield self.xs[first : first + 6]
            step += 1


# --------------------------------------------------------------------------- training


CASES = [f"{name}, {kind}" for kind in ("resident", "streamed") for name in LAYOUTS]


@pytest.mark.parametrize("case", some(CASES, ["split, resident"]))
def test_a_layout_changes_nothing_but_the_place(case, rng):
    """Batches of 6, and of 5 at the end, which no layout here divides: every row counts once."""
    loss, optimizer, start = network()
    name, kind = case.rsplit(", ", 1)
    layout = jaxcae.layout(**LAYOUTS[name])
    xs = rng.normal(size=(41, 12)).astype(np.float32)
    data = Stream(xs) if kind == "streamed" else xs
    options = {"epochs": 2, "batch_size": 6, "held_out": xs[:7]}
    alone, own = jaxcae.fit(loss, optimizer, start, data, **options)
    state, history = jaxcae.fit(loss, optimizer, start, data, layout=layout, **options)
    assert_close(state.params, alone.params)
    for record, expected in zip(history, own, strict=True):
        assert record == pytest.approx(expected, rel=1e-4)
    lies = jax.tree.map(lambda leaf: leaf.sharding, state)
    assert lies == layout.shardings(state)


# --------------------------------------------------------------------------- collectives

ITEM = {"f32": 4, "s32": 4, "u32": 4, "pred": 1}


def collectives(compiled):
    """Count the bytes that come out of each kind of collective of a compiled program."""
    text, found = re.sub(r"/\*.*?\*/", "", compiled.as_text()), {}
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    for shapes, kind in re.findall(rf"=\s*(\(?[^=]*?)\s({kinds})(?:-start)?\(", text):
        sizes = [
            ITEM[name] * int(np.prod([int(n) for n in dims.split(",") if n], dtype=int))
            for name, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        ]
        found[kind] = [*found.get(kind, []), sum(sizes)]
    return found


def compiled_step(sizes, batch, layout, **options):
    """Compile a step of shapes alone: no array of its size is ever made."""
    model, optimizer = jaxcae.mlp(sizes), optax.adam(1e-3)
    step = jaxcae.make_train_step(jaxcae.cae_loss(model, 0.03, **options), optimizer)
    key = jax.random.key(0)
    state = jax.eval_shape(
        lambda: jaxcae.TrainState.create(model.init(key), optimizer, jax.random.key(1))
    )
    shardings = layout.shardings(state)

    def on(shape, sharding):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    xs = on(jax.ShapeDtypeStruct((batch, sizes[0]), jnp.float32), batch_sharding(layout))
    program = jax.jit(lambda state, xs: step(state, xs), out_shardings=(shardings, None))
    return program.lower(jax.tree.map(on, state, shardings), xs).compile()


def test_a_wide_gram_is_divided_and_gathered_once():
    """One all-reduce of gradients and C's, one gather of C, one of each kernel's gradient."""
    d, h, k, n = 784, 256, 64, 4
    alone, shared = (compiled_step((d, h, k), 256, jaxcae.layout(m)) for m in (1, n))
    parameters = 2 * h * (d + k) + 2 * h + d + k
    assert {kind: sorted(sizes) for kind, sizes in collectives(shared).items()} == {
        "all-reduce": [4 * (parameters + h * h + 2)],
        "all-gather": [4 * k * h, 4 * h * h, 4 * d * h],
        "all-to-all": [4 * h * h // n] * 2,
    }
    assert shared.cost_analysis()["flops"] < 1.1 / n * alone.cost_analysis()["flops"]


EIGHT = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp, jaxcae, optax
from jaxcae.devices.placement import Placement
from jaxcae.training.sources import Resident
from tests.test_devices import compiled_step


def of_fit(devices):
    model, optimizer = jaxcae.mlp((784, 256, 64)), optax.adam(1e-3)
    state = jaxcae.TrainState.create(model.init(jax.random.key(0)), optimizer, jax.random.key(1))
    xs, layout = jnp.zeros((1024, 784)), jaxcae.layout(devices)
    placement = Placement.of(xs, layout)
    if placement is not None:
        xs, state = placement.put(xs), placement.placed(state)
    source = Resident(jaxcae.cae_loss(model, 0.03), optimizer, xs, 1024, placement)
    source.begin(state, 0)
    return source._run.lower(*source._arguments(state, 0, 1)).compile()


for compiled in (
    lambda n: compiled_step((784, 256, 64), 1024, jaxcae.layout(n)),
    of_fit,
    lambda n: compiled_step((12288, 1024, 256), 1024, jaxcae.layout(n)),
):
    print(*(compiled(n).cost_analysis()["flops"] for n in (8, 1)))
"""


@pytest.mark.slow
def test_eight_devices_do_an_eighth_each():
    """A step and a segment of `fit` at 784-256-64, and a step of a large encoder, batch 1,024."""
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", EIGHT], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    step, fit, large = ([float(n) for n in line.split()] for line in done.stdout.splitlines())
    assert step[0] <= 0.14 * step[1]
    assert fit[0] <= 0.14 * fit[1]
    assert large[0] <= 24.5e9


def test_features_that_are_split_are_never_gathered():
    """What moves is of the hidden layer's size: its sums, the gram, and what features share."""
    d, h, k, batch = 20000, 256, 64, 64
    found = collectives(compiled_step((d, h, k), batch, jaxcae.layout(4, features=4)))
    assert set(found) == {"all-reduce"}
    # Two hidden layers, the gram but for its lower block, its scales, and the samples' losses.
    assert sum(found["all-reduce"]) == 4 * (2 * batch * h + 3 * h * h // 4 + h + batch)


@pytest.mark.parametrize(
    "kind", [pytest.param(AxisType.Auto, marks=pytest.mark.slow), AxisType.Explicit]
)
def test_chunks_are_cut_on_each_device(kind):
    """Chunks of a device's own rows: one sum over devices, after the loop, and nothing gathered."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    model = jaxcae.mlp((10, 8, 6, 4), "tanh")
    params, xs = model.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (40, 10))

    def mean(penalty):
        return jax.jit(jax.value_and_grad(lambda params, xs: penalty(params, xs).mean()))

    chunked = mean(jaxcae.contractive_penalty(model.encode, "chain", chunk_size=4))
    spread = (
        jax.device_put(params, NamedSharding(mesh, P())),
        jax.device_put(xs, NamedSharding(mesh, P("data"))),
    )
    compiled = chunked.lower(*spread).compile()
    assert list(collectives(compiled)) == ["all-reduce"]
    assert len(collectives(compiled)["all-reduce"]) == 1
    # Ten rows a device: three chunks of four, and the loop's body is counted once.
    assert set(re.findall(r"known_trip_count\D*(\d+)", compiled.as_text())) == {"3"}
    assert_close(chunked(*spread), mean(jaxcae.contractive_penalty(model.encode))(params, xs))


@pytest.mark.parametrize(
    "kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)]
)
def test_a_divided_gram_has_the_same_value_and_derivatives(kind):
    """Of a wide layer and of a chain whose gram goes on past it, forward and reverse."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    a = jax.random.normal(jax.random.key(0), (8, 256)) / 16
    weights, along = jax.random.normal(jax.random.key(1), (2, 256, 256))

    def value(a, weights, along):
        def total(a):
            return jnp.sum(gram(a, True) * weights)

        return total(a), jax.grad(total)(a), jax.jvp(total, (a,), (a @ along,))[1]

    everywhere = jax.device_put((a, weights, along), NamedSharding(mesh, P()))
    assert "all-gather" in jax.jit(value).lower(*everywhere).compile().as_text()
    for got, expected in zip(
        jax.jit(value)(*everywhere), jax.jit(value)(a, weights, along), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)


# --------------------------------------------------------------------------- what lies where


def test_a_rule_is_for_the_names_that_it_matches_and_the_first_counts():
    mesh = jaxcae.layout(devices=4, features=2).mesh
    rules = (("layer_0/kernel", P(None, "data")), ("kernel", P("features")), ("layer", P()))
    state = network()[2]
    lies = Layout(mesh, rules).shardings(jax.eval_shape(lambda: state))
    encoder = jax.tree.map(lambda sharding: sharding.spec, lies.params["encoder"])
    assert encoder["layer_0"] == {"kernel": P(None, "data"), "bias": P()}
    assert encoder["layer_1"] == {"kernel": P("features"), "bias": P()}
    assert lies.opt_state[0].mu["encoder"]["layer_0"]["kernel"].spec == P(None, "data")


def test_features_and_parameters_are_split_by_shape():
    """The widest axis over `features`, the longest other one of a matrix over `data`."""
    layout = jaxcae.layout(devices=4, features=2, shard_params=True)
    state = place(layout, network()[2])
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, state.params)
    assert specs["encoder"]["layer_0"] == {"kernel": P("features", "data"), "bias": P()}
    assert specs["encoder"]["layer_1"] == {"kernel": P("data"), "bias": P()}
    assert specs["decoder"]["layer_1"] == {"kernel": P("data", "features"), "bias": P("features")}
    assert state.step.sharding.spec == P()
    assert batch_sharding(layout).spec == P("data", "features")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: jaxcae.layout(64), "devices=64`: there are"),
        (lambda: jaxcae.layout(4, features=3), "features cannot be split over 3 of 4 devices"),
        (lambda: jaxcae.layout([]), "at least one device"),
        (
            lambda: place(jaxcae.layout(4, features=4), network((10, 8, 4))[2]),
            "4 devices do not divide 10",
        ),
        (
            lambda: jaxcae.evaluate(
                network()[0], network()[2].params, np.ones((4, 6)), layout=jaxcae.layout(4, 4)
            ),
            "6 features cannot be split over 4 devices",
        ),
    ],
)
def test_what_devices_cannot_do_is_said_in_a_line(call, said):
    with pytest.raises(InputError, match=said):
        call()


@pytest.mark.parametrize("size", [8, 6])
def test_one_process_takes_all_rows_of_a_batch(size):
    """Rows that make up the number of devices are copies of rows that it takes anyway."""
    placement = Placement.of(None, jaxcae.layout())
    for weighed in (True, False):
        np.testing.assert_array_equal(placement.rows_here(size, weighed), np.arange(size))


def test_scores_are_the_same_bits_on_any_number_of_devices(rng):
    """Each device scores chunks of the size that one device would."""
    model = jaxcae.mlp((6, 4, 2))
    params, xs = model.init(jax.random.key(0)), rng.normal(size=(21, 6)).astype(np.float32)
    score = scores(model, method="reverse")
    alone, shared = (
        score_array(score, params, xs, 4, layout) for layout in (None, jaxcae.layout(4))
    )
    for values, expected in zip(shared, alone, strict=True):
        np.testing.assert_array_equal(values, expected)
