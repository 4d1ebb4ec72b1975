"""Calibration, events, boxes and neighbour distances: known answers, independent computations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcae
from jaxcae.results.detection.calibration import Calibration
from jaxcae.results.detection.events import alarms_of, find_events
from jaxcae.results.detection.neighbours import MOST, Neighbours, distances, to_neighbour
from jaxcae.results.detection.recipe import divide
from jaxcae.results.detection.scoring import boxed

# --------------------------------------------------------------------------- calibration


def test_p_values_count_the_calibration_rows_that_score_as_high():
    """Ties count, and the row itself does; the highest reaches 1 / (n + 1)."""
    calibration = Calibration.of([3.0, 1.0, np.nan, 2.0, 2.0], 1)
    got = calibration.p_values([0.0, 2.0, 2.5, 9.0, np.nan])
    assert np.array_equal(got, [1, 4 / 5, 2 / 5, 1 / 5, np.nan], equal_nan=True)


@pytest.mark.parametrize("ties", [False, True])
def test_a_score_is_above_the_threshold_where_its_p_value_is_at_most_alpha(ties, rng):
    """For every level, those at which α(n + 1) is whole in digits but not in bits included."""
    scores = rng.normal(size=99)
    if ties:
        scores = np.round(2 * scores)
    calibration = Calibration.of(scores, 1)
    asked = np.concatenate([scores, scores + 1e-9, scores - 1e-9, [1e9]])
    p_values = calibration.p_values(asked)
    for alpha in [*np.arange(2, 100) / 100, 0.015, 0.999]:
        alarms = alarms_of(asked, calibration.threshold(alpha))
        assert np.array_equal(alarms, p_values <= alpha * (1 + 1e-12)), alpha


def test_alarms_on_normal_rows_keep_their_level(rng):
    """P(p ≤ α) ≤ α over calibrations and rows, and not far below, within five deviations."""
    for alpha in (0.02, 0.1):
        trials = [
            Calibration.of(rng.normal(size=99), 1).p_values(rng.normal(size=50)) <= alpha
            for _ in range(400)
        ]
        rates = np.mean(trials, axis=1)
        assert abs(rates.mean() - alpha) < 5 * rates.std() / np.sqrt(len(rates))


def test_levels_that_so_few_independent_windows_cannot_hold_are_refused():
    """Of 900 rows and windows of 128, seven are independent."""
    calibration = Calibration.of(np.arange(900.0), 128)
    assert calibration.least_alpha == 128 / 900
    assert calibration.level(None) == 128 / 900
    assert calibration.level(128 / 900) == 128 / 900
    with pytest.raises(ValueError, match=r"alpha 0.01 is below 0.14.* 7.03 ind.* 12,800 ") as error:
        calibration.level(0.01)
    assert "\n" not in str(error.value)
    assert Calibration.of(np.arange(900.0), 1).level(None) == 0.01
    for alpha in (0, 1, -0.1, np.nan):
        with pytest.raises(ValueError, match="alpha must be above 0 and below 1"):
            calibration.level(alpha)
    with pytest.raises(ValueError, match="fewer than two windows of 128"):
        Calibration.of(np.arange(200.0), 128)
    with pytest.raises(ValueError, match="0 rows are left for calibration"):
        Calibration.of(np.full(3, np.nan), 1)


# --------------------------------------------------------------------------- events


def test_events_have_start_end_peak_and_channel():
    """Peak and channel by the point error over what it usually is, not by the score."""
    scores = np.array([0, 9, 8, 0, 0, 0, 7, np.nan, 0.0])
    points = np.ones((9, 2))
    points[2] = [3, 50]  # usual in channel 1 is 100: it is channel 0 that stands out
    points[6] = [1, 900]
    p_values = np.where(np.nan_to_num(scores) > 5, 0.01 * np.nan_to_num(scores), 1)
    usual = np.array([1.0, 100])
    got = find_events(alarms_of(scores, 5), scores, p_values, points, usual)
    assert got == [(1, 2, 2, 0, 9.0, 0.09), (6, 6, 6, 1, 7.0, 0.07)]
    (joined,) = find_events(alarms_of(scores, 5), scores, p_values, points, usual, join=3)
    assert joined == (1, 6, 6, 1, 9.0, 0.09)
    assert len(find_events(alarms_of(scores, 5), scores, p_values, points, usual, join=2)) == 2
    assert find_events(alarms_of(scores, 99), scores, p_values, points, usual) == []


def test_boxes_average_known_rows_of_one_segment(rng):
    """Against a plain loop, at the ends, beside what is missing, and never across a gap."""
    values = rng.random(20)
    values[5] = np.nan
    ranges = np.array([[0, 9], [9, 12], [13, 20]])
    got = boxed(values, 4, ranges)
    for t in range(20):
        inside = [(a, b) for a, b in ranges if a <= t < b]
        if not inside or t == 5:
            assert np.isnan(got[t])
            continue
        ((start, stop),) = inside
        assert got[t] == pytest.approx(np.nanmean(values[max(start, t - 2) : min(stop, t + 2)]))


# --------------------------------------------------------------------------- the two parts


def test_training_and_calibration_are_a_window_apart():
    """By rows that are there, over segments; what cannot hold a window is refused."""
    train, calibration = divide(np.array([[0, 100]]), 10, 0.2)
    assert (train.tolist(), calibration.tolist()) == ([[0, 70]], [[80, 100]])
    train, calibration = divide(np.array([[0, 40], [50, 75], [80, 115]]), 5, 0.2)
    assert (train.tolist(), calibration.tolist()) == ([[0, 40], [50, 75], [80, 90]], [[95, 115]])
    with pytest.raises(ValueError, match="too short for windows of 10: of 40 rows") as error:
        divide(np.array([[0, 40]]), 10, 0.2)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------- neighbours


def _brute(params, train, xs, epsilon):
    """Compute the distances of a softplus network in NumPy, with explicit Jacobians."""
    first, last = (
        {k: np.asarray(v, np.float64) for k, v in params["encoder"][f"layer_{i}"].items()}
        for i in (0, 1)
    )

    def encode(x):
        return np.logaddexp(0, x @ first["kernel"] + first["bias"]) @ last["kernel"] + last["bias"]

    out = []
    for x in xs.astype(np.float64):
        deltas = encode(x) - encode(train.astype(np.float64))
        i = np.argmin((deltas**2).sum(1))
        slopes = 1 / (1 + np.exp(-(train[i] @ first["kernel"] + first["bias"])))
        jacobian = (first["kernel"] * slopes @ last["kernel"]).T
        gram = jacobian @ jacobian.T + epsilon * np.eye(len(jacobian))
        out.append(deltas[i] @ np.linalg.inv(gram) @ deltas[i])
    return np.array(out)


def test_neighbour_distances_are_those_of_explicit_jacobians(rng):
    """In both steps, the ridge by the median norm."""
    model = jaxcae.mlp((7, 9, 4), "softplus")
    params = model.init(jax.random.key(0))
    train, xs = rng.normal(size=(30, 7)).astype("f4"), rng.normal(size=(6, 7)).astype("f4")
    neighbours = Neighbours.of(model, params, train)
    norms = jaxcae.contractive_penalty(model.encode)(params, train)
    assert neighbours.epsilon == pytest.approx(1e-3 * np.median(norms) / 4, rel=1e-5)
    zs = jax.vmap(model.encode, (None, 0))(params, xs) - neighbours.mean[None]
    deltas, grams = jax.jit(to_neighbour(model))(params, neighbours.samples, neighbours.codes, zs)
    got = distances(np.asarray(deltas), np.asarray(grams), neighbours.epsilon)
    assert np.allclose(got, _brute(params, train, xs, neighbours.epsilon), rtol=1e-3)


def test_the_neighbour_distance_is_in_units_of_the_input(rng):
    """Of a linear encoder it is the squared length of the step in the space it sees.

    Whatever the encoder shrinks: one direction by a thousand here. The ridge takes a thousandth.
    """
    rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0][:, :3]
    model = jaxcae.Autoencoder(None, lambda w, x: x @ w, lambda w, z: z @ w.T)
    train = rng.normal(size=(20, 5)).astype("f4") * 10
    step = rng.normal(size=5).astype("f4")
    for scale in (np.ones(3), np.array([1, 0.5, 2.0])):
        params = jnp.asarray(rotation * scale[None], jnp.float32)
        neighbours = Neighbours.of(model, params, train)
        zs = (train[:1] + 0.1 * step) @ params - neighbours.mean[None]
        deltas, grams = jax.jit(to_neighbour(model))(
            params, neighbours.samples, neighbours.codes, zs
        )
        got = distances(np.asarray(deltas), np.asarray(grams), neighbours.epsilon)
        assert got[0] == pytest.approx(0.01 * np.sum((step @ rotation) ** 2), rel=0.01)


def test_of_many_training_samples_as_many_as_fit_are_kept(rng):
    """At even distances, the first and the last included."""
    model = jaxcae.Autoencoder(None, lambda w, x: x * w, lambda w, z: z)
    xs = np.arange(MOST + 500.0, dtype="f4")[:, None]
    kept = Neighbours.of(model, jnp.ones(1), xs).samples[:, 0]
    assert len(kept) == MOST
    assert (kept[0], kept[-1]) == (0, MOST + 499)
    assert np.diff(kept).max() <= 2
