"""The self-test must pass on a sound machine, and fail on one that is wrong in any of its ways."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from jaxcae import selftest
from jaxcae.cli import main
from jaxcae.penalty import EXACT_METHODS
from tests import reference as ref


@pytest.fixture(scope="module")
def outcome() -> selftest.SelfTest:
    """What it finds here; the tests that see it fail also run it through the command."""
    return selftest.self_test()


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch, outcome: selftest.SelfTest) -> None:
    """Let the command show that outcome, and not find out again."""
    monkeypatch.setattr(selftest, "self_test", lambda: outcome)


@pytest.mark.usefixtures("once")
def test_it_passes_here_and_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--self-test"]) == 0
    table = capsys.readouterr().out
    assert f"jaxlib {jax.lib.__version__}" in table
    assert "784-256-64, batch 128" in table
    assert all(f"{method}: norms and gradient" in table for method in EXACT_METHODS)
    assert "all 7 checks passed" in table
    assert max(map(len, table.splitlines())) <= 140


@pytest.mark.usefixtures("once")
def test_it_speaks_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--self-test", "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["passed"] is True
    assert len(outcome["checks"]) == 3 + len(EXACT_METHODS)


def test_its_reference_agrees_with_the_tests_own(rng: np.random.Generator) -> None:
    """Two derivations that share no line: by the product rule there, by the chain rule here."""
    layers = ref.random_layers(rng, (11, 7, 4))
    params = {"encoder": {f"layer_{i}": layer._asdict() for i, layer in enumerate(layers)}}
    xs = rng.normal(size=(5, 11))
    norms, gradient = selftest.reference(params, xs)
    _, want = ref.mlp_penalty(layers, xs, "softplus")
    np.testing.assert_allclose(norms, want, rtol=1e-12)
    wanted = ref.mlp_penalty_gradient(layers, xs, np.full(5, 1 / 5), "softplus")
    for name, got in gradient.items():
        layer, leaf = name.split("/")
        expected = getattr(wanted[int(layer[-1])], leaf)
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take sizes that compile at once: what is wrong here is wrong at any."""
    monkeypatch.setattr(selftest, "SIZES", (24, 12, 6))
    monkeypatch.setattr(selftest, "BATCH", 8)


@pytest.fixture
def one_method(monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    """Leave out the methods that a test is not about."""
    monkeypatch.setattr(selftest, "EXACT_METHODS", ("auto",))


def _fails(capsys: pytest.CaptureFixture[str], *names: str) -> None:
    assert main(["info", "--self-test"]) == 1
    table = capsys.readouterr().out
    failed = [line for line in table.splitlines() if line.startswith("FAIL")]
    assert len(failed) == len(names), table
    assert all(any(name in line for line in failed) for name in names), table
    assert f"{len(names)} of {3 + len(selftest.EXACT_METHODS)} checks failed" in table


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("method", "wrong"), [("chain", "value"), ("reverse", "gradient")])
def test_a_wrong_method_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], method: str, wrong: str
) -> None:
    right = selftest.contractive_penalty

    def penalty(encode: Callable, name: str) -> Callable:
        compute = right(encode, name)
        if name != method:
            return compute

        def bent(params: Any, xs: Any) -> Any:
            values = compute(params, xs)
            if wrong == "value":
                return values + 1e-3 * jax.lax.stop_gradient(values)
            return values + 1e-3 * (values - jax.lax.stop_gradient(values))

        return bent

    monkeypatch.setattr(selftest, "contractive_penalty", penalty)
    # The wrong one, and one that is right and must not be named.
    monkeypatch.setattr(selftest, "EXACT_METHODS", (method, "forward"))
    _fails(capsys, f"{method}: norms and gradient")


@pytest.mark.usefixtures("one_method")
def test_a_step_that_does_not_repeat_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, calls = selftest.make_train_step, iter(range(100))

    def drifting(*args: Any) -> Callable:
        step = make(*args)
        return lambda state, xs: step(state, xs + np.float32(1e-6) * next(calls))

    monkeypatch.setattr(selftest, "make_train_step", drifting)
    _fails(capsys, "the same bits each time")


@pytest.mark.usefixtures("one_method")
def test_a_wrong_jaxlib_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jax.lib, "__version__", "0.10.2")
    _fails(capsys, "jaxlib is not the one")


@pytest.mark.usefixtures("one_method")
def test_a_check_that_crashes_is_a_failure_and_not_a_crash(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr(selftest, "make_train_step", broken)
    _fails(capsys, "RuntimeError: the device is on fire")
