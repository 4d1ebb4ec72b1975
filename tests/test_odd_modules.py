"""Modules that people have, unmodified, against `jacrev` of one sample: every exact method."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxcae
from tests.encoders import randomised
from tests.tolerances import assert_close

pytestmark = pytest.mark.slow


class _Net(nnx.Module):
    """A decoder for any of them, and the last layer of the encoder."""

    def __init__(self, rngs: nnx.Rngs, shape: tuple[int, ...], width: int) -> None:
        self.shape = shape
        self.last = nnx.Linear(width, 3, rngs=rngs)
        self.out = nnx.Linear(3, int(np.prod(shape)), rngs=rngs)

    def encode(self, x: Any) -> Any:
        return self.last(self.hidden(x))

    def decode(self, z: Any) -> Any:
        return self.out(z).reshape(-1, *self.shape)


class Attention(_Net):
    def __init__(self, rngs: nnx.Rngs) -> None:
        super().__init__(rngs, (4, 6), 24)
        self.attend = nnx.MultiHeadAttention(2, 6, rngs=rngs, decode=False)
        self.norm = nnx.LayerNorm(6, rngs=rngs)

    def hidden(self, x: Any) -> Any:
        return (x + self.attend(self.norm(x))).reshape(len(x), -1)


class Recurrent(_Net):
    def __init__(self, rngs: nnx.Rngs, cell: Any) -> None:
        super().__init__(rngs, (4, 3), 5)
        # Its carry begins in `param_dtype`, and is float64 here from then on.
        self.scan = nnx.RNN(cell(3, 5, param_dtype=jnp.float64, rngs=rngs))

    def hidden(self, x: Any) -> Any:
        return self.scan(x)[:, -1]


class Grouped(_Net):
    def __init__(self, rngs: nnx.Rngs) -> None:
        super().__init__(rngs, (6, 6, 1), 36)
        self.conv = nnx.Conv(1, 4, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.GroupNorm(4, 2, rngs=rngs)

    def hidden(self, x: Any) -> Any:
        return nnx.silu(self.norm(self.conv(x))).reshape(len(x), -1)


class Stack(_Net):
    """A list of layers, one of them twice, with a skip and low-rank additions."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        super().__init__(rngs, (6,), 6)
        self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(3)])
        self.low = nnx.LoRA(6, 2, 6, base_module=self.layers[0], rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def hidden(self, x: Any) -> Any:
        for layer in (*self.layers, self.low):
            x = x + nnx.gelu(self.dropout(layer(x)))
        return x


class Tied(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (6, 3)))

    def encode(self, x: Any) -> Any:
        return nnx.sigmoid(x @ self.kernel[...])

    def decode(self, z: Any) -> Any:
        return z @ self.kernel[...].T


class LinenPictures(nn.Module):
    def setup(self) -> None:
        self.conv, self.norm = nn.Conv(4, (3, 3), (2, 2)), nn.BatchNorm()
        self.last, self.out = nn.Dense(3), nn.Dense(36)

    def encode(self, x: Any, train: bool) -> Any:
        h = nn.relu(self.norm(self.conv(x), use_running_average=not train))
        return self.last(h.reshape((len(x), -1)))

    def decode(self, z: Any) -> Any:
        return self.out(z).reshape((-1, 6, 6, 1))


MODULES = {
    "attention": (Attention, (4, 6)),
    "gru": (lambda rngs: Recurrent(rngs, nnx.GRUCell), (4, 3)),
    "lstm": (lambda rngs: Recurrent(rngs, nnx.OptimizedLSTMCell), (4, 3)),
    "group norm": (Grouped, (6, 6, 1)),
    "stack": (Stack, (6,)),
    "tied": (Tied, (6,)),
    "linen batch norm": (LinenPictures(), (6, 6, 1)),
}


@pytest.mark.parametrize("name", MODULES)
def test_norms_and_gradients_are_those_of_jacrev(name, rng, x64):
    """In float64, where a wrong term of a norm cannot hide in rounding."""
    module, shape = MODULES[name]
    model = jaxcae.from_flax(module, sample=jax.ShapeDtypeStruct(shape, jnp.float64))
    params = jax.tree.map(jnp.asarray, randomised(jax.eval_shape(model.init, jax.random.key(0))))
    xs = jnp.asarray(rng.normal(size=(3, *shape)))

    def brute(params: Any, xs: Any) -> Any:
        return jax.vmap(lambda x: jnp.sum(jax.jacrev(model.encode, 1)(params, x) ** 2))(xs)

    def both(penalty: Any) -> Any:
        return jax.jit(lambda p, xs: jax.vjp(lambda p: penalty(p, xs), p))

    want, pull = both(brute)(params, xs)
    gradient = pull(jnp.ones(3))[0]
    for method in ("auto", "chain", "forward"):
        got, pull = both(jaxcae.contractive_penalty(model.encode, method))(params, xs)
        # Some of what Flax computes in attention is float32, whatever comes in.
        np.testing.assert_allclose(got, want, rtol=1e-7 if name == "attention" else 1e-10)
        # Relative to the whole gradient: that of attention's key biases is 0 but for rounding.
        one, other = (
            np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
            for tree in (pull(jnp.ones(3))[0], gradient)
        )
        assert_close(one, other, "float32")
