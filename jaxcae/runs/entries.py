"""What may lie in a run directory: which names are a run's, what each must be, and which are ours.

A run directory may come from a stranger, so nothing in it is opened before `check` has seen that
each name of ours is a file or folder of its own, and no link, pipe or device. What another program
put there is never replaced: `clear` removes only what its own content proves to be ours.
"""

import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxcae.errors import CheckpointError, InputError, RunError
from jaxcae.files import MAX_JSON_BYTES, open_regular, read_bytes, read_json, sha256_of_file
from jaxcae.runs.config import Config
from jaxcae.runs.lock import LOCK, is_lock_text
from jaxcae.runs.log import METRICS
from jaxcae.runs.manifest import DEBRIS, check_tree, is_ours
from jaxcae.runs.params_file import is_params_file

CONFIG, PRETRAINED = "config.json", "pretrained.safetensors"
DETECTOR, METRIC = "detector.safetensors", "metric.safetensors"
CHECKPOINTS, PLOTS, EXPORT = "checkpoints", "plots", "export"
_PICTURES = tuple(
    f"{name}.png" for name in ("reconstructions", "filters", "curves", "spectrum", "contraction")
)
_EXPORTS = ("encoder.jaxexport", "scorer.jaxexport", "export.json")
_MAX_CONFIG = MAX_JSON_BYTES  # the names of a million columns fit


def check(path: Path) -> None:
    """See that all names of a run below `path` are what a run puts there, if they exist.

    Raises:
        RunError: If one is a link, a pipe, a device, or a file for a folder.
    """
    for name in (LOCK, *_OURS):
        _check_kind(path / name, stat.S_ISREG, "file")
    for folder, names in ((CHECKPOINTS, ()), (PLOTS, _PICTURES), (EXPORT, _EXPORTS)):
        _check_kind(path / folder, stat.S_ISDIR, "folder")
        for name in names:
            _check_kind(path / folder / name, stat.S_ISREG, "file")
    try:
        check_tree(path / CHECKPOINTS)
    except CheckpointError as error:
        raise RunError(str(error)) from None


def is_run(path: Path) -> bool:
    """Tell whether there is a configuration, of whatever kind."""
    return os.path.lexists(path / CONFIG)


def read_config(path: Path) -> Config:
    """Read the configuration of the run in a directory, and see that the directory is sound.

    Raises:
        RunError: If there is no run, or a name of a run is a link or no file.
        InputError: If it is not a configuration.
    """
    if not is_run(path):
        what = "no such directory" if not path.exists() else f"no run here ({CONFIG} is missing)"
        raise RunError(f"{path}: {what}.")
    check(path)
    return Config.from_json(read_json(path / CONFIG, _MAX_CONFIG), str(path / CONFIG))


def foreign(path: Path, *, locked: bool = True) -> str | None:
    """Name the first thing that stands in a new run's way and is not provably ours, if any.

    In the directory of a run only the names of a run are looked at; all else may stay there. Until
    it is `locked` another process may be writing them, all but the configuration.
    """
    if not is_run(path):
        found = (p.name for p in path.iterdir() if not (is_debris(p.name) or _is_lock(p)))
        return min(found, default=None)
    if not locked:
        return None if _holds(_is_config, path / CONFIG) else CONFIG
    for name, proof in _OURS.items():
        if os.path.lexists(path / name) and not _holds(proof, path / name):
            return name
    for step in _steps(path):
        if not is_ours(step):
            return f"{CHECKPOINTS}/{step.name}"
    for folder, names, proof in ((PLOTS, _PICTURES, _is_png), (EXPORT, _EXPORTS, _is_export)):
        for name in names:
            if os.path.lexists(path / folder / name) and not _holds(proof, path / folder / name):
                return f"{folder}/{name}"
    return None


def clear(path: Path) -> None:
    """Remove the run in a directory, file by file, but for its configuration and its lock.

    Raises:
        RunError: If there is anything in its place that is not provably ours; nothing is removed.
    """
    check(path)
    if other := foreign(path):
        raise not_ours(path, other)
    for name in _OURS:
        if name != CONFIG:
            (path / name).unlink(missing_ok=True)
    for step in _steps(path):
        shutil.rmtree(step)
    for folder, names in ((PLOTS, _PICTURES), (EXPORT, _EXPORTS)):
        for name in names:
            (path / folder / name).unlink(missing_ok=True)
    for folder in (CHECKPOINTS, PLOTS, EXPORT):
        if (path / folder).is_dir() and not os.listdir(path / folder):
            (path / folder).rmdir()


def not_ours(path: Path, name: str) -> RunError:
    """Make the error for what is in the way."""
    if not is_run(path):
        return RunError(f"{path}: holds {name!r} and no run. Use an empty `run_dir`.")
    writer = "this or an earlier version of jaxcae" if name == CONFIG else "jaxcae"
    return RunError(
        f"{path / name}: was not written by {writer}, so it is not replaced. Move it away, or use "
        "another `run_dir`."
    )


def is_debris(name: str) -> bool:
    """Tell whether a name is that of a temporary file which a killed process of ours left."""
    return re.fullmatch(rf"\.({_NAMES}|probe)\.[0-9a-z_]{{1,16}}\.tmp", name) is not None


def remove_debris(path: Path) -> None:
    """Remove what killed processes left at the top of a run directory."""
    for entry in list(path.iterdir()):
        if is_debris(entry.name) and stat.S_ISREG(entry.lstat().st_mode):
            entry.unlink()


def _check_kind(path: Path, expected: Callable[[int], bool], kind: str) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunError(f"{path}: cannot be looked at: {error.strerror}.") from None
    if stat.S_ISLNK(mode):
        raise RunError(f"{path}: is a symbolic link, which is not followed here.")
    if not expected(mode):
        raise RunError(f"{path}: not a regular {kind}.")


def _steps(path: Path) -> Iterator[Path]:
    """Yield the checkpoints of a run, and what is left of those whose saving was cut short."""
    folder = path / CHECKPOINTS
    for step in sorted(folder.iterdir()) if folder.is_dir() else ():
        if step.name.isdecimal() or DEBRIS in step.name:
            yield step


def _holds(proof: Callable[[Path], bool], path: Path) -> bool:
    try:
        return proof(path)
    except (InputError, CheckpointError, OSError):
        return False


def _is_config(path: Path) -> bool:
    return isinstance(Config.from_json(read_json(path, _MAX_CONFIG)), Config)


def _has(*keys: str) -> Callable[[Path], bool]:
    """Make a proof for tables in JSON that hold these keys."""

    def proof(path: Path) -> bool:
        value: Any = read_json(path)
        return isinstance(value, dict) and set(keys) <= set(value)

    return proof


def _is_log(path: Path) -> bool:
    with os.fdopen(open_regular(path), "rb") as file:
        line = file.readline(_MAX_CONFIG)
    # The first line may be torn where the process was killed.
    return line == b"" or (line.startswith(b"{") and b'"kind": ' in line) or len(line) < 40


def _is_png(path: Path) -> bool:
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read(8) == b"\x89PNG\r\n\x1a\n"


def _is_export(path: Path) -> bool:
    """An artefact is the one whose digest stands in export.json."""
    summary = read_json(path.parent / "export.json", MAX_JSON_BYTES)
    if not isinstance(summary, dict) or not isinstance(summary.get("artefacts"), dict):
        return False
    entry = summary["artefacts"].get(path.name.partition(".")[0])
    if path.name == "export.json":
        return "jaxcae" in summary.get("versions", ())
    return isinstance(entry, dict) and entry.get("sha256") == sha256_of_file(path)


def _is_lock(path: Path) -> bool:
    return path.name == LOCK and _holds(lambda p: is_lock_text(read_bytes(p, 2**12)), path)


_OURS: dict[str, Callable[[Path], bool]] = {
    CONFIG: _is_config,
    "env.json": _has("versions", "device", "host"),
    METRICS: _is_log,
    "report.json": _has("data", "networks", "steps"),
    "params.safetensors": is_params_file,
    "plain.safetensors": is_params_file,
    PRETRAINED: is_params_file,
    DETECTOR: is_params_file,
    METRIC: is_params_file,
}
"""The files of a run, each with what proves that it is one of ours."""

_NAMES = "|".join(map(re.escape, _OURS))
