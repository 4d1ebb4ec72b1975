"""Strict readers for `.npy`, `.npz` and `.csv`: the whole truth of a file, or one line why not.

Sizes come from headers and are held against a cap before anything is allocated; values are checked
before the cast to float32, in blocks. Rows and columns of arrays are counted from 0, as NumPy does;
lines and columns of a CSV from 1, as editors do. Pickled data is never read.
"""

from pathlib import Path

from jaxcae.data.archives import read_npz
from jaxcae.data.arrays import open_regular, read_header, read_npy, size_of
from jaxcae.data.dataset import Dataset
from jaxcae.data.text import read_csv
from jaxcae.data.values import matrix_shape
from jaxcae.errors import InputError

SUFFIXES = (".npy", ".npz", ".csv")


def read(path: str | Path, *, max_bytes: int | None = None, flatten: bool = False) -> Dataset:
    """Read a file into memory as float32, or refuse it in one line.

    Args:
        path: A `.npy`, `.npz` or `.csv`.
        max_bytes: The most memory the samples may take; half the memory by default.
        flatten: Flatten arrays of rank 1 (one feature) or rank 3 and more, instead of refusing.

    Raises:
        InputError: Naming the file and, where there is one, the row (or line) and column.
    """
    path = Path(path)
    labels, feature_shape, names = None, None, None
    suffix = path.suffix.lower()
    if suffix == ".npy":
        features, feature_shape = read_npy(path, max_bytes, flatten)
    elif suffix == ".npz":
        features, labels, feature_shape = read_npz(path, max_bytes, flatten)
    elif suffix == ".csv":
        features, labels, names = read_csv(path, max_bytes)
    else:
        raise InputError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}.")
    return Dataset(features, labels, path.stem, feature_shape, str(path), names)


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
