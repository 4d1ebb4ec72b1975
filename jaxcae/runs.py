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
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax

from jaxcae.checkpoints import (
    CheckpointError,
    Checkpoints,
    check_free_space,
    checkpoint_steps,
    load_params,
    read_params_record,
)
from jaxcae.config import PLAIN, Config, differences, main_network, make_model
from jaxcae.data.dataset import Standardization
from jaxcae.errors import InputError
from jaxcae.files import dump_json, parse_json, read_json, sync_directory, write_atomic, write_json
from jaxcae.types import Autoencoder, Params

_CONFIG, _LOCK, _METRICS = "config.json", "run.lock", "metrics.jsonl"
_FILES = (_CONFIG, "env.json", _METRICS, "report.json", "params.safetensors", "plain.safetensors")
_FIRST_NEED = 4 * 2**20
_MAX_LINE = 2**20
_BLOCK = 2**20
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RunError(InputError):
    """A run directory that cannot be used as asked; says what to do instead."""


class LogMark(NamedTuple):
    """How much of the metrics log belongs to a checkpoint."""

    size: int
    sha256: str

    @classmethod
    def empty(cls) -> "LogMark":
        """Mark the beginning of the log."""
        return cls(0, hashlib.sha256().hexdigest())


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
                    f"{path}: holds a run already. Use --resume to go on with it, --overwrite to "
                    "replace it, or another --run-dir."
                )
            foreign = [p.name for p in path.iterdir() if p.name != _LOCK and not _is_debris(p)]
            if foreign and not _is_run(path):
                raise RunError(
                    f"{path}: holds {sorted(foreign)[0]!r} and no run. Use an empty --run-dir."
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
            if name != _CONFIG:
                (self.path / name).unlink(missing_ok=True)
        for name in ("checkpoints", "plots", "export"):
            directory = self.path / name
            if directory.is_symlink():
                raise RunError(f"{directory}: is a symbolic link, which is not followed here.")
            if directory.is_dir():
                shutil.rmtree(directory)
        self.write_json(_CONFIG, config.to_json())
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
        path = self.path / _METRICS
        if path.is_file():
            os.truncate(path, mark.size)
        self._log_digest, self._log_size = digest, mark.size
        self._open_log(keep=True)

    def _open_log(self, keep: bool = False) -> None:
        if self._log is not None:
            self._log.close()
        if not keep:
            self._log_digest, self._log_size = hashlib.sha256(), 0
        self._log = (self.path / _METRICS).open("ab" if keep else "wb")
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


def params_path(path: Path, config: Config, network: str) -> Path:
    """Name the file for the parameters of one of the networks of a run."""
    return path / f"{'params' if network == main_network(config) else PLAIN}.safetensors"


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


def check_log(path: Path, mark: LogMark) -> Any:
    """Compare the metrics log of a run with what a checkpoint had seen of it.

    Returns:
        The state of the digest at the mark.

    Raises:
        CheckpointError: If it is not the same.
    """
    file, digest, left = path / _METRICS, hashlib.sha256(), mark.size
    if file.is_file() and not file.is_symlink():
        with file.open("rb") as lines:
            while left and (block := lines.read(min(left, _BLOCK))):
                digest.update(block)
                left -= len(block)
    if left or digest.hexdigest() != mark.sha256:
        raise CheckpointError(
            f"{file}: its first {mark.size:,} bytes are not those that the checkpoint was saved "
            "with; the log was damaged or edited."
        )
    return digest


def check_params(file: Path, like: Params, config: Config) -> tuple[Params, dict[str, Any]]:
    """Load parameters as `(params, record)`, verified, and of this configuration.

    Raises:
        CheckpointError: If they are damaged, or another configuration's.
    """
    stored = read_params_record(file)[0].get("config")
    try:
        different = differences(Config.from_json(stored, str(file)), config)
    except InputError as error:
        raise CheckpointError(str(error)) from None
    if different:
        raise CheckpointError(
            f"{file}: belongs to another configuration than {_CONFIG}: {'; '.join(different)}."
        )
    return load_params(file, like)


def read_config(path: Path) -> Config:
    """Read the configuration of the run in a directory.

    Raises:
        RunError: If there is no run.
        InputError: If it is not a configuration.
    """
    _check_run(path)
    file = path / _CONFIG
    return Config.from_json(read_json(file, _MAX_LINE), str(file))


class Run(NamedTuple):
    """A finished run, verified.

    Attributes:
        config: What it is.
        model: Its autoencoder.
        params: The parameters of its main network, the contractive one unless λ is 0.
        plain: Those of the network without the penalty, if there are two.
        standardization: What was applied to the features, if anything; new data needs the same.
        record: What the file of parameters says of itself.
    """

    config: Config
    model: Autoencoder
    params: Params
    plain: Params | None
    standardization: Standardization | None
    record: Mapping[str, Any]

    def params_of(self, network: str | None) -> Params:
        """Return the parameters of one of the networks by name; None is the main one.

        Raises:
            InputError: If the run has no such network.
        """
        if network is None or network == main_network(self.config):
            return self.params
        if network == PLAIN and self.plain is not None:
            return self.plain
        raise InputError(
            f"--network: the run has {' and '.join(self.config.networks)}, got {network!r}."
        )


def open_run(path: str | Path) -> Run:
    """Load a finished run, and verify all that is loaded.

    Raises:
        RunError: If there is no run, or it has not finished.
        CheckpointError: If anything is damaged, or the parameters are another configuration's.
    """
    path = Path(path)
    config = read_config(path)
    file = path / "params.safetensors"
    if not file.exists() and not file.is_symlink():
        steps = checkpoint_steps(path / "checkpoints")
        raise RunError(
            f"{path}: has no params.safetensors, so the run has not finished "
            f"({f'its last checkpoint is of step {steps[-1]}' if steps else 'no checkpoint yet'}). "
            f"Finish it with jaxcae train --run-dir {path} --resume."
        )
    if not config.sizes:
        raise RunError(f"{path / _CONFIG}: 'sizes' is empty; it was not written by jaxcae train.")
    model = make_model(config)
    like = jax.eval_shape(model.init, jax.random.key(0))
    params, record = check_params(file, like, config)
    plain = None
    if len(config.networks) > 1:
        plain, _ = check_params(params_path(path, config, PLAIN), like, config)
    values = record.get("standardization")
    standardization = None if values is None else Standardization.from_json(values)
    return Run(config, model, params, plain, standardization, record)


def load_run(path: str | Path) -> tuple[Config, Autoencoder, Params]:
    """Load a finished run as `(config, model, params)`, verified; see `open_run`."""
    run = open_run(path)
    return run.config, run.model, run.params


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Read the metrics log of a run line by line; a torn last line is left out.

    Raises:
        InputError: If a line is not JSON.
    """
    file = path / _METRICS
    if file.is_symlink() or not file.is_file():
        raise InputError(f"{file}: missing, or not a regular file.")
    with file.open("rb") as lines:
        number = 0
        while line := lines.readline(_MAX_LINE):
            number += 1
            if not line.endswith(b"\n"):
                if len(line) < _MAX_LINE:
                    return
                raise InputError(f"{file}, line {number}: too long for a log of ours.")
            yield parse_json(line, f"{file}, line {number}")


def environment() -> dict[str, Any]:
    """Describe what results may depend on beside the configuration: versions and device."""
    versions = {}
    for name in ("jaxcae", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    device = jax.devices()[0]
    return {
        "versions": {"python": platform.python_version(), **versions},
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
        },
        "host": {
            "system": platform.platform(),
            "machine": platform.machine(),
            "threads": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        },
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "matmul_precision": str(
            getattr(jax.config, "jax_default_matmul_precision", None) or "default"
        ),
        "x64": bool(jax.numpy.zeros(0).dtype == "float64"),
    }


def _is_run(path: Path) -> bool:
    return (path / _CONFIG).exists() or (path / _CONFIG).is_symlink()


def _is_debris(path: Path) -> bool:
    return path.name[0] == "." and path.suffix == ".tmp"


def _check_run(path: Path) -> None:
    if not _is_run(path):
        what = "no such directory" if not path.exists() else f"no run here ({_CONFIG} is missing)"
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
                f"{path}: in use by {holder}. Wait for it, or use another --run-dir."
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
    return RunError(f"{path}: cannot be written to: {error.strerror}. Use another --run-dir.")
