"""`.csv`: one sample per line, cells between delimiters; anything else names its line and column.

Arrow reads what is plain: no quotes and a moderate width. Whatever it refuses, or reads as anything
but finite numbers, is read again cell by cell, which finds either the same numbers or the line and
column to complain of.
"""

import csv
import gzip
import io
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxcae.data.arrays import open_regular, reason
from jaxcae.data.cells import (
    MISSING_WORDS,
    check_first,
    complaint,
    is_blank,
    is_header,
    labels_of,
    number,
    other_separator,
)
from jaxcae.data.tables import DECIMALS, Columns, Content, TableOptions, choose_columns
from jaxcae.data.times import line_place, parse_times, row_place
from jaxcae.data.values import BLOCK_BYTES, Caster, check_fits
from jaxcae.errors import InputError

_MAX_LINE = 1 << 24
_MAX_COLUMNS = 1 << 20
# Arrow sets up a builder per column and block: beyond this width going cell by cell is faster.
_MAX_ARROW_COLUMNS = 2048
_BOM = b"\xef\xbb\xbf"


class _Layout(NamedTuple):
    """How the lines of a file are to be read: the header's lines are the first `header`."""

    path: Path
    options: TableOptions
    delimiter: str
    columns: Columns
    width: int
    header: int
    rows: int  # at most
    dtype: Any


_Read = tuple[np.ndarray, dict[int, list[str]]]
"""The matrix, and the texts of the columns beside it, by where they stand."""


def read_csv(
    path: Path, max_bytes: int | None, options: TableOptions, dtype: Any = np.float32
) -> Content:
    """Read a CSV of numbers, perhaps packed by gzip, as a matrix of dtype and its company.

    Raises:
        InputError: With the line and column of whatever is not a finite number in float32.
    """
    itemsize = np.dtype(dtype).itemsize
    with _open(path) as file:
        lines, quoted = _survey(path, file, max_bytes, itemsize)
        tabs = Path(path.name.lower().removesuffix(".gz")).suffix == ".tsv"
        delimiter = options.mark or ("\t" if tabs else ",")
        cells, header = _first_line(path, file, delimiter, options)
        width = len(cells)
        found = [c.strip() for c in cells] if header else [str(i + 1) for i in range(width)]
        where = f"{path}: line {header}" if header else path
        columns = choose_columns(where, found, options, named=header > 0)
        columns = columns._replace(
            words=f"{f'header in line {header}' if header else 'no header'}; {columns.words}"
        )
        if lines <= header:
            raise InputError(f"{path}: a header and no rows.")
        check_fits(path, itemsize * (lines - header) * len(columns.features), max_bytes)
        layout = _Layout(
            path, options, delimiter, columns, width, header, lines - header, np.dtype(dtype)
        )
        table = None if quoted else _read_by_arrow(file, layout)
        features, beside = table or _read_by_cells(file, layout)
    labels, texts = (None if i is None else beside[i] for i in (columns.label, columns.time))
    place = row_place if quoted else line_place(header)  # where nothing is quoted a row is a line
    times = None if texts is None else parse_times(path, texts, place)
    known = labels_of(path, labels, max_bytes) if labels else None
    return Content(features, known, times, columns)


@contextmanager
def _open(path: Path) -> Iterator[io.BufferedIOBase]:
    """Open a text, unpacked on the way where its name says so; what fails gets words."""
    with open_regular(path) as packed:
        try:
            if path.suffix.lower() == ".gz":
                with gzip.open(packed) as file:
                    yield file
            else:
                yield packed  # type: ignore[misc]
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path}: cannot be read: {reason(error)}.") from None


def _survey(
    path: Path, file: io.BufferedIOBase, max_bytes: int | None, itemsize: int
) -> tuple[int, bool]:
    """Count the lines, and tell whether there are quotes.

    Raises:
        InputError: If the file is not text of one byte per character, or its lines, at one value
            each, would not fit.
    """
    block = file.read(1 << 18)
    if block[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{path}: UTF-16, not text in UTF-8. Save it as UTF-8.")
    if block[:2] == b"\x1f\x8b":
        raise InputError(f"{path}: packed by gzip. Give it a name that ends in .gz.")
    if not block.removeprefix(_BOM):
        raise InputError(f"{path}: the file is empty: no rows.")
    lines, quoted, last = 0, False, b""
    while block:
        if b"\0" in block:
            raise InputError(f"{path}: UTF-16 or binary, not text in UTF-8. Save it as UTF-8.")
        # A carriage return ends a line, too, unless a line feed follows it.
        lines += block.count(b"\n") + block.count(b"\r") - block.count(b"\r\n")
        lines -= last == b"\r" and block[:1] == b"\n"
        quoted = quoted or b'"' in block
        last = block[-1:]
        check_fits(path, itemsize * lines, max_bytes)
        block = file.read(1 << 18)
    return lines + (last not in (b"\n", b"\r")), quoted


def _first_line(
    path: Path, file: io.BufferedIOBase, delimiter: str, options: TableOptions
) -> tuple[list[str], int]:
    """Return the cells of the first line, and how many lines the header takes."""
    with _records(path, file, delimiter) as records:
        line, cells = next(records, (0, []))
        if not line:  # of a byte order mark cut short no text is left
            raise InputError(f"{path}: is not text in UTF-8.")
        if len(cells) > _MAX_COLUMNS:
            raise InputError(f"{path}: {len(cells)} columns, at most {_MAX_COLUMNS} are read.")
        check_first(path, cells, delimiter, options)
        below: list[list[str]] = []
        if options.header == "auto":
            with suppress(InputError):  # it is told again when that line is read
                below.extend(cells for _, cells in islice(records, 8))
    if not is_header(path, cells, below, options):
        return cells, 0
    if any("\udc80" <= c <= "\udcff" for cell in cells for c in cell):
        raise InputError(f"{path}: line 1 is not text in UTF-8.")
    return cells, line


@contextmanager
def _records(
    path: Path, file: io.BufferedIOBase, delimiter: str
) -> Iterator[Iterator[tuple[int, list[str]]]]:
    """Give an iterator over `(number of the last line, cells)` of the records of a file."""
    file.seek(0)
    text = io.TextIOWrapper(  # type: ignore[type-var]
        file, "utf-8-sig", errors="surrogateescape", newline=""
    )

    def lines() -> Iterator[str]:
        number = 0
        while line := text.readline(_MAX_LINE + 1):
            number += 1
            if len(line) > _MAX_LINE:
                raise InputError(f"{path}: line {number} is longer than {_MAX_LINE} bytes.")
            yield line

    def records() -> Generator[tuple[int, list[str]], None, None]:
        if delimiter == " ":
            yield from ((i, line.split()) for i, line in enumerate(lines(), start=1))
            return
        reader = csv.reader(lines(), delimiter=delimiter, strict=True, skipinitialspace=True)
        try:
            for cells in reader:
                yield reader.line_num, cells
        except csv.Error as error:
            raise InputError(f"{path}: line {reader.line_num}: {error}.") from None

    found = records()
    try:
        yield found
    finally:
        found.close()
        text.detach()  # or the wrapper would close the file with itself


def _read_by_arrow(file: io.BufferedIOBase, layout: _Layout) -> _Read | None:
    """Read all rows, or return None where the text is anything but plain."""
    if layout.width > _MAX_ARROW_COLUMNS or layout.delimiter == " ":
        return None
    try:
        import pyarrow as pa
        from pyarrow import csv as arrow_csv
    except ImportError:
        return None
    names = [str(i) for i in range(layout.width)]
    features = [names[i] for i in layout.columns.features]
    beside: dict[int, list[str]] = {i: [] for i in layout.columns.beside}
    types = {name: pa.float64() for name in features} | {names[i]: pa.string() for i in beside}
    missing = layout.options.missing != "refuse"
    words = [f(word) for word in MISSING_WORDS for f in (str, str.upper, str.title)]
    convert = arrow_csv.ConvertOptions(
        column_types=types,
        include_columns=list(types),
        null_values=[*words, "NaN"] if missing else [],
        strings_can_be_null=False,
        decimal_point=DECIMALS[layout.options.decimal],
    )
    parse = arrow_csv.ParseOptions(
        delimiter=layout.delimiter, quote_char=False, ignore_empty_lines=False
    )
    out = np.empty((layout.rows, len(features)), layout.dtype)
    first_line = layout.header + 1
    caster = _caster(layout, lambda row: first_line + row)
    row = 0
    for block in _whole_lines(file):
        read = arrow_csv.ReadOptions(
            column_names=names,
            skip_rows=0 if row else layout.header,
            block_size=len(block) + 1,
            use_threads=False,
        )
        try:
            table = arrow_csv.read_csv(
                pa.BufferReader(block), read, parse_options=parse, convert_options=convert
            )
        except pa.ArrowInvalid:
            return None
        if row + len(table) > len(out):
            return None
        values = np.empty((len(table), len(features)))
        for i, name in enumerate(features):
            values[:, i] = table[name].to_numpy()
            if np.count_nonzero(~np.isfinite(values[:, i])) != table[name].null_count:
                return None
        caster.cast(values, row, out[row : row + len(values)])
        for i, texts in beside.items():
            texts.extend(table[names[i]].to_pylist())
        row += len(values)
    if row != layout.rows:
        return None
    caster.finish()
    return out, beside


def _whole_lines(file: io.BufferedIOBase) -> Iterator[bytes]:
    """Yield a file in blocks that end where a line ends."""
    file.seek(0)
    rest = b""
    while data := file.read(BLOCK_BYTES):
        data = rest + data
        end = data.rfind(b"\n") + 1 or data.rfind(b"\r") + 1
        if end:
            yield data[:end]
        rest = data[end:]
    if rest:
        yield rest


def _read_by_cells(file: io.BufferedIOBase, layout: _Layout) -> _Read:
    """Read all rows cell by cell, or name the line and the column that is unusable."""
    path, chosen = layout.path, layout.columns.features
    beside: dict[int, list[str]] = {i: [] for i in layout.columns.beside}
    out = np.empty((layout.rows, len(chosen)), layout.dtype)
    whole = chosen == list(range(layout.width))
    step = max(1, BLOCK_BYTES // (32 * len(chosen)))  # a Python float and its slot take 32 bytes
    lines: list[int] = []
    row = 0
    caster = _caster(layout, lambda at: lines[at - row])
    with _records(path, file, layout.delimiter) as records:
        body = (record for record in records if record[0] > layout.header)
        while block := list(islice(body, step)):
            lines, texts = [line for line, _ in block], []
            for line, cells in block:
                _check_width(layout, line, cells)
                texts.append(cells if whole else [cells[i] for i in chosen])
                for i, column in beside.items():
                    column.append(cells[i])
            values = np.array([_numbers(layout, *pair) for pair in zip(lines, texts, strict=True)])
            _report_overflow(caster, values, texts, row)
            caster.cast(values, row, out[row : row + len(values)])
            row += len(values)
    caster.finish()
    return out[:row], beside


def _caster(layout: _Layout, line_of: Any) -> Caster:
    position = layout.columns.features
    return Caster(
        layout.path,
        lambda row, column: f"line {line_of(row)}, column {position[column] + 1}",
        layout.columns.names,
        layout.options.missing != "refuse",
    )


def _check_width(layout: _Layout, line: int, cells: list[str]) -> None:
    path = layout.path
    if is_blank(cells):
        raise InputError(f"{path}: line {line} is blank.")
    if len(cells) == layout.width:
        return
    if mark := other_separator(cells, layout.delimiter, layout.options):
        raise InputError(
            f"{path}: line {line} is separated by {mark!r}, expected {layout.delimiter!r}."
        )
    raise InputError(
        f"{path}: line {line} has {len(cells)} columns, expected {layout.width} as in line 1."
    )


def _numbers(layout: _Layout, line: int, cells: list[str]) -> list[float]:
    text = "".join(cells)
    if layout.options.decimal == "point" and text.isascii() and "_" not in text:
        with suppress(ValueError):
            return list(map(float, cells))
    values = []
    for column, cell in enumerate(cells):
        value = number(cell, layout.options)
        if value is None:
            at = layout.columns.features[column] + 1
            what = complaint(cell, layout.options)
            raise InputError(f"{layout.path}: line {line}, column {at}: {what}")
        values.append(value)
    return values


def _report_overflow(caster: Caster, values: np.ndarray, texts: list[list[str]], row: int) -> None:
    """Report a number written in digits that comes out infinite: out of range, not infinite."""
    overflown = np.isinf(values)
    for i, j in np.argwhere(overflown):
        overflown[i, j] = any(c.isdigit() for c in texts[i][j])
    if overflown.any():
        caster.report("range", overflown, np.array(texts, dtype=object), row)
        values[overflown] = 0
