"""One contract for every method: a new method or encoder is one more row and buys every check.

Method × encoder × dtype, value and gradient, under jit and eager, one norm per sample, compiled
once, at toy sizes and at 784-256-64, against the brute-force reference. In the default run every
method meets every kind of encoder, and the chain every encoder and every dtype; `-m slow` runs the
full product.
"""

import os
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcae
from jaxcae import penalty as penalty_module
from tests import reference as ref
from tests.encoders import Encoder, all_encoders
from tests.some import some
from tests.tolerances import assert_close, assert_each_close

# Every method is held to exactness unless it is named here.
ESTIMATORS = {"hutchinson", "finite_difference", "control_variate"}
EXACT = tuple(method for method in penalty_module.METHODS if method not in ESTIMATORS)
ENCODERS = all_encoders()
# One encoder of each kind; the others meet chain in float64.
KINDS = ("mlp depth 3 latent", "conv", "gated", "mlp softplus", "linen layer norm", "nnx")
CUT = KINDS[::2]  # these are computed in chunks, too
DTYPES = ("float64", "float32", "bfloat16")
BATCH = 3
WEIGHTS = np.array([1.0, -0.5, 2.0])  # of the norms, so that their gradients cannot be swapped

Row = tuple[str, dict[str, Any]]
PLAIN: list[Row] = [(method, {}) for method in EXACT]
CHUNKED: list[Row] = [(method, {"chunk_size": 2}) for method in ("chain", "forward", "reverse")]


class Case(NamedTuple):
    """Cells of the table that one compilation fills: an encoder, a dtype, and methods."""

    encoder: Encoder
    dtype: str
    rows: list[Row]

    @property
    def id(self) -> str:
        """Name the cells."""
        return f"{self.encoder.name.replace(' ', '_')}-{self.dtype}"


def _rows(encoder: Encoder, dtype: str) -> list[Row]:
    """Choose the methods that an encoder meets by default. The full product takes minutes more.

    Forward and reverse read nothing of an encoder's structure, and auto is one of the others.
    """
    kind = encoder.name in KINDS
    if dtype == "float64":
        return [*PLAIN, *(CHUNKED if encoder.name in CUT else [])] if kind else [("chain", {})]
    return [("chain", {})] if kind else []


def _cases(rows: Any) -> Any:
    cases = [Case(e, dtype, rows(e, dtype)) for e in ENCODERS for dtype in DTYPES]
    cases = [case for case in cases if case.rows]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)


def _everything(encoder: Encoder, dtype: str) -> list[Row]:
    return PLAIN + CHUNKED


class Truth(NamedTuple):
    """What the reference says of one encoder at parameters and samples of one precision."""

    leaves: list[np.ndarray]
    xs: np.ndarray
    codes: np.ndarray
    norms: np.ndarray
    gradients: list[np.ndarray]


def _precision(dtype: str) -> str:
    # float64 and float32 rows share numbers that both can hold, and so one evaluation.
    return "bfloat16" if dtype == "bfloat16" else "float32"


@cache
def truth(number: int, precision: str) -> Truth:
    """Evaluate the reference at numbers of the given precision; shared by all methods."""
    encoder = ENCODERS[number]
    rng = np.random.default_rng(7)
    leaves = [_rounded(leaf, precision) for leaf in jax.tree.leaves(encoder.params)]
    xs = _rounded(rng.normal(size=(BATCH, *encoder.input_shape)), precision)
    codes = np.stack([encoder.numpy(leaves, ref.Dual.seed(x)).value for x in xs])
    norms = ref.penalty(encoder.numpy, leaves, xs)
    gradients = ref.penalty_gradient(encoder.numpy, leaves, xs, WEIGHTS)
    return Truth(leaves, xs, codes, norms, gradients)


def _rounded(array: np.ndarray, precision: str) -> np.ndarray:
    return np.asarray(np.asarray(array, jnp.dtype(precision)), np.float64)


def _arguments(case: Case, expected: Truth, scale: float = 1.0) -> tuple[Any, Any]:
    def array(a: np.ndarray) -> jax.Array:
        return jnp.asarray((a * scale).astype(jnp.dtype(case.dtype)))

    structure = jax.tree.structure(case.encoder.params)
    params = jax.tree.unflatten(structure, [array(leaf) for leaf in expected.leaves])
    return params, array(expected.xs)


def _weighted(encode: Any, weights: np.ndarray, method: str, **options: Any) -> Any:
    """Make `(params, xs) -> ((sum of weighted norms, (codes, norms)), gradient)`."""
    both = jaxcae.encode_and_penalty(encode, method, **options)

    def total(params: Any, xs: Any) -> tuple[Any, Any]:
        codes, norms = both(params, xs)
        return norms @ jnp.asarray(weights, norms.dtype), (codes, norms)

    return jax.value_and_grad(total, has_aux=True)


def _steps(case: Case, encode: Any) -> Any:
    steps = [_weighted(encode, WEIGHTS, method, **options) for method, options in case.rows]
    return lambda params, xs: [step(params, xs) for step in steps]


def _check(result: Any, expected: Truth, dtype: str, method: str, gradient: str = "") -> None:
    """Hold a result to the bounds of its dtype, its gradient to those of `gradient` if given."""
    (_, (codes, norms)), gradients = result
    assert norms.shape == (len(expected.xs),)
    # Norms are accumulated, and returned, in float32 at least.
    assert norms.dtype == jnp.promote_types(dtype, jnp.float32)
    assert codes.dtype == dtype
    assert_close(codes, expected.codes, dtype, f"{method}: codes")
    assert_each_close(norms, expected.norms, dtype, f"{method}: norms")
    got = jax.tree.leaves(gradients)
    scale = max(np.max(np.abs(want)) for want in expected.gradients)
    for leaf, want in zip(got, expected.gradients, strict=True):
        assert leaf.dtype == dtype
        # Relative to the whole gradient: a leaf whose true gradient is 0 has no scale of its own.
        found, truth = (np.append(np.ravel(a), scale) for a in (leaf, want))
        assert_close(found, truth, gradient or dtype, f"{method}: gradient")


def _jitted(case: Case, compilations: Any) -> None:
    expected = truth(ENCODERS.index(case.encoder), _precision(case.dtype))
    traces = 0

    def encode(params, x):
        nonlocal traces
        traces += 1
        return case.encoder.encode(params, x)

    with jax.enable_x64(case.dtype == "float64"):
        steps = jax.jit(_steps(case, encode))
        results = steps(*_arguments(case, expected))
        for (method, options), result in zip(case.rows, results, strict=True):
            sums = case.encoder.name == "conv" and case.dtype == "bfloat16"
            bound = "bfloat16 gradient of a convolution" if sums else ""
            _check(result, expected, case.dtype, f"{method} {options}", bound)

        other = _arguments(case, expected, scale=0.5)
        after_first = traces, compilations()
        assert after_first[0] >= len(case.rows)
        steps(*other)
        assert (traces, compilations()) == after_first, "the second call was traced or compiled"
        assert steps._cache_size() == 1


@_cases(_rows)
def test_jitted(case, compilations):
    """Codes, norms and gradients are the reference's, and a second call compiles nothing."""
    _jitted(case, compilations)


@pytest.mark.slow
@_cases(_everything)
def test_jitted_full_product(case, compilations):
    """Every method and chunking with every encoder in every dtype."""
    _jitted(case, compilations)


@pytest.mark.parametrize("name", some(["mlp depth 3 latent", "gated"], ["gated"]))
def test_eager(name, x64):
    """The same without jit, where XLA fuses nothing."""
    (encoder,) = (e for e in ENCODERS if e.name == name)
    case = Case(encoder, "float64", PLAIN)
    expected = truth(ENCODERS.index(encoder), "float32")
    results = _steps(case, encoder.encode)(*_arguments(case, expected))
    for (method, _), result in zip(case.rows, results, strict=True):
        _check(result, expected, "float64", method)


# --------------------------------------------------------------------------- estimators


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", sorted(ESTIMATORS))
def test_estimators_keep_the_form_of_the_contract(method, dtype, compilations):
    """One finite norm per sample, its gradient, one compilation, and the same numbers eagerly.

    What their numbers are is for tests/test_estimators.py.
    """
    (encoder,) = (e for e in ENCODERS if e.name == "mlp softplus")
    expected = truth(ENCODERS.index(encoder), _precision(dtype))
    case = Case(encoder, dtype, [(method, {})])

    def norms_and_gradient(params, xs, key):
        penalty = jaxcae.contractive_penalty(encoder.encode, method)
        norms, pull = jax.vjp(lambda params: penalty(params, xs, key), params)
        return norms, pull(jnp.ones_like(norms))

    step = jax.jit(norms_and_gradient)
    keys = jax.random.key(0), jax.random.key(1)
    norms, gradients = step(*_arguments(case, expected), keys[0])
    assert norms.shape == (BATCH,)
    assert norms.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(dtype)}
    assert all(np.all(np.isfinite(np.asarray(a, np.float64))) for a in jax.tree.leaves(gradients))
    if dtype == "float32" and method != "finite_difference":  # whose rounding is its error
        penalty = jaxcae.contractive_penalty(encoder.encode, method)
        eager = penalty(*_arguments(case, expected), keys[0])
        assert_each_close(norms, eager, dtype, "jitted against eager")
    other = _arguments(case, expected, scale=0.5)
    before = compilations()
    step(*other, keys[1])
    assert compilations() == before


@pytest.mark.parametrize("name", ["mlp depth 3 latent", "gated", "linen layer norm"])
def test_a_full_set_of_orthonormal_probes_is_exact(name, x64):
    """With as many orthonormal probes as code units, hutchinson joins the exact methods."""
    (encoder,) = (e for e in ENCODERS if e.name == name)
    expected = truth(ENCODERS.index(encoder), "float32")
    options = {"num_probes": expected.codes.shape[1], "distribution": "orthonormal"}
    case = Case(encoder, "float64", [("hutchinson", options)])
    both = jaxcae.encode_and_penalty(encoder.encode, "hutchinson", **options)

    def total(params, xs):
        codes, norms = both(params, xs, jax.random.key(0))
        return norms @ jnp.asarray(WEIGHTS), (codes, norms)

    result = jax.jit(jax.value_and_grad(total, has_aux=True))(*_arguments(case, expected))
    _check(result, expected, "float64", "hutchinson")


# --------------------------------------------------------------------------- real sizes

SIZES = (784, 256, 64)
MODEL = jaxcae.mlp(SIZES, "softplus")
# The gradient weighs every eighth of the 1,024 samples, and these are the batch of 128: the two
# batches have one gradient, and the reference need not differentiate the others.
EVERY = 8
REAL_WEIGHTS = np.linspace(0.5, 1.5, 128)


@cache
def real_layers(precision: str) -> list[ref.Dense]:
    """Draw the parameters, at the given precision."""
    drawn = ref.random_layers(np.random.default_rng(3), SIZES)
    return [ref.Dense(*(_rounded(array, precision) for array in layer)) for layer in drawn]


@cache
def real_truth(precision: str) -> Truth:
    """Evaluate 784-256-64 on 1,024 samples like images, all Jacobians multiplied out."""
    xs = _rounded(np.random.default_rng(4).uniform(size=(1024, SIZES[0])), precision)
    return _dense_truth(real_layers(precision), xs, np.kron(REAL_WEIGHTS, np.eye(EVERY)[0]))


def _dense_truth(layers: list[ref.Dense], xs: np.ndarray, weights: np.ndarray) -> Truth:
    codes, norms = ref.mlp_penalty(layers, xs, "softplus")
    weighed = weights != 0
    gradients = ref.mlp_penalty_gradient(layers, xs[weighed], weights[weighed], "softplus")
    return Truth(_leaves(layers), xs, codes, norms, _leaves(gradients))


def _leaves(layers: list[ref.Dense]) -> list[np.ndarray]:
    return [array for layer in layers for array in (layer.bias, layer.kernel)]


def _check_real(expected: Truth, weights: np.ndarray, method: str, dtype: str, wrap: Any) -> None:
    with jax.enable_x64(dtype == "float64"):
        leaves, xs = jax.tree.map(
            lambda a: jnp.asarray(a.astype(jnp.dtype(dtype))), (expected.leaves, expected.xs)
        )
        pairs = zip(leaves[::2], leaves[1::2], strict=True)
        layers = {f"layer_{i}": {"bias": b, "kernel": w} for i, (b, w) in enumerate(pairs)}
        step = wrap(_weighted(MODEL.encode, weights, method))
        _check(step({"encoder": layers}, xs), expected, dtype, method)


def optimized(step: Any) -> Any:
    """Compile as for users: a wrong release of jaxlib was wrong only so (see conftest)."""
    options: dict[str, Any] = {"xla_backend_optimization_level": 3}
    if "fusion_emitters" in os.environ.get("XLA_FLAGS", ""):
        options["xla_cpu_use_fusion_emitters"] = True
    return jax.jit(step, compiler_options=options)


def _batch_of_128(expected: Truth) -> Truth:
    xs, codes, norms = (a[::EVERY] for a in (expected.xs, expected.codes, expected.norms))
    return expected._replace(xs=xs, codes=codes, norms=norms)


@pytest.mark.parametrize("dtype", some(DTYPES, ("float64", "float32")))
@pytest.mark.parametrize("method", some(["auto", "chain"], ["auto"]))
def test_real_sizes_jitted(method, dtype):
    """The sizes people train: one release of jaxlib was wrong only here, and only under jit."""
    expected = real_truth(_precision(dtype))
    _check_real(_batch_of_128(expected), REAL_WEIGHTS, method, dtype, optimized)
    _check_real(expected, np.kron(REAL_WEIGHTS, np.eye(EVERY)[0]), method, dtype, optimized)


@pytest.mark.parametrize("method", ["auto", "chain", "reverse"])
def test_real_sizes_eager(method):
    """The same without jit."""
    expected = _batch_of_128(real_truth("float32"))
    _check_real(expected, REAL_WEIGHTS, method, "float32", lambda step: step)


def test_real_sizes_reverse():
    """Reverse mode at both batches: 64 passes a sample."""
    expected = real_truth("float32")
    _check_real(_batch_of_128(expected), REAL_WEIGHTS, "reverse", "float32", optimized)
    weights = np.kron(REAL_WEIGHTS, np.eye(EVERY)[0])
    _check_real(expected, weights, "reverse", "float32", optimized)


@pytest.mark.parametrize("wrap", [optimized, lambda step: step], ids=["jit", "eager"])
def test_real_sizes_forward(wrap):
    """Forward mode takes 784 passes a sample, so a few samples must do."""
    weights = np.array([1.0, -0.5, 2.0, 1.0])
    expected = _dense_truth(real_layers("float32"), real_truth("float32").xs[:4], weights)
    _check_real(expected, weights, "forward", "float32", wrap)
