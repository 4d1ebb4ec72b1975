"""`.npz`: one array of samples, perhaps one of labels, out of an archive that may be hostile."""

import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from jaxcae.data.arrays import open_regular, read_array, read_header, read_matrix, reason, size_of
from jaxcae.data.values import check_fits
from jaxcae.errors import InputError

FEATURE_NAMES = ("features", "X", "x", "data")
LABEL_NAMES = ("labels", "y")
_MAX_MEMBERS = 1000

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


def read_npz(
    path: Path, max_bytes: int | None, flatten: bool
) -> tuple[np.ndarray, np.ndarray | None, tuple[int, ...] | None]:
    """Read a `.npz` as `(float32 matrix, labels, feature_shape)`.

    The samples are the array named `features`, `X`, `x` or `data`, or else the only array; labels
    are named `labels` or `y`. Other arrays are left alone. Each array's header, the size that the
    archive declares and the cap must agree before anything is allocated.
    """
    with open_regular(path) as file:
        if size_of(file) == 0:
            raise InputError(f"{path}: the file is empty: no rows.")
        check_fits(path, size_of(file), max_bytes)
        try:
            with zipfile.ZipFile(file) as archive:
                return _read(path, archive, max_bytes, flatten)
        except InputError:
            raise
        except _DAMAGED as error:
            raise InputError(f"{path}: not a usable .npz: {reason(error)}.") from None


def _read(
    path: Path, archive: zipfile.ZipFile, max_bytes: int | None, flatten: bool
) -> tuple[np.ndarray, np.ndarray | None, tuple[int, ...] | None]:
    members = _members(path, archive)
    info = members[_choose(path, members)]
    with archive.open(info) as file:
        header = read_header(path, file, info.file_size)
        features, feature_shape = read_matrix(path, file, header, max_bytes, flatten)
        file.read(1)  # at the end zipfile compares the checksum
    name = next((name for name in LABEL_NAMES if name in members), None)
    if name is None:
        return features, None, feature_shape
    with archive.open(members[name]) as file:
        header = read_header(path, file, members[name].file_size)
        if header.shape != (len(features),):
            raise InputError(
                f"{path}: expected one label per row, shape ({len(features)},), "
                f"got shape {header.shape}."
            )
        check_fits(path, features.nbytes + header.num_bytes, max_bytes)
        labels = read_array(path, file, header)
        file.read(1)
    return features, labels, feature_shape


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


def _choose(path: Path, members: dict[str, zipfile.ZipInfo]) -> str:
    candidates = [name for name in members if name not in LABEL_NAMES]
    for name in FEATURE_NAMES:
        if name in candidates:
            return name
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise InputError(f"{path}: no rows: the archive holds no array of samples.")
    shown = ", ".join(repr(name[:40]) for name in candidates[:8])
    raise InputError(
        f"{path}: which array holds the samples? It has {shown}. Name one of them 'features'."
    )
