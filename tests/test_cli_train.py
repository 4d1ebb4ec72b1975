"""`jaxcae train` and `jaxcae info` as a person uses them: what comes out, and what is refused."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxcae.cli import main
from jaxcae.runs import open_run, read_config, read_metrics
from jaxcae.runs.checkpoints import Checkpoints
from jaxcae.runs.config import Config
from jaxcae.runs.material import load_material

SMALL = ["--data", "digits", "--sizes", "64", "16", "4", "--epochs", "3", "--method", "reverse"]
STEPS_PER_EPOCH = 12  # 1,438 training samples in batches of 128, the last of 30

Run = Any


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small run with everything on; the tests below look at it from all sides."""
    path = tmp_path_factory.mktemp("runs") / "small"
    assert main(["train", *SMALL, "--run-dir", str(path), "--save-every", "7", "--json"]) == 0
    return path


@pytest.fixture
def copy(run_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_dir, tmp_path / "copy"))


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """Run a command that fails, and return its exit code and its one line."""
    code = main(argv)
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1, err
    return code, lines[0]


def test_a_run_leaves_every_promised_file(run_dir: Path) -> None:
    names = {path.name for path in run_dir.iterdir()}
    assert names == {
        "config.json",
        "env.json",
        "metrics.jsonl",
        "checkpoints",
        "params.safetensors",
        "plain.safetensors",
        "plots",
        "report.json",
        "run.lock",
    }
    pictures = {path.name: path.read_bytes() for path in (run_dir / "plots").iterdir()}
    assert set(pictures) == {"reconstructions.png", "filters.png", "curves.png", "spectrum.png"}
    for data in pictures.values():
        assert data.startswith(b"\x89PNG")
        assert len(data) > 10_000


def test_the_report_shows_what_contraction_did(run_dir: Path) -> None:
    report = json.loads((run_dir / "report.json").read_text())
    networks = report["networks"]
    for name in ("reconstruction", "jacobian_norm"):  # the same parameters to begin with
        assert networks["contractive"]["before"][name] == networks["plain"]["before"][name]
    for figures in networks.values():
        assert figures["after"]["reconstruction"] < figures["before"]["reconstruction"]
        for name in ("jacobian_norm", "jacobian_norm_squared", "relative_jacobian_norm"):
            assert np.isfinite(figures["after"][name])
    contractive, plain = networks["contractive"]["after"], networks["plain"]["after"]
    assert contractive["jacobian_norm"] < 0.9 * plain["jacobian_norm"]
    assert plain["reconstruction"] < contractive["reconstruction"]
    # The mean of roots, not the root of the mean.
    assert contractive["jacobian_norm"] ** 2 < contractive["jacobian_norm_squared"]


def test_the_report_is_what_the_saved_networks_give(run_dir: Path) -> None:
    """Recompute the table from the files alone, with NumPy and `jax.jacrev`."""
    run, report = open_run(run_dir), json.loads((run_dir / "report.json").read_text())
    held_out = load_material(run.config).held_out
    assert len(held_out) == report["held_out_samples"]
    for network, params in (("contractive", run.params), ("plain", run.plain)):
        one = jax.jit(
            lambda x, p=params: (
                run.model.decode(p, run.model.encode(p, x)),
                jax.jacrev(lambda y: run.model.encode(p, y))(x),
            )
        )
        x_hats, jacobians = map(np.asarray, jax.vmap(one)(held_out))
        norms = np.sqrt(np.sum(jacobians.astype(float) ** 2, axis=(1, 2)))
        after = report["networks"][network]["after"]
        errors = np.sum((held_out - x_hats).astype(float) ** 2, axis=1)
        assert after["reconstruction"] == pytest.approx(errors.mean(), rel=1e-5)
        assert after["jacobian_norm"] == pytest.approx(norms.mean(), rel=1e-5)
        assert after["jacobian_norm_squared"] == pytest.approx((norms**2).mean(), rel=1e-5)


def test_every_step_and_epoch_is_logged_once(run_dir: Path) -> None:
    lines = list(read_metrics(run_dir))
    steps = [line["step"] for line in lines if line["kind"] == "step"]
    epochs = [line["epoch"] for line in lines if line["kind"] == "epoch"]
    assert steps == list(range(1, 3 * STEPS_PER_EPOCH + 1))
    assert epochs == [0, 1, 2, 3]
    losses = [line["contractive/loss"] for line in lines if line["kind"] == "step"]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


def test_the_configuration_is_resolved_and_stored(run_dir: Path) -> None:
    config = read_config(run_dir)
    assert config.model.sizes == (64, 16, 4)
    assert config.model.output == "sigmoid"  # the digits are in [0, 1]
    assert re.fullmatch("[0-9a-f]{64}", config.data.digest)
    assert json.loads((run_dir / "env.json").read_text())["versions"]["jax"]


def test_the_default_is_the_tutorials_network() -> None:
    config = Config()
    assert config.data.source == "mnist5k"
    assert (config.model.activation, config.training.batch_size) == ("relu", 128)
    assert config.resolve(784, 0.0, 1.0, "").model.sizes == (784, 256, 64)
    assert config.resolve(784, 0.0, 1.0, "").model.output == "sigmoid"
    assert config.resolve(9, -3.0, 2.0, "").model.output == "identity"


@pytest.mark.parametrize(
    ("output", "low", "high", "said"),
    [
        ("sigmoid", 0.0, 1.5, "above 1"),
        ("relu", -0.5, 9.0, "below 0"),
        ("tanh", -2.0, 2.0, "below"),
    ],
)
def test_data_that_the_output_cannot_reach_is_warned_of(
    output: str, low: float, high: float, said: str
) -> None:
    config = Config.of(output=output)
    with pytest.warns(UserWarning, match=f"`output='{output}'` is never {said}"):
        config.resolve(9, low, high, "")
    config.resolve(9, 0.0, 1.0, "")


def test_results_on_stdout_and_progress_on_stderr(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *SMALL, "--run-dir", str(tmp_path / "a"), "--no-plots"]) == 0
    out, err = capsys.readouterr()
    assert "mean ‖J‖_F" in out
    assert "epoch 3/3" in err
    assert "epoch" not in out.split("\n", 1)[1]
    assert not (tmp_path / "a" / "plots").exists()
    resume = ["train", "--run-dir", str(tmp_path / "a"), "--resume", "--no-plots", "--json"]
    assert main(resume) == 0
    out, err = capsys.readouterr()
    assert err == ""
    first, second = json.loads(out), json.loads((run_dir / "report.json").read_text())
    del first["run_dir"], second["run_dir"]
    assert first == second  # the same seed, the same figures


@pytest.mark.slow
def test_one_network_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--epochs", "1"]
    for name, options in (("contractive", ["--no-compare"]), ("plain", ["--contraction", "0"])):
        path = tmp_path / name
        argv = ["train", *SMALL, "--run-dir", str(path), "--no-plots", "--json", *options, *small]
        assert main(argv) == 0
        assert list(json.loads(capsys.readouterr().out)["networks"]) == [name]
        assert open_run(path).plain is None
        assert not (path / "plain.safetensors").exists()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--loss", "bernoulli", "--tied"], id="bernoulli", marks=pytest.mark.slow),
        pytest.param(["--data", "breast_cancer", "--sizes", "30", "8", "2"], id="tabular"),
        pytest.param(
            ["--noise-scale", "0.2", "--corruption", "masking", "--l1", "1e-4"],
            id="denoising",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "--activation softplus --latent-activation sigmoid --schedule constant".split(),
            id="activations",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "--activation tanh --contraction 0 --curvature 0.1".split(),
            id="curvature alone",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "--sizes 64 16 8 4 --activation tanh --latent-activation sigmoid "
            "--curvature 0.1 --curvature-method hutchinson".split(),
            id="estimated curvature",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_other_recipes_train(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    argv = ["train", *SMALL, *options, "--run-dir", str(path), "--json", "--epochs", "2"]
    argv += ["--no-compare"]
    code = main([*argv, "--no-plots"])
    report = json.loads(capsys.readouterr().out)
    assert code == 0
    figures = report["networks"]["contractive"]
    assert figures["after"]["reconstruction"] < figures["before"]["reconstruction"]
    assert ("curvature" in figures["after"]) == ("--curvature" in options)
    run = open_run(path)
    assert (run.standardization is not None) == (run.config.data.source == "breast_cancer")


@pytest.mark.slow  # test_data_stream does so without the command
def test_a_streamed_file_trains_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rng: np.random.Generator
) -> None:
    data = tmp_path / "rows.npy"
    np.save(data, rng.standard_normal((300, 6)).astype(np.float32))
    path = tmp_path / "run"
    argv = ["train", "--run-dir", str(path), "--no-plots", "--json"]
    options = ["--data", str(data), "--stream", "--sizes", "6", "4", "2", "--epochs", "2"]
    options += ["--no-compare", "--method", "reverse"]
    assert main([*argv, *options, "--batch-size", "64", "--save-every", "3"]) == 0
    whole = Checkpoints(path / "checkpoints").read_record(8)["leaves"]
    assert Checkpoints(path / "checkpoints").steps() == [3, 6, 8]
    # Lose the end of the run; what is done again comes out the same.
    for step in (6, 8):
        shutil.rmtree(path / "checkpoints" / str(step))
    assert main([*argv, "--resume"]) == 0
    assert Checkpoints(path / "checkpoints").read_record(8)["leaves"] == whole
    capsys.readouterr()


def test_resuming_gives_the_same_bits(
    copy: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the middle of the last epoch; test_trainer does so from the middle of the first."""
    last, kept = 3 * STEPS_PER_EPOCH, 28
    for step in Checkpoints(copy / "checkpoints").steps():
        if step > kept:
            shutil.rmtree(copy / "checkpoints" / str(step))
    resume = ["train", "--run-dir", str(copy), "--resume", "--save-every", "7", "--json"]
    assert main([*resume, "--no-plots"]) == 0
    whole = Checkpoints(run_dir / "checkpoints").read_record(last)["leaves"]
    assert Checkpoints(copy / "checkpoints").read_record(last)["leaves"] == whole
    same = (copy / "params.safetensors").read_bytes(), (run_dir / "params.safetensors").read_bytes()
    assert same[0] == same[1]

    def lines(path: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(path)]

    assert lines(copy) == lines(run_dir)
    capsys.readouterr()


@pytest.mark.slow
def test_early_stopping_gives_the_best_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rng: np.random.Generator
) -> None:
    """Thirty samples of noise: nothing to learn, so the held-out loss soon rises."""
    np.save(tmp_path / "noise.npy", rng.standard_normal((30, 6)).astype(np.float32))
    path = tmp_path / "run"
    argv = ["train", "--run-dir", str(path), "--no-plots", "--save-every", "1"]
    options = ["--data", str(tmp_path / "noise.npy"), "--sizes", "6", "16", "5", "--no-compare"]
    options += ["--patience", "3", "--learning-rate", "0.1", "--method", "reverse", "--json"]
    assert main([*argv, *options]) == 0
    report = json.loads(capsys.readouterr().out)
    epochs = [line for line in read_metrics(path) if line["kind"] == "epoch"]
    best = min(epochs, key=lambda line: line["held_out_contractive/loss"])
    assert epochs[-1]["epoch"] == best["epoch"] + 3 == report["epochs"]
    assert 0 < best["epoch"] == report["best_epoch"]
    after = report["networks"]["contractive"]["after"]
    assert after["reconstruction"] == best["held_out_contractive/reconstruction"]
    run = open_run(path)
    assert run.record["step"] == best["step"]
    whole = (path / "params.safetensors").read_bytes()
    held_out = load_material(run.config).held_out
    rebuilt = jax.vmap(lambda x: run.model.decode(run.params, run.model.encode(run.params, x)))
    errors = np.sum((held_out - np.asarray(rebuilt(held_out))) ** 2, axis=1)
    assert errors.mean() == pytest.approx(after["reconstruction"], rel=1e-5)
    # Killed after the best epoch, the run still knows it.
    for step in Checkpoints(path / "checkpoints").steps():
        if step > best["step"] + 1:
            shutil.rmtree(path / "checkpoints" / str(step))
    (path / "params.safetensors").unlink()
    assert main([*argv, "--resume"]) == 0
    assert (path / "params.safetensors").read_bytes() == whole
    shown = capsys.readouterr().out
    assert f"epoch {best['epoch']}, the best of {report['epochs']} epochs" in shown
    assert main(["info", str(path), "--verify", "--json"]) == 0


def test_resuming_a_run_that_has_ended_changes_nothing(
    copy: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--run-dir", str(copy), "--resume", "--json", "--no-plots"]) == 0
    report = json.loads(capsys.readouterr().out)
    expected = json.loads((run_dir / "report.json").read_text())
    assert report["networks"] == expected["networks"]
    name = "metrics.jsonl"
    assert (copy / name).read_bytes() == (run_dir / name).read_bytes()


def test_another_configuration_is_shown_field_by_field(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    options = ["--contraction", "0.5", "--seed", "3", "--activation", "tanh"]
    code, line = error_of(capsys, "train", "--run-dir", str(copy), "--resume", "--json", *options)
    assert code == 2
    for difference in (
        "--activation: 'relu' in the run, 'tanh' asked",
        "--contraction: 0.03 in the run, 0.5 asked",
        "--seed: 0 in the run, 3 asked",
    ):
        assert difference in line
    assert "--tied" not in line
    del before[copy / "run.lock"]
    assert {path: path.read_bytes() for path in before} == before
    # So too where there is no checkpoint yet that would tell.
    shutil.rmtree(copy / "checkpoints")
    again = error_of(capsys, "train", "--run-dir", str(copy), "--resume", "--json", *options)
    assert again == (code, line)


def test_changed_data_is_not_resumed_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rng: np.random.Generator
) -> None:
    data, path = tmp_path / "rows.npy", tmp_path / "run"
    xs = rng.random((50, 6)).astype(np.float32)
    np.save(data, xs)
    argv = ["train", "--run-dir", str(path), "--no-plots", "--json"]
    assert main([*argv, "--data", str(data), "--sizes", "6", "4", "2", "--epochs", "1"]) == 0
    capsys.readouterr()
    xs[17, 3] += 0.001
    np.save(data, xs)
    code, line = error_of(capsys, *argv, "--resume")
    assert code == 2
    assert "the data, whose digest is another" in line


def test_a_damaged_checkpoint_is_refused_or_left_behind_when_asked(
    copy: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = Checkpoints(copy / "checkpoints").steps()
    assert len(steps) == 3
    largest = max(
        (copy / "checkpoints" / str(steps[-1])).rglob("*"), key=lambda p: p.stat().st_size
    )
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 16
    largest.write_bytes(bytes(data))

    assert main(["info", str(copy), "--verify"]) == 1
    found = capsys.readouterr().out
    assert "DAMAGED" in found
    assert largest.name in re.sub(r"\s", "", found)
    resume = ["train", "--run-dir", str(copy), "--resume", "--json", "--no-plots"]
    code, line = error_of(capsys, *resume)
    assert code == 1
    assert f"{largest}: differs from its digest" in line
    assert "--fallback goes back to the checkpoint before" in line

    assert main([*resume, "--fallback"]) == 0
    _, err = capsys.readouterr()
    assert f"warning: checkpoint {steps[-1]} is not used" in err
    whole = Checkpoints(run_dir / "checkpoints").read_record(steps[-1])["leaves"]
    assert Checkpoints(copy / "checkpoints").read_record(steps[-1])["leaves"] == whole
    assert main(["info", str(copy), "--verify"]) == 0
    capsys.readouterr()

    for step in Checkpoints(copy / "checkpoints").steps():
        (copy / "checkpoints" / str(step) / "manifest.json").write_text("{")
    assert main([*resume, "--fallback"]) == 1
    assert "none of the checkpoints can be used" in capsys.readouterr().err


def test_info_shows_and_verifies(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(run_dir)]) == 0
    out = capsys.readouterr().out
    assert "finished" in out
    assert "64, 16, 4" in out
    assert main(["info", str(run_dir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"]["epochs"] == "3 of 3"
    assert main(["info", str(run_dir), "--verify", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert set(findings.values()) == {"verified"}
    assert len(findings) == 5  # three checkpoints, two networks


def test_info_finds_a_flipped_bit_in_params(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "params.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert main(["info", str(copy), "--verify"]) == 1
    assert "DAMAGED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizs", "3"], "did you mean --sizes"),
        (["--epochs", "ten"], "--epochs needs a number"),
        (["--tied", "stray"], "unrecognized options: stray"),
        (["--activation", "rleu"], "unknown activation 'rleu'.* Did you mean 'relu'"),
        (["--data", "mnist5"], "unknown data set 'mnist5'.* Did you mean 'mnist5k'"),
        (["--data", "absent.npy"], "absent.npy: no such file"),
        (["--method", "forwards"], "unknown method 'forwards'.* Did you mean 'forward'"),
        (["--loss", "mse"], "unknown reconstruction loss 'mse'; choose from squared_error"),
        (["--contraction", "-0.1"], "--contraction must be finite and at least 0, got -0.1"),
        (["--contraction", "nan"], "--contraction must be finite and at least 0, got nan"),
        (["--contraction", "inf"], "--contraction must be finite and at least 0, got inf"),
        (["--curvature", "-1"], "--curvature must be finite and at least 0, got -1"),
        (["--curvature", "1"], "--curvature: the encoder has no derivative of order 2.*softplus"),
        (
            ["--curvature", "1", "--sizes", "64", "9", "8", "7", "6", "--activation", "tanh"],
            "--curvature: .* has 3 elementwise layers.*'hutchinson'",
        ),
        (["--curvature-method", "reverse"], "unknown method of curvature 'reverse'; choose from"),
        (["--learning-rate", "0"], "--learning-rate must be above 0"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--batch-size", "-5"], "--batch-size must be at least 1"),
        (["--held-out", "1"], "--held-out must be above 0 and below 1"),
        (["--seed", "-1"], "--seed must be from 0"),
        (["--save-every", "0"], "--save-every must be at least 1"),
        (["--sizes", "64"], "--sizes needs the features and a code"),
        (["--sizes", "63", "8"], "digits has 64 features. Use --sizes 64 8"),
        (["--output", "sigmoid", "--loss", "bernoulli"], "takes logits"),
        (["--stream"], "--stream reads .npy files and folders of them, got digits"),
        (["--resume", "--overwrite"], "exclude each other|no such directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_misuse_is_one_line_and_exit_2(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    code, line = error_of(
        capsys, "train", "--data", "digits", "--run-dir", str(path), "--json", *options
    )
    assert code == 2
    assert line.startswith("jaxcae train: ")
    assert re.search(message, line), line
    assert not path.exists()


def test_resume_needs_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = error_of(capsys, "train", "--resume")
    assert code == 2
    assert "--resume needs the --run-dir" in line
    code, line = error_of(capsys, "train", "--resume", "--run-dir", str(tmp_path / "absent"))
    assert code == 2
    assert "no such directory" in line


def test_a_run_is_not_overwritten_unasked(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = error_of(capsys, "train", *SMALL, "--run-dir", str(copy), "--json")
    assert code == 2
    assert "holds a run already" in line
    argv = ["train", *SMALL, "--run-dir", str(copy), "--json", "--no-plots", "--overwrite"]
    argv += ["--save-every", "1000"]  # steps, not seconds: a slow machine saves on the way
    assert main([*argv, "--epochs", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == STEPS_PER_EPOCH
    assert Checkpoints(copy / "checkpoints").steps() == [STEPS_PER_EPOCH]
    # Refused before anything is removed, if the new run cannot begin.
    code, line = error_of(capsys, *argv, "--data", "absent.npy")
    assert code == 2
    assert (copy / "report.json").exists()


def test_a_diverging_run_exits_1_and_keeps_what_was_good(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    options = ["--learning-rate", "1e18", "--output", "identity", "--save-every", "1"]
    code, line = error_of(capsys, "train", *SMALL, "--run-dir", str(path), "--json", *options)
    assert code == 1
    assert re.search(r"the loss became (nan|inf) at step \d+|is not finite, so it was not", line)
    assert not (path / "params.safetensors").exists()
    checkpoints = Checkpoints(path / "checkpoints")
    assert checkpoints.steps()
    for step in checkpoints.steps():
        checkpoints.read_record(step)


def test_commands_are_found_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    code, line = error_of(capsys, "trian")
    assert code == 2
    assert "unknown command 'trian'" in line
    assert "Did you mean 'train'" in line
    assert main([]) == 2
    assert "usage: jaxcae COMMAND" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "train" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert re.fullmatch(r"jaxcae \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["score"], "needs RUN_DIR;"),
        (["score", "runs/a", "--data", "digits"], "needs --output;"),
        (["train", "--epochs"], "--epochs needs a value;"),
        (["train", "--epochs", "three"], "--epochs needs a number, got 'three';"),
        (["train", "--l1", "much"], "--l1 needs a number, got 'much';"),
        (["train", "extra"], "unrecognized options: extra;"),
    ],
)
def test_misused_options_are_named(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = error_of(capsys, *argv)
    assert code == 2
    assert line == f"jaxcae {argv[0]}: {said} jaxcae {argv[0]} --help lists the options."


def test_help_names_every_option_of_the_configuration(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("data", "sizes", "contraction", "run-dir", "resume", "json", "learning-rate"):
        assert f"--{name}" in shown
    assert main(["info", "--help"]) == 0
    capsys.readouterr()


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", "absent.npy", "--json", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.rstrip().splitlines()[-1].startswith("jaxcae train: ")


def test_handlers_of_signals_are_put_back(run_dir: Path) -> None:
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    # A shell that starts the tests in the background has SIGINT ignored from the start.
    assert signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_IGN)


def test_a_closed_pipe_is_no_traceback() -> None:
    done = subprocess.run(
        f"{sys.executable} -m jaxcae --help | true", shell=True, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr
