"""The directory of a run as processes other than the first see it: to read, and to save states in.

Process 0 holds the lock, and writes everything but the parts of a checkpoint that it has not.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxcae.runs.checkpoints import Checkpoints
from jaxcae.runs.config import Config
from jaxcae.runs.directory import RunDirectory
from jaxcae.runs.log import LogMark


class Follower(RunDirectory):
    """The directory of one run that another process holds."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints")

    def close(self) -> None:
        """Let go of nothing."""

    def discard(self) -> None:
        """Let go of nothing."""

    def start(self, config: Config) -> None:
        """Leave it to process 0."""

    def write_json(self, name: str, value: Any) -> None:
        """Leave it to process 0."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Leave it to process 0."""

    def flush_log(self) -> None:
        """Leave it to process 0."""

    def log_mark(self) -> LogMark:
        """Return a mark that goes nowhere: what process 0 says is stored."""
        return LogMark.empty()

    def cut_log(self, mark: LogMark) -> None:
        """Leave it to process 0."""
