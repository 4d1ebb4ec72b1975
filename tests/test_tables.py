"""Tables: columns by name, nothing guessed in silence, the same numbers by every way in."""

import gzip
import io
import itertools
import re
import struct
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st

from jaxcae import data
from jaxcae.data import text
from jaxcae.errors import InputError

NAMES = ["temp", "pressure", "flow"]


@pytest.fixture
def rows(rng: np.random.Generator) -> np.ndarray:
    return np.round(rng.normal([20, 3, 0.5], [1, 0.3, 0.05], (40, 3)), 4)


def write(path: Path, columns: dict[str, np.ndarray]) -> Path:
    """Write a table in the way of the ending."""
    frame = pd.DataFrame(columns)
    if path.suffix == ".parquet":
        frame.to_parquet(path, index=False)
    elif path.suffix == ".npz":
        np.savez(path, features=frame.to_numpy(), feature_names=np.array(list(columns)))
    else:
        frame.to_csv(path, index=False)  # packed where the name ends in .gz
    return path


WAYS = (".csv", ".csv.gz", ".parquet", ".npz")


def frames(columns: dict[str, np.ndarray]) -> list[object]:
    return [pd.DataFrame(columns), pl.DataFrame(columns), pa.table(columns)]


# --------------------------------------------------------------------------- names


@pytest.mark.parametrize("suffix", WAYS)
def test_columns_come_in_the_order_of_their_names(
    tmp_path: Path, rows: np.ndarray, suffix: str
) -> None:
    want = rows.astype(np.float32)
    for order in itertools.permutations(range(3)):
        columns = {NAMES[i]: rows[:, i] for i in order}
        got = data.load(write(tmp_path / f"a{suffix}", columns), names=NAMES)
        np.testing.assert_array_equal(got.features, want)
        assert got.feature_names == tuple(NAMES)
    for frame in frames(columns):
        np.testing.assert_array_equal(data.load(frame, names=NAMES).features, want)


@pytest.mark.parametrize("suffix", WAYS)
@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["temp", "pressure"], "flow is missing"),
        (["temp"], "pressure, flow are missing"),
        ([*NAMES, "extra"], "extra is not known"),
        (["temp", "pressure", "Flow"], "flow is missing; Flow is not known"),
    ],
)
def test_other_columns_are_refused_by_name(
    tmp_path: Path, suffix: str, names: list[str], complaint: str
) -> None:
    columns = {name: np.arange(5.0) ** i for i, name in enumerate(names)}
    path = write(tmp_path / f"a{suffix}", columns)
    for source in (path, *frames(columns)):
        with pytest.raises(InputError, match=complaint):
            data.load(source, names=NAMES)


@pytest.mark.parametrize("suffix", WAYS)
def test_what_is_named_is_left_out(tmp_path: Path, rows: np.ndarray, suffix: str) -> None:
    columns = {"time": np.arange(40.0), **{n: rows[:, i] for i, n in enumerate(NAMES)}}
    got = data.load(write(tmp_path / f"a{suffix}", columns), names=NAMES, drop=["time"])
    np.testing.assert_array_equal(got.features, rows.astype(np.float32))
    assert "without time" in got.taken
    with pytest.raises(InputError, match=r"unknown column 'tme'.*Did you mean 'time'"):
        data.load(tmp_path / f"a{suffix}", drop=["tme"])


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv"])
def test_columns_without_names_are_told_to_be_taken_by_position(
    tmp_path: Path, rows: np.ndarray, suffix: str
) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".npy":
        np.save(path, rows)
    elif suffix == ".npz":
        np.savez(path, rows)
    else:
        np.savetxt(path, rows, delimiter=",")
    with pytest.warns(UserWarning, match=r"no column names; .* be temp, pressure, flow"):
        data.load(path, names=NAMES)


def test_names_that_come_twice_are_refused(tmp_path: Path) -> None:
    frame = pd.DataFrame(np.ones((3, 3)), columns=["a", "b", "a"])
    frame.to_csv(tmp_path / "a.csv", index=False)
    arrow = pa.table([pa.array([1.0])] * 2, names=["a", "a"])
    pa.parquet.write_table(arrow, tmp_path / "a.parquet")
    np.savez(tmp_path / "a.npz", features=np.ones((3, 2)), feature_names=np.array(["a", "a"]))
    for source in (*(tmp_path / f"a{s}" for s in (".csv", ".parquet", ".npz")), frame, arrow):
        with pytest.raises(InputError, match=r"a"):
            data.load(source)


# --------------------------------------------------------------------------- labels


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(
    "labels", [np.arange(40) % 2, np.arange(40) / 8, np.array(["normal", "attack"] * 20)]
)
def test_a_column_of_labels_of_any_kind_goes_apart(
    tmp_path: Path, rows: np.ndarray, suffix: str, labels: np.ndarray
) -> None:
    columns = {"temp": rows[:, 0], "state": labels, "flow": rows[:, 2]}
    path = write(tmp_path / f"a{suffix}", columns)
    for source in (path, *frames(columns)):
        got = data.load(source, label_column="state")
        np.testing.assert_array_equal(got.features, rows[:, [0, 2]].astype(np.float32))
        np.testing.assert_array_equal(got.labels, labels)
        assert "label column state; 2 features: temp, flow" in got.taken


@pytest.mark.parametrize(
    "name",
    "Label LABELS is_anomaly Class target outlier isFraud Attack attack_cat Normal_Attack".split(),
)
def test_a_feature_that_looks_like_a_label_is_told(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a.csv", {"a": np.arange(4.5), name: np.arange(5.0) % 2})
    with pytest.warns(UserWarning, match=f"{name} is taken as a feature and looks like a label"):
        data.load(tmp_path / "a.csv")
    np.savez(tmp_path / "a.npz", x=np.ones((5, 2)), **{name: np.ones(5)})
    with pytest.warns(UserWarning, match="looks like labels"):
        assert data.load(tmp_path / "a.npz").labels is None


def test_columns_without_names_are_called_by_number(tmp_path: Path, rows: np.ndarray) -> None:
    np.savetxt(tmp_path / "a.csv", np.c_[np.arange(40) % 3, rows], "%.9g", delimiter=",")
    got = data.load(tmp_path / "a.csv", label_column="1", drop=["4"])
    np.testing.assert_array_equal(got.labels, np.arange(40) % 3)
    np.testing.assert_array_equal(got.features, rows[:, :2].astype(np.float32))


def test_labels_that_are_no_column_are_left_out_with_a_word(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones((5, 2)), y=np.eye(5))
    with pytest.warns(UserWarning, match="not one label per row"):
        assert data.load(tmp_path / "a.npz").labels is None
    np.savez(tmp_path / "a.npz", x=np.ones((5, 2)), y=np.array([["cat"], ["dog"]] * 2 + [["cat"]]))
    assert data.load(tmp_path / "a.npz").labels.tolist() == ["cat", "dog", "cat", "dog", "cat"]


def test_an_array_can_be_named(tmp_path: Path) -> None:
    arrays = {"x_train": np.ones((5, 2)), "x_test": np.zeros((3, 2)), "y_train": np.arange(5)}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=r"which array.*'x_train', 'x_test'.*`array`"):
        data.load(tmp_path / "a.npz")
    got = data.load(tmp_path / "a.npz", array="x_train", label_column="y_train")
    assert (got.features == 1).all()
    assert got.labels.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(InputError, match=r"unknown array 'x_tain'.*mean 'x_train'"):
        data.load(tmp_path / "a.npz", array="x_tain")


@pytest.mark.parametrize("kind", [".npy", ".npz", ".csv", ".parquet", "folder", "frame", "digits"])
@pytest.mark.parametrize(
    ("option", "value"),
    [("array", "x"), ("header", "no"), ("delimiter", "tab"), ("decimal", "comma")],
)
def test_an_option_that_says_nothing_of_the_data_is_refused(
    tmp_path: Path, rows: np.ndarray, kind: str, option: str, value: str
) -> None:
    columns = dict(zip(NAMES, rows.T, strict=True))
    source: Any = kind if kind == "digits" else frames(columns)[0]
    if kind.startswith("."):
        source = write(tmp_path / f"a{kind}", columns) if kind != ".npy" else tmp_path / "a.npy"
    if kind in (".npy", "folder"):
        np.save(tmp_path / "a.npy", rows)
        source = tmp_path / "a.npy" if kind == ".npy" else tmp_path
    if kind == (".npz" if option == "array" else ".csv"):
        with pytest.raises(InputError, match=r"^(?!.*says nothing here)"):  # of the data, instead
            data.load(source, **{option: value})
        return
    with pytest.raises(InputError, match=f"`{option}` is about .* says nothing here"):
        data.load(source, **{option: value})


# --------------------------------------------------------------------------- the first line


@pytest.mark.parametrize("names", [range(4), range(1, 5), range(2019, 2023), [400.5, 401.0, 401.5]])
def test_a_first_line_of_even_numbers_is_no_sample_in_silence(
    tmp_path: Path, rng: np.random.Generator, names: list[float]
) -> None:
    names = list(names)
    frame = pd.DataFrame(rng.random((30, len(names))), columns=names)
    frame.to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(InputError, match=r"a sample.*`header='yes'` or `header='no'`"):
        data.load(tmp_path / "a.csv")
    got = data.load(tmp_path / "a.csv", header="yes")
    assert got.feature_names == tuple(map(str, names))
    np.testing.assert_array_equal(got.features, frame.to_numpy(np.float32))
    assert len(data.load(tmp_path / "a.csv", header="no")) == 31


@pytest.mark.parametrize("columns", [[0, 1, 2], ["a", "b", "c"]])
def test_an_index_without_a_name_is_no_feature_in_silence(
    tmp_path: Path, rng: np.random.Generator, columns: list[object]
) -> None:
    frame = pd.DataFrame(rng.random((30, 3)), columns=columns)
    frame.to_csv(tmp_path / "a.csv")
    with pytest.raises(InputError, match=r"no name.*`drop` the column ''"):
        data.load(tmp_path / "a.csv")
    got = data.load(tmp_path / "a.csv", header="yes", drop=[""])
    np.testing.assert_array_equal(got.features, frame.to_numpy(np.float32))


@pytest.mark.parametrize("content", [b"# made by x\na,b\n1,2\n", b"#a,b\n1,2\n"])
def test_a_comment_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(InputError, match="line 1 begins with '#'"):
        data.load(tmp_path / "a.csv")


# --------------------------------------------------------------------------- ways to write


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("a.csv", "x;y\n1,5;-2\n0,25;4e2\n", {"delimiter": "semicolon", "decimal": "comma"}),
        ("a.csv", 'x,y\n"1,5",-2\n"0,25",400\n', {"decimal": "comma", "delimiter": ","}),
        ("a.csv", "x\ty\n1.5\t-2\n0.25\t400\n", {"delimiter": "tab"}),
        ("a.tsv", "x\ty\n1.5\t-2\n0.25\t400\n", {}),
        ("a.csv", "1.5   -2  \n 0.25 \t400\n", {"delimiter": "space"}),
        ("a.csv", "x|y\n1.5|-2\n0.25|+400\n", {"delimiter": "|"}),
        ("a.csv", "x,y\r1.5,-2\r0.25,400\n", {}),
        ("a.csv", 'x,y\n1.5," -2"\n "0.25",400\n', {}),
        ("a.csv", 'x,y,label\n1.5,-2,"b c"\n0.25,400,"b"\n', {}),
        ("a.csv", "t,x,y\n09:54,1.5,-2\n09:55,0.25,400\n", {"drop": ["t"]}),
    ],
)
def test_what_people_write_is_read_when_said(
    tmp_path: Path, name: str, content: str, options: dict[str, object]
) -> None:
    if "decimal" in options and options["delimiter"] == ",":
        with pytest.raises(InputError, match="both ','"):
            data.load(tmp_path / name, **options)
        return
    for path in (tmp_path / name, tmp_path / f"{name}.gz"):
        raw = content.encode()
        path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
        got = data.load(path, **options)
        np.testing.assert_array_equal(got.features, [[1.5, -2], [0.25, 400]])
        assert got.labels is None or got.labels.tolist() == ["b c", "b"]


CELLS = [
    "1",
    "-2.5",
    "+3e2",
    " 4 ",
    '"5"',
    "",
    "NA",
    "nan",
    "inf",
    "1e400",
    "1e300",
    "x",
    "1_0",
    "٣",
]
CELLS += ["0x10", "nan(1)", '"6"7', "1e-400", "16777217", "."]


@given(
    st.lists(st.lists(st.sampled_from(CELLS), min_size=2, max_size=2), min_size=1, max_size=4),
    st.sampled_from(["refuse", "mean"]),
    st.booleans(),
)
def test_arrow_and_our_own_pass_agree(
    tmp_path_factory: pytest.TempPathFactory, table: list[list[str]], missing: str, wide: bool
) -> None:
    """Cell for cell, or word for word in what they refuse."""
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_text("a,b\n1,2\n" + "".join(",".join(row) + "\n" for row in table))

    def outcome() -> object:
        try:
            return data.load(path, missing=missing, standardize=wide).features.tobytes()
        except InputError as error:
            return str(error)

    with pytest.MonkeyPatch.context() as patch:
        got = outcome()
        patch.setattr(text, "_MAX_ARROW_COLUMNS", 0)
        assert outcome() == got


def test_a_plain_table_is_read_by_arrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.csv", {"t": ["x"] * 9, "a": np.arange(9.5)[:9], "label": np.arange(9)})
    monkeypatch.setattr(text, "_read_by_cells", None)
    got = data.load(tmp_path / "a.csv", drop=["t"])
    assert got.features.shape == (9, 1)
    assert got.labels.tolist() == list(range(9))


@pytest.mark.parametrize(("suffix", "width"), [(".csv", 60_000), (".parquet", 6_000)])
def test_a_table_of_very_many_columns_is_read(tmp_path: Path, suffix: str, width: int) -> None:
    """A walk over all names for each name would take minutes here."""
    names = [f"g{i}" for i in range(width)]
    path, row = tmp_path / f"a{suffix}", np.arange(float(width))
    if suffix == ".csv":
        cells = ",".join(map(repr, row.tolist()))
        path.write_text(",".join(names) + f"\n{cells}\n{cells}\n")
    else:
        pa.parquet.write_table(pa.table([pa.array([v, v]) for v in row], names=names), path)
    got = data.load(path, names=names[::-1])
    np.testing.assert_array_equal(got.features, np.stack([row[::-1]] * 2).astype(np.float32))


def test_rows_are_read_by_bytes_and_not_by_number(tmp_path: Path) -> None:
    wide = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.float32, (500, 50_000))
    del wide
    tracemalloc.start()
    for _ in data.NpySource(tmp_path / "a.npy").scan():
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 << 20


# --------------------------------------------------------------------------- digits


@pytest.fixture
def offsets(rng: np.random.Generator) -> np.ndarray:
    """Seconds since 1970, a map coordinate, a day: large against how they vary."""
    seconds = 1_732_545_000 + 10.0 * np.arange(400)
    return np.stack([seconds, 4_492_557 + rng.normal(0, 0.3, 400), 20_052 + seconds % 9e3 / 9e3], 1)


def sources(folder: Path, table: np.ndarray) -> dict[str, object]:
    columns = {f"c{i}": column for i, column in enumerate(table.T)}
    found: dict[str, object] = {s: write(folder / f"a{s}", columns) for s in WAYS}
    np.save(folder / "a.npy", table)
    np.save(folder / "f.npy", np.asfortranarray(table))
    found |= {"npy": folder / "a.npy", "fortran": folder / "f.npy"}
    found |= {type(frame).__module__: frame for frame in frames(columns)}
    return found | {"array": table}


def test_large_offsets_keep_their_digits(tmp_path: Path, offsets: np.ndarray) -> None:
    order = np.random.default_rng(0).permutation(400)
    for source in sources(tmp_path, offsets).values():
        train, held_out = data.split(data.load(source, standardize=True))
        fitted = offsets[order[80:]]
        for part, rows in ((train, order[80:]), (held_out, order[:80])):
            want = (offsets[rows] - fitted.mean(0)) / fitted.std(0)
            np.testing.assert_allclose(part.features, want, atol=2e-7, rtol=2e-7)
    streamed, rest = data.NpySource(tmp_path / "a.npy").split()
    fit = streamed.fit_standardization()
    for part, source in ((train, streamed), (held_out, rest)):
        got = np.concatenate(list(source.standardized(fit).blocks(64)))
        # The rows were summed in another order.
        np.testing.assert_allclose(got, part.features, rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(source.standardized(fit)[3], got[3])


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("suffix", [".csv", ".npy", ".parquet"])
def test_digits_beyond_float64_are_refused_and_no_constant(
    tmp_path: Path, suffix: str, standardize: bool
) -> None:
    """Nanoseconds since 1970, a few apart: of their steps float64 keeps nothing."""
    times = 1732545000000000000 + 10 * np.arange(40)
    path = write(tmp_path / f"a{suffix}", {"t": times, "v": np.arange(40) % 5})
    if suffix == ".npy":
        np.save(path, np.stack([times.astype(float), np.arange(40) % 5], 1))
    with pytest.raises(InputError, match=r"column '?[t0]'?.* [Tt]ake the offset off first"):
        data.load(path, standardize=standardize)


def test_without_standardisation_they_are_refused(tmp_path: Path, offsets: np.ndarray) -> None:
    complaint = r"column (c0|0).*stored in steps.*Standardise"
    for source in sources(tmp_path, offsets).values():
        with pytest.raises(InputError, match=complaint):
            data.load(source)
    with pytest.raises(InputError, match=complaint):
        data.NpySource(tmp_path / "a.npy").check()
    with pytest.raises(InputError, match=complaint):
        data.stream(tmp_path / "a.npy", 8)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_whole_numbers_are_treated_the_same(tmp_path: Path, suffix: str) -> None:
    table = np.stack([1_732_545_000_000_000_000 + 10**12 * np.arange(50), np.arange(50)], 1)
    save = np.save if suffix == ".npy" else np.savez
    save(tmp_path / f"a{suffix}", table)
    with pytest.raises(InputError, match="Standardise them"):
        data.load(tmp_path / f"a{suffix}")
    train, _ = data.split(data.load(tmp_path / f"a{suffix}", standardize=True))
    np.testing.assert_allclose(train.features[:, 0], train.features[:, 1], atol=1e-6)
    save(tmp_path / f"a{suffix}", table * [[1, 1]] // [[10**12, 1]] + [[2**60, 0]])
    with pytest.raises(InputError, match="stored in steps"):
        data.load(tmp_path / f"a{suffix}", standardize=True)


@given(st.floats(-12, 12), st.floats(-6, 12), st.integers(0, 9))
def test_what_is_read_keeps_its_deviation(scale: float, ratio: float, seed: int) -> None:
    """Whatever the offset: float32 is within a thousandth of the deviation, or it is refused."""
    rng = np.random.default_rng(seed)
    column = 10.0 ** (scale - 6) * (10.0**ratio + rng.normal(size=64))
    try:
        got = data.load(pd.DataFrame({"a": column})).features[:, 0]
    except InputError:
        assert np.spacing(np.float32(np.abs(column).max())) > 1e-4 * column.std()
        return
    assert np.abs(got - column).max() <= 1.1e-3 * column.std()


def test_a_constant_column_is_no_loss(tmp_path: Path) -> None:
    rows = np.stack([np.full(20, 1.7e9 + 0.1), np.arange(20.0)], 1)
    np.save(tmp_path / "a.npy", rows)
    assert data.load(tmp_path / "a.npy").features[0, 0] == np.float32(1.7e9 + 0.1)


def test_one_entry_never_stands_for_many_features() -> None:
    one = data.Standardization(np.zeros(1), np.ones(1))
    for call in (one.apply, one.invert):
        with pytest.raises(InputError, match="expected 1 features"):
            call(np.zeros((3, 64), np.float32))
    with pytest.raises(InputError, match="expected 1 features"):
        data.Preparation.from_json({"standardization": one.to_json()}, 64)


# --------------------------------------------------------------------------- missing cells


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".npy"])
@pytest.mark.parametrize("standardize", [True, False])
def test_missing_cells_are_refused_filled_or_dropped(
    tmp_path: Path, rows: np.ndarray, suffix: str, standardize: bool
) -> None:
    holes = rows.copy()
    holes[[3, 7, 7], [1, 0, 2]] = np.nan
    path = tmp_path / f"a{suffix}"
    columns = {name: holes[:, i] for i, name in enumerate(NAMES)}
    np.save(path, holes) if suffix == ".npy" else write(path, columns)
    found: list[object] = [path] if suffix == ".npy" else [path, *frames(columns)]
    for source in found:
        with pytest.raises(InputError, match=r"empty|NaN"):
            data.load(source)
        dropped = data.load(source, missing="drop", standardize=standardize)
        np.testing.assert_allclose(dropped.features, np.delete(rows, [3, 7], 0), rtol=1e-6)
        assert "2 of 40 rows left out" in dropped.taken
        loaded = data.load(source, missing="mean", standardize=standardize)
        train, held_out = data.split(loaded)
        order = np.random.default_rng(0).permutation(40)
        means = np.nanmean(holes[order[8:]], 0)
        np.testing.assert_allclose(train.fill, means, rtol=1e-6)
        want = np.where(np.isnan(holes), means, holes)
        if standardize:
            want = (want - means) / np.nanstd(holes[order[8:]], 0)
        np.testing.assert_allclose(train.features, want[order[8:]], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(held_out.features, want[order[:8]], rtol=1e-4, atol=1e-5)


def test_streamed_rows_are_filled_or_dropped_the_same(tmp_path: Path, rows: np.ndarray) -> None:
    rows[[3, 7, 7], [1, 0, 2]] = np.nan
    np.save(tmp_path / "a.npy", rows)
    for missing in ("mean", "drop"):
        want, _ = data.split(data.load(tmp_path / "a.npy", missing=missing, standardize=True))
        source = data.NpySource(tmp_path / "a.npy", missing=missing)
        source = source.without_missing() if missing == "drop" else source
        train, _ = source.split()
        fitted = train.fit_standardization()
        train = train.standardized(fitted, fitted.mean if missing == "mean" else None)
        np.testing.assert_array_equal(np.concatenate(list(train.blocks(9))), want.features)


@pytest.mark.parametrize("missing", ["mean", "drop"])
def test_a_run_streams_what_it_would_load(tmp_path: Path, rows: np.ndarray, missing: str) -> None:
    from jaxcae.runs.config import Config
    from jaxcae.runs.material import load_material

    rows[[3, 7, 7], [1, 0, 2]] = np.nan
    np.save(tmp_path / "a.npy", rows)
    for standardize in ("yes", "no"):
        settings = {"data": str(tmp_path / "a.npy"), "missing": missing, "standardize": standardize}
        want, got = (load_material(Config.of(**settings, stream=s)) for s in (False, True))
        assert got.num_train == want.num_train == (32 if missing == "mean" else 30)
        np.testing.assert_allclose(got.held_out, want.held_out, rtol=1e-5, atol=1e-6)
        assert got.config.data.digest


def test_a_column_that_is_all_missing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n1,NA\n2,\n3,nan\n")
    for standardize in (True, False):
        with pytest.raises(InputError, match="no value in the training split in column b"):
            data.split(data.load(tmp_path / "a.csv", missing="mean", standardize=standardize))
    with pytest.raises(InputError, match="missing cell in every one"):
        data.load(tmp_path / "a.csv", missing="drop")


# --------------------------------------------------------------------------- what is no table


def test_columns_that_hold_no_numbers_are_named(tmp_path: Path) -> None:
    columns = {
        "when": pd.date_range("2031-02-01", periods=3),
        "word": ["x", "y", "z"],
        "kind": pd.Categorical(["x", "y", "x"]),
    }
    for name, values in columns.items():
        frame = pd.DataFrame({"a": [1.0, 2, 3], name: values})
        frame.to_parquet(tmp_path / "a.parquet")
        polars = pl.DataFrame({"a": [1.0, 2, 3], name: pl.Series(list(frame[name]))})
        for source in (frame, polars, tmp_path / "a.parquet"):
            with pytest.raises(InputError, match=f"column '{name}' holds .*expected numbers"):
                data.load(source)
            assert data.load(source, drop=[name]).features.tolist() == [[1], [2], [3]]
    mixed = pd.DataFrame({"a": [1.0, "x"]}, dtype=object)
    with pytest.raises(InputError, match="column 'a' holds"):
        data.load(mixed)


def test_values_of_frames_are_checked_as_those_of_files() -> None:
    for value, complaint in ((np.inf, "NaN or infinite"), (1e300, "outside the range of float32")):
        with pytest.raises(InputError, match=rf"{complaint}.*row 1 \(from 0\), column 'b'"):
            data.load(pl.DataFrame({"a": [1.0, 2], "b": [0.5, value]}))
    got = data.load(pd.DataFrame({"a": [True, False], "b": pd.array([1, 2], "Int64")}))
    assert got.features.tolist() == [[1, 1], [0, 2]]
    with pytest.raises(InputError, match=r"got builtins\.dict"):
        data.load({"a": [1]})
    for value, advice in (
        (pl.LazyFrame({"a": [1.0]}), "Collect a lazy one"),
        (pd.Series([1.0]), "to_frame"),
        (scipy.sparse.eye(3, format="csr"), "toarray"),
        ([[1.0], [2.0]], "numpy.asarray"),
    ):
        with pytest.raises(InputError, match=advice):
            data.load(value)


def test_arrays_in_memory_of_any_kind_are_what_they_hold() -> None:
    plain = np.array([[1.5, 2], [3, 4], [5, 6.5]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)  # NumPy's, of any matrix
        np.testing.assert_array_equal(data.load(np.matrix(plain)).features, plain)
    kinds = (jnp.asarray, lambda a: a.astype(jnp.bfloat16), np.ma.masked_array)
    for kind in kinds:
        np.testing.assert_array_equal(data.load(kind(plain)).features, plain)


@pytest.mark.parametrize("dtype", [np.float32, np.int16, bool])
def test_what_is_masked_in_memory_is_missing(dtype: Any) -> None:
    """Never the number that happens to lie beneath."""
    masked = np.ma.masked_array(np.ones((4, 2), dtype), [[0, 0], [0, 1], [0, 0], [0, 0]])
    with pytest.raises(InputError, match=r"row 1, column 1 .*missing='drop'"):
        data.load(masked)
    assert data.load(masked, missing="drop").features.shape == (3, 2)
    assert np.isnan(data.load(masked, missing="mean").features[1, 1])


def test_missing_numbers_are_told_what_may_be_done_with_them() -> None:
    """As empty cells are; of what is infinite nothing is missing."""
    for value in (None, np.nan):
        with pytest.raises(InputError, match="Or use `missing='drop'` or `missing='mean'`"):
            data.load(pl.DataFrame({"a": [1.0, 2], "b": [0.5, value]}, strict=False))
    with pytest.raises(InputError) as caught:
        data.load(np.array([[np.inf]]))
    assert "missing" not in str(caught.value)


def test_a_filtered_frame_brings_no_index(rows: np.ndarray) -> None:
    frame = pd.DataFrame(rows, columns=NAMES)
    got = data.load(frame[frame["temp"] > 20])
    np.testing.assert_array_equal(got.features, rows[rows[:, 0] > 20].astype(np.float32))


OTHER_FORMS: dict[str, Callable[[np.ndarray], dict[str, np.ndarray]]] = {
    "csr": lambda a: _sparse(a, "csr"),
    "csc": lambda a: _sparse(a, "csc"),
    "coo": lambda a: _sparse(a, "coo"),
    "bsr": lambda a: _sparse(a, "bsr"),
    "dia": lambda a: _sparse(a, "dia"),
    "nonzero": lambda a: {"nonzero": np.array(np.nonzero(a)), "shape": np.array(a.shape)},
    "pairs": lambda a: {"row": a.nonzero()[0], "col": a.nonzero()[1], "data": a[a.nonzero()]},
    "coords": lambda a: {"coords": np.array(np.nonzero(a)), "data": a[a.nonzero()]},
    "masked": lambda a: {"data": a, "mask": a == 0},
}


def _sparse(array: np.ndarray, kind: str) -> dict[str, np.ndarray]:
    import scipy.sparse

    buffer = io.BytesIO()
    scipy.sparse.save_npz(buffer, scipy.sparse.csr_matrix(array).asformat(kind))
    return dict(np.load(io.BytesIO(buffer.getvalue())))


@pytest.mark.parametrize("form", OTHER_FORMS)
@pytest.mark.parametrize("flatten", [True, False])
def test_sparse_and_masked_arrays_are_refused_by_what_they_are(
    tmp_path: Path, rng: np.random.Generator, form: str, flatten: bool
) -> None:
    dense = rng.random((12, 6)) * (rng.random((12, 6)) < 0.3)
    np.savez(tmp_path / "a.npz", **OTHER_FORMS[form](dense))
    with pytest.raises(InputError, match=r"holds .*(sparse|masked|not zero).*Save it"):
        data.load(tmp_path / "a.npz", flatten=flatten)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_types_that_are_no_numbers_are_named(tmp_path: Path, suffix: str) -> None:
    import ml_dtypes

    for array, complaint in (
        (np.ones((4, 2), ml_dtypes.bfloat16), "NumPy saves bfloat16"),
        (np.ones((4, 2), ml_dtypes.float8_e4m3fn), "NumPy saves float8"),
        (np.ones((4, 2), np.complex64), "complex64.*real and imaginary"),
        (np.zeros(4, [("a", "f4"), ("b", "f4")]), "records with the fields 'a', 'b'"),
        (np.zeros((4, 2), "datetime64[s]"), r"datetime64\[s\].*time since"),
        (np.zeros((4, 2), "S3"), r"\|S3"),
    ):
        (np.save if suffix == ".npy" else np.savez)(tmp_path / f"a{suffix}", array)
        with pytest.raises(InputError, match=complaint):
            data.load(tmp_path / f"a{suffix}")


def _long_header() -> bytes:
    """Return an `.npz` of 16 kB whose array has a header of 16 MB."""
    size = 1 << 24
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(
            "features.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", size) + b" " * size
        )
    return buffer.getvalue()


def _many_members() -> bytes:
    """Return an archive whose directory tells of 300,000 members, of which none is there."""
    entry = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, 20, *[0] * 7, 8, *[0] * 6)
    directory = b"".join(entry + b"%08d" % i for i in range(300_000))
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 9, 9, len(directory), 0, 0)
    return directory + end


@pytest.mark.parametrize("content", [_long_header, _many_members])
def test_lengths_are_capped_before_anything_is_read(
    tmp_path: Path, content: Callable[[], bytes]
) -> None:
    (tmp_path / "a.npz").write_bytes(content())
    tracemalloc.start()
    with pytest.raises(InputError, match=r"header is too long|directory takes"):
        data.load(tmp_path / "a.npz")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 << 20


def test_a_packed_text_is_capped_as_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"1\n" * (8 << 20), 1))
    with pytest.raises(InputError, match="the cap is"):
        data.load(path, max_bytes=1 << 20)
    for damage in (lambda b: b[:-9], lambda b: b"x" + b[1:], lambda b: b[:40] + b"?" + b[41:]):
        path.write_bytes(damage(gzip.compress(b"a,b\n" + b"1,2\n" * 999)))
        with pytest.raises(InputError, match=r"a\.csv\.gz: "):
            data.load(path)
    path.with_suffix("").write_bytes(zlib.compress(b"") + gzip.compress(b"1,2\n"))
    with pytest.raises(InputError, match=re.escape("a.csv: ")):
        data.load(path.with_suffix(""))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("a.png", "one image"),
        ("a.JPG", "one image"),
        ("a.pkl", "never loaded"),
        ("a.xlsx", "spreadsheet"),
        ("a.h5", "ends in"),
        ("a", "ends in"),
    ],
)
def test_other_kinds_of_file_are_told(tmp_path: Path, name: str, complaint: str) -> None:
    (tmp_path / name).write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match=complaint):
        data.load(tmp_path / name)


@pytest.mark.parametrize("address", ["https://example.com/a.csv", "s3://bucket/a.parquet"])
def test_an_address_is_no_file(address: str) -> None:
    with pytest.raises(InputError, match=f"^{address}: is an address; .* nothing is downloaded"):
        data.load(address)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv", ".csv.gz", ".tsv", ".parquet"])
@pytest.mark.parametrize("kind", ["pipe", "directory", "empty", "noise"])
def test_what_is_no_table_is_refused_and_never_waited_for(
    tmp_path: Path, rng: np.random.Generator, suffix: str, kind: str
) -> None:
    import os

    path = tmp_path / f"a{suffix}"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.write_bytes(rng.bytes(4000) if kind == "noise" else b"")
    with pytest.raises(InputError) as caught:
        data.load(path)
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).isprintable()


HOSTILE = "\x1b[31mred\x1b[0m\u202e"


@pytest.mark.parametrize(
    "content",
    [
        "{0},b\n1,x\n",
        "a,b\n{0},2\n",
        "{0},{0}\n1,2\n",
        "{0},label\n1,2\n2,3\n",
        "{0},1\n1,2\n",
        '"{0}"x,1\n1,2\n',
        "{0},b\n1,1e300\n",
        "{0}\n1e9\n1000000001\n",
    ],
)
def test_nothing_of_a_file_is_shown_raw(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.csv").write_text(content.format(HOSTILE))
    for options in ({}, {"names": ["a"]}, {"drop": ["a"]}, {"header": "yes"}):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                told = data.load(tmp_path / "a.csv", **options).taken
            except InputError as error:
                told = str(error)
        for words in (told, *(str(warning.message) for warning in caught)):
            assert words.isprintable(), words


# --------------------------------------------------------------------------- memory


def test_a_row_group_of_few_values_is_unpacked_block_by_block(tmp_path: Path) -> None:
    """It takes 30 MB in float64 where the file takes a few kB."""
    path, rows = tmp_path / "a.parquet", 1 << 20
    parquet.write_table(
        pa.table({name: np.tile([0.5, 1.5], rows // 2) for name in NAMES}),
        path,
        row_group_size=rows,
    )
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    got = data.load(path, max_bytes=16 << 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert got.features.shape == (rows, 3)
    assert peak < (12 + 16) << 20


@pytest.mark.parametrize("suffix", [".csv", ".parquet", "frame"])
def test_one_long_label_does_not_make_all_labels_long(tmp_path: Path, suffix: str) -> None:
    """NumPy gives every text of an array the room of the longest."""
    columns = {"a": np.arange(2000.0), "label": np.array(["x" * 20_000, *["y"] * 1999], object)}
    source: Any = pd.DataFrame(columns)
    if suffix != "frame":
        source = write(tmp_path / f"a{suffix}", columns)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"needs 160 MB in memory.*Shorten the labels"):
        data.load(source, max_bytes=8 << 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 << 20


def test_long_labels_that_repeat_are_read_once(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = np.arange(20_000) % 2
    labels = pa.DictionaryArray.from_arrays(pa.array(rows, pa.int32()), ["x" * 5000, "y" * 5000])
    parquet.write_table(pa.table({"a": rows, "label": labels.cast(pa.string())}), path)
    assert path.stat().st_size < 1 << 17
    tracemalloc.start()
    with pytest.raises(InputError, match="Shorten the labels"):
        data.load(path, max_bytes=8 << 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 << 20
    assert data.load(path, max_bytes=1 << 30).labels[1] == "y" * 5000  # type: ignore[index]


def test_integers_of_128_bits_and_batches_of_arrow_are_read() -> None:
    wide = pl.DataFrame({"a": pl.Series([1, None, 3], dtype=pl.Int128), "b": [1.0, 2, 3]})
    assert data.load(wide, missing="drop").features.tolist() == [[1, 1], [3, 3]]
    batch = pa.record_batch({"a": [1, 2], "label": ["x", None]})
    got = data.load(batch)
    assert got.features.tolist() == [[1], [2]]
    assert list(got.labels) == ["x", "None"]
