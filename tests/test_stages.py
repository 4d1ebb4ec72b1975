"""Stacking layer by layer: what each layer sees, and what the deep model begins with."""

from typing import Any

import jax
import numpy as np
import optax
import pytest

import jaxcae
from jaxcae.models import mlp_layers, mlp_params
from jaxcae.training import Stage, TrainState, stacked, train_stages

SIZES = (8, 6, 4, 2)
OPTIONS: dict[str, Any] = {"latent_activation": "tanh", "output": "sigmoid"}
OPTIMIZER = optax.adam(1e-2)


def loss_of(model: jaxcae.Autoencoder) -> Any:
    return jaxcae.cae_loss(model, 0.01, method="reverse")


@pytest.fixture(scope="module")
def xs() -> np.ndarray:
    """Samples near a curve, so that two numbers tell most of them."""
    t = np.random.default_rng(0).uniform(0, 3, (96, 1))
    return (0.5 + 0.4 * np.sin(t + np.arange(8))).astype(np.float32)


@pytest.fixture(scope="module")
def stages(xs: np.ndarray) -> list[Stage]:
    layers = mlp_layers(SIZES, "tanh", **OPTIONS)
    key = jax.random.key(0)
    return train_stages(layers, loss_of, OPTIMIZER, key, xs, held_out=xs, epochs=3, batch_size=32)


def test_each_layer_learns_the_codes_of_the_one_before(xs, stages):
    """Trained apart on those codes, with the keys of its number, it is the same layer."""
    codes = xs
    for index, stage in enumerate(stages):
        assert stage.history[-1]["held_out_loss"] < stage.history[0]["held_out_loss"]
        init_key, train_key = jax.random.split(jax.random.fold_in(jax.random.key(0), index))
        if index == 1:
            start = TrainState.create(stage.model.init(init_key), OPTIMIZER, train_key)
            alone, _ = jaxcae.fit(
                loss_of(stage.model), OPTIMIZER, start, codes, epochs=3, batch_size=32
            )
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
                alone.params,
                stage.params,
            )
        codes = np.asarray(jax.vmap(stage.model.encode, (None, 0))(stage.params, codes))
        assert codes.shape == (96, SIZES[index + 1])


@pytest.mark.parametrize("tied", [False, True])
def test_the_layers_are_the_deep_network(tied):
    """Codes and reconstructions of `mlp`, of `stacked`, and of the layers one after the other."""
    layers = mlp_layers(SIZES, "tanh", tied=tied, **OPTIONS)
    deep, stack = jaxcae.mlp(SIZES, "tanh", tied=tied, **OPTIONS), stacked(layers)
    own = stack.init(jax.random.key(1))
    params = mlp_params(own)
    assert jax.tree.structure(params) == jax.tree.structure(deep.init(jax.random.key(0)))
    x = jax.random.uniform(jax.random.key(2), (8,))
    code = deep.encode(params, x)
    np.testing.assert_allclose(stack.encode(own, x), code, rtol=1e-6)
    np.testing.assert_allclose(stack.decode(own, code), deep.decode(params, code), rtol=1e-6)


def test_fine_tuning_begins_where_the_stages_ended(xs, stages):
    """The whole walk; what pretraining gives is far better than initial parameters."""
    deep = jaxcae.mlp(SIZES, "tanh", **OPTIONS)
    params = mlp_params([stage.params for stage in stages])
    loss = loss_of(deep)
    state = TrainState.create(params, OPTIMIZER, jax.random.key(1))
    state, history = jaxcae.fit(loss, OPTIMIZER, state, xs, epochs=2, batch_size=32, held_out=xs)
    assert history[-1]["held_out_loss"] < history[0]["held_out_loss"]
    untrained = jaxcae.evaluate(loss, deep.init(jax.random.key(0)), xs)["loss"]
    assert history[0]["held_out_loss"] < untrained


def test_a_callback_sees_the_layer_and_can_end_the_stack(xs):
    """The layer it stopped in is the last."""
    seen: list[int] = []

    def stop(layer: int, segment: Any) -> bool:
        seen.append(layer)
        return layer == 1

    layers = mlp_layers((8, 3, 2, 2), "tanh")
    stages = train_stages(
        layers, loss_of, OPTIMIZER, jax.random.key(0), xs, callback=stop, epochs=1
    )
    assert len(stages) == 2
    assert sorted(set(seen)) == [0, 1]


def test_layers_that_cannot_be_made_are_refused():
    """As `mlp` refuses them."""
    with pytest.raises(ValueError, match="at least one layer, got none"):
        train_stages([], loss_of, OPTIMIZER, jax.random.key(0), np.ones((3, 2)), epochs=1)
    with pytest.raises(ValueError, match="sizes needs features and at least one layer"):
        mlp_layers((8,))
    with pytest.raises(ValueError, match="every entry of sizes must be a positive int, got 0"):
        mlp_layers((8, 0, 2))
