"""Data in: named sets from installed packages, strict file readers, splitting and streaming.

Nothing here downloads, and nothing is mended in silence: a file is read as it stands or refused
with an `InputError` of one line that names the file and the place.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxcae.data.catalogue import CATALOGUE, load_named
from jaxcae.data.dataset import Dataset, Preparation, Standardization, split
from jaxcae.data.frames import is_array, is_frame
from jaxcae.data.readers import ARRAY, SUFFIXES, from_array, from_frame, read, read_shape
from jaxcae.data.stream import NpySource, StreamedBatches, stream
from jaxcae.data.tables import TableOptions
from jaxcae.data.values import default_max_bytes
from jaxcae.errors import InputError, unknown_name

__all__ = [
    "ARRAY",
    "CATALOGUE",
    "Dataset",
    "NpySource",
    "Preparation",
    "Standardization",
    "StreamedBatches",
    "TableOptions",
    "default_max_bytes",
    "from_array",
    "from_frame",
    "load",
    "load_as",
    "read",
    "read_shape",
    "split",
    "stream",
]


def load(
    name_or_path: Any,
    *,
    max_bytes: int | None = None,
    flatten: bool = False,
    standardize: bool | None = None,
    label_column: str | None = None,
    drop: Sequence[str] = (),
    header: str = "auto",
    delimiter: str | None = None,
    decimal: str = "point",
    missing: str = "refuse",
    array: str | None = None,
    names: Sequence[str] | None = None,
    time_column: str | None = None,
) -> Dataset:
    """Load a named data set, a file, or a data frame of pandas, polars or Arrow, into memory.

    Args:
        name_or_path: A name in `CATALOGUE`, a path, a frame, or an array. A name wins; write
            `./digits`, or give a `Path`, for a file of that name.
        max_bytes: Refuse what would take more memory than this; half the memory by default.
        flatten: Flatten arrays of rank 1 (one feature) or rank 3 and more, instead of refusing.
        standardize: Whether `split` is to standardise the features. By default it does so for the
            tabular sets of the catalogue and leaves files as they stand. Where it is to, digits
            that float32 would lose wait for it in float64.
        label_column: See `TableOptions` for this and what follows.
        drop: Columns to leave out.
        header: Whether the first line of a CSV names the columns.
        delimiter: What stands between the cells of a CSV.
        decimal: The decimal mark of a CSV.
        missing: What to do with missing cells: "refuse", "mean" or "drop".
        array: The array of samples in a `.npz` that holds several.
        names: The columns that are expected, in the order to give them.
        time_column: The column of times, which is no feature.

    Returns:
        The samples; see `Dataset`. Named image sets are scaled to [0, 1].

    Raises:
        InputError: If the name is unknown, its package is not installed, or the data is unusable.
    """
    table = TableOptions(
        label_column,
        drop if isinstance(drop, str) else tuple(drop),  # type: ignore[arg-type]
        header,
        delimiter,
        decimal,
        missing,
        array,
        None if names is None else tuple(names),
        time_column=time_column,
    )
    return load_as(
        name_or_path, table, max_bytes=max_bytes, flatten=flatten, standardize=standardize
    )


def load_as(
    name_or_path: Any,
    table: TableOptions,
    *,
    max_bytes: int | None = None,
    flatten: bool = False,
    standardize: bool | None = None,
) -> Dataset:
    """Load data whose columns are read as `table` says; see `load`."""
    wide = bool(standardize)
    if is_array(name_or_path):
        dataset = from_array(
            name_or_path, max_bytes=max_bytes, flatten=flatten, table=table, wide=wide
        )
    elif is_frame(name_or_path):
        dataset = from_frame(name_or_path, max_bytes=max_bytes, table=table, wide=wide)
    elif isinstance(name_or_path, str) and name_or_path in CATALOGUE:
        dataset = load_named(name_or_path, table)
        if standardize is False:  # nothing will need more digits
            dataset = replace(dataset, features=dataset.features.astype(np.float32, copy=False))
    else:
        if "://" in str(name_or_path):
            raise InputError(
                f"{name_or_path}: is an address; only files are read, and nothing is downloaded. "
                "Save it to a file first."
            )
        path = Path(name_or_path)
        known = path.name.lower().endswith(SUFFIXES) or path.suffix or path.exists()
        if not known:
            problem = unknown_name("data set", name_or_path, CATALOGUE)
            raise InputError(f"{problem} A file ends in {', '.join(SUFFIXES)}.")
        dataset = read(path, max_bytes=max_bytes, flatten=flatten, table=table, wide=wide)
    return dataset if standardize is None else replace(dataset, tabular=standardize)
