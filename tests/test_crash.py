"""Crashes of real processes: killed, told to stop, out of disk. Nothing lost, nothing different."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxcae.cli import main
from jaxcae.runs import read_metrics
from jaxcae.runs.checkpoints import Checkpoints, checkpoint_steps
from tests.processes import python

EPOCHS, STEPS_PER_EPOCH = 4, 12
LAST = EPOCHS * STEPS_PER_EPOCH
# Small, and a file: most of the time of a process is the packages that it imports.
DATA = Path(os.environ["JAXCAE_TESTS_SHARED"]) / f"crash-{os.getpid()}.npy"  # see conftest.py
np.save(DATA, np.random.default_rng(0).random((300, 8), np.float32))
NEW = ["--data", str(DATA), "--sizes", "8", "6", "3", "--epochs", str(EPOCHS)]
NEW += ["--method", "reverse", "--batch-size", "20"]
# Saving after every step makes most of a run's time saving, so that a kill hits a save in flight.
ALWAYS = ["--save-every", "1", "--no-plots"]
DEBRIS = ".orbax-checkpoint-tmp"
PATIENCE = 120.0
"""Seconds to wait for a process that should have done something long ago."""


def command(path: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "jaxcae", "train", "--run-dir", str(path), *options]


def start(path: Path, *options: str, compiled: Path | None = None) -> subprocess.Popen[str]:
    """Start a run; half of what it computes is compiling, unless it finds that in `compiled`."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # XLA takes two of its own tuning hints for instructions that this processor lacks.
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    return subprocess.Popen(
        command(path, *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **(cache if compiled else {})},
    )


def finish(path: Path, *options: str, compiled: Path | None = None) -> None:
    process = start(path, *options, compiled=compiled)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err


def wait_for(what: str, happened: Any, process: subprocess.Popen[str] | None = None) -> None:
    """Poll often: a save takes a tenth of a second."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"ended before {what}: {process.communicate()[1]}")
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.002)


def leaves(path: Path) -> Any:
    """Digests of all parameters and of the optimizer's state after the last step."""
    return Checkpoints(path / "checkpoints").read_record(LAST)["leaves"]


def log_of(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(path)]


def assert_same(path: Path, reference: Path) -> None:
    """The run is the uninterrupted one: state, parameters, and a log with each step once."""
    assert leaves(path) == leaves(reference)
    for name in ("params.safetensors", "plain.safetensors"):
        assert (path / name).read_bytes() == (reference / name).read_bytes()
    log = log_of(path)
    assert [line["step"] for line in log if line["kind"] == "step"] == list(range(1, LAST + 1))
    assert [line["epoch"] for line in log if line["kind"] == "epoch"] == list(range(EPOCHS + 1))
    assert log == log_of(reference)
    assert main(["info", str(path), "--verify", "--json"]) == 0


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts, and that compiles everything itself."""
    path = tmp_path_factory.mktemp("reference") / "run"
    finish(path, *NEW, "--no-plots")
    return path


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of compiled programs for the interrupted runs, the first of which fills it.

    The uninterrupted run knows nothing of it, so equal bits still mean that two processes which
    compiled for themselves agree.
    """
    return tmp_path_factory.mktemp("compiled")


def kill_and_resume(path: Path, kills: int, seed: int, compiled: Path) -> int:
    """Kill a run `kills` times at seeded moments, resume it each time; count saves in flight."""
    rng = random.Random(seed)
    checkpoints = path / "checkpoints"
    in_flight, done = 0, 0
    options = [*NEW, *ALWAYS]
    for remaining in range(kills, 0, -1):
        process = start(path, *options, compiled=compiled)
        # Leave steps for the kills to come, and let each life take at least one.
        furthest = max(done + 1, LAST - 1 - remaining)
        target = rng.randint(done + 1, max(done + 1, (done + furthest) // 2))
        wait_for(
            f"step {target}",
            lambda target=target: (checkpoint_steps(checkpoints) or [0])[-1] >= target,
            process,
        )
        if remaining % 2:  # in the middle of a save, or wherever it is
            wait_for("a save", lambda: _saving(checkpoints), process)
        else:
            time.sleep(rng.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended by itself before it was killed"
        in_flight += _saving(checkpoints)
        done = checkpoint_steps(checkpoints)[-1]
        options = ["--resume", *ALWAYS]
    finish(path, *options, compiled=compiled)
    return in_flight


def _saving(checkpoints: Path) -> bool:
    return any(DEBRIS in name for name in os.listdir(checkpoints))


def test_three_kills(tmp_path: Path, reference: Path, compiled: Path) -> None:
    in_flight = kill_and_resume(tmp_path / "run", kills=3, seed=1, compiled=compiled)
    assert in_flight >= 1, "no kill hit a save in flight, so this has proved nothing"
    assert_same(tmp_path / "run", reference)
    assert not list((tmp_path / "run" / "checkpoints").glob(f"*{DEBRIS}*"))


@pytest.mark.slow
def test_twenty_kills(
    tmp_path: Path, reference: Path, compiled: Path, record_property: Any
) -> None:
    in_flight = kill_and_resume(tmp_path / "run", kills=20, seed=2, compiled=compiled)
    record_property("saves in flight", in_flight)
    print(f"{in_flight} of 20 kills hit a save in flight")
    assert in_flight >= 3, "too few kills hit a save in flight to have proved anything"
    assert_same(tmp_path / "run", reference)


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
    ids=["SIGTERM", "SIGINT"],
)
def test_told_to_stop_it_saves_and_stops(
    signum: signal.Signals, code: int, tmp_path: Path, reference: Path, compiled: Path
) -> None:
    path = tmp_path / "run"
    process = start(path, *NEW, *ALWAYS, compiled=compiled)
    wait_for("a checkpoint", lambda: checkpoint_steps(path / "checkpoints"), process)
    told = time.monotonic()
    process.send_signal(signum)
    out, err = process.communicate(timeout=PATIENCE)
    assert time.monotonic() - told < 5
    assert process.returncode == code, err
    assert out == ""
    stopped = checkpoint_steps(path / "checkpoints")[-1]
    assert f"stopped at step {stopped}, saved. Go on with: jaxcae train" in err
    assert "Traceback" not in err
    # No step is lost: what was logged is what was saved.
    assert stopped < LAST
    assert log_of(path)[-1]["step"] == stopped
    finish(path, "--resume", "--no-plots", compiled=compiled)
    assert_same(path, reference)


def test_told_to_stop_before_there_is_anything_to_save(tmp_path: Path) -> None:
    path = tmp_path / "run"
    process = start(path, *NEW, *ALWAYS)
    wait_for("the lock", (path / "run.lock").exists, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (143, "")
    assert "Traceback" not in err
    if not checkpoint_steps(path / "checkpoints"):
        assert "stopped by SIGTERM" in err


STUBBORN = """
import time
from jaxcae.cli.interrupts import StopRequest
with StopRequest() as stop, stop.deferred(lambda: True):
    print("working", flush=True)
    while True:
        time.sleep(0.01)
"""


def test_a_second_signal_ends_it_at_once() -> None:
    process = python(STUBBORN)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n"
    assert "once more to quit at once" in process.stderr.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 143


COMPILING = """
import hashlib, sys
from jaxcae.cli.interrupts import StopRequest
with StopRequest(grace=0.2) as stop, stop.deferred(lambda: sys.argv[1] == "stepped"):
    print("compiling", flush=True)
    # One call that no signal handler can interrupt, as a compilation is.
    hashlib.pbkdf2_hmac("sha256", b"", b"", int(sys.argv[2]))
print(stop.exit_code)
"""


@pytest.mark.parametrize(
    ("state", "work", "rest"), [("new", 10**9, ""), ("stepped", 10**6, "143\n")]
)
def test_work_that_does_not_answer_is_left_where_nothing_is_at_stake(
    state: str, work: int, rest: str
) -> None:
    process = python(COMPILING, state, str(work))
    assert process.stdout is not None
    assert process.stdout.readline() == "compiling\n"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert out == rest
    if state == "new":  # half an hour of work is left alone
        assert process.returncode == 143
        # Before it, the handler's word, if the signal came before the call.
        assert err.strip().endswith("stopped before the first step; there was nothing to save")
    else:
        assert process.returncode == 0
        assert err.strip().startswith("stopping: finishing the step")


def test_a_second_run_in_the_directory_is_refused(
    tmp_path: Path, compiled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    process = start(path, *NEW, *ALWAYS, compiled=compiled)
    try:
        wait_for("a checkpoint", lambda: checkpoint_steps(path / "checkpoints"), process)
        for options in (["--resume"], ["--overwrite", *NEW]):
            assert main(command(path, *options)[3:]) == 2
            out, err = capsys.readouterr()
            assert out == ""
            assert f"{path}: in use by process {process.pid}" in err
            assert len(err.splitlines()) == 1
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 12 MB, where the user may mount one."""
    mount = tmp_path / "disk"
    mount.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(mount)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("may not mount a file system here; test_checkpoints limits the file size")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_stops_the_run_and_keeps_what_was_saved(
    small_disk: Path, reference: Path
) -> None:
    path = small_disk / "run"
    process = start(path, *NEW, *ALWAYS)
    wait_for("a checkpoint", lambda: checkpoint_steps(path / "checkpoints"), process)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(65536))
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, err
    assert out == ""
    *progress, last = err.splitlines()
    # Where it is and how far it came, and no thread's traceback.
    others = [x for x in progress if not x.startswith(("run directory: ", "contractive: epoch "))]
    assert others == []
    assert last.startswith("jaxcae train: "), err
    assert "could not be saved" in last or "No space left" in last
    assert not list((path / "checkpoints").glob(f"*{DEBRIS}*"))

    refused = start(path, "--resume", *ALWAYS)
    _, err = refused.communicate(timeout=PATIENCE)
    assert refused.returncode == 1
    assert "bytes are free where" in err
    filler.unlink()
    finish(path, "--resume", "--no-plots")
    assert_same(path, reference)


def test_a_disk_without_room_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    mount = tmp_path / "disk"
    mount.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    try:
        assert main(["train", *NEW, "--run-dir", str(mount / "run"), "--json"]) == 1
        assert list(mount.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)
