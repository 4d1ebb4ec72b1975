"""The trainer as a Python caller has it: kept, gone on with, given more epochs, never lost."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcae
from jaxcae.cli import main
from jaxcae.errors import CheckpointError, InputError, RunError
from jaxcae.runs import (
    Config,
    Keeper,
    Observer,
    RunDirectory,
    is_in_use,
    lock,
    open_run,
    read_config,
    read_metrics,
    train,
)
from jaxcae.runs.checkpoints import Checkpoints
from jaxcae.runs.leaves import digest_of_tree
from jaxcae.runs.params_file import load_params, save_params

STEPS = 4  # 40 rows, 32 of them to train on, in batches of 10


def settings(data: Path, **other: Any) -> Config:
    small = {"sizes": (3, 2), "epochs": 2, "batch_size": 10, "schedule": "constant"}
    return Config.of(**{"data": str(data), "method": "reverse", "compare": False, **small, **other})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.npy"
    np.save(path, np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32))
    return path


@pytest.fixture(scope="module")
def shared(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs of two and of four epochs, nothing in their way."""
    folder = tmp_path_factory.mktemp("runs")
    for epochs in (2, 4):
        train(settings(data, epochs=epochs), folder / str(epochs), save_every=3)
    return {epochs: folder / str(epochs) for epochs in (2, 4)}


@pytest.fixture
def run(shared: dict[int, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared[2], tmp_path / "run"))


class Heard(Observer):
    """Remember what was said, and stop after a step if told to."""

    def __init__(self, stop_at: int | None = None):
        self.said: list[str] = []
        self._stop_at = stop_at

    def say(self, text: str) -> None:
        self.said.append(text)

    def segment(self, segment: Any) -> bool:
        return self._stop_at is not None and segment.step >= self._stop_at


def same(path: Path, other: Path, step: int) -> bool:
    leaves = [Checkpoints(p / "checkpoints").read_record(step)["leaves"] for p in (path, other)]
    return leaves[0] == leaves[1]


def test_a_run_from_python(data: Path, tmp_path: Path, shared: dict[int, Path]) -> None:
    """Stopped in the middle of an epoch, it goes on to the same bits."""
    config, path = settings(data), tmp_path / "mine"
    outcome = train(config, path, save_every=3, observer=Heard(stop_at=3))
    assert outcome.report is None
    assert int(outcome.state.step) == 3
    heard = Heard()
    outcome = train(config, path, resume=True, save_every=3, observer=heard)
    assert "resuming at step 3" in heard.said
    assert outcome.report is not None
    assert outcome.report["epochs"] == 2
    assert same(path, shared[2], 2 * STEPS)
    assert digest_of_tree(open_run(path).params) == digest_of_tree(outcome.params["contractive"])
    assert [line["step"] for line in read_metrics(path) if line["kind"] == "step"] == [*range(1, 9)]


def test_more_epochs_of_a_constant_schedule(
    run: Path, data: Path, shared: dict[int, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", "--run-dir", str(run), "--resume", "--epochs", "4", "--no-plots", "--json"]
    assert main([*argv, "--save-every", "3"]) == 0
    assert same(run, shared[4], 4 * STEPS)
    parts = [open_run(path).params for path in (run, shared[4])]
    assert digest_of_tree(parts[0]) == digest_of_tree(parts[1])
    assert read_config(run).training.epochs == 4
    assert main(["info", str(run), "--verify"]) == 0
    capsys.readouterr()
    # Fewer than it has done it cannot have.
    argv[5] = "3"
    assert main(argv) == 2
    assert "has done 4 epochs already, --epochs 3 is less" in capsys.readouterr().err


def test_a_prolonged_run_that_is_stopped_is_not_called_finished(
    run: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(settings(data, epochs=4), run, resume=True, observer=Heard(stop_at=12))
    assert open_run(run).record["step"] == 2 * STEPS  # the result that there is
    assert main(["info", str(run), "--json"]) == 0
    shown = capsys.readouterr().out
    assert '"epochs": "3 of 4"' in shown
    assert "stopped" in shown


def test_more_epochs_of_a_cosine_schedule_are_another_run(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cosine"
    train(settings(data, schedule="cosine"), path)
    before = (path / "config.json").read_bytes()
    assert main(["train", "--run-dir", str(path), "--resume", "--epochs", "4", "--json"]) == 2
    err = capsys.readouterr().err
    assert "--schedule cosine brings the step size to 0 over the run's 2 epochs" in err
    assert "with --schedule constant a run can be given more --epochs later" in err
    assert err.count("\n") == 1
    assert (path / "config.json").read_bytes() == before


def test_a_finished_run_says_so(run: Path, data: Path) -> None:
    heard, before = Heard(), (run / "params.safetensors").read_bytes()
    train(settings(data), run, resume=True, observer=heard)
    assert "the run has done its 2 epochs; there is nothing left to train" in heard.said
    assert (run / "params.safetensors").read_bytes() == before


def test_data_that_has_moved_is_the_same_data(
    run: Path, data: Path, tmp_path: Path, shared: dict[int, Path], rng: np.random.Generator
) -> None:
    """Known by its digest: in another place, under another name, in another format."""
    xs = np.load(data)
    moved = tmp_path / "elsewhere" / "table.csv"
    moved.parent.mkdir()
    lines = [",".join(repr(float(value)) for value in row) for row in xs]
    moved.write_text("\n".join(lines) + "\n")
    asked = settings(moved, epochs=4).replace(header="no")
    # How a table is read is a setting, which the .npy had no use for.
    with pytest.raises(RunError, match="`header`: 'auto' in the run, 'no' asked"):
        train(asked, run, resume=True)
    np.save(moved.with_suffix(".npy"), xs)
    config = settings(moved.with_suffix(".npy"), epochs=4)
    train(config, run, resume=True, save_every=3)
    assert same(run, shared[4], 4 * STEPS)
    assert read_config(run).data.source == str(moved.with_suffix(".npy"))
    open_run(run)
    np.save(moved.with_suffix(".npy"), xs + 1)
    with pytest.raises(RunError, match="the data, whose digest is another"):
        train(config, run, resume=True)


def test_a_report_never_depends_on_a_picture(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from jaxcae.cli import pictures

    def fail(*_: Any) -> None:
        assert (tmp_path / "run/report.json").exists(), "drawn before the report was written"
        raise ValueError("Data cannot be\nlog-scaled")

    monkeypatch.setattr(pictures, "draw", fail)
    argv = ["train", "--data", str(data), "--sizes", "3", "2", "--epochs", "1", "--json"]
    assert main([*argv, "--no-compare", "--run-dir", str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    assert err == (
        "jaxcae train: warning: not all pictures could be drawn: Data cannot be log-scaled\n"
    )
    assert '"networks"' in out


@pytest.mark.slow
def test_layers_trained_one_by_one_before(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Greedy stacking is where the run begins, and a resumed run begins there, too."""
    config = settings(data, sizes=(3, 4, 2), pretrain=20, activation="tanh")
    heard = Heard()
    whole = train(config, tmp_path / "whole", observer=heard, save_every=3)
    layers = [line for line in heard.said if ": layer " in line]
    assert len(layers) == 2
    assert layers[0].startswith("contractive: layer 1, 3 to 4, has loss ")
    fresh = train(config.replace(pretrain=0), tmp_path / "fresh", observer=Heard(stop_at=0))
    name = "held_out_contractive/reconstruction"
    assert whole.history[0][name] < 0.8 * fresh.history[0][name]

    path = tmp_path / "resumed"
    train(config, path, observer=Heard(stop_at=3), save_every=3)
    heard = Heard()
    resumed = train(config, path, resume=True, observer=heard, save_every=3)
    assert not [line for line in heard.said if ": layer " in line]
    assert same(path, tmp_path / "whole", 2 * STEPS)
    assert resumed.report is not None
    assert whole.report is not None
    assert resumed.report["networks"] == whole.report["networks"]
    assert main(["info", str(path), "--verify", "--json"]) == 0
    assert '"pretrained.safetensors": "verified"' in capsys.readouterr().out
    file = path / "pretrained.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(bytes(damaged))
    assert main(["info", str(path), "--verify"]) == 1
    with pytest.raises(CheckpointError, match="differs from its digest"):
        train(config, path, resume=True)


def test_what_cannot_be_stacked_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", "--data", str(data), "--run-dir", str(tmp_path / "run"), "--pretrain", "3"]
    for options, said in (
        (["--model", "conv"], "--pretrain stacks the layers of an mlp, got --model conv"),
        (["--stream"], "--pretrain keeps the codes of a layer in memory: leave out --stream"),
        (["--pretrain", "-1"], "--pretrain must be at least 0, got -1"),
    ):
        assert main([*argv, *options]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_samples_in_memory(run: Path, data: Path, shared: dict[int, Path], tmp_path: Path) -> None:
    """The same samples from wherever are the same run."""
    xs = np.load(data)
    config = settings(data, epochs=4)
    train(config, run, resume=True, save_every=3, samples=xs)
    assert same(run, shared[4], 4 * STEPS)
    assert read_config(run).data.source == "samples"
    bad = xs.copy()
    bad[7, 1] = np.nan
    for wrong, message in (
        (bad, r"samples: 1 value is NaN or infinite; the first is nan at row 7, column 1"),
        (xs[:, 0], r"samples: expected rank 2 .* shape \(40,\)"),
        (xs.astype(str), "samples: expected numbers"),
        (xs[:0], r"samples: no rows"),
    ):
        with pytest.raises(InputError, match=message):
            train(config, tmp_path / "new", samples=wrong)
        assert not (tmp_path / "new").exists()


def test_warnings_reach_a_python_caller(run: Path, data: Path) -> None:
    env = run / "env.json"
    env.write_text(env.read_text().replace('"threads": ', '"threads": 9'))
    with pytest.warns(UserWarning, match="threads changed since the run began"):
        train(settings(data), run, resume=True)


def test_an_own_model_is_kept_in_ten_lines(tmp_path: Path) -> None:
    """`Keeper` is a callback of `fit`, whatever the loss, the optimizer and the parameters are."""
    xs = np.random.default_rng(1).standard_normal((40, 3)).astype(np.float32)
    model, optimizer = jaxcae.mlp((3, 2)), optax.sgd(0.1)
    loss = jaxcae.cae_loss(model, 0.1, method="reverse")
    state = jaxcae.TrainState.create(model.init(jax.random.key(0)), optimizer, jax.random.key(1))
    config = Config.of(data="mine", sizes=(3, 2), schedule="constant")
    whole, _ = jaxcae.fit(loss, optimizer, state, xs, epochs=3, batch_size=16)

    with RunDirectory.create(tmp_path / "own") as directory:
        directory.start(config)
        keeper = Keeper(directory, config, save_every=2)
        jaxcae.fit(
            loss, optimizer, state, xs, epochs=2, batch_size=16, callback=keeper, pause_every=2
        )
    with RunDirectory.open(tmp_path / "own") as directory:
        keeper = Keeper(directory, config, save_every=2)
        at = keeper.restore(state)
        assert at.step == 6
        state, history = jaxcae.fit(
            loss, optimizer, at.state, xs, epochs=3, batch_size=16,
            history=at.history, totals=at.totals, callback=keeper, pause_every=2,
        )  # fmt: skip
        keeper.save(state)
    assert digest_of_tree(state.params) == digest_of_tree(whole.params)
    assert [record["epoch"] for record in history] == [1, 2, 3]


@pytest.mark.skipif(not lock._CAN_ASK, reason="no locks here that can be asked for")
def test_a_question_takes_no_lock(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or another process's open would fail while it is asked."""
    with RunDirectory.open(run):
        assert is_in_use(run)
    calls: list[int] = []
    fcntl = lock.fcntl.fcntl
    monkeypatch.setattr(lock.fcntl, "flock", lambda file, how: calls.append(how))
    monkeypatch.setattr(
        lock.fcntl,
        "fcntl",
        lambda file, what, *rest: (calls.append(what), fcntl(file, what, *rest))[1],
    )
    assert not is_in_use(run)
    assert calls == [lock.fcntl.F_OFD_GETLK]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "int8", "bool"])
def test_short_types_keep_their_bits(dtype: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    bits = jnp.asarray(rng.standard_normal((7, 3)).astype(np.float32)).astype(dtype)
    params = {"encoder": {"kernel": bits}, "decoder": {"bias": jnp.zeros((), dtype)}}
    save_params(tmp_path / "p.safetensors", params, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded, _ = load_params(tmp_path / "p.safetensors", jax.eval_shape(lambda: params))
    assert digest_of_tree(loaded) == digest_of_tree(params)
    assert loaded["encoder"]["kernel"].dtype == bits.dtype
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, {"params": params}, {})
    assert digest_of_tree(checkpoints.load(1, {"params": params})[0]["params"]) == (
        digest_of_tree(params)
    )
