"""From training to export the columns of a run are found by name, and filled in as they were."""

import contextlib
import io
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from jaxcae.cli import main
from jaxcae.errors import InputError
from jaxcae.runs import RunDirectory, open_run, read_config
from jaxcae.runs.checkpoints import Checkpoints
from jaxcae.runs.config import Config
from jaxcae.runs.material import load_material

NAMES = ["seconds", "temp", "pressure", "flow"]
SMALL = ("--sizes", "4", "3", "2", "--epochs", "2", "--no-compare", "--method", "reverse")


def jaxcae(*argv: object, code: int = 0) -> tuple[str, str]:
    """Run a command in this process, where a warning is no error; return stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        warnings.simplefilter("always", UserWarning)
        assert main([str(a) for a in argv]) == code, err.getvalue()
    return out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = rng.normal([0, 20, 1000, 0.5], [1, 1, 3, 0.05], (60, 4))
    rows[:, 0] = 1_732_545_000 + 10 * np.arange(60)
    frame = pd.DataFrame(rows, columns=NAMES)
    frame.insert(0, "when", ["09:54"] * 60)
    frame["is_anomaly"] = np.arange(60) % 7 == 0
    return frame


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, table: pd.DataFrame) -> Path:
    folder = tmp_path_factory.mktemp("named")
    table.to_csv(folder / "table.csv", index=False)
    argv = ["--label-column", "is_anomaly", "--drop", "when", "--missing", "mean", *SMALL]
    argv += ["--standardize", "yes", "--no-plots", "--run-dir", folder / "run"]
    _, err = jaxcae("train", "--data", folder / "table.csv", *argv)
    told = "header in line 1; label column is_anomaly; without when; 4 features: "
    assert f"table.csv: {told}{', '.join(NAMES)}." in err
    return folder / "run"


def score(run: Path, path: Path, *options: str, code: int = 0) -> tuple[np.ndarray, str]:
    output = path.with_suffix(".scores.npy")
    _, err = jaxcae("score", run, "--data", path, "--output", output, *options, code=code)
    return np.load(output) if not code else np.empty(0), err


@pytest.fixture(scope="module")
def scores(run: Path) -> np.ndarray:
    return score(run, run.parent / "table.csv")[0]


def test_names_are_kept_with_run_parameters_and_checkpoints(run: Path) -> None:
    assert read_config(run).data.feature_names == tuple(NAMES)
    trained = open_run(run)
    assert trained.preparation.feature_names == tuple(NAMES)
    assert trained.record["config"]["data"]["feature_names"] == NAMES
    checkpoints = Checkpoints(run / "checkpoints")
    record = checkpoints.read_record(checkpoints.steps()[-1])
    assert record["config"]["data"]["feature_names"] == NAMES


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
def test_other_orders_and_more_columns_score_the_same(
    run: Path, scores: np.ndarray, table: pd.DataFrame, tmp_path: Path, suffix: str
) -> None:
    other = table[[*reversed(NAMES), "when"]]  # and no labels, which a run does without
    path = tmp_path / f"a{suffix}"
    other.to_parquet(path) if suffix == ".parquet" else other.to_csv(path, index=False)
    np.testing.assert_array_equal(score(run, path)[0], scores)
    other.assign(humidity=1.0).to_csv(tmp_path / "b.csv", index=False)
    _, err = score(run, tmp_path / "b.csv", code=2)
    assert "humidity is not known to it. Use --drop" in err
    got, _ = score(run, tmp_path / "b.csv", "--drop", "humidity")
    np.testing.assert_array_equal(got, scores)
    other.drop(columns="flow").to_csv(tmp_path / "b.csv", index=False)
    _, err = score(run, tmp_path / "b.csv", code=2)
    assert "flow is missing" in err
    assert err.count("\n") == 1


def test_data_without_names_is_told(
    run: Path, scores: np.ndarray, table: pd.DataFrame, tmp_path: Path
) -> None:
    np.save(tmp_path / "a.npy", table[NAMES].to_numpy())
    got, err = score(run, tmp_path / "a.npy")
    assert "no column names; its columns are taken to be seconds, temp, pressure, flow" in err
    np.testing.assert_array_equal(got, scores)


def test_missing_cells_take_the_means_of_the_training_split(
    run: Path, scores: np.ndarray, table: pd.DataFrame, tmp_path: Path
) -> None:
    holes = table.astype({"temp": object}).copy()
    holes.loc[[3, 5], "temp"] = ""
    holes.to_csv(tmp_path / "a.csv", index=False)
    filled = table.copy()
    filled.loc[[3, 5], "temp"] = open_run(run).preparation.fill[1]
    filled.to_csv(tmp_path / "b.csv", index=False)
    got, want = (score(run, tmp_path / name)[0] for name in ("a.csv", "b.csv"))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    dropped, err = score(run, tmp_path / "a.csv", "--missing", "drop")
    assert "2 of 60 rows have missing cells; their scores are nan" in err
    assert np.flatnonzero(np.isnan(dropped).any(1)).tolist() == [3, 5]
    whole = ~np.isnan(dropped).any(1)
    np.testing.assert_array_equal(dropped[whole], scores[whole])
    _, err = score(run, tmp_path / "a.csv", "--missing", "refuse", code=2)
    assert "line 5, column 3: the cell is empty" in err


def test_a_run_goes_on_and_is_analysed_on_reordered_data(
    run: Path, table: pd.DataFrame, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(run.parent, tmp_path / "named"))
    config = json.loads((folder / "run/config.json").read_text())
    path = Path(config["data"]["source"])
    before = path.read_bytes()
    try:
        table[["is_anomaly", *reversed(NAMES), "when"]].to_csv(path, index=False)
        jaxcae("train", "--run-dir", folder / "run", "--resume", "--no-plots", "--json")
        assert load_material(read_config(folder / "run")).config == read_config(folder / "run")
        table.rename(columns={"flow": "flux"}).to_csv(path, index=False)
        for command in (
            ("train", "--run-dir", folder / "run", "--resume", "--no-plots"),
            ("analyze", folder / "run", "--no-plots"),
        ):
            _, err = jaxcae(*command, code=2)
            assert "flow is missing; flux is not known" in err
    finally:
        path.write_bytes(before)


def test_an_export_says_its_columns_and_what_it_takes(run: Path, tmp_path: Path) -> None:
    out, err = jaxcae("export", run, "--platforms", "cuda", "--output", tmp_path, "--json")
    assert json.loads(out)["artefacts"]
    summary = json.loads((tmp_path / "export.json").read_text())
    assert summary["feature_names"] == NAMES
    assert summary["inputs"] == "standardised"  # float32 cannot hold the seconds
    assert "samples that are standardised already" in err
    got = summary["standardization"]
    assert got["mean"] == open_run(run).preparation.standardization.mean.tolist()


def test_a_run_of_very_many_columns_can_be_opened(tmp_path: Path) -> None:
    names = tuple(f"sensor_{i}/mean" for i in range(60_000))
    config = Config.of(data="a.csv", feature_names=names)
    with RunDirectory.create(tmp_path / "run") as run:
        run.start(config)
    assert read_config(tmp_path / "run") == config
    with pytest.raises(InputError, match="take more than"):
        Config.of(feature_names=("x" * 2**22, "y")).check()


def test_raw_scales_are_told_unless_asked_for(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "a.npy", (255 * rng.random((20, 4))).astype(np.uint8))
    with pytest.warns(UserWarning, match="is not standardised.*`standardize='yes'`"):
        load_material(Config.of(data=str(tmp_path / "a.npy")))
    load_material(Config.of(data=str(tmp_path / "a.npy"), standardize="no"))


def test_data_of_the_first_format_is_read_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its digest is that of values that were narrowed before they were standardised."""
    monkeypatch.chdir(Path(__file__).parent / "format_0")
    for name in ("finished", "unfinished"):
        config = read_config(Path(name))
        assert load_material(config).config.data.digest == config.data.digest
