"""One run of `jaxcae train` in several processes: killed, told to stop, stuck, gone on with."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxcae.cli import main
from jaxcae.runs import open_run, read_metrics
from jaxcae.runs.checkpoints import checkpoint_steps
from tests.test_processes import start  # noqa: F401

DATA = Path(os.environ["JAXCAE_TESTS_SHARED"]) / f"many-{os.getpid()}.npy"  # see conftest.py
EPOCHS, STEPS_PER_EPOCH = 100, 12
NEW = ["--data", str(DATA), "--sizes", "8", "6", "3", "--epochs", str(EPOCHS)]
NEW += ["--batch-size", "20", "--method", "reverse", "--no-plots"]
LINE = "jaxcae train: process {} of 2 {}; go on with --resume"


@pytest.fixture(autouse=True, scope="module")
def _data():
    np.save(DATA, np.random.default_rng(0).random((300, 8), np.float32))


def training(count, path, *options):
    def command(port, me):
        joined = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(count)]
        joined += ["--process-id", str(me), "--peer-timeout", "5"]
        return [sys.executable, "-m", "jaxcae", "train", "--run-dir", str(path), *options, *joined]

    return command


def steps_logged(path):
    try:
        return (path / "metrics.jsonl").read_bytes().count(b'"kind": "step"')
    except FileNotFoundError:
        return 0


def wait_for_steps(path, count, group):
    deadline = time.monotonic() + 240
    while steps_logged(path) < count:
        assert all(member.poll() is None for member in group.members), group.ended()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def ours(err):
    return [line for line in err.splitlines() if line.startswith("jaxcae train:")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Records of the same run in one process."""
    path = tmp_path_factory.mktemp("alone") / "run"
    assert main(["train", "--run-dir", str(path), *NEW]) == 0
    return epochs_of(path)


def epochs_of(path):
    records = [line for line in read_metrics(path) if line["kind"] == "epoch"]
    return [{k: v for k, v in r.items() if k not in ("kind", "seconds")} for r in records]


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_run_outlives_the_death_of_a_process(start, tmp_path, alone, which):  # noqa: F811
    """Killed at a seeded moment: the other leaves in seconds; one process brings it to its end."""
    path = tmp_path / "run"
    group = start(2, training(2, path, *NEW, "--save-every", "7"))
    wait_for_steps(path, random.Random(which).randint(20, 200), group)
    began = time.monotonic()
    group.members[which].kill()
    (code, out, err) = group.ended(but=which)[0]
    assert time.monotonic() - began < 5
    assert (code, out) == (1, "")
    assert ours(err) == [LINE.format(which, "is gone")]
    assert main(["train", "--run-dir", str(path), "--resume", "--no-plots"]) == 0
    steps = [line["step"] for line in read_metrics(path) if line["kind"] == "step"]
    assert steps == list(range(1, EPOCHS * STEPS_PER_EPOCH + 1))
    open_run(path)  # verified
    for got, expected in zip(epochs_of(path), alone, strict=True):
        assert got == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_a_signal_to_one_stops_all_and_any_number_goes_on(start, tmp_path):  # noqa: F811
    """SIGTERM to process 1 of 2: both exit with 143, saved; 4 go on, then 1."""
    path = tmp_path / "run"
    for count in (2, 4):
        options = NEW if count == 2 else ["--resume", "--no-plots"]
        group = start(count, training(count, path, *options))
        wait_for_steps(path, steps_logged(path) + 15, group)
        group.members[1].send_signal(signal.SIGTERM)
        found = group.ended()
        assert [code for code, _, _ in found] == [143] * count
        assert "saved. Go on with" in found[0][2]
        assert checkpoint_steps(path / "checkpoints")[-1] == steps_logged(path)
        assert [out for _, out, _ in found] == [""] * count
    assert main(["train", "--run-dir", str(path), "--resume", "--no-plots"]) == 0


@pytest.mark.slow
def test_a_stuck_process_is_given_up(start, tmp_path):  # noqa: F811
    path = tmp_path / "run"
    group = start(2, training(2, path, *NEW))
    wait_for_steps(path, 20, group)
    group.members[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    code, _, err = group.ended(but=1)[0]
    assert time.monotonic() - began < 15
    assert code == 1
    assert ours(err) == [LINE.format(1, "has given no sign of life for 5 s")]


@pytest.mark.slow
def test_what_process_0_refuses_all_refuse(start, tmp_path):  # noqa: F811
    """A run that is there already: exit code 2 everywhere, and nothing in it changed."""
    path = tmp_path / "run"
    path.mkdir()
    (path / "notes.txt").write_text("mine")
    found = start(2, training(2, path, *NEW)).ended()
    assert [code for code, _, _ in found] == [2, 2]
    assert "notes.txt" in ours(found[0][2])[0]
    assert ours(found[1][2]) == ["jaxcae train: process 0 of 2 ended with exit code 2"]
    assert [file.name for file in path.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_slurm_starts_one_run(start, tmp_path):  # noqa: F811
    """Two tasks of a step with `--distributed`, by JAX's own detection; --json is one document."""
    path = tmp_path / "run"
    job = str(random.randrange(2**30))

    def task(port, me):
        slurm = {"SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
        slurm |= {"SLURM_PROCID": str(me), "SLURM_LOCALID": str(me), "SLURM_STEP_NUM_NODES": "1"}
        command = [sys.executable, "-m", "jaxcae", "train", "--run-dir", str(path), *NEW]
        command += ["--epochs", "2", "--distributed", "--json"]
        return ["env", *(f"{name}={value}" for name, value in slurm.items()), *command]

    found = start(2, task).ended()
    assert [code for code, _, _ in found] == [0, 0], found
    assert json.loads(found[0][1])["epochs"] == 2
    assert found[1][1] == ""


def test_tasks_of_a_launcher_do_not_train_copies(monkeypatch, tmp_path, capsys):
    """Without `--distributed`: exit code 2, one line, nothing written."""
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert main(["train", "--run-dir", str(tmp_path / "run"), *NEW]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "SLURM" in line
    assert "--distributed" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--coordinator", "127.0.0.1:1"], "--num-processes and --process-id must be given"),
        (["--distributed"], "no launcher's environment"),
        (["--process-id", "0"], "--coordinator and --num-processes must be given"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, capsys, options, message):
    assert main(["train", "--run-dir", str(tmp_path / "run"), *NEW, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_three_processes_take_the_batches_of_one(start, tmp_path):  # noqa: F811
    """Streamed in parts, in batches of 20 that three do not divide: the same records."""
    options = [*NEW, "--epochs", "3", "--stream"]
    assert main(["train", "--run-dir", str(tmp_path / "alone"), *options]) == 0
    found = start(3, training(3, tmp_path / "run", *options)).ended()
    assert [code for code, _, _ in found] == [0, 0, 0], found
    records = zip(epochs_of(tmp_path / "run"), epochs_of(tmp_path / "alone"), strict=True)
    for got, expected in records:
        assert got == pytest.approx(expected, rel=1e-5)
