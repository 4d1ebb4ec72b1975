"""An encoder is traced once, as it is: effects, rules, loops, parameters of any kind."""

import gc
import warnings
import weakref
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pandas
import polars
import pytest
from jax.experimental import checkify
from jax.extend.core import Primitive

import jaxcae
from jaxcae.jacobian import choose, proofs, stages
from jaxcae.penalty import EXACT_METHODS, METHODS
from tests.some import some

RNG = np.random.default_rng(0)
W, V = (jnp.float32(RNG.normal(size=shape)) for shape in ((6, 5), (5, 3)))
XS = jnp.float32(RNG.normal(size=(4, 6)))
KEY = jax.random.key(0)


def two(params, x):
    return jnp.tanh(x @ params[0]) @ params[1]


def sorted_between(params, x):
    return jnp.sort(x @ params[0]) @ params[1]


def brute(encode, params, xs=XS):
    jacobians = jax.vmap(jax.jacrev(partial(encode, params)))(xs)
    return jnp.sum(jacobians**2, tuple(range(1, jacobians.ndim)))


# --------------------------------------------------------------------------- traced once


@pytest.mark.parametrize("encode", [two, sorted_between])
@pytest.mark.parametrize(
    ("method", "options"), [*((m, {}) for m in METHODS), ("auto", {"memory_budget": 2000})]
)
def test_an_encoder_is_traced_once_a_program(method, options, encode):
    if (method, encode) == ("control_variate", sorted_between):
        pytest.skip("refuses opaque parts")
    traces = []

    def counted(params, x):
        traces.append(1)
        return encode(params, x)

    def loss(params):
        both = jaxcae.encode_and_penalty(counted, method, **options)
        codes, norms = both(params, XS, KEY)
        return jnp.sum(codes**2) + jnp.sum(norms)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this budget cannot be met
        jax.jit(jax.value_and_grad(loss)).trace((W, V))
    assert len(traces) == 1


@pytest.mark.parametrize("activation", ["relu", "softplus"])
def test_eager_calls_prove_and_plan_once_a_shape(activation, monkeypatch):
    made = []
    choose_for = choose.choose_for
    monkeypatch.setattr(choose, "choose_for", lambda *a: made.append(1) or choose_for(*a))
    model = jaxcae.mlp((6, 5, 3), activation)
    params = model.init(KEY)
    penalty = jaxcae.contractive_penalty(model.encode)
    first = penalty(params, XS)
    halves = jax.tree.map(lambda a: a / 2, params)
    penalty(halves, XS)
    np.testing.assert_array_equal(penalty(params, XS), first)
    assert len(made) == 1
    penalty(params, XS[:2])
    assert len(made) == 2


def test_eager_calls_see_what_a_closure_holds_now():
    """A trace kept by shape alone would go on with what it saw first."""
    scale = [1.0]
    penalty = jaxcae.contractive_penalty(lambda p, x: two(p, x) * scale[0])
    before = penalty((W, V), XS)
    scale[0] = 2.0
    np.testing.assert_allclose(penalty((W, V), XS), 4 * before, rtol=1e-6)
    array = [W]
    hidden = jaxcae.contractive_penalty(lambda p, x: jnp.tanh(x @ array[0]))
    before = hidden((), XS)
    array[0] = 0 * W
    assert (hidden((), XS) == 0).all()
    assert (before > 0).all()


def test_nothing_outlives_the_penalty():
    def make():
        weights = [W + 1]
        penalty = jaxcae.contractive_penalty(lambda p, x: jnp.tanh(x @ weights[0]) @ p)
        penalty(V, XS)
        return weakref.ref(weights[0]), penalty

    array, penalty = make()
    assert array() is not None
    del penalty
    jax.clear_caches()
    gc.collect()
    assert array() is None


def test_proofs_take_a_number_of_steps_linear_in_the_equations(monkeypatch):
    def steps(layers):
        def encode(params, x):
            y = x
            for w in params:
                y = jnp.tanh(y @ w)
            return y + x  # the long skip: nothing can be cut at one array

        count = [0]
        facts_of = proofs.facts_of

        def counted(*arguments):
            count[0] += 1
            return facts_of(*arguments)

        for module in (proofs, stages):
            monkeypatch.setattr(module, "facts_of", counted)
        params = [jnp.eye(3)] * layers
        choose.choose(encode, params, jnp.ones((2, 3)))
        monkeypatch.undo()
        return count[0]

    assert steps(64) <= 2.2 * steps(32)


def attention_blocks(params, x):
    """Stack blocks of self-attention and two dense layers, each normalised and skipped."""
    for w in params:
        h = jax.nn.standardize(x)
        weights = jax.nn.softmax((h @ w[0]) @ (h @ w[1]).T)
        x = x + weights @ (h @ w[2])
        x = x + jax.nn.gelu(jax.nn.standardize(x) @ w[3]) @ w[3].T
    return x.mean(0)


def test_chunks_are_traced_for_little_more_than_a_hand_written_jacobian(monkeypatch):
    """Counted in operations met by any step of tracing; the default budget may ask for chunks."""
    params = [jax.ShapeDtypeStruct((4, 8, 8), jnp.float32)]
    xs = jax.ShapeDtypeStruct((6, 5, 8), jnp.float32)

    def by_hand(params, xs):
        jacobians = jax.vmap(jax.jacrev(partial(attention_blocks, params)))(xs)
        codes = jax.vmap(partial(attention_blocks, params))(xs)
        return jnp.sum(codes) + jnp.sum(jacobians**2)

    def by_auto(params, xs, **options):
        codes, norms = jaxcae.encode_and_penalty(attention_blocks, **options)(params, xs)
        return jnp.sum(codes) + jnp.sum(norms)

    met = []
    bind = Primitive.bind
    monkeypatch.setattr(Primitive, "bind", lambda *a, **k: met.append(1) or bind(*a, **k))

    def work(function):
        met.clear()
        jax.clear_caches()
        jax.jit(jax.value_and_grad(function)).trace(params, xs)
        return len(met)

    hand = work(by_hand)
    assert work(by_auto) <= 1.1 * hand
    chunked = partial(by_auto, method=jaxcae.Chain(chunk_size=2))
    assert work(chunked) <= 1.4 * hand


def test_an_eager_call_runs_one_program_compiled_once_a_shape(monkeypatch):
    model = jaxcae.mlp((6, 5, 3), "softplus")
    params = model.init(KEY)
    penalty = jaxcae.contractive_penalty(model.encode)

    def gradient(params):
        return jax.grad(lambda p: penalty(p, XS).sum())(params)

    for call in (lambda: penalty(params, XS), lambda: gradient(params)):
        call()
        monkeypatch.setattr(choose, "run_choice", None)  # nothing is traced or run in steps
        call()
        monkeypatch.undo()


# --------------------------------------------------------------------------- as it is


@pytest.mark.parametrize("method", some(METHODS, ("auto", "chain", "control_variate")))
def test_effects_happen_as_often_as_in_reverse(method):
    if method == "finite_difference":
        pytest.skip("evaluates the encoder many times")

    def counts(method, at_code):
        seen = []

        def encode(params, x):
            jax.debug.callback(lambda v: seen.append("x"), x[0])
            code = two(params, x)
            jax.debug.callback(lambda v: seen.append("code"), code[0] if at_code else 0.0)
            return code

        norms = jax.jit(jaxcae.contractive_penalty(encode, method))((W, V), XS, KEY)
        jax.block_until_ready(norms)
        jax.effects_barrier()
        return sorted(seen)

    for at_code in (True, False):
        found = counts(method, at_code)
        assert found == counts("reverse", at_code)
        assert found.count("x") == len(XS)


@pytest.mark.parametrize("method", EXACT_METHODS)
def test_checks_are_made(method):
    def encode(params, x):
        checkify.check(x[0] > 1e9, "x is small")
        return two(params, x)

    penalty = jaxcae.contractive_penalty(encode, method)
    error, _ = jax.jit(checkify.checkify(penalty))((W, V), XS)
    assert "x is small" in error.get()


def test_an_effect_that_the_code_needs_happens_once():
    seen = []

    def note(v):
        seen.append(1)
        return v

    @jax.custom_jvp
    def noted(v):
        return jax.experimental.io_callback(note, jax.ShapeDtypeStruct((), v.dtype), v)

    noted.defjvp(lambda primals, tangents: (noted(*primals), tangents[0]))

    def encode(params, x):
        return two(params, x) * noted(x[0])

    def counted(method):
        seen.clear()
        norms = jaxcae.contractive_penalty(encode, method)((W, V), XS)
        jax.effects_barrier()
        return norms, len(seen)

    expected, times = counted("reverse")
    for method in ("auto", "chain"):
        norms, found = counted(method)
        np.testing.assert_allclose(norms, expected, rtol=1e-5)
        assert found == times


@jax.custom_vjp
def clipped(v):
    return v


clipped.defvjp(lambda v: (v, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


@jax.custom_vjp
def clipped_norm(v):
    return v


clipped_norm.defvjp(lambda v: (v, None), lambda _, g: (g / jnp.maximum(1.0, jnp.linalg.norm(g)),))


@jax.custom_vjp
def reversed_gradient(v):
    return v


reversed_gradient.defvjp(lambda v: (v, None), lambda _, g: (-2.0 * g,))


@pytest.mark.parametrize("rule", [clipped, clipped_norm, reversed_gradient])
@pytest.mark.parametrize("inner", [False, True])
def test_a_rule_that_is_not_linear_gives_what_reverse_gives(rule, inner):
    """Its products with other vectors than the code's units would be other numbers."""
    wrapped = jax.checkpoint(rule) if inner else rule

    def encode(params, x):
        return wrapped(jnp.tanh(x @ params[0])) @ params[1]

    reverse = jaxcae.contractive_penalty(encode, "reverse")((W, V), XS)
    for method in ("auto", "chain"):
        norms = jaxcae.contractive_penalty(encode, method)((W, V), XS)
        np.testing.assert_allclose(norms, reverse, rtol=1e-5)


@pytest.mark.parametrize("method", ["auto", "chain"])
def test_a_loop_that_carries_no_derivative_is_accepted(method):
    """A fixed point differentiated by its last step, and one by a linear solve."""

    def one_step(params, x):
        def f(z):
            return jnp.tanh(0.3 * z + x @ params[0])

        start = jnp.zeros(5)
        z = jax.lax.while_loop(lambda z: jnp.max(jnp.abs(z - f(z))) > 1e-6, f, start)
        return f(jax.lax.stop_gradient(z)) @ params[1]

    def solved(params, x):
        matrix = jnp.eye(5) + 0.1 * params[0].T @ params[0]
        solution, _ = jax.scipy.sparse.linalg.cg(matrix, jnp.tanh(x @ params[0]))
        return solution @ params[1]

    for encode in (one_step, solved):
        norms = jax.jit(jaxcae.contractive_penalty(encode, method))((W, V), XS)
        np.testing.assert_allclose(norms, jax.jit(partial(brute, encode))((W, V)), rtol=1e-4)


@pytest.mark.parametrize("block", [
    lambda h, w: h + jnp.tanh(jnp.tanh(h @ w[0]) @ w[1]),
    lambda h, w: h + jnp.sort(jnp.tanh(h @ w[0])) @ w[1],
])  # fmt: skip
def test_a_checkpoint_is_kept(block):
    def encode(params, x, keep=True):
        for w in params:
            x = (jax.checkpoint(block) if keep else block)(x, w)
        return x

    params = [(0.5 * W, W[:5].T / 2)] * 2
    params = [(W, jnp.float32(RNG.normal(size=(5, 6))))] * 2

    def gradient(encode):
        return jax.grad(lambda p: jaxcae.contractive_penalty(encode, "chain")(p, XS).sum())

    kept, plain = (
        str(jax.make_jaxpr(gradient(e))(params)) for e in (encode, partial(encode, keep=False))
    )
    assert kept.count("remat") > plain.count("remat") == 0
    for a, b in zip(
        jax.tree.leaves(gradient(encode)(params)),
        jax.tree.leaves(gradient(partial(encode, keep=False))(params)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------- numbers and trees


@pytest.mark.parametrize("method", some(METHODS, ("chain", "forward", "hutchinson")))
def test_strict_promotion_of_dtypes(method):
    with jax.numpy_dtype_promotion("strict"):
        penalty = jaxcae.contractive_penalty(two, method)
        norms, pull = jax.vjp(lambda p: penalty(p, XS, KEY), (W, V))
        assert norms.dtype == jnp.float32
        pull(norms)
    sixteen = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (W, V))
    with jax.numpy_dtype_promotion("strict"):
        assert penalty(sixteen, XS.astype(jnp.bfloat16), KEY).dtype == jnp.float32


@pytest.mark.parametrize("method", some(EXACT_METHODS, ("chain", "reverse")))
def test_float64_samples_with_float32_parameters(method, x64):
    def normalised(params, x):
        h = jnp.tanh(x @ params[0])
        return h / jnp.sqrt(jnp.sum(h**2)) @ params[1]

    xs = jnp.asarray(XS, jnp.float64)
    for encode in (two, normalised):
        norms = jaxcae.contractive_penalty(encode, method)((W, V), xs)
        assert norms.dtype == jnp.float64
        wide = jax.tree.map(lambda a: a.astype(jnp.float64), (W, V))
        np.testing.assert_allclose(norms, brute(encode, wide, xs), rtol=1e-12)
        # And float32 throughout stays float32, though float64 is enabled.
        assert jaxcae.contractive_penalty(encode, method)((W, V), XS).dtype == jnp.float32


@pytest.mark.parametrize("method", some(METHODS, ("auto", "reverse", "hutchinson")))
def test_one_array_in_a_tree_works_and_several_get_a_sentence(method):
    both = jaxcae.encode_and_penalty(lambda p, x: {"z": two(p, x["a"])}, method)
    codes, norms = both((W, V), {"a": XS}, KEY)
    expected = jaxcae.encode_and_penalty(two, method)((W, V), XS, KEY)
    np.testing.assert_array_equal(codes["z"], expected[0])
    np.testing.assert_array_equal(norms, expected[1])
    penalty = jaxcae.contractive_penalty(two, method)
    for xs, words in (
        ({"a": XS, "b": XS}, "a dict of 2 leaves"),
        (XS.tolist(), "a list of 24 leaves"),
        (None, "an empty NoneType"),
    ):
        with pytest.raises(TypeError, match=f"xs must be one array of samples, got {words}"):
            penalty((W, V), xs, KEY)
    with pytest.raises(TypeError, match="one array per sample, got a pytree of 2"):
        jaxcae.contractive_penalty(lambda p, x: (x, x), method)((), XS, KEY)


def test_parameters_may_hold_what_is_no_array():
    """Layers counted by an int, an activation by a function, and a mask that must be known."""

    def encode(params, x):
        for _ in range(params["depth"]):
            x = params["activation"](x @ params["w"])
        return x[params["mask"]]

    params = {"depth": 2, "activation": jnp.tanh, "w": W @ W.T}
    params["mask"] = np.array([True, False] * 3)
    expected = brute(encode, params)
    for method in EXACT_METHODS:
        penalty = jaxcae.contractive_penalty(encode, method)
        np.testing.assert_allclose(penalty(params, XS), expected, rtol=1e-3)  # saturated
    deeper = {**params, "depth": 3}
    np.testing.assert_allclose(penalty(deeper, XS), brute(encode, deeper), rtol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_finite_differences_step_by_the_coarsest_dtype(dtype):
    """Float32 samples and parameters, computed in half precision, as Flax modules do."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, dtype=dtype)(nn.tanh(nn.Dense(16, dtype=dtype)(x)))

    params = Net().init(KEY, XS[0])
    norms = jaxcae.contractive_penalty(Net().apply, "finite_difference")(params, XS)
    exact = jaxcae.contractive_penalty(Net().apply, "reverse")(params, XS)
    np.testing.assert_allclose(norms, exact, rtol=0.15)


def test_numpy_numbers_are_numbers():
    for options in (
        {"method": "chain", "chunk_size": np.int64(2)},
        {"method": "auto", "memory_budget": np.float32(1e9)},
        {"method": "hutchinson", "num_probes": np.int32(2)},
        {"method": "finite_difference", "step": np.float32(1e-2)},
    ):
        jaxcae.contractive_penalty(two, **options)((W, V), XS, KEY)
    for value in (True, 0, np.int64(-1)):
        with pytest.raises(ValueError, match="chunk_size must be a positive int"):
            jaxcae.Chain(chunk_size=value)


# --------------------------------------------------------------------------- methods, budgets


def test_methods_are_objects_or_names_with_options():
    for name, method in (
        ("auto", jaxcae.Auto(memory_budget=10**8)),
        ("chain", jaxcae.Chain(chunk_size=2)),
        ("forward", jaxcae.Forward()),
        ("reverse", jaxcae.Reverse(chunk_size=1)),
        ("hutchinson", jaxcae.Hutchinson(num_probes=2, distribution="normal")),
        ("control_variate", jaxcae.ControlVariate()),
        ("finite_difference", jaxcae.FiniteDifference(step=0.01)),
    ):
        assert method.name == name
        options = {k: v for k, v in vars(method).items() if v is not None}
        np.testing.assert_array_equal(
            jaxcae.contractive_penalty(two, method)((W, V), XS, KEY),
            jaxcae.contractive_penalty(two, name, **options)((W, V), XS, KEY),
        )
    with pytest.raises(ValueError, match="belong inside Chain"):
        jaxcae.contractive_penalty(two, jaxcae.Chain(), chunk_size=2)


def test_a_budget_that_cannot_be_met_says_so():
    with pytest.warns(UserWarning, match="memory_budget of 100 bytes cannot be met"):
        norms = jaxcae.contractive_penalty(two, memory_budget=100)((W, V), XS)
    np.testing.assert_allclose(norms, brute(two, (W, V)), rtol=1e-5)
    explanation = jaxcae.explain(sorted_between, (W, V), XS, memory_budget=100)
    assert "which even this exceeds" in explanation.chosen.verdict


def test_directions_that_do_not_fit_alone_are_taken_for_few_samples_at_a_time():
    encode, params = sorted_between, (W, V)
    xs = jnp.tile(XS, (16, 1))
    whole = jaxcae.explain(encode, params, xs)
    budget = whole.chosen.gradient.bytes / 50
    small = choose.choose(encode, params, xs, budget)
    assert small.fits
    program = jax.grad(
        lambda p: jaxcae.contractive_penalty(encode, memory_budget=budget)(p, xs).sum()
    )
    for a, b in zip(program(params), jax.grad(lambda p: brute(encode, p, xs).sum())(params),
                    strict=True):  # fmt: skip
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_plan_for_values_alone_needs_fewer_chunks():
    model = jaxcae.mlp((64, 96, 96, 32), "softplus")
    params = jax.eval_shape(model.init, KEY)
    xs = jax.ShapeDtypeStruct((512, 64), jnp.float32)
    budget = 2**24
    with_gradient = choose.choose(model.encode, params, xs, budget)
    alone = choose.choose(model.encode, params, xs, budget, gradient=False)
    assert with_gradient.chunk_size < (alone.chunk_size or 512)


# --------------------------------------------------------------------------- modes


def test_a_loop_on_the_way_is_explained_by_every_method_alike():
    """In one sentence of ours, when values need reverse mode or a gradient is taken of them."""

    def encode(params, x):
        start = (0, x @ params[0])
        return (
            jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1])), start)[1]
            @ (params[1])
        )

    for method in METHODS:
        penalty = jaxcae.contractive_penalty(encode, method)
        if method in ("forward", "finite_difference"):
            norms = penalty((W, V), XS, KEY)  # of values alone there is nothing to explain
            assert norms.shape == (4,)
        for transform in (jax.grad, lambda f: jax.jit(jax.grad(f))):
            with pytest.raises(ValueError, match=r"^the encoder runs a lax.while_loop .*'forward'"):
                transform(lambda p, penalty=penalty: penalty(p, XS, KEY).sum())((W, V))


def test_a_reverse_rule_alone_is_explained_with_its_cure():
    def encode(params, x):
        return jax.checkpoint(reversed_gradient)(jnp.tanh(x @ params[0])) @ params[1]

    with pytest.raises(ValueError, match=r"custom_vjp.*does not have. Use method='reverse'"):
        jaxcae.contractive_penalty(encode, "forward")((W, V), XS)


# --------------------------------------------------------------------------- samples and decoders


@pytest.mark.parametrize(
    "xs",
    [
        np.ones((2, 3)).tolist(),
        [[1.0, "a"]],
        pandas.DataFrame(np.ones((2, 6))),
        pandas.Series([1.0]),
        polars.DataFrame(np.ones((2, 6))),
        np.array([[None] * 6]),
        "text",
        2.0,
        None,
    ],
    ids=lambda xs: type(xs).__name__,
)
def test_what_is_no_array_is_refused_with_the_call_that_makes_it_one(xs):
    model = jaxcae.mlp((6, 5, 3))
    params = model.init(KEY)
    for function in (jaxcae.contractive_penalty(model.encode), jaxcae.cae_loss(model)):
        with pytest.raises(TypeError, match=r"^xs must be .* numpy.asarray\(xs, dtype='float32'\)"):
            function(params, xs)


@pytest.mark.parametrize(
    "encode",
    [
        two,
        lambda p, x: jnp.tanh(jnp.matmul(x[None], p[0])[0]) @ p[1],
        lambda p, x: jnp.einsum("i,ij->j", x, p[0]),
        lambda p, x: nn.Dense(5).apply({"params": {"kernel": p[0], "bias": p[0][0]}}, x),
        lambda p, x: (x - p[0][:, 0]) @ p[0],
    ],
)
@pytest.mark.parametrize("width", [5, 7])
def test_a_wrong_width_is_said_as_such(encode, width):
    with pytest.raises(ValueError, match=rf"^expected 6 features, got samples of shape \({width},"):
        jaxcae.contractive_penalty(encode)((W, V), jnp.ones((4, width)))
    with pytest.raises(TypeError, match="unsupported operand"):  # and nothing else is
        jaxcae.contractive_penalty(lambda p, x: x @ None)((W, V), XS)


@pytest.mark.parametrize("contraction", [None, 0.1])
def test_reconstructions_that_are_none_are_refused(contraction):
    model = jaxcae.mlp((6, 5, 3))
    params = model.init(KEY)
    for change, said in (
        (lambda x: (x, x), "one array per sample, got a tuple of 2 arrays"),
        (lambda x: {"x": x}, "one array per sample, got a dict of 1 arrays"),
        (lambda x: x * 1j, "must be real floating-point numbers, got complex64"),
        (lambda x: x.astype(int), "must be real floating-point numbers, got int32"),
    ):
        decoder = jaxcae.Autoencoder(
            model.init, model.encode, lambda p, z, change=change: change(model.decode(p, z))
        )
        with pytest.raises(TypeError, match=said):
            jaxcae.cae_loss(decoder, contraction)(params, XS)
    with pytest.raises(ValueError, match=r"^expected 6 features, got samples of shape"):
        jaxcae.cae_loss(model, contraction)(params, jnp.ones((4, 7)))
