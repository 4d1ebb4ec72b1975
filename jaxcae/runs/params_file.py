"""Parameters as safetensors, with the digest of each in the header."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxcae.errors import InputError
from jaxcae.files import MAX_JSON_BYTES, parse_json, read_bytes, seal, unseal, write_atomic
from jaxcae.runs.leaves import (
    CheckpointError,
    check_digests,
    check_layout,
    damaged,
    describe,
    leaf_names,
    to_host,
)
from jaxcae.types import Params

FORMAT = 1


def save_params(path: Path, params: Params, record: Mapping[str, Any]) -> None:
    """Write parameters as safetensors, atomically, with the digest of each in the header.

    Tensors are named by their path, `encoder.layer_0.kernel`; kernels are (in, out).
    """
    import safetensors.numpy

    tensors = to_host(params, separator=".")
    sealed = seal({**record, "format": FORMAT, "leaves": describe(tensors)})
    # One entry: safetensors writes several in an order that changes from one call to the next.
    write_atomic(path, safetensors.numpy.save(tensors, {"jaxcae": sealed}))


def read_params_record(path: Path, max_bytes: int = 2**40) -> tuple[dict[str, Any], bytes]:
    """Read a file of parameters as `(record, all bytes)`, with the record verified.

    Raises:
        CheckpointError: If it is damaged or of another kind.
    """
    try:
        data = read_bytes(path, max_bytes)
        if len(data) < 8:
            raise InputError(f"{path}: {len(data)} bytes are too few for a safetensors file.")
        (length,) = struct.unpack("<Q", data[:8])
        if length > min(len(data) - 8, MAX_JSON_BYTES):
            raise InputError(f"{path}: its header claims {length:,} bytes; it was cut short.")
        header = parse_json(data[8 : 8 + length], str(path))
        record = unseal(header["__metadata__"]["jaxcae"], str(path))
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a file of parameters by jaxcae.") from error
    except InputError as error:
        raise CheckpointError(str(error)) from error
    if record.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected format {FORMAT}, got {record.get('format')!r}.")
    return record, data


def load_params(path: Path, like: Params) -> tuple[Params, dict[str, Any]]:
    """Load parameters and verify every one.

    Args:
        path: A file by `save_params`.
        like: A pytree of arrays or `jax.ShapeDtypeStruct` of the same structure.

    Returns:
        `(params, record)`.

    Raises:
        CheckpointError: If names, shapes, dtypes or values are not those that were saved.
    """
    import safetensors.numpy

    expected = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))
    record, data = read_params_record(path, expected + MAX_JSON_BYTES + 8)
    check_layout(record["leaves"], like, str(path), separator=".")
    try:
        tensors = safetensors.numpy.load(data)
    except Exception as error:
        raise CheckpointError(damaged(path, error)) from error
    check_digests(record["leaves"], tensors, str(path))
    names = leaf_names(like, separator=".")
    leaves = [jax.numpy.asarray(tensors[name]) for name in names]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), record
