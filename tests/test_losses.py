"""Reconstruction losses and weight penalties: one sample, summed, exact, in float32 at least."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcae
from jaxcae.objective.losses import RECONSTRUCTION_LOSSES, reconstruction_loss
from tests import reference as ref
from tests.tolerances import assert_close, assert_each_close

TWINS = {"squared_error": ref.squared_error, "bernoulli": ref.bernoulli_cross_entropy}


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(RECONSTRUCTION_LOSSES))
@pytest.mark.parametrize("shape", [(5,), (2, 3, 1)])
def test_value_and_gradient(rng, name, dtype, shape):
    """The sum over features of one sample and its gradient, in any shape."""
    x, x_hat = rng.uniform(size=shape), rng.normal(size=shape)
    with jax.enable_x64(dtype == "float64"):
        x, x_hat = (jnp.asarray(a.astype(jnp.dtype(dtype))) for a in (x, x_hat))
        value, gradient = jax.value_and_grad(reconstruction_loss(name), argnums=1)(x, x_hat)
        assert value.shape == ()
        assert value.dtype == jnp.promote_types(dtype, jnp.float32)
        x, x_hat = np.asarray(x, np.float64), np.asarray(x_hat, np.float64)
        assert_each_close(value, TWINS[name](x, x_hat), dtype)
        (want,) = ref.gradient(lambda arrays: TWINS[name](x, arrays[0]), [x_hat])
        assert_close(gradient, want, dtype)


def test_known_values():
    """By hand: (1−3)² + (2−2)² = 4; −log σ(0) = log 2 a feature; certain and right is 0."""
    one = jnp.asarray([1.0, 2.0])
    assert float(jaxcae.squared_error(one, jnp.asarray([3.0, 2.0]))) == 4.0
    x = jnp.asarray([1.0, 0.0])
    assert float(jaxcae.bernoulli_cross_entropy(x, jnp.zeros(2))) == pytest.approx(2 * np.log(2))
    assert float(jaxcae.bernoulli_cross_entropy(x, jnp.asarray([1e4, -1e4]))) == 0.0
    assert float(jaxcae.bernoulli_cross_entropy(x, jnp.asarray([-1e4, 1e4]))) == 2e4


def test_bernoulli_gradient_is_finite_in_saturation():
    """At logits of ±10⁴ the gradient σ(a) − x is 0 or ±1, never NaN."""
    x = jnp.asarray([1.0, 0.0, 1.0, 0.0])
    logits = jnp.asarray([1e4, -1e4, -1e4, 1e4])
    gradient = jax.grad(jaxcae.bernoulli_cross_entropy, argnums=1)(x, logits)
    np.testing.assert_array_equal(gradient, [0, 0, -1, 1])


def test_mean_divides_by_the_number_of_features():
    """A mean is the same loss over d, for every loss and for a function of the user's."""

    def summed(x, x_hat):
        return jnp.sum(jnp.abs(x - x_hat))

    x, x_hat = jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 3))
    for loss in (*RECONSTRUCTION_LOSSES, summed):
        mean = reconstruction_loss(loss, "mean")(x, x_hat)
        assert float(mean) == pytest.approx(float(reconstruction_loss(loss)(x, x_hat)) / 6)


def test_a_bfloat16_sum_is_accumulated_in_float32():
    """1,024 terms of 1 + 2⁻⁷ in bfloat16: a bfloat16 accumulator would stop growing at 256."""
    x = jnp.full(1024, 1.0078125, jnp.bfloat16)
    assert_each_close(jaxcae.squared_error(x, jnp.zeros_like(x)), 1024 * 1.0078125**2, "bfloat16")
    assert jaxcae.squared_error(x, jnp.zeros_like(x)).dtype == jnp.float32


@pytest.mark.parametrize("name", RECONSTRUCTION_LOSSES)
@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("float32", "bfloat16")])
def test_strict_promotion_of_dtypes(name, dtypes):
    """What is of one dtype, or is widened on purpose, needs no leave to be."""
    x, x_hat = (jnp.full(4, 0.5, dtype) for dtype in dtypes)
    expected = RECONSTRUCTION_LOSSES[name](x, x_hat)
    with jax.numpy_dtype_promotion("strict"):
        found = RECONSTRUCTION_LOSSES[name](x, x_hat)
    assert found.dtype == jnp.float32
    assert found == expected


def test_unknown_names_are_refused(untyped):
    """Both names, each with its list."""
    with pytest.raises(ValueError, match="unknown reconstruction loss 'mse'; choose from squared"):
        reconstruction_loss("mse")
    with pytest.raises(ValueError, match="unknown reduction over features 'max'"):
        reconstruction_loss("squared_error", "max")


def test_weight_penalties_count_kernels_only():
    """Σ|w| and Σw² over arrays of two or more dimensions; biases and scalars stay out."""
    params = {"kernel": jnp.asarray([[1.0, -2.0]]), "bias": jnp.asarray([10.0, 10.0]), "s": 5.0}
    assert float(jaxcae.l1_penalty(params)) == 3.0
    assert float(jaxcae.l2_penalty(params)) == 5.0
    # |w| has slope 0 at 0, so that a dead weight stays dead.
    gradient = jax.grad(jaxcae.l1_penalty)({"kernel": jnp.asarray([[0.0, -2.0]])})
    np.testing.assert_array_equal(gradient["kernel"], [[0.0, -1.0]])
    assert float(jaxcae.l1_penalty({"bias": jnp.ones(3)})) == 0.0
