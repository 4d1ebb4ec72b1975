"""Encoders of many makes, each with a twin in NumPy that the reference can differentiate."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxcae
from tests import reference as ref

Tree = Any


class Encoder(NamedTuple):
    """A JAX encoder, its parameters, and the same function in NumPy."""

    name: str
    encode: Callable[[Tree, Any], Any]
    params: Tree  # float64 NumPy leaves
    input_shape: tuple[int, ...]
    twin: Callable[[Tree, Any], Any]  # of the same tree with NumPy leaves, and one ref.Dual

    def numpy(self, leaves: list[np.ndarray], x: Any) -> Any:
        """Apply the twin to a list of leaves, which is what the reference differentiates."""
        return self.twin(jax.tree.unflatten(jax.tree.structure(self.params), leaves), x)


def randomised(params: Tree, seed: int = 0) -> Tree:
    """Replace every leaf, or shape of one, by random numbers that keep activations of order one.

    Initial biases are zero and initial scales one, which would hide mistakes in their handling.
    """
    rng = np.random.default_rng(seed)

    def draw(leaf: Any) -> np.ndarray:
        fan_in = max(1, np.size(leaf) // (np.shape(leaf)[-1] if np.ndim(leaf) else 1))
        scale = 1 / np.sqrt(fan_in) if np.ndim(leaf) > 1 else 0.5
        return scale * rng.normal(size=np.shape(leaf))

    return jax.tree.map(draw, params)


def shapes(init: Callable[..., Tree], *args: Any) -> Tree:
    """Return what `init` would draw, as shapes: drawing compiles a program for each of them."""
    return jax.eval_shape(lambda: init(jax.random.key(0), *args))


def _layers(tree: Tree) -> list[ref.Dense]:
    return [ref.Dense(layer["kernel"], layer["bias"]) for layer in tree]


# --------------------------------------------------------------------------- built-in models


def _mlp(name: str, sizes: tuple[int, ...], activation: str, **options: Any) -> Encoder:
    model = jaxcae.mlp(sizes, activation, **options)
    latent = options.get("latent_activation", "identity")

    def twin(tree: Tree, x: Any) -> Any:
        encoder = tree["encoder"]
        layers = _layers([encoder[f"layer_{i}"] for i in range(len(encoder))])
        return ref.mlp(layers, x, activation, latent)

    params = randomised(shapes(model.init))
    return Encoder(name, model.encode, params, sizes[:1], twin)


def _conv(name: str, shape: tuple[int, int, int], features: tuple[int, ...]) -> Encoder:
    model = jaxcae.conv(shape, features, 3, "tanh", latent_activation="sigmoid")

    def twin(tree: Tree, x: Any) -> Any:
        encoder = tree["encoder"]
        for i in range(len(features)):
            layer = encoder[f"conv_{i}"]
            x = x.map(lambda a: np.pad(a, [(1, 1), (1, 1), (0, 0)]))
            x = ref.convolve(x, layer["kernel"], stride=2, padding="VALID") + layer["bias"]
            x = x.elementwise("tanh")
        return ref.mlp(_layers([encoder["dense"]]), x.reshape(-1), "", "sigmoid")

    params = randomised(shapes(model.init))
    return Encoder(name, model.encode, params, shape, twin)


# --------------------------------------------------------------------------- recurrent


def _recurrent(name: str) -> Encoder:
    """Encode three steps of two features by a GRU, its reset after the product, or an LSTM."""
    units, gates = 2, {"gru": 3, "lstm": 4}[name]

    def encode(p: Tree, x: Any) -> Any:
        def gru(h: Any, v: Any) -> Any:
            (a, b, c), (d, e, f) = jnp.split(v @ p["x"] + p["b"], 3), jnp.split(h @ p["h"], 3)
            r, u = jax.nn.sigmoid(a + d), jax.nn.sigmoid(b + e)
            return (1 - u) * jnp.tanh(c + r * f) + u * h, None

        def lstm(carry: Any, v: Any) -> Any:
            i, f, g, o = jnp.split(v @ p["x"] + p["b"] + carry[0] @ p["h"], 4)
            c = jax.nn.sigmoid(f) * carry[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
            return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

        start = jnp.zeros(units, x.dtype)
        if name == "gru":
            return jax.lax.scan(gru, start, x)[0]
        return jax.lax.scan(lstm, (start, start), x)[0][0]

    def twin(p: Tree, x: Any) -> Any:
        h = c = x[0] * 0.0
        for t in range(3):
            mine, old = x[t] @ p["x"] + p["b"], h @ p["h"]
            gate = [slice(i * units, (i + 1) * units) for i in range(gates)]
            if name == "gru":
                r, u = ((mine[g] + old[g]).elementwise("sigmoid") for g in gate[:2])
                h = (1.0 - u) * (mine[gate[2]] + r * old[gate[2]]).elementwise("tanh") + u * h
            else:
                i, f, o = ((mine + old)[gate[j]].elementwise("sigmoid") for j in (0, 1, 3))
                c = f * c + i * (mine + old)[gate[2]].elementwise("tanh")
                h = o * c.elementwise("tanh")
        return h

    width = gates * units
    params = {"x": np.zeros((2, width)), "h": np.zeros((units, width)), "b": np.zeros(width)}
    return Encoder(name, encode, randomised(params), (3, 2), twin)


def _temporal_conv(name: str, shape: tuple[int, int], features: tuple[int, ...]) -> Encoder:
    model = jaxcae.temporal_conv(shape, features, 3, "tanh", latent_activation="sigmoid")

    def twin(tree: Tree, x: Any) -> Any:
        encoder, rows = tree["encoder"], shape[0]
        for i in range(len(features)):
            layer = encoder[f"conv_{i}"]
            kept = (rows + 1) // 2
            before = (
                2 * (kept - 1) + 3 - rows
            )  # zeros, so that the last window ends at the last row
            x = x.map(lambda a, n=before: np.pad(a, [(n, 0), (0, 0)])[:, None])
            x = ref.convolve(x, layer["kernel"][:, None], stride=2, padding="VALID")
            x, rows = (x[:, 0] + layer["bias"]).elementwise("tanh"), kept
        return ref.mlp(_layers([encoder["dense"]]), x.reshape(-1), "", "sigmoid")

    params = randomised(shapes(model.init))
    return Encoder(name, model.encode, params, shape, twin)


# --------------------------------------------------------------------------- other libraries

# Unmodified modules through the adapters; the one with a LayerNorm by Linen's own `apply`.


class _NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(6, 5, rngs=rngs)
        self.code = nnx.Linear(5, 3, rngs=rngs)
        self.out = nnx.Linear(3, 6, rngs=rngs)

    def encode(self, x: Any) -> Any:
        return self.code(nnx.softplus(self.hidden(x)))

    def decode(self, z: Any) -> Any:
        return self.out(z)


def _nnx() -> Encoder:
    model = jaxcae.from_flax(_NnxNet)

    def twin(tree: Tree, x: Any) -> Any:
        return ref.mlp(_layers([tree["hidden"], tree["code"]]), x, "softplus")

    return Encoder("nnx", model.encode, randomised(shapes(model.init)), (6,), twin)


class _LinenNet(nn.Module):
    def setup(self) -> None:
        self.hidden, self.code, self.out = nn.Dense(5), nn.Dense(3), nn.Dense(6)

    def encode(self, x: Any) -> Any:
        return self.code(nn.tanh(self.hidden(x)))

    def decode(self, z: Any) -> Any:
        return self.out(z)


def _linen() -> Encoder:
    model = jaxcae.from_flax(_LinenNet(), sample=(6,))

    def twin(tree: Tree, x: Any) -> Any:
        return ref.mlp(_layers([tree["hidden"], tree["code"]]), x, "tanh")

    return Encoder("linen", model.encode, randomised(shapes(model.init)), (6,), twin)


class _LayerNormNet(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(3)(nn.gelu(nn.LayerNorm()(nn.Dense(5)(x)), approximate=False))


def _linen_layer_norm() -> Encoder:
    net = _LayerNormNet()
    params = randomised(shapes(net.init, np.zeros(6, np.float32)))

    def twin(tree: Tree, x: Any) -> Any:
        first, last = _layers(tree["params"][f"Dense_{i}"] for i in (1, 0))
        scale, bias = (tree["params"]["LayerNorm_0"][name] for name in ("scale", "bias"))
        x = x @ first.kernel + first.bias
        x = x - x.sum(keepdims=True, axis=0) / 5
        x = x * ((x * x).sum(keepdims=True, axis=0) / 5 + 1e-6) ** -0.5 * scale + bias
        return x.elementwise("gelu") @ last.kernel + last.bias

    return Encoder("linen layer norm", net.apply, params, (6,), twin)


def _equinox() -> Encoder:
    key = jax.random.key(0)
    encoder = eqx.nn.MLP(6, 3, 5, depth=1, activation=jax.nn.silu, key=key)
    model = jaxcae.from_equinox(encoder, eqx.nn.Linear(3, 6, key=key))

    def twin(tree: Tree, x: Any) -> Any:
        layers = [tree["encoder"]["layers"][i] for i in ("0", "1")]
        return ref.mlp([ref.Dense(layer["weight"].T, layer["bias"]) for layer in layers], x, "silu")

    return Encoder("equinox", model.encode, randomised(shapes(model.init)), (6,), twin)


# --------------------------------------------------------------------------- plain functions


def _matrices(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    return randomised([np.zeros(shape) for shape in shapes])


def _function(
    name: str, encode: Any, params: Tree, twin: Any, input_shape: tuple[int, ...] = (6,)
) -> Encoder:
    return Encoder(name, encode, params, input_shape, twin)


def _plain_functions() -> list[Encoder]:
    def scanned(p: Tree, x: Any) -> Any:
        return jax.lax.scan(lambda z, w: (jnp.tanh(z @ w), None), x, p)[0]

    def scanned_twin(p: Tree, x: Any) -> Any:
        for w in p:
            x = (x @ w).elementwise("tanh")
        return x

    def normalised(p: Tree, x: Any) -> Any:
        return jax.nn.softplus((x - p["mean"]) / jnp.exp(p["log_scale"]) @ p["w"])

    def normalised_twin(p: Tree, x: Any) -> Any:
        return (((x - p["mean"]) / np.exp(p["log_scale"])) @ p["w"]).elementwise("softplus")

    def branch(p: Tree, x: Any) -> Any:
        return x + jnp.tanh(x @ p[0]) @ p[1]

    def columns(p: Tree, x: Any) -> Any:
        rows = jax.vmap(lambda row: jnp.tanh(row @ p[0]))(x.reshape(2, 3))
        return rows.T.reshape(-1) @ p[1]

    def columns_twin(p: Tree, x: Any) -> Any:
        rows = (x.reshape(2, 3) @ p[0]).elementwise("tanh")
        return rows.map(lambda a: a.T.reshape(-1)) @ p[1]

    def odd(p: Tree, x: Any) -> Any:
        (w, nothing), named = p
        assert nothing is None
        ((scale,),) = named[""]
        return jnp.tanh(x @ w) * scale

    def odd_twin(p: Tree, x: Any) -> Any:
        return (x @ p[0][0]).elementwise("tanh") * p[1][""][0][0]

    norm = {"mean": np.zeros(6), "log_scale": np.zeros(6), "w": np.zeros((6, 4))}
    return [
        _function(
            "lambda",
            lambda w, x: jnp.tanh(w @ x),
            _matrices((3, 6))[0],
            lambda w, x: (w @ x).elementwise("tanh"),
        ),
        _function("linear", lambda w, x: x @ w, _matrices((6, 3))[0], lambda w, x: x @ w),
        _function(
            "odd pytree", odd, randomised(((np.zeros((6, 3)), None), {"": [(1.0,)]})), odd_twin
        ),
        _function(
            "tied encoder",
            lambda w, x: jax.nn.sigmoid(jax.nn.sigmoid(x @ w) @ w.T),
            _matrices((6, 4))[0],
            lambda w, x: ((x @ w).elementwise("sigmoid") @ w.T).elementwise("sigmoid"),
        ),
        _function(
            "activations in a row",
            lambda p, x: jax.nn.softplus(3 * jnp.tanh(x @ p[0]) - 1) @ p[1],
            _matrices((6, 5), (5, 3)),
            lambda p, x: (
                (3.0 * (x @ p[0]).elementwise("tanh") - 1.0).elementwise("softplus") @ p[1]
            ),
        ),
        _function("normalised inputs", normalised, randomised(norm), normalised_twin),
        _function(
            "residual",
            branch,
            _matrices((6, 4), (4, 6)),
            lambda p, x: x + (x @ p[0]).elementwise("tanh") @ p[1],
        ),
        _function(
            "gated",
            lambda p, x: (x @ p[0]) * jax.nn.sigmoid(x @ p[1]),
            _matrices((6, 3), (6, 3)),
            lambda p, x: (x @ p[0]) * (x @ p[1]).elementwise("sigmoid"),
        ),
        _function("scan inside", scanned, _matrices((2, 6, 6))[0], scanned_twin),
        _function("vmap inside", columns, _matrices((3, 4), (8, 3)), columns_twin),
        _function(
            "checkpointed",
            lambda p, x: jax.checkpoint(lambda z: jnp.tanh(z @ p[0]))(x) @ p[1],
            _matrices((6, 5), (5, 3)),
            lambda p, x: (x @ p[0]).elementwise("tanh") @ p[1],
        ),
        _function(
            "image to map",
            lambda p, x: jnp.tanh(x.reshape(6) @ p).reshape(2, 2),
            _matrices((6, 4))[0],
            lambda p, x: (x.reshape(6) @ p).elementwise("tanh").reshape(2, 2),
            (2, 3, 1),
        ),
    ]


def all_encoders() -> list[Encoder]:
    """Make every encoder of the contract table."""
    return [
        *(_mlp(f"mlp {name}", (6, 5, 3), name) for name in jaxcae.ACTIVATIONS),
        _mlp("mlp tied", (6, 5, 3), "sigmoid", tied=True),
        _mlp("mlp depth 1", (6, 3), "tanh", latent_activation="softplus"),
        _mlp("mlp depth 2 latent", (6, 5, 3), "silu", latent_activation="tanh"),
        _mlp("mlp depth 3", (6, 5, 4, 3), "tanh"),
        _mlp("mlp depth 3 latent", (6, 5, 4, 3), "softplus", latent_activation="sigmoid"),
        _mlp("mlp depth 4", (6, 5, 4, 5, 3), "gelu"),
        _mlp("mlp widening", (3, 5, 6), "sigmoid"),
        _mlp("mlp one unit", (1, 4, 1), "tanh"),
        _conv("conv", (5, 4, 2), (3,)),
        _conv("conv two stages", (6, 5, 1), (2, 3)),
        _temporal_conv("temporal conv", (7, 2), (3, 2)),
        _recurrent("gru"),
        _recurrent("lstm"),
        _nnx(),
        _linen(),
        _linen_layer_norm(),
        _equinox(),
        *_plain_functions(),
    ]
