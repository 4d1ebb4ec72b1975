"""The parity suite can fail: each way to be wrong is reported, and by the right name."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxcae
from jaxcae.activations import Activation
from parity import cases, compare, convert, recurrent, run, train
from parity.compare import Row, Subject, jaxcae_subject


def case(name: str) -> cases.Case:
    (found,) = (c for c in (*cases.table(), *train.table()) if c.id == name)
    return found


def breaches(
    name: str, subject: Callable[[cases.Case, str], Subject] = jaxcae_subject, **options: Any
) -> list[Row]:
    """Run a case and return what is out of bounds; everything is within them when unbroken."""
    return [row for row in compare.compare(case(name), subject=subject, **options) if not row.ok]


def quantities(rows: list[Row]) -> set[str]:
    return {row.quantity for row in rows}


def test_one_method_off_by_a_part_in_a_billion(monkeypatch):
    from jaxcae.jacobian import directions

    exact = directions.reverse

    def off(*arguments):
        per_sample = exact(*arguments)

        def code_and_norm(x):
            code, norm = per_sample(x)
            return code, norm * (1 + 1e-9)

        return code_and_norm

    monkeypatch.setattr(directions, "reverse", off)
    found = breaches("dense/tanh/tied/bernoulli/float64", methods=("forward", "reverse"))
    assert {row.method for row in found} == {"reverse"}
    assert {"norms", "gradient"} <= quantities(found)
    assert "codes" not in quantities(found)


def test_a_detached_weight():
    def detached(case: cases.Case, method: str) -> Subject:
        subject = jaxcae_subject(case, method)

        def encode(params, x):
            layer = params["encoder"]["layer_0"]
            layer = layer | {"kernel": jax.lax.stop_gradient(layer["kernel"])}
            return subject.model.encode(
                {"encoder": params["encoder"] | {"layer_0": layer}, "decoder": {}}, x
            )

        model = subject.model._replace(encode=encode)
        return Subject(
            model,
            jaxcae.contractive_penalty(encode, method),
            jaxcae.cae_loss(model, case.contraction, method=method),
        )

    found = breaches("dense/tanh/untied/squared_error/float32", detached, methods=("auto",))
    assert quantities(found) == {"gradient", "gradient elements"}
    assert {row.leaf for row in found} == {"encoder/layer_0/kernel"}


def test_the_slope_of_another_activation(monkeypatch):
    @jax.custom_jvp
    def tanh(a):
        return jnp.tanh(a)

    @tanh.defjvp
    def _(primals, tangents):
        h = jax.nn.sigmoid(primals[0])
        return jnp.tanh(primals[0]), h * (1 - h) * tangents[0]

    monkeypatch.setitem(
        jaxcae.ACTIVATIONS, "tanh", Activation(tanh, jaxcae.ACTIVATIONS["sigmoid"].slope)
    )
    found = breaches("dense/tanh/untied/squared_error/float32")
    assert {row.method for row in found} == set(compare.EXACT_METHODS)
    assert {"norms", "gradient"} <= quantities(found)
    assert quantities(found).isdisjoint({"codes", "reconstructions"})


def test_a_dropped_batch_mean(monkeypatch):
    from jaxcae.objective import cae as objective

    class Dropped:
        mean = staticmethod(jnp.sum)

        def __getattr__(self, name):
            return getattr(jnp, name)

    monkeypatch.setattr(objective, "jnp", Dropped())
    found = breaches("dense/tanh/untied/squared_error/float32", methods=("auto",))
    assert quantities(found) == {"loss", "gradient", "gradient elements"}


def test_a_transposed_kernel(monkeypatch):
    right = convert.kernel_to_torch
    monkeypatch.setattr(
        convert,
        "kernel_to_torch",
        lambda kernel: kernel if kernel.shape == (6, 6) else right(kernel),
    )
    found = breaches("square/tanh/float32", methods=("auto",))
    assert {"codes", "reconstructions", "norms", "loss"} <= quantities(found)


def test_two_swapped_layers(monkeypatch):
    def swapped(case: cases.Case, method: str) -> Subject:
        subject = jaxcae_subject(case, method)

        def encode(params, x):
            layers = params["encoder"]
            layers = {"layer_0": layers["layer_1"], "layer_1": layers["layer_0"]}
            return subject.model.encode({"encoder": layers}, x)

        return subject._replace(model=subject.model._replace(encode=encode))

    assert "codes" in quantities(breaches("square/tanh/float32", swapped, methods=("auto",)))


def test_stale_params():
    def stale(case: cases.Case, method: str) -> Subject:
        from parity.materials import params_of

        subject = jaxcae_subject(case, method)
        snapshot = params_of(case)
        norms = jaxcae.contractive_penalty(lambda _, x: subject.model.encode(snapshot, x), method)

        def loss(params, xs, key=None):
            plain = jaxcae.cae_loss(subject.model, None)(params, xs)[0]
            return plain + case.contraction * jnp.mean(norms(params, xs)), {}

        return Subject(subject.model, norms, loss)

    found = breaches("dense/tanh/untied/squared_error/float32", stale, methods=("auto",))
    # Every value is right: only the gradient tells, and only that of the encoder.
    assert quantities(found) == {"gradient", "gradient elements"}
    assert {row.leaf.split("/")[0] for row in found} == {"encoder"}


@pytest.mark.parametrize(
    "wrong", [jnp.sqrt, lambda norms: norms / 2, lambda norms: norms * jnp.nan]
)
def test_another_penalty(wrong):
    def other(case: cases.Case, method: str) -> Subject:
        subject = jaxcae_subject(case, method)
        return subject._replace(norms=lambda params, xs: wrong(subject.norms(params, xs)))

    found = breaches("dense/tanh/untied/squared_error/float32", other, methods=("auto",))
    assert quantities(found) == {"norms", "sample losses"}


def test_weight_penalties_that_count_biases(monkeypatch):
    from jaxcae.objective import weight_penalties

    monkeypatch.setattr(weight_penalties, "kernels", lambda params: jax.tree.leaves(params))
    found = breaches("weight-terms/tanh/untied/float64", methods=("reverse",))
    assert quantities(found) == {"loss", "gradient", "gradient elements"}
    assert {row.leaf.rpartition("/")[2] for row in found if row.leaf} == {"bias"}


def recurrent_breaches(kind: str, encode: Callable[[Any, Any], Any]) -> list[Row]:
    (found,) = (c for c in recurrent.table() if c.id == f"recurrent/{kind}/float64")
    rows = recurrent.compare(found, ("reverse",), {kind: encode})
    return [row for row in rows if not row.ok]


def test_the_gru_of_the_paper_is_not_that_of_pytorch():
    """The reset gate before the product with U, as in arXiv:1406.1078, instead of after it."""

    def gru(params, x):
        def cell(h, gates):
            kernel, bias = params["hidden"]["kernel"], params["hidden"]["bias"]
            (a, b, c), (d, e, _) = jnp.split(gates, 3), jnp.split(h @ kernel + bias, 3)
            reset, update = jax.nn.sigmoid(a + d), jax.nn.sigmoid(b + e)
            f = ((reset * h) @ kernel + bias)[-len(h) :]
            return (1 - update) * jnp.tanh(c + f) + update * h, None

        gates = x @ params["input"]["kernel"] + params["input"]["bias"][None]
        return jax.lax.scan(cell, jnp.zeros(5, gates.dtype), gates)[0]

    assert {"codes", "norms", "gradient"} <= quantities(recurrent_breaches("gru", gru))


def test_a_recurrence_without_gradient():
    """Backpropagation cut at each step: every code is right, and no norm."""

    def gru(params, x):
        h = jnp.zeros(5, x.dtype)
        for i in range(len(x)):
            h = one_step(params, jax.lax.stop_gradient(h), x[i])
        return h

    def one_step(params, h, x):
        gates = x @ params["input"]["kernel"] + params["input"]["bias"]
        of_h = h @ params["hidden"]["kernel"] + params["hidden"]["bias"]
        (a, b, c), (d, e, f) = jnp.split(gates, 3), jnp.split(of_h, 3)
        update = jax.nn.sigmoid(b + e)
        return (1 - update) * jnp.tanh(c + jax.nn.sigmoid(a + d) * f) + update * h

    found = quantities(recurrent_breaches("gru", gru))
    assert {"norms", "gradient"} <= found
    assert "codes" not in found


def test_a_rate_that_stays(monkeypatch):
    monkeypatch.setattr(train.optax, "cosine_decay_schedule", lambda rate, steps: rate)
    name = "training/sigmoid-784-32/tied/float64"
    found = [row for row in train.drift(case(name), "adam-cosine", steps=3) if not row.ok]
    assert [row.leaf for row in found if row.quantity == "drift of adam"] == ["step 2", "step 3"]


def test_another_epsilon_in_adam(monkeypatch):
    import optax

    adam = optax.adam
    monkeypatch.setattr(train.optax, "adam", lambda rate: adam(rate, eps=1.1e-8))
    name = "training/sigmoid-784-32/tied/float64"
    found = [row for row in train.drift(case(name), "adam", steps=3) if not row.ok]
    assert "drift of adam" in quantities(found)


def test_an_optimizer_that_stands_still(monkeypatch):
    import optax

    monkeypatch.setattr(train.optax, "sgd", lambda rate: optax.set_to_zero())
    name = "training/sigmoid-784-32/tied/float32"
    found = [row for row in train.drift(case(name), "sgd", steps=2) if not row.ok]
    assert [row.leaf for row in found if row.quantity == "drift of sgd"] == ["step 1", "step 2"]


def test_the_command_names_the_breach(monkeypatch, tmp_path, capsys):
    import parity.__main__ as command

    def off(case: cases.Case, method: str) -> Subject:
        subject = jaxcae_subject(case, method)
        return subject._replace(norms=lambda *a: subject.norms(*a) * (1 + 1e-9))

    monkeypatch.setattr(
        run,
        "_compare",
        lambda case, device: compare.compare(case, ("reverse",), off, run.torch_name(device)),
    )
    assert command.main(["--case", "square/tanh/float64", "--out", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "breach: square/tanh/float64 by reverse: norms: relative error 1.00e-09" in shown
    assert "FAILED: 2 of" in shown
