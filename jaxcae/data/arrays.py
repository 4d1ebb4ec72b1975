"""`.npy`: a header that is believed only as far as the size of the file agrees."""

import io
import math
import os
import stat
from pathlib import Path
from typing import IO, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxcae.data.values import BLOCK_BYTES, Caster, Source, check_fits, matrix_shape
from jaxcae.errors import InputError, printable

_MAX_HEADER = 10_000


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
    path: Path, max_bytes: int | None, flatten: bool, *, wide: bool = False, missing: bool = False
) -> tuple[np.ndarray, tuple[int, ...] | None]:
    """Read a `.npy` as `(matrix, feature_shape)`; see `read_matrix`."""
    with open_regular(path) as file:
        header = read_header(path, file, size_of(file))
        advice = "Use `stream`, or keep fewer rows. "
        return read_matrix(
            path, file, header, max_bytes, flatten, advice, wide=wide, missing=missing
        )


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


def read_header(path: Path, file: Readable, size: int, *, text: bool = False) -> Header:
    """Parse the header of a `.npy` of `size` bytes, leaving `file` at the first value.

    Text is accepted in place of numbers where `text` says so.

    Raises:
        InputError: If it is not a `.npy`, holds anything but real numbers, or promises more or
            fewer bytes than there are.
    """
    if size == 0:
        raise InputError(f"{path}: the file is empty: no rows.")
    try:
        shape, fortran_order, dtype = _parse_header(file)
    except Exception as error:  # the header is parsed as a Python literal: many kinds come out
        raise InputError(f"{path}: not a usable {path.suffix}: {reason(error)}.") from None
    refusal = refusal_of(dtype)
    if refusal and not (text and dtype.kind in "US"):
        raise InputError(f"{path}: {refusal}")
    if any(isinstance(extent, bool) or extent < 0 for extent in shape):
        raise InputError(f"{path}: the header's shape {_shown(shape)} makes no sense.")
    header = Header(shape, fortran_order, dtype, file.tell())
    if header.offset + header.num_bytes != size:
        # Python refuses to write out numbers of more than some thousand digits.
        promised = header.num_bytes if header.num_bytes < 2**256 else "absurdly many"
        raise InputError(
            f"{path}: the header promises {promised} bytes of values (shape "
            f"{_shown(shape)}, {dtype}), there are {size - header.offset}. "
            "It is truncated or damaged."
        )
    return header


def _parse_header(file: Readable) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"format version {version} holds records, not numbers")
    size = 2 if version == (1, 0) else 4
    length = file.read(size)
    # NumPy would read all of a header before it looks at its length.
    if int.from_bytes(length, "little") > _MAX_HEADER:
        raise ValueError("its header is too long")
    header = io.BytesIO(length + file.read(int.from_bytes(length, "little")))
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(header)
    return np.lib.format.read_array_header_2_0(header)


def refusal_of(dtype: np.dtype) -> str | None:
    """Say why values of this type are no samples, or nothing."""
    if dtype.hasobject:
        return "holds Python objects, which are pickled and never loaded. Save an array of numbers."
    if dtype.names:
        fields = ", ".join(map(repr, dtype.names))[:80]
        return (
            f"expected numbers, the array holds records with the fields {fields}. Save one column "
            "per field, as an array of rank 2."
        )
    if dtype.kind in "biuf" and not dtype.shape:
        return None
    if dtype.kind == "V" and dtype.itemsize in (1, 2) and not dtype.shape:
        kinds = "bfloat16" if dtype.itemsize == 2 else "float8 or int4"
        return (
            f"expected numbers, the array holds {dtype.itemsize} untyped byte(s) a value, as NumPy "
            f"saves {kinds}. Save it as float32: array.astype('float32')."
        )
    advice = {
        "c": " Save its real and imaginary parts, or its modulus, as columns.",
        "M": " Save the time since a moment as numbers, or leave it out.",
        "m": " Divide by a unit of time before saving.",
    }.get(dtype.kind, "")
    return f"expected numbers, the array has dtype {str(dtype)[:80]}.{advice}"


def read_matrix(
    path: Path,
    file: Readable,
    header: Header,
    max_bytes: int | None,
    flatten: bool,
    advice: str = "",
    *,
    wide: bool = False,
    missing: bool = False,
    names: tuple[str, ...] | None = None,
) -> tuple[np.ndarray, tuple[int, ...] | None]:
    """Read the values behind `header` as `(matrix, feature_shape)`.

    The matrix is float32, or, if `wide` is asked for, float64 where the file has digits that
    float32 would lose. NaN is accepted where `missing` says so.

    Memory: the matrix and one block; in Fortran order also the raw values.
    """
    rows, features, feature_shape = matrix_shape(path, header.shape, flatten)
    raw = header.num_bytes if header.fortran_order else 0
    dtype = wide_type(header.dtype) if wide else np.dtype(np.float32)
    check_fits(path, dtype.itemsize * rows * features + raw, max_bytes, advice)
    if header.fortran_order:
        array = read_array(path, file, header)
        return cast_matrix(path, array, max_bytes, flatten, wide=wide, missing=missing, names=names)
    out = np.empty((rows, features), dtype)
    caster = Caster(path, names=names, missing=missing)
    step = max(1, BLOCK_BYTES // (features * header.dtype.itemsize))
    for start in range(0, rows, step):
        count = min(step, rows - start)
        block = read_array(path, file, header._replace(shape=(count, features)))
        caster.cast(block, start, out[start : start + count])
    caster.finish()
    return out, feature_shape


def cast_matrix(
    source: Source,
    array: np.ndarray,
    max_bytes: int | None,
    flatten: bool,
    *,
    wide: bool = False,
    missing: bool = False,
    names: tuple[str, ...] | None = None,
) -> tuple[np.ndarray, tuple[int, ...] | None]:
    """Check an array in memory, and cast it as `read_matrix` does that of a file."""
    if refusal := refusal_of(array.dtype):
        raise InputError(f"{source}: {refusal}")
    rows, features, feature_shape = matrix_shape(source, array.shape, flatten)
    dtype = wide_type(array.dtype) if wide else np.dtype(np.float32)
    check_fits(source, dtype.itemsize * rows * features, max_bytes)
    out = np.empty((rows, features), dtype)
    caster = Caster(source, names=names, missing=missing)
    step = max(1, BLOCK_BYTES // (features * array.itemsize))
    for start in range(0, rows, step):
        block = array[start : start + step]
        caster.cast(block.reshape(len(block), features), start, out[start : start + step])
    caster.finish()
    return out, feature_shape


def wide_type(dtype: np.dtype) -> np.dtype:
    """Return the type that keeps the digits of `dtype`: float32 where it can, else float64."""
    return np.dtype(np.float32 if np.can_cast(dtype, np.float32, "safe") else np.float64)


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
    line = printable(" ".join(str(text).split()))
    return (line if len(line) <= 160 else line[:157] + "...").rstrip(".")


def _shown(shape: tuple[int, ...]) -> str:
    text = str(shape)
    return text if len(text) <= 80 else f"{text[:77]}..."
