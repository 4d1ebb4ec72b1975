"""Scoring: against NumPy, without influence of neighbours, checked against the run, atomic."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxcae
from jaxcae import data
from jaxcae.cli import main
from jaxcae.results.scores import Scores, score_array, score_in_chunks, scores
from jaxcae.runs import open_run
from jaxcae.runs.params_file import save_params
from tests import reference as ref
from tests.some import some
from tests.tolerances import assert_each_close
from tests.trained import fingerprint, train_digits, train_tabular


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_digits(tmp_path_factory.mktemp("score") / "run")


@pytest.fixture(scope="module")
def tabular_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tabular(tmp_path_factory.mktemp("score") / "run")


@pytest.fixture
def samples(tmp_path: Path, rng: np.random.Generator) -> Path:
    np.save(tmp_path / "samples.npy", rng.random((300, 64), np.float32))
    return tmp_path / "samples.npy"


def _layers(params: dict, part: str) -> list[ref.Dense]:
    layers = params[part]
    return [
        ref.Dense(
            *(np.asarray(layers[f"layer_{i}"][leaf], np.float64) for leaf in ("kernel", "bias"))
        )
        for i in range(len(layers))
    ]


def test_scores_are_the_definitions(digits_run: Path, samples: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.npy"
    assert main(["score", str(digits_run), "--data", str(samples), "--output", str(output)]) == 0
    got = np.load(output)
    run = open_run(digits_run)
    xs = np.load(samples).astype(np.float64)
    codes, norms = ref.mlp_penalty(_layers(run.params, "encoder"), xs, "softplus")
    x_hats = [ref.mlp(_layers(run.params, "decoder"), z, "softplus", "sigmoid") for z in codes]
    errors = [ref.squared_error(x, x_hat) for x, x_hat in zip(xs, x_hats, strict=True)]
    assert got.dtype == np.float32
    assert_each_close(got[:, 0], errors, "float32")
    assert_each_close(got[:, 1], np.sqrt(norms), "float32")


def test_csv_and_npy_hold_the_same_bits(digits_run: Path, samples: Path, tmp_path: Path) -> None:
    for name in ("a.csv", "a.npy"):
        assert (
            main(
                ["score", str(digits_run), "--data", str(samples), "--output", str(tmp_path / name)]
            )
            == 0
        )
    text = (tmp_path / "a.csv").read_text().splitlines()
    assert text[0] == "reconstruction_error,jacobian_norm"
    table = np.array([line.split(",") for line in text[1:]], np.float32)
    np.testing.assert_array_equal(table, np.load(tmp_path / "a.npy"))
    # It is a file that our own strict reader takes.
    np.testing.assert_array_equal(data.load(tmp_path / "a.csv").features, table)


@pytest.mark.parametrize(
    "sizes", [(784, 256, 64), (30, 17, 5), (64, 32, 16, 5)], ids=lambda s: "-".join(map(str, s))
)
@pytest.mark.parametrize("method", some(["auto", "reverse"], ["auto"]))
def test_a_score_does_not_depend_on_its_neighbours(
    sizes: tuple[int, ...], method: str, rng: np.random.Generator
) -> None:
    """Bit for bit: in another order, among fewer, alone, and among enormous neighbours."""
    model = jaxcae.mlp(sizes, "softplus")
    params = model.init(jax.random.key(0))
    xs = rng.random((600, sizes[0]), np.float32)
    score = scores(model, method=method)
    whole = score_array(score, params, xs)
    order = rng.permutation(len(xs))
    _assert_same(score_array(score, params, xs[order]), whole, order)
    _assert_same(score_array(score, params, xs[:300]), whole, slice(300))
    for i in (0, 255, 256, 599):
        _assert_same(score_array(score, params, xs[i : i + 1]), whole, slice(i, i + 1))
    among = 1e6 * rng.random((600, sizes[0]), np.float32)
    among[::7] = xs[::7]
    got = score_array(score, params, among)
    _assert_same(Scores(*(values[::7] for values in got)), whole, slice(None, None, 7))


def _assert_same(got: Scores, whole: Scores, rows: object) -> None:
    for values, want in zip(got, whole, strict=True):
        np.testing.assert_array_equal(values, want[rows])


def test_one_compilation_whatever_the_number_of_rows(compilations: Callable[[], int]) -> None:
    model = jaxcae.mlp((9, 6, 3))
    params = model.init(jax.random.key(0))
    score = scores(model)
    score_array(score, params, np.ones((5, 9), np.float32), chunk_size=8)
    before = compilations()
    for rows in (1, 7, 8, 9, 30):
        assert (
            len(score_array(score, params, np.ones((rows, 9), np.float32), 8).jacobian_norm) == rows
        )
    assert compilations() == before


def test_blocks_of_any_length_come_out_in_order(rng: np.random.Generator) -> None:
    model = jaxcae.mlp((9, 6, 3), "tanh")
    params, score = model.init(jax.random.key(0)), scores(model)
    xs = rng.random((50, 9), np.float32)
    cuts = np.split(xs, [0, 1, 4, 30, 30, 49])
    parts = list(score_in_chunks(score, params, cuts, chunk_size=8))
    assert [len(part.jacobian_norm) for part in parts] == [8] * 6 + [2]
    got = Scores(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    _assert_same(got, score_array(score, params, xs, chunk_size=8), slice(None))


@pytest.mark.parametrize("method", ["hutchinson", "control_variate", "finite_difference"])
def test_estimators_are_refused(method: str) -> None:
    with pytest.raises(ValueError, match="unknown exact method"):
        scores(jaxcae.mlp((9, 3)), method=method)


@pytest.mark.filterwarnings("ignore:.*has no column names")
def test_new_data_is_standardised_as_the_training_data_was(
    tabular_run: Path, tmp_path: Path
) -> None:
    run, dataset = open_run(tabular_run), data.load("breast_cancer")
    assert run.standardization is not None
    xs = dataset.standardized(run.standardization).features
    want = score_array(scores(run.model), run.params, xs)
    np.save(tmp_path / "raw.npy", dataset.features)
    np.savez(tmp_path / "raw.npz", dataset.features)
    for source in ("breast_cancer", str(tmp_path / "raw.npy"), str(tmp_path / "raw.npz")):
        output = tmp_path / "s.npy"
        assert main(["score", str(tabular_run), "--data", source, "--output", str(output)]) == 0
        np.testing.assert_array_equal(np.load(output), np.stack(want, axis=1))


def test_anomalies_stand_out(digits_run: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    digits = data.load("digits").features[:200]
    noise = rng.permuted(digits, axis=1)  # the same pixels in no order
    np.save(tmp_path / "both.npy", np.concatenate([digits, noise]))
    output = tmp_path / "s.npy"
    arguments = ["score", str(digits_run), "--data", str(tmp_path / "both.npy")]
    assert main([*arguments, "--output", str(output)]) == 0
    errors = np.load(output)[:, 0]
    assert (np.median(errors[200:]) > np.quantile(errors[:200], 0.9)).all()


def test_each_network_of_the_run_can_score(digits_run: Path, samples: Path, tmp_path: Path) -> None:
    arguments = ["score", str(digits_run), "--data", str(samples), "--output"]
    tables = {}
    for network in ("contractive", "plain"):
        output = tmp_path / f"{network}.npy"
        assert main([*arguments, str(output), "--network", network]) == 0
        tables[network] = np.load(output)
    assert main([*arguments, str(tmp_path / "default.npy")]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "default.npy"), tables["contractive"])
    assert tables["plain"][:, 1].mean() > tables["contractive"][:, 1].mean()
    assert main([*arguments, str(tmp_path / "x.npy"), "--network", "simple"]) == 2


def test_the_summary_is_json_on_request(
    digits_run: Path, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "s.npy"
    assert (
        main(["score", str(digits_run), "--data", str(samples), "--output", str(output), "--json"])
        == 0
    )
    summary = json.loads(capsys.readouterr().out)
    table = np.load(output)
    assert summary["samples"] == 300
    assert summary["reconstruction_error"]["row_of_max"] == int(table[:, 0].argmax())
    assert summary["jacobian_norm"]["median"] == pytest.approx(float(np.median(table[:, 1])))


def _narrow(xs: np.ndarray) -> np.ndarray:
    return xs[:, :-1]


def _not_a_number(xs: np.ndarray) -> np.ndarray:
    xs[7, 5] = np.nan
    return xs


def _bytes(xs: np.ndarray) -> np.ndarray:
    return (255 * xs).astype(np.uint8)


REFUSED = {
    "wrong width": (_narrow, r"expected 64 features \(from the checkpoint\), the file has 63"),
    "not a number": (_not_a_number, r"1 value is NaN.*row 7, column 5"),
    "another range": (_bytes, r"trained on values in \[0, 1\].*row 0, column \d+.*--any-range"),
    "rank 3": (lambda xs: xs.reshape(-1, 8, 8), "--flatten"),
    "no rows": (lambda xs: xs[:0], "no rows"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv"])
def test_data_that_does_not_fit_the_run_leaves_the_output_alone(
    digits_run: Path,
    tmp_path: Path,
    rng: np.random.Generator,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    suffix: str,
) -> None:
    change, complaint = REFUSED[kind]
    xs = change(rng.random((30, 64), np.float32))
    path, output = tmp_path / f"bad{suffix}", tmp_path / "scores.csv"
    if suffix == ".npy":
        np.save(path, xs)
    elif suffix == ".npz":
        np.savez(path, xs)
    elif xs.ndim == 2:
        np.savetxt(path, xs, delimiter=",")
        complaint = complaint.replace("row 7, column 5", "line 8, column 6")
    else:
        return  # a CSV has rank 2
    output.write_text("earlier scores")
    before = fingerprint(tmp_path)
    assert main(["score", str(digits_run), "--data", str(path), "--output", str(output)]) == 2
    message = capsys.readouterr().err
    import re

    assert re.search(complaint, message), message
    assert message.count("\n") == 1
    assert str(path) in message
    assert fingerprint(tmp_path) == before


def test_another_range_can_be_insisted_on(digits_run: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((3, 64), 1.5))
    arguments = ["score", str(digits_run), "--data", str(tmp_path / "a.npy")]
    assert main([*arguments, "--output", str(tmp_path / "s.npy"), "--any-range"]) == 0
    assert np.load(tmp_path / "s.npy").shape == (3, 2)


def test_a_score_that_overflows_is_a_failure_that_names_its_row(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    xs = np.zeros((40, 64), np.float32)
    xs[33] = 3e38
    np.save(tmp_path / "a.npy", xs)
    arguments = ["score", str(digits_run), "--data", str(tmp_path / "a.npy"), "--any-range"]
    assert main([*arguments, "--output", str(tmp_path / "s.npy")]) == 1
    assert "of row 33 is" in capsys.readouterr().err
    assert not (tmp_path / "s.npy").exists()


@pytest.mark.parametrize(
    ("output", "complaint"),
    [
        ("scores.txt", "ends in .csv or .npy"),
        ("missing/scores.csv", "no directory"),
        ("folder.csv", "is a directory"),
        ("samples.npy", "is the data to score"),
    ],
)
def test_an_output_that_cannot_be_is_refused(
    digits_run: Path,
    samples: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    output: str,
    complaint: str,
) -> None:
    (tmp_path / "folder.csv").mkdir()
    before = fingerprint(tmp_path)
    arguments = [
        "score",
        str(digits_run),
        "--data",
        str(samples),
        "--output",
        str(tmp_path / output),
    ]
    assert main(arguments) == 2
    assert complaint in capsys.readouterr().err
    assert fingerprint(tmp_path) == before


def test_scoring_touches_nothing_but_its_output(
    digits_run: Path, samples: Path, tmp_path: Path
) -> None:
    run, folder = fingerprint(digits_run), fingerprint(tmp_path)
    assert (
        main(
            ["score", str(digits_run), "--data", str(samples), "--output", str(tmp_path / "s.csv")]
        )
        == 0
    )
    assert fingerprint(digits_run) == run
    after = fingerprint(tmp_path)
    assert after.pop("s.csv")
    assert after == folder


_MEASURE = """
import resource, sys
from jaxcae.cli import main

run, small, large, output = sys.argv[1:]
assert main(["score", run, "--data", small, "--output", output]) == 0
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert main(["score", run, "--data", large, "--output", output]) == 0
print("growth", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_a_large_file_is_scored_in_bounded_memory(digits_run: Path, tmp_path: Path) -> None:
    """A file of 256 MB; its scores are 8 MB, and the process grows by less than 64 MB."""
    np.save(tmp_path / "small.npy", np.zeros((5000, 64), np.float32))
    large = np.lib.format.open_memmap(tmp_path / "large.npy", "w+", np.float32, (1 << 20, 64))
    large[::1000, 3] = 1
    large.flush()
    del large
    paths = [digits_run, tmp_path / "small.npy", tmp_path / "large.npy", tmp_path / "s.npy"]
    process = subprocess.run(
        [sys.executable, "-c", _MEASURE, *map(str, paths)],
        check=True,
        capture_output=True,
        text=True,
    )
    growth = int(process.stdout.split("growth")[1])
    assert growth < 64 << 20, f"{growth >> 20} MB"
    table = np.load(tmp_path / "s.npy")
    assert table.shape == (1 << 20, 2)
    assert len(np.unique(table[::1000], axis=0)) == 1
    assert not np.array_equal(table[0], table[1])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_blamed_and_not_the_data(
    value, digits_run, samples, tmp_path, capsys
):
    """By every command that loads them; the digest of the file is right."""
    run = Path(shutil.copytree(digits_run, tmp_path / "run"))
    file = run / "params.safetensors"
    trained = open_run(run)
    params = jax.tree.map(np.array, trained.params)
    params["encoder"]["layer_0"]["kernel"][3, 4] = value
    record = {k: v for k, v in trained.record.items() if k not in ("format", "leaves")}
    save_params(file, params, record)
    for argv in (
        ["score", str(run), "--data", str(samples), "--output", str(tmp_path / "s.csv")],
        ["analyze", str(run), "--no-plots"],
        ["export", str(run)],
    ):
        assert main(argv) == 1
        error = capsys.readouterr().err
        assert "encoder/layer_0/kernel holds 1 weights that are not finite" in error
        assert "too large" not in error


def test_the_plain_network_comes_with_a_caution(digits_run, samples, tmp_path, capsys):
    """Its ‖J‖_F has been seen lower, not higher, on samples unlike the training data."""
    argv = ["score", str(digits_run), "--data", str(samples), "--output", str(tmp_path / "s.csv")]
    assert main(argv) == 0
    assert "without the penalty" not in capsys.readouterr().out
    assert main([*argv, "--network", "plain"]) == 0
    assert "may be lower on strange samples" in capsys.readouterr().out
