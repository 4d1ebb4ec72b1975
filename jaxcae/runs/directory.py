"""The directory of a run: locked while in use, never overwritten unasked, whole after any crash.

config.json          what the run is (`Config`)
env.json             versions and device
metrics.jsonl        one line per step and per epoch
checkpoints/         by step, each verified on load
params.safetensors   the trained parameters; those of the plain network in plain.safetensors
detector.safetensors    of a detector: its arguments, calibration and training samples
pretrained.safetensors  where the run began, if layers were trained one by one before
plots/               pictures
report.json          the figures that `jaxcae train` ends with
run.lock             held by the process at work; the lock dies with it
"""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from jaxcae.errors import RunError
from jaxcae.files import NO_SPACE, dump_json, open_regular, sync_directory, write_json
from jaxcae.runs import entries
from jaxcae.runs.checkpoints import Checkpoints, check_free_space
from jaxcae.runs.config import Config
from jaxcae.runs.entries import CONFIG
from jaxcae.runs.environment import environment
from jaxcae.runs.lock import LOCK, take_lock
from jaxcae.runs.log import METRICS, LogMark, check_log

_FIRST_NEED = 4 * 2**20


class RunDirectory:
    """The directory of one run, held by this process until `close`.

    Make one with `create` for a new run or `open` for an existing one.
    """

    def __init__(self, path: Path, lock: IO[str]):
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints")
        self._lock = lock
        self._log: IO[bytes] | None = None
        self._log_digest = hashlib.sha256()
        self._log_size = 0

    @classmethod
    def create(cls, path: str | Path, *, overwrite: bool = False) -> "RunDirectory":
        """Take a directory for a new run, and see that it can be written to.

        Nothing in it is touched before `start`.

        Raises:
            RunError: If it holds a run and `overwrite` is not set, holds something else, is in
                use, or cannot be written to.
            OSError: If the disk is full.
        """
        path = Path(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{path}: cannot be made: {error.strerror}.") from None
        entries.check(path)
        # Before the lock, which is a file of its own: into another's folder nothing is written. Of
        # a run at work no more than its configuration is looked at.
        if other := entries.foreign(path, locked=False):
            raise entries.not_ours(path, other)
        run = cls(path, take_lock(path))
        try:
            if entries.is_run(path):
                if other := entries.foreign(path):
                    raise entries.not_ours(path, other)
                if not overwrite:
                    raise RunError(
                        f"{path}: holds a run already. Use `resume=True` to go on with it, "
                        "`overwrite=True` to replace it, or another `run_dir`."
                    )
            run._probe()
        except BaseException:
            run.discard()
            raise
        return run

    @classmethod
    def open(cls, path: str | Path) -> "RunDirectory":
        """Take the directory of an existing run, to go on with it.

        Raises:
            RunError: If there is no run, or it is in use, or cannot be written to.
            OSError: If the disk is full.
        """
        path = Path(path)
        entries.read_config(path)
        run = cls(path, take_lock(path))
        try:
            run._probe()
            entries.remove_debris(path)
        except BaseException:
            run.close()
            raise
        return run

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the directory."""
        if self._log is not None:
            self._log.close()
            self._log = None
        self._lock.close()

    def discard(self) -> None:
        """Close, and remove the directory if it holds nothing but the lock."""
        if not entries.is_run(self.path):
            # The lock is still held: nobody else can be about to start here.
            with contextlib.suppress(OSError):
                (self.path / LOCK).unlink()
                self.path.rmdir()
        self.close()

    def start(self, config: Config) -> None:
        """Begin a new run: clear an old one, write config.json and env.json, open the log.

        A crash in between leaves a run without checkpoints, the old one or the new, that can be
        resumed from its beginning.
        """
        entries.clear(self.path)
        self.write_json(CONFIG, config.to_json())
        self.write_json("env.json", environment())
        self._open_log()

    @property
    def config(self) -> Config:
        """The configuration that is stored."""
        return entries.read_config(self.path)

    @property
    def plots(self) -> Path:
        """Where pictures go."""
        return self.path / "plots"

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file of this name atomically."""
        write_json(self.path / name, value)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line to the metrics log, once `start` or `cut_log` has opened it.

        It is on the disk after the next `log_mark`.
        """
        assert self._log is not None, "start or cut_log comes first"
        line = dump_json(record).encode() + b"\n"
        self._log.write(line)
        self._log_digest.update(line)
        self._log_size += len(line)

    def flush_log(self) -> None:
        """Let others see what has been logged."""
        if self._log is not None:
            self._log.flush()

    def log_mark(self) -> LogMark:
        """Bring the log to the disk, and mark how far it goes."""
        assert self._log is not None, "start or cut_log comes first"
        self._log.flush()
        os.fsync(self._log.fileno())
        return LogMark(self._log_size, self._log_digest.hexdigest())

    def cut_log(self, mark: LogMark) -> None:
        """Cut the log to what a checkpoint had seen, so that every step is logged once.

        Raises:
            CheckpointError: If the log is not the one that the checkpoint was saved with.
        """
        self._log_digest, self._log_size = check_log(self.path, mark), mark.size
        self._open_log(keep=True)

    def _open_log(self, keep: bool = False) -> None:
        """Open the log behind what has been marked of it, or an empty one."""
        if self._log is not None:
            self._log.close()
        if not keep:
            self._log_digest, self._log_size = hashlib.sha256(), 0
        descriptor = open_regular(self.path / METRICS, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.ftruncate(descriptor, self._log_size)
        self._log = os.fdopen(descriptor, "ab")
        sync_directory(self.path)

    def _probe(self) -> None:
        """See now, and not after an hour, that files can be written here."""
        check_free_space(self.path, _FIRST_NEED)
        probe = self.path / f".probe.{secrets.token_hex(4)}.tmp"
        try:
            with probe.open("xb") as file:
                file.write(b"probe")
                os.fsync(file.fileno())
            probe.unlink()
        except OSError as error:
            if error.errno in NO_SPACE:
                raise
            raise RunError(
                f"{self.path}: cannot be written to: {error.strerror}. Use another `run_dir`."
            ) from None
