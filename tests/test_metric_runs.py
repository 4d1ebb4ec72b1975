"""Runs whose contraction has a metric: of the data, or of a file; kept, verified, refused."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxcae
from jaxcae.cli import main
from jaxcae.errors import CheckpointError, InputError, RunError
from jaxcae.runs import Config, Run, open_run, train
from jaxcae.runs.metric import load_metric

ROWS = np.random.default_rng(3).normal(size=(40, 5)).astype(np.float32)
ROWS *= np.array([3, 2, 1, 0.5, 0.2], np.float32)


def settings(**more: object) -> Config:
    base = {"sizes": (5, 4, 2), "activation": "tanh", "epochs": 2, "batch_size": 16,
            "schedule": "constant", "contraction": 0.1, "compare": False}  # fmt: skip
    return Config.of(**(base | more))


def norms(run: Run, xs: np.ndarray, factor: np.ndarray) -> np.ndarray:
    jacobians = jax.vmap(jax.jacrev(lambda x: run.model.encode(run.params, x)))(xs)
    return np.sum((jacobians @ np.atleast_2d(factor).T) ** 2, (1, 2))


def same(a: Path, b: Path) -> bool:
    one, other = (jax.tree.leaves(open_run(path).params) for path in (a, b))
    return all(np.array_equal(x, y) for x, y in zip(one, other, strict=True))


def test_a_run_contracts_in_the_metric_of_its_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The factor is of the training part; figures, resuming and every command go with it."""
    data, path = tmp_path / "rows.npy", tmp_path / "run"
    np.save(data, ROWS)
    config = settings(data=str(data), input_metric="data:2", epochs=3)
    outcome = train(config, tmp_path / "whole")
    want = jaxcae.covariance_factor(outcome.material.train, 2)
    metric = load_metric(tmp_path / "whole", outcome.config)
    assert metric is not None
    np.testing.assert_array_equal(metric.factor, want)
    assert metric.digest == outcome.config.objective.metric_digest

    run, held_out = open_run(tmp_path / "whole"), outcome.material.held_out
    figures = outcome.history[-1]
    squared = float(norms(run, held_out, want).mean())
    assert figures["held_out_contractive/metric_norm_squared"] == pytest.approx(squared, rel=1e-5)
    plain = float(norms(run, held_out, np.eye(5)).mean())
    assert figures["held_out_contractive/jacobian_norm_squared"] == pytest.approx(plain, rel=1e-5)
    total = figures["held_out_contractive/reconstruction"] + 0.1 * squared
    assert figures["held_out_contractive/loss"] == pytest.approx(total, rel=1e-5)

    train(config.replace(epochs=2), path)
    train(config, path, resume=True)
    assert same(path, tmp_path / "whole")
    unweighted = train(config.replace(input_metric=None), tmp_path / "other")
    assert not same(unweighted.run_dir, path)

    scores = str(tmp_path / "scores.csv")
    for argv, said in (
        (["explain"], "‖J Fᵀ‖²_F of an encoder of 5 features and 2 code units"),
        (["info"], "input_metric"),
        (["info", "--verify"], "metric.safetensors"),
        (["score", "--data", str(data), "--output", scores], ""),
        (["analyze", "--json", "--no-plots"], "spectrum"),
    ):
        assert main([argv[0], str(path), *argv[1:]]) == 0
        assert said in capsys.readouterr().out
    assert main(["train", "--run-dir", str(path), "--resume", "--input-metric", "data:3"]) == 2
    assert "--input-metric: 'data:2' in the run, 'data:3' asked" in capsys.readouterr().err

    damaged = bytearray((path / "metric.safetensors").read_bytes())
    damaged[-1] ^= 1
    (path / "metric.safetensors").write_bytes(bytes(damaged))
    assert main(["info", str(path), "--verify", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["metric.safetensors"].startswith("DAMAGED")
    with pytest.raises(CheckpointError, match="differs from its digest"):
        train(config, path, resume=True)


@pytest.mark.slow
def test_a_metric_of_a_file_is_kept_and_told_from_another(tmp_path: Path) -> None:
    file = tmp_path / "metric.npy"
    np.save(file, np.arange(5.0))
    config = settings(input_metric=str(file), curvature=0.1, epochs=1)
    path = train(config, tmp_path / "run", samples=ROWS).run_dir
    run = open_run(path)
    metric = load_metric(path, run.config)
    assert metric is not None
    np.testing.assert_array_equal(metric.factor, np.arange(5.0))
    np.save(file, np.arange(5.0) + 1)
    with pytest.raises(RunError, match="the metric, whose digest is another"):
        train(config.replace(epochs=2), path, resume=True, samples=ROWS)
    file.unlink()
    train(config.replace(epochs=2), path, resume=True, samples=ROWS)
    (path / "metric.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"metric\.safetensors: cannot be read"):
        load_metric(path, run.config)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--input-metric", "data:0"], "--input-metric must be data:RANK.*got 'data:0'"),
        (["--input-metric", "covariance"], "--input-metric must be data:RANK.*got 'covariance'"),
        (["--input-metric", "data:6"], "--input-metric data:6: rank must be at most 5 for"),
        (["--input-metric", "none.npy"], "none.npy: no such file"),
        (["--input-metric", "wide.npy"], r"wide.npy: a metric has shape \(rows, 5\).*got \(2, 4\)"),
        (["--input-metric", "nan.npy"], "nan.npy: holds values that are not finite"),
        (
            ["--input-metric", "data:2", "--contraction", "0"],
            "--input-metric weighs the contraction: give one above 0",
        ),
        (["--input-metric", "data:2", "--pretrain", "1"], "--pretrain contracts codes"),
        (["--input-metric", "data:2", "--stream"], "needs the training data in memory"),
    ],
)
def test_what_is_no_metric_is_refused_in_one_line(
    options: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("rows.npy", ROWS)
    np.save("wide.npy", np.ones((2, 4)))
    np.save("nan.npy", np.array([1, 2, 3, np.nan, 1e300]))
    assert main(["train", "--data", "rows.npy", "--run-dir", "run", *options]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.search(said, err), err
    assert not Path("run").exists()


@pytest.mark.slow
def test_a_windowed_run_has_a_metric_of_its_windows(tmp_path: Path) -> None:
    series = np.sin(np.arange(200) / 5)[:, None].astype(np.float32)
    config = Config.of(window=8, input_metric="data:3", epochs=1, compare=False, sizes=(8, 4, 2))
    outcome = train(config, tmp_path / "run", samples=series)
    metric = load_metric(outcome.run_dir, outcome.config)
    assert metric is not None
    assert metric.factor.shape == (3, 8)
    with pytest.raises(InputError, match=r"rank must be at most 8 for .* samples of 8 features"):
        train(config.replace(input_metric="data:9"), tmp_path / "more", samples=series)
