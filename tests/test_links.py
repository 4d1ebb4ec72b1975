"""Every name in a run directory, every command, and something else in the name's place.

What stands there leads out of the directory (a symbolic link, a hard link) or blocks whoever opens
it (a pipe, a socket). Whatever the command: nothing that it leads to is changed, nothing waits, and
the command ends with one line.
"""

import itertools
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest

from jaxcae.cli import main
from jaxcae.errors import InputError, RunError
from jaxcae.runs import RunDirectory, entries, is_in_use, read_config
from jaxcae.runs.checkpoints import Checkpoints
from tests.trained import fingerprint

OLD = Path(__file__).parent / "format_0"
DEBRIS = "checkpoints/9.orbax-checkpoint-tmp"
NAMES = (
    "config.json",
    "env.json",
    "metrics.jsonl",
    "report.json",
    "params.safetensors",
    "plain.safetensors",
    "pretrained.safetensors",
    "metric.safetensors",
    "run.lock",
    "checkpoints",
    "checkpoints/8",
    "checkpoints/8/_CHECKPOINT_METADATA",
    "checkpoints/8/manifest.json",
    "checkpoints/8/state",
    "checkpoints/8/state/manifest.ocdbt",
    DEBRIS,
    f"{DEBRIS}/state",
    "plots",
    "plots/curves.png",
    "plots/spectrum.png",
    "export",
    "export/encoder.jaxexport",
    "export/export.json",
)
TRAIN = ["train", "--data", "rows.csv", "--json"]
COMMANDS = {
    "train": [*TRAIN, "--run-dir", "run"],
    "train --overwrite": [*TRAIN, "--run-dir", "run", "--overwrite", "--epochs", "1"],
    "train --resume": ["train", "--run-dir", "run", "--resume", "--json"],
    "info": ["info", "run"],
    "info --verify": ["info", "run", "--verify"],
    "explain": ["explain", "run"],
    "score": ["score", "run", "--data", "rows.csv", "--output", "scores.npy"],
    "analyze": ["analyze", "run"],
    "export": ["export", "run"],
}


def link_to_file(name: Path, outside: Path) -> None:
    name.symlink_to(outside / "precious")


def link_to_folder(name: Path, outside: Path) -> None:
    name.symlink_to(outside)


def dangling(name: Path, outside: Path) -> None:
    name.symlink_to(outside / "absent")


def pipe(name: Path, outside: Path) -> None:
    os.mkfifo(name)


def listener(name: Path, outside: Path) -> None:
    here = Path.cwd()
    os.chdir(name.parent)  # the path of a socket may have about a hundred bytes
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(name.name)
    os.chdir(here)


KINDS = (link_to_file, link_to_folder, dangling, pipe, listener)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run with every name that one can have, and what it must not reach."""
    shutil.copytree(OLD / "finished", tmp_path / "run")
    shutil.copy(OLD / "rows.csv", tmp_path)
    for name in NAMES:
        path = tmp_path / "run" / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            is_file = path.suffix in (".png", ".json", ".jaxexport", ".safetensors")
            path.touch() if is_file else path.mkdir()
    outside = tmp_path / "outside"
    (outside / "8").mkdir(parents=True)
    (outside / "9.orbax-checkpoint-tmp").mkdir()
    for name in ("precious", "config.json", "curves.png", "8/manifest.json", "encoder.jaxexport"):
        (outside / name).write_text("mine")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def state_of(folder: Path) -> dict[str, object]:
    """Contents and times of all that is outside the run, and of the run's own names."""
    outside = folder / "outside"
    times = {str(p): p.lstat().st_mtime_ns for p in (outside, *outside.rglob("*"))}
    return {**fingerprint(outside), **times}


def put(folder: Path, name: str, kind: object) -> Path:
    """Put something else in the place of a name; return what was there, moved away."""
    path, kept = folder / "run" / name, folder / "kept"
    path.rename(kept)
    kind(path, folder / "outside")  # type: ignore[operator]
    return kept


def put_back(folder: Path, name: str, kept: Path) -> None:
    (folder / "run" / name).unlink()
    kept.rename(folder / "run" / name)


def refuse(folder: Path, command: str, name: str, kind: object, capsys: object) -> None:
    before = state_of(folder)
    kept = put(folder, name, kind)
    inside = fingerprint_of_names(folder / "run")
    code = main(COMMANDS[command])
    err = capsys.readouterr().err  # type: ignore[attr-defined]
    where = f"{command} with {kind.__name__} for {name}"  # type: ignore[attr-defined]
    assert code == 2, where
    assert err.count("\n") == 1, f"{where}: {err}"
    assert Path(name).name in err, f"{where}: {err}"
    assert state_of(folder) == before, where
    assert fingerprint_of_names(folder / "run") == inside, where
    put_back(folder, name, kept)


def fingerprint_of_names(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_follows_what_is_no_file_or_folder(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each name once for each command, the kinds in turn; `slow` has all of them."""
    offset = list(COMMANDS).index(command)
    for number, name in enumerate(NAMES):
        refuse(folder, command, name, KINDS[(number + offset) % len(KINDS)], capsys)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_follows_anything(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, kind in itertools.product(NAMES, KINDS):
        refuse(folder, command, name, kind, capsys)


@pytest.mark.parametrize("kind", KINDS)
def test_the_library_follows_nothing_either(folder: Path, kind: object) -> None:
    run = folder / "run"
    for name in NAMES:
        before = state_of(folder)
        kept = put(folder, name, kind)
        for use in (
            lambda: read_config(run),
            lambda: RunDirectory.open(run),
            lambda: RunDirectory.create(run, overwrite=True),
        ):
            with pytest.raises(InputError, match=Path(name).name):
                use()
        assert not is_in_use(run)
        assert state_of(folder) == before, name
        put_back(folder, name, kept)
    assert read_config(run).data.source == "rows.csv"


def test_a_run_without_a_configuration_is_no_excuse(folder: Path) -> None:
    """A new run in a folder where only a link waits."""
    new = folder / "new"
    for name in ("plots", "checkpoints", "run.lock", "metrics.jsonl"):
        new.mkdir()
        (new / name).symlink_to(folder / "outside")
        before = state_of(folder)
        with pytest.raises(RunError, match="symbolic link"):
            RunDirectory.create(new)
        assert state_of(folder) == before
        assert [path.name for path in new.iterdir()] == [name]
        (new / name).unlink()
        new.rmdir()


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.lock"])
def test_a_second_name_of_what_is_written_in_place_is_refused(folder: Path, name: str) -> None:
    """As in a backup by hard links: what is only read is read, what is replaced is replaced."""
    backup = folder / "backup"
    shutil.copytree(folder / "run", backup, copy_function=os.link)
    before = fingerprint(backup)
    for other in ("metrics.jsonl", "run.lock"):
        if other != name:  # one of the two at a time
            path = folder / "run" / other
            data = path.read_bytes()
            path.unlink()
            path.write_bytes(data)
    assert main(["info", "run"]) == 0
    assert main(COMMANDS["train --resume"]) == 2
    assert fingerprint(backup) == before


def test_what_is_replaced_leaves_other_names_of_it_alone(folder: Path) -> None:
    """Reports and parameters are written beside and renamed, so a hard link keeps the old bytes."""
    from jaxcae.files import write_atomic

    path, other = folder / "run/report.json", folder / "other.json"
    other.hardlink_to(path)
    whole = path.read_bytes()
    write_atomic(path, b"{}")
    assert other.read_bytes() == whole


FOREIGN = {
    "config.json": b'{"model_type": "bert", "hidden_size": 768}',
    "env.json": b'{"name": "production"}',
    "metrics.jsonl": b'{"accuracy": 0.9, "epoch": 1, "run": "another tool\'s"}\n',
    "report.json": b"[1, 2, 3]",
    "params.safetensors": b"\x02\0\0\0\0\0\0\0{}",
    "plain.safetensors": b"weights",
    "run.lock": b"pid 17, do not touch\n",
    "checkpoints/8/notes.txt": b"mine",
    "checkpoints/7/weights.bin": b"mine",
    "plots/curves.png": b"GIF89a",
    "export/encoder.jaxexport": b"mine",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_not_provably_ours_is_never_replaced(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(OLD / "finished", tmp_path / "run")
    shutil.copy(OLD / "rows.csv", tmp_path)
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(FOREIGN[name])
    before = fingerprint(tmp_path)
    for command in ("train", "train --overwrite"):
        assert main(COMMANDS[command]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    if name != "run.lock":
        (tmp_path / "run/run.lock").write_bytes((OLD / "finished/run.lock").read_bytes())
    assert fingerprint(tmp_path) == before
    with pytest.raises(RunError, match=r"was not written by|run.lock|checkpoints/7"):
        entries.clear(tmp_path / "run") if name != "run.lock" else RunDirectory.open("run")
    assert fingerprint(tmp_path) == before


def test_another_tools_folder_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every file in it bears a name of ours, and none is."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(OLD / "rows.csv", tmp_path)
    for name, content in FOREIGN.items():
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    before = fingerprint(tmp_path)
    for arguments in COMMANDS.values():
        assert main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert fingerprint(tmp_path) == before


def test_what_else_lies_in_a_run_stays_when_it_is_replaced(tmp_path: Path) -> None:
    run = Path(shutil.copytree(OLD / "finished", tmp_path / "run"))
    (run / "plots").mkdir()
    (run / "checkpoints" / DEBRIS.split("/")[1]).mkdir()
    for name in ("notes.txt", "plots/mine.png", "checkpoints/readme", ".mine.tmp"):
        (run / name).write_text("mine")
    (run / "link").symlink_to(tmp_path)
    config = read_config(run)
    with RunDirectory.create(run, overwrite=True) as directory:
        directory.start(config)
    assert set(fingerprint(run)) == {
        *("notes.txt", "plots", "plots/mine.png", "checkpoints", "checkpoints/readme", "link"),
        *(".mine.tmp", "config.json", "env.json", "metrics.jsonl", "run.lock"),
    }


def test_saving_removes_only_what_a_save_left(tmp_path: Path) -> None:
    mine = ("9.orbax-checkpoint-tmp", "9.orbax-checkpoint-tmp-17")
    for name in (*mine, "model.orbax-checkpoint-tmp-17", "12.old", "notes"):
        (tmp_path / name).mkdir()
    Checkpoints(tmp_path, keep=1).save(3, {"w": np.ones(2, np.float32)}, {})
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"3", "model.orbax-checkpoint-tmp-17", "12.old", "notes"}
