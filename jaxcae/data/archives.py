"""`.npz`: one array of samples, perhaps one of labels, out of an archive that may be hostile."""

import struct
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np

from jaxcae.data.arrays import open_regular, read_array, read_header, read_matrix, reason, size_of
from jaxcae.data.tables import TableOptions, choose_columns, label_like
from jaxcae.data.values import check_fits
from jaxcae.errors import InputError, printable, unknown_name

FEATURE_NAMES = ("features", "X", "x", "data")
LABEL_NAMES = ("labels", "y")
_MAX_MEMBERS = 1000
_MAX_NAMES = 1 << 24

# What zipfile raises on damaged archives, beyond its own error class.
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    OverflowError,
    RuntimeError,
)


# A directory of a thousand members takes 100 kB; NumPy writes short names.
_MAX_DIRECTORY = 1 << 20
_NAME_LISTS = ("feature_names", "columns")
# Members by which a sparse or a masked array is known, whatever else lies beside them.
_OTHER_FORMS = (
    ({"indices", "indptr"}, "a sparse matrix (SciPy's csr, csc or bsr)"),
    ({"row", "col"}, "a sparse matrix (SciPy's coo)"),
    ({"rows", "cols"}, "a sparse matrix in coordinates"),
    ({"coords", "data"}, "a sparse array in coordinates"),
    ({"nonzero"}, "the places of the values that are not zero"),
    ({"offsets", "data"}, "a sparse matrix (SciPy's dia)"),
    ({"format", "shape"}, "a sparse matrix"),
    ({"mask"}, "a masked array"),
    ({"shape"}, "the shape of an array that is stored in another form"),
)


class _Bounded:
    """A file of which a single read takes no more than `limit` bytes."""

    def __init__(self, path: Path, file: IO[bytes], limit: int) -> None:
        self.seek, self.tell, self.limit = file.seek, file.tell, limit
        self._path, self._file = path, file

    def seekable(self) -> bool:
        """Tell that one can go back."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Read, or refuse to."""
        if size > self.limit:
            raise InputError(
                f"{self._path}: its directory takes {size} bytes, for more than "
                f"{_MAX_MEMBERS} arrays; it is not read."
            )
        return self._file.read(self.limit if size < 0 else size)


def read_npz(
    path: Path,
    max_bytes: int | None,
    flatten: bool,
    options: TableOptions,
    *,
    wide: bool = False,
) -> tuple[np.ndarray, np.ndarray | None, tuple[int, ...] | None, tuple[str, ...] | None, str]:
    """Read a `.npz` as `(matrix, labels, feature_shape, names, words)`.

    The samples are the array named `features`, `X`, `x` or `data`, or else the only array; labels
    are named `labels` or `y`, or as the options say; names of the columns `feature_names` or
    `columns`. Other arrays are left alone. Each array's header, the size that the archive declares
    and the cap must agree before anything is allocated. Sparse and masked arrays are refused.
    """
    with open_regular(path) as file:
        if size_of(file) == 0:
            raise InputError(f"{path}: the file is empty: no rows.")
        check_fits(path, size_of(file), max_bytes)
        bounded = _Bounded(path, file, _MAX_DIRECTORY)
        try:
            with zipfile.ZipFile(bounded) as archive:
                bounded.limit = size_of(file)
                return _read(path, archive, max_bytes, flatten, options, wide)
        except InputError:
            raise
        except _DAMAGED as error:
            raise InputError(f"{path}: not a usable .npz: {reason(error)}.") from None


def _read(
    path: Path,
    archive: zipfile.ZipFile,
    max_bytes: int | None,
    flatten: bool,
    options: TableOptions,
    wide: bool,
) -> tuple[np.ndarray, np.ndarray | None, tuple[int, ...] | None, tuple[str, ...] | None, str]:
    members = _members(path, archive)
    _refuse_other_forms(path, members)
    label = _label(path, members, options)
    info = members[_choose(path, members, label, options)]
    with archive.open(info) as file:
        header = read_header(path, file, info.file_size)
        names = _names(path, archive, members, header.shape)
        features, feature_shape = read_matrix(
            path,
            file,
            header,
            max_bytes,
            flatten,
            wide=wide,
            missing=options.missing != "refuse",
            names=names,
        )
        file.read(1)  # at the end zipfile compares the checksum
    words = f"samples {info.filename[:40]!r}, " + (
        "no labels" if label is None else f"labels {label[:40]!r}"
    )
    if names is not None:
        columns = choose_columns(path, names, replace(options, label_column=None))
        features, names = features[:, columns.features], columns.names
        words = f"{words}; {columns.words}"
    if label is None:
        return features, None, feature_shape, names, words
    labels = _array(path, archive, members[label], max_bytes, features.nbytes)
    if labels.ndim == 2 and labels.shape[1] > 1 and label != options.label_column:
        warnings.warn(
            f"{path}: {label[:40]!r} has shape {labels.shape}, not one label per row; left out.",
            stacklevel=2,
        )
        return features, None, feature_shape, names, words
    if labels.shape[:1] != (len(features),) or labels.size != len(features):
        raise InputError(
            f"{path}: expected one label per row, shape ({len(features)},), "
            f"{label!r} has shape {labels.shape}."
        )
    return features, labels.reshape(-1), feature_shape, names, words


def _array(
    path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, max_bytes: int | None, held: int
) -> np.ndarray:
    """Read an array of labels or names."""
    with archive.open(info) as file:
        header = read_header(path, file, info.file_size, text=True)
        check_fits(path, held + header.num_bytes, max_bytes)
        values = read_array(path, file, header)
        file.read(1)
    return values


def _names(
    path: Path,
    archive: zipfile.ZipFile,
    members: dict[str, zipfile.ZipInfo],
    shape: tuple[int, ...],
) -> tuple[str, ...] | None:
    for member in _NAME_LISTS:
        if member not in members:
            continue
        if members[member].file_size > _MAX_NAMES:
            raise InputError(f"{path}: {member!r} takes more than {_MAX_NAMES} bytes.")
        names = _array(path, archive, members[member], None, 0)
        if names.dtype.kind != "U" or names.shape != shape[1:]:
            raise InputError(
                f"{path}: {member!r} must hold one name per feature, as text; it has shape "
                f"{names.shape} and dtype {printable(names.dtype)[:40]}."
            )
        return tuple(map(str, names))
    return None


def _refuse_other_forms(path: Path, members: dict[str, zipfile.ZipInfo]) -> None:
    for signs, form in _OTHER_FORMS:
        if signs <= set(members):
            how = "with NaN where the mask is set" if "mask" in signs else "dense"
            raise InputError(
                f"{path}: holds {form}, by its arrays {_shown(sorted(members))}. Save it {how}."
            )


def _label(path: Path, members: dict[str, zipfile.ZipInfo], options: TableOptions) -> str | None:
    asked, array = options.label_column, options.array
    if asked is not None and (asked in members or asked not in options.optional):
        if asked not in members:
            raise InputError(f"{path}: {unknown_name('array', asked, list(members)[:50])}")
        return asked
    found = next((name for name in LABEL_NAMES if name in members), None)
    if found is None and (alike := [name for name in label_like(list(members)) if name != array]):
        warnings.warn(
            f"{path}: array {_shown(alike)} looks like labels and is left alone. If it holds them, "
            "use `label_column`.",
            stacklevel=2,
        )
    return found


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    if len(infos) > _MAX_MEMBERS:
        raise InputError(f"{path}: {len(infos)} arrays in one .npz, at most {_MAX_MEMBERS}.")
    members = {info.filename.removesuffix(".npy"): info for info in infos}
    if len(members) != len(infos):
        raise InputError(f"{path}: two arrays share one name.")
    for name, info in members.items():
        if info.flag_bits & 1:
            raise InputError(f"{path}: {name[:40]!r} is encrypted.")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(f"{path}: {name[:40]!r} is packed by a method NumPy does not write.")
    return members


def _choose(
    path: Path, members: dict[str, zipfile.ZipInfo], label: str | None, options: TableOptions
) -> str:
    asked = options.array
    if asked is not None and (asked in members or asked not in options.optional):
        if asked not in members:
            raise InputError(f"{path}: {unknown_name('array', asked, list(members)[:50])}")
        return asked
    candidates = [
        name for name in members if name not in (*LABEL_NAMES, *_NAME_LISTS) and name != label
    ]
    named = [name for name in FEATURE_NAMES if name in candidates]
    if len(named or candidates) == 1:
        return (named or candidates)[0]
    if not candidates:
        raise InputError(f"{path}: no rows: the archive holds no array of samples.")
    raise InputError(
        f"{path}: which array holds the samples? It has {_shown(named or candidates)}. "
        "Name it with `array`."
    )


def _shown(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:40]) for name in names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
