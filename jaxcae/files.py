"""Files that are whole or absent: atomic writes, strict reading, digests."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxcae.errors import InputError

MAX_JSON_BYTES = 16 * 2**20
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BLOCK = 2**20


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part.

    The bytes go to a temporary file in the same directory, are synced, and take the name by a
    rename, which follows no link; then the directory is synced. On failure the temporary file is
    removed.
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    # O_EXCL makes the file or fails, whatever stands there; the umask is the kernel's to add.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames within a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path, flags: int = os.O_RDONLY, mode: int = 0o666) -> int:
    """Open a regular file and return its descriptor; nothing else is opened, and nothing blocks.

    Args:
        path: Which file; the last part of its name may be no symbolic link.
        flags: As of `os.open`. Where they ask for writing, the file may have no second name (a
            hard link), by which another file would be changed.
        mode: Of a file that is made.

    Raises:
        InputError: If it is missing, or something else.
    """
    try:
        # A pipe opened without O_NONBLOCK would wait for somebody to write into it.
        extra = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        descriptor = os.open(path, flags | extra, mode)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        verb = "written to" if flags & (os.O_WRONLY | os.O_RDWR) else "read"
        link = "is a symbolic link, which is not followed here" if path.is_symlink() else None
        kind = "not a regular file" if error.errno == errno.ENXIO else None  # a pipe, a socket
        raise InputError(
            f"{path}: {link or kind or f'cannot be {verb}: {error.strerror}'}."
        ) from None
    status = os.fstat(descriptor)
    problem = "" if stat.S_ISREG(status.st_mode) else "not a regular file"
    if not problem and flags & (os.O_WRONLY | os.O_RDWR) and status.st_nlink > 1:
        problem = "has a second name (a hard link), by which another file would be changed; copy it"
    if problem:
        os.close(descriptor)
        raise InputError(f"{path}: {problem}.")
    return descriptor


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Read a regular file of at most `max_bytes`; see `open_regular`.

    Raises:
        InputError: If it is missing, not a regular file, or too large.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise InputError(f"{path}: {size:,} bytes, expected at most {max_bytes:,}; not read.")
        return file.read(size)


def dump_json(value: Any) -> str:
    """Write JSON with sorted keys and no NaN; floats keep every bit."""
    return json.dumps(value, allow_nan=False, sort_keys=True, ensure_ascii=False)


def parse_json(text: str | bytes, source: str) -> Any:
    """Parse JSON strictly: UTF-8, no NaN or Infinity, no duplicate keys, no deep nesting.

    Args:
        text: What to parse.
        source: The name to put in front of an error.

    Raises:
        InputError: If it is anything else.
    """
    try:
        return json.loads(
            text, parse_constant=_refuse_constant, object_pairs_hook=_unique, parse_float=_finite
        )
    except RecursionError:
        raise InputError(f"{source}: nested too deeply for a file of ours.") from None
    except ValueError as error:  # of which JSONDecodeError and UnicodeDecodeError are kinds
        raise InputError(f"{source}: not valid JSON: {error}.") from None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, in a form for people."""
    text = json.dumps(value, allow_nan=False, indent=2, ensure_ascii=False)
    write_atomic(path, text.encode() + b"\n")


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file strictly; see `parse_json` and `read_bytes`."""
    return parse_json(read_bytes(path, max_bytes), str(path))


def sha256(data: bytes) -> str:
    """Return the SHA-256 of bytes in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, reading a block at a time."""
    digest = hashlib.sha256()
    with os.fdopen(open_regular(path), "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def seal(record: Mapping[str, Any]) -> str:
    """Write a record as JSON that carries the digest of itself."""
    return dump_json({**record, "sha256": sha256(dump_json(dict(record)).encode())})


def unseal(text: str | bytes, source: str) -> dict[str, Any]:
    """Read what `seal` wrote.

    Raises:
        InputError: If it was changed since.
    """
    record = parse_json(text, source)
    if not isinstance(record, dict) or "sha256" not in record:
        raise InputError(f"{source}: holds no digest of itself.")
    expected = record.pop("sha256")
    if sha256(dump_json(record).encode()) != expected:
        raise InputError(f"{source}: does not match its digest; it was damaged or edited.")
    return record


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is too large")
    return value


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} comes twice")
        result[key] = value
    return result
