"""`.npy`: a header that is believed only as far as the size of the file agrees."""

import math
import os
import stat
from pathlib import Path
from typing import IO, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxcae.data.values import BLOCK_BYTES, Caster, check_fits, matrix_shape
from jaxcae.errors import InputError


@runtime_checkable
class Readable(Protocol):
    """An open binary file, or a member of an archive."""

    def read(self, size: int = -1, /) -> bytes:
        """Return the next bytes."""
        ...

    def tell(self) -> int:
        """Return how far reading has come."""
        ...


class Header(NamedTuple):
    """What the header of a `.npy` promises, checked for sense."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype
    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the values alone, exact however absurd the shape."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_npy(
    path: Path, max_bytes: int | None, flatten: bool
) -> tuple[np.ndarray, tuple[int, ...] | None]:
    """Read a `.npy` as `(float32 matrix, feature_shape)`."""
    with open_regular(path) as file:
        header = read_header(path, file, size_of(file))
        advice = "Stream it (--stream), or keep fewer rows. "
        return read_matrix(path, file, header, max_bytes, flatten, advice)


def open_regular(path: Path) -> IO[bytes]:
    """Open a regular file for reading; a pipe or a device could block, or never end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {reason(error)}.") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{path}: not a regular file.")
    return os.fdopen(descriptor, "rb")


def size_of(file: IO[bytes]) -> int:
    """Return the size of an open file in bytes."""
    return os.fstat(file.fileno()).st_size


def read_header(path: Path, file: Readable, size: int) -> Header:
    """Parse the header of a `.npy` of `size` bytes, leaving `file` at the first value.

    Raises:
        InputError: If it is not a `.npy`, holds anything but real numbers, or promises more or
            fewer bytes than there are.
    """
    if size == 0:
        raise InputError(f"{path}: the file is empty: no rows.")
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError(f"format version {version} holds records, not numbers")
    except Exception as error:  # the header is parsed as a Python literal: many kinds come out
        # NumPy's advice for a long header is to trust the file, which is not ours to give.
        why = "its header is too long" if "max_header_size" in str(error) else reason(error)
        raise InputError(f"{path}: not a usable {path.suffix}: {why}.") from None
    if dtype.hasobject:
        raise InputError(
            f"{path}: holds Python objects, which are pickled and never loaded. "
            "Save an array of numbers."
        )
    if dtype.kind not in "biuf" or dtype.shape:
        raise InputError(f"{path}: expected numbers, the array has dtype {str(dtype)[:80]}.")
    if any(isinstance(extent, bool) or extent < 0 for extent in shape):
        raise InputError(f"{path}: the header's shape {_shown(shape)} makes no sense.")
    header = Header(shape, fortran_order, dtype, file.tell())
    if header.offset + header.num_bytes != size:
        raise InputError(
            f"{path}: the header promises {header.num_bytes} bytes of values (shape "
            f"{_shown(shape)}, {dtype}), there are {size - header.offset}. "
            "It is truncated or damaged."
        )
    return header


def read_matrix(
    path: Path,
    file: Readable,
    header: Header,
    max_bytes: int | None,
    flatten: bool,
    advice: str = "",
) -> tuple[np.ndarray, tuple[int, ...] | None]:
    """Read the values behind `header` as `(float32 matrix, feature_shape)`.

    Memory: the float32 matrix and one block; in Fortran order also the raw values.
    """
    rows, features, feature_shape = matrix_shape(path, header.shape, flatten)
    raw = header.num_bytes if header.fortran_order else 0
    check_fits(path, 4 * rows * features + raw, max_bytes, advice)
    out = np.empty((rows, features), np.float32)
    caster = Caster(path)
    step = max(1, BLOCK_BYTES // (features * header.dtype.itemsize))
    whole = read_array(path, file, header) if header.fortran_order else None
    for start in range(0, rows, step):
        count = min(step, rows - start)
        if whole is None:
            block = read_array(path, file, header._replace(shape=(count, features)))
        else:
            block = whole[start : start + count].reshape(count, features)
        caster.cast(block, start, out[start : start + count])
    caster.finish()
    return out, feature_shape


def read_array(path: Path, file: Readable, header: Header) -> np.ndarray:
    """Read the array that `header` describes from where `file` stands."""
    buffer = bytearray(header.num_bytes)
    view = memoryview(buffer)
    filled = 0
    while filled < len(buffer):
        part = file.read(min(BLOCK_BYTES, len(buffer) - filled))
        if not part:
            raise InputError(f"{path}: ends early; it is truncated or damaged.")
        view[filled : filled + len(part)] = part
        filled += len(part)
    values = np.frombuffer(buffer, header.dtype)
    return values.reshape(header.shape, order="F" if header.fortran_order else "C")


def reason(error: BaseException) -> str:
    """Return an error as one short line without its final full stop."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    line = " ".join(str(text).split())
    return (line if len(line) <= 160 else line[:157] + "...").rstrip(".")


def _shown(shape: tuple[int, ...]) -> str:
    text = str(shape)
    return text if len(text) <= 80 else f"{text[:77]}..."
