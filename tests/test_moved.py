"""Names of an earlier version: scripts that import them go on working, and learn the new ones."""

import importlib
import subprocess
import sys
import warnings

import pytest

import jaxcae
from jaxcae._moved import MOVED

NAMES = {
    "jaxcae.anomaly": ("scores", "score_array", "Scores"),
    "jaxcae.analysis": ("singular_values", "contraction_ratios", "Spectrum"),
    "jaxcae.export": ("encoder_of", "scorer_of", "export_function"),
}
"""What scripts took from the old modules."""


@pytest.fixture(autouse=True)
def forgotten():
    """Let every test import the old names as if for the first time, and leave no trace."""
    before = dict(sys.modules)
    attributes = {name.rpartition(".")[2] for name in MOVED}
    kept = {name: jaxcae.__dict__.pop(name) for name in attributes & set(vars(jaxcae))}
    for name in MOVED:
        sys.modules.pop(name, None)
    yield
    for name in MOVED:
        sys.modules.pop(name, None)
        vars(jaxcae).pop(name.rpartition(".")[2], None)
    sys.modules.update(before)
    vars(jaxcae).update(kept)


def new_names(old: str) -> tuple[str, ...]:
    new = MOVED[old]
    return (new,) if isinstance(new, str) else new


@pytest.mark.parametrize("old", MOVED)
def test_an_old_module_is_the_new_one_and_says_so(old):
    with pytest.warns(DeprecationWarning, match=f"^{old} has moved") as caught:
        module = importlib.import_module(old)
    assert all(new in str(caught[0].message) for new in new_names(old))
    for new in new_names(old):
        target = importlib.import_module(new)
        for name in getattr(target, "__all__", [n for n in vars(target) if n[0] != "_"]):
            assert hasattr(module, name)
    for name in NAMES.get(old, ()):
        assert any(
            getattr(module, name) is getattr(importlib.import_module(new), name, None)
            for new in new_names(old)
        )


@pytest.mark.parametrize("old", MOVED)
def test_no_old_module_is_left_beside_the_new_one(old):
    """A file of the old name would be found first, and the table would never be asked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = importlib.import_module(old)
    assert module.__name__ in (old, *new_names(old))
    assert getattr(module, "__file__", None) != f"{jaxcae.__path__[0]}/{old.split('.')[1]}.py"


def test_the_warning_points_at_the_line_that_imports():
    """Seen from outside: the type checks of these tests stand between an import and its line."""
    code = "import jaxcae\nfrom jaxcae.anomaly import scores"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stderr.startswith("<string>:2: DeprecationWarning: jaxcae.anomaly has moved")


def test_an_old_module_can_be_written_as_an_attribute():
    with pytest.warns(DeprecationWarning, match=r"jaxcae\.analysis has moved"):
        assert jaxcae.analysis.singular_values
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = jaxcae.nothing


def test_an_old_module_that_was_divided_has_the_names_of_all_its_parts(monkeypatch):
    monkeypatch.setitem(MOVED, "jaxcae.old", ("jaxcae.results.scores", "jaxcae.results.export"))
    with pytest.warns(DeprecationWarning, match="or jaxcae.results.export"):
        module = importlib.import_module("jaxcae.old")
    assert module.score_array
    assert module.export_function
