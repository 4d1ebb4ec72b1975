"""`jaxcae analyze`: figures that agree with the network they are of, pictures, and refusals."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcae
from jaxcae.cli import main
from jaxcae.data import load, split
from jaxcae.runs import open_run
from tests.trained import train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write a small data set whose samples lie near and far, so that ‖J‖ varies between them."""
    rng = np.random.default_rng(0)
    xs = rng.normal(size=(90, 6)) * rng.uniform(0.1, 8, size=(90, 1))
    path = tmp_path_factory.mktemp("data") / "samples.npy"
    np.save(path, xs.astype(np.float32))
    return path


def train_on(data, run_dir, *options):
    sizes = ("--sizes", "6", "5", "3", "--activation", "sigmoid")
    return train(run_dir, "--data", str(data), *sizes, *options)


@pytest.fixture(scope="module")
def run_dir(data, tmp_path_factory):
    return train_on(data, tmp_path_factory.mktemp("runs") / "both")


def analyze(capsys, *argv):
    capsys.readouterr()
    code = main(["analyze", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_figures_are_those_of_the_networks(run_dir, data, capsys):
    code, out, _ = analyze(capsys, run_dir, "--json", "--no-plots")
    assert code == 0
    report = json.loads(out)
    trained = open_run(run_dir)
    _, held_out = split(load(data), trained.config.data.held_out, trained.config.training.seed)
    xs = jnp.asarray(held_out.features)
    assert report["held_out_samples"] == len(xs) == 18
    assert list(report["networks"]) == ["contractive", "plain"]
    for params, name in ((trained.params, "contractive"), (trained.plain, "plain")):
        figures = report["networks"][name]
        jacobians = jax.vmap(jax.jacobian(lambda x: trained.model.encode(params, x)))(xs)  # noqa: B023
        values = np.linalg.svd(np.asarray(jacobians, np.float64), compute_uv=False)
        spectrum = figures["spectrum"]
        np.testing.assert_allclose(spectrum["mean"], values.mean(0), rtol=1e-4)
        np.testing.assert_allclose(spectrum["low"], np.quantile(values, 0.1, axis=0), rtol=1e-4)
        np.testing.assert_allclose(spectrum["high"], np.quantile(values, 0.9, axis=0), rtol=1e-4)
        norms = jaxcae.contractive_penalty(trained.model.encode, method="reverse")(params, xs)
        np.testing.assert_allclose(figures["jacobian_norm_squared"], norms.mean(), rtol=1e-4)
        np.testing.assert_allclose(figures["jacobian_norm"], np.sqrt(norms).mean(), rtol=1e-4)
        assert np.sqrt(norms.mean()) > 1.01 * np.sqrt(norms).mean()  # they can be told apart
        squares = values**2
        dimension = (squares.sum(1) ** 2 / (squares**2).sum(1)).mean()
        np.testing.assert_allclose(figures["effective_dimension"], dimension, rtol=1e-4)
        active = (values >= 0.1 * values[:, :1]).sum(1).mean()
        np.testing.assert_allclose(figures["active_dimensions"], active, rtol=1e-6)
        # Near a sample the ratio is about ‖J‖_F / √d.
        ratio = figures["contraction_ratios"][0] * np.sqrt(6) / figures["jacobian_norm"]
        assert 0.6 < ratio < 1.2
        (saturated,) = figures["saturation"]  # the code is linear: one layer has slopes
        assert 0 <= saturated <= 1
    assert len(report["radii"]) == len(report["networks"]["plain"]["contraction_ratios"])


def test_the_table_and_the_pictures(run_dir, capsys):
    code, out, err = analyze(capsys, run_dir)
    assert code == 0
    assert err == ""
    for row in ("mean ‖J‖_F", "largest singular value σ₁", "effective dimension, of 3"):
        assert f"\n{row} " in out
    assert "plain   contractive   against plain" in out
    assert "saturated units, layer 1, %" in out
    assert "The contractive code follows" in out
    assert max(map(len, out.split("\n"))) <= 80
    plots = run_dir / "plots"
    assert sorted(path.name for path in plots.iterdir()) == ["contraction.png", "spectrum.png"]
    assert all(path.stat().st_size > 10_000 for path in plots.iterdir())


def test_without_pictures_nothing_is_written(run_dir, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy, ignore=shutil.ignore_patterns("plots"))
    before = sorted(path.name for path in copy.iterdir())
    assert analyze(capsys, copy, "--no-plots")[0] == 0
    assert sorted(path.name for path in copy.iterdir()) == before


def test_a_run_of_one_network_is_compared_with_nothing(data, tmp_path, capsys):
    alone = train_on(data, tmp_path / "alone", "--contraction", "0")
    code, out, _ = analyze(capsys, alone)
    assert code == 0
    assert "against" not in out
    assert "The plain code follows" in out


@pytest.mark.slow
def test_a_run_with_curvature_shows_it_over_the_distance(data, tmp_path, capsys):
    bent = train_on(data, tmp_path / "bent", "--curvature", "0.3")
    code, out, _ = analyze(capsys, bent, "--json")
    networks = json.loads(out)["networks"]
    assert code == 0
    assert len(networks["plain"]["curvature"]) == len(networks["plain"]["contraction_ratios"])
    assert networks["contractive"]["curvature"][0] < networks["plain"]["curvature"][0]
    assert "\ncurvature ‖∇²h‖_F at r = " in analyze(capsys, bent)[1]


def test_the_same_seed_gives_the_same_figures(run_dir, capsys):
    options = (run_dir, "--json", "--no-plots", "--samples", "5")
    first, again = (analyze(capsys, *options)[1] for _ in range(2))
    assert first == again
    assert json.loads(first)["held_out_samples"] == 5
    other = analyze(capsys, *options, "--seed", "1")[1]
    assert json.loads(other)["networks"] != json.loads(first)["networks"]


def test_data_that_has_changed_is_refused(run_dir, data, capsys):
    sound = data.read_bytes()
    xs = np.load(data)
    xs[0, 0] += 0.01
    np.save(data, xs)
    try:
        code, out, err = analyze(capsys, run_dir)
    finally:
        data.write_bytes(sound)
    assert (code, out) == (2, "")
    assert "is not the data that the run was trained on" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--samples", "0"), "--samples must be at least 1"),
        (("--seed", "-1"), "--seed must be from 0"),
    ],
)
def test_unusable_options_are_refused(run_dir, capsys, option, message):
    code, _, err = analyze(capsys, run_dir, *option)
    assert code == 2
    assert message in err


def test_a_directory_without_a_run_is_refused(tmp_path, capsys):
    code, out, err = analyze(capsys, tmp_path)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
