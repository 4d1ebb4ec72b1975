"""What the project promises about itself: its files, its words, its requirements."""

import ast
import doctest
import importlib
import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import jaxcae
from jaxcae import errors

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "jaxcae").rglob("*.py"))
    if path.stem != "__main__"  # importing it runs the command line
]


def _tracked() -> list[Path]:
    """List the tracked files, or every file of an exported copy without a repository."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        done = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        found = [ROOT / name for name in done.stdout.split("\0") if name]
        return [path for path in found if path.is_file()]
    skipped = {
        ".venv",
        ".git",
        ".hypothesis",
        ".benchmarks",
        "build",
        "dist",
        "__pycache__",
    }
    names = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return [
        ROOT / name
        for name in names
        if not skipped.intersection(name.parts)
        and not name.parts[0].endswith("_cache")
        and name.parts[0] != "runs"
    ]


def _texts() -> dict[str, str]:
    texts = {}
    for path in _tracked():
        data = path.read_bytes()
        if b"\0" not in data:
            texts[path.relative_to(ROOT).as_posix()] = data.decode()
    return texts


# --------------------------------------------------------------------------- tracked files

# Spelled so that this file does not contain what it looks for.
FORBIDDEN = {
    "a package registry's address": "|".join(
        [
            r"pypi\." + "org",
            "files." + "pythonhosted",
            r"download\.py" + r"torch\.org",
            "index-" + "url",
        ]
    ),
    "a machine's path": "|".join(
        [r"/ro" + r"ot/", r"/ho" + r"me/\w", r"/wo" + r"rk/", r"/Use" + r"rs/\w"]
    ),
    "a secret": "|".join(
        [r"BEGIN [A-Z ]*PRIVATE" + " KEY", r"gh[pousr]_\w{36}", r"AKI" + r"A[0-9A-Z]{16}"]
    ),
}


@pytest.mark.parametrize("what", sorted(FORBIDDEN))
def test_no_tracked_file_contains(what):
    """A clone must work anywhere and tell nothing of the machine it was written on."""
    pattern = re.compile(FORBIDDEN[what])
    texts = _texts()
    assert len(texts) > 20, "the list of files is not the project's"
    found = [
        f"{name}:{number}: {line.strip()[:80]}"
        for name, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


def test_no_data_or_binary_is_tracked_beyond_pictures():
    """Data comes from packages; what is large or binary does not belong in the repository."""
    for path in _tracked():
        size = path.stat().st_size
        assert size < 500_000, f"{path.name} has {size} bytes"
        if b"\0" in path.read_bytes() and path.suffix != ".png":
            # Runs that an earlier version wrote, which must stay readable; a few numbers each.
            assert path.is_relative_to(ROOT / "tests/format_0"), f"{path} is binary"
            assert size < 5_000, f"{path} has {size} bytes"


# --------------------------------------------------------------------------- requirements


def test_the_release_of_jaxlib_with_wrong_results_is_excluded():
    """Jaxlib 0.10.2 is silently wrong under jit on CPU; Python 3.11 would get exactly it."""
    requirements = {r.name: r for r in map(Requirement, PYPROJECT["project"]["dependencies"])}
    for name in ("jax", "jaxlib"):
        specifier = requirements[name].specifier
        assert not specifier.contains("0.10.2"), name
        assert not specifier.contains("0.10.0"), name
        for version in ("0.10.1", "0.11.0", "0.12.0"):
            assert specifier.contains(version), (name, version)


def test_torch_and_test_tools_stay_out_of_the_core_and_train():
    """A user who trains downloads no PyTorch and no test tools."""
    extras = PYPROJECT["project"]["optional-dependencies"]
    light = [*PYPROJECT["project"]["dependencies"], *extras["train"]]
    names = {Requirement(r).name for r in light}
    assert names.isdisjoint({"torch", "pytest", "hypothesis", "beartype", "equinox", "aeon"})
    (torch,) = (Requirement(r) for r in extras["parity"] if Requirement(r).name == "torch")
    assert not torch.specifier.contains("2.14")  # the first that brings CUDA by default


def test_the_tests_run_under_strict_settings(request):
    """The settings cannot be lost from pyproject.toml or conftest.py without this failing."""
    import jax

    assert "error" in request.config.getini("filterwarnings")
    assert request.config.getini("xfail_strict")
    assert jax.config.jax_numpy_rank_promotion == "raise"
    assert "pytest --without-torch --shapes" in (ROOT / ".ci/run").read_text()


@pytest.mark.slow
def test_shapes_are_checked_in_the_slow_tests():
    import numpy as np

    with pytest.raises(Exception, match="Type-check") as error:
        jaxcae.squared_error(np.zeros(3, np.int32), np.zeros(3, np.int32))
    assert "jaxtyping" in type(error.value).__module__ or "TypeCheck" in type(error.value).__name__


# --------------------------------------------------------------------------- words


@pytest.mark.parametrize("name", jaxcae.__all__)
def test_public_names_are_documented(name):
    """A docstring with its arguments and what comes back, or its attributes."""
    thing = getattr(jaxcae, name)
    if isinstance(thing, dict | str | tuple):
        assert _comment_of(name), f"{name} has no docstring or comment where it is defined"
        return
    text = inspect.getdoc(thing) or ""
    assert text.splitlines(), f"{name} has no docstring"
    assert text.splitlines()[0].endswith("."), name
    # One line may do where types say the rest: at most two arguments, both named there.
    if inspect.isclass(thing):
        assert "Attributes:" in text or len(text) > 40, name
        return
    parameters = list(inspect.signature(thing).parameters)
    elsewhere = re.search(r"those of `(\w+)`", " ".join(text.split()))
    if elsewhere:
        assert "Args:" in inspect.getdoc(getattr(jaxcae, elsewhere[1])), name
    elif len(parameters) > 2:
        assert "Args:" in text, name
        assert "Returns:" in text, name
        section = text[text.index("Args:") :]
        for parameter in parameters:
            assert re.search(rf"^\s+\**{parameter}\b", section, re.MULTILINE), (name, parameter)


def _comment_of(name: str) -> bool:
    """Find a string right after, or a comment right before, an assignment in any module."""
    for module in MODULES:
        lines = inspect.getsource(importlib.import_module(module)).splitlines()
        for number, line in enumerate(lines):
            if re.match(rf"{name}\b.*=", line):
                tree = ast.parse("\n".join(lines))
                following = {
                    a.targets[0].id if isinstance(a, ast.Assign) else a.target.id: b
                    for a, b in zip(tree.body, tree.body[1:], strict=False)
                    if isinstance(a, ast.Assign | ast.AnnAssign)
                    and isinstance(getattr(a, "target", None) or a.targets[0], ast.Name)
                }
                after = following.get(name)
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                return documented or lines[number - 1].startswith("#")
    return False


def test_all_names_what_there_is_in_order():
    """`__all__` is sorted and every name in it exists."""
    assert jaxcae.__all__ == sorted(jaxcae.__all__)
    assert all(hasattr(jaxcae, name) for name in jaxcae.__all__)


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    """Every example in a docstring gives what it says."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    imported = importlib.import_module(module)
    for test in finder.find(imported, module):
        failures: list[str] = []
        runner.run(test, out=failures.append)
        assert not failures, "".join(failures)


def test_the_readme_shows_the_two_commands_and_runs_its_python():
    """The two commands stand there as continuous integration runs them; sybil runs the blocks."""
    readme = (ROOT / "README.md").read_text()
    for command in COMMANDS:
        assert command in readme, command
    assert "```python" in readme


def test_continuous_integration_runs_the_readmes_second_command():
    """Word for word, so that the README cannot promise another."""
    assert COMMANDS[1] in (ROOT / ".ci/run").read_text()


COMMANDS = (
    "python3 -m venv .venv && .venv/bin/pip install -e '.[train]' && .venv/bin/jaxcae train",
    "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/python -m pytest",
)


# --------------------------------------------------------------------------- packaging


def test_no_licence_is_claimed():
    """Which one it gets is for the owner to say."""
    project = PYPROJECT["project"]
    assert not {"license", "license-files"} & project.keys()
    assert not [line for line in project["classifiers"] if line.startswith("License")]


@pytest.mark.parametrize(
    ("version", "offered"), [("standard", ["train"]), ("editable", ["dev", "test", "train"])]
)
def test_a_wheel_offers_no_extra_for_what_it_does_not_hold(version, offered, monkeypatch):
    """The hook of the build, called as hatchling calls it; a checkout has all extras."""
    plugin = types.ModuleType("hatchling.builders.hooks.plugin.interface")
    plugin.BuildHookInterface = object
    monkeypatch.setitem(sys.modules, plugin.__name__, plugin)
    path = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"]["custom"]["path"]
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    hook = module.WheelExtras()
    extras = dict(PYPROJECT["project"]["optional-dependencies"])
    core = types.SimpleNamespace(optional_dependencies=extras)
    hook.metadata = types.SimpleNamespace(core=core)
    hook.initialize(version, {})
    assert set(offered) <= set(extras)
    assert len(extras) == 1 or version == "editable"


def test_an_install_hint_works_from_a_checkout_and_from_a_wheel(tmp_path, monkeypatch):
    """The first by its path, from any folder; the second by name."""
    assert errors.install_hint("train") == f"pip install -e '{ROOT}[train]'"
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "site-packages/jaxcae/errors.py"))
    assert errors.install_hint("train") == "pip install 'jaxcae[train]'"
