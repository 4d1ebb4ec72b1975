"""The directory of a run: locked while in use, never overwritten unasked, whole after any crash.

config.json          what the run is (`Config`)
env.json             versions and device
metrics.jsonl        one line per step and per epoch
checkpoints/         by step, each verified on load
params.safetensors   the trained parameters; those of the plain network in plain.safetensors
plots/               pictures
report.json          the figures that `jaxcae train` ends with
run.lock             held by the process at work; the lock dies with it
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from jaxcae.errors import InputError
from jaxcae.files import dump_json, read_json, sync_directory, write_atomic, write_json
from jaxcae.runs.checkpoints import Checkpoints, check_free_space
from jaxcae.runs.config import Config
from jaxcae.runs.environment import environment
from jaxcae.runs.log import METRICS, LogMark, check_log

CONFIG, _LOCK = "config.json", "run.lock"
_FILES = (CONFIG, "env.json", METRICS, "report.json", "params.safetensors", "plain.safetensors")
_FIRST_NEED = 4 * 2**20
_MAX_LINE = 2**20
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RunError(InputError):
    """A run directory that cannot be used as asked; says what to do instead."""


class UnfinishedRunError(RunError):
    """A run that has not come to its end, where a finished one is needed."""


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
        run = cls(path, _take_lock(path))
        try:
            if _is_run(path) and not overwrite:
                raise RunError(
                    f"{path}: holds a run already. Use `resume=True` to go on with it, "
                    "`overwrite=True` to replace it, or another `run_dir`."
                )
            foreign = [p.name for p in path.iterdir() if p.name != _LOCK and not _is_debris(p)]
            if foreign and not _is_run(path):
                raise RunError(
                    f"{path}: holds {sorted(foreign)[0]!r} and no run. Use an empty `run_dir`."
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
        _check_run(path)
        run = cls(path, _take_lock(path))
        try:
            run._probe()
            for debris in path.glob(".*.tmp"):
                debris.unlink()
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
        self.checkpoints.close()
        if self._log is not None:
            self._log.close()
            self._log = None
        self._lock.close()

    def discard(self) -> None:
        """Close, and remove the directory if it holds nothing but the lock."""
        if not _is_run(self.path):
            # The lock is still held: nobody else can be about to start here.
            with contextlib.suppress(OSError):
                (self.path / _LOCK).unlink()
                self.path.rmdir()
        self.close()

    def start(self, config: Config) -> None:
        """Begin a new run: clear an old one, write config.json and env.json, open the log.

        A crash in between leaves a run without checkpoints, the old one or the new, that can be
        resumed from its beginning.
        """
        for name in _FILES:
            if name != CONFIG:
                (self.path / name).unlink(missing_ok=True)
        for name in ("checkpoints", "plots", "export"):
            directory = self.path / name
            if directory.is_symlink():
                raise RunError(f"{directory}: is a symbolic link, which is not followed here.")
            if directory.is_dir():
                shutil.rmtree(directory)
        self.write_json(CONFIG, config.to_json())
        self.write_json("env.json", environment())
        self._open_log()

    @property
    def config(self) -> Config:
        """The configuration that is stored."""
        return read_config(self.path)

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
        digest = check_log(self.path, mark)
        path = self.path / METRICS
        if path.is_file():
            os.truncate(path, mark.size)
        self._log_digest, self._log_size = digest, mark.size
        self._open_log(keep=True)

    def _open_log(self, keep: bool = False) -> None:
        if self._log is not None:
            self._log.close()
        if not keep:
            self._log_digest, self._log_size = hashlib.sha256(), 0
        self._log = (self.path / METRICS).open("ab" if keep else "wb")
        sync_directory(self.path)

    def _probe(self) -> None:
        """See now, and not after an hour, that files can be written here."""
        check_free_space(self.path, _FIRST_NEED)
        try:
            probe = self.path / f".probe.{os.getpid()}.tmp"
            write_atomic(probe, b"probe")
            probe.unlink()
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise
            raise _not_writable(self.path, error) from None


def is_in_use(path: Path) -> bool:
    """Tell whether a process holds the lock of a run directory."""
    try:
        with (path / _LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def read_config(path: Path) -> Config:
    """Read the configuration of the run in a directory.

    Raises:
        RunError: If there is no run.
        InputError: If it is not a configuration.
    """
    _check_run(path)
    file = path / CONFIG
    return Config.from_json(read_json(file, _MAX_LINE), str(file))


def _is_run(path: Path) -> bool:
    return (path / CONFIG).exists() or (path / CONFIG).is_symlink()


def _is_debris(path: Path) -> bool:
    return path.name[0] == "." and path.suffix == ".tmp"


def _check_run(path: Path) -> None:
    if not _is_run(path):
        what = "no such directory" if not path.exists() else f"no run here ({CONFIG} is missing)"
        raise RunError(f"{path}: {what}.")


def _take_lock(path: Path) -> IO[str]:
    """Lock a directory for this process, or say who holds it."""
    name = path / _LOCK
    while True:
        try:
            descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise
            raise _not_writable(path, error) from None
        file = os.fdopen(descriptor, "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = file.read(200).strip() or "another process"
            file.close()
            raise RunError(
                f"{path}: in use by {holder}. Wait for it, or use another `run_dir`."
            ) from None
        except OSError as error:
            file.close()
            raise RunError(f"{path}: cannot be locked: {error.strerror}.") from None
        # The holder may have removed the directory between our open and our lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(name), os.fstat(file.fileno())):
                break
        file.close()
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


def _not_writable(path: Path, error: OSError) -> RunError:
    return RunError(f"{path}: cannot be written to: {error.strerror}. Use another `run_dir`.")
