"""Terms: any kind of weight, lazily taken, weighed samples, own functions of the forward pass."""

import decimal
import fractions
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcae
from jaxcae.objective import Term, contraction_term, forward_pass, side_by_side
from jaxcae.results.scores import scores
from tests.tolerances import assert_close, assert_each_close

MODEL = jaxcae.mlp((5, 4, 3), "tanh")
# What terms do does not depend on the method, and this one is traced the fastest.
cae_loss = functools.partial(jaxcae.cae_loss, method="reverse")


@functools.cache
def material() -> tuple[Any, Any]:
    """Give parameters and samples; made when first asked for."""
    return MODEL.init(jax.random.key(0)), jax.random.uniform(jax.random.key(1), (6, 5))


def value(loss: Any, **context: Any) -> float:
    return float(loss(*material(), **context)[0])


def test_an_own_term_in_five_lines():
    """As the README shows it: a function of the forward pass to one value per sample."""

    def sparsity(forward):
        return jnp.sum(jnp.abs(forward.codes), -1)

    loss = cae_loss(MODEL, 0.1, terms=(Term("sparsity", 0.5, sparsity),))
    params, xs = material()
    codes = jax.vmap(MODEL.encode, (None, 0))(params, xs)
    total, metrics = loss(params, xs)
    assert_close(metrics["sparsity"], np.abs(np.asarray(codes)).sum(-1).mean(), "float32")
    plain = value(cae_loss(MODEL, 0.1))
    assert_close(total, plain + 0.5 * float(metrics["sparsity"]), "float32")
    assert set(metrics) == {"loss", "reconstruction", "contraction", "sparsity"}


WEIGHTS = {
    "int": 2,
    "NumPy float32": np.float32(2),
    "NumPy int64": np.int64(2),
    "NumPy array": np.array(2.0),
    "JAX scalar": lambda: jnp.asarray(2.0),  # made in the test
    "schedule": optax.constant_schedule(2.0),
}


@pytest.mark.parametrize("option", ["contraction", "l1", "l2"])
@pytest.mark.parametrize("kind", sorted(WEIGHTS))
def test_a_weight_may_be_of_any_kind(kind, option):
    """Each gives the loss that the float gives."""
    weight = WEIGHTS[kind]() if kind == "JAX scalar" else WEIGHTS[kind]
    want = value(cae_loss(MODEL, **{"contraction": None, option: 2.0}))
    loss = cae_loss(MODEL, **{"contraction": None, option: weight})
    assert_close(value(loss, step=3), want, "float32")


def test_a_traced_weight_is_one_program_for_a_whole_sweep():
    """λ as an argument of a jitted function, with its own derivative: the mean norm."""
    params, xs = material()
    traces = []

    @jax.jit
    @jax.value_and_grad
    def sweep(weight):
        traces.append(weight)
        return cae_loss(MODEL, weight)(params, xs)[0]

    norm = float(jaxcae.contractive_penalty(MODEL.encode, "reverse")(params, xs).mean())
    for weight in (0.0, 0.5, 2.0):
        got, slope = sweep(weight)
        assert_close(got, value(cae_loss(MODEL, weight)), "float32")
        assert_close(slope, norm, "float32")
    assert len(traces) == 1


def test_a_schedule_reads_the_step_and_asks_for_it():
    """Linear from 0 to 1 over ten steps; without a step one line says what is missing."""
    loss = cae_loss(MODEL, optax.linear_schedule(0.0, 1.0, 10))
    assert_close(value(loss, step=4), value(cae_loss(MODEL, 0.4)), "float32")
    with pytest.raises(ValueError, match=r"'contraction' is a schedule: call .* step="):
        value(loss)


@pytest.mark.parametrize("weight", [0, 0.0, np.float32(0), np.zeros(())])
def test_a_known_zero_measures_without_a_gradient(weight):
    """Whatever kind of zero it is."""
    params, xs = material()
    (_, metrics), got = jax.value_and_grad(cae_loss(MODEL, weight), has_aux=True)(params, xs)
    want = jax.grad(lambda p: cae_loss(MODEL, None)(p, xs)[0])(params)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert float(metrics["contraction"]) > 0


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (-1.0, "t must be finite and at least 0, got -1.0"),
        (np.float32("nan"), "t must be finite"),
        (np.ones(3), r"t must be a scalar, got an array of shape \(3,\)"),
        ("much", "t must be a number, .*got 'much'"),
        ("0.1", "t must be a number, .*got '0.1'"),
        (fractions.Fraction(1, 10), "t must be a number, .*got Fraction"),
        (decimal.Decimal("0.1"), "t must be a number, .*got Decimal"),
    ],
)
def test_an_unusable_weight_is_refused_by_name(weight, message):
    """When the term is made."""
    with pytest.raises(ValueError, match=message):
        Term("t", weight, lambda forward: forward.norms)


# --------------------------------------------------------------------------- lazy terms


def products(jaxpr: Any, taken: bool) -> int:
    """Count the products of matrices that run, by the branch that is taken."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "cond":
            bodies = [eqn.params["branches"][taken].jaxpr]
        else:
            bodies = list(jax.extend.core.jaxprs_in_params(eqn.params))
        total += eqn.primitive.name == "dot_general"
        total += sum(products(body, taken) for body in bodies)
    return total


def test_the_work_of_a_lazy_term_is_skipped():
    """At the steps between, value and gradient make the products of a plain autoencoder."""
    params, xs = material()

    def program(loss):
        grad = jax.value_and_grad(lambda p, s: loss(p, xs, step=s)[0])
        return jax.make_jaxpr(grad)(params, 0).jaxpr

    lazy = program(cae_loss(MODEL, 0.1, contraction_every=4))
    plain = program(cae_loss(MODEL, None))
    always = program(cae_loss(MODEL, 0.1))
    assert products(lazy, taken=False) == products(plain, taken=False)
    assert products(lazy, taken=True) >= products(always, taken=True) > products(plain, taken=True)


def test_a_lazy_term_averages_to_the_term():
    """Over n steps: the metric, the loss and the gradient; the loss is the sum at each step."""
    params, xs = material()
    lazy = jax.jit(
        jax.value_and_grad(
            lambda p, s: cae_loss(MODEL, 0.3, contraction_every=3)(p, xs, step=s),
            has_aux=True,
        )
    )
    always = jax.value_and_grad(cae_loss(MODEL, 0.3), has_aux=True)
    (want, metrics), gradient = always(params, xs)
    (taken, own), grads = lazy(params, 3)
    (between, none), rest = lazy(params, 4)
    assert float(none["contraction"]) == 0.0
    assert_close(own["contraction"], 3 * float(metrics["contraction"]), "float32")
    assert_close((taken + 2 * between) / 3, want, "float32")
    mean = jax.tree.map(lambda a, b: (a + 2 * b) / 3, grads, rest)
    jax.tree.map(lambda a, b: assert_close(a, b, "float32"), mean, gradient)


def test_evaluation_and_a_loss_without_a_step_take_every_term():
    """`fit` evaluates what it trains towards, at whatever step."""
    loss = side_by_side({"one": cae_loss(MODEL, 0.3, contraction_every=4)})
    params, xs = material()
    want = value(cae_loss(MODEL, 0.3))
    assert_close(loss({"one": params}, xs)[0], want, "float32")
    for step in (0, 1):
        got = jaxcae.evaluate(loss, {"one": params}, xs, step=step)
        assert got["loss"] == pytest.approx(want, rel=1e-5)


def test_fit_hands_the_step_to_lazy_terms_and_schedules():
    """Of eight steps two are taken, and λ grows from step to step."""
    params, xs = material()
    loss = cae_loss(MODEL, lambda step: step / 8, contraction_every=4)
    optimizer = optax.sgd(0.0)
    state = jaxcae.TrainState.create(params, optimizer, jax.random.key(0))
    seen: list[Any] = []
    jaxcae.fit(
        loss, optimizer, state, xs, epochs=8, callback=lambda segment: seen.append(segment.metrics)
    )
    taken = np.concatenate([metrics["contraction"] for metrics in seen if metrics])
    excess = np.concatenate([m["loss"] - m["reconstruction"] for m in seen if m])
    norm = float(jaxcae.contractive_penalty(MODEL.encode, "reverse")(params, xs).mean())
    np.testing.assert_allclose(taken, [4 * norm, 0, 0, 0] * 2, rtol=1e-5)
    np.testing.assert_allclose(excess, np.arange(8) / 8 * taken, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------- weighed samples


@pytest.mark.parametrize("networks", [1, 2])
def test_rows_of_weight_zero_do_not_count(networks):
    """A batch padded by copies has the value and the gradient of the batch."""
    params, xs = material()
    one = cae_loss(MODEL, 0.3, l2=0.1)
    loss = one if networks == 1 else side_by_side({"a": one, "b": one})
    tree = params if networks == 1 else {"a": params, "b": params}
    padded = jnp.concatenate([xs, xs[:2]])
    weights = jnp.asarray([1.0] * 6 + [0.0] * 2)
    (got, metrics), grads = jax.value_and_grad(loss, has_aux=True)(tree, padded, weights=weights)
    (want, own), gradient = jax.value_and_grad(loss, has_aux=True)(tree, xs)
    assert_close(got, want, "float32")
    jax.tree.map(lambda a, b: assert_close(a, b, "float32"), (metrics, grads), (own, gradient))


# --------------------------------------------------------------------------- one forward pass


@pytest.mark.parametrize("first", ["codes", "norms", "x_hats"])
def test_the_encoder_is_traced_once_whatever_is_asked_for_first(first):
    """A term that reads codes adds no trace to those of the norms."""
    calls = []

    def encode(params, x):
        calls.append(x)
        return MODEL.encode(params, x)

    params, xs = material()
    jaxcae.encode_and_penalty(encode, "reverse")(params, xs)
    alone = len(calls)
    calls.clear()
    forward = forward_pass(MODEL._replace(encode=encode), "reverse")(params, xs)
    getattr(forward, first)
    for name in ("x_hats", "norms", "codes"):
        getattr(forward, name)
    assert len(calls) == alone
    assert_each_close(
        forward.norms, jaxcae.contractive_penalty(MODEL.encode, "reverse")(params, xs), "float32"
    )


def test_what_nobody_asks_for_is_not_computed():
    """Without norms the encoder runs as `vmap` runs it."""
    calls = []

    def encode(params, x):
        calls.append(x)
        return MODEL.encode(params, x)

    model = MODEL._replace(encode=encode)
    cae_loss(model, None)(*material())
    assert len(calls) == 1


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("values", "shape"),
    [
        (lambda forward: forward.codes, r"\(6, 3\)"),
        (lambda forward: forward.norms[:, None], r"\(6, 1\)"),
        (lambda forward: jnp.ones(1), r"\(1,\)"),
    ],
)
def test_a_term_must_give_one_number_per_sample(values, shape):
    """Its mean would be of something else, and nothing would say so."""
    loss = cae_loss(MODEL, None, terms=(Term("mine", 1.0, values),))
    with pytest.raises(ValueError, match=rf"'mine' must give one number per sample.*got .*{shape}"):
        loss(*material())


def test_names_of_terms_are_their_own():
    """Metrics are told apart by name."""
    with pytest.raises(ValueError, match="a term cannot be called 'reconstruction'"):
        Term("reconstruction", 1.0, lambda forward: forward.norms)
    with pytest.raises(ValueError, match="two terms are called 'contraction'"):
        cae_loss(MODEL, 0.1, terms=(contraction_term(0.2),))


@pytest.mark.parametrize("reconstruction", ["squared_error", "bernoulli"])
@pytest.mark.parametrize("shape", [(5, 1), (1, 5), (1,), (), (4,), (10,)])
def test_a_reconstruction_of_another_shape_is_refused(reconstruction, shape, untyped):
    """(d,) against (d, 1) is d² differences: 54 where 11.5 is right, without a word."""
    size = math.prod(shape)
    model = MODEL._replace(decode=lambda params, z: jnp.ones(size).reshape(shape))
    loss = cae_loss(model, None, reconstruction=reconstruction)
    score = scores(model, reconstruction=reconstruction)
    for call in (loss, score):
        with pytest.raises(ValueError, match=r"sample has shape \(5,\) and its reconstruction"):
            call(*material())


def test_an_own_reconstruction_loss_may_compare_shapes_but_not_keep_them():
    """A decoder of means and variances is its own affair; more than one number is not."""
    wide = MODEL._replace(decode=lambda params, z: jnp.concatenate([z, z]))
    own = cae_loss(wide, None, reconstruction=lambda x, y: jnp.sum(y) - jnp.sum(x))
    assert math.isfinite(value(own))
    unreduced = cae_loss(MODEL, None, reconstruction=lambda x, y: (x - y) ** 2)
    with pytest.raises(ValueError, match="reconstruction loss must give one number per sample"):
        value(unreduced)


def test_a_batch_of_no_samples_is_refused():
    """Its mean would be nan."""
    params, xs = material()
    with pytest.raises(ValueError, match=r"no samples has no mean: xs has shape \(0, 5\)"):
        jaxcae.cae_loss(MODEL, 0.1)(params, xs[:0])


@pytest.mark.usefixtures("untyped")
def test_a_rate_in_the_place_of_an_optimizer_is_named():
    with pytest.raises(TypeError, match=r"optax\.adam\(1e-3\), got 0\.001"):
        jaxcae.TrainState.create(material()[0], 1e-3, jax.random.key(0))
