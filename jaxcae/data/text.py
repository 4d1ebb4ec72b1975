"""`.csv`: commas, one sample per line, an optional header line; anything else names its line."""

import csv
from pathlib import Path
from typing import IO

import numpy as np

from jaxcae.data.arrays import open_regular
from jaxcae.data.values import BLOCK_BYTES, Caster, check_fits
from jaxcae.errors import InputError

LABEL_COLUMN = "label"
_MAX_LINE = 1 << 24
_MAX_COLUMNS = 1 << 20
_MISSING = {"na", "n/a", "<na>", "null", "none", "nil", "missing", "?", "-", "."}
_BOM = b"\xef\xbb\xbf"


def read_csv(
    path: Path, max_bytes: int | None
) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...] | None]:
    """Read a CSV of numbers as `(float32 matrix, labels, column names)`.

    The first line is a header if none of its cells is a number. A column that the header names
    `label` is taken out of the features and returned apart.

    Raises:
        InputError: With the line and column of whatever is not a finite number in float32.
    """
    with open_regular(path) as file:
        _check_encoding(path, file)
        lines = _count_lines(file)
        if lines == 0:
            raise InputError(f"{path}: the file is empty: no rows.")
        first = _read_line(path, file, 1)
        names = _header(path, first)
        rows = lines - (names is not None)
        if rows == 0:
            raise InputError(f"{path}: a header and no rows.")
        columns = len(names) if names else first.count(b",") + 1
        if columns > _MAX_COLUMNS:
            raise InputError(f"{path}: {columns} columns, at most {_MAX_COLUMNS} are read.")
        check_fits(path, 4 * rows * columns, max_bytes)
        if names is None:
            file.seek(len(_BOM) if _has_bom(file) else 0)
        values = _read_rows(path, file, rows, columns, 1 if names is None else 2)
    if names is None or LABEL_COLUMN not in names:
        return values, None, names
    return _take_labels(path, values, names)


def _check_encoding(path: Path, file: IO[bytes]) -> None:
    start = file.read(4096)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start:
        raise InputError(f"{path}: UTF-16 or binary, not text in UTF-8. Save it as UTF-8.")
    file.seek(len(_BOM) if start.startswith(_BOM) else 0)


def _has_bom(file: IO[bytes]) -> bool:
    file.seek(0)
    return file.read(len(_BOM)) == _BOM


def _count_lines(file: IO[bytes]) -> int:
    """Count the lines from here on, and come back."""
    here = file.tell()
    count, last = 0, b"\n"
    while block := file.read(1 << 18):
        count += block.count(b"\n")
        last = block[-1:]
    file.seek(here)
    return count + (last != b"\n")


def _read_line(path: Path, file: IO[bytes], number: int) -> bytes:
    line = file.readline(_MAX_LINE + 1)
    if len(line) > _MAX_LINE:
        raise InputError(f"{path}: line {number} is longer than {_MAX_LINE} bytes.")
    return line.removesuffix(b"\n").removesuffix(b"\r")


def _header(path: Path, line: bytes) -> tuple[str, ...] | None:
    """Return the column names, or None if the first line holds a number."""
    if not line.strip():
        raise InputError(f"{path}: line 1 is blank.")
    if any(_number(cell) is not None for cell in line.split(b",")):
        return None
    try:
        names = next(csv.reader([line.decode("utf-8")], strict=True))
    except UnicodeDecodeError:
        raise InputError(f"{path}: line 1 is not text in UTF-8.") from None
    except csv.Error as error:
        raise InputError(f"{path}: line 1: {error}.") from None
    if len(names) == 1 and (separator := _other_separator(line)):
        raise InputError(f"{path}: line 1 is separated by {separator}, expected commas.")
    names = [name.strip() for name in names]
    for column, name in enumerate(names, start=1):
        where, shown = f"{path}: line 1, column {column}", repr(name[:40])
        if not name:
            raise InputError(f"{where}: the column has no name. Remove it if it counts the rows.")
        if name.lower() in _MISSING:  # a row of missing values is data, and not a header
            raise InputError(f"{where}: {shown} is neither a number nor the name of a column.")
        if name in names[: column - 1]:
            raise InputError(f"{where}: the column name {shown} comes twice.")
    return tuple(names)


def _read_rows(path: Path, file: IO[bytes], rows: int, columns: int, line: int) -> np.ndarray:
    out = np.empty((rows, columns), np.float32)
    step = max(1, BLOCK_BYTES // (32 * columns))  # a Python float and its slot take 32 bytes
    texts: list[list[bytes]] = []
    caster = Caster(path, lambda row, column: f"line {line + row}, column {column + 1}")
    for start in range(0, rows, step):
        texts = [
            _cells(path, _read_line(path, file, line + row), line + row, columns)
            for row in range(start, min(start + step, rows))
        ]
        block = np.array(
            [_floats(path, cells, line + start + i) for i, cells in enumerate(texts)], np.float64
        )
        # A number written in digits that comes out infinite is out of range, not an infinity.
        overflown = np.isinf(block)
        for row, column in np.argwhere(overflown):
            overflown[row, column] = any(48 <= c <= 57 for c in texts[row][column])
        if overflown.any():
            caster.report("range", overflown, np.array(texts, dtype=object), start)
            block[overflown] = 0
        caster.cast(block, start, out[start : start + len(block)])
    caster.finish()
    return out


def _cells(path: Path, line: bytes, number: int, columns: int) -> list[bytes]:
    if not line.strip():
        raise InputError(f"{path}: line {number} is blank.")
    found = line.count(b",") + 1
    if found != columns:
        if separator := _other_separator(line):
            raise InputError(f"{path}: line {number} is separated by {separator}, expected commas.")
        raise InputError(
            f"{path}: line {number} has {found} columns, expected {columns} as in line 1."
        )
    return line.split(b",")


def _floats(path: Path, cells: list[bytes], number: int) -> list[float]:
    try:
        values = list(map(float, cells))
        if not any(b"_" in cell for cell in cells):  # float("1_000") is Python, not data
            return values
    except ValueError:
        pass
    for column, cell in enumerate(cells, start=1):
        if _number(cell) is None:
            shown = cell[:40].decode("ascii", "backslashreplace")
            separator = _other_separator(cell)
            hint = f" Cells are separated by commas, not by {separator}." if separator else ""
            what = f"{shown!r} is not a number" if cell.strip() else "the cell is empty"
            raise InputError(f"{path}: line {number}, column {column}: {what}.{hint}")
    raise AssertionError("a line failed as a whole and in no cell")


def _number(cell: bytes) -> float | None:
    if b"_" in cell:
        return None
    try:
        return float(cell)
    except ValueError:
        return None


def _other_separator(line: bytes) -> str | None:
    for character, name in ((b";", "';'"), (b"\t", "tabs"), (b"|", "'|'")):
        if character in line:
            return name
    return None


def _take_labels(
    path: Path, values: np.ndarray, names: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    column = names.index(LABEL_COLUMN)
    if len(names) == 1:
        raise InputError(f"{path}: no features, only a label column.")
    labels = values[:, column]
    whole = labels.astype(np.int64)
    rest = tuple(name for i, name in enumerate(names) if i != column)
    return (
        np.delete(values, column, axis=1),
        whole if np.array_equal(whole, labels) else labels.copy(),
        rest,
    )
