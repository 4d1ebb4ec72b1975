"""SIGINT and SIGTERM at any moment of any command: one line, the right exit code, nothing else."""

import contextlib
import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="looks into running processes"
)
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
TRAIN = ("-m", "jaxcae", "train", "--data", "digits", "--epochs", "500", "--run-dir", "run")
COMMANDS = {
    "train": TRAIN,
    "script": ("-c", "from jaxcae.cli import entry; entry()", *TRAIN[2:]),
    "explain": ("-m", "jaxcae", "explain"),
    "bench": ("-m", "jaxcae", "bench"),
    "self-test": ("-m", "jaxcae", "info", "--self-test"),
    "parity": ("-m", "parity"),
    "benchmarks": ("-m", "benchmarks", "--out", "results"),
}


NEED_TORCH = ("parity", "benchmarks")


def start(folder: Path, arguments: tuple[str, ...]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def listens(process: subprocess.Popen[str]) -> bool:
    """Tell whether the process has a handler for SIGTERM; Python itself sets none."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def wait_until_it_listens(process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not listens(process):
        assert process.poll() is None, "ended before it listened for signals"
        assert time.monotonic() < deadline, "never listened for signals"
        time.sleep(0.001)


def check_stopped(process: subprocess.Popen[str], signum: int, moment: object) -> None:
    stdout, stderr = process.communicate(timeout=60)
    told = (moment, process.returncode, stdout[-300:], stderr[-2000:])
    assert process.returncode == CODES[signum], told
    assert "Traceback" not in stderr, told
    assert "Exception ignored" not in stderr, told
    last = stderr.strip().splitlines()[-1]
    name = signal.Signals(signum).name
    assert f"stopped by {name}" in last or "saved. Go on with" in last or "nothing to save" in last


@pytest.mark.parametrize("name", COMMANDS)
def test_a_process_listens_before_it_imports_anything_large(name, tmp_path):
    """Once it listens it is stopped, and what is mapped tells what was imported by then."""
    process = start(tmp_path, COMMANDS[name])
    try:
        wait_until_it_listens(process)
        os.kill(process.pid, signal.SIGSTOP)
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        assert not [lib for lib in ("jaxlib", "numpy", "torch", "matplotlib") if lib in maps]
        os.kill(process.pid, signal.SIGINT)
        os.kill(process.pid, signal.SIGCONT)
        check_stopped(process, signal.SIGINT, "at once")
    finally:
        process.kill()
    assert list(tmp_path.iterdir()) == []


def stop_after(name: str, delay: float, signum: int, folder: Path) -> None:
    if name in NEED_TORCH and importlib.util.find_spec("torch") is None:
        pytest.skip("it ends at once where PyTorch is not installed")
    process = start(folder, COMMANDS[name])
    try:
        wait_until_it_listens(process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        if process.poll() is not None:  # it was done before
            assert process.returncode == 0
            return
        process.send_signal(signum)
        check_stopped(process, signum, delay)
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("name", "delay", "signum"),
    [
        ("train", 0.3, signal.SIGINT),
        ("script", 0.7, signal.SIGTERM),
        ("self-test", 1.5, signal.SIGINT),
        ("parity", 0.9, signal.SIGTERM),
    ],
)
def test_a_signal_while_a_command_begins(name, delay, signum, tmp_path):
    stop_after(name, delay, signum, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "explain"])
def test_a_signal_at_many_moments(name, tmp_path):
    drawn = random.Random(0)
    for index in range(16):
        folder = tmp_path / str(index)
        folder.mkdir()
        stop_after(name, drawn.uniform(0, 3), drawn.choice(list(CODES)), folder)
