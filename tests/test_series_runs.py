"""Runs on windows of a series: which rows train, which calibrate, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from jaxcae.data import TableOptions
from jaxcae.data.series import anomalies, open_series
from jaxcae.errors import InputError
from jaxcae.runs import Config, open_run, train
from jaxcae.runs.windowed import load_parts, of_channels, tiled, windows_of

W = 8


def table(rows=120, *, label=None, times=None, channels=2):
    """A series of sines as a CSV's text."""
    t = np.arange(rows)
    columns = {f"c{i}": np.sin(t / (2 + i)).round(6) for i in range(channels)}
    columns |= {} if times is None else {"when": times}
    columns |= {} if label is None else {"label": label}
    lines = [",".join(columns)]
    lines += [",".join(str(v[i]) for v in columns.values()) for i in range(rows)]
    return "\n".join(lines) + "\n"


def config(path, **settings):
    return Config.of(data=str(path), **{"window": W, "epochs": 1, "compare": False, **settings})


@pytest.fixture
def csv(tmp_path):
    """Write a CSV and return its path."""

    def write(**options):
        path = tmp_path / "a.csv"
        path.write_text(table(**options))
        return path

    return write


def rows_in(segments):
    return [row for start, stop in segments.tolist() for row in range(start, stop)]


def test_no_row_is_in_windows_of_both_kinds(csv):
    """The last fifth calibrates, after a gap of a window."""
    parts = load_parts(config(csv(rows=100)))
    assert rows_in(parts.train) == list(range(80))
    assert rows_in(parts.calibration) == list(range(80 + W, 100))


def test_anomalous_rows_and_rows_after_the_end_are_left_out(csv):
    """By label, and by `train_until`; the share held out is of normal rows."""
    label = [int(20 <= row < 25 or row == 150) for row in range(200)]
    parts = load_parts(config(csv(rows=200, label=label), train_until="105"))
    assert rows_in(parts.train) == [*range(20), *range(25, 85)]
    assert rows_in(parts.calibration) == list(range(85 + W, 105))
    assert parts.train_rows == 105
    assert parts.preparation.standardization.mean[0] == pytest.approx(
        parts.series.values[rows_in(parts.train), 0].mean(), abs=1e-12
    )


def test_no_window_crosses_a_gap_or_a_missing_row(csv, tmp_path):
    """Nor the seam of two recordings."""
    times = [row + 50 * (row >= 30) for row in range(120)]
    path = csv(times=times)
    lines = path.read_text().splitlines()
    lines[1 + 60] = ",".join(["", *lines[61].split(",")[1:]])
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=r"line 62, column 1: the cell is empty"):
        load_parts(config(path, time_column="when"))
    parts = load_parts(config(path, time_column="when", missing="drop"))
    assert [s.tolist() for s in parts.train] == [[0, 30], [30, 60], [61, 96]]
    assert load_parts(
        config(path, time_column="when", missing="drop", max_gap=99.0)
    ).train.tolist() == [
        [0, 60],
        [61, 96],
    ]
    filled = load_parts(config(path, time_column="when", missing="mean"))
    assert [s.tolist() for s in filled.train] == [[0, 30], [30, 96]]
    assert np.isfinite(filled.values).all()
    series = dataclasses.replace(filled.series, starts=(50, 70))
    usable = np.ones(len(series), bool)
    assert series.segments(usable).tolist() == [[0, 30], [30, 50], [50, 70], [70, 120]]


def test_windows_are_rows_of_all_channels_in_time():
    """Against what slicing gives; the preparation of channels is theirs, repeated."""
    values = np.arange(30.0).reshape(10, 3)
    got = windows_of(values, np.array([0, 4, 7]), 3)
    np.testing.assert_array_equal(got, [values[s : s + 3].ravel() for s in (0, 4, 7)])


@pytest.mark.slow
def test_a_run_keeps_what_its_series_needs(csv, tmp_path):
    """Settings that suit a series, names of channels, their scaling, the rows it trained on."""
    path = csv(rows=160)
    outcome = train(config(path), tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert run.config == outcome.config
    assert run.config.model.sizes == (2 * W, 2 * 4, 4)
    assert (run.config.model.activation, run.config.objective.contraction) == ("softplus", 1.0)
    assert run.config.data.feature_names == ("c0", "c1")
    assert run.config.series.train_rows == 160
    channels = of_channels(run.preparation, run.config)
    assert channels.feature_names == ("c0", "c1")
    np.testing.assert_array_equal(
        tiled(channels, W).standardization.mean, run.preparation.standardization.mean
    )
    again = train(run.config, tmp_path / "run", resume=True)  # the run is done; nothing differs
    assert again.report is not None
    other = tmp_path / "b.csv"
    other.write_text(table(rows=160).replace("0.479426", "0.479427"))
    with pytest.raises(InputError, match="digest is another"):
        train(run.config.replace(data=str(other)), tmp_path / "run", resume=True)


def test_a_run_on_rows_says_nothing_of_series():
    """So earlier versions read it; and what they wrote, which has no such section, is read."""
    written = Config.of(data="digits").to_json()
    assert "series" not in written
    assert Config.from_json(json.loads(json.dumps(written))) == Config.of(data="digits")
    windowed = Config.of(data="a.csv", window=16)
    assert Config.from_json(json.loads(json.dumps(windowed.to_json()))) == windowed
    assert Config.of(data="a.csv", window=16, activation="tanh").model.activation == "tanh"


@pytest.mark.parametrize(
    ("labels", "normal", "expected"),
    [
        ([0, 1, 2, 0], None, [0, 1, 1, 0]),
        ([0.0, 1.0, 0.0], None, [0, 1, 0]),
        ([False, True], None, [0, 1]),
        (["normal", "anomaly"], None, [0, 1]),
        (["Normal ", "N"], "normal", [0, 1]),
        ([1, -1], "1", [0, 1]),
        ([1.0, -1.0], "1", [0, 1]),
        (["a", "b", "c"], "b", [1, 0, 1]),
    ],
)
def test_labels_tell_which_rows_are_normal(labels, normal, expected):
    """Numbers by 0, words by normal and the like, others by what is asked for."""
    assert anomalies("a.csv", np.array(labels), normal).astype(int).tolist() == expected


@pytest.mark.parametrize(
    ("labels", "normal", "message"),
    [
        ([1, -1], None, "the labels are -1, 1; none is 0, false or normal. Say which"),
        (["a", "b"], None, "the labels are a, b; none is 0"),
        (["normal", "odd", "strange"], None, "the labels are normal, odd, strange. Say which"),
        ([0, 1], "2", "none is '2'"),
    ],
)
def test_labels_that_do_not_tell_are_refused(labels, normal, message):
    """Instead of a guess."""
    with pytest.raises(InputError, match=message):
        anomalies("a.csv", np.array(labels), normal)


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        (
            {"rows": 20},
            {},
            r"20 normal rows to train and calibrate on, windows of 8 need at least 80",
        ),
        ({}, {}, r"9 windows of 8 are held out to calibrate on.*at least 16 are needed"),
        ({}, {"window": 500}, r"120 normal rows .* need at least 5,000. Use a shorter `window`"),
        ({"times": range(0, 240, 2)}, {"time_column": "when", "window": 50}, "need at least"),
        ({"times": [5] * 120}, {"time_column": "when"}, "line 3: the time 5 comes twice"),
        ({"times": range(120, 0, -1)}, {"time_column": "when"}, "line 3: the time goes back"),
        (
            {"times": np.cumsum([1 + 99 * (i % 3 == 0) for i in range(120)])},
            {"time_column": "when"},
            r"normal rows to train on: a window of 8 rows fits between no two gaps",
        ),
        ({"label": [1] * 120}, {}, r"none is 0, false or normal"),
        ({"label": [1, *[0] * 119]}, {"normal_label": "1"}, r"1 normal rows"),
        ({"channels": 2}, {"train_until": "200"}, "there are 120 rows"),
        ({}, {"train_until": "soon"}, "without `time_column` it is a number of rows"),
        ({}, {"window": 8, "stream": True}, "`stream` reads samples in rows"),
        ({}, {"max_gap": 0.5}, "`max_gap` must be finite and at least 1"),
        ({}, {"window": None, "epochs": 0}, "`epochs` must be at least 1"),
        ({}, {"window": None, "train_until": "9"}, "give the rows of a `window`"),
    ],
)
def test_a_series_that_cannot_be_used_is_refused_in_a_line(
    csv, options, settings, message, tmp_path
):
    """Before anything is trained."""
    with pytest.raises(InputError, match=message) as error:
        train(config(csv(**options), **settings), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_constant_channels_are_named_and_nothing_but_constants_refused(tmp_path):
    """One constant channel stays, unscaled."""
    values = np.stack([np.sin(np.arange(120)), np.ones(120)], 1)
    path = tmp_path / "a.npy"
    np.save(path, values)
    with pytest.warns(UserWarning, match="1 constant column"):
        parts = load_parts(config(path))
    assert parts.preparation.standardization.deviation[1] == 1
    np.save(path, np.ones((120, 2)))
    with pytest.raises(InputError, match="every channel is constant"):
        load_parts(config(path))


def test_a_named_series_brings_its_training_part(tmp_path):
    """Unless another is asked for."""
    from jaxcae.data.dataset import Dataset, Usage

    data = Dataset(np.arange(200.0)[:, None], None, "named", None, "words", series=Usage(100))
    series = open_series(data, TableOptions())
    assert (series.rows_before(None), series.rows_before("120"), series.name) == (100, 120, "named")
