"""The files of a checkpoint, each with its size and digest: which of them is damaged, if one is."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxcae.errors import CheckpointError, InputError
from jaxcae.files import MAX_JSON_BYTES, read_bytes, read_json, sha256_of_file, write_json

MANIFEST = "manifest.json"
METADATA = "_CHECKPOINT_METADATA"
DEBRIS = ".orbax-checkpoint-tmp"


def write_manifest(directory: Path) -> None:
    """Write down the size and digest of every file of a checkpoint, beside them."""
    files = {
        str(path.relative_to(directory)): [path.stat().st_size, sha256_of_file(path)]
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    write_json(directory / MANIFEST, files)


def check_tree(directory: Path) -> None:
    """See that there are files and folders below, and nothing else: no link, pipe or device.

    Raises:
        CheckpointError: With the first that is one.
    """
    if directory.is_symlink():
        raise CheckpointError(f"{directory}: is a symbolic link, which is not followed here.")
    if not directory.is_dir():
        return
    for path in sorted(directory.iterdir()):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            raise CheckpointError(f"{path}: is a symbolic link, which is not followed here.")
        if stat.S_ISDIR(mode):
            check_tree(path)
        elif not stat.S_ISREG(mode):
            raise CheckpointError(f"{path}: not a regular file.")


def is_ours(step: Path) -> bool:
    """Tell whether a folder is a checkpoint by this library, or what is left of a save.

    Damage does not make it another's: its metadata speak of our record, and no file has been added
    to those in its manifest.
    """
    if DEBRIS in step.name:
        return step.name.partition(DEBRIS)[0].isdecimal()
    files = {str(path.relative_to(step)) for path in step.rglob("*") if path.is_file()}
    try:
        metadata = read_bytes(step / METADATA, MAX_JSON_BYTES)
        manifest = _read_manifest(step)
    except InputError:
        return False
    added = files - set(manifest) - {MANIFEST} if manifest else ()
    return b"custom_metadata" in metadata and b"leaves" in metadata and not added


def _read_manifest(directory: Path) -> dict[str, Any]:
    """Read the files and digests of a checkpoint; none if the process died before they were."""
    path = directory / MANIFEST
    if not path.exists():
        return {}
    manifest = read_json(path)
    if not isinstance(manifest, dict):
        raise InputError(f"{path}: expected a table of files.")
    return manifest


def check_manifest(directory: Path) -> None:
    """Compare every file of a checkpoint with its digest.

    Raises:
        InputError: With the first that is missing or differs.
        CheckpointError: If one is no regular file.
    """
    check_tree(directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: there is no such checkpoint.")
    path = directory / MANIFEST
    for name, entry in _read_manifest(directory).items():
        file = directory / name
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise InputError(f"{path}: {name!r} leads out of the checkpoint.")
        if not file.is_file():
            raise InputError(f"{file}: missing.")
        if not isinstance(entry, Sequence) or len(entry) != 2:
            raise InputError(f"{path}: the entry of {name} is damaged.")
        if file.stat().st_size != entry[0]:
            raise InputError(f"{file}: {file.stat().st_size} bytes, expected {entry[0]}.")
        if sha256_of_file(file) != entry[1]:
            raise InputError(f"{file}: differs from its digest; the file is damaged.")
