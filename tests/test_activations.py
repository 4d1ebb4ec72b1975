"""Every activation and slope against known values, JAX's own derivative, and at saturation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcae
from tests import reference as ref
from tests.tolerances import assert_close, assert_each_close

NAMES = sorted(jaxcae.ACTIVATIONS)
POINTS = np.array([-20.0, -4.0, -1.5, -0.3, 0.2, 1.0, 3.5, 20.0])
EXTREMES = [-1e4, -100.0, -1e-30, 0.0, 1e-30, 100.0, 1e4]

over_names = pytest.mark.parametrize("name", NAMES)


def _at_once(functions, points):
    """Evaluate functions of a number at all points, in one compiled program."""
    return jax.jit(lambda at: {name: jax.vmap(f)(at) for name, f in functions.items()})(points)


def test_the_reference_covers_every_activation():
    """A new activation needs a row in the reference, or the tests below would not reach it."""
    assert set(NAMES) == set(ref.ACTIVATIONS)


@over_names
def test_function_and_slope_are_the_references(name, x64):
    """Both equal NumPy's, each value relative to itself: the tails count too."""
    activation = jaxcae.get_activation(name)
    points = POINTS[1:-1] if name == "softplus" else POINTS  # NumPy's own log1p is the weaker one
    assert_each_close(
        activation.function(jnp.asarray(points)),
        ref.ACTIVATIONS[name].function(points),
        "float64",
        "function",
    )
    slope = activation.slope(jnp.asarray(POINTS))
    assert_each_close(slope, ref.ACTIVATIONS[name].slope(POINTS), "float64", "slope")


@over_names
def test_slope_is_the_derivative_that_jax_takes(name, x64):
    """The slope table cannot drift from its functions, zero included; nor can its derivative."""
    activation = jaxcae.get_activation(name)
    points = jnp.asarray([*POINTS, 0.0])
    want = jax.vmap(jax.grad(activation.function))(points)
    assert_close(activation.slope(points), want, "float64")
    curvature = jax.vmap(jax.grad(activation.slope))(jnp.asarray(POINTS))
    want = jax.vmap(jax.grad(jax.grad(activation.function)))(jnp.asarray(POINTS))
    assert_close(curvature, want, "float64")


@pytest.mark.parametrize(
    ("name", "a", "value", "slope"),
    [
        ("sigmoid", 0.0, 0.5, 0.25),
        ("tanh", 0.0, 0.0, 1.0),
        ("softplus", 0.0, np.log(2), 0.5),
        ("elu", -1.0, np.exp(-1) - 1, np.exp(-1)),
        ("elu", 2.0, 2.0, 1.0),
        # The erf form: 1·Φ(1). The tanh approximation would give 0.84119.
        ("gelu", 1.0, 0.8413447460685429, 1.0833154705876864),
        ("silu", 0.0, 0.0, 0.5),
        ("relu", 0.0, 0.0, 0.0),  # the torch convention
        ("relu", -2.0, 0.0, 0.0),
        ("relu", 3.0, 3.0, 1.0),
        ("identity", -7.0, -7.0, 1.0),
    ],
)
def test_known_values(name, a, value, slope, x64):
    """Numbers that can be checked by hand."""
    activation = jaxcae.get_activation(name)
    assert float(activation.function(jnp.asarray(a))) == pytest.approx(value, rel=1e-14)
    assert float(activation.slope(jnp.asarray(a))) == pytest.approx(slope, rel=1e-14)
    assert float(jax.grad(activation.function)(a)) == pytest.approx(slope, rel=1e-14)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@over_names
def test_no_nan_in_saturation(name, dtype):
    """Value, slope and two derivatives are finite, of the input's dtype, at ±10⁴ and around 0."""
    activation = jaxcae.get_activation(name)
    derivatives = {
        "function": activation.function,
        "slope": activation.slope,
        "derivative": jax.grad(activation.function),
        "derivative of slope": jax.grad(activation.slope),
        "second derivative": jax.grad(jax.grad(activation.function)),
    }
    with jax.enable_x64(dtype == "float64"):
        points = jnp.asarray(EXTREMES, dtype)
        found = _at_once(derivatives, points)
        for what, values in found.items():
            assert values.dtype == dtype, what
            assert np.all(np.isfinite(np.asarray(values, np.float64))), f"{what}: {values}"


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@over_names
def test_derivatives_are_exact_in_saturation(name, dtype):
    """Both derivatives have their digits in both tails, each relative to itself.

    They are those that the engine, forward and reverse mode take. By JAX's own rules tanh's are 0
    from 10 on in float32, a sigmoid's and softplus's second one from 17 on, elu's below −17.
    """
    activation, truth = jaxcae.get_activation(name), ref.ACTIVATIONS[name]
    tails = np.array([-30.0, -17.5, -12.25, -8.0, -6.0, 6.0, 8.0, 12.25, 17.5, 30.0])
    if name == "gelu":  # e^(−a²/2) loses a²/2 of rounding, and leaves float32 at 13
        tails = tails[np.abs(tails) <= 8]
    with jax.enable_x64(dtype == "float64"):
        points = jnp.asarray(tails, dtype)
        first = jax.grad(activation.function)
        modes = {"reverse": jax.grad, "forward": jax.jacfwd}
        slopes = {name: mode(activation.function) for name, mode in modes.items()}
        seconds = {name: mode(first) for name, mode in modes.items()}
        for name, values in _at_once(slopes, points).items():
            assert_each_close(values, truth.slope(tails), dtype, f"slope, {name}")
        for name, values in _at_once(seconds, points).items():
            assert_each_close(values, truth.curvature(tails), dtype, f"second, {name}")


@over_names
def test_values_are_those_of_jax(name):
    """Only the derivatives are our own: not a bit of the value is."""
    theirs = {
        "tanh": jnp.tanh,
        "gelu": lambda a: jax.nn.gelu(a, approximate=False),
    }
    for dtype in ("float32", "bfloat16"):
        points = jnp.linspace(-40, 40, 4001, dtype=dtype)
        got = jaxcae.get_activation(name).function(points)
        want = theirs.get(name) or getattr(jax.nn, name)
        np.testing.assert_array_equal(got, want(points))


@pytest.mark.parametrize("method", ["chain", "forward", "reverse"])
@pytest.mark.parametrize("name", ["tanh", "elu"])
def test_a_saturated_encoder_keeps_its_norms_in_float32(name, method):
    """Value and gradient of the penalty, with all hidden units on the flat side."""
    rng = np.random.default_rng(0)
    sign = -1 if name == "elu" else 1
    kernels = [np.float32(rng.normal(0, 0.3, shape)) for shape in ((6, 5), (5, 3))]
    biases = [np.float32(sign * np.full(5, 11.0)), np.zeros(3, "float32")]
    xs = np.float32(rng.uniform(size=(4, 6)))
    model = jaxcae.mlp((6, 5, 3), name)
    encoder = {
        f"layer_{i}": {"kernel": kernel, "bias": bias}
        for i, (kernel, bias) in enumerate(zip(kernels, biases, strict=True))
    }
    norms = jaxcae.contractive_penalty(model.encode, method)

    def total(encoder):
        each = norms({"encoder": encoder}, xs)
        return each.sum(), each

    gradient, got = jax.jit(jax.grad(total, has_aux=True))(encoder)
    layers = [ref.Dense(np.float64(w), np.float64(b)) for w, b in zip(kernels, biases, strict=True)]
    xs = np.float64(xs)
    assert_each_close(got, ref.mlp_penalty(layers, xs, name)[1], "float32")
    want = ref.mlp_penalty_gradient(layers, xs, np.ones(4), name)
    for i, layer in enumerate(want):
        assert_close(gradient[f"layer_{i}"]["kernel"], layer.kernel, "float32")
        assert_close(gradient[f"layer_{i}"]["bias"], layer.bias, "float32")


@pytest.mark.parametrize("name", ["relo", "Sigmoid", "Relu", "", "tanhh"])
def test_unknown_name_is_refused_with_the_list(name):
    """The message lists what there is, and the closest name."""
    with pytest.raises(
        ValueError, match=r"unknown activation .*choose from sigmoid, tanh"
    ) as error:
        jaxcae.get_activation(name)
    for given, meant in (("tanhh", "tanh"), ("Sigmoid", "sigmoid"), ("Relu", "relu")):
        assert name != given or f"Did you mean {meant!r}?" in str(error.value)


@over_names
def test_values_stay_within_bounds_and_come_close_to_them(name):
    activation = jaxcae.get_activation(name)
    values = activation.function(jnp.linspace(-30.0, 30.0, 6001))
    assert activation.least <= values.min()
    assert values.max() <= activation.greatest
    for bound, value in ((activation.least, values.min()), (activation.greatest, values.max())):
        assert abs(value) > 25 if np.isinf(bound) else abs(value - bound) < 1e-4
