"""The metrics log of a run: lines of JSON, and how far a checkpoint has seen them."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxcae.errors import CheckpointError, InputError
from jaxcae.files import open_regular, parse_json

METRICS = "metrics.jsonl"
_MAX_LINE = 2**20
_BLOCK = 2**20


class LogMark(NamedTuple):
    """How much of the metrics log belongs to a checkpoint."""

    size: int
    sha256: str

    @classmethod
    def empty(cls) -> "LogMark":
        """Mark the beginning of the log."""
        return cls(0, hashlib.sha256().hexdigest())


def check_log(path: Path, mark: LogMark) -> Any:
    """Compare the metrics log of a run with what a checkpoint had seen of it.

    Returns:
        The state of the digest at the mark.

    Raises:
        CheckpointError: If it is not the same.
    """
    file, digest, left = path / METRICS, hashlib.sha256(), mark.size
    with contextlib.suppress(InputError), os.fdopen(open_regular(file), "rb") as lines:
        while left and (block := lines.read(min(left, _BLOCK))):
            digest.update(block)
            left -= len(block)
    if left or digest.hexdigest() != mark.sha256:
        raise CheckpointError(
            f"{file}: its first {mark.size:,} bytes are not those that the checkpoint was saved "
            "with; the log was damaged or edited."
        )
    return digest


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Read the metrics log of a run line by line; a torn last line is left out.

    Raises:
        InputError: If a line is not JSON.
    """
    file = path / METRICS
    with os.fdopen(open_regular(file), "rb") as lines:
        number = 0
        while line := lines.readline(_MAX_LINE):
            number += 1
            if not line.endswith(b"\n"):
                if len(line) < _MAX_LINE:
                    return
                raise InputError(f"{file}, line {number}: too long for a log of ours.")
            yield parse_json(line, f"{file}, line {number}")
