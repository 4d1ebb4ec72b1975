"""Runs that earlier versions wrote are opened, scored, verified, exported and gone on with."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxcae.cli import main
from jaxcae.runs import open_run
from jaxcae.runs.leaves import digest_of_tree
from tests.trained import fingerprint

OLD = Path(__file__).parent / "format_0"


@pytest.fixture(autouse=True)
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of them to work in, and on: their data is named by a relative path."""
    folder = Path(shutil.copytree(OLD, tmp_path / "old"))
    monkeypatch.chdir(folder)
    return folder


def test_its_parameters_are_read_to_the_bit() -> None:
    run = open_run("finished")
    assert run.config.data.source == "rows.csv"
    assert run.config.model.sizes == (3, 2, 1)
    assert run.standardization is not None
    digests = [digest_of_tree(params)[:16] for params in (run.params, run.plain)]
    assert digests == DIGESTS


@pytest.mark.filterwarnings("ignore:.*the run keeps no column names")
def test_it_is_scored_as_it_was(old: Path) -> None:
    before = fingerprint(old)
    assert main(["score", "finished", "--data", "rows.csv", "--output", "now.csv"]) == 0
    now, then = (
        np.loadtxt(old / name, delimiter=",", skiprows=1) for name in ("now.csv", "scores.csv")
    )
    # The order of summation is the engine's to choose; the numbers are the network's.
    np.testing.assert_allclose(now, then, rtol=1e-5)
    (old / "now.csv").unlink()
    assert fingerprint(old) == before


def test_it_is_shown_and_verified(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "finished", "--verify", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out).values()) == {"verified"}
    assert main(["info", "unfinished", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"]["checkpoints at steps"] == [5]


@pytest.mark.slow
def test_it_is_exported(old: Path) -> None:
    assert main(["export", "finished", "--platforms", "cpu"]) == 0
    assert (old / "finished/export/encoder.jaxexport").stat().st_size > 0


def test_it_is_gone_on_with(old: Path) -> None:
    """From step 5 of 8, with noise, to what the version of then made of it without a stop."""
    assert main(["train", "--run-dir", "unfinished", "--resume", "--no-plots", "--json"]) == 0
    run = open_run("unfinished")
    assert run.record["step"] == 8
    import safetensors.numpy

    for network, params in (("params", run.params), ("plain", run.plain)):
        then = safetensors.numpy.load_file(old / "uninterrupted" / f"{network}.safetensors")
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            # Not to the bit: another machine, or another version of JAX, rounds in another order.
            np.testing.assert_allclose(leaf, then[name], rtol=2e-5, atol=1e-7, err_msg=name)


DIGESTS = ["822f4f1b70012a0c", "db83a30c334464e0"]
"""Of the parameters of `finished`, as the version that wrote them read them."""
