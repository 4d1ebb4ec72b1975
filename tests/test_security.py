"""Nothing let in: no pickle, no code from files, no path out of a directory, caps on everything."""

import ast
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxcae.cli import main
from jaxcae.errors import InputError
from jaxcae.files import read_json
from jaxcae.runs import open_run
from jaxcae.runs.config import Config
from jaxcae.runs.leaves import CheckpointError
from jaxcae.runs.params_file import load_params, save_params
from tests.trained import fingerprint, train_digits

ROOT = Path(__file__).parent.parent
HOUSES = ("jaxcae", "parity", "benchmarks", "tests")

# Modules that run what they read, and names that do so under another module.
UNSAFE_MODULES = {
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal",
}  # fmt: skip
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}

# The corpus of hostile files is made of pickles, and its test shows that they would have run.
ALLOWED = {
    ("tests/hostile.py", "import pickle"),
    ("tests/test_data.py", "import pickle"),
    ("tests/test_detector.py", "import pickle"),
    ("tests/hostile.py", "allow_pickle"),
    # The code blocks of parity's page are run as tests: our own text, not a data file.
    ("tests/test_parity_readme.py", "compile"),
    ("tests/test_parity_readme.py", "exec"),
    ("tests/test_walks.py", "exec"),
}


def _findings(source: str) -> Iterator[str]:
    """Yield what in a Python file could run code out of a data file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in UNSAFE_MODULES:
                    yield f"import {alias.name}"
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in UNSAFE_MODULES:
                yield f"import {node.module}"
        elif isinstance(node, ast.Call):
            yield from _call_findings(node)


def _call_findings(call: ast.Call) -> Iterator[str]:
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    value = keywords.get("allow_pickle")
    if value is not None and not (isinstance(value, ast.Constant) and value.value is False):
        yield "allow_pickle"
    shell = keywords.get("shell")
    if shell is not None and not (isinstance(shell, ast.Constant) and shell.value is False):
        yield "shell"
    name = ast.unparse(call.func)
    if name in UNSAFE_CALLS:
        yield name
    if (
        name == "torch.load"
        and ast.unparse(keywords.get("weights_only", ast.Constant(None))) != "True"
    ):
        yield "torch.load without weights_only"
    if name.split(".")[-1] == "extractall":
        yield "extractall"
    if name in ("yaml.load", "os.system", "os.popen"):
        yield name


def test_nothing_runs_code_from_a_file() -> None:
    found = {
        (str(path.relative_to(ROOT)), finding)
        for house in HOUSES
        for path in (ROOT / house).rglob("*.py")
        for finding in _findings(path.read_text())
        if not (house == "tests" and finding == "shell")  # a shell is how a test limits a process
    }
    assert found <= ALLOWED, found - ALLOWED
    assert ("tests/hostile.py", "import pickle") in found  # the search finds what there is


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import joblib.numpy_pickle",
        "from cloudpickle import loads",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "eval(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "archive.extractall(folder)",
        "subprocess.run(text, shell=True)",
        "yaml.load(text)",
    ],
)
def test_the_search_finds(code: str) -> None:
    assert list(_findings(code))


@pytest.mark.parametrize(
    "code",
    ["np.load(path, allow_pickle=False)", "torch.load(path, weights_only=True)", "json.loads"],
)
def test_the_search_lets_pass(code: str) -> None:
    assert not list(_findings(code))


def test_every_numpy_load_of_the_library_forbids_pickles() -> None:
    """NumPy forbids them by default; the library says so at each call, which a reader can see."""
    for path in (ROOT / "jaxcae").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("np.load", "numpy.load"):
                assert "allow_pickle=False" in ast.unparse(node), f"{path}: {ast.unparse(node)}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_digits(tmp_path_factory.mktemp("security") / "run")


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """Give a copy of a finished run, to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def _refused(run: Path, capsys: pytest.CaptureFixture[str], *, code: int | None = None) -> str:
    """Assert that score and export refuse a run in one line and write nothing; return the line."""
    output = run.parent / "scores.csv"
    np.save(run.parent / "xs.npy", np.zeros((3, 64), np.float32))
    before = fingerprint(run.parent)
    for arguments in (
        ["score", str(run), "--data", str(run.parent / "xs.npy"), "--output", str(output)],
        ["export", str(run), "--output", str(run.parent / "out")],
    ):
        got = main(arguments)
        assert got in ((1, 2) if code is None else (code,))
        message = capsys.readouterr().err
        assert message.count("\n") == 1, message
        assert "Traceback" not in message
    assert fingerprint(run.parent) == before
    return message


CONFIGS = {
    "not JSON": (lambda text: text[:-3], "not valid JSON"),
    "an unknown key": (
        lambda text: text.replace('"tied"', '"tide"'),
        "unknown option 'tide'.*tied",
    ),
    "a key twice": (
        lambda text: text.replace('"seed": 0,', '"seed": 0, "seed": 0,'),
        "comes twice",
    ),
    "a missing key": (lambda text: text.replace('"seed": 0,', ""), "'seed' is missing"),
    "NaN": (lambda text: text.replace('"l1": 0.0', '"l1": NaN'), "NaN is not JSON"),
    "1e999": (lambda text: text.replace('"l1": 0.0', '"l1": 1e999'), "too large"),
    "another type": (
        lambda text: text.replace('"seed": 0', '"seed": true'),
        "'seed' has the unusable",
    ),
    "an enormous width": (lambda text: text.replace("32", f"{2**40}"), "from 1 to"),
    "a negative width": (lambda text: text.replace("32", "-32"), "from 1 to"),
    "a nest": (lambda text: "[" * 100_000, "nested too deeply|not valid JSON"),
    "a list": (lambda text: "[]", "expected a table"),
    "seventeen megabytes": (lambda text: text + " " * (17 << 20), "at most"),
    "a number of 100,000 digits": (
        lambda text: text.replace('"seed": 0', '"seed": ' + "9" * 100_000),
        "not valid JSON|seed",
    ),
    "another model": (lambda text: text.replace('"softplus"', '"tanh"'), "another configuration"),
    "bytes that are not UTF-8": (lambda text: text.encode() + b"\xff", "not valid JSON"),
    "a hundred thousand layers": (
        lambda text: text.replace("32,", "1,\n" * 100_000),
        "layers|sizes|at most",
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_configuration_that_is_not_ours_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    import re

    change, complaint = CONFIGS[kind]
    path = run / "config.json"
    text = path.read_text()
    changed = change(text)
    assert changed != text
    path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    message = _refused(run, capsys)
    assert re.search(complaint, message), message
    assert len(message) < 1000


def test_a_configuration_of_ours_is_strict_json(run: Path) -> None:
    config = read_json(run / "config.json")
    assert Config.from_json(config).to_json() == config
    assert json.loads((run / "config.json").read_text()) == config


def test_tensor_names_are_checked_against_the_expected_set(tmp_path: Path) -> None:
    like = {"a": {"kernel": jax.numpy.ones((2, 3))}, "b": jax.numpy.ones(2)}
    path = tmp_path / "params.safetensors"
    kernel, bias = np.ones((2, 3), np.float32), np.ones(2, np.float32)
    wrong = {
        "missing": {"b": bias},
        "extra": {"a": {"kernel": kernel}, "b": bias, "c": bias},
        "renamed": {"a": {"kernal": kernel}, "b": bias},
        "a path": {"../../a": {"kernel": kernel}, "b": bias},
        "another shape": {"a": {"kernel": kernel.T}, "b": bias},
        "another dtype": {"a": {"kernel": kernel.astype(np.float64)}, "b": bias},
    }
    for kind, tree in wrong.items():
        save_params(path, tree, {})
        with pytest.raises(CheckpointError, match=r"expected|missing") as caught:
            load_params(path, like)
        assert "\n" not in str(caught.value), kind
    assert [p.name for p in tmp_path.iterdir()] == ["params.safetensors"]
    save_params(path, like, {})
    loaded, _ = load_params(path, like)
    assert jax.tree.structure(loaded) == jax.tree.structure(like)


def test_a_tensor_that_is_not_in_the_record_is_refused(run: Path) -> None:
    """The record says what the file should hold; a file that holds more is not ours."""
    path = run / "params.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    tensors = safetensors.numpy.load(content)
    tensors["encoder.layer_9.kernel"] = np.ones((2, 2), np.float32)
    path.write_bytes(safetensors.numpy.save(tensors, header["__metadata__"]))
    with pytest.raises(CheckpointError, match=r"layer_9"):
        open_run(run)


@pytest.mark.parametrize("name", ["config.json", "params.safetensors"])
def test_symbolic_links_in_a_run_are_not_followed(
    run: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    elsewhere = run.parent / "elsewhere"
    shutil.move(run / name, elsewhere)
    (run / name).symlink_to(elsewhere)
    assert "symbolic link" in _refused(run, capsys)


@pytest.mark.parametrize("name", ["config.json", "params.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "directory", "device"])
def test_what_is_no_file_is_refused_and_does_not_block(
    run: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    (run / name).unlink()
    if kind == "pipe":
        os.mkfifo(run / name)
    elif kind == "directory":
        (run / name).mkdir()
    else:
        (run / name).symlink_to("/dev/zero")
    _refused(run, capsys)


def test_an_export_folder_that_is_a_link_is_not_followed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = run.parent / "target"
    target.mkdir()
    (run / "export").symlink_to(target)
    assert main(["export", str(run)]) == 2
    assert "symbolic link" in capsys.readouterr().err
    assert not list(target.iterdir())


def test_an_output_that_is_a_link_is_replaced_and_its_target_left_alone(run: Path) -> None:
    target, output = run.parent / "target.npy", run.parent / "scores.npy"
    target.write_text("precious")
    output.symlink_to(target)
    np.save(run.parent / "xs.npy", np.zeros((3, 64), np.float32))
    data = str(run.parent / "xs.npy")
    assert main(["score", str(run), "--data", data, "--output", str(output)]) == 0
    assert target.read_text() == "precious"
    assert not output.is_symlink()
    assert np.load(output).shape == (3, 2)


def test_the_standardisation_of_a_run_is_checked(run: Path) -> None:
    """It lies in the record of params.safetensors, under the record's own digest."""
    path = run / "params.safetensors"
    content = path.read_bytes()
    changed = content.replace(b'\\"standardization\\":', b'\\"standardizatiom\\":')
    if changed == content:
        changed = content.replace(b"standardization", b"standardizatiom")
    assert changed != content
    path.write_bytes(changed)
    with pytest.raises((CheckpointError, InputError), match=r"digest|damaged"):
        open_run(run)
