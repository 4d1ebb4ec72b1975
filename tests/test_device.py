"""Which device a command runs on, and one line where it is not there."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxcae.cli import main
from jaxcae.cli.command import COMMANDS

ROOT = Path(__file__).parent.parent
CALLS = {
    "train": ("-m", "jaxcae", "train", "--data", "digits", "--run-dir", "run"),
    "info": ("-m", "jaxcae", "info", "--self-test"),
    "explain": ("-m", "jaxcae", "explain"),
    "benchmarks": ("-m", "benchmarks", "--only", "prediction", "--out", "results"),
    "parity": ("-m", "parity", "--case", "one-layer"),
}


def call(arguments: tuple[str, ...], folder: Path, **settings: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **settings},
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "platforms"), [("train", "cuda"), ("info", "nonsense"), ("benchmarks", "cuda")]
)
def test_a_platform_that_is_not_there_is_one_line(name, platforms, tmp_path):
    done = call(CALLS[name], tmp_path, JAX_PLATFORMS=platforms)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert f"JAX_PLATFORMS={platforms}: there is no such device here" in last


@pytest.mark.slow
@pytest.mark.parametrize("platforms", ["cuda", "gpu", "tpu", "nonsense", "cpu,nonsense"])
@pytest.mark.parametrize("name", CALLS)
def test_a_platform_that_is_not_there_is_one_line_everywhere(name, platforms, tmp_path):
    if platforms != "cpu,nonsense" and jax.default_backend() in platforms:
        pytest.skip("it is there")
    test_a_platform_that_is_not_there_is_one_line(name, platforms, tmp_path)


@pytest.fixture
def settings_kept():
    before = jax.config.jax_platforms, jax.config.jax_default_device
    yield
    jax.config.update("jax_platforms", before[0])
    jax.config.update("jax_default_device", before[1])


def test_the_cpu_can_be_asked_for(capsys, settings_kept):
    assert main(["info", "--device", "cpu"]) == 2  # it needs a run, too
    assert jax.config.jax_platforms == "cpu"


@pytest.mark.parametrize("name", ["gpu", "tpu"])
def test_a_device_that_is_not_there_is_one_line(name, capsys, settings_kept):
    if jax.default_backend() == name:
        pytest.skip("it is there")
    assert main(["explain", "--device", name]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"--device {name}: JAX finds no {name.upper()} here, only cpu." in captured.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_a_device(command, capsys):
    assert main([command, "--help"]) == 0
    assert "--device" in capsys.readouterr().out
    assert main([command, "--device", "toaster"]) == 2
