"""Any encoding, and nothing from a file printed raw: every command, hostile names and values."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxcae import selftest
from jaxcae.cli import main
from jaxcae.cli.command import COMMANDS
from jaxcae.cli.encoding import any_encoding, ascii_of
from jaxcae.errors import InputError, printable
from jaxcae.runs.leaves import CheckpointError
from tests.trained import train_digits

EVIL = "\x1b[31m\x1b]0;title\x07\r\x08\u202e\x9b2J"
OUTCOME = selftest.SelfTest(
    "cpu", {"jax": "1"}, "float32 · ‖J‖²", (selftest.Check("λ", True, "×", 1.0),)
)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return train_digits(tmp_path_factory.mktemp("terminals") / "run")


class Streams:
    """Stdout and stderr of one encoding in place of this process's, for one call of `main`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, encoding: str):
        self.monkeypatch, self.encoding, self.text = monkeypatch, encoding, ""

    def call(self, *argv: str) -> int:
        made = {
            name: io.TextIOWrapper(io.BytesIO(), self.encoding) for name in ("stdout", "stderr")
        }
        with self.monkeypatch.context() as patch:
            for name, stream in made.items():
                patch.setattr(sys, name, stream)
            any_encoding()
            code = main(argv)
            for stream in made.values():
                stream.flush()
        self.text += "".join(s.buffer.getvalue().decode(self.encoding) for s in made.values())
        return code


@pytest.fixture
def streams(monkeypatch, request) -> Streams:
    return Streams(monkeypatch, getattr(request, "param", "utf-8"))


def commands(run: Path, folder: Path) -> dict[str, list[str]]:
    """One call of each command that ends well."""
    data = folder / "data.npy"
    small = ["--data", str(data), "--epochs", "1", "--sizes", "64", "4", "--no-plots"]
    return {
        "help": ["--help"],
        **{f"{name} --help": [name, "--help"] for name in COMMANDS},
        "train": ["train", *small, "--run-dir", str(folder / "run")],
        "info": ["info", str(run)],
        "verify": ["info", str(run), "--verify"],
        "self-test": ["info", "--self-test"],
        "explain": ["explain", "--sizes", "6", "4", "2"],
        "score": ["score", str(run), "--data", str(data), "--output", str(folder / "s.csv")],
        "analyze": ["analyze", str(run), "--samples", "4", "--no-plots"],
    }  # fmt: skip


NAMES = commands(Path(), Path()).keys()


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n == "analyze" else ()) for n in NAMES],
)
@pytest.mark.parametrize("streams", ["ascii"], indirect=True)
def test_every_command_ends_well_in_ascii(name, streams, run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(selftest, "self_test", lambda: OUTCOME)
    np.save(tmp_path / "data.npy", np.zeros((3, 64), np.float32))
    assert streams.call(*commands(run_dir, tmp_path)[name]) == 0, streams.text
    assert len(streams.text) > 20


@pytest.mark.parametrize(
    "streams", ["latin-1", "cp1252", "koi8-r", "utf-16", "utf-8"], indirect=True
)
def test_any_other_encoding(streams):
    assert streams.call("info", "‖J‖² → λ · \udcff") == 2
    assert "no such" in streams.text or "cannot be read" in streams.text


def test_a_process_prints_in_the_encoding_of_its_terminal():
    settings = {
        "PYTHONIOENCODING": "ascii",
        "LC_ALL": "C",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    process = subprocess.run(
        [sys.executable, "-m", "jaxcae", "explain", "--sizes", "6", "4", "2"],
        env={**os.environ, **settings}, capture_output=True, check=True,
    )  # fmt: skip
    assert process.stdout.isascii()
    assert b"||J||^2" in process.stdout


def test_what_has_no_form_in_ascii_becomes_a_question_mark():
    assert ascii_of("‖J‖²_F ≤ 1 → λ 漢") == "||J||^2_F <= 1 -> lambda ?"
    assert ascii_of("╭─╮│") == "+-+|"


def raw(text: str) -> set[str]:
    """Find the characters that a terminal would obey."""
    return {c for c in text if not c.isprintable() and c not in "\n\u00a0"}


def test_a_message_escapes_what_it_quotes():
    for kind in (InputError, CheckpointError):
        assert raw(str(kind(f"{EVIL}: no such file."))) == set()
        assert r"\x1b[31m" in str(kind(EVIL))
    assert printable("λ ‖J‖² – x\u0302") == "λ ‖J‖² – x\u0302"


def hostile_run(run: Path, kind: str, folder: Path) -> Path:
    """Copy a run to a hostile name, or with hostile values in one of its files."""
    import shutil

    path = Path(shutil.copytree(run, folder / (f"r{EVIL}" if kind == "folder" else "run")))
    if kind == "config value":
        config = json.loads((path / "config.json").read_text())
        replace(config, "source", f"{EVIL}.npy")
        (path / "config.json").write_text(json.dumps(config))
    elif kind == "config key":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {EVIL: EVIL}))
    elif kind == "not JSON":
        (path / "config.json").write_text(f'{{"{EVIL}": 1, "{EVIL}": 2}}')
    elif kind == "environment":
        about = json.loads((path / "env.json").read_text())
        (path / "env.json").write_text(json.dumps(about | {"versions": {EVIL: EVIL}}))
    elif kind == "log":
        with (path / "metrics.jsonl").open("a") as log:
            log.write(json.dumps({"kind": EVIL, "epoch": EVIL}) + "\n")
    elif kind == "report":
        (path / "report.json").write_text(json.dumps({"networks": {EVIL: {"after": {EVIL: EVIL}}}}))
    elif kind == "checkpoint":
        (path / "checkpoints" / EVIL).mkdir()
    return path


def replace(values: dict, key: str, value: object) -> None:
    """Replace a setting, whichever section it is in."""
    for name, inside in list(values.items()):
        if name == key and not isinstance(inside, dict):
            values[name] = value
        elif isinstance(inside, dict):
            replace(inside, key, value)


RUNS = (
    "folder",
    "config value",
    "config key",
    "not JSON",
    "environment",
    "log",
    "report",
    "checkpoint",
)


@pytest.mark.parametrize("kind", RUNS)
def test_nothing_from_a_run_directory_is_printed_raw(kind, streams, run_dir, tmp_path, monkeypatch):
    """By any command; whether it can use the run is another matter."""
    path = hostile_run(run_dir, kind, tmp_path)
    streams.call("info", str(path))
    streams.call("info", str(path), "--verify")
    streams.call("explain", str(path))
    if kind in ("folder", "config value", "config key"):
        np.save(tmp_path / "data.npy", np.zeros((3, 64), np.float32))
        made = commands(path, tmp_path)
        streams.call(*made["score"])
        streams.call("train", "--run-dir", str(path))
        if kind != "folder":
            streams.call("train", "--run-dir", str(path), "--resume")
    assert raw(streams.text) == set()
    assert len(streams.text) > 50


def hostile_data(kind: str, folder: Path) -> Path:
    """Write a file of data with hostile names or values."""
    path = folder / "data.csv"
    if kind == "header":
        path.write_text(f'"{EVIL}",b\n1,x\n', newline="")
    elif kind == "cell":
        path.write_text(f'a,b\n1,"{EVIL}"\n', newline="")
    elif kind == "constant column":
        path.write_text(f'"{EVIL}",b\n' + "".join(f"1,{i}\n" for i in range(20)), newline="")
    elif kind == "member":
        path = folder / "data.npz"
        np.savez(path, **{EVIL.replace("\r", ""): np.zeros((2, 2)), "b": np.zeros((3, 3))})
    elif kind == "name":
        path = folder / f"{EVIL}.csv"
        path.write_text("a,b\n1,x\n")
    else:
        path = folder / f"{EVIL}.npy"
    return path


DATA = ("header", "cell", "constant column", "member", "name", "missing")


@pytest.mark.parametrize("kind", DATA)
def test_nothing_from_a_file_of_data_is_printed_raw(kind, streams, run_dir, tmp_path):
    path = str(hostile_data(kind, tmp_path))
    train = ["train", "--data", path, "--epochs", "1", "--sizes", "2", "1", "--no-plots"]
    streams.call(*train, "--standardize", "yes", "--run-dir", str(tmp_path / "new"))
    streams.call("score", str(run_dir), "--data", path, "--output", str(tmp_path / "s.csv"))
    streams.call(
        "score", str(run_dir), "--data", "digits", "--output", str(tmp_path / f"{EVIL}.txt")
    )
    assert raw(streams.text) == set()
    assert len(streams.text) > 50
