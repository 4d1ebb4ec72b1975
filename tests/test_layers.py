"""The layers point one way: what a file may import, read from its syntax and never run."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module or package and the layer it lies in; the longest match counts. A file imports from its
# own layer and from those below. Every file must match: a new one is placed here first.
LAYERS = {
    "jaxcae.__version__": 0,
    "jaxcae._moved": 0,
    "jaxcae.words": 0,
    "jaxcae.errors": 0,
    "jaxcae.types": 0,
    "jaxcae.activations": 0,
    "jaxcae.devices": 1,
    "jaxcae.models": 1,
    "jaxcae.jacobian": 1,
    "jaxcae.penalty": 1,
    "jaxcae.difference": 1,
    "jaxcae.divergence": 1,
    "jaxcae.objective": 2,
    "jaxcae.files": 3,
    "jaxcae.data": 3,
    "jaxcae.training": 3,
    "jaxcae.runs": 4,
    "jaxcae.results": 5,
    "jaxcae.selftest": 5,
    "jaxcae.timing": 5,
    "jaxcae.plotting": 5,
    "jaxcae.cli": 7,
    "jaxcae.__main__": 7,
}
# The door of the library: it gathers public names from anywhere below the command line. It has no
# layer, so no file of the library can come back in through it.
DOOR = "jaxcae"
INSIDE = "jaxcae._public"  # what the door opens on

# Who may import a package that is heavy or belongs to one place.
CONFINED = {
    "torch": ("parity", "benchmarks"),
    "matplotlib": ("jaxcae.plotting", "parity", "benchmarks"),
    "tyro": ("jaxcae.cli", "parity", "benchmarks"),
    "rich": ("jaxcae.cli", "parity", "benchmarks"),
    "pickle": (),
    "joblib": (),
    "cloudpickle": (),
    "dill": (),
}
HOUSES = {"jaxcae": set(), "parity": {"jaxcae"}, "benchmarks": {"jaxcae", "parity"}}
# rich is not here: flax, which TrainState needs, imports it itself.
HEAVY = (
    *("torch", "sklearn", "matplotlib", "tyro", "orbax", "grain", "mlxtend", "river", "pandas"),
    *("equinox", "flax.nnx", "pyarrow", "narwhals", "polars"),
)


def _files(house: str) -> list[Path]:
    return sorted((ROOT / house).rglob("*.py"))


FILES = [path for house in HOUSES for path in _files(house)]


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(path) for path in FILES}


def imports(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Yield the full name of every import in a source file, those inside functions included."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # The name may be a module; the longest match sorts it either way.
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)


def layer(module: str) -> int | None:
    """Find the layer of a module by the longest name that it begins with."""
    parts = module.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((LAYERS[name] for name in names if name in LAYERS), None)


def upward(source: str, module: str, is_package: bool = False) -> list[str]:
    """List the imports of a file that lie above it."""
    own = layer(module)
    assert own is not None, f"{module} is in no layer: give it one in LAYERS"
    found = []
    for target in imports(source, module, is_package):
        above = layer(target)
        if target.split(".")[0] == DOOR and (above is None or above > own):
            found.append(target)
    return found


def misplaced(source: str, module: str, is_package: bool = False) -> list[str]:
    """List the imports that this file's place in the project does not allow."""
    house = module.split(".")[0]
    found = []
    for target in imports(source, module, is_package):
        top = target.split(".")[0]
        allowed = CONFINED.get(top)
        if allowed is not None and not any(
            module == name or module.startswith(f"{name}.") for name in allowed
        ):
            found.append(target)
        if top in (*HOUSES, "tests") and top != house and top not in HOUSES[house]:
            found.append(target)
        if module.startswith("jaxcae.plotting") and top in ("jax", "jaxlib", "flax", "optax"):
            found.append(target)
    return found


def _over(files: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", files, ids=[_module(path) for path in files])


@_over([path for path in _files("jaxcae") if _module(path) not in (DOOR, INSIDE)])
def test_no_arrow_points_upward(path):
    """Each file of the library imports from its own layer or below, and not through the door."""
    assert upward(path.read_text(), _module(path), path.name == "__init__.py") == []


@_over(FILES)
def test_packages_stay_where_they_belong(path):
    """Torch in parity, figures in plotting, pickle nowhere; houses do not point back."""
    assert misplaced(path.read_text(), _module(path), path.name == "__init__.py") == []


def test_the_door_leads_to_the_library_and_not_to_the_command_line():
    """`import jaxcae` never imports what parses arguments."""
    for name, is_package in (("__init__", True), ("_public", False)):
        found = imports((ROOT / f"jaxcae/{name}.py").read_text(), DOOR, is_package)
        assert [name for name in found if (layer(name) or 0) >= 7] == []


def test_every_layer_entry_names_a_module():
    """A renamed file takes its entry with it."""
    assert set(LAYERS) - MODULES == {"jaxcae.__version__"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jaxcae.types", "from jaxcae.models import mlp"),
        ("jaxcae.models.mlp", "from jaxcae import objective"),
        ("jaxcae.models.mlp", "from ..objective import cae_loss"),
        ("jaxcae.jacobian.chain", "def f():\n    import jaxcae.training"),
        ("jaxcae.objective.losses", "import importlib\nimportlib.import_module('jaxcae.cli')"),
        ("jaxcae.cli.train", "from jaxcae import mlp"),
    ],
)
def test_an_upward_arrow_is_found(module, source):
    """The guard itself: each of these must be reported."""
    assert upward(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jaxcae.results.scores", "import torch"),
        ("jaxcae.results.analysis", "def f():\n    from matplotlib import pyplot"),
        ("jaxcae.plotting.curves", "import jax.numpy as jnp"),
        ("jaxcae.runs.checkpoints", "import pickle"),
        ("jaxcae.training", "from parity import run"),
        ("parity.run", "from benchmarks import harness"),
        ("parity.run", "import tests.reference"),
    ],
)
def test_a_misplaced_package_is_found(module, source):
    """The guard itself, for packages and houses."""
    assert misplaced(source, module)


def test_the_reference_is_independent():
    """The brute-force reference imports NumPy and SciPy, no JAX and nothing of the library."""
    found = imports((ROOT / "tests/reference.py").read_text(), "tests.reference")
    tops = {name.split(".")[0] for name in found}
    assert tops <= {"collections", "itertools", "typing", "numpy", "scipy"}


def test_importing_the_library_loads_nothing_heavy():
    """In a fresh interpreter: names only, so that `import jaxcae` costs what JAX costs."""
    code = f"import sys; from jaxcae import *; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_importing_the_library_changes_no_setting_and_starts_no_backend():
    """x64 stays off, and devices are left for the caller to configure."""
    code = (
        "import jax; before = dict(jax.config.values); from jaxcae import *; "
        "after = {name: jax.config.values[name] for name in before}; "
        "assert after == before, 'a setting changed'; "
        "jax.config.update('jax_num_cpu_devices', 3); assert jax.device_count() == 3"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
