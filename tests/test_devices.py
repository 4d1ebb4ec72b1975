"""Layouts: what lies where, and that no result depends on it beyond rounding."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jaxcae
from jaxcae.devices import Layout, batch_sharding, place
from jaxcae.devices.placement import Placement
from jaxcae.errors import InputError
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


@pytest.mark.parametrize("case", some(CASES, ["features, split, resident"]))
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
        (lambda: jaxcae.layout(64), "devices=64: there are"),
        (lambda: jaxcae.layout(4, features=3), "features=3 does not divide 4 devices"),
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
