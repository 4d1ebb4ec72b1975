"""Rows of one `.npy`, or of a folder of them as one set, read by `pread`.

Not through a memory map: a map counts every page it has touched towards the process's memory until
the kernel takes it back, and kills the process (SIGBUS) when a file shrinks or its disk fails;
`pread` keeps nothing and reports both as errors.
"""

import os
import re
from pathlib import Path

import numpy as np

from jaxcae.data.arrays import (
    Header,
    open_regular,
    read_header,
    read_npy,
    size_of,
    wide_type,
)
from jaxcae.data.values import check_fits, matrix_shape
from jaxcae.errors import InputError


class _File:
    """An open `.npy` that is closed when nothing refers to it any more."""

    def __init__(self, path: Path, flatten: bool) -> None:
        self.path = path
        with open_regular(path) as file:
            self.header: Header = read_header(path, file, size_of(file))
            self._descriptor = os.dup(file.fileno())
        self.num_rows, self.num_features, self.feature_shape = matrix_shape(
            path, self.header.shape, flatten
        )
        self._width = self.num_features * self.header.dtype.itemsize

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    @property
    def scattered(self) -> bool:
        """Whether a row is scattered over the whole file."""
        return self.header.fortran_order and self.num_rows > 1 and self.num_features > 1

    def read(self, rows: np.ndarray, out: np.ndarray, places: np.ndarray) -> None:
        """Read rows in ascending order to their places in `out`, neighbours in one call."""
        if self.scattered:
            raise InputError(
                f"{self.path}: in Fortran order, so a row is scattered over the whole file. "
                "Save it in C order to stream it."
            )
        apart = (np.diff(rows) != 1) | (np.diff(places) != 1)
        starts = np.concatenate([[0], np.flatnonzero(apart) + 1])
        sizes = np.diff(starts, append=len(rows)) * self._width
        # Most rows of a batch have no neighbour in it, so this loop is kept as short as it can be.
        memory, descriptor = out.view(np.uint8).reshape(-1).data, self._descriptor
        sources = self.header.offset + rows[starts].astype(np.int64) * self._width
        targets = places[starts] * self._width
        for at, to, size in zip(sources.tolist(), targets.tolist(), sizes.tolist(), strict=True):
            if os.preadv(descriptor, [memory[to : to + size]], at) != size:
                row = (at - self.header.offset) // self._width
                raise InputError(f"{self.path}: row {row} is gone; the file shrank while in use.")


class NpyFiles:
    """The rows of a `.npy`, or of all `.npy` files of a folder, one after the other.

    Attributes:
        path: The file or folder.
        num_rows: Rows in all.
        num_features: Values of a row.
        feature_shape: The shape of a sample that was flattened, or None.
        dtype: As they are stored.
    """

    def __init__(self, path: Path, flatten: bool) -> None:
        """Open them and read their headers.

        Raises:
            InputError: If one is not a usable `.npy`, or they differ in width or dtype.
        """
        self.path = path
        self._files = [_File(one, flatten) for one in _paths(path)]
        first = self._files[0]
        for file in self._files:
            if (file.num_features, file.header.dtype) != (first.num_features, first.header.dtype):
                raise InputError(
                    f"{file.path}: {file.num_features} features of {file.header.dtype}, but "
                    f"{first.path.name} has {first.num_features} of {first.header.dtype}. "
                    "One set has one width and one dtype."
                )
        self._starts = np.cumsum([0, *(file.num_rows for file in self._files)])
        self.num_rows, self.num_features = int(self._starts[-1]), first.num_features
        self.feature_shape, self.dtype = first.feature_shape, first.header.dtype

    @property
    def scattered(self) -> bool:
        """Whether rows of one of them are scattered, so that they cannot be streamed."""
        return any(file.scattered for file in self._files)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Read rows as they are stored, in one pass over the files; (len(rows), num_features)."""
        out = np.empty((len(rows), self.num_features), self.dtype)
        places = np.argsort(rows, kind="stable")
        rows = rows[places]
        cuts = np.searchsorted(rows, self._starts)
        for file, start, low, high in zip(self._files, self._starts, cuts, cuts[1:], strict=False):
            if high > low:
                file.read(rows[low:high] - start, out, places[low:high])
        return out

    def place(self, row: int, column: int) -> str:
        """Say where a value is."""
        index = int(np.searchsorted(self._starts, row, "right")) - 1
        where = f" of {self._files[index].path.name}" if len(self._files) > 1 else ""
        return f"row {row - int(self._starts[index])}{where}, column {column} (from 0)"


def read_folder(
    path: Path, max_bytes: int | None, flatten: bool, *, wide: bool = False, missing: bool = False
) -> tuple[np.ndarray, tuple[int, ...] | None]:
    """Read the `.npy` files of a folder as one `(matrix, feature_shape)`; see `read_npy`.

    Memory: the matrix and one file.
    """
    files = NpyFiles(path, flatten)
    dtype = wide_type(files.dtype) if wide else np.dtype(np.float32)
    need = dtype.itemsize * files.num_rows * files.num_features
    check_fits(path, need, max_bytes, "Use `stream`, or fewer files. ")
    out = np.empty((files.num_rows, files.num_features), dtype)
    start = 0
    for one in _paths(path):
        rows, _ = read_npy(one, max_bytes, flatten, wide=wide, missing=missing)
        out[start : start + len(rows)] = rows
        start += len(rows)
    return out, files.feature_shape


def _paths(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted((one for one in path.iterdir() if one.suffix == ".npy"), key=_in_order)
    if not found:
        raise InputError(f"{path}: no .npy files in this folder.")
    return found


def _in_order(path: Path) -> list[tuple[str, int]]:
    # Numbers as numbers: part-10 comes after part-9.
    parts = re.split(r"([0-9]+)", path.name)
    texts, numbers = parts[::2], [*map(int, parts[1::2]), -1]
    return list(zip(texts, numbers, strict=True))
