"""Checkpoints that are verified or refused: Orbax for the arrays, SHA-256 for every leaf.

Orbax makes a save atomic, but reads flipped bits back without a word. So every checkpoint carries
a sealed record with the digest of each leaf, and beside its files a manifest with the digest of
each of them: the record decides whether the numbers are right, the manifest names the file that is
not. A digest guards against accidents, not against an attacker, who would change both.

Saves are synchronous. One takes about 0.1 s, and an asynchronous save would report a full disk one
save later, when the state that did not fit is gone.
"""

import contextlib
import gc
import hashlib
import logging
import os
import shutil
import struct
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcae.errors import InputError
from jaxcae.files import (
    MAX_JSON_BYTES,
    dump_json,
    parse_json,
    read_bytes,
    read_json,
    seal,
    sha256,
    sha256_of_file,
    unseal,
    write_atomic,
    write_json,
)
from jaxcae.types import Params

FORMAT = 1
_MANIFEST = "manifest.json"
_METADATA = "_CHECKPOINT_METADATA"
_DEBRIS = ".orbax-checkpoint-tmp"
_WRITER_SECONDS = 10.0


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or cannot be trusted."""


class Checkpoints:
    """The checkpoints of one run, in a directory of their own.

    Args:
        directory: Where they are; made by the first save. One process at a time may save.
        keep: How many of the newest to keep.
    """

    def __init__(self, directory: Path, keep: int = 3):
        self.directory, self._keep = directory.absolute(), keep
        self._orbax: Any = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the directory."""
        if self._orbax is not None:
            with _quiet():
                self._orbax.close()
            self._orbax = None

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, in ascending order."""
        return checkpoint_steps(self.directory)

    def save(self, step: int, state: Any, record: Mapping[str, Any]) -> None:
        """Save a state, and return when it is on the disk.

        Args:
            step: The step to file it under.
            state: A pytree of arrays.
            record: Facts to store with it, as JSON allows.

        Raises:
            CheckpointError: If the state is not finite, or does not fit. What was there before
                stays, and no part of the new checkpoint does.
        """
        host = to_host(state)
        for name, leaf in host.items():
            if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
                # Orbax would save it, and then fail to restore it.
                raise CheckpointError(
                    f"step {step}: {name} is {leaf.dtype}, which JAX would not give back as it is. "
                    "Make it a jax.Array."
                )
            # Only parameters: an optimizer may well hold an infinity, such as a best loss so far.
            if name.startswith("params") and not _is_finite(leaf):
                raise CheckpointError(
                    f"step {step}: {name} is not finite, so it was not saved. The last good "
                    "checkpoint is kept."
                )
        sealed = seal({**record, "format": FORMAT, "step": step, "leaves": describe(host)})
        others = set(threading.enumerate())
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            check_free_space(self.directory, sum(leaf.nbytes for leaf in host.values()))
            with _quiet():
                self._writer().save_checkpointables(
                    step, {"state": state}, force=True, custom_metadata={"record": sealed}
                )
            self._write_manifest(step)
        except Exception as error:
            with _quiet():
                _join_writers(others)
            # Orbax would raise this error again at the next call, whatever that is.
            with contextlib.suppress(Exception):
                self.close()
            self._orbax = None
            self._remove_debris(step)
            raise CheckpointError(
                f"{self.directory}: step {step} could not be saved: {_first_line(error)}. "
                "Older checkpoints are kept."
            ) from error

    def read_record(self, step: int) -> dict[str, Any]:
        """Return the record of a checkpoint without loading its arrays.

        Raises:
            CheckpointError: If it is damaged.
        """
        directory = self.directory / str(step)
        try:
            _check_manifest(directory)
            metadata = read_json(directory / _METADATA)
            sealed = metadata["custom_metadata"]["record"]
            record = unseal(sealed, str(directory / _METADATA))
        except (InputError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(_damaged(directory, error)) from error
        if record.get("format") != FORMAT or record.get("step") != step:
            raise CheckpointError(
                f"{directory}: expected format {FORMAT} and step {step}, its record says format "
                f"{record.get('format')} and step {record.get('step')}."
            )
        return record

    def load(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Load a checkpoint and verify every leaf.

        Args:
            step: Which one.
            like: A pytree of arrays or `jax.ShapeDtypeStruct` of the same structure.

        Returns:
            `(state, record)`.

        Raises:
            CheckpointError: If anything at all differs from what was saved.
        """
        directory = self.directory / str(step)
        record = self.read_record(step)
        check_layout(record["leaves"], like, str(directory))
        from orbax.checkpoint import v1 as ocp

        with _quiet():
            state, problem = None, ""
            try:
                state = ocp.load_checkpointables(directory, {"state": _abstract(like)})["state"]
            except Exception as error:  # of many types, as it happens
                problem = _damaged(directory, error)
            if problem:
                gc.collect()  # what Orbax left half done complains when it is collected: here, then
                raise CheckpointError(problem)
        check_digests(record["leaves"], to_host(state), str(directory))
        return state, record

    def remove(self, step: int) -> None:
        """Remove a checkpoint, such as one that does not verify."""
        shutil.rmtree(self.directory / str(step))

    def _writer(self) -> Any:
        """Open the directory for writing, which also clears what a killed save left there."""
        if self._orbax is None:
            from orbax.checkpoint import v1 as ocp

            policies = ocp.training
            self._orbax = policies.Checkpointer(
                self.directory,
                save_decision_policy=policies.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=policies.preservation_policies.LatestN(self._keep),
                cleanup_tmp_directories=True,
            )
        return self._orbax

    def _write_manifest(self, step: int) -> None:
        directory = self.directory / str(step)
        files = {
            str(path.relative_to(directory)): [path.stat().st_size, sha256_of_file(path)]
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        }
        write_json(directory / _MANIFEST, files)

    def _remove_debris(self, step: int) -> None:
        for path in self.directory.glob(f"{step}{_DEBRIS}*"):
            shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            # Committed, but without a manifest for lack of space: sound, and yet not promised.
            if not (self.directory / str(step) / _MANIFEST).exists():
                shutil.rmtree(self.directory / str(step))


def checkpoint_steps(directory: Path) -> list[int]:
    """List the steps of the committed checkpoints in a directory, in ascending order."""
    if not directory.is_dir():
        return []
    return sorted(
        int(path.name)
        for path in directory.iterdir()
        if path.name.isdecimal() and path.is_dir() and not path.is_symlink()
    )


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
        raise CheckpointError(_damaged(path, error)) from error
    check_digests(record["leaves"], tensors, str(path))
    names = leaf_names(like, separator=".")
    leaves = [jax.numpy.asarray(tensors[name]) for name in names]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), record


def leaf_names(tree: Any, separator: str = "/") -> list[str]:
    """Name the leaves of a pytree by their paths, in the order of `jax.tree.leaves`."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator=separator) for path, _ in paths]


def to_host(tree: Any, separator: str = "/") -> dict[str, np.ndarray]:
    """Copy the leaves to the host, by name; typed keys as the data that they hold."""
    arrays = [jax.random.key_data(x) if _is_key(x) else x for x in jax.tree.leaves(tree)]
    host = [np.asarray(x) for x in jax.device_get(arrays)]
    return dict(zip(leaf_names(tree, separator), host, strict=True))


def describe(leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Give `{name: [dtype, shape, digest]}`; the digest covers dtype and shape too."""
    return {
        name: [str(leaf.dtype), list(leaf.shape), _digest(leaf)] for name, leaf in leaves.items()
    }


def digest_of_tree(tree: Any) -> str:
    """Return one SHA-256 for a whole pytree of arrays: names, dtypes, shapes and values."""
    return sha256(dump_json(describe(to_host(tree))).encode())


def check_layout(
    described: Mapping[str, Any], like: Any, source: str, separator: str = "/"
) -> None:
    """Compare names, shapes and dtypes with what is expected, before anything is loaded.

    Raises:
        CheckpointError: With the first difference. (Orbax would cast to another dtype silently.)
    """
    wanted = {}
    for name, leaf in zip(leaf_names(like, separator), jax.tree.leaves(like), strict=True):
        data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        wanted[name] = [str(np.dtype(data.dtype)), list(data.shape)]
    if set(wanted) != set(described):
        odd = sorted(set(wanted) ^ set(described))[0]
        where = "is missing" if odd in wanted else "is not expected"
        raise CheckpointError(f"{source}: {odd} {where}; it belongs to another model.")
    for name, layout in wanted.items():
        if described[name][:2] != layout:
            raise CheckpointError(
                f"{source}: {name} is {_layout(described[name])}, expected {_layout(layout)}."
            )


def check_digests(
    described: Mapping[str, Any], leaves: Mapping[str, np.ndarray], source: str
) -> None:
    """Compare every leaf with its digest.

    Raises:
        CheckpointError: With the names of those that differ.
    """
    found = describe(leaves)
    wrong = [name for name in {**described, **found} if described.get(name) != found.get(name)]
    if wrong:
        raise CheckpointError(
            f"{source}: {', '.join(wrong[:3])}{' and others' if len(wrong) > 3 else ''} "
            "differs from its digest; the file is damaged."
        )


def check_free_space(directory: Path, num_bytes: int) -> None:
    """Raise OSError unless a file system has room for so many bytes, and a little more."""
    free, needed = shutil.disk_usage(directory).free, int(1.1 * num_bytes) + 2**18
    if free < needed:
        raise OSError(f"{free:,} bytes are free where {needed:,} are needed")


def _check_manifest(directory: Path) -> None:
    if not directory.is_dir():
        raise InputError(f"{directory}: there is no such checkpoint.")
    path = directory / _MANIFEST
    if not path.exists():  # the process died between the commit and the manifest
        return
    manifest = read_json(path)
    if not isinstance(manifest, dict):
        raise InputError(f"{path}: expected a table of files.")
    for name, entry in manifest.items():
        file = directory / name
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise InputError(f"{path}: {name!r} leads out of the checkpoint.")
        if not file.is_file() or file.is_symlink():
            raise InputError(f"{file}: missing.")
        if not isinstance(entry, Sequence) or len(entry) != 2:
            raise InputError(f"{path}: the entry of {name} is damaged.")
        if file.stat().st_size != entry[0]:
            raise InputError(f"{file}: {file.stat().st_size} bytes, expected {entry[0]}.")
        if sha256_of_file(file) != entry[1]:
            raise InputError(f"{file}: differs from its digest; the file is damaged.")


def _abstract(like: Any) -> Any:
    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None)
        sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(abstract, like)


def _digest(leaf: np.ndarray) -> str:
    digest = hashlib.sha256(f"{leaf.dtype} {list(leaf.shape)} ".encode())
    # Viewed as bytes: bfloat16 has no buffer of its own.
    digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _is_finite(leaf: np.ndarray) -> bool:
    if not jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact):
        return True
    return bool(np.isfinite(leaf.astype(np.float64) if leaf.itemsize < 4 else leaf).all())


def _is_key(leaf: Any) -> bool:
    return jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _layout(described: Sequence[Any]) -> str:
    return f"{described[0]}{described[1]}"


def _damaged(path: Path, error: Exception) -> str:
    text = _first_line(error)
    return text if str(path) in text else f"{path}: damaged or incomplete: {text}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0].rstrip(".") if lines else ""
    return (
        text
        if isinstance(error, InputError | OSError) and text
        else f"{type(error).__name__} {text}"
    )


def _join_writers(others: set[threading.Thread]) -> None:
    """Wait for the threads of a save that failed: Orbax raises the first error and lets them run.

    Left alone they would write into what is being removed, and log their own errors later.
    """
    for thread in set(threading.enumerate()) - others:
        # The workers of its pools are plain threads, which stay for the next save.
        if type(thread).__module__.startswith("orbax."):
            with contextlib.suppress(Exception):  # its join raises what it stumbled over
                thread.join(_WRITER_SECONDS)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what Orbax and TensorStore say of an error that we report off the screen.

    Orbax logs it, at length; where TensorStore's threads finish a write for which nobody waits any
    more, they find an event loop closed, which Python calls an unraisable error.
    """
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
