"""One contract for every method: a new method or encoder is one more row and buys every check.

Method × encoder × dtype, value and gradient, under jit and eager, one norm per sample, compiled
once, at toy sizes and at 784-256-64, against the brute-force reference. In the default run every
method meets every encoder and every dtype; `-m "slow or not slow"` runs the full product.
"""

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
from tests.tolerances import assert_close, assert_each_close

# Every method is held to exactness unless it is named here.
ESTIMATORS = {"hutchinson", "finite_difference", "control_variate"}
EXACT = [method for method in penalty_module.METHODS if method not in ESTIMATORS]
ENCODERS = all_encoders()
# One encoder of each kind; the others meet every method in float64, and chain in every dtype.
KINDS = ("mlp depth 3 latent", "conv", "gated", "mlp softplus", "linen layer norm", "nnx")
DTYPES = ("float64", "float32", "bfloat16")
BATCH = 3
WEIGHTS = np.array([1.0, -0.5, 2.0])  # of the norms, so that their gradients cannot be swapped


class Case(NamedTuple):
    """One cell of the table."""

    method: str
    options: dict[str, Any]
    encoder: Encoder
    dtype: str

    @property
    def id(self) -> str:
        """Name the cell."""
        options = (f"{name}={value}" for name, value in self.options.items())
        return "-".join([self.method, *options, self.encoder.name.replace(" ", "_"), self.dtype])

    @property
    def quick(self) -> bool:
        """Tell whether the default run includes the cell; `-m slow` runs the others.

        The whole table is 700 compilations of half a second.
        """
        kind = self.encoder.name in KINDS
        if self.options:
            return kind and self.dtype == "float64"
        return kind or self.dtype == "float64" or self.method == "chain"


assert {*EXACT, *ESTIMATORS} == set(penalty_module.METHODS)
CHUNKED = [("forward", {"chunk_size": 2}), ("reverse", {"chunk_size": 2})]
CASES = [
    Case(method, options, encoder, dtype)
    for method, options in [*((method, {}) for method in EXACT), *CHUNKED]
    for encoder in ENCODERS
    for dtype in DTYPES
]


def _table(cases: list[Case]) -> Any:
    marked = [
        pytest.param(case, id=case.id, marks=[] if case.quick else [pytest.mark.slow])
        for case in cases
    ]
    return pytest.mark.parametrize("case", marked)


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


def _check(result: Any, expected: Truth, dtype: str) -> None:
    (_, (codes, norms)), gradients = result
    assert norms.shape == (len(expected.xs),)
    # Norms are accumulated, and returned, in float32 at least.
    assert norms.dtype == jnp.promote_types(dtype, jnp.float32)
    assert codes.dtype == dtype
    assert_close(codes, expected.codes, dtype, "codes")
    assert_each_close(norms, expected.norms, dtype, "norms")
    got = jax.tree.leaves(gradients)
    scale = max(np.max(np.abs(want)) for want in expected.gradients)
    for leaf, want in zip(got, expected.gradients, strict=True):
        assert leaf.dtype == dtype
        # Relative to the whole gradient: a leaf whose true gradient is 0 has no scale of its own.
        assert_close(np.append(np.ravel(leaf), scale), np.append(want, scale), dtype, "gradient")


@_table(CASES)
def test_jitted(case, compilations):
    """Codes, norms and gradients are the reference's, and a second call compiles nothing."""
    expected = truth(ENCODERS.index(case.encoder), _precision(case.dtype))
    traces = 0

    def encode(params, x):
        nonlocal traces
        traces += 1
        return case.encoder.encode(params, x)

    with jax.enable_x64(case.dtype == "float64"):
        step = jax.jit(_weighted(encode, WEIGHTS, case.method, **case.options))
        _check(step(*_arguments(case, expected)), expected, case.dtype)

        other = _arguments(case, expected, scale=0.5)
        after_first = traces, compilations()
        assert after_first[0] > 0
        step(*other)
        assert (traces, compilations()) == after_first, "the second call was traced or compiled"
        assert step._cache_size() == 1


@_table([case for case in CASES if case.encoder.name in KINDS[:3] and case.dtype == "float64"])
def test_eager(case, x64):
    """The same without jit, where XLA fuses nothing."""
    expected = truth(ENCODERS.index(case.encoder), _precision(case.dtype))
    step = _weighted(case.encoder.encode, WEIGHTS, case.method, **case.options)
    _check(step(*_arguments(case, expected)), expected, case.dtype)


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
        _check(step({"encoder": layers}, xs), expected, dtype)


def _batch_of_128(expected: Truth) -> Truth:
    xs, codes, norms = (a[::EVERY] for a in (expected.xs, expected.codes, expected.norms))
    return expected._replace(xs=xs, codes=codes, norms=norms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["auto", "chain"])
def test_real_sizes_jitted(method, dtype):
    """The sizes people train: one release of jaxlib was wrong only here, and only under jit."""
    expected = real_truth(_precision(dtype))
    _check_real(_batch_of_128(expected), REAL_WEIGHTS, method, dtype, jax.jit)
    _check_real(expected, np.kron(REAL_WEIGHTS, np.eye(EVERY)[0]), method, dtype, jax.jit)


@pytest.mark.parametrize("method", ["auto", "chain", "reverse"])
def test_real_sizes_eager(method):
    """The same without jit."""
    expected = _batch_of_128(real_truth("float32"))
    _check_real(expected, REAL_WEIGHTS, method, "float32", lambda step: step)


def test_real_sizes_reverse():
    """Reverse mode at both batches: 64 passes a sample."""
    expected = real_truth("float32")
    _check_real(_batch_of_128(expected), REAL_WEIGHTS, "reverse", "float32", jax.jit)
    weights = np.kron(REAL_WEIGHTS, np.eye(EVERY)[0])
    _check_real(expected, weights, "reverse", "float32", jax.jit)


@pytest.mark.parametrize("wrap", [jax.jit, lambda step: step], ids=["jit", "eager"])
def test_real_sizes_forward(wrap):
    """Forward mode takes 784 passes a sample, so a few samples must do."""
    weights = np.array([1.0, -0.5, 2.0, 1.0])
    expected = _dense_truth(real_layers("float32"), real_truth("float32").xs[:4], weights)
    _check_real(expected, weights, "forward", "float32", wrap)
