"""Strict readers for files and frames: the whole truth of the data, or one line why not.

Sizes come from headers and are held against a cap before anything is allocated; values are checked
before the cast to float32, in blocks. Rows and columns of arrays are counted from 0, as NumPy does;
lines and columns of a CSV from 1, as editors do. Pickled data is never read.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxcae.data.archives import read_npz
from jaxcae.data.arrays import (
    cast_matrix,
    open_regular,
    read_header,
    read_npy,
    refusal_of,
    size_of,
)
from jaxcae.data.dataset import Dataset
from jaxcae.data.files import read_folder
from jaxcae.data.frames import FRAME, read_frame, read_parquet
from jaxcae.data.tables import PLAIN, TEXT, TableOptions, nameless
from jaxcae.data.text import read_csv
from jaxcae.data.values import matrix_shape
from jaxcae.errors import InputError

ARRAY = "samples"
"""What stands for the source of data that a Python caller hands over."""
SUFFIXES = (".npy", ".npz", *TEXT, ".parquet")
_NOT_READ = {
    (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp"): (
        "is one image; expected many samples. Put the pixels of all images into one array, one "
        "per row, and save it as .npy."
    ),
    (".pkl", ".pickle", ".joblib", ".pt", ".pth"): (
        "may be a pickle, which can run code and is never loaded. Save the array as .npy."
    ),
    (".xls", ".xlsx", ".ods"): "is a spreadsheet. Save the sheet as .csv.",
}


def read(
    path: str | Path,
    *,
    max_bytes: int | None = None,
    flatten: bool = False,
    table: TableOptions = PLAIN,
    wide: bool = False,
) -> Dataset:
    """Read a file into memory, or refuse it in one line.

    Args:
        path: A file whose name ends as one of `SUFFIXES`, or a folder of `.npy` files, which are
            one set in the order of their names, numbers as numbers.
        max_bytes: The most memory the samples may take; half the memory by default.
        flatten: Flatten arrays of rank 1 (one feature) or rank 3 and more, instead of refusing.
        table: What to take for header, label and features, and for a missing cell.
        wide: Keep digits that float32 would lose, as float64, for a standardisation to come.

    Raises:
        InputError: Naming the file and, where there is one, the row (or line) and column.
    """
    path = Path(path)
    dtype = np.float64 if wide else np.float32
    labels, times, feature_shape, names, words = None, None, None, None, ""
    kind = kind_of(path)
    table.check_kind(path, kind)
    if kind in (".npy", ""):
        reader = read_npy if kind else read_folder
        missing = table.missing != "refuse"
        features, feature_shape = reader(path, max_bytes, flatten, wide=wide, missing=missing)
    elif kind == ".npz":
        features, labels, feature_shape, names, words = read_npz(
            path, max_bytes, flatten, table, wide=wide
        )
    else:
        read_table = read_parquet if kind == ".parquet" else read_csv
        features, labels, times, columns = read_table(path, max_bytes, table, dtype)
        names, words = columns.names, columns.words
    if names is None and kind in (".npy", ".npz", ""):
        label = None if kind == ".npz" else table.label_column
        nameless(path, features.shape[1], replace(table, label_column=label))
    taken = words and f"{path}: {words}."
    return _without_missing(
        Dataset(
            features,
            labels,
            path.name[: len(path.name) - len(kind)],
            feature_shape,
            str(path),
            names,
            missing=table.missing,
            taken=taken,
            times=times,
            time_name=table.time_column,
        )
    )


def from_frame(
    frame: Any,
    *,
    max_bytes: int | None = None,
    table: TableOptions = PLAIN,
    wide: bool = False,
) -> Dataset:
    """Read a data frame of pandas, polars or Arrow, through narwhals; see `read`."""
    table.check_kind(FRAME, "")
    features, labels, times, columns = read_frame(
        frame, max_bytes, table, np.float64 if wide else np.float32
    )
    return _without_missing(
        Dataset(
            features,
            labels,
            "frame",
            None,
            FRAME,
            columns.names,
            missing=table.missing,
            taken=f"{FRAME}: {columns.words}.",
            times=times,
            time_name=table.time_column,
        )
    )


def from_array(
    array: Any,
    *,
    max_bytes: int | None = None,
    flatten: bool = False,
    table: TableOptions = PLAIN,
    wide: bool = False,
) -> Dataset:
    """Take an array in memory, of NumPy or JAX, checked as the array of a file is; see `read`.

    What is masked is missing.
    """
    table.check_kind(ARRAY, "")
    if np.ma.is_masked(array) and refusal_of(array.dtype) is None:
        array = array.astype(np.float64).filled(np.nan)
    array = np.asarray(array)  # no matrix, whose rows stay of rank 2
    if array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    features, feature_shape = cast_matrix(
        ARRAY, array, max_bytes, flatten, wide=wide, missing=table.missing != "refuse"
    )
    nameless(ARRAY, features.shape[1], table)
    return _without_missing(
        Dataset(features, None, ARRAY, feature_shape, ARRAY, missing=table.missing)
    )


def _without_missing(dataset: Dataset) -> Dataset:
    """Leave out the rows in which a value is missing, where that was asked for."""
    if dataset.missing != "drop":
        return dataset
    whole = ~np.isnan(dataset.features).any(axis=1)
    if not whole.any():
        raise InputError(f"{dataset.source}: no rows: there is a missing cell in every one.")
    lost = len(whole) - int(whole.sum())
    if not lost:
        return dataset
    words = f"{lost} of {len(whole)} rows left out, where cells are missing."
    taken = f"{dataset.taken or f'{dataset.source}:'} {words}"
    return replace(dataset.take(whole), taken=taken)


def kind_of(path: Path) -> str:
    """Return the ending by which a file is read; "" for a folder.

    Raises:
        InputError: If there is no reader for it.
    """
    if path.is_dir():
        return ""
    name = path.name.lower()
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return suffix
    for suffixes, why in _NOT_READ.items():
        if name.endswith(suffixes):
            raise InputError(f"{path}: {why}")
    raise InputError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}.")


def read_shape(path: str | Path, *, flatten: bool = False) -> tuple[int, int]:
    """Return `(rows, features)` of a `.npy` from its header alone.

    Raises:
        InputError: As `read`, but no value is looked at.
    """
    path = Path(path)
    with open_regular(path) as file:
        header = read_header(path, file, size_of(file))
    rows, features, _ = matrix_shape(path, header.shape, flatten)
    return rows, features
