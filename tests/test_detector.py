"""The detector: scikit-learn's conventions, series with gaps, alarms, explanations, files."""

import json
import pickle
import pickletools
import shutil
import sys

import jax
import numpy as np
import pandas as pd
import polars as pl
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

import jaxcae
from jaxcae.cli import main
from jaxcae.errors import CheckpointError
from jaxcae.results.detection.recipe import Recipe
from jaxcae.results.detection.scoring import SCORES
from jaxcae.runs import open_run

WINDOW = 12
LENGTH = 500


def _series(length, seed=0):
    """Make two channels of different units that belong together, with a little noise."""
    rng, n = np.random.default_rng(seed), np.arange(length)
    waves = np.stack([np.sin(n / 5), np.cos(n / 5)], axis=1)
    return 20 + np.array([1, 1000]) * (waves + 0.05 * rng.normal(size=(length, 2)))


TRAIN, TEST = _series(LENGTH), _series(200, seed=1)
QUICK = {"steps": 100, "batch_size": 32}


@pytest.fixture(scope="module")
def series():
    """Give a detector of windows, fitted."""
    return jaxcae.ContractiveDetector(WINDOW, **QUICK).fit(TRAIN)


@pytest.fixture(scope="module")
def rows():
    """Give a detector of rows, fitted on a frame with names."""
    return jaxcae.ContractiveDetector(**QUICK).fit(pd.DataFrame(TRAIN, columns=["a", "b"]))


# --------------------------------------------------------------------------- scikit-learn

CHEAP = (
    *("unfitted", "repr", "get_params", "set_params", "init", "default_constructible", "mixin"),
    *("cloneable", "empty_data", "sparse", "fit1d", "1sample", "complex"),
)


def _checks():
    detector = jaxcae.ContractiveDetector(steps=20, batch_size=16)
    for estimator, check in estimator_checks_generator(detector):
        name = getattr(check, "func", check).__name__
        cheap = any(word in name for word in CHEAP)
        marks = () if cheap else (pytest.mark.slow,)
        yield pytest.param(estimator, check, id=f"{name}{len(str(check.keywords))}", marks=marks)


@pytest.mark.parametrize(("estimator", "check"), list(_checks()))
def test_scikit_learn_finds_nothing(estimator, check, untyped):
    """Every check of scikit-learn's own, and none is expected to fail."""
    check(estimator)


@pytest.mark.parametrize("kind", ["rows", "series"])
def test_the_signs_are_those_of_scikit_learn_and_of_pyod(kind, request):
    """High is normal in one, anomalous in the other; an alarm is a p-value of at most alpha_."""
    detector, x = request.getfixturevalue(kind), TEST.copy()
    x[50:53, 1] += 3000
    if kind == "rows":
        x = pd.DataFrame(x, columns=["a", "b"])
    scores = detector.score_samples(x)
    assert scores.shape == (200,)
    assert np.array_equal(detector.decision_function(x), scores - detector.offset_)
    predicted = detector.predict(x)
    assert np.array_equal(predicted, np.where(scores < detector.offset_, -1, 1))
    assert (predicted[50:53] == -1).all()
    assert np.array_equal(predicted == -1, detector.p_values(x) <= detector.alpha_)
    assert detector.threshold_ == -detector.offset_
    trained = TRAIN if kind == "series" else pd.DataFrame(TRAIN, columns=["a", "b"])
    assert np.array_equal(detector.decision_scores_, -detector.score_samples(trained))
    assert np.mean(detector.decision_scores_ > detector.threshold_) <= detector.alpha_ + 0.05
    least = (WINDOW if kind == "series" else 1) / len(detector.calibration_)
    assert detector.alpha_ == max(0.01, least)


@pytest.mark.slow
def test_it_is_cloned_searched_and_put_into_pipelines():
    """By settings of every kind; the best is found by labels that `fit` does not use."""
    x = np.concatenate([TRAIN, TRAIN**2], axis=1)[:90]
    y = np.ones(90, int)
    x[::9, 0] += 2
    y[::9] = -1
    search = GridSearchCV(
        make_pipeline(StandardScaler(), jaxcae.ContractiveDetector(**QUICK)),
        {"contractivedetector__contraction": [None, np.float64(0.1)]},
        scoring="roc_auc",
        cv=2,
        error_score="raise",
    )
    assert search.fit(x, y).best_score_ > 0.6
    best = search.best_estimator_[-1]
    assert clone(best).get_params() == best.get_params()
    assert not hasattr(clone(best), "params_")


def test_frames_of_pandas_and_polars_are_known_by_their_names(rows, series):
    """The same scores as arrays; other names or another order are refused."""
    frame = pd.DataFrame(TEST, columns=["a", "b"])
    assert list(rows.feature_names_in_) == ["a", "b"]
    assert rows.n_features_in_ == 2
    for same in (frame, pl.from_pandas(frame)):
        assert np.array_equal(rows.score_samples(same), rows.score_samples(frame))
    for other in (frame[["b", "a"]], frame.rename(columns={"a": "c"})):
        with pytest.raises(ValueError, match="feature names should match"):
            rows.score_samples(other)
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        rows.score_samples(TEST)


@pytest.mark.slow
def test_a_series_of_one_channel_may_be_flat():
    """As an array, a list or a series of pandas."""
    one = jaxcae.ContractiveDetector(WINDOW, **QUICK)
    wanted = one.fit(TRAIN[:200, :1]).decision_scores_
    for flat in (TRAIN[:200, 0], TRAIN[:200, 0].tolist(), pd.Series(TRAIN[:200, 0])):
        assert np.array_equal(one.fit(flat).decision_scores_, wanted)


def test_its_pickle_holds_state_and_no_code(series):
    """Arrays, numbers and names of classes; what comes back scores to the same bits."""
    data = pickle.dumps(series)
    strings: list[str] = []
    named = set()
    for opcode, argument, _ in pickletools.genops(data):
        if isinstance(argument, str):
            strings.append(argument)
        if opcode.name == "STACK_GLOBAL":
            named.add(tuple(strings[-2:]))
    ours = {name for module, name in named if module.startswith("jaxcae")}
    assert ours == {"ContractiveDetector", "Standardization", "Recipe", "Calibration"}
    assert not any(module.startswith(("jax.", "jaxlib", "optax")) for module, _ in named)
    assert np.array_equal(pickle.loads(data).score_samples(TEST), series.score_samples(TEST))


# --------------------------------------------------------------------------- series


def test_scores_of_a_series_are_those_of_a_plain_computation(series):
    """Two scales: the mean error of the windows over a row, and the error about it, in a box."""
    model = series.recipe_.make()[0]
    both = jax.jit(lambda params, x: model.decode(params, model.encode(params, x)))
    z = (TEST - series.standardization_.mean) / series.standardization_.deviation
    starts = range(len(z) - WINDOW + 1)
    errors = np.full((len(starts), WINDOW), np.nan)
    for s in starts:
        window = z[s : s + WINDOW].reshape(-1).astype("f4")
        x_hat = both(series.params_, window)
        errors[s] = ((window - x_hat) ** 2).reshape(WINDOW, 2).sum(1)
    covering = [[s for s in starts if s <= t < s + WINDOW] for t in range(len(z))]
    window_error = [errors[c].sum(1).mean() for c in covering]
    point_error = np.array([np.mean([errors[s][t - s] for s in c]) for t, c in enumerate(covering)])
    box = [point_error[max(t - 1, 0) : t + 2].mean() for t in range(len(z))]
    got = -series.score_samples(TEST)
    scales = series.scales_
    assert np.allclose(
        got, np.divide(window_error, scales[0]) + np.divide(box, scales[1]), rtol=1e-4
    )
    # Each part has a mean of 1 on the rows to calibrate on.
    assert series.calibration_.mean() == pytest.approx(2)


def test_a_gap_divides_a_series_into_two(series):
    """By a missing cell or by times: each part scores as if it were alone, the gap does not."""
    parts = [series.score_samples(TEST[:80]), series.score_samples(TEST[81:])]
    missing = TEST.copy()
    missing[80, 1] = np.nan
    got = series.score_samples(missing)
    masked = np.ma.masked_array(TEST, np.isnan(missing))
    assert np.array_equal(series.score_samples(masked), got, equal_nan=True)
    assert np.isnan(got[80])
    # Sums over a window are taken in another order.
    assert np.allclose(np.delete(got, 80), np.concatenate(parts), rtol=1e-13, atol=0)
    times = np.datetime64("2026-05-01") + np.arange(199) * np.timedelta64(10, "s")
    times[80:] += np.timedelta64(1, "h")
    got = series.score_samples(np.delete(TEST, 80, 0), times=times)
    assert np.allclose(got, np.concatenate(parts), rtol=1e-13, atol=0)
    # Rows between two gaps that no window covers have no score, and raise no alarm.
    missing[[85, 90]] = np.nan
    got, predicted = series.score_samples(missing), series.predict(missing)
    assert np.isnan(got[80:91]).all()
    assert not np.isnan(got[91:]).any()
    assert (predicted[80:91] == 1).all()
    assert np.isnan(series.p_values(missing)[80:91]).all()
    assert not [e for e in series.events(missing) if e.end >= 80 and e.start <= 90]


def test_what_follows_later_changes_no_earlier_score(series):
    """Nor does the length of the series, beyond one window."""
    whole = series.score_samples(TEST)
    for cut in (40, 137):
        assert np.array_equal(
            series.score_samples(TEST[:cut])[: cut - WINDOW], whole[: cut - WINDOW]
        )


def test_rows_that_come_one_by_one_score_as_the_last_windows_do(series):
    """In blocks of any length, with the calibration of such scores."""
    whole = jaxcae.ContractiveDetector(WINDOW, placement="last", **QUICK).fit(TRAIN)
    follower = series.follower()
    found = [follower.update(TEST[a:b]) for a, b in ((0, 5), (5, 6), (6, 90), (90, 200))]
    scores = np.concatenate([part.scores for part in found])
    assert np.allclose(scores, -whole.score_samples(TEST), rtol=1e-12, equal_nan=True)
    assert follower.threshold == whole.threshold_
    with pytest.raises(ValueError, match="rows that stand alone are not followed"):
        jaxcae.ContractiveDetector(**QUICK).fit(TRAIN).follower()


@pytest.mark.parametrize("statistic", ["two_scale", "reconstruction"])
def test_the_last_window_needs_no_later_row(statistic):
    """Causal: rows after t change nothing at t, and the first window − 1 rows have no score."""
    detector = jaxcae.ContractiveDetector(WINDOW, placement="last", statistic=statistic, **QUICK)
    whole = detector.fit(TRAIN).score_samples(TEST)
    changed = TEST.copy()
    changed[101:] += 1e4
    assert np.array_equal(detector.score_samples(changed)[:101], whole[:101], equal_nan=True)
    assert np.array_equal(np.flatnonzero(np.isnan(whole)), np.arange(WINDOW - 1))


def test_an_event_tells_where_to_look(series):
    """A jump in one channel: one event about it, its peak and channel, what was expected."""
    x = TEST.copy()
    x[90, 1] += 5000
    (event,) = [e for e in series.events(x) if e.start <= 90 <= e.end]
    assert (event.peak, event.channel) == (90, 1)
    assert event.p_value == 1 / (len(series.calibration_) + 1)
    assert event.score == np.max(-series.score_samples(x)[event.start : event.end + 1])
    found = series.explain(x, [event.peak, 0, 199])
    assert found.starts.tolist() == [84, 0, 188]
    assert np.allclose(found.observed[0], x[84:96])
    assert np.unravel_index(np.argmax(found.share[0]), (WINDOW, 2)) == (6, 1)
    assert abs(found.expected[0, 6, 1] - TEST[90, 1]) < 3000
    deviation = series.standardization_.deviation
    assert np.allclose(((found.observed - found.expected) / deviation) ** 2, found.share, rtol=1e-3)
    expected = series.reconstruct(x)
    assert expected.shape == x.shape
    assert np.abs(expected - TEST).mean() < np.abs(TEST.mean(0) - TEST).mean()
    assert series.explain(x, []).share.shape == (0, WINDOW, 2)
    assert series.explain(x, 90).share.shape == (1, WINDOW, 2)


def test_one_program_scores_series_of_any_length(series, compilations):
    """After the first there is nothing left to compile."""
    series.score_samples(TEST)
    before = compilations()
    for length in (WINDOW, 57, 200):
        series.predict(TEST[:length])
        series.events(TEST[:length])
        series.explain(TEST[:length], [3])
    assert compilations() == before


def test_an_equal_detector_compiles_nothing_again(compilations):
    """Copies of a detector share what was compiled, as in a search."""
    jaxcae.ContractiveDetector(WINDOW, **QUICK).fit(TRAIN)
    before = compilations()
    jaxcae.ContractiveDetector(WINDOW, **QUICK, random_state=3).fit(TRAIN)
    assert compilations() == before


def test_the_seed_decides_all():
    """The same bits from the same seed, others from another."""
    scores = [
        jaxcae.ContractiveDetector(WINDOW, **QUICK, random_state=seed).fit(TRAIN).decision_scores_
        for seed in (1, 1, 2)
    ]
    assert np.array_equal(scores[0], scores[1])
    assert not np.array_equal(scores[0], scores[2])


def test_digits_that_float32_would_lose_reach_the_scores():
    """An offset of 1e9 beside a deviation of 1, as that of seconds since 1970."""
    plain = jaxcae.ContractiveDetector(WINDOW, **QUICK).fit(TRAIN)
    far = jaxcae.ContractiveDetector(WINDOW, **QUICK).fit(TRAIN + 1e9)
    assert np.allclose(plain.decision_scores_, far.decision_scores_, rtol=0.01)


# --------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("statistic", SCORES)
def test_every_statistic_finds_what_stands_out(statistic):
    """A burst of noise among waves; and the level of alarms is kept on the rest."""
    x = TEST.copy()
    x[100:106] += np.random.default_rng(3).normal(size=(6, 2)) * [3, 3000]
    detector = jaxcae.ContractiveDetector(WINDOW, statistic=statistic, **QUICK).fit(TRAIN)
    predicted = detector.predict(x)
    if statistic != "jacobian_norm":  # which says little after so short a training
        assert (predicted[100:106] == -1).all()
    assert np.mean(np.delete(predicted, np.arange(85, 121)) == -1) < 3 * detector.alpha_


# --------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"statistic": "reconstruction+neighbour", "random_state": np.random.RandomState(1)},
        {"placement": "last", "window": np.int64(WINDOW)},
    ],
)
def test_what_is_saved_comes_back_to_the_bit(settings, tmp_path, untyped, capsys):
    """Scores, levels, names and arguments, through a run directory that other commands read."""
    frame = pd.DataFrame(TRAIN, columns=["a", "b"])
    detector = jaxcae.ContractiveDetector(**{"window": WINDOW, **QUICK, **settings}).fit(frame)
    back = jaxcae.ContractiveDetector.load(detector.save(tmp_path / "run"))
    frame = pd.DataFrame(TEST, columns=["a", "b"])
    for method in ("score_samples", "p_values", "predict", "reconstruct"):
        want = getattr(detector, method)(frame)
        assert np.array_equal(getattr(back, method)(frame), want, equal_nan=True), method
    assert (back.alpha_, back.offset_) == (detector.alpha_, detector.offset_)
    assert np.array_equal(back.decision_scores_, detector.decision_scores_, equal_nan=True)
    assert list(back.feature_names_in_) == ["a", "b"]
    given = {**detector.get_params(), "random_state": back.random_state}
    assert back.get_params() == given
    assert open_run(tmp_path / "run").config.model.sizes == detector.recipe_.sizes
    assert main(["info", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"]["state"] == "finished"
    with pytest.raises(ValueError, match="holds a run already"):
        detector.save(tmp_path / "run")
    detector.save(tmp_path / "run", overwrite=True)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mlp", "temporal_conv"])
def test_a_saved_detector_is_a_run_that_the_command_line_scores(model, tmp_path, capsys):
    """The same scores from a file of the same columns, in any order, whatever the network."""
    frame = pd.DataFrame(TRAIN, columns=["a", "b"])
    detector = jaxcae.ContractiveDetector(WINDOW, model=model, **QUICK).fit(frame)
    run = detector.save(tmp_path / "run")
    back = jaxcae.ContractiveDetector.load(run)
    frame = pd.DataFrame(TEST, columns=["a", "b"])
    want = -detector.score_samples(frame)
    assert np.array_equal(-back.score_samples(frame), want)
    frame[["b", "a"]].to_csv(tmp_path / "test.csv", index=False)
    out = tmp_path / "scores.csv"
    command = ["score", str(run), "--data", str(tmp_path / "test.csv"), "--output", str(out)]
    assert main(command) == 0
    assert np.allclose(pd.read_csv(out)["score"], want, rtol=1e-6)


def test_a_temporal_convolution_is_of_windows():
    """About eight rows are left of any window; rows that stand alone have none."""
    for size, depth in ((8, 1), (12, 1), (128, 4), (200, 5)):
        recipe = Recipe.of(size, 2, "temporal_conv", None, None, "auto", 1e-3)
        assert recipe.features == (16,) * depth
        assert 4 <= size / 2**depth <= 12
    with pytest.raises(ValueError, match="say the rows of `window`"):
        Recipe.of(None, 2, "temporal_conv", None, None, "auto", 1e-3)


def test_damage_to_a_saved_detector_is_refused_in_one_line(series, rows, tmp_path):
    """A flipped bit in either file, a cut or missing file, that of another detector."""
    path = series.save(tmp_path / "run")
    file = path / "detector.safetensors"
    whole = file.read_bytes()

    def refused(match):
        with pytest.raises((CheckpointError, ValueError), match=match) as error:
            jaxcae.ContractiveDetector.load(path)
        assert "\n" not in str(error.value)

    for place in (12, len(whole) // 2, len(whole) - 3):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        refused("detector.safetensors")
    file.write_bytes(whole[:-8])
    refused("detector.safetensors")
    other = rows.save(tmp_path / "2")
    shutil.copy(other / "detector.safetensors", file)
    refused("another network")
    file.unlink()
    refused("without a detector")
    params = path / "params.safetensors"
    params.write_bytes(params.read_bytes()[:-4] + b"abcd")
    refused("params.safetensors")


# --------------------------------------------------------------------------- bad input


def test_without_scikit_learn_there_is_a_line_that_says_how_to_get_it(monkeypatch):
    """Where the detector is asked for, and the rest of the library is as it was."""
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    monkeypatch.delitem(sys.modules, "jaxcae.results.detection.detector")
    with pytest.raises(ImportError, match=r"needs sklearn.*: run pip install .*train") as error:
        _ = jaxcae.ContractiveDetector
    assert "\n" not in str(error.value)
    assert "ContractiveDetector" in dir(jaxcae)
    assert "ContractiveDetector" not in jaxcae.__all__


WIDE = np.full((60, 2), np.nan)
CONSTANT = TRAIN.copy()
CONSTANT[:, 1] = 0.1
Detector = jaxcae.ContractiveDetector

BAD = {
    "too short": (lambda: Detector(WINDOW).fit(TRAIN[:50]), "too short for windows of 12"),
    "window longer than the data": (lambda: Detector(501).fit(TRAIN), "has 500"),
    "all gaps": (lambda: Detector(WINDOW).fit(WIDE), "nothing is left"),
    "gaps everywhere": (
        lambda: Detector(WINDOW).fit(np.where(np.arange(500)[:, None] % 9 == 0, np.nan, TRAIN)),
        "fits between no two gaps: the longest stretch without one has 8",
    ),
    "one channel constant": (lambda: Detector(WINDOW).fit(CONSTANT), "channel 1"),
    "one named channel constant": (
        lambda: Detector(WINDOW).fit(pd.DataFrame(CONSTANT, columns=["a", "flow"])),
        "channel flow",
    ),
    "times that go back": (
        lambda: Detector(WINDOW).fit(TRAIN, times=np.arange(500) % 400),
        "row 400 .* before the row",
    ),
    "times that come twice": (
        lambda: Detector(WINDOW).fit(TRAIN, times=np.arange(500) // 2),
        "comes twice",
    ),
    "too few times": (lambda: Detector(WINDOW).fit(TRAIN, times=[1, 2]), "each of 500 rows"),
    "times of rows": (lambda: Detector().fit(TRAIN, times=np.arange(500)), "of a series"),
    "an infinite value": (
        lambda: Detector(WINDOW).fit(np.where(TRAIN > 900, np.inf, TRAIN)),
        "infinity",
    ),
    "values too large to square": (
        lambda: Detector(WINDOW).fit(TRAIN * [1, 1e300]),
        "too large to square in column 1",
    ),
    "masked values in rows": (lambda: Detector().fit(np.ma.masked_less(TRAIN, 0)), "NaN"),
    "a column of times": (
        lambda: Detector(WINDOW).fit(
            pd.DataFrame({"when": pd.date_range("2026", periods=500), "v": TRAIN[:, 0]})
        ),
        "give it as `times`",
    ),
    "missing values in rows": (lambda: Detector().fit(WIDE), "NaN"),
    "three rows": (lambda: Detector().fit(TRAIN[:3]), r"3 sample\(s\)"),
    "window of 0": (lambda: Detector(0).fit(TRAIN), "window must be a positive int"),
    "window of 2.5": (lambda: Detector(2.5).fit(TRAIN), "window must be a positive int"),
    "latent of 0": (lambda: Detector(latent=0).fit(TRAIN), "latent must be a positive int"),
    "steps of 0": (lambda: Detector(steps=0).fit(TRAIN), "steps must be a positive int"),
    "batch of 0": (lambda: Detector(batch_size=0).fit(TRAIN), "batch_size must be a pos"),
    "negative contraction": (
        lambda: Detector(contraction=-1).fit(TRAIN),
        "contraction must be finite and at least 0",
    ),
    "unknown contraction": (lambda: Detector(contraction="big").fit(TRAIN), "contraction 'big'"),
    "unknown statistic": (lambda: Detector(statistic="two").fit(TRAIN), "choose from auto"),
    "unknown model": (lambda: Detector(model="gru").fit(TRAIN), "unknown model 'gru'"),
    "unknown placement": (lambda: Detector(placement="first").fit(TRAIN), "placement 'first'"),
    "gap below 1": (lambda: Detector(WINDOW, gap=0.2).fit(TRAIN), "median steps"),
    "calibration of 1": (lambda: Detector(calibration=1).fit(TRAIN), "calibration is a share"),
    "two scales of rows": (lambda: Detector(statistic="two_scale").fit(TRAIN), "of a series"),
    "norms of a plain network": (
        lambda: Detector(statistic="jacobian_norm", contraction=None).fit(TRAIN),
        "without contraction",
    ),
    "norms of a network with a contraction of 0": (
        lambda: Detector(statistic="jacobian_norm", contraction=0).fit(TRAIN),
        "without contraction",
    ),
    "alpha below what there is": (
        lambda: Detector(WINDOW, alpha=0.01, **QUICK).fit(TRAIN),
        "alpha 0.01 is below 0.12",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(name, untyped):
    """Of the family of ValueError, with what came and what to do, before training."""
    call, words = BAD[name]
    with pytest.raises(ValueError, match=words) as error:
        call()
    ours = type(error.value).__module__.startswith("jaxcae") or "must" in words
    assert "\n" not in str(error.value) or not ours


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (TEST[:5], "longer than the series, which has 5"),
        (TEST[:, :1], "2 features"),
        (WIDE, "nothing is left"),
    ],
)
def test_bad_input_to_a_fitted_detector_is_refused_in_one_line(series, x, words):
    """By all that look at data."""
    for method in ("score_samples", "predict", "p_values", "events", "reconstruct"):
        with pytest.raises(ValueError, match=words) as error:
            getattr(series, method)(x)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="row 999"):
        series.explain(TEST, [999])
