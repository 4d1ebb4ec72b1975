"""Strict settings for every test, and the few fixtures that the tests share.

Warnings are errors (pyproject.toml), and the settings below refuse what JAX would let pass. Shapes
and types in annotations of `jaxcae` are checked by beartype in every call that a slow test makes,
and with `--shapes`; that takes a fifth of the time.
"""

import ast
import functools
import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import jax
import jaxtyping
import matplotlib
import numpy as np
import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from threadpoolctl import threadpool_limits

SHAPE_CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
"""The numeric tower lets an int pass for a float, as it does for mypy."""

pytest.register_assert_rewrite("tests.reference", "tests.tolerances")

# A sum of shapes (n,) and (m, n) is more often a mistake than a wish.
jax.config.update("jax_numpy_rank_promotion", "raise")
# Raw uint32 keys are refused: keys come from jax.random.key.
jax.config.update("jax_legacy_prng_key", "error")
# The sharding tests need more than one device; this must precede the first use of a backend.
jax.config.update("jax_num_cpu_devices", 4)
matplotlib.use("Agg")
# Two processes share the cores already. A second thread of NumPy's BLAS or of PyTorch in each does
# nothing but wait for its turn, busily: the reference took eight seconds of processor time for one.
threadpool_limits(limits=1, user_api="blas")
os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # of libraries loaded later

# Derandomised: a failure on one machine is a failure on every machine. No deadline: the first
# example of a shape compiles, which takes a thousand times longer than the others.
hypothesis.settings.register_profile(
    "jaxcae",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=25,
    print_blob=False,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        # x64 is the same for every example, so it need not be set up again for each.
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
)
hypothesis.settings.load_profile("jaxcae")


class ReadmeBlocks:
    """Collect the README's Python blocks as tests; they share one namespace, top to bottom.

    Registered as a plugin because the README lies above this file, where the hooks of a
    conftest do not reach.
    """

    def __init__(self, root: Path) -> None:
        """Make the collector for the README in `root`."""
        self._collect = Sybil(
            parsers=[PythonCodeBlockParser()], path=str(root), filenames=["README.md"]
        ).pytest()

    def pytest_collect_file(self, file_path: Path, parent: pytest.Collector) -> object:
        """Hand the README to sybil."""
        return self._collect(file_path, parent)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options by which one environment, or one run, tests less or more."""
    parser.addoption(
        "--without-torch",
        action="store_true",
        help="leave out the test files that import torch, or the houses that need it",
    )
    parser.addoption(
        "--shapes",
        action="store_true",
        help="check shapes and types in every call of jaxcae, as the slow tests always do",
    )


@functools.cache
def _needs_torch(path: Path) -> bool:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        if any(name.split(".")[0] in ("torch", "parity", "benchmarks") for name in names):
            return True
    return False


def _left_out(config: pytest.Config) -> list[Path]:
    if not config.getoption("--without-torch"):
        return []
    return [path for path in sorted(Path(__file__).parent.glob("test_*.py")) if _needs_torch(path)]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out what `--without-torch` leaves out; the header names it."""
    return True if collection_path in _left_out(config) else None


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say which JAX is tested, and which files are left out."""
    names = ", ".join(path.name for path in _left_out(config))
    return [
        f"jax {jax.__version__}, {jax.default_backend()}",
        *([f"without torch, left out: {names}"] if names else []),
    ]


def pytest_configure(config: pytest.Config) -> None:
    """Register the collector of the README's blocks, and make a folder that processes share.

    The default tests compile thousands of programs and run most of them once, so most of their
    time went into LLVM's optimisation and MLIR's fusions, into noting lines of source, and into
    collecting what tracing leaves. What XLA makes of a program, and its count of operations, stay
    the same. The slow tests, the real sizes of the contract and the second run of `.ci/run` on the
    newest JAX (which sets XLA_FLAGS) take programs as users get them.
    """
    config.pluginmanager.register(ReadmeBlocks(config.rootpath), "readme-blocks")
    if "JAXCAE_TESTS_SHARED" not in os.environ:  # a worker has it from the process that began
        shared = os.environ["JAXCAE_TESTS_SHARED"] = tempfile.mkdtemp(prefix="jaxcae-tests-")
        config.add_cleanup(lambda: shutil.rmtree(shared, ignore_errors=True))
    if config.option.markexpr != "not slow" or config.getoption("--shapes"):
        jaxtyping.install_import_hook("jaxcae", SHAPE_CHECKER)
    if config.option.markexpr == "not slow":
        os.environ.setdefault("XLA_FLAGS", " ".join(_quick_to_compile()))
        jax.config.update("jax_traceback_in_locations_limit", 0)
        gc.set_threshold(200_000, 50, 50)


def _quick_to_compile() -> list[str]:
    flags = ["--xla_backend_optimization_level=0"]
    if jax.__version_info__ < (0, 11):  # XLA ends the process at a flag that it does not know
        flags.append("--xla_cpu_use_fusion_emitters=false")
    return flags


@pytest.fixture
def x64() -> Iterator[None]:
    """Enable float64 for one test. The library must never do this for its user."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def _settings_stay() -> Iterator[None]:
    """Fail the test during which a global setting of JAX was changed and left so."""
    before = _global_settings()
    yield
    assert _global_settings() == before, "a global JAX setting was changed and not restored"


def _global_settings() -> tuple[object, ...]:
    return (
        jax.config.jax_numpy_rank_promotion,
        jax.config.jax_default_matmul_precision,
        jax.config.jax_debug_nans,
        jax.config.read("jax_enable_x64"),
    )


@pytest.fixture(autouse=True, scope="module")
def _caches_emptied() -> Iterator[None]:
    """Drop compiled programs once they hold much: those of all files, more than four gigabytes.

    Below that, what one file has compiled (operations outside `jit` above all) serves the next.
    """
    yield
    if _resident_bytes() > 2e9:
        jax.clear_caches()


def _resident_bytes() -> float:
    pages = Path("/proc/self/statm")
    if not pages.exists():
        return float("inf")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def rng() -> np.random.Generator:
    """Give a NumPy generator with a fixed seed, so that tests do not depend on their order."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def _compile_events() -> list[str]:
    events: list[str] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return events


@pytest.fixture
def compilations(_compile_events: list[str]) -> Callable[[], int]:
    """Give a function that returns how many XLA compilations this process has made so far."""
    return lambda: len(_compile_events)


@pytest.fixture
def untyped() -> Iterator[None]:
    """Switch the type checks off, to see the errors that a user without them gets."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
