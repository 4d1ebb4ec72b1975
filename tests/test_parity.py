"""jaxcae equals PyTorch: the case table, the training runs, and the command that runs them.

torch is imported at the top on purpose: without it this file fails, it does not skip.
"""

import functools
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

import parity.__main__ as command
from jaxcae.penalty import METHODS
from parity import cases, compare, materials, report, run, tolerances, train
from parity.compare import Row

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _one_torch_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Of the core these are left to the slow tests: another of their kind stays.
LONG = {
    "training/softplus-784-256-64/float64/sgd",
    "conv/softplus/untied/float64",
    "deep/softplus/float32",
    "family/noise-form/gelu/float32",
}
JOBS = [
    pytest.param(job, id=job.id, marks=() if job.core and job.id not in LONG else pytest.mark.slow)
    for job in run.jobs()
]


@functools.cache
def measured(name: str) -> list[Row]:
    """Measure one job, once for all tests of this file that look at it."""
    (job,) = (job for job in run.jobs() if job.id == name)
    with run.on("cpu"):
        return list(job.rows("cpu"))


@pytest.mark.parametrize("job", JOBS)
def test_equals_pytorch(job: run.Job):
    rows = measured(job.id)
    breaches = [report.describe(row) for row in rows if not row.ok]
    assert not breaches, "\n".join(breaches)
    assert rows


def test_every_exact_method_is_compared():
    estimators = {"hutchinson", "finite_difference", "control_variate"}
    assert set(compare.EXACT_METHODS) == set(METHODS) - estimators
    compared = {row.method for row in measured("square/tanh/float64")}
    assert compared == {*compare.EXACT_METHODS, "torch, by code unit"}


def test_every_quantity_and_leaf_is_compared():
    rows = measured("one-layer/sigmoid/tied/float32")
    assert {row.method for row in rows if row.method.startswith("torch")} == {
        "torch, by code unit",
        "torch, closed form",
    }
    ours = [row for row in rows if row.method == "auto"]
    assert [row.quantity for row in ours if not row.leaf] == [
        "codes",
        "reconstructions",
        "sample losses",
        "norms",
        "loss",
    ]
    assert {row.leaf for row in ours if row.quantity == "gradient"} == {
        "encoder/layer_0/kernel",
        "encoder/layer_0/bias",
        "decoder/layer_0/bias",
    }


def test_core_covers_every_pair_of_options():
    core = [c for c in cases.table() if c.name.startswith("dense/") and c.dtype in c.core]
    options = [(c.activation, c.tied, c.reconstruction, c.dtype) for c in core]
    every = [
        (c.activation, c.tied, c.reconstruction, c.dtype)
        for c in cases.table()
        if c.name.startswith("dense/")
    ]
    for one in range(4):
        for two in range(one):
            assert {(o[one], o[two]) for o in options} == {(o[one], o[two]) for o in every}


def test_the_table_holds_every_activation():
    from jaxcae import ACTIVATIONS

    used = {case.activation for case in cases.table()}
    assert set(ACTIVATIONS) <= used


def test_batches_are_clear_of_kinks():
    for case in cases.table():
        if case.activation == "relu" and case.data == "uniform" and case.dtype == "float32":
            model = materials.torch_model(case, materials.params_of(case))
            xs = materials.to_torch(materials.batch_of(case))
            assert materials.distance_to_kink(model, xs).min() > 0.9 * materials.KINK_MARGIN


@pytest.mark.parametrize("measure", ["relative", "scaled", "norm"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_measure_accepts_nan_or_inf(measure, bad):
    ours, theirs = np.array([1.0, bad]), np.array([1.0, 2.0])
    for one, two in ((ours, theirs), (theirs, ours), (ours, ours)):
        row = Row("c", "m", "float64", "norms", "", measure, tolerances.error(measure, one, two), 1)
        assert not row.ok
        assert report.severity(row) > 1e6


def test_measures_by_hand():
    ours, theirs = np.array([3.0, 1.1]), np.array([4.0, 1.0])
    assert tolerances.error("relative", ours, theirs) == pytest.approx(0.25)
    assert tolerances.error("scaled", ours, theirs) == pytest.approx(0.25)
    assert tolerances.error("norm", ours, theirs) == pytest.approx(math.sqrt(1.01 / 17))
    assert tolerances.error("relative", np.zeros(2), np.zeros(2)) == 0
    zero_and_three = np.array([0.0, 3.0]), np.array([0.0, 4.0])
    assert tolerances.error("relative", *zero_and_three) == pytest.approx(0.25)
    assert tolerances.error("norm", ours, np.zeros(2)) == math.inf


def test_bounds_are_those_promised():
    for name, measure, double, single in (
        ("norms", "relative", 1e-12, 2e-6),
        ("gradient", "norm", 1e-12, 5e-6),
        ("gradient elements", "scaled", 1e-12, 5e-6),
    ):
        entry = tolerances.find(name, "dense/tanh/tied/bernoulli", "auto")
        assert (entry.measure, entry.float64, entry.float32) == (measure, double, single)
    assert tolerances.find("norms", "softplus-over-20", "auto").float64 == 1e-8
    for activation in ("sigmoid", "tanh"):  # only PyTorch is excused where units saturate
        case = f"saturated/{activation}"
        assert tolerances.find("norms", case, "chain").float32 == 2e-6
        assert tolerances.find("norms", case, "torch, by code unit").float32 > 1e-5
    assert all(len(entry.reason) > 20 for entry in tolerances.TABLE)


def test_the_threshold_of_softplus_is_all_that_its_bound_excuses():
    """The same case meets the ordinary bounds once torch's threshold is out of the way."""
    cut, raised = (
        next(c for c in cases.table() if c.name == name)
        for name in ("softplus-over-20", "raised-threshold/softplus")
    )
    assert (cut.sizes, cut.gain, cut.dtype) == (raised.sizes, raised.gain, raised.dtype)
    errors = {
        case.name: max(row.error for row in measured(case.id) if row.method == "reverse")
        for case in (cut, raised)
    }
    assert errors["softplus-over-20"] > 1e-12 > errors["raised-threshold/softplus"]


def test_a_wrong_dtype_is_an_error(monkeypatch):
    (case,) = (c for c in cases.table() if c.id == "square/tanh/float64")
    monkeypatch.setattr(jax, "enable_x64", lambda on: jax.default_matmul_precision("highest"))
    with pytest.raises(TypeError, match="codes is float32"):
        list(compare.compare(case, ("reverse",)))


def test_no_product_is_rounded_to_fewer_digits_on_either_side():
    """TF32 off and highest precision while comparing, as it was before afterwards."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = True
        (case,) = (c for c in cases.table() if c.id == "conv/tanh/tied/float32")
        subject = compare.jaxcae_subject(case, "reverse")
        with run.on("cpu"):
            assert not any(switch.allow_tf32 for switch in switches)
            about = report.environment("cpu")
            program = jax.jit(jax.grad(subject.loss, has_aux=True)).lower(
                materials.params_of(case), materials.batch_of(case)
            )
        assert all(switch.allow_tf32 for switch in switches)
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value
    assert about["torch_allow_tf32"] is False
    assert about["jax_default_matmul_precision"] == "highest"
    products = re.findall(r"stablehlo\.(?:dot_general|convolution).*", program.as_text())
    assert len(products) > 10
    assert all(line.count("HIGHEST") == 2 for line in products), products


def test_drift_is_reported_for_every_step():
    (case,) = (c for c in train.table() if c.id == "training/sigmoid-784-32/tied/float32")
    rows = list(train.drift(case, "sgd", steps=3))
    drifts = [row for row in rows if row.quantity == "drift of sgd"]
    assert [row.leaf for row in drifts] == ["step 1", "step 2", "step 3"]
    # The frameworks round differently: an error of 0 would mean that one side is not run.
    assert all(row.error > 0 for row in drifts)


def one_method(case: cases.Case, device: run.Device) -> Iterator[Row]:
    """Compare a case by one method, where it is what is told that matters."""
    return compare.compare(case, ("reverse",), device=run.torch_name(device))


class TestCommand:
    def test_writes_table_json_and_markdown(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(run, "_compare", one_method)
        assert command.main(["--case", "square/tanh", "--out", str(tmp_path)]) == 0
        shown = capsys.readouterr().out
        assert "PASSED" in shown
        assert "in ε" in shown
        found = json.loads((tmp_path / "report.json").read_text())
        assert found["passed"] is True
        assert found["breaches"] == []
        assert found["versions"]["torch"] == torch.__version__
        assert {row["case"] for row in found["rows"]} == {
            "square/tanh/float64",
            "square/tanh/float32",
        }
        text = (tmp_path / "report.md").read_text()
        assert text.startswith("# Parity report")
        assert "| norms | float64 | relative |" in text
        assert "a sum of squares: nothing cancels" in text

    def test_the_cost_is_written_as_it_is_printed(self, tmp_path, capsys):
        assert command.main(["cost", "--turns", "1", "--out", str(tmp_path)]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        rows = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in (tmp_path / "cost.md").read_text().splitlines()
            if line.startswith(("| torch", "| jaxcae"))
        ]
        assert len(rows) == 6
        for name, ms, times_plain, _ in rows:
            assert name in shown
            assert float(ms) > 0
            assert float(times_plain) == 1 or "no penalty" not in name

    def test_one_on_a_breach(self, tmp_path, capsys, monkeypatch):
        tight = tuple(entry._replace(float64=1e-30) for entry in tolerances.TABLE)
        monkeypatch.setattr(tolerances, "TABLE", tight)
        monkeypatch.setattr(report, "TABLE", tight)
        monkeypatch.setattr(run, "_compare", one_method)
        assert command.main(["--case", "square/tanh/float64", "--out", str(tmp_path)]) == 1
        assert "breach: square/tanh/float64 by " in capsys.readouterr().out
        found = json.loads((tmp_path / "report.json").read_text())
        assert found["passed"] is False
        assert found["breaches"]

    def test_two_for_an_unknown_case(self, capsys):
        assert command.main(["--case", "dense/tahn"]) == 2
        error = capsys.readouterr().err
        assert "no case matches 'dense/tahn'" in error
        assert "dense/tanh" in error

    def test_two_and_one_line_where_jax_has_no_gpu(self, capsys, monkeypatch, tmp_path):
        def none(kind):
            raise RuntimeError(f"Unknown backend: '{kind}'\nand more")

        monkeypatch.setattr(jax, "devices", none)
        arguments = ["--case", "square", "--device", "gpu", "--out", str(tmp_path / "out")]
        assert command.main(arguments) == 2
        shown = capsys.readouterr()
        assert shown.err == "error: JAX has no GPU here: Unknown backend: 'gpu'\n"
        assert shown.out == ""
        assert not (tmp_path / "out").exists()

    def test_two_and_one_line_where_only_pytorch_has_no_gpu(self, capsys, monkeypatch):
        devices = jax.devices("cpu")
        monkeypatch.setattr(jax, "devices", lambda kind: devices)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert command.main(["--case", "square", "--device", "gpu"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: this PyTorch has no CUDA device")
        assert error.count("\n") == 1

    def test_two_for_a_device_where_it_means_nothing(self, capsys):
        assert command.main(["--device", "gpu", "museum"]) == 2
        assert "--device is for the comparison" in capsys.readouterr().err

    def test_two_with_the_install_line_where_torch_is_missing(self, tmp_path):
        hide = (
            "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['parity'];"
            "runpy.run_module('parity', run_name='__main__')"
        )
        done = subprocess.run(
            [sys.executable, "-c", hide], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.splitlines() == [
            "error: torch is not installed. Install with: pip install -e '.[parity]'"
        ]

    def test_lists_the_cases(self, capsys):
        assert command.main(["--list", "--case", "conv/*"]) == 0
        assert "conv/tanh/tied/float32" in capsys.readouterr().out.splitlines()
