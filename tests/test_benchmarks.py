"""The benchmarks' own logic: what disagrees is refused, turns rotate, figures are read right.

No timing decides a test.
"""

import json
import math
from dataclasses import replace
from functools import partial
from itertools import count

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcae
from benchmarks import (
    architectures,
    estimators,
    foreign,
    methods,
    pictures,
    recipe,
    recipe_page,
    report,
    scaling,
    side_by_side,
    targets,
)
from benchmarks.__main__ import SUITES, main
from benchmarks.harness import Row, Settings, Subject, as_json, compare, verify
from benchmarks.one_run import flatten, unflatten
from jaxcae import timing
from jaxcae.cli import main as jaxcae_main
from jaxcae.jacobian.low_noise import describe_form
from jaxcae.jacobian.program import trace_encoder
from jaxcae.jacobian.structure import read_structure
from jaxcae.timing import Answer, DisagreementError, Timing, check_exact, check_unbiased

SIZES, BATCH = (6, 5, 3), 4
BRIEF = Settings(full=False, rounds=2, turn_seconds=1e-4, peak=1e9, say=lambda _: None)


@pytest.fixture
def network():
    return methods.network(SIZES, BATCH)


def reference_of(network):
    model, params, xs = network
    return methods.answer(methods.step(model, "reverse"), params, xs)


@pytest.mark.slow
def test_convolutions_are_held_against_pytorch_by_the_name_that_the_target_reads(monkeypatch):
    """The same loss, norms and gradients, from the same weights, before anything is timed."""
    monkeypatch.setattr(side_by_side, "IMAGE", (6, 5, 1))
    monkeypatch.setattr(side_by_side, "MAPS", (2, 3))
    monkeypatch.setattr(side_by_side, "LATENT", 2)
    ours = [r for r in side_by_side._convolutional(4, BRIEF) if r.check == "exact"]
    assert [row.name for row in ours] == ["jaxcae auto", "torch vmap(jacrev)"]
    assert max(error for row in ours for error in row.errors) < 1e-5
    group = ours[0].group
    for small, real in (("6×5", "28×28"), ("2 and 3", "16 and 32"), ("2,", "64,"), (" 4", " 128")):
        group = group.replace(small, real, 1)
    assert group == targets.CONVOLUTIONAL


class TestArchitectures:
    @pytest.mark.parametrize("architecture", architectures.ARCHITECTURES, ids=lambda a: a.name)
    def test_the_estimator_is_priced_wherever_it_can_read_the_encoder(self, architecture):
        model = architecture.make()
        params = jax.eval_shape(model.init, jax.random.key(0))
        xs = jax.ShapeDtypeStruct((2, *architecture.shape), "float32")
        encoder, _ = trace_encoder(model.encode, params, xs)
        told = describe_form(read_structure(encoder.program))
        assert told.startswith("not for this encoder") == (not architecture.low_noise)

    def test_a_line_for_each_holds_operations_and_time_over_the_plain_steps(self):
        rows = [
            {"group": f"{group}: sizes, batch 2", "name": name, "flops": flops, "times_unit": [t]}
            for group, name, flops, t in (
                ("conv", "plain", 2.0, 1.0),
                ("conv", "auto", 40.0, 15.0),
                ("conv", "control_variate", 7.0, 4.0),
                ("conv", "hutchinson", 3.0, 1.25),
                ("GRU", "plain", 1.0, 1.0),
                ("GRU", "auto", 5.0, 6.0),
                ("GRU", "hutchinson", 1.5, 1.75),
            )
        ]
        head, conv, gru = architectures.table(rows)
        assert head[2::2] == [f"{t}, operations" for t in architectures.METHODS.values()]
        assert conv == ["conv", "sizes", "20.00", "15.00", "3.50", "4.00", "1.50", "1.25"]
        assert gru == ["GRU", "sizes", "5.00", "6.00", "–", "–", "1.50", "1.75"]
        assert targets._low_noise_convolutions(targets.Rows(rows)) == 3.5

    @pytest.mark.slow
    def test_all_methods_agree_before_any_is_timed(self):
        small = architectures.Architecture("conv", "small", _small_conv, (12, 12, 1))
        rows = architectures._group(small, BATCH, BRIEF)
        assert {r.name: r.check for r in rows} == {
            "plain": "unit",
            "auto": "exact",
            "control_variate": "unbiased",
            "hutchinson": "unbiased",
        }
        assert "plain steps" in architectures._note(rows, rows[0].group)


def _small_conv():
    return jaxcae.conv((12, 12, 1), (3, 4), 3)


class TestAgreementComesFirst:
    @pytest.mark.parametrize("method", ["auto", "chain", "forward"])
    def test_exact_methods_pass(self, network, method):
        model, params, xs = network
        subject = methods.step_subject(model, params, xs, method)
        in_values, in_gradient = verify(subject, reference_of(network))
        assert in_values < 1e-5
        assert in_gradient < 1e-5

    @pytest.mark.parametrize("method", ["hutchinson", "control_variate"])
    def test_unbiased_methods_pass(self, network, method):
        model, params, xs = network
        subject = methods.step_subject(model, params, xs, method)
        spread, _ = verify(subject, reference_of(network))
        assert subject.check == "unbiased"
        assert spread < 1

    def test_a_wrong_value_is_refused(self, network):
        model, params, xs = network

        def wrong(params, xs, key):
            (value, metrics), gradient = methods.step(model, "auto")(params, xs, key)
            return (value, metrics | {"contraction": 1.001 * metrics["contraction"]}), gradient

        subject = methods.subject("wrong", wrong, params, xs)
        with pytest.raises(DisagreementError, match=r"wrong: values are off by 0\.001"):
            verify(subject, reference_of(network))

    def test_a_penalty_without_gradient_is_refused(self, network):
        """The value is right: only the gradients tell."""
        model, params, xs = network
        frozen = model._replace(
            encode=lambda p, x: (
                model.encode(jax.lax.stop_gradient(p), x)
                + model.encode(p, jax.lax.stop_gradient(x))
                - model.encode(jax.lax.stop_gradient(p), jax.lax.stop_gradient(x))
            )
        )
        subject = methods.step_subject(frozen, params, xs, "forward")
        with pytest.raises(DisagreementError, match="gradients are off"):
            verify(subject, reference_of(network))

    def test_the_gradient_of_the_summed_outputs_is_refused(self, network):
        """The commonest mistake: ‖Jᵀ1‖² is no average of ‖Jᵀv‖² over random v."""
        model, params, xs = network

        def summed(params, xs, key):
            def loss(params):
                def norm(x):
                    return jnp.sum(jax.grad(lambda x: jnp.sum(model.encode(params, x)))(x) ** 2)

                mean = jnp.mean(jax.vmap(norm)(xs)) + 0 * jax.random.normal(key)
                codes = jax.vmap(model.encode, (None, 0))(params, xs)
                x_hats = jax.vmap(model.decode, (None, 0))(params, codes)
                errors = jnp.mean(jnp.sum((xs - x_hats) ** 2, -1))
                return errors + methods.CONTRACTION * mean, {"contraction": mean}

            return jax.value_and_grad(loss, has_aux=True)(params)

        subject = methods.subject("summed", summed, params, xs, check="unbiased")
        with pytest.raises(DisagreementError, match="summed: the mean of 16 draws"):
            verify(subject, reference_of(network))

    def test_nothing_is_timed_before_all_agree(self, network):
        model, params, xs = network
        called = []
        right = methods.step_subject(model, params, xs, "auto")
        right = replace(right, call=lambda: called.append("right"))
        wrong = replace(
            right, name="wrong", answers=lambda: [Answer((0.0, 0.0), reference_of(network)[1])]
        )
        with pytest.raises(DisagreementError):
            compare("group", [right, wrong], BRIEF, reference_of(network))
        assert called == []

    def test_a_subject_with_nothing_to_check_is_refused(self):
        subject = Subject("loose", lambda: None)
        with pytest.raises(ValueError, match="loose: nothing to check it with"):
            verify(subject, None)

    def test_not_a_number_is_refused(self):
        good = Answer(1.0, np.ones(3))
        for bad in (Answer(math.nan, np.ones(3)), Answer(1.0, np.full(3, math.nan))):
            with pytest.raises(DisagreementError):
                check_exact("nan", bad, good, 1e-3)
            with pytest.raises(DisagreementError):
                check_unbiased("nan", [bad, bad], good, 1e-3)

    def test_a_biased_estimator_is_refused_and_an_unbiased_one_is_not(self):
        rng = np.random.default_rng(0)
        truth = Answer(2.0, np.array([1.0, 2.0]))
        draws = [
            Answer(2.0 + rng.normal(0, 0.1), truth.gradient + rng.normal(0, 0.1, 2))
            for _ in range(64)
        ]
        spread, _ = check_unbiased("good", draws, truth, 0.0)
        assert 0.03 < spread < 0.08  # 0.1 / 2
        biased = [Answer(a.values + 0.2, a.gradient) for a in draws]
        with pytest.raises(DisagreementError, match="in values"):
            check_unbiased("biased", biased, truth, 0.0)
        shrunk = [Answer(a.values, 0.8 * a.gradient) for a in draws]
        with pytest.raises(DisagreementError, match="in gradients"):
            check_unbiased("shrunk", shrunk, truth, 0.0)


class TestTurns:
    def test_every_program_takes_its_turns_in_a_rotating_order(self, monkeypatch):
        clock = count()
        monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
        order = []
        calls = {name: partial(order.append, name) for name in "abc"}
        timings = timing.interleave(calls, rounds=3, turn_seconds=1.0)
        assert "".join(order[-9:]) == "abcbcacab"
        assert {name: len(t.turns) for name, t in timings.items()} == dict.fromkeys("abc", 3)

    def test_a_slow_program_takes_fewer_turns_evenly(self):
        assert timing._turns(rounds=9, turn_seconds=0.1, each=100.0) == {0, 8}
        assert timing._turns(rounds=9, turn_seconds=0.1, each=1.0) == {0, 2, 4, 6, 8}
        assert timing._turns(rounds=9, turn_seconds=0.1, each=0.2) == set(range(9))

    def test_a_ratio_cancels_what_slows_a_whole_round(self):
        drift = [1.0, 10.0, 3.0, 0.5, 7.0]
        slow = Timing({i: 2.0 * d for i, d in enumerate(drift)})
        fast = Timing(dict(enumerate(drift)))
        found = timing.ratio(slow, fast)
        assert found == (2.0, 2.0, 2.0)

    def test_a_ratio_uses_the_rounds_that_both_took_part_in(self):
        often = Timing({0: 1.0, 1: 100.0, 2: 1.0, 3: 100.0, 4: 1.0})
        rarely = Timing({0: 6.0, 2: 8.0, 4: 10.0})
        assert timing.ratio(rarely, often) == (8.0, 6.0, 10.0)

    def test_rows_say_what_was_measured(self, network):
        model, params, xs = network
        subjects = [methods.step_subject(model, params, xs, name) for name in ("plain", "auto")]
        plain, exact = compare("group", subjects, BRIEF, reference_of(network))
        assert plain.times_unit == (1.0, 1.0, 1.0)
        assert len(exact.turns) == 2
        assert exact.flops > plain.flops
        assert exact.compile_seconds > 0
        assert exact.quartiles[0] <= exact.seconds <= exact.quartiles[1]
        json.dumps(as_json(exact), allow_nan=False)


class TestCounts:
    def test_two_layers_cost_the_same_per_sample_for_any_d_and_k(self):
        counts = [
            scaling.per_sample_flops(sizes, "auto")
            for sizes in ((96, 32, 8), (384, 32, 8), (96, 32, 16), (384, 32, 24))
        ]
        np.testing.assert_allclose(counts, counts[0], rtol=1e-3)

    def test_reverse_mode_does_not(self):
        few, many = (scaling.per_sample_flops((d, 32, 8), "reverse") for d in (96, 384))
        assert many > 3 * few

    def test_the_fitted_slope_is_the_exponent(self):
        assert scaling.slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)

    def test_foreign_encoders_take_the_same_operations(self, monkeypatch):
        monkeypatch.setattr(foreign, "SHALLOW", SIZES)
        for name, width in zip(("_D", "_H", "_K"), SIZES, strict=True):
            monkeypatch.setattr(foreign, name, width)
        rows = foreign._group(BATCH, BRIEF)
        flops = {row.name: row.flops for row in rows if row.name != "plain"}
        assert set(flops.values()) == {flops["built-in"]}
        assert {row.check for row in rows if row.name in foreign.ENCODERS} == {"exact"}


@pytest.fixture(scope="module")
def quality():
    """Rows of the estimators' suite for a small network."""
    few = {name: make for name, make in estimators.ESTIMATORS.items() if "1 probe" in name}
    few[estimators.INDEPENDENT] = estimators.independent_probes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimators, "ESTIMATORS", few)
        model, params, xs = methods.network((12, 10, 8, 5), 32)
        return estimators.quality(model, params, xs, "3 layers, softplus", BRIEF, {})


class TestQuality:
    @pytest.mark.slow
    def test_balance_helps_gradients_and_the_control_variate_all(self, quality):
        spread, gradient = (
            {row.name: row.errors[i] for row in quality if row.errors} for i in (0, 1)
        )
        assert spread["exact"] == gradient["exact"] == 0
        assert 3 * spread[estimators.CONTROL_VARIATE] < spread[estimators.PROBE]
        assert 1.5 * gradient[estimators.PROBE] < gradient[estimators.INDEPENDENT]

    def test_notes_and_picture_tell_it(self, quality, tmp_path):
        notes = estimators._notes(quality)
        assert "3 layers, softplus: balanced over the batch" in notes[1]
        suite = {"rows": [as_json(row) for row in quality]}
        assert pictures.estimators(suite, tmp_path / "picture.png").stat().st_size > 10_000


class TestReport:
    def stored(self, exact_seconds=2.0):
        rows = [
            Row("784-256-64, batch 128", "plain", 1.0, (0.9, 1.1), {0: 1.0}, (1.0, 1.0, 1.0)),
            Row("784-256-64, batch 128", "auto", exact_seconds, (1.8, 2.2), {0: exact_seconds}),
        ]
        environment = {
            "versions": {"jax": "0.0", "python": "3"},
            "device": {"platform": "cpu", "kind": "cpu"},
            "host": {"threads": 2},
            "matmul_peak": 1e11,
            "date": "2000-01-01T00:00:00+00:00",
            "mode": "quick",
        }
        suite = {
            "title": "Steps",
            "environment": environment,
            "notes": ["A note."],
            "rows": [as_json(row) for row in rows],
        }
        return json.loads(json.dumps({"steps": suite}))

    @pytest.mark.parametrize(("seconds", "word"), [(2.0, "met"), (2.01, "NOT MET")])
    def test_a_target_is_judged_by_its_bound(self, seconds, word):
        verdict = targets.judge(self.stored(seconds))[0]
        assert verdict.value == seconds
        assert verdict.word == word

    def test_what_is_not_measured_is_said_to_be(self):
        words = [verdict.word for verdict in targets.judge(self.stored())]
        assert words.count("not measured") == len(targets.TARGETS) - 1
        assert "not measured" in report.page(self.stored())

    def test_not_a_number_meets_no_target(self):
        assert not any(target.met(math.nan) for target in targets.TARGETS)

    def test_the_page_is_well_formed(self):
        page = report.page(self.stored())
        assert "- A note." in page
        tables = [block for block in page.split("\n\n") if block.startswith("|")]
        assert len(tables) == 2
        for table in tables:
            assert len({line.count(" |") for line in table.splitlines()}) == 1

    def test_every_target_names_a_suite(self):
        assert {target.suite for target in targets.TARGETS} <= set(SUITES)

    def test_an_unknown_suite_is_misuse(self, capsys, tmp_path):
        assert main(["--only", "stpes", "--out", str(tmp_path)]) == 2
        assert "Did you mean 'steps'?" in capsys.readouterr().err


def test_parameters_come_back_from_their_archive():
    params = {"encoder": {"layer_0": {"bias": np.ones(2)}}, "decoder": {"x": np.zeros(1)}}
    back = unflatten(flatten(params) | {"train": np.zeros(3)})
    assert jax.tree.structure(back) == jax.tree.structure(params)


class TestCommand:
    ARGUMENTS = ("bench", "--sizes", "6,5,3", "--batch-size", "4", "--rounds", "2")

    def test_it_prints_json(self, capsys):
        assert jaxcae_main([*self.ARGUMENTS, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        steps = {step["method"]: step for step in found["steps"]}
        assert list(steps) == ["plain", "auto", "reverse", "forward", "hutchinson"]
        assert steps["plain"]["times_plain"] == 1.0
        assert steps["auto"]["flops"] > steps["plain"]["flops"]
        assert max(steps["auto"]["error"]) < 1e-5

    def test_it_prints_a_table_within_80_columns(self, capsys):
        assert jaxcae_main([*self.ARGUMENTS, "--methods", "auto", "control_variate"]) == 0
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= 80
        assert "control_variate" in out
        assert "…" not in out

    def test_what_would_not_fit_is_not_run(self, capsys):
        arguments = [*self.ARGUMENTS, "--methods", "forward", "--memory-limit", "1e-9", "--json"]
        assert jaxcae_main(arguments) == 0
        forward = json.loads(capsys.readouterr().out)["steps"][1]
        assert "needs" in forward["skipped"]
        assert "seconds" not in forward

    def test_a_method_that_disagrees_stops_it(self, capsys, monkeypatch):
        from jaxcae.cli import bench

        step = bench._step

        def wrong(model, name):
            if name != "forward":
                return step(model, name)
            right = step(model, name)

            def twice(params, xs, key=None):
                (value, metrics), gradient = right(params, xs, key)
                return (2 * value, metrics), gradient

            return twice

        monkeypatch.setattr(bench, "_step", wrong)
        assert jaxcae_main([*self.ARGUMENTS]) == 1
        captured = capsys.readouterr()
        assert "forward: values are off by 1" in captured.err
        assert captured.out == ""

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--sizes", "784"], "--sizes: expected widths such as"),
            (["--methods", "revers"], "Did you mean 'reverse'?"),
            (["--batch-size", "0"], "--batch-size must be a positive int"),
            (["--activation", "reluu"], "Did you mean 'relu'?"),
        ],
    )
    def test_misuse_is_one_line(self, capsys, arguments, said):
        assert jaxcae_main(["bench", *arguments]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1


# --------------------------------------------------------------------------- the recipe


def validated(errors):
    """Make a measurement whose validation errors are a function of the point, for two seeds."""
    asked = []

    def at(point):
        asked.append(point)
        return [
            {"at": list(point), "seed": seed, "probe/option": 1}
            | {f"{c}/{part}": errors(point) for c in ("probe", "fine") for part in PARTS}
            | {"jacobian_norm": 1.0, "saturation": 0.5, "reconstruction": 80.0 + seed}
            for seed in (0, 1)
        ]

    return at, asked


PARTS = ("validation", "test")


def test_the_recipe_searches_until_its_best_has_neighbours_on_all_sides():
    """A valley far from the start is walked to; one that has no end is told."""
    at, asked = validated(lambda p: abs(np.log2(p[0] / 16)) + abs(np.log2(p[1])))
    records = recipe.search((1.0, 1.0), 4.0, at, rounds=6)
    assert recipe_page.best(records, "fine") == (16.0, 1.0)
    assert {(4.0, 1.0), (64.0, 1.0), (16.0, 0.25), (16.0, 4.0)} <= set(asked)
    assert len(asked) == len(set(asked)) < 16
    at, asked = validated(lambda p: -p[0])
    endless = recipe.search((1.0,), 2.0, at, rounds=3)
    assert recipe_page.best(endless, "probe") == (8.0,)
    kept = {"CAE": measured(endless, ["λ"], 2.0)}
    assert "the search ended before its best had neighbours on all sides" in recipe_page.page(kept)
    assert "ended before" not in recipe_page.page({"CAE+H": measured(records, ["λ", "γ"], 4.0)})


def measured(records, weights, factor):
    sizes = recipe.Sizes(seeds=2)._asdict()
    where = {"versions": {"jax": "0"}}
    return {"environment": where, "quick": False, "sizes": sizes, "weights": weights,
            "factor": factor, "l2": [1, 2, 3], "records": records}  # fmt: skip


def test_the_recipe_claims_what_its_intervals_carry():
    """By Student's t of differences seed by seed, with the correction for overlapping training."""
    noise = np.array([0.03, -0.02, 0.01, 0.0, -0.02])

    def of(errors):
        rows = [
            {"at": [], "seed": seed, "probe/option": 1, "jacobian_norm": 1.0, "saturation": 0.5,
             "reconstruction": 80.0}
            | {f"{c}/{part}": error for c in ("probe", "fine") for part in PARTS}
            for seed, error in enumerate(errors)
        ]  # fmt: skip
        return measured(rows, [], 4.0)

    kept = {"AE": of(0.1 + noise), "CAE": of(0.09 + noise + [1e-3, 0, 0, 0, 0]),
            "DAE": of(0.101 + noise[::-1]), "bad": of(0.2 + noise)}  # fmt: skip
    said = recipe_page.says(kept, "fine", 0.25)
    assert said[0] == "fine-tuned: CAE (-1.0 ± 0.1 points) errs less than AE."
    assert said[1].startswith("fine-tuned: bad (10.0 ± 0.0 points) errs more than AE.")
    assert said[2].startswith("fine-tuned: DAE (0.1 ± ")
    assert said[2].endswith("cannot be told from AE.")
    assert said[3] == ("fine-tuned: CAE has the lowest mean error, and DAE cannot be told from it.")
    interval = recipe_page.Interval.of([1.0, 2.0, 3.0, 4.0, 5.0], 0.25)
    assert interval.half == pytest.approx(2.776 * np.sqrt(2.5 * 0.45))
    assert recipe_page.Interval.of([1.0], 0.25).is_zero


@pytest.mark.slow
def test_the_recipe_runs_and_can_be_drawn_again(tmp_path, capsys):
    quick = ["recipe", "--quick", "--only", "AE", "--only", "CAE", "--out", str(tmp_path)]
    assert main(quick) == 0
    table = capsys.readouterr().out
    assert "**A quick form, not to be quoted.**" in table
    rows = [line for line in table.splitlines() if line.startswith(("| AE |", "| CAE |"))]
    assert len(rows) == 2
    assert main(["recipe", "--render", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == table
    with pytest.raises(SystemExit):
        main(["recipe", "--only", "VAE", "--out", str(tmp_path)])
    assert "unknown method 'VAE'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_examples_are_drawn(tmp_path, capsys):
    assert main(["examples", "--quick", "--out", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.split()) == 2
    assert all((tmp_path / f"{n}.png").stat().st_size > 10_000 for n in ("tangents", "sampler"))
