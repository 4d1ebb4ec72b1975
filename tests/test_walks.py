"""A newcomer's walks with a module of their own, and what they show.

That the README's own blocks run is seen with the README; here their results are held to others.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jaxcae
from tests.tolerances import assert_close, assert_each_close

NET = """
from flax import nnx


class Net(nnx.Module):
    def __init__(self, rngs, features=64, hidden=32, latent=8):
        self.hidden = nnx.Linear(features, hidden, rngs=rngs)
        self.code = nnx.Linear(hidden, latent, rngs=rngs)
        self.back = nnx.Linear(latent, hidden, rngs=rngs)
        self.out = nnx.Linear(hidden, features, rngs=rngs)

    def encode(self, x):
        return self.code(nnx.softplus(self.hidden(x)))

    def decode(self, z):
        return nnx.sigmoid(self.out(nnx.softplus(self.back(z))))
"""


@pytest.fixture(scope="module")
def net_class() -> Any:
    """Give the module of the README."""
    names: dict[str, Any] = {"__name__": "my_model"}
    exec(NET, names)
    return names["Net"]


@pytest.fixture(scope="module")
def xs() -> jax.Array:
    """Draw samples in [0, 1]."""
    return jax.random.uniform(jax.random.key(1), (32, 64))


@pytest.mark.slow
def test_an_own_module_from_the_command_line(tmp_path):
    """In a process of its own, in the directory that the module is in."""
    (tmp_path / "my_model.py").write_text(NET)
    jaxcae_ = Path(sys.executable).with_name("jaxcae")
    train = "train --data digits --model my_model:Net --model-args hidden=48 latent=6 --epochs 2"
    score = "score mine --data digits --output scores.csv --model my_model:Net"
    for command in (f"{train} --run-dir mine", score):
        done = subprocess.run(
            [jaxcae_, *command.split()], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr
    scores = np.loadtxt(tmp_path / "scores.csv", delimiter=",", skiprows=1)
    assert scores.shape == (1797, 2)
    assert np.all(scores > 0)


@pytest.mark.slow
def test_a_loop_of_ones_own_with_nnx_optimizer(net_class, xs):
    """Parameters are taken from the module as a state, and stay there."""
    net = net_class(nnx.Rngs(0))
    model = jaxcae.from_flax(net)
    loss = jaxcae.cae_loss(model, contraction=0.03)
    schedule = optax.cosine_decay_schedule(1e-2, decay_steps=10)
    optimizer = nnx.Optimizer(net, optax.adamw(schedule), wrt=nnx.Param)
    graph, state = nnx.split((net, optimizer))

    @jax.jit
    def step(state: Any, xs: Any) -> Any:
        net, optimizer = nnx.merge(graph, state)
        params = nnx.state(net, nnx.Param)
        (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params, xs)
        optimizer.update(net, gradient)
        return nnx.state((net, optimizer)), metrics

    losses = []
    for _ in range(10):
        state, metrics = step(state, xs)
        losses.append(float(metrics["loss"]))
    nnx.update((net, optimizer), state)
    assert losses[-1] < 0.9 * losses[0]
    assert int(optimizer.step.get_value()) == 10

    # The same steps by hand, over plain dicts.
    adam = optax.adamw(schedule)
    params = model.init(jax.random.key(0))

    def plain(carry: Any, _: Any) -> Any:
        params, memory = carry
        gradient, _ = jax.grad(loss, has_aux=True)(params, xs)
        updates, memory = adam.update(gradient, memory, params)
        return (optax.apply_updates(params, updates), memory), None

    (params, _), _ = jax.lax.scan(plain, (params, adam.init(params)), length=10)
    want = jaxcae.contractive_penalty(model.encode)(params, xs)
    got = jaxcae.contractive_penalty(model.encode)(nnx.state(net, nnx.Param), xs)
    np.testing.assert_allclose(got, want, rtol=1e-3)  # Adam divides by roots of small squares


class Linen(nn.Module):
    """The README's: bfloat16 within, parameters in float32."""

    def setup(self) -> None:
        self.hidden = nn.Dense(32, dtype=jnp.bfloat16)
        self.code, self.out = nn.Dense(8, dtype=jnp.bfloat16), nn.Dense(64)

    def encode(self, x: Any) -> Any:
        return self.code(nn.tanh(self.hidden(x)))

    def decode(self, z: Any) -> Any:
        return self.out(z)


@pytest.mark.slow
def test_linen_with_its_train_state_in_bfloat16_through_orbax(xs, tmp_path):
    """The loss falls, the checkpoint gives parameters back, and norms are float32's."""
    from orbax.checkpoint import v1 as ocp

    model = jaxcae.from_flax(Linen(), sample=xs[0])
    loss = jaxcae.cae_loss(model, contraction=0.03)
    state = TrainState.create(
        apply_fn=None, params=model.init(jax.random.key(0)), tx=optax.adam(1e-2)
    )

    @jax.jit
    def train_step(state: Any, xs: Any) -> Any:
        (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, xs)
        return state.apply_gradients(grads=gradient), metrics

    losses = []
    for _ in range(10):
        state, metrics = train_step(state, xs)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0]
    ocp.save(tmp_path / "params", state.params)
    params = ocp.load(tmp_path / "params", state.params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    codes = Linen().apply({"params": params}, xs, method="encode")
    assert codes.dtype == jnp.bfloat16
    assert_close(jax.vmap(model.encode, (None, 0))(state.params, xs), codes, "bfloat16")

    first, second = (np.asarray(params[name]["kernel"], np.float64) for name in ("hidden", "code"))
    hidden = np.tanh(np.asarray(xs, np.float64) @ first + np.asarray(params["hidden"]["bias"]))
    gram = (first.T @ first) * (second @ second.T)
    want = np.einsum("bi,ij,bj->b", 1 - hidden**2, gram, 1 - hidden**2)
    assert_each_close(jaxcae.contractive_penalty(model.encode)(params, xs), want, "bfloat16")
