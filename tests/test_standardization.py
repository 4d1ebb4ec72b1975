"""One mean and deviation per feature for the life of a run: fitted once, stored, applied to all."""

import contextlib
import io
import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from jaxcae import data
from jaxcae.cli import main
from jaxcae.results.scores import score_array, scores
from jaxcae.runs import open_run, read_config
from jaxcae.runs.checkpoints import Checkpoints
from jaxcae.runs.config import Config
from jaxcae.runs.material import load_material

SMALL = ("--sizes", "4", "3", "2", "--epochs", "2", "--save-every", "1")
SMALL += ("--no-compare", "--method", "reverse")
NAMES = "mass,pressure,valve,drift"
CONSTANT = "1 constant column(s) in the training split"


def train(path: Path, source: Path, *options: str) -> str:
    """Train in this process, where a warning is no error, and return what came on stderr."""
    argv = ["train", "--run-dir", str(path), "--data", str(source), "--standardize", "yes", *SMALL]
    err, out = io.StringIO(), io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(err),
        contextlib.redirect_stdout(out),
    ):
        warnings.simplefilter("default", UserWarning)
        assert main([*argv, *options, "--no-plots", "--json"]) == 0, err.getvalue()
    assert np.isfinite(
        json.loads(out.getvalue())["networks"]["contractive"]["after"]["reconstruction"]
    )
    return err.getvalue()


@pytest.fixture(scope="module")
def table() -> np.ndarray:
    """Four features in very different units; the third does not vary."""
    rng = np.random.default_rng(0)
    rows = rng.normal([1e3, 0, 7, -5], [1, 1e3, 0, 1e-3], (80, 4))
    return rows.astype(np.float32)


@pytest.fixture(scope="module")
def file(table: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "table.csv"
    np.savetxt(path, table, "%.17g", delimiter=",", header=NAMES, comments="")
    return path


@pytest.fixture(scope="module")
def finished(file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("runs") / "run"
    return path, train(path, file)


@pytest.fixture(scope="module")
def run_dir(finished: tuple[Path, str]) -> Path:
    return finished[0]


def test_the_run_keeps_mean_and_deviation_of_its_training_split(
    run_dir: Path, table: np.ndarray, file: Path
) -> None:
    run = open_run(run_dir)
    assert run.config.data.standardize == "yes"
    assert run.standardization is not None
    rows = data.split(data.load(file))[0].features.astype(np.float64)
    assert len(rows) == 64
    np.testing.assert_allclose(run.standardization.mean, rows.mean(0), rtol=1e-12)
    deviation = rows.std(0)
    deviation[2] = 1.0  # the constant column
    np.testing.assert_allclose(run.standardization.deviation, deviation, rtol=1e-12)


def test_a_constant_column_is_named(finished: tuple[Path, str]) -> None:
    assert finished[1].count("\n") == 1
    assert f"jaxcae train: warning: {CONSTANT}: valve." in finished[1]


@pytest.mark.filterwarnings("ignore:.*has no column names")
def test_scores_of_other_data_use_the_training_figures(
    run_dir: Path, table: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file with another mean and spread: standardised by its own, it would look normal."""
    run = open_run(run_dir)
    assert run.standardization is not None
    other = table[:20] * 2 + 3
    want = score_array(
        scores(run.model), run.params, (other - run.standardization.mean) / run.standardization[1]
    )
    np.save(tmp_path / "other.npy", other)
    np.savetxt(tmp_path / "other.csv", other, "%.9g", delimiter=",", comments="", header=NAMES)
    for name in ("other.npy", "other.csv"):
        output = tmp_path / "scores.npy"
        argv = ["score", str(run_dir), "--data", str(tmp_path / name), "--output", str(output)]
        assert main(argv) == 0
        np.testing.assert_allclose(np.load(output), np.stack(want, axis=1), rtol=1e-5)
    capsys.readouterr()


@pytest.mark.filterwarnings(f"ignore:{re.escape(CONSTANT)}")
def test_the_rest_of_the_commands_take_the_run_as_it_is(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(run_dir, tmp_path / "copy"))
    assert main(["info", str(copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["configuration"]["standardize"] == "yes"
    assert main(["info", str(copy), "--verify", "--json"]) == 0
    # What analyze looks at: the same digest, so the same standardised values.
    assert load_material(read_config(copy)).config == read_config(copy)
    last, *_ = reversed(Checkpoints(copy / "checkpoints").steps())
    shutil.rmtree(copy / "checkpoints" / str(last))
    (copy / "params.safetensors").unlink()
    assert main(["train", "--run-dir", str(copy), "--resume", "--no-plots", "--json"]) == 0
    whole = (run_dir / "params.safetensors").read_bytes()
    assert (copy / "params.safetensors").read_bytes() == whole
    capsys.readouterr()
    different = ["train", "--run-dir", str(copy), "--resume", "--standardize", "no"]
    assert main(different) == 2
    assert "--standardize: 'yes' in the run, 'no' asked" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "asked", "kept"),
    [("breast_cancer", "auto", "yes"), ("breast_cancer", "no", "no"), ("digits", "auto", "no")],
)
def test_the_data_decides_unless_told(name: str, asked: str, kept: str) -> None:
    material = load_material(Config.of(data=name, standardize=asked))
    assert material.config.data.standardize == kept
    assert (material.standardization is not None) == (kept == "yes")
    assert (abs(material.train.mean()) < 1e-6) == (kept == "yes")


@pytest.mark.filterwarnings(f"ignore:{re.escape(CONSTANT)}")
def test_a_streamed_run_fits_on_the_same_rows(
    table: np.ndarray, run_dir: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "table.npy", table)
    config = Config.of(data=str(tmp_path / "table.npy"), standardize="yes")
    streamed, loaded = load_material(config.replace(stream=True)), load_material(config)
    assert streamed.config.data.standardize == "yes"
    got, want = streamed.standardization, open_run(run_dir).standardization
    assert got is not None
    assert want is not None
    np.testing.assert_allclose(got.mean, want.mean, rtol=1e-12)
    np.testing.assert_allclose(got.deviation, want.deviation, rtol=1e-9)
    np.testing.assert_allclose(streamed.held_out, loaded.held_out, rtol=1e-6)
    batches = streamed.train.from_step(0)
    first = next(batches)
    batches.close()
    rows = {tuple(np.round(row, 3)) for row in loaded.train}
    assert {tuple(np.round(row, 3)) for row in first} == rows  # one batch holds all 64


def test_blocks_of_any_length_give_one_fit(rng: np.random.Generator) -> None:
    """A mean of 10⁵ deviations: a difference of sums of squares would be left with 6 digits."""
    rows = rng.normal(1e5, [1, 2, 3], (1000, 3))
    want = data.Standardization(rows.mean(0), rows.std(0))
    for cuts in ([], [1, 2, 500], [0, 999, 1000]):
        got = data.Standardization.fit_blocks(iter(np.split(rows, cuts)))
        np.testing.assert_allclose(got.mean, want.mean, rtol=1e-15)
        np.testing.assert_allclose(got.deviation, want.deviation, rtol=1e-10)
    again = got.invert(got.apply(rows))
    np.testing.assert_allclose(again, rows, rtol=1e-6)


def test_an_unknown_value_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--standardize", "maybe"]) == 2
    assert "choose from auto, yes, no" in capsys.readouterr().err
