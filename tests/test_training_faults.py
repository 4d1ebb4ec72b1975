"""What `fit` is given and should not be, what it keeps, and what it lets go."""

import ast
import gc
import re
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
import scipy.sparse

import jaxcae
import jaxcae.training
from jaxcae.errors import InputError
from jaxcae.training import DivergedError, TrainState, best_record
from jaxcae.training.samples import as_samples
from jaxcae.training.sources import Resident, Streamed

MODEL = jaxcae.mlp((4, 3, 2), "tanh")
OPTIMIZER = optax.adam(1e-2)


@pytest.fixture(scope="module")
def loss() -> Any:
    return jaxcae.cae_loss(MODEL, 0.1, method="reverse")


@pytest.fixture
def xs(rng: np.random.Generator) -> np.ndarray:
    return rng.random((10, 4), np.float32)


def start(optimizer: Any = OPTIMIZER, params: Any = None) -> TrainState:
    params = MODEL.init(jax.random.key(0)) if params is None else params
    return TrainState.create(params, optimizer, jax.random.key(1))


def fit(loss: Any, xs: Any, optimizer: Any = OPTIMIZER, **options: Any) -> Any:
    options = {"epochs": 1, "batch_size": 4, "state": start(optimizer), **options}
    return jaxcae.fit(loss, optimizer, options.pop("state"), xs, **options)


class Rows:
    """Batches from the host, in order."""

    def __init__(self, xs: Any, batch_size: int = 4):
        self.batches = [xs[i : i + batch_size] for i in range(0, len(xs), batch_size)]
        self.steps_per_epoch = len(self.batches)

    def from_step(self, step: int) -> Any:
        while True:
            yield self.batches[step % self.steps_per_epoch]
            step += 1


# --------------------------------------------------------------------------- kinds of samples

KINDS = {
    "float64": lambda xs: xs.astype(np.float64),
    "float16": lambda xs: xs.astype(np.float16),
    "Fortran order": np.asfortranarray,
    "list": lambda xs: xs.tolist(),
    "JAX": jnp.asarray,
    "DataFrame": pd.DataFrame,
    "DataFrame of objects": lambda xs: pd.DataFrame(xs).astype(object),
}


@pytest.mark.parametrize(
    "kind",
    [
        "float64",
        "list",
        "DataFrame of objects",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("float16", "Fortran order")),
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("JAX", "DataFrame")),
    ],
)
def test_samples_may_come_as_anything_that_holds_numbers(kind, loss, xs):
    """The result is that of a float32 array, up to the digits that the kind has."""
    xs = xs.astype(np.float16).astype(np.float32)
    want = fit(loss, xs, held_out=xs)[1]
    got = fit(loss, KINDS[kind](xs), held_out=KINDS[kind](xs))[1]
    for record, expected in zip(got, want, strict=True):
        assert record == pytest.approx(expected, rel=1e-2 if kind == "float16" else 1e-6)


@pytest.mark.parametrize("dtype", ["uint8", "int64", "uint64", "bool", "big"])
def test_whole_numbers_are_samples(dtype, loss, rng):
    xs = rng.integers(0, 2, (10, 4)).astype(">i4" if dtype == "big" else dtype)
    want = fit(loss, xs.astype(np.float32))[1]
    assert fit(loss, xs)[1] == want
    assert jaxcae.evaluate(loss, start().params, xs) == jaxcae.evaluate(
        loss, start().params, xs.astype(np.float32)
    )


@pytest.mark.parametrize(
    ("xs", "message"),
    [
        (np.ones((3, 4), complex), "xs must hold real numbers, got dtype complex128"),
        (np.array([["a", "b"]]), "xs must hold real numbers, got dtype <U1"),
        (pd.DataFrame({"a": [1.0], "b": ["text"]}), "xs must hold numbers alone: .*text"),
        ({"a": np.ones((3, 4))}, "xs must be one array of samples in rows, got a dict"),
        (np.ma.masked_less(np.eye(4), 1), "xs holds 12 masked values"),
        (scipy.sparse.eye(4, format="csr"), "xs must be dense"),
        (np.float32(1), "xs must be samples in rows, got a single value"),
        (np.full((3, 4), 2**40), r"xs holds 1099511627776 in row 0, column 0 .*float32"),
        (np.full((3, 4), 1e300), r"xs holds 1e\+300 in row 0, column 0 .*float32 cannot hold"),
    ],
)
@pytest.mark.parametrize("where", ["fit", "held out", "evaluate"])
def test_what_is_no_array_of_samples_is_refused_in_a_line(xs, message, where, loss):
    good = np.ones((4, 4), np.float32)
    call = {
        "fit": lambda: fit(loss, xs),
        "held out": lambda: fit(loss, good, held_out=xs),
        "evaluate": lambda: jaxcae.evaluate(loss, start().params, xs),
    }[where]
    with pytest.raises(InputError, match=message.replace("xs ", "(xs|held_out) ")):
        call()


@pytest.mark.parametrize(
    ("dtype", "value"), [("int32", 2**24 + 1), ("int64", -(2**24) - 1), ("uint32", 2**31)]
)
def test_whole_numbers_that_float32_rounds_are_refused(dtype, value):
    """Of either sign, and of every width that holds them."""
    xs = np.zeros((3, 2), dtype)
    xs[1, 1] = value
    with pytest.raises(
        InputError, match=rf"holds {value} in row 1, column 1 .*tell integers apart"
    ):
        as_samples("xs", xs)
    xs[1, 1] = 2**24 if value > 0 else -(2**24)
    assert as_samples("xs", xs)[1, 1] == xs[1, 1]


@pytest.mark.parametrize(
    ("kind", "bad"), [(np.asarray, np.nan), (jnp.asarray, np.nan), (np.asarray, 1e300)]
)
def test_what_is_far_down_is_told_by_its_own_row(kind, bad):
    """Rows are looked at in blocks."""
    xs = np.zeros((40_000, 1))
    xs[33_000] = bad
    with pytest.raises(InputError, match=re.escape(f"holds {bad} in row 33000, column 0")):
        as_samples("xs", kind(xs))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, pd.DataFrame, Rows])
def test_the_data_is_blamed_for_what_it_holds(bad, kind, loss, xs):
    """Row and column, and not the learning rate; where columns have names, the name."""
    xs[6, 2] = bad
    place = "row 2, column 2" if kind is Rows else "row 6, column 2"
    with pytest.raises(InputError, match=rf"holds {bad} in {place}.* not finite") as caught:
        fit(loss, kind(xs))
    if kind is pd.DataFrame:
        assert "column 2 ('2')" in str(caught.value)
    if kind is Rows:
        assert "the batch of step 2" in str(caught.value)
        return
    with pytest.raises(InputError, match=f"held_out holds {bad} in row 6"):
        fit(loss, np.ones((4, 4), np.float32), held_out=kind(xs))
    with pytest.raises(InputError, match=f"xs holds {bad} in row 6"):
        jaxcae.evaluate(loss, start().params, kind(xs))


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("source", [np.asarray, Rows])
def test_parameters_are_blamed_by_name(source, held_out, loss, xs):
    params = MODEL.init(jax.random.key(0))
    params["encoder"]["layer_1"]["kernel"] = (
        params["encoder"]["layer_1"]["kernel"].at[0].set(jnp.nan)
    )
    message = r"params\['encoder'\]\['layer_1'\]\['kernel'\] holds 2 value.*before the first step"
    with pytest.raises(ValueError, match=message):
        fit(loss, source(xs), state=start(params=params), held_out=xs if held_out else None)


@pytest.mark.parametrize("source", [np.asarray, Rows])
def test_a_loss_that_overflows_at_once_is_not_blamed_on_the_learning_rate(source, loss, xs):
    with pytest.raises(DivergedError, match=r"at step 1\. Samples and parameters are finite") as e:
        fit(loss, source(1e30 * xs))
    assert "learning rate" not in str(e.value)


@pytest.mark.parametrize(
    ("xs", "method"),
    [
        ("zeros", "auto"),
        pytest.param("zeros", "control_variate", marks=pytest.mark.slow),
        ("a constant column", "control_variate"),
        pytest.param("a constant column", "auto", marks=pytest.mark.slow),
        pytest.param("one row, many times", "auto", marks=pytest.mark.slow),
        pytest.param("one row, many times", "control_variate", marks=pytest.mark.slow),
    ],
)
def test_degenerate_data_trains(xs, method, rng):
    samples = np.zeros((10, 4), np.float32)
    if xs == "a constant column":
        samples[:, 1:] = rng.random((10, 3))
    if xs == "one row, many times":
        samples[:] = rng.random(4)
    state, history = fit(jaxcae.cae_loss(MODEL, 0.1, method=method), samples, epochs=3)
    assert history[-1]["loss"] < history[0]["loss"] + 1e-6
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


# --------------------------------------------------------------------------- optimizers


SAM = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.contrib.sam(optax.sgd(1e-2), SAM, sync_period=2),
        pytest.param(
            optax.contrib.sam(optax.sgd(1e-2), SAM, opaque_mode=True), marks=pytest.mark.slow
        ),
        optax.lookahead(optax.sgd(1e-2), 2, 0.5),
        optax.MultiSteps(optax.sgd(1e-1), 2),
    ],
    ids=["sam", "opaque sam", "lookahead", "several steps"],
)
def test_optimizers_with_wishes_of_their_own(optimizer, loss, xs):
    """They lower the loss, and `fit` takes the steps that `make_train_step` takes."""
    params = MODEL.init(jax.random.key(0))
    if optimizer.init.__qualname__.startswith("lookahead"):
        params = optax.LookaheadParams.init_synced(params)
    state, history = fit(
        loss, xs[:4], optimizer, state=start(optimizer, params), epochs=6, held_out=xs
    )
    assert history[-1]["held_out_loss"] < history[0]["held_out_loss"]
    step, alone = jaxcae.make_train_step(loss, optimizer), start(optimizer, params)
    for _ in range(6):
        alone, _ = step(alone, xs[:4])
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------- going on, and stopping


@pytest.mark.parametrize("change", [{"batch_size": 2}, {"xs": 5}, {"batch_size": 10}])
def test_another_batch_size_or_other_rows_are_refused_on_going_on(change, loss, xs):
    """Epochs would be counted 1, 2, 3, 4, 3, 4, 5."""
    state, history = fit(loss, xs, epochs=2)
    more = {"epochs": 4, "state": state, "history": history, "batch_size": 4, **change}
    rows = xs[: more.pop("xs", len(xs))]
    with pytest.raises(ValueError, match="epoch 2 of the history ended at step 6, but these"):
        fit(loss, rows, **more)
    with pytest.raises(ValueError, match="the state is at step 0, the history ends at step 6"):
        fit(loss, xs, epochs=4, history=history)


def test_an_unfinished_epoch_goes_on_with_its_own_batches(loss, xs):
    stopped = []

    def stop(segment: Any) -> bool:
        stopped.append(segment)
        return segment.step == 2

    fit(loss, xs, callback=stop, pause_every=1)
    last = stopped[-1]
    with pytest.raises(ValueError, match="totals are of an unfinished epoch, but step 2 ends"):
        fit(loss, xs, state=last.state, totals=last.totals, batch_size=5)


def test_a_metric_that_is_not_a_number_is_never_the_best():
    history = [{"epoch": 0, "m": np.nan}, {"epoch": 1, "m": 2.0}, {"epoch": 2, "m": np.nan}]
    assert best_record(history, "m") == 1
    assert best_record([*history, {"epoch": 3, "m": -np.inf}], "m") == 3


@pytest.mark.parametrize("source", [np.asarray, Rows])
def test_the_last_good_state_is_kept_without_a_copy(source, loss, xs):
    """The step that diverges is not taken, wherever in a segment it stands."""
    rate = optax.sgd(lambda count: jnp.where(count < 4, 1e-2, jnp.nan))
    batches = source(xs)
    with pytest.raises(DivergedError) as caught:
        fit(loss, batches, rate, epochs=5)
    state = caught.value.state
    assert int(state.step) == caught.value.step - 1 == 4
    whole = fit(loss, batches, rate, epochs=5, callback=lambda s: s.step == 4, pause_every=1)[0]
    for got, want in zip(jax.tree.leaves(state.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_array_equal(got, want)


def test_no_clock_decides_where_a_run_is_cut(loss, xs):
    """Nothing in the room reads one, and a run is cut alike however often it is repeated."""
    for path in Path(jaxcae.training.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        names = {n.name for i in ast.walk(tree) if isinstance(i, ast.Import) for n in i.names}
        names |= {i.module for i in ast.walk(tree) if isinstance(i, ast.ImportFrom)}
        assert not names & {"time", "datetime"}, path
    cuts: list[list[int]] = [[], []]
    for cut in cuts:
        fit(loss, xs, epochs=2, callback=lambda segment, cut=cut: cut.append(segment.step))
    assert cuts[0] == cuts[1]


@pytest.mark.parametrize(("width", "longest"), [(4, 10**9), (4096, 60)])
def test_the_work_of_a_step_decides_the_length_of_a_segment(width, longest):
    """Long enough for small steps, short enough for large ones: a callback can stop in time."""
    model = jaxcae.mlp((width, 2048, 8)) if width > 4 else MODEL
    state = jax.eval_shape(lambda: start(params=model.init(jax.random.key(0))))
    xs = np.zeros((4096, width), np.float32)
    source = Resident(jaxcae.cae_loss(model, None), OPTIMIZER, xs, 128)  # it holds the loss
    arguments = (128, None, (), state, xs, np.arange(4096), 0, 1)
    source._arguments = lambda *_: arguments  # shapes alone: nothing is run
    source.begin(state, 0)
    assert 1 <= source.segment <= longest
    assert source.segment > 100 or width > 4


# --------------------------------------------------------------------------- memory


@pytest.mark.parametrize("kind", [Resident, Streamed])
def test_a_state_gives_its_memory_to_the_next(kind, loss, xs):
    """One state, not two, while a segment runs."""
    source = kind(loss, OPTIMIZER, xs, 4) if kind is Resident else kind(loss, OPTIMIZER, Rows(xs))
    state = start()
    source.begin(state, 0)
    source.run(state, 0, 1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))


@pytest.mark.parametrize("source", [np.asarray, Rows])
def test_states_that_others_hold_stay_usable(source, loss, xs):
    """The caller's, those that a callback keeps, and the best."""
    state, kept = start(), []
    after, _ = fit(
        loss,
        source(xs),
        state=state,
        epochs=3,
        callback=lambda segment: kept.append(segment.state),
        patience=2,
        monitor="loss",
        pause_every=1,
    )
    for one in (state, *kept, after):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((one.params, one.best)))
    assert [int(one.step) for one in kept] == list(range(10))


def own_loss() -> Any:
    def loss(params: Any, xs: Any, key: Any = None) -> Any:
        return jnp.mean((xs - params) ** 2), {}

    return loss


@pytest.mark.parametrize(
    "kind",
    [
        "function",
        "side by side",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("objective", "jitted")),
    ],
)
def test_nothing_outlives_a_loss_or_an_optimizer(kind, xs, compilations):
    """The same two objects compile once; what was compiled goes with either."""
    if kind == "objective":
        loss = jaxcae.cae_loss(MODEL, 0.1, method="reverse", contraction_every=2)
    elif kind == "function":
        loss = own_loss()
    elif kind == "jitted":
        loss = jax.jit(own_loss())
    else:
        loss = jaxcae.training.side_by_side({"encoder": own_loss()})
    params = None if kind == "objective" else jnp.ones((1, 4))
    params = {"encoder": params} if kind == "side by side" else params
    # A bare pair, which optax would wrap anew at every call.
    optimizer = optax.GradientTransformation(*optax.scale(-1e-2))
    options = {"held_out": xs, "optimizer": optimizer}
    fit(loss, xs, state=start(optimizer, params), **options)
    state = start(optimizer, params)
    before = compilations()
    fit(loss, xs, state=state, **options)
    fit(loss, Rows(xs), state=state, epochs=1, optimizer=optimizer)
    streamed = compilations()
    fit(loss, Rows(xs), state=state, epochs=1, optimizer=optimizer)
    assert compilations() == streamed
    fit(loss, xs, state=state, **options)
    assert compilations() == streamed > before

    update = weakref.ref(optimizer.update)
    del optimizer, options
    gc.collect()
    assert update() is None
    gone = weakref.ref(loss)
    del loss
    gc.collect()
    assert gone() is None


def test_losses_and_updates_may_be_methods_or_refuse_weak_references(xs):
    """What cannot be remembered weakly is compiled for one call of `fit`."""

    class Slotted:
        __slots__ = ()

        def __call__(self, params: Any, xs: Any, key: Any = None) -> Any:
            return own_loss()(params, xs, key)

        def method(self, params: Any, xs: Any, key: Any = None) -> Any:
            return own_loss()(params, xs, key)

    optimizer = optax.MultiSteps(optax.sgd(0.1), 2)
    for loss in (Slotted(), Slotted().method):
        state, _ = fit(loss, xs, optimizer, state=start(optimizer, jnp.ones((1, 4))), epochs=2)
        assert int(state.step) == 6
