"""Data in: named sets from installed packages, strict file readers, splitting and streaming.

Nothing here downloads, and nothing is mended in silence: a file is read as it stands or refused
with an `InputError` of one line that names the file and the place.
"""

from dataclasses import replace
from pathlib import Path

from jaxcae.data.catalogue import CATALOGUE, load_named
from jaxcae.data.dataset import Dataset, Standardization, split
from jaxcae.data.readers import SUFFIXES, read, read_shape
from jaxcae.data.stream import NpySource, StreamedBatches, stream
from jaxcae.data.values import default_max_bytes
from jaxcae.errors import InputError, unknown_name

__all__ = [
    "CATALOGUE",
    "Dataset",
    "NpySource",
    "Standardization",
    "StreamedBatches",
    "default_max_bytes",
    "load",
    "read",
    "read_shape",
    "split",
    "stream",
]


def load(
    name_or_path: str | Path,
    *,
    max_bytes: int | None = None,
    flatten: bool = False,
    standardize: bool | None = None,
) -> Dataset:
    """Load a named data set, or a `.npy`, `.npz` or `.csv` file, into memory.

    Args:
        name_or_path: A name in `CATALOGUE`, or a path. A name wins; write `./digits`, or give a
            `Path`, for a file of that name.
        max_bytes: Refuse what would take more memory than this; half the memory by default.
        flatten: Flatten arrays of rank 1 (one feature) or rank 3 and more, instead of refusing.
        standardize: Whether `split` is to standardise the features. By default it does so for the
            tabular sets of the catalogue and leaves files as they stand.

    Returns:
        The samples in float32. Named image sets are scaled to [0, 1].

    Raises:
        InputError: If the name is unknown, its package is not installed, or the file is unusable.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if isinstance(name_or_path, str) and name in CATALOGUE:
        dataset = load_named(name)
    elif path.suffix.lower() in SUFFIXES or path.exists():
        dataset = read(path, max_bytes=max_bytes, flatten=flatten)
    else:
        problem = unknown_name("data set", name, CATALOGUE)
        raise InputError(f"{problem} A file ends in {', '.join(SUFFIXES)}.")
    return dataset if standardize is None else replace(dataset, tabular=standardize)
