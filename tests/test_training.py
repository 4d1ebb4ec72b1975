"""Training: what one step does, what an epoch visits, and that any step is a place to stop."""

import math
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcae
from jaxcae.runs.leaves import digest_of_tree
from jaxcae.training import DivergedError, Segment, TrainState, side_by_side
from tests.some import some

FEATURES, SAMPLES, BATCH, EPOCHS = 12, 205, 32, 4
PER_EPOCH = math.ceil(SAMPLES / BATCH)  # the last batch holds 13 samples


@pytest.fixture
def xs(rng: np.random.Generator) -> np.ndarray:
    return rng.random((SAMPLES, FEATURES), np.float32)


@pytest.fixture(scope="module")
def model() -> jaxcae.Autoencoder:
    return jaxcae.mlp((FEATURES, 8, 3))


@pytest.fixture(scope="module")
def loss(model: jaxcae.Autoencoder) -> Any:
    # Noise, so that the keys of the steps matter.
    return jaxcae.cae_loss(model, 0.1, method="reverse", noise_scale=0.1)


@pytest.fixture(scope="module")
def optimizer() -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(1e-2, EPOCHS * PER_EPOCH))


@pytest.fixture
def state(model: jaxcae.Autoencoder, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState.create(model.init(jax.random.key(0)), optimizer, jax.random.key(1))


def counting_loss(params: Any, xs: Any, key: Any = None) -> Any:
    """Under SGD with rate 1 on rows of the identity, count how often each row was seen."""
    value = -jnp.sum(xs @ params)
    return value, {"size": jnp.asarray(xs.shape[0], jnp.float32)}


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(1e-2, momentum=0.9),
        optax.adamw(1e-3),
        pytest.param(
            optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)), marks=pytest.mark.slow
        ),
        optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=2)),
        pytest.param(optax.lbfgs(), marks=pytest.mark.slow),  # fifteen seconds of tracing
    ],
    ids=["momentum", "adamw", "clipped", "plateau", "lbfgs"],
)
def test_any_optimizer_lowers_the_loss(
    optimizer: optax.GradientTransformation, model: jaxcae.Autoencoder, xs: np.ndarray
) -> None:
    loss = jaxcae.cae_loss(model, 0.1, method="reverse")
    state = TrainState.create(model.init(jax.random.key(0)), optimizer, jax.random.key(1))
    step = jaxcae.make_train_step(loss, optimizer)
    _, before = step(state, xs)
    for _ in range(10):
        state, metrics = step(state, xs)
    assert int(state.step) == 10
    assert float(metrics["loss"]) < float(before["loss"])


def test_a_step_draws_from_its_own_key(
    loss: Any, optimizer: optax.GradientTransformation, state: TrainState, xs: np.ndarray
) -> None:
    step = jaxcae.make_train_step(loss, optimizer)
    later = state.replace(step=jnp.asarray(5, jnp.int32))
    after, metrics = step(later, xs)
    expected = loss(state.params, xs, jax.random.fold_in(state.key, 5))[0]
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
    assert float(step(state, xs)[1]["loss"]) != float(metrics["loss"])
    assert int(after.step) == 6


def test_a_step_compiles_once(
    loss: Any,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    xs: np.ndarray,
    compilations: Any,
) -> None:
    step = jaxcae.make_train_step(loss, optimizer)
    state, _ = step(state, xs)
    before = compilations()
    # Made anew from the same parts, it is the same function.
    for same in (step, jaxcae.make_train_step(loss, optimizer)):
        state, _ = same(state, xs)
    assert compilations() == before


def test_every_sample_is_seen_once_per_epoch() -> None:
    optimizer = optax.sgd(1.0)
    samples = 23
    state = TrainState.create(jnp.zeros(samples), optimizer, jax.random.key(0))
    state, history = jaxcae.fit(
        counting_loss, optimizer, state, np.eye(samples, dtype=np.float32), epochs=3, batch_size=5
    )
    np.testing.assert_array_equal(state.params, 3.0)
    assert [record["step"] for record in history] == [5, 10, 15]
    # Four batches of 5 and one of 3, weighed by their sizes.
    assert history[0]["size"] == pytest.approx((4 * 5 * 5 + 3 * 3) / 23)


def test_each_epoch_and_seed_has_its_own_order() -> None:
    def order_of(seed: int) -> list[np.ndarray]:
        optimizer = optax.sgd(1.0)
        state = TrainState.create(jnp.zeros(16), optimizer, jax.random.key(seed))
        seen: list[np.ndarray] = []

        def note(segment: Segment) -> None:
            seen.append(np.asarray(segment.state.params))

        xs = np.eye(16, dtype=np.float32)
        jaxcae.fit(
            counting_loss,
            optimizer,
            state,
            xs,
            epochs=2,
            batch_size=1,
            callback=note,
            pause_every=1,
        )
        return [np.argmax(after - before) for before, after in pairwise(seen)]

    first, other = order_of(0), order_of(1)
    assert len(first) == 32
    assert sorted(first[:16]) != first[:16]
    assert first[:16] != first[16:]
    assert first != other
    assert first == order_of(0)


def test_fit_takes_the_steps_of_make_train_step(
    model: jaxcae.Autoencoder, state: TrainState, xs: np.ndarray
) -> None:
    """One sample per step in an order of our own: the loop adds nothing to the step."""
    loss, optimizer = jaxcae.cae_loss(model, 0.1, method="reverse"), optax.adam(1e-2)
    state = TrainState.create(state.params, optimizer, state.key)
    fitted, _ = jaxcae.fit(loss, optimizer, state, xs[:1], epochs=6, batch_size=1)
    step = jaxcae.make_train_step(loss, optimizer)
    for _ in range(6):
        state, _ = step(state, xs[:1])
    for a, b in zip(jax.tree.leaves(fitted.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "stop_at", some([1, 3, PER_EPOCH - 1, PER_EPOCH, PER_EPOCH + 2, 20], [3, PER_EPOCH + 2])
)
def test_a_resumed_run_has_the_same_bits(
    stop_at: int,
    loss: Any,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    xs: np.ndarray,
) -> None:
    options: dict[str, Any] = {"epochs": EPOCHS, "batch_size": BATCH, "held_out": xs[:40]}
    whole, history = jaxcae.fit(loss, optimizer, state, xs, **options)
    stopped: list[Segment] = []

    def stop(segment: Segment) -> bool:
        stopped.append(segment)
        return segment.step >= stop_at

    part, _ = jaxcae.fit(loss, optimizer, state, xs, callback=stop, pause_every=1, **options)
    assert int(part.step) == stop_at
    last = stopped[-1]
    resumed, again = jaxcae.fit(
        loss, optimizer, last.state, xs, history=last.history, totals=last.totals, **options
    )
    assert digest_of_tree(resumed) == digest_of_tree(whole)
    assert again == history
    assert int(resumed.step) == EPOCHS * PER_EPOCH


def test_segments_of_any_length_share_one_executable(
    loss: Any,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    xs: np.ndarray,
    compilations: Any,
) -> None:
    jaxcae.fit(loss, optimizer, state, xs, epochs=1, batch_size=BATCH)
    before = compilations()
    for pause in (1, 2, 3, None):
        jaxcae.fit(loss, optimizer, state, xs, epochs=2, batch_size=BATCH, pause_every=pause)
    assert compilations() == before


def test_epoch_records_are_means_over_samples(model: jaxcae.Autoencoder, xs: np.ndarray) -> None:
    """With a learning rate of zero the epoch's mean is the mean over all samples."""
    loss, optimizer = jaxcae.cae_loss(model, 0.1, method="reverse"), optax.sgd(0.0)
    state = TrainState.create(model.init(jax.random.key(0)), optimizer, jax.random.key(1))
    _, history = jaxcae.fit(
        loss, optimizer, state, xs, epochs=1, batch_size=BATCH, held_out=xs, pause_every=2
    )
    value, metrics = loss(state.params, xs)
    assert [record["epoch"] for record in history] == [0, 1]
    for name, expected in {**metrics, "loss": value}.items():
        assert history[1][name] == pytest.approx(float(expected), rel=1e-5)
        assert history[0][f"held_out_{name}"] == pytest.approx(float(expected), rel=1e-5)


def test_evaluate_weighs_the_short_last_batch(model: jaxcae.Autoencoder, xs: np.ndarray) -> None:
    loss = jaxcae.cae_loss(model, 0.1, method="reverse")
    params = model.init(jax.random.key(0))
    value, metrics = loss(params, xs)
    for batch_size in (1, 7, BATCH, SAMPLES, 1000):
        means = jaxcae.evaluate(loss, params, xs, batch_size)
        assert means["loss"] == pytest.approx(float(value), rel=1e-5)
        assert means["contraction"] == pytest.approx(float(metrics["contraction"]), rel=1e-5)


def test_a_batch_larger_than_the_data_is_one_step(
    model: jaxcae.Autoencoder, optimizer: optax.GradientTransformation, xs: np.ndarray
) -> None:
    state = TrainState.create(model.init(jax.random.key(0)), optimizer, jax.random.key(1))
    loss = jaxcae.cae_loss(model, method="reverse")
    state, history = jaxcae.fit(loss, optimizer, state, xs[:1], epochs=2, batch_size=10**6)
    assert int(state.step) == 2
    assert len(history) == 2


def test_a_diverging_loss_stops_with_the_last_good_state(
    model: jaxcae.Autoencoder, xs: np.ndarray
) -> None:
    loss, optimizer = jaxcae.cae_loss(model, 0.1, method="reverse"), optax.sgd(1e6)
    state = TrainState.create(model.init(jax.random.key(0)), optimizer, jax.random.key(1))
    with pytest.raises(DivergedError, match=r"the loss became (inf|nan) at step \d+") as caught:
        jaxcae.fit(loss, optimizer, state, xs, epochs=EPOCHS, batch_size=BATCH)
    assert int(caught.value.state.step) < caught.value.step
    # The step it names is the one: taken one by one, it is the first that is not finite.
    step = jaxcae.make_train_step(loss, optimizer)
    assert caught.value.step > 1
    assert math.isfinite(float(step(state, xs[:BATCH])[1]["loss"]))


def test_patience_stops_at_the_epoch_it_names(model: jaxcae.Autoencoder, xs: np.ndarray) -> None:
    loss, optimizer = (
        jaxcae.cae_loss(model, 0.1, method="reverse"),
        optax.sgd(0.0),
    )  # never improves
    state = TrainState.create(model.init(jax.random.key(0)), optimizer, jax.random.key(1))
    options: dict[str, Any] = {
        "epochs": 50,
        "batch_size": BATCH,
        "held_out": xs[:40],
        "patience": 3,
    }
    stopped, history = jaxcae.fit(loss, optimizer, state, xs, **options)
    assert history[-1]["epoch"] == 3
    # Resumed from there it does not go on.
    again, _ = jaxcae.fit(loss, optimizer, stopped, xs, history=history, **options)
    assert int(again.step) == int(stopped.step)
    with pytest.raises(ValueError, match="monitor 'held_out_los'"):
        jaxcae.fit(loss, optimizer, state, xs, monitor="held_out_los", **options)


def test_patience_keeps_the_best_epoch(model: jaxcae.Autoencoder, xs: np.ndarray) -> None:
    """Few samples, many steps: the held-out loss falls, then rises; the lowest epoch is kept."""
    loss, optimizer = jaxcae.cae_loss(model, 0.0, method="reverse"), optax.adam(0.05)
    few, held_out = xs[:24], xs[100:]
    start = TrainState.create(model.init(jax.random.key(0)), optimizer, jax.random.key(1))
    seen: dict[int, Segment] = {}

    def callback(segment: Segment) -> None:
        if segment.epoch_done or segment.step == 0:
            seen[segment.epoch] = segment

    options: dict[str, Any] = {"epochs": 60, "batch_size": 12, "held_out": held_out, "patience": 4}
    state, history = jaxcae.fit(loss, optimizer, start, few, callback=callback, **options)
    losses = [record["held_out_loss"] for record in history]
    best = int(np.argmin(losses))
    assert 0 < best < len(history) - 1
    assert digest_of_tree(state.best) == digest_of_tree(seen[best].state.params)
    assert digest_of_tree(state.best) != digest_of_tree(state.params)
    assert jaxcae.evaluate(loss, state.best, held_out)["loss"] == pytest.approx(losses[best])
    for epoch in (0, best, best + 1):  # before it, at it, and after it
        part = seen[epoch]
        again, _ = jaxcae.fit(loss, optimizer, part.state, few, history=part.history, **options)
        assert digest_of_tree(again) == digest_of_tree(state)
    # Where nobody watches, nothing is kept.
    plain, _ = jaxcae.fit(loss, optimizer, start, few, **{**options, "epochs": 2, "patience": None})
    assert plain.best is None


def test_patience_may_watch_the_training_loss(model: jaxcae.Autoencoder, xs: np.ndarray) -> None:
    loss, optimizer = jaxcae.cae_loss(model, 0.0, method="reverse"), optax.sgd(1e-3)
    start = TrainState.create(model.init(jax.random.key(0)), optimizer, jax.random.key(1))
    options: dict[str, Any] = {"epochs": 3, "batch_size": BATCH, "patience": 1, "monitor": "loss"}
    for held_out in (None, xs[:40]):  # with held-out samples, epoch 0 has a record without it
        state, history = jaxcae.fit(loss, optimizer, start, xs, held_out=held_out, **options)
        assert history[-1]["epoch"] == 3
        assert digest_of_tree(state.best) == digest_of_tree(state.params)


def test_side_by_side_trains_each_as_if_alone(model: jaxcae.Autoencoder, xs: np.ndarray) -> None:
    optimizer = optax.adam(1e-2)
    losses = {
        "contractive": jaxcae.cae_loss(model, 0.1, method="reverse"),
        "plain": jaxcae.cae_loss(model, None),
    }
    params, key = model.init(jax.random.key(0)), jax.random.key(1)
    options: dict[str, Any] = {"epochs": 3, "batch_size": BATCH}
    both, history = jaxcae.fit(
        side_by_side(losses),
        optimizer,
        TrainState.create(dict.fromkeys(losses, params), optimizer, key),
        xs,
        **options,
    )
    for name, loss in losses.items():
        alone, own = jaxcae.fit(
            loss, optimizer, TrainState.create(params, optimizer, key), xs, **options
        )
        for a, b in zip(
            jax.tree.leaves(both.params[name]), jax.tree.leaves(alone.params), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        assert history[-1][f"{name}/loss"] == pytest.approx(own[-1]["loss"], rel=1e-5)


class Rows:
    """Batches from the host in a fixed order, as a data loader would give them."""

    def __init__(self, xs: np.ndarray, batch_size: int):
        self.batches = [xs[i : i + batch_size] for i in range(0, len(xs), batch_size)]
        self.steps_per_epoch = len(self.batches)

    def from_step(self, step: int) -> Any:
        while True:
            yield self.batches[step % self.steps_per_epoch]
            step += 1


def test_streamed_batches_resume_to_the_same_bits(
    loss: Any, optimizer: optax.GradientTransformation, state: TrainState, xs: np.ndarray
) -> None:
    batches = Rows(xs, BATCH)
    whole, history = jaxcae.fit(loss, optimizer, state, batches, epochs=2)
    assert int(whole.step) == 2 * PER_EPOCH
    seen: list[Segment] = []

    def stop(segment: Segment) -> bool:
        seen.append(segment)
        return segment.step >= 10

    jaxcae.fit(loss, optimizer, state, batches, epochs=2, callback=stop, pause_every=1)
    last = seen[-1]
    resumed, again = jaxcae.fit(
        loss,
        optimizer,
        last.state,
        batches,
        epochs=2,
        history=last.history,
        totals=last.totals,
    )
    assert digest_of_tree(resumed) == digest_of_tree(whole)
    assert again == history


def test_fit_prints_nothing(
    model: jaxcae.Autoencoder, xs: np.ndarray, capfd: pytest.CaptureFixture[str]
) -> None:
    optimizer = optax.adam(1e-2)
    state = TrainState.create(model.init(jax.random.key(0)), optimizer, jax.random.key(1))
    jaxcae.fit(
        jaxcae.cae_loss(model, method="reverse"), optimizer, state, xs, epochs=2, held_out=xs
    )
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be a positive int"),
        ({"epochs": 1, "batch_size": 0}, "batch_size must be a positive int"),
        ({"epochs": 1, "patience": 0}, "patience must be a positive int"),
        ({"epochs": 1, "pause_every": -1}, "pause_every must be a positive int"),
    ],
)
def test_fit_refuses(
    options: dict[str, Any],
    message: str,
    loss: Any,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    xs: np.ndarray,
) -> None:
    with pytest.raises(ValueError, match=message):
        jaxcae.fit(loss, optimizer, state, xs, **options)
    with pytest.raises(ValueError, match="at least one sample"):
        jaxcae.fit(loss, optimizer, state, xs[:0], epochs=1)
    with pytest.raises(ValueError, match="at least one sample"):
        jaxcae.evaluate(loss, state.params, xs[:0])
