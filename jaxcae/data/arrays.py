"""`.npy` and `.npz`: headers read and believed only as far as the file's own size agrees."""

import math
import mmap
import os
import stat
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxcae.data.values import BLOCK_BYTES, Caster, check_fits, matrix_shape
from jaxcae.errors import InputError

FEATURE_NAMES = ("features", "X", "x", "data")
LABEL_NAMES = ("labels", "y")
_MAX_MEMBERS = 1000


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


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; a pipe or a device could block or never end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {_reason(error)}.") from None
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise InputError(f"{path}: not a regular file.")
    return file


def map_npy(path: Path) -> np.ndarray:
    """Map a `.npy` of numbers into memory read-only, without reading its values.

    Raises:
        InputError: If it is not a `.npy` of numbers whose size is what its header says.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise InputError(f"{path}: the file is empty: no rows.")
        header = read_header(file, path)
        _check_size(path, header, size)
        if header.num_bytes == 0:
            return np.empty(header.shape, header.dtype)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    values = np.frombuffer(mapped, header.dtype, offset=header.offset)
    return values.reshape(header.shape, order="F" if header.fortran_order else "C")


def read_npy(
    path: Path, max_bytes: int | None, flatten: bool
) -> tuple[np.ndarray, tuple[int, ...] | None]:
    """Read a `.npy` as `(float32 matrix, feature_shape)`."""
    array = map_npy(path)
    rows, features, feature_shape = matrix_shape(path, array.shape, flatten)
    check_fits(path, 4 * rows * features, max_bytes, "Stream it (--stream), or keep fewer rows. ")
    return to_float32(path, array, rows, features), feature_shape


def read_npz(
    path: Path, max_bytes: int | None, flatten: bool
) -> tuple[np.ndarray, np.ndarray | None, tuple[int, ...] | None]:
    """Read the features, and the labels if any, of a `.npz`.

    Features are the array named `features`, `X`, `x` or `data`, or the only array; labels are named
    `labels` or `y`. Others are left alone.
    """
    with open_regular(path) as file:
        check_fits(path, os.fstat(file.fileno()).st_size, max_bytes)
        try:
            with zipfile.ZipFile(file) as archive:
                members = _members(path, archive)
                name = _choose(path, members)
                raw = _read_member(path, archive, members[name], max_bytes, scale=True)
                label_name = next((label for label in LABEL_NAMES if label in members), None)
                labels = (
                    _read_member(path, archive, members[label_name], max_bytes, scale=False)
                    if label_name
                    else None
                )
        except InputError:
            raise
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, *_ZIP_ERRORS) as error:
            raise InputError(f"{path}: not a usable .npz: {_reason(error)}.") from None
    rows, features, feature_shape = matrix_shape(path, raw.shape, flatten)
    if labels is not None and labels.shape != (rows,):
        raise InputError(
            f"{path}: expected one label per row, shape ({rows},), got shape {labels.shape}."
        )
    return to_float32(path, raw, rows, features), labels, feature_shape


def to_float32(path: Path, array: np.ndarray, rows: int, features: int) -> np.ndarray:
    """Copy into a float32 matrix, block by block, refusing what does not survive the cast."""
    out = np.empty((rows, features), np.float32)
    caster = Caster(path)
    step = max(1, BLOCK_BYTES // (features * max(array.dtype.itemsize, 4)))
    for start in range(0, rows, step):
        block = np.asarray(array[start : start + step]).reshape(-1, features)
        caster.cast(block, start, out[start : start + step])
    caster.finish()
    return out


def read_header(file: Any, path: Path) -> Header:
    """Parse the header of a `.npy`, refusing everything but numbers.

    Raises:
        InputError: If it is not a `.npy`, or holds objects, text, records or complex numbers.
    """
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError(f"format version {version} holds records, not numbers")
    except Exception as error:  # the header is parsed as Python source: many kinds may come out
        raise InputError(f"{path}: not a usable .npy: {_reason(error)}.") from None
    if dtype.hasobject:
        raise InputError(
            f"{path}: holds Python objects, which are pickled and never loaded. "
            "Save an array of numbers."
        )
    if dtype.kind not in "biuf" or dtype.itemsize == 0 or dtype.shape:
        raise InputError(f"{path}: expected numbers, the array has dtype {str(dtype)[:80]}.")
    if any(isinstance(extent, bool) or extent < 0 for extent in shape):
        raise InputError(f"{path}: the header's shape {shape} makes no sense.")
    return Header(shape, fortran_order, dtype, file.tell())


def _check_size(path: Path, header: Header, size: int) -> None:
    if header.offset + header.num_bytes != size:
        raise InputError(
            f"{path}: the header promises {header.num_bytes} bytes of values "
            f"(shape {header.shape}, {header.dtype}), the file has {size - header.offset}. "
            "It is truncated or damaged."
        )


# What zipfile and zlib raise on damaged archives, beyond their own error classes.
_ZIP_ERRORS = (
    ValueError, IndexError, KeyError, OverflowError, NotImplementedError, RuntimeError,
    UnicodeError, MemoryError, AttributeError,
)  # fmt: skip


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    if len(infos) > _MAX_MEMBERS:
        raise InputError(f"{path}: {len(infos)} arrays in one .npz, at most {_MAX_MEMBERS}.")
    members = {info.filename.removesuffix(".npy"): info for info in infos}
    if len(members) != len(infos):
        raise InputError(f"{path}: two arrays share one name.")
    return members


def _choose(path: Path, members: dict[str, zipfile.ZipInfo]) -> str:
    candidates = [name for name in members if name not in LABEL_NAMES]
    for name in FEATURE_NAMES:
        if name in candidates:
            return name
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise InputError(f"{path}: no rows: the archive holds no array of features.")
    shown = ", ".join(repr(name[:40]) for name in candidates[:8])
    raise InputError(
        f"{path}: which array holds the samples? It has {shown}. Name one of them 'features'."
    )


def _read_member(
    path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, max_bytes: int | None, scale: bool
) -> np.ndarray:
    """Read one array; its header, its declared size and the cap agree before it is allocated."""
    label = f"{info.filename[:40]!r}"
    if info.flag_bits & 1:
        raise InputError(f"{path}: {label} is encrypted.")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(f"{path}: {label} is compressed by a method NumPy does not write.")
    with archive.open(info) as file:
        header = read_header(file, path)
        _check_size(path, header, info.file_size)
        cast = 4 * math.prod(header.shape) if scale else 0
        check_fits(path, header.num_bytes + cast, max_bytes)
        buffer = bytearray(header.num_bytes)
        view = memoryview(buffer)
        filled = 0
        while filled < len(buffer):
            block = file.read(min(BLOCK_BYTES, len(buffer) - filled))
            if not block:
                raise InputError(f"{path}: {label} ends early; the archive is damaged.")
            view[filled : filled + len(block)] = block
            filled += len(block)
        if file.read(1):  # also makes zipfile compare the checksum at the end
            raise InputError(f"{path}: {label} is longer than it declares.")
    values = np.frombuffer(buffer, header.dtype)
    return values.reshape(header.shape, order="F" if header.fortran_order else "C")


def _reason(error: BaseException) -> str:
    """Return an error as one short line without its final full stop."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    line = " ".join(text.split())
    return (line if len(line) <= 160 else line[:157] + "...").rstrip(".")
