"""Times of the rows of a series, in every form that files give them; and series by name."""

import datetime
import importlib.util
import sys

import numpy as np
import pytest

from jaxcae.data import CATALOGUE, load
from jaxcae.data.catalogue import _SERIES
from jaxcae.data.times import check_ascending, parse_times, row_of, sampling
from jaxcae.errors import InputError


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["2024-05-01", "2024-05-02"], "2024-05-02T00:00"),
        (["2024-05-01 12:00", "2024-05-01 12:01"], "2024-05-01T12:01"),
        (["2024-05-01T12:00:00", "2024-05-01T12:00:00.25"], "2024-05-01T12:00:00.25"),
        (["2024-05-01T12:00:00", "2024-05-01T12:00:00,25"], "2024-05-01T12:00:00.25"),
        (["2024-05-01T12:00:00Z", "2024-05-01T12:00:01 UTC"], "2024-05-01T12:00:01"),
        (["2024-05-01T12:00:00+02:00", "2024-05-01T10:00:01Z"], "2024-05-01T10:00:01"),
        (["2024-05-01T12:00:00-0330", "2024-05-01T15:31:00+00"], "2024-05-01T15:31"),
        (["2024-05-01T12:00:00.000000001", "2024-05-01T12:00:00.000000002"], None),
        (["9999-12-30", "9999-12-31"], "9999-12-31"),
    ],
)
def test_iso_8601_in_its_forms(cells, expected):
    """Offsets are brought to UTC, and the smallest fraction is kept."""
    times = parse_times("a.csv", cells)
    check_ascending("a.csv", times)
    assert times.text(1) == cells[1]
    if expected:
        assert times.values[1] == np.datetime64(expected, "us")


@pytest.mark.parametrize(
    ("cells", "kind", "last"),
    [
        (["1714564800", "1714564801"], "i", 1714564801),
        (["1714564800.25", "1714564800.5"], "f", 1714564800.5),
        (["1714564800000000001", "1714564800000000002"], "i", 1714564800000000002),
        (["-3", "0"], "i", 0),
    ],
)
def test_numbers_are_times_with_all_their_digits(cells, kind, last):
    """Nanoseconds since 1970 are more than float64 holds."""
    times = parse_times("a.csv", cells)
    check_ascending("a.csv", times)
    assert times.values.dtype.kind == kind
    assert times.values[1] == last


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["2024-05-01", ""], r"row 1 .*the time is empty. Expected ISO 8601"),
        (["2024-05-01", "01/05/2024"], r"row 1 .*the time is '01/05/2024'"),
        (["2024-05-01", "2024-13-01"], r"row 1 .*there is no time '2024-13-01'"),
        (["2024-05-01", "now"], r"row 1 .*the time is 'now'"),
        (["2024-05-01", "7"], r"row 1 .*the time is '7'"),
        (["1", "nan"], r"row 1 .*the time is 'nan'"),
        (["1", "1_000"], r"row 1 .*the time is '1_000'"),
        (["2024-05-01T12:00:00Z", "2024-05-01T12:00:01"], r"row 1 .*has no offset, those before"),
        (["0001-01-01T00:00:00.000000001"], r"nanoseconds reach from 1678"),
        (["2024-05-01\x1b[31m"], r"x1b"),
    ],
)
def test_what_is_no_time_is_named(cells, message):
    """One line with the row, and nothing raw from the file."""
    with pytest.raises(InputError, match=message) as error:
        parse_times("a.csv", cells)
    assert "\n" not in str(error.value)
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["1", "2", "2", "3"], "row 2 .* 2 comes twice. Keep one row"),
        (["1", "2", "2", "2"], "row 2 .*comes twice, and 1 more"),
        (["1", "3", "2"], "row 2 .*goes back from 3 to 2. Sort"),
        (["2024-05-02", "2024-05-01"], "row 1 .*goes back from 2024-05-02 to 2024-05-01"),
        (["2024-05-01T12:00+01:00", "2024-05-01T12:00+02:00"], "goes back"),
    ],
)
def test_times_ascend_or_are_refused(cells, message):
    """Duplicates and steps back are never sorted or dropped in silence."""
    with pytest.raises(InputError, match=message):
        check_ascending("a.csv", parse_times("a.csv", cells))


def test_sampling_is_put_into_words():
    """The step, irregular steps, and gaps with the place of the longest."""
    seconds = np.arange(100.0)
    assert sampling(parse_times("x", [str(s) for s in seconds])) == "a row every 1"
    start = datetime.datetime(2024, 5, 1)
    dated = [(start + datetime.timedelta(minutes=5 * int(s))).isoformat() for s in seconds]
    assert sampling(parse_times("x", dated)) == "a row every 5 min"
    gap = dated[:40] + dated[60:]
    words = sampling(parse_times("x", gap))
    assert words == "a row every 5 min; a gap of 1.75 h after 2024-05-01T03:15:00 (row 39 (from 0))"
    assert "2 gaps" in sampling(parse_times("x", dated[:20] + dated[30:50] + dated[60:]))
    irregular = np.cumsum(np.tile([1.0, 1.2, 0.7], 30))
    assert sampling(parse_times("x", [str(s) for s in irregular])).startswith("irregular, a row")


@pytest.mark.parametrize(
    ("until", "cells", "rows"),
    [
        ("3", None, 3),
        ("3", ["10", "20", "30", "40"], 3),
        ("30", ["10", "20", "30", "40"], 2),
        ("25.5", ["10", "20", "30", "40"], 2),
        ("2024-05-03", ["2024-05-01", "2024-05-02", "2024-05-03", "2024-05-04"], 2),
        ("2024-05-02T01:00+02:00", [f"2024-05-0{d}T00:00Z" for d in (1, 2, 3, 4)], 1),
        ("1970-01-01T00:00:25", ["10", "20", "30", "40"], 2),
    ],
)
def test_a_row_or_a_time_ends_the_training_part(until, cells, rows):
    """Rows before it are for training."""
    times = None if cells is None else parse_times("a.csv", cells)
    assert row_of(until, times, 4) == rows


@pytest.mark.parametrize(
    ("until", "cells", "message"),
    [
        ("2024-05-01", None, "without `time_column` it is a number of rows"),
        ("9", None, "there are 3 rows"),
        ("0", ["1", "2", "3"], "no row lies before it"),
        ("1", ["2024-05-01", "2024-05-02", "2024-05-03"], None),
        ("2023-01-01", ["2024-05-01", "2024-05-02", "2024-05-03"], "no row lies before it"),
        ("7.5", ["2024-05-01", "2024-05-02", "2024-05-03"], "the times of the series are dates"),
        ("soon", ["2024-05-01", "2024-05-02", "2024-05-03"], "Expected ISO 8601"),
    ],
)
def test_what_ends_no_training_part_is_refused(until, cells, message):
    """In the caller's words."""
    times = None if cells is None else parse_times("a.csv", cells)
    if message is None:
        assert row_of(until, times, 3) == 1
        return
    with pytest.raises(InputError, match=message):
        row_of(until, times, 3)


TABLE = "when,a,label\n2024-05-01T00:00:00Z,1,0\n2024-05-01T00:00:01Z,2,1\n"


@pytest.mark.parametrize("quoted", [False, True])
def test_a_csv_keeps_its_times_beside_the_features(tmp_path, quoted):
    """By either reader; the column of times is no feature."""
    path = tmp_path / "a.csv"
    path.write_text(TABLE.replace(",a,", ',"a",') if quoted else TABLE)
    data = load(path, time_column="when")
    assert data.feature_names == ("a",)
    assert data.times.texts == ("2024-05-01T00:00:00Z", "2024-05-01T00:00:01Z")
    assert data.labels.tolist() == [0, 1]
    assert "time column when" in data.taken
    path.write_text(TABLE.replace("01Z", "0xZ"))
    with pytest.raises(InputError, match=f"{path}: line 3: the time is '2024-05-01T00:00:0xZ'"):
        load(path, time_column="when")


@pytest.mark.parametrize("library", ["pandas", "polars", "pyarrow"])
@pytest.mark.parametrize("zone", [None, "Europe/Paris"])
def test_frames_give_their_times(library, zone):
    """Whatever the library calls a time with a zone; in UTC."""
    moments = [datetime.datetime(2024, 5, 1, hour, tzinfo=datetime.UTC) for hour in (10, 11)]
    if zone is None:
        moments = [moment.replace(tzinfo=None) for moment in moments]
    columns = {"when": moments, "a": [1.0, 2.0]}
    if library == "pandas":
        pandas = pytest.importorskip("pandas")
        frame = pandas.DataFrame(columns)
        frame["when"] = frame["when"].dt.tz_convert(zone) if zone else frame["when"]
    elif library == "polars":
        polars = pytest.importorskip("polars")
        frame = polars.DataFrame(columns)
        if zone:
            frame = frame.with_columns(polars.col("when").dt.convert_time_zone(zone))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        kind = pyarrow.timestamp("us", tz=zone)
        frame = pyarrow.table({"when": pyarrow.array(moments, kind), "a": columns["a"]})
    data = load(frame, time_column="when")
    assert data.feature_names == ("a",)
    assert data.times.values.astype("datetime64[s]").tolist() == [
        datetime.datetime(2024, 5, 1, 10),
        datetime.datetime(2024, 5, 1, 11),
    ]


def test_a_time_that_is_missing_or_unknown_is_refused(tmp_path):
    """A column that is not there, one that is a label too, and a table without names."""
    path = tmp_path / "a.csv"
    path.write_text(TABLE)
    with pytest.raises(InputError, match=r"unknown column 'wehn'.*Did you mean 'when'"):
        load(path, time_column="wehn")
    with pytest.raises(InputError, match="is labels, or left out, too"):
        load(path, time_column="label", label_column="label")
    np.save(tmp_path / "a.npy", np.ones((3, 2)))
    with pytest.raises(InputError, match="has no column names"):
        load(tmp_path / "a.npy", time_column="when")


# --------------------------------------------------------------------------- series by name


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Packages that must not be imported, with small files where the series are."""
    for entry in _SERIES.values():
        folder = tmp_path / entry.package
        for number, file in enumerate(entry.files):
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            (folder / "__init__.py").write_text("raise RuntimeError('imported')")
            head = [*([entry.time] if entry.time else []), "value", entry.label]
            rows = [
                ",".join([*([str(i)] if entry.time else []), f"{i + number / 2}", str(i % 2)])
                for i in range(4)
            ]
            path.write_text("\n".join([",".join(head), *rows, ""]))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", sorted(_SERIES))
def test_a_series_is_read_without_importing_its_package(name, packages):
    """With its labels, its times where they count on, and how it is meant to be used."""
    entry = _SERIES[name]
    data = load(name)
    assert entry.package not in sys.modules
    assert len(data) == 4 * len(entry.files)
    assert data.labels.tolist() == [0, 1, 0, 1] * len(entry.files)
    assert (data.times is not None) == (entry.time is not None and len(entry.files) == 1)
    assert data.series.train_rows > data.series.window
    assert data.feature_names == ("value",)
    assert name in CATALOGUE


def test_a_series_that_is_not_installed_says_what_to_do(packages, monkeypatch):
    """Also where the package is there and the file is not."""
    (packages / "sktime/datasets/data/mitdb/mitdb.csv").unlink()
    with pytest.raises(InputError, match="another version without it: run pip install --no-deps"):
        load("mitdb")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="aeon package, which is not installed"):
        load("daphnet")
