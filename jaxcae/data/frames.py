"""Parquet files and data frames of pandas, polars or Arrow: columns with names and types.

Nothing is converted in silence: a column holds numbers (or truth values), or is refused by name.
"""

from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcae.data.arrays import open_regular, reason, size_of
from jaxcae.data.cells import labels_of
from jaxcae.data.tables import Columns, Content, TableOptions, choose_columns
from jaxcae.data.times import Times, parse_times
from jaxcae.data.values import BLOCK_BYTES, SMALL, Caster, Source, check_fits
from jaxcae.errors import InputError

FRAME = "the data frame"
_MAX_COLUMNS = 1 << 20
_MAX_BLOCK_ROWS = 1 << 16


def read_parquet(
    path: Path, max_bytes: int | None, options: TableOptions, dtype: Any = np.float32
) -> Content:
    """Read a Parquet file as a matrix of dtype and what is beside it.

    Memory: the matrix, the pages of one row group, and a block of rows. What is packed as one of
    few values stays so until its block comes.

    Raises:
        InputError: Naming the column that holds no numbers, or the first cell that is unusable.
    """
    pa, parquet = _require("pyarrow"), _require("pyarrow.parquet", "pyarrow")
    with open_regular(path) as file:
        if size_of(file) == 0:
            raise InputError(f"{path}: the file is empty: no rows.")
        try:
            content = parquet.ParquetFile(file, page_checksum_verification=True)
            columns = _choose(path, content.schema_arrow.names, options)
            if columns.label is not None:  # of labels that repeat each is read once
                file.seek(0)
                content = parquet.ParquetFile(
                    file,
                    page_checksum_verification=True,
                    read_dictionary=[content.schema_arrow.names[columns.label]],
                )
            groups = [content.metadata.row_group(i) for i in range(content.num_row_groups)]
            largest = max((group.total_byte_size for group in groups), default=0)
            rows = content.metadata.num_rows
            need = np.dtype(dtype).itemsize * rows * len(columns.features)
            check_fits(path, need + largest, max_bytes)
            found = content.schema_arrow.names
            wanted = [found[i] for i in (*columns.features, *columns.beside)]
            _check_types(path, content.schema_arrow.empty_table(), columns, found)
            size = max(1, min(_MAX_BLOCK_ROWS, BLOCK_BYTES // (8 * max(1, len(wanted)))))
            batches = content.iter_batches(size, columns=wanted)
            parts = (pa.Table.from_batches([batch]) for batch in batches)
            return _collect(path, parts, rows, columns, found, options, dtype, max_bytes)
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: not a usable Parquet file: {reason(error)}.") from None


def read_frame(
    frame: Any, max_bytes: int | None, options: TableOptions, dtype: Any = np.float32
) -> Content:
    """Read an eager frame of pandas, polars or Arrow; see `read_parquet`."""
    narwhals = _require("narwhals")
    if type(frame).__module__.startswith("pyarrow") and type(frame).__name__ == "RecordBatch":
        frame = _require("pyarrow").Table.from_batches([frame])
    try:
        table = narwhals.from_native(frame, eager_only=True)
    except TypeError:
        kind = f"{type(frame).__module__}.{type(frame).__name__}"
        raise InputError(
            f"expected a path, an array, or a data frame of pandas, polars or Arrow, got {kind}. "
            f"{_advice(frame)}"
        ) from None
    except Exception as error:  # narwhals refuses names that come twice
        raise InputError(f"{FRAME}: {reason(error)}.") from None
    found = list(table.columns)
    columns = _choose(FRAME, [str(name) for name in found], options)
    check_fits(FRAME, np.dtype(dtype).itemsize * len(table) * len(columns.features), max_bytes)
    _check_types(FRAME, table, columns, found)
    return _collect(FRAME, iter([table]), len(table), columns, found, options, dtype, max_bytes)


def _advice(value: Any) -> str:
    """Say what to do with what is neither an array nor a frame."""
    if hasattr(value, "collect"):
        return "Collect a lazy one first."
    if hasattr(value, "to_frame"):
        return "Make one column a frame by its `to_frame()`."
    if hasattr(value, "toarray"):
        return "Make a sparse matrix dense by its `toarray()`."
    return "Make it an array by `numpy.asarray`."


def is_array(value: object) -> bool:
    """Tell whether a value is an array of NumPy or JAX; a column of a frame has a dtype, too."""
    return isinstance(value, np.ndarray) or (
        hasattr(value, "__array__") and hasattr(value, "dtype") and hasattr(value, "sharding")
    )


def is_frame(value: object) -> bool:
    """Tell whether a value is neither text nor a path, so that it should be a data frame."""
    return not isinstance(value, str | Path)


def _choose(source: Source, names: list[str], options: TableOptions) -> Columns:
    if len(names) > _MAX_COLUMNS:
        raise InputError(f"{source}: {len(names)} columns, at most {_MAX_COLUMNS} are read.")
    return choose_columns(source, names, options)


def _check_types(source: Source, table: Any, columns: Columns, found: list[Any]) -> None:
    """Refuse columns of features that hold anything but numbers."""
    narwhals = _require("narwhals")
    schema = narwhals.from_native(table, eager_only=True).schema
    for i in columns.features:
        kind = schema[found[i]]
        if kind.is_numeric() or kind == narwhals.Boolean:
            continue
        advice = (
            "Leave it out with `drop`, or make it a number."
            if kind.is_temporal()
            else "Leave it out with `drop`, name it with `label_column`, or make it numbers."
        )
        name = str(found[i])[:40]
        raise InputError(f"{source}: column {name!r} holds {kind}, expected numbers. {advice}")


def _collect(
    source: Source,
    parts: Iterator[Any],
    rows: int,
    columns: Columns,
    found: list[Any],
    options: TableOptions,
    dtype: Any,
    max_bytes: int | None,
) -> Content:
    """Read tables that follow each other."""
    narwhals = _require("narwhals")
    if rows == 0:
        raise InputError(f"{source}: no rows.")
    names = [found[i] for i in columns.features]
    out = np.empty((rows, len(names)), dtype)
    caster = Caster(
        source,
        lambda row, column: f"row {row} (from 0), column {str(names[column])[:40]!r}",
        columns.names,
        options.missing != "refuse",
    )
    position = {name: i for i, name in enumerate(names)}
    labels: list[Any] = []
    times: list[np.ndarray] = []
    row = 0
    for part in parts:
        table = narwhals.from_native(part, eager_only=True)
        block = np.empty((len(table), len(names)))
        for name, values in _arrays(part, position):
            block[:, position[name]] = _wide(source, name, values)
        if row + len(block) > rows:
            break
        caster.cast(block, row, out[row : row + len(block)])
        if columns.label is not None:
            labels.extend(_labels(part, table, found[columns.label]))
        if columns.time is not None:
            times.append(_moments(table[found[columns.time]]))
        row += len(block)
    if row != rows:
        raise InputError(f"{source}: holds other than the {rows} rows it promises; it is damaged.")
    caster.finish()
    known = None if columns.label is None else _known(source, labels, max_bytes)
    return Content(out, known, _times(source, times) if times else None, columns)


def _labels(part: Any, table: Any, name: Any) -> Iterable[Any]:
    """Return a column of labels; texts of which few differ share their memory."""
    column = part[name] if hasattr(part, "column_names") else None  # of Arrow
    if column is None or not hasattr(column.type, "index_type"):
        return table[name].to_numpy()
    labels: list[Any] = []
    for chunk in column.chunks:
        values = chunk.dictionary.to_pylist()
        labels.extend(None if i is None else values[i] for i in chunk.indices.to_pylist())
    return labels


def _known(source: Source, labels: list[Any], max_bytes: int | None) -> np.ndarray:
    """Return labels as an array: numbers, or texts, all of which take the room of the longest."""
    if not any(isinstance(label, str | bool | np.bool_ | None) for label in labels):
        known = np.array(labels)
        if known.dtype.kind not in "OUb":
            return known
    return labels_of(source, list(map(str, labels)), max_bytes)


def _moments(series: Any) -> np.ndarray:
    """Return a column of times as datetime64 in UTC, numbers or texts."""
    narwhals = _require("narwhals")
    if series.dtype == narwhals.Date:
        series = series.cast(narwhals.Datetime("us"))
    if getattr(series.dtype, "time_zone", None) is not None:
        series = series.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    return series.to_numpy()


def _times(source: Source, parts: Sequence[np.ndarray]) -> Times:
    values = np.concatenate(parts)
    if values.dtype.kind == "M":
        return Times(values)
    # What is empty, or neither a time nor a number, is told where it stands.
    return parse_times(source, ["" if value is None else str(value) for value in values])


def _arrays(part: Any, wanted: Container[Any]) -> Iterator[tuple[Any, np.ndarray]]:
    """Yield name and values of the columns that are wanted, NaN or None where there is nothing."""
    if hasattr(part, "column_names"):  # of Arrow, of which narwhals takes a while per column
        for name, column in zip(part.column_names, part.columns, strict=True):
            if name in wanted:
                yield name, column.to_numpy()
        return
    narwhals = _require("narwhals")
    for series in narwhals.from_native(part, eager_only=True).iter_columns():
        if series.name not in wanted:
            continue
        if series.null_count() or series.dtype in (narwhals.Int128, narwhals.UInt128):
            series = series.cast(narwhals.Float64)
        yield series.name, series.to_numpy()


def _wide(source: Source, name: Any, values: np.ndarray) -> np.ndarray:
    """Return a column in float64."""
    wide = values.astype(np.float64)
    if values.dtype.kind in "iu" and values.dtype.itemsize == 8 and len(values):
        largest = np.abs(wide).max()
        if largest > 2**53 and np.spacing(largest) > SMALL * (values - values[0]).std():
            raise InputError(
                f"{source}: column {str(name)[:40]!r} has integers near {largest:.7g} that float64 "
                "no longer tells apart. Take the offset off first."
            )
    return wide


def _require(module: str, package: str = "") -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        package = package or module
        raise InputError(
            f"reading this needs the {package} package, which is not installed: "
            f"run pip install {package}"
        ) from None
