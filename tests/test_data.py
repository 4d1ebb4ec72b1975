"""Data in: named sets, readers against NumPy, splitting, standardisation."""

import importlib
import re
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxcae import data
from jaxcae.data import values
from jaxcae.data.catalogue import _SERIES
from jaxcae.data.standardization import Moments
from jaxcae.errors import InputError
from tests import hostile

NAMED = {
    "mnist5k": ((5000, 784), (28, 28), 10),
    "digits": ((1797, 64), (8, 8), 10),
    "breast_cancer": ((569, 30), None, 2),
    "shuttle": ((49097, 9), None, 2),
}


@pytest.mark.parametrize("name", NAMED)
def test_named_sets_are_the_real_ones(name: str) -> None:
    dataset = data.load(name)
    shape, feature_shape, classes = NAMED[name]
    assert dataset.features.shape == shape
    assert dataset.features.dtype == np.float32
    assert dataset.feature_shape == feature_shape
    assert len(np.unique(dataset.labels)) == classes
    if feature_shape:
        assert (dataset.features.min(), dataset.features.max()) == (0.0, 1.0)
        # A picture is smoother along its rows than the same pixels in any wrong shape.
        picture = dataset.features.reshape(-1, *feature_shape)
        assert np.abs(np.diff(picture, axis=1)).mean() < 0.8 * picture.std()
    else:
        assert dataset.tabular
        assert len(dataset.feature_names) == shape[1]


def test_shuttle_has_its_anomalies() -> None:
    assert int(data.load("shuttle").labels.sum()) == 3511


def test_the_catalogue_is_what_the_tests_know() -> None:
    assert set(data.CATALOGUE) == {*NAMED, *_SERIES}  # which tests/test_times.py reads


@pytest.mark.parametrize(
    "dtype", ["<f4", ">f4", "<f8", ">f8", "<f2", "i1", "u1", "<i8", ">u2", "?"]
)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_arrays_come_back_as_they_were(
    tmp_path: Path, rng: np.random.Generator, dtype: str, order: str, suffix: str
) -> None:
    array = np.asarray(
        rng.integers(0, 2, (37, 5)) * rng.integers(1, 100, 5), dtype=dtype, order=order
    )
    path = tmp_path / f"a{suffix}"
    path.write_bytes(hostile.npy(array) if suffix == ".npy" else hostile.npz(anything=array))
    got = data.load(path)
    np.testing.assert_array_equal(got.features, array.astype(np.float32))
    assert got.features.dtype == np.float32
    assert got.features.flags.c_contiguous
    assert got.name == "a"
    assert str(path) in got.source


def test_blocks_meet_at_their_seams(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = rng.random((101, 7))
    np.save(tmp_path / "a.npy", array)
    np.savetxt(tmp_path / "a.csv", array, delimiter=",")
    for module in ("arrays", "text"):
        monkeypatch.setattr(importlib.import_module(f"jaxcae.data.{module}"), "BLOCK_BYTES", 1000)
    for name in ("a.npy", "a.csv"):
        got = data.load(tmp_path / name).features
        np.testing.assert_array_equal(got, array.astype(np.float32))


def test_every_unusable_value_is_counted_across_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = np.ones((100, 5))
    array[40:, 3] = np.nan
    np.save(tmp_path / "a.npy", array)
    np.savetxt(tmp_path / "a.csv", array, delimiter=",")
    for module in ("arrays", "text"):
        monkeypatch.setattr(importlib.import_module(f"jaxcae.data.{module}"), "BLOCK_BYTES", 400)
    with pytest.raises(InputError, match=r"60 values.*row 40, column 3 \(from 0\)"):
        data.load(tmp_path / "a.npy")
    with pytest.raises(InputError, match=r"60 values.*line 41, column 4"):
        data.load(tmp_path / "a.csv")


@pytest.mark.parametrize("feature_shape", [(28, 28), (2, 3, 4)])
def test_flattening_on_request_keeps_the_shape_of_a_sample(
    tmp_path: Path, rng: np.random.Generator, feature_shape: tuple[int, ...]
) -> None:
    array = rng.random((6, *feature_shape), np.float32)
    for order in "CF":
        np.save(tmp_path / "a.npy", np.asarray(array, order=order))
        got = data.load(tmp_path / "a.npy", flatten=True)
        np.testing.assert_array_equal(got.features, array.reshape(6, -1))
        assert got.feature_shape == feature_shape


def test_flattening_a_series_gives_one_feature(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(9.0))
    got = data.load(tmp_path / "a.npy", flatten=True)
    assert got.features.shape == (9, 1)
    assert got.feature_shape is None


def test_npz_takes_features_and_labels_by_name(tmp_path: Path, rng: np.random.Generator) -> None:
    features, labels = rng.random((8, 3)), np.arange(8)
    np.savez(tmp_path / "a.npz", X=features, y=labels, other=np.ones(3))
    got = data.load(tmp_path / "a.npz")
    np.testing.assert_array_equal(got.features, features.astype(np.float32))
    np.testing.assert_array_equal(got.labels, labels)


CSV_ACCEPTED = {
    "plain": b"1,2.5\n-3,4e2\n",
    "no newline at the end": b"1,2.5\n-3,4e2",
    "Windows": b"1,2.5\r\n-3,4e2\r\n",
    "byte order mark": b"\xef\xbb\xbf1,2.5\n-3,4e2\n",
    "spaces": b"1, 2.5\n -3 ,4e2\n",
    "header": b"width,height\n1,2.5\n-3,4e2\n",
    "byte order mark and header": b"\xef\xbb\xbfwidth,height\n1,2.5\n-3,4e2\n",
    "quoted header": b'"width, in m",height\n1,2.5\n-3,4e2\n',
    "quoted numbers": b'"1","2.5"\n-3,"4e2"\n',
    "quotes over two lines": b'"wid\nth",height\n1,"2.5"\n-3,4e2\n',
    "carriage returns alone": b"1,2.5\r-3,4e2\r",
    "labels": b"width,label,height\n1,0,2.5\n-3,7,4e2\n",
}


@pytest.mark.parametrize("kind", CSV_ACCEPTED)
def test_csv_that_is_accepted(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(CSV_ACCEPTED[kind])
    got = data.load(path)
    np.testing.assert_array_equal(got.features, np.float32([[1, 2.5], [-3, 400]]))
    if "header" in kind or kind == "labels":
        first = "width, in m" if kind == "quoted header" else "width"
        assert got.feature_names == (first, "height")
    if kind == "labels":
        assert got.labels.tolist() == [0, 7]


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 5), st.integers(1, 4)),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
)
def test_csv_round_trips_every_float32(tmp_path_factory: pytest.TempPathFactory, array) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_text("\n".join(",".join(repr(float(v)) for v in row) for row in array))
    np.testing.assert_array_equal(data.load(path).features, array)


@pytest.mark.parametrize("name", hostile.HOSTILE)
def test_hostile_files_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    path = hostile.write(tmp_path, name)
    tracemalloc.start()
    with pytest.raises(InputError) as caught:
        data.load(path, max_bytes=1 << 30)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    message = str(caught.value)
    assert re.search(hostile.HOSTILE[name].complaint, message), message
    assert message.startswith(str(path)), message
    assert "\n" not in message
    assert len(message) < 500 + len(str(path))
    assert peak < 256 << 20, f"{peak >> 20} MB to refuse {path.stat().st_size >> 20} MB"
    assert not hostile.MARKS, "hostile code ran"


def test_the_bombs_are_bombs(tmp_path: Path) -> None:
    """A corpus that is not hostile proves nothing: 3 MB really are 3 GB, and the pickle runs."""
    import pickle
    import zlib

    path = hostile.write(tmp_path, "zip bomb")
    assert path.stat().st_size < 4 << 20
    size = hostile.BOMB_BYTES >> 5  # unpacking all of it takes seconds
    assert zlib.decompress(hostile.zeros_deflated(size), -15) == bytes(size)
    pickle.loads(hostile.HOSTILE["a pickle"].content())
    assert hostile.MARKS == ["unpickled"]
    hostile.MARKS.clear()


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv"])
def test_the_cap_is_checked_before_the_values(tmp_path: Path, suffix: str) -> None:
    array = np.zeros((1000, 1000), np.float32)
    path = tmp_path / f"a{suffix}"
    if suffix == ".csv":
        np.savetxt(path, array, delimiter=",", fmt="%d")
    else:
        path.write_bytes(hostile.npy(array) if suffix == ".npy" else hostile.npz(x=array))
    assert data.load(path, max_bytes=4_000_000).features.nbytes == 4_000_000
    tracemalloc.start()
    with pytest.raises(InputError, match=r"needs 4 MB.*cap is 4 MB.*max_bytes"):
        data.load(path, max_bytes=3_999_999)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000


def test_the_default_cap_is_half_of_the_memory() -> None:
    import psutil

    assert 0 < data.default_max_bytes() <= psutil.virtual_memory().total // 2


@pytest.mark.parametrize("kind", ["missing", "directory", "pipe", "device", "forbidden"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.npy"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":  # opening one for reading would wait for ever
        import os

        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "forbidden":
        path.write_bytes(hostile.npy(np.ones((2, 2))))
        path = Path(str(path) + "\0.npy")
    with pytest.raises(InputError, match=r"no such file|not a regular file|cannot be read|no .npy"):
        data.load(path)


def test_an_unknown_name_gets_the_list_and_the_closest() -> None:
    with pytest.raises(InputError, match=r"'mnist5'.*mnist5k, digits.*Did you mean 'mnist5k'\?"):
        data.load("mnist5")


@pytest.mark.parametrize("name", NAMED)
def test_a_missing_package_gets_its_install_line(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    package = data.CATALOGUE[name].package
    module = {"mlxtend": "mlxtend.data", "river": "river.datasets"}.get(package, "sklearn.datasets")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=f"pip install {package}$"):
        data.load(name)


def test_a_split_is_a_seeded_partition(rng: np.random.Generator) -> None:
    rows = np.arange(100, dtype=np.float32)[:, None]
    dataset = data.Dataset(rows, np.arange(100), "rows", None, "made up")
    train, held_out = data.split(dataset, 0.25, seed=3)
    assert (len(train), len(held_out)) == (75, 25)
    both = np.concatenate([train.features, held_out.features])
    np.testing.assert_array_equal(np.sort(both, axis=0), rows)
    np.testing.assert_array_equal(train.labels, train.features[:, 0])
    again, _ = data.split(dataset, 0.25, seed=3)
    other, _ = data.split(dataset, 0.25, seed=4)
    np.testing.assert_array_equal(again.features, train.features)
    assert not np.array_equal(other.features, train.features)


@pytest.mark.parametrize(("rows", "fraction"), [(2, 0.001), (2, 0.999), (10, 0.01), (3, 0.5)])
def test_neither_part_of_a_split_is_empty(rows: int, fraction: float) -> None:
    dataset = data.Dataset(np.ones((rows, 1), np.float32), None, "a", None, "made up")
    train, held_out = data.split(dataset, fraction)
    assert len(train) + len(held_out) == rows
    assert len(train)
    assert len(held_out)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan"), float("inf")])
def test_an_impossible_fraction_is_refused(fraction: float) -> None:
    dataset = data.Dataset(np.ones((9, 1), np.float32), None, "a", None, "made up")
    with pytest.raises(InputError, match="held_out"):
        data.split(dataset, fraction)


def test_standardisation_is_fitted_on_the_training_split_alone(rng: np.random.Generator) -> None:
    features = rng.normal(100, [1e-3, 1, 1e6], (400, 3)).astype(np.float32)
    dataset = data.Dataset(features, None, "a", None, "made up", tabular=True)
    train, held_out = data.split(dataset, 0.3, seed=1)
    np.testing.assert_allclose(train.features.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(train.features.std(0), 1, rtol=1e-3)
    assert np.abs(held_out.features.mean(0)).min() > 1e-4  # it was not centred by itself
    raw_train, raw_held_out = data.split(
        data.Dataset(features, None, "a", None, "made up"), 0.3, seed=1
    )
    wide = raw_train.features.astype(np.float64)
    want = (raw_held_out.features - wide.mean(0)) / wide.std(0)
    np.testing.assert_allclose(held_out.features, want, rtol=1e-6, atol=1e-6)


def test_standardisation_survives_json_exactly(rng: np.random.Generator) -> None:
    import json

    fitted = data.Standardization.fit(rng.random((50, 4), np.float32))
    again = data.Standardization.from_json(json.loads(json.dumps(fitted.to_json())))
    np.testing.assert_array_equal(again.mean, fitted.mean)
    np.testing.assert_array_equal(again.deviation, fitted.deviation)


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {"mean": [0.0]},
        {"mean": [0.0], "deviation": [1.0], "extra": 1},
        {"mean": [0.0, 1.0], "deviation": [1.0]},
        {"mean": [0.0], "deviation": [0.0]},
        {"mean": [0.0], "deviation": [-1.0]},
        {"mean": [float("nan")], "deviation": [1.0]},
        {"mean": ["0"], "deviation": [1.0]},
        {"mean": [True], "deviation": [1.0]},
        {"mean": [[0.0]], "deviation": [[1.0]]},
        {"mean": [], "deviation": []},
        {"mean": [10**400], "deviation": [1.0]},
    ],
)
def test_a_standardisation_that_makes_no_sense_is_refused(value: object) -> None:
    with pytest.raises(InputError, match="standardization"):
        data.Standardization.from_json(value)


def test_constant_columns_are_named_and_do_not_divide_by_zero(rng: np.random.Generator) -> None:
    features = rng.random((60, 4), np.float32)
    features[:, 1] = 0
    # Constant but for the last bit: its deviation is rounding, not signal.
    features[:, 3] = np.where(
        rng.random(60) < 0.5, 1e4, np.nextafter(np.float32(1e4), np.float32(2e4))
    )
    names = ("a", "b", "c", "d")
    dataset = data.Dataset(features, None, "x", None, "made up", names, tabular=True)
    with pytest.warns(UserWarning, match=r"2 constant column\(s\) in the training split: b, d\."):
        train, held_out = data.split(dataset)
    for part in (train, held_out):
        assert np.isfinite(part.features).all()
        assert np.abs(part.features[:, [1, 3]]).max() < 0.01


def test_integers_up_to_the_last_exact_one_are_accepted(tmp_path: Path) -> None:
    largest = values.LARGEST_INTEGER
    np.save(tmp_path / "a.npy", np.array([[largest, -largest]]))
    assert data.load(tmp_path / "a.npy").features.tolist() == [[largest, -largest]]
    np.save(tmp_path / "a.npy", np.array([[largest + 1, 0]]))
    with pytest.raises(InputError, match=str(largest + 1)):
        data.load(tmp_path / "a.npy")


def test_a_name_wins_over_a_file_and_a_path_over_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").write_text("not data")
    assert len(data.load("digits")) == 1797
    with pytest.raises(InputError, match="ends in"):
        data.load("./digits")
    with pytest.raises(InputError, match="ends in"):
        data.load(Path("digits"))


def test_moments_of_blocks_are_those_of_the_whole(rng: np.random.Generator) -> None:
    """However the rows are cut; the largest magnitude of all of them is what rounding goes by."""
    rows = np.concatenate([rng.normal(1e6, 1, (9, 2)), rng.normal(-3, 2, (30, 2))])
    rows[4, 1] = np.nan
    moments = Moments()
    for block in np.split(rows, [1, 9, 9, 25]):
        moments.add(block)
    np.testing.assert_allclose(moments.mean, np.nanmean(rows, 0), rtol=1e-12)
    np.testing.assert_allclose(moments.deviation, np.nanstd(rows, 0), rtol=1e-12)
    np.testing.assert_array_equal(moments.largest, np.nanmax(np.abs(rows), 0))
