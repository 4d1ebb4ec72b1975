"""Data in: named sets from installed packages, strict file readers, splitting and streaming.

Nothing here downloads, and nothing is mended in silence: a file is read as it stands or refused
with an `InputError` of one line that names the file and the place.
"""

from pathlib import Path

from jaxcae.data.catalogue import CATALOGUE, load_named
from jaxcae.data.dataset import Dataset, Standardization, split
from jaxcae.data.readers import SUFFIXES, read, read_shape
from jaxcae.data.values import default_max_bytes
from jaxcae.errors import InputError, unknown_name

__all__ = [
    "CATALOGUE",
    "Dataset",
    "Standardization",
    "default_max_bytes",
    "load",
    "read",
    "read_shape",
    "split",
]


def load(
    name_or_path: str | Path, *, max_bytes: int | None = None, flatten: bool = False
) -> Dataset:
    """Load a named data set, or a `.npy`, `.npz` or `.csv` file, into memory.

    Args:
        name_or_path: A name in `CATALOGUE`, or a path. A name wins; write `./digits` for a file
            of that name.
        max_bytes: Refuse what would take more memory than this; half the memory by default.
        flatten: Flatten arrays of rank 1 (one feature) or rank 3 and more, instead of refusing.

    Returns:
        The samples in float32. Named image sets are scaled to [0, 1]; named tabular sets are left
        in their units and marked for standardisation, which `split` does; files are never scaled.

    Raises:
        InputError: If the name is unknown, its package is not installed, or the file is unusable.
    """
    name = str(name_or_path)
    if name in CATALOGUE:
        return load_named(name)
    path = Path(name_or_path)
    if path.suffix.lower() in SUFFIXES:
        return read(path, max_bytes=max_bytes, flatten=flatten)
    if path.exists():
        raise InputError(f"{name}: expected a file that ends in {', '.join(SUFFIXES)}.")
    raise InputError(f"{unknown_name('data set', name, CATALOGUE)} Or give a .npy, .npz or .csv.")
