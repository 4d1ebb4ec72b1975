"""Export: artefacts that need no jaxcae, agree with the run, and are refused when they do not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import export

import jaxcae
from jaxcae import data
from jaxcae.cli import export as command
from jaxcae.cli import main
from jaxcae.errors import InputError
from jaxcae.files import sha256
from jaxcae.results import export as exporting
from jaxcae.results.scores import scores
from jaxcae.runs import open_run
from tests.tolerances import assert_close, assert_each_close
from tests.trained import fingerprint, train_digits, train_tabular


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = train_digits(tmp_path_factory.mktemp("export") / "run")
    assert main(["export", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def tabular_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = train_tabular(tmp_path_factory.mktemp("export") / "run")
    assert main(["export", str(run)]) == 0
    return run


def _read(path: Path) -> export.Exported:
    return export.deserialize(bytearray(path.read_bytes()))


def test_artefacts_hold_three_platforms_and_any_batch(digits_run: Path) -> None:
    for name in ("encoder", "scorer"):
        artefact = _read(digits_run / "export" / f"{name}.jaxexport")
        assert artefact.platforms == ("cpu", "cuda", "tpu")
        (aval,) = artefact.in_avals
        assert export.is_symbolic_dim(aval.shape[0])
        assert aval.shape[1] == 64
        assert aval.dtype == np.float32


def test_products_are_asked_for_in_full_precision(digits_run: Path) -> None:
    module = _read(digits_run / "export" / "encoder.jaxexport").mlir_module()
    products = [line for line in module.splitlines() if "stablehlo.dot_general" in line]
    assert products
    assert all("HIGHEST, HIGHEST" in line for line in products)


@pytest.mark.parametrize("batch", [1, 2, 129])
def test_the_encoder_is_the_run_s(digits_run: Path, batch: int, rng: np.random.Generator) -> None:
    xs = rng.random((batch, 64), np.float32)
    run = open_run(digits_run)
    want = jax.vmap(run.model.encode, (None, 0))(run.params, xs)
    got = _read(digits_run / "export" / "encoder.jaxexport").call(xs)
    assert got.shape == (batch, 8)
    assert_close(got, want, "float32")


@pytest.mark.filterwarnings("default:.*has no column names")  # said of the tabular samples
@pytest.mark.parametrize("kind", ["digits", "tabular"])
def test_the_scorer_says_what_score_says(
    kind: str, digits_run: Path, tabular_run: Path, tmp_path: Path
) -> None:
    """Also where features were standardised: the artefact takes them in their own units."""
    run = digits_run if kind == "digits" else tabular_run
    xs = data.load("digits" if kind == "digits" else "breast_cancer").features[:333]
    np.save(tmp_path / "xs.npy", xs)
    output = tmp_path / "scores.npy"
    assert (
        main(["score", str(run), "--data", str(tmp_path / "xs.npy"), "--output", str(output)]) == 0
    )
    got = _read(run / "export" / "scorer.jaxexport").call(xs)
    want = np.load(output)
    assert_each_close(got["reconstruction_error"], want[:, 0], "float32")
    assert_each_close(got["jacobian_norm"], want[:, 1], "float32")


def test_the_manifest_tells_what_there_is(digits_run: Path) -> None:
    folder = digits_run / "export"
    manifest = json.loads((folder / "export.json").read_text())
    assert set(manifest["artefacts"]) == {"encoder", "scorer"}
    for name, entry in manifest["artefacts"].items():
        content = (folder / f"{name}.jaxexport").read_bytes()
        assert entry["sha256"] == sha256(content)
        assert entry["input"] == "float32[batch, 64]"
        assert entry["relative_difference"] <= command.TOLERANCE
    assert manifest["artefacts"]["encoder"]["output"] == {"result": "float32[batch, 8]"}
    assert manifest["config"]["model"]["sizes"] == [64, 32, 8]


def test_it_is_called_where_jaxcae_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    artefact = exporting.export_function(lambda xs: 2 * xs, 3)
    xs = np.ones((4, 3), np.float32)
    (result,) = exporting.call_elsewhere(artefact, [xs])
    np.testing.assert_array_equal(result["result"], 2 * xs)
    importing = exporting._ELSEWHERE.replace("import sys", "import sys, jaxcae")
    monkeypatch.setattr(exporting, "_ELSEWHERE", importing)
    with pytest.raises(RuntimeError, match="jaxcae was imported"):
        exporting.call_elsewhere(artefact, [xs])


def test_damaged_artefacts_fail_there_and_not_here(capfd: pytest.CaptureFixture[str]) -> None:
    artefact = exporting.export_function(lambda xs: 2 * xs, 3)
    with pytest.raises(RuntimeError, match="failed in a new process"):
        exporting.call_elsewhere(artefact[: len(artefact) // 2], [np.ones((4, 3), np.float32)])


def test_the_comparison_sees_a_small_difference() -> None:
    artefact = exporting.export_function(lambda xs: xs * np.float32(1.0001), 3)
    xs = [np.ones((4, 3), np.float32)]
    assert exporting.compare(lambda xs: xs, artefact, xs) == pytest.approx(1e-4, rel=0.01)
    assert exporting.compare(lambda xs: xs * np.float32(1.0001), artefact, xs) == 0


def test_an_artefact_that_differs_is_not_written(
    digits_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = command.export_function

    def wrong(function: Callable, width: int, platforms: tuple[str, ...]) -> bytes:
        bend = lambda value: value * np.float32(1.001)  # noqa: E731
        return original(lambda xs: jax.tree.map(bend, function(xs)), width, platforms)

    monkeypatch.setattr(command, "export_function", wrong)
    folder = tmp_path / "out"
    assert main(["export", str(digits_run), "--output", str(folder)]) == 1
    assert "differs from the original by 0.001" in capsys.readouterr().err
    assert not list(folder.iterdir())


def test_another_platform_can_be_exported_for_without_having_it(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert main(["export", str(digits_run), "--output", str(folder), "--platforms", "tpu"]) == 0
    assert "not compared" in capsys.readouterr().out
    artefact = _read(folder / "encoder.jaxexport")
    assert artefact.platforms == ("tpu",)
    with pytest.raises(ValueError, match="tpu"):
        artefact.call(np.ones((1, 64), np.float32))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--platforms", "cpu", "tpus"), "unknown platform 'tpus'.*Did you mean 'tpu'"),
        (("--network", "simple"), "contractive and plain"),
        (("--output", "missing/out"), "cannot be written to"),
    ],
)
def test_misuse_is_refused(
    digits_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    complaint: str,
) -> None:
    import re

    monkeypatch.chdir(tmp_path)
    before = fingerprint(digits_run)
    assert main(["export", str(digits_run), *options]) == 2
    message = capsys.readouterr().err
    assert re.search(complaint, message), message
    assert fingerprint(digits_run) == before
    assert not list(tmp_path.iterdir())


def test_a_missing_flatbuffers_gets_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    find = exporting.importlib.util.find_spec
    monkeypatch.setattr(
        exporting.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "flatbuffers" else find(name, *rest),
    )
    with pytest.raises(ValueError, match="pip install flatbuffers"):
        exporting.export_function(lambda xs: xs, 3)


def test_what_calls_back_to_python_is_refused_in_a_line() -> None:
    def printing(params: object, x: jax.Array) -> jax.Array:
        jax.debug.print("{}", x[0])
        return x[:2]

    model = jaxcae.Autoencoder(lambda key: {}, printing, lambda params, z: z)
    for function in (exporting.encoder_of(model, {}), exporting.scorer_of(model, {})):
        with pytest.raises(InputError, match="calls back to Python"):
            exporting.export_function(function, 2)


def test_a_run_that_is_replaced_takes_its_export_with_it(digits_run: Path, tmp_path: Path) -> None:
    from jaxcae.runs import RunDirectory

    run = Path(shutil.copytree(digits_run, tmp_path / "run"))
    assert (run / "export" / "export.json").exists()
    config = open_run(run).config
    with RunDirectory.create(run, overwrite=True) as directory:
        directory.start(config)
    assert not (run / "export").exists()


def test_a_scorer_in_chunks_is_exported_for_any_batch():
    """Where the whole batch would not fit: chunks of a batch whose size is not known."""
    model = jaxcae.mlp((4, 6, 5, 2), "tanh")
    params = model.init(jax.random.key(0))
    score = scores(model, memory_budget=3000)
    artefact = exporting.export_function(lambda xs: score(params, xs).jacobian_norm, 4, ("cpu",))
    exported = export.deserialize(bytearray(artefact))
    assert "while" in exported.mlir_module()
    for size in (1, 5, 9):
        xs = np.random.default_rng(0).random((size, 4), np.float32)
        squared = jaxcae.contractive_penalty(model.encode, "reverse")(params, xs)
        np.testing.assert_allclose(exported.call(xs), np.sqrt(squared), rtol=1e-5)
