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
        for what, function in derivatives.items():
            values = jax.vmap(function)(points)
            assert values.dtype == dtype, what
            assert np.all(np.isfinite(np.asarray(values, np.float64))), f"{what}: {values}"


def test_tanh_slope_keeps_its_accuracy_in_float32():
    """At 8 the textbook form 1 − tanh² has lost a tenth of sech²(8) = 4.5e-7."""
    got = jaxcae.get_activation("tanh").slope(jnp.float32(8.0))
    assert_each_close(got, 1 / np.cosh(8.0) ** 2, "float32")


@pytest.mark.parametrize("name", ["relo", "Sigmoid", "", "tanhh"])
def test_unknown_name_is_refused_with_the_list(name):
    """The message lists what there is, and the closest name."""
    with pytest.raises(
        ValueError, match=r"unknown activation .*choose from sigmoid, tanh"
    ) as error:
        jaxcae.get_activation(name)
    if name == "tanhh":
        assert "Did you mean 'tanh'?" in str(error.value)
