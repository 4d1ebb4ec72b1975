"""Small finished runs for the tests that begin where training ends."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path


def train(path: Path, *options: str) -> Path:
    """Train a small run in `path` in a process of its own, and return `path`."""
    small = ["--epochs", "2", "--no-plots", "--json"]
    command = [sys.executable, "-m", "jaxcae", "train", "--run-dir", str(path), *small, *options]
    process = subprocess.run(command, check=False, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return path


def train_digits(path: Path) -> Path:
    """Put a run of 64-32-8 on the digits, whose values lie in [0, 1], in `path`."""
    sizes = ("--sizes", "64", "32", "8", "--activation", "softplus")
    return _copy_of("digits", path, "--data", "digits", *sizes)


def train_tabular(path: Path) -> Path:
    """Put a run on measurements in units of their own, which it standardises, in `path`."""
    return _copy_of("tabular", path, "--data", "breast_cancer")


def _copy_of(name: str, path: Path, *options: str) -> Path:
    """Copy the run of that name, which is trained once for all test processes."""
    shared = Path(os.environ["JAXCAE_TESTS_SHARED"])  # set in conftest.py
    original = shared / name
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (original / "report.json").exists():
            shutil.rmtree(original, ignore_errors=True)
            train(original, *options)
    return Path(shutil.copytree(original, path))


def fingerprint(folder: Path) -> dict[str, str]:
    """Return what is in a folder: each path below it, and the digest or kind of what it is."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "directory"
    return found
