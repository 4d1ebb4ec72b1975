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
import logging
import shutil
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcae.devices.processes import are_many, fail_fast, first_does, is_first
from jaxcae.errors import CheckpointError, InputError
from jaxcae.files import (
    read_json,
    seal,
    unseal,
)
from jaxcae.runs.leaves import (
    check_digests,
    check_layout,
    damaged,
    describe,
    first_line,
    to_host,
)
from jaxcae.runs.manifest import (
    DEBRIS,
    MANIFEST,
    METADATA,
    check_manifest,
    check_tree,
    write_manifest,
)
from jaxcae.runs.pieces import pieces

FORMAT = 1
_WRITER_SECONDS = 10.0
_ROOM = 2**26
"""Bytes that a checkpoint may have beside four times its arrays: metadata, and parts of a page."""


class Checkpoints:
    """The checkpoints of one run, in a directory of their own.

    Args:
        directory: Where they are; made by the first save. One run at a time may save; where many
            processes are one run, all of them save and load together, in a directory that all see.
        keep: How many of the newest to keep.
    """

    def __init__(self, directory: Path, keep: int = 3):
        self.directory, self._keep = directory.absolute(), keep

    def __enter__(self) -> "Checkpoints":
        return self  # nothing is held open between saves, as it was in earlier versions

    def __exit__(self, *exception: object) -> None:
        pass

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
        described = describe(host)
        for name, leaf in host.items():
            if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
                # Orbax would save it, and then fail to restore it.
                raise CheckpointError(
                    f"step {step}: {name} is {leaf.dtype}, which JAX would not give back as it is. "
                    "Make it a jax.Array."
                )
            # Only parameters: an optimizer may well hold an infinity, such as a best loss so far.
            if name.startswith("params") and not all(map(_is_finite, pieces(leaf))):
                raise CheckpointError(
                    f"step {step}: {name} is not finite, so it was not saved. The last good "
                    "checkpoint is kept."
                )
        from orbax.checkpoint import v1 as ocp

        sealed = seal({**record, "format": FORMAT, "step": step, "leaves": described})
        others = set(threading.enumerate())
        try:
            first_does(lambda: self._prepare(sum(leaf.nbytes for leaf in host.values())))
            with _quiet():
                ocp.save_checkpointables(
                    self.directory / str(step),
                    {"state": state},
                    overwrite=True,
                    custom_metadata={"record": sealed},
                )
            first_does(lambda: write_manifest(self.directory / str(step)))
        except Exception as error:
            with _quiet():
                _join_writers(others)
            if is_first():
                self._clean_up(step)
            raise CheckpointError(
                f"{self.directory}: step {step} could not be saved: {first_line(error)}. "
                "Older checkpoints are kept."
            ) from error
        first_does(lambda: self.remove(*self.steps()[: -self._keep]))

    def read_record(self, step: int) -> dict[str, Any]:
        """Return the record of a checkpoint without loading its arrays.

        Of many processes, process 0 reads it and verifies all files.

        Raises:
            CheckpointError: If it is damaged.
        """
        record: dict[str, Any] = first_does(lambda: self._read_record(step), CheckpointError)
        return record

    def _read_record(self, step: int) -> dict[str, Any]:
        directory = self.directory / str(step)
        try:
            check_manifest(directory)
            metadata = read_json(directory / METADATA)
            sealed = metadata["custom_metadata"]["record"]
            record = unseal(sealed, str(directory / METADATA))
        except (InputError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(damaged(directory, error)) from error
        if record.get("format") != FORMAT or record.get("step") != step:
            raise CheckpointError(
                f"{directory}: expected format {FORMAT} and step {step}, its record says format "
                f"{record.get('format')} and step {record.get('step')}."
            )
        return record

    def load(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Load a checkpoint and verify every leaf.

        However many processes and devices have saved it, it is laid out as `like` is.

        Args:
            step: Which one.
            like: A pytree of arrays or `jax.ShapeDtypeStruct` of the same structure.

        Returns:
            `(state, record)`.

        Raises:
            CheckpointError: If anything at all differs from what was saved.
        """
        directory = self.directory / str(step)
        first_does(lambda: _check_size(directory, like), CheckpointError)
        record = self.read_record(step)
        check_layout(record["leaves"], like, str(directory))
        from orbax.checkpoint import v1 as ocp

        with _quiet():
            state, problem = None, ""
            try:
                state = ocp.load_checkpointables(directory, {"state": _abstract(like)})["state"]
            except Exception as error:  # of many types, as it happens
                problem = damaged(directory, error)
            if problem:
                if are_many():  # the others may wait for this one inside Orbax
                    fail_fast(problem)
                gc.collect()  # what Orbax left half done complains when it is collected: here, then
                raise CheckpointError(problem)
        check_digests(record["leaves"], to_host(state), str(directory), together=True)
        return state, record

    def remove(self, *steps: int) -> None:
        """Remove checkpoints, such as those that do not verify."""
        for step in steps:
            shutil.rmtree(self.directory / str(step))

    def _prepare(self, num_bytes: int) -> None:
        """See that a checkpoint can be written."""
        self.directory.mkdir(parents=True, exist_ok=True)
        check_tree(self.directory)
        self._remove_debris()
        check_free_space(self.directory, num_bytes)

    def _clean_up(self, step: int) -> None:
        """Remove what a failed save left."""
        with contextlib.suppress(OSError, CheckpointError):
            self._remove_debris()
            # Committed, but without a manifest for lack of space: sound, and yet not promised.
            if not (self.directory / str(step) / MANIFEST).exists():
                self.remove(step)

    def _remove_debris(self) -> None:
        """Remove what killed saves left."""
        for path in list(self.directory.iterdir()):
            if DEBRIS in path.name and path.name.partition(DEBRIS)[0].isdecimal():
                shutil.rmtree(path)


def checkpoint_steps(directory: Path) -> list[int]:
    """List the steps of the committed checkpoints in a directory, in ascending order."""
    if not directory.is_dir():
        return []
    return sorted(
        int(path.name)
        for path in directory.iterdir()
        if path.name.isdecimal() and path.is_dir() and not path.is_symlink()
    )


def check_free_space(directory: Path, num_bytes: int) -> None:
    """Raise OSError unless a file system has room for so many bytes, and a little more."""
    free, needed = shutil.disk_usage(directory).free, int(1.1 * num_bytes) + 2**18
    if free < needed:
        raise OSError(f"{free:,} bytes are free where {needed:,} are needed")


def _check_size(directory: Path, like: Any) -> None:
    """See that a checkpoint is no larger than such a state can make it, before it is read."""
    check_tree(directory)
    found = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    expected = 4 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))
    if found > expected + _ROOM:
        raise CheckpointError(
            f"{directory}: {found:,} bytes, expected at most {expected + _ROOM:,}; not read."
        )


def _abstract(like: Any) -> Any:
    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None)
        sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(abstract, like)


def _is_finite(leaf: np.ndarray) -> bool:
    if not jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact):
        return True
    return bool(np.isfinite(leaf.astype(np.float64) if leaf.itemsize < 4 else leaf).all())


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
