"""Known answers for every figure that `jaxcae.results.analysis` takes from an encoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcae
from jaxcae.results import analysis


def linear(kernel):
    """Make the encoder x ↦ x W, whose Jacobian is Wᵀ everywhere."""
    return lambda params, x: x @ jnp.asarray(kernel, x.dtype)


def samples(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def tanh_sizes(sizes, batch=5, seed=0, activation="tanh", latent="identity"):
    """Make a trained-looking encoder: kernels of order one, biases that are not zero."""
    rng = np.random.default_rng(seed)
    model = jaxcae.mlp(sizes, activation, latent_activation=latent)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape, scale=0.7), leaf.dtype),
        model.init(jax.random.key(0)),
    )
    return model, params, samples(rng, batch, sizes[0])


# Singular values.


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (4, 4), (5, 1), (1, 5)])
def test_singular_values_of_a_linear_encoder_are_those_of_its_matrix(rng, shape):
    kernel = rng.normal(size=shape)
    values = analysis.singular_values(linear(kernel))(None, samples(rng, 4, shape[0]))
    expected = np.linalg.svd(kernel, compute_uv=False)
    assert values.shape == (4, min(shape))
    np.testing.assert_allclose(values, np.tile(expected, (4, 1)), rtol=1e-5)


def test_singular_values_in_float64(rng, x64):
    kernel = rng.normal(size=(9, 4))
    values = analysis.singular_values(linear(kernel))(None, jnp.asarray(rng.normal(size=(2, 9))))
    assert values.dtype == jnp.float64
    np.testing.assert_allclose(values[0], np.linalg.svd(kernel, compute_uv=False), rtol=1e-12)


def test_small_singular_values_survive(rng):
    """The eigenvalues of JJᵀ would give 1e-3 here for the last one, or NaN."""
    left, _ = np.linalg.qr(rng.normal(size=(40, 4)))
    right, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    expected = np.array([10.0, 1.0, 1e-2, 1e-4])
    kernel = left @ np.diag(expected) @ right
    values = analysis.singular_values(linear(kernel))(None, samples(rng, 2, 40))
    np.testing.assert_allclose(values[0], expected, rtol=2e-2)


def test_singular_values_of_a_rank_deficient_encoder(rng):
    kernel = rng.normal(size=(8, 3)) @ rng.normal(size=(3, 6))
    values = analysis.singular_values(linear(kernel))(None, samples(rng, 3, 8))
    expected = np.linalg.svd(kernel, compute_uv=False)
    np.testing.assert_allclose(values[:, :3], np.tile(expected[:3], (3, 1)), rtol=1e-5)
    assert np.all(values[:, 3:] < 1e-5 * expected[0])
    assert np.all(analysis.active_dimensions(values, threshold=1e-5) == 3)


@pytest.mark.parametrize("sizes", [(6, 5, 3), (3, 5, 6), (4, 8, 7, 2)])
def test_singular_values_agree_with_a_jacobian_written_by_hand(sizes):
    model, params, xs = tanh_sizes(sizes)
    values = analysis.singular_values(model.encode)(params, xs)
    layers = [params["encoder"][f"layer_{i}"] for i in range(len(sizes) - 1)]
    for x, row in zip(np.asarray(xs, np.float64), values, strict=True):
        jacobian = np.eye(sizes[0])
        for i, layer in enumerate(layers):
            kernel = np.asarray(layer["kernel"], np.float64)
            x = x @ kernel + np.asarray(layer["bias"], np.float64)
            jacobian = kernel.T @ jacobian
            if i < len(layers) - 1:
                x = np.tanh(x)
                jacobian = (1 - x**2)[:, None] * jacobian
        expected = np.linalg.svd(jacobian, compute_uv=False)
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-6)


def test_squares_add_up_to_the_penalty_at_real_sizes():
    model = jaxcae.mlp((784, 256, 64), "softplus")
    params = model.init(jax.random.key(1))
    xs = jax.random.uniform(jax.random.key(2), (40, 784))
    values = jax.jit(analysis.singular_values(model.encode, chunk_size=16))(params, xs)
    norms = jax.jit(jaxcae.contractive_penalty(model.encode))(params, xs)
    assert values.shape == (40, 64)
    assert np.all(np.diff(values, axis=1) <= 0)
    np.testing.assert_allclose(np.sum(np.square(values), axis=1), norms, rtol=1e-5)


def test_rotating_the_code_changes_no_singular_value(rng):
    model, params, xs = tanh_sizes((6, 5, 4))
    rotation, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    turn = jnp.asarray(rotation, jnp.float32)
    plain = analysis.singular_values(model.encode)(params, xs)
    turned = analysis.singular_values(lambda p, x: model.encode(p, x) @ turn)(params, xs)
    np.testing.assert_allclose(turned, plain, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 3, 5, 64])
def test_chunks_change_nothing(chunk_size):
    model, params, xs = tanh_sizes((6, 5, 4))
    whole = analysis.singular_values(model.encode)(params, xs)
    chunked = analysis.singular_values(model.encode, chunk_size=chunk_size)(params, xs)
    np.testing.assert_allclose(chunked, whole, rtol=1e-5)
    norms = analysis.jacobian_norms(model.encode, chunk_size=chunk_size)(params, xs)
    expected = jaxcae.contractive_penalty(model.encode, method="reverse")(params, xs)
    assert norms.shape == (5,)
    np.testing.assert_allclose(norms, expected, rtol=1e-5)


def test_samples_and_codes_of_any_shape(rng):
    kernel = rng.normal(size=(6, 4))

    def encode(params, x):
        return (x.reshape(6) @ jnp.asarray(kernel, x.dtype)).reshape(2, 2)

    xs = samples(rng, 3, 2, 3)
    values = analysis.singular_values(encode)(None, xs)
    np.testing.assert_allclose(values[0], np.linalg.svd(kernel, compute_uv=False), rtol=1e-5)
    ratios = analysis.contraction_ratios(encode, [0.5])(None, xs, jax.random.key(0))
    assert ratios.shape == (3, 1)


def test_half_precision_is_decomposed_in_float32(rng):
    kernel = rng.normal(size=(6, 3))
    xs = samples(rng, 2, 6).astype(jnp.bfloat16)
    values = analysis.singular_values(linear(kernel))(None, xs)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values[0], np.linalg.svd(kernel, compute_uv=False), rtol=3e-2)


# What is counted from them.


def test_average_spectrum_is_by_rank():
    values = jnp.array([[4.0, 2.0], [2.0, 0.0], [3.0, 1.0]])
    mean, low, high = analysis.average_spectrum(values, quantiles=(0.0, 1.0))
    np.testing.assert_allclose(mean, [3, 1])
    np.testing.assert_allclose(low, [2, 0])
    np.testing.assert_allclose(high, [4, 2])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5.0, 0, 0, 0], 1),
        ([2.0, 2, 2, 2], 4),
        ([3.0, 3, 0, 0], 2),
        ([2.0, 1, 0, 0], 25 / 17),
        ([0.0, 0, 0, 0], 0),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_effective_dimension(values, expected, scale):
    got = analysis.effective_dimension(jnp.array([values]) * scale)
    np.testing.assert_allclose(got, [expected], rtol=1e-6)


@given(st.lists(st.floats(0, 1e3, width=32), min_size=4, max_size=4).filter(any))
def test_effective_dimension_lies_between_one_and_the_rank(values):
    (dimension,) = analysis.effective_dimension(jnp.array([sorted(values, reverse=True)]))
    assert 1 - 1e-5 <= dimension <= np.count_nonzero(values) + 1e-4


def test_active_dimensions_counts_from_the_threshold_on():
    values = jnp.array([[10.0, 1.0, 0.5, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert analysis.active_dimensions(values, threshold=0.1).tolist() == [2, 4, 0]
    assert analysis.active_dimensions(values, threshold=0.05).tolist() == [3, 4, 0]
    for threshold in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="share of the largest"):
            analysis.active_dimensions(values, threshold=threshold)


# Contraction over distance.


def test_a_scaled_rotation_shrinks_every_distance_alike(rng):
    rotation, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    ratios = analysis.contraction_ratios(linear(0.3 * rotation), [0.01, 1, 100])
    got = ratios(None, samples(rng, 4, 6), jax.random.key(0))
    assert got.shape == (4, 3)
    np.testing.assert_allclose(got, 0.3, rtol=1e-3)


def test_the_ratio_is_a_function_of_the_distance():
    """The map x ↦ x² takes, from x = 0, a distance r to r²: the ratio is r."""
    ratios = analysis.contraction_ratios(lambda params, x: x**2, [0.5, 1, 2], num_directions=3)
    got = ratios(None, jnp.zeros((2, 1)), jax.random.key(0))
    np.testing.assert_allclose(got, [[0.5, 1, 2]] * 2, rtol=1e-6)


def test_directions_are_uniform_on_the_sphere(rng):
    """The mean of ρ² over directions is ‖W‖²_F / d; within five standard errors."""
    kernel = rng.normal(size=(5, 1))  # one unit: ρ = |w·u|, and ρ² is seen one direction at a time
    ratios = analysis.contraction_ratios(linear(kernel), [1.0], num_directions=1)
    squares = np.square(ratios(None, jnp.zeros((4000, 5)), jax.random.key(3)))
    error = squares.std() / np.sqrt(squares.size)
    assert abs(squares.mean() - np.sum(kernel**2) / 5) < 5 * error
    assert error < 0.05 * squares.mean()


def test_near_a_sample_the_ratio_is_that_of_the_jacobian():
    model, params, xs = tanh_sizes((6, 5, 4), batch=3)
    ratios = analysis.contraction_ratios(model.encode, [1e-2], num_directions=4)
    key = jax.random.key(5)
    got = ratios(params, xs, key)
    keys = jax.random.split(key, 3)
    for x, own, ratio in zip(xs, keys, got, strict=True):
        jacobian = jax.jacobian(lambda x: model.encode(params, x))(x)
        directions = jax.random.normal(own, (4, 6))
        lengths = np.linalg.norm(jacobian @ directions.T, axis=0)
        expected = np.mean(lengths / np.linalg.norm(directions, axis=1))
        np.testing.assert_allclose(ratio[0], expected, rtol=2e-2)


def test_curvature_over_the_distance_is_that_of_the_points_of_the_ratio():
    """By `jax.hessian`, at x + r u for the directions u of the key."""
    model, params, xs = tanh_sizes((6, 5, 4), batch=3)
    key, radii = jax.random.key(5), (0.5, 3.0)
    got = jax.jit(analysis.curvature_curves(model.encode, radii, num_directions=4))(params, xs, key)
    normal = jax.vmap(lambda own: jax.random.normal(own, (4, 6)))(jax.random.split(key, 3))
    units = normal / jnp.linalg.norm(normal, axis=2, keepdims=True)
    points = xs[:, None, None] + jnp.array(radii)[None, :, None, None] * units[:, None]
    bends = jax.vmap(jax.hessian(lambda x: model.encode(params, x)))(points.reshape(-1, 6))
    norms = np.linalg.norm(bends.reshape(3, 2, 4, -1), axis=3)
    np.testing.assert_allclose(got, norms.mean(2), rtol=1e-4)
    with pytest.raises(ValueError, match="radii must be a sequence of positive numbers"):
        analysis.curvature_curves(model.encode, [0.0])


def test_saturating_units_shrink_large_distances_most():
    model, params, xs = tanh_sizes((6, 5, 4))
    ratios = analysis.contraction_ratios(model.encode, [0.1, 10, 1000])
    curve = np.mean(ratios(params, xs, jax.random.key(0)), axis=0)
    assert curve[0] > 2 * curve[1] > 100 * curve[2]


@pytest.mark.parametrize("radii", [[0.0], [-1.0], [float("nan")], [float("inf")]])
def test_unusable_radii_are_refused(radii):
    with pytest.raises(ValueError, match="radii"):
        analysis.contraction_ratios(linear(np.eye(2)), radii)


def test_typical_distance_is_the_rms_over_all_pairs(rng):
    xs = samples(rng, 7, 2, 3)
    flat = np.asarray(xs).reshape(7, 6)
    pairs = flat[:, None, :] - flat[None, :, :]
    expected = np.sqrt(np.mean(np.sum(pairs**2, axis=-1)))
    np.testing.assert_allclose(analysis.typical_distance(xs), expected, rtol=1e-5)


# Slopes, saturation, filters.


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "softplus", "elu", "gelu", "silu"])
def test_slopes_are_the_diagonals_of_the_jacobian(activation):
    model, params, xs = tanh_sizes((4, 6, 3), activation=activation, latent="tanh")
    first, second = analysis.encoder_slopes(activation, "tanh")(params, xs)
    assert (first.shape, second.shape) == ((5, 6), (5, 3))
    layers = params["encoder"]
    for x, d1, d2 in zip(xs, first, second, strict=True):
        rebuilt = (
            np.diag(d2)
            @ layers["layer_1"]["kernel"].T
            @ np.diag(d1)
            @ layers["layer_0"]["kernel"].T
        )
        jacobian = jax.jacobian(lambda x: model.encode(params, x))(x)
        np.testing.assert_allclose(rebuilt, jacobian, rtol=1e-4, atol=1e-5)


def test_a_linear_code_has_no_slopes():
    _, params, xs = tanh_sizes((4, 6, 3))
    assert [s.shape for s in analysis.encoder_slopes("tanh")(params, xs)] == [(5, 6)]


def test_saturation_is_measured_from_the_largest_slope():
    """A sigmoid's slope is ¼ in the middle and 0.0025 at ±6; half the units are at each."""
    pre_activations = jnp.array([[0.0, 0.0, 6.0, -6.0], [0.0, 0.0, 0.0, 6.0]])
    slopes = jax.nn.sigmoid(pre_activations) * jax.nn.sigmoid(-pre_activations)
    got = analysis.saturation(slopes, "sigmoid", threshold=0.1)
    np.testing.assert_allclose(got, [0.5, 0.25])
    # 0.0247 / 0.25 is just below a tenth, 0.0253 / 0.25 just above.
    edge = analysis.saturation(jnp.array([[0.0247, 0.0253]]), "sigmoid", threshold=0.1)
    np.testing.assert_allclose(edge, [0.5])


def test_saturated_relu_units_are_those_that_are_off():
    _, params, xs = tanh_sizes((4, 50, 3), activation="relu")
    (slopes,) = analysis.encoder_slopes("relu")(params, xs)
    layer = params["encoder"]["layer_0"]
    kernel, bias = np.asarray(layer["kernel"]), np.asarray(layer["bias"])
    off = np.mean(np.asarray(xs) @ kernel + bias <= 0, axis=1)
    np.testing.assert_allclose(analysis.saturation(slopes, "relu"), off, rtol=1e-6)


def test_first_layer_filters_are_the_weights_of_each_unit():
    _, params, _ = tanh_sizes((4, 6, 3))
    filters = analysis.first_layer_filters(params)
    assert filters.shape == (6, 4)
    kernel = params["encoder"]["layer_0"]["kernel"]
    np.testing.assert_array_equal(filters[2], kernel[:, 2])


@pytest.mark.parametrize(
    "params", [{}, {"encoder": {"dense": {}}}, [1, 2], {"encoder": {"layer_0": {"kernel": 1}}}]
)
def test_other_trees_are_refused_with_advice(params):
    with pytest.raises(ValueError, match="take any encoder"):
        analysis.first_layer_filters(params)


def test_activity_is_the_deviation_of_the_first_units(rng: np.random.Generator) -> None:
    model = jaxcae.mlp((5, 4, 2), "relu")
    params = model.init(jax.random.key(0))
    params["encoder"]["layer_0"]["bias"] = jnp.array([0.0, 0.1, -0.2, -50.0])
    xs = rng.standard_normal((40, 5)).astype(np.float32)
    got = analysis.first_layer_activity("relu")(params, xs)
    layer = params["encoder"]["layer_0"]
    units = np.maximum(xs @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"]), 0)
    np.testing.assert_allclose(got, units.std(0), rtol=1e-5)
    assert got[3] == 0  # never on
    assert got[0] > 0
