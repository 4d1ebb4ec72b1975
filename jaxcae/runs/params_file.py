"""Parameters as safetensors, with the digest of each in the header."""

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcae.errors import CheckpointError, InputError, printable
from jaxcae.files import (
    MAX_JSON_BYTES,
    open_regular,
    parse_json,
    read_bytes,
    seal,
    unseal,
    write_atomic,
)
from jaxcae.runs.leaves import (
    check_digests,
    check_layout,
    damaged,
    describe,
    is_key,
    leaf_names,
    to_host,
)
from jaxcae.types import Params

FORMAT = 1
# safetensors' own reader for NumPy knows none of the types that NumPy has from ml_dtypes.
_DTYPES = {
    "BOOL": np.dtype(bool),
    **{
        f"{kind}{bits}": np.dtype(f"{kind.lower()}{bits // 8}")
        for kind in "IU"
        for bits in (8, 16, 32, 64)
    },
    **{f"F{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    "C64": np.dtype("c8"),
    "BF16": np.dtype(jax.numpy.bfloat16),
    "F8_E4M3": np.dtype(jax.numpy.float8_e4m3fn),
    "F8_E5M2": np.dtype(jax.numpy.float8_e5m2),
}


def save_params(path: Path, params: Params, record: Mapping[str, Any]) -> None:
    """Write parameters as safetensors, atomically, with the digest of each in the header.

    Tensors are named by their path, `encoder.layer_0.kernel`; kernels are (in, out).

    Raises:
        InputError: If two tensors have one name, or one is no array, or of a dtype that safetensors
            has not.
    """
    import safetensors.numpy

    tensors = to_host(params, separator=".")
    for name, leaf in zip(tensors, jax.tree.leaves(params), strict=True):
        if is_key(leaf):
            raise InputError(
                f"{printable(name)}: is a key, which no reader of safetensors would take for one. "
                "Save its jax.random.key_data."
            )
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES.values():
            raise InputError(
                f"{printable(name)}: safetensors cannot hold {tensor.dtype}; expected one of "
                f"{', '.join(map(str, _DTYPES.values()))}. Cast it first."
            )
    sealed = seal({**record, "format": FORMAT, "leaves": describe(tensors)})
    # One entry: safetensors writes several in an order that changes from one call to the next.
    write_atomic(path, safetensors.numpy.save(tensors, {"jaxcae": sealed}))


def params_record(path: Path) -> dict[str, Any]:
    """Read what a file of parameters says of itself, verified; of the file no more than its header.

    Raises:
        CheckpointError: If it is damaged or of another kind.
    """
    try:
        record = unseal(_metadata(path), str(path))
    except InputError as error:
        raise CheckpointError(str(error)) from error
    if record.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected format {FORMAT}, got {record.get('format')!r}.")
    return record


def is_params_file(path: Path) -> bool:
    """Tell whether this library wrote a file, damaged since or not."""
    return b'"sha256"' in _metadata(path).encode()


def _metadata(path: Path) -> str:
    with os.fdopen(open_regular(path), "rb") as file:
        size, prefix = os.fstat(file.fileno()).st_size, file.read(8)
        if len(prefix) < 8:
            raise InputError(f"{path}: {size} bytes are too few for a safetensors file.")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(size - 8, MAX_JSON_BYTES):
            raise InputError(f"{path}: its header claims {length:,} bytes; it was cut short.")
        header = parse_json(file.read(length), str(path))
    try:
        metadata = header["__metadata__"]["jaxcae"]
    except (KeyError, TypeError):
        metadata = None
    if not isinstance(metadata, str):
        raise InputError(f"{path}: not a file of parameters by jaxcae.")
    return metadata


def read_params_record(path: Path, max_bytes: int = 2**40) -> tuple[dict[str, Any], bytes]:
    """Read a file of parameters as `(record, all bytes)`, with the record verified.

    Raises:
        CheckpointError: If it is damaged, of another kind, or of more than `max_bytes`.
    """
    record = params_record(path)
    try:
        return record, read_bytes(path, max_bytes)
    except InputError as error:
        raise CheckpointError(str(error)) from error


def tensors_of(data: bytes) -> dict[str, np.ndarray]:
    """Read the tensors in the bytes of a safetensors file, those of 16 and 8 bits included.

    Raises:
        Exception: Of whatever kind, if they are damaged.
    """
    import safetensors

    return {
        name: np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in safetensors.deserialize(data)
    }


def load_params(path: Path, like: Params) -> tuple[Params, dict[str, Any]]:
    """Load parameters and verify every one.

    Args:
        path: A file by `save_params`.
        like: A pytree of arrays or `jax.ShapeDtypeStruct` of the same structure.

    Returns:
        `(params, record)`; of NumPy where JAX would not keep the dtype (float64 without x64).

    Raises:
        CheckpointError: If names, shapes, dtypes or values are not those that were saved.
    """
    expected = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))
    record, data = read_params_record(path, expected + MAX_JSON_BYTES + 8)
    check_layout(record["leaves"], like, str(path), separator=".")
    try:
        tensors = tensors_of(data)
    except Exception as error:
        raise CheckpointError(damaged(path, error)) from error
    check_digests(record["leaves"], tensors, str(path))
    leaves = [_of_its_dtype(tensors[name]) for name in leaf_names(like, separator=".")]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), record


def _of_its_dtype(tensor: np.ndarray) -> Any:
    """Return a tensor as an array of JAX if that keeps its dtype, else as it is."""
    # Without x64 JAX would halve the digits of float64, and the range of int64, without a word.
    kept = jax.dtypes.canonicalize_dtype(tensor.dtype) == tensor.dtype
    return jax.numpy.asarray(tensor) if kept else tensor
