"""A grammar of encoders: pieces in JAX, each with the same mathematics in NumPy beside it.

A piece maps a vector to a vector. Some are affine, some elementwise, many only look as if they
were: these are what an engine that reads structure could get wrong.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests import reference as ref
from tests.reference import Dual

Arrays = list[Any]


class Piece(NamedTuple):
    """One piece: its arrays for n inputs, the JAX function, and its twin on Duals."""

    shapes: Callable[[int], list[tuple[int, ...]]]
    function: Callable[[Arrays, Any], Any]
    twin: Callable[[Arrays, Dual], Dual]


PIECES: dict[str, Piece] = {}


def _piece(name: str, shapes: Any, function: Any, twin: Any) -> None:
    PIECES[name] = Piece(shapes if callable(shapes) else lambda n: shapes, function, twin)


def _square(n: int) -> list[tuple[int, ...]]:
    return [(n, n)]


def _dual(value: Any, tangent: Any) -> Dual:
    return Dual(np.asarray(value), np.asarray(tangent))


def _take(x: Dual, order: Any) -> Dual:
    return _dual(x.value[order], x.tangent[order])


def _choose(condition: Any, a: Dual, b: Dual) -> Dual:
    return _dual(
        np.where(condition, a.value, b.value), np.where(condition[..., None], a.tangent, b.tangent)
    )


def _sigmoid(x: Dual) -> Dual:
    return x.elementwise("sigmoid")


def _tanh(x: Dual) -> Dual:
    return x.elementwise("tanh")


# --------------------------------------------------------------------------- affine

_piece("identity", [], lambda p, x: x, lambda p, x: x)
_piece(
    "affine",
    lambda n: [(n, n), (n,)],
    lambda p, x: x @ p[0] + p[1],
    lambda p, x: x @ p[0] + p[1],
)
_piece("widen", lambda n: [(n, n + 1)], lambda p, x: x @ p[0], lambda p, x: x @ p[0])
_piece("narrow", lambda n: [(n, n - 1)], lambda p, x: p[0].T @ x, lambda p, x: p[0].T @ x)
_piece(
    "scale and shift",
    lambda n: [(n,), (n,)],
    lambda p, x: x * p[0] + p[1],
    lambda p, x: x * p[0] + p[1],
)
_piece("constants", [], lambda p, x: (x - 0.25) / 1.5, lambda p, x: (x - 0.25) / 1.5)
_piece("reverse", [], lambda p, x: x[::-1], lambda p, x: x[::-1])
_piece("roll", [], lambda p, x: jnp.roll(x, 1), lambda p, x: x.map(lambda a: np.roll(a, 1)))
_piece(
    "transpose",
    [],
    lambda p, x: jnp.concatenate([x, x]).reshape(2, -1).T.reshape(-1)[: x.size],
    lambda p, x: ref.concatenate([x, x]).map(lambda a: a.reshape(2, -1).T.reshape(-1))[
        : x.shape[0]
    ],
)
_piece("cumsum", [], lambda p, x: jnp.cumsum(x), lambda p, x: x.map(np.cumsum))
_piece(
    "pad a slice",
    [],
    lambda p, x: jnp.pad(x[1:], (0, 1)) + x,
    lambda p, x: x.map(lambda a: np.pad(a[1:], (0, 1)) + a),
)
_piece(
    "centre",
    [],
    lambda p, x: x - jnp.mean(x),
    lambda p, x: x - x.sum(axis=0, keepdims=True) / x.shape[0],
)
_piece(
    "convolution",
    [(3, 1, 1, 1), (1,)],
    lambda p, x: (
        jax.lax.conv_general_dilated(
            x.reshape(1, -1, 1, 1), p[0], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ).reshape(-1)
        + p[1]
    ),
    lambda p, x: ref.convolve(x.reshape(-1, 1, 1), p[0], 1).reshape(-1) + p[1],
)
_piece(
    "scatter",
    lambda n: [(n,)],
    lambda p, x: p[0].at[1:].set(x[1:]) + x,
    lambda p, x: ref.concatenate([x[:1] * 0.0 + p[0][:1], x[1:]]) + x,
)

# --------------------------------------------------------------------------- elementwise

for _name in ("tanh", "sigmoid", "softplus", "silu", "elu", "relu"):
    _piece(
        _name,
        [],
        lambda p, x, name=_name: getattr(jax.nn, name)(x),
        lambda p, x, name=_name: x.elementwise(name),
    )
_piece(
    "gelu",
    [],
    lambda p, x: jax.nn.gelu(x, approximate=False),
    lambda p, x: x.elementwise("gelu"),
)
_piece("square", [], lambda p, x: x**2 + x, lambda p, x: x * x + x)
_piece(
    "gate by itself",
    [],
    lambda p, x: x * jax.nn.sigmoid(x),
    lambda p, x: x * _sigmoid(x),
)
_piece("sum of two", [], lambda p, x: jnp.tanh(x) + x, lambda p, x: _tanh(x) + x)
_piece(
    "learned slope",
    lambda n: [(n,)],
    lambda p, x: jnp.where(x > 0, x, p[0] * x),
    lambda p, x: _choose(x.value.real > 0, x, x * p[0]),
)
_piece(
    "steps",
    [],
    lambda p, x: x + jnp.floor(3 * x),
    lambda p, x: x + np.floor(3 * x.value.real),
)
_piece(
    "stop gradient",
    [],
    lambda p, x: x * jax.lax.stop_gradient(jax.nn.sigmoid(x)),
    lambda p, x: x * ref.ACTIVATIONS["sigmoid"].function(x.value.real),
)


@jax.custom_jvp
def _rounded(x: Any) -> Any:
    return jnp.round(2 * x) + x


@_rounded.defjvp
def _rounded_jvp(primals: Any, tangents: Any) -> Any:
    return _rounded(*primals), 3 * tangents[0]


_piece(
    "straight through",  # the rule is the truth, whatever the function
    [],
    lambda p, x: _rounded(x),
    lambda p, x: _dual(
        # The parameters' derivative follows the rule as well, so the imaginary part is tripled.
        np.round(2 * x.value.real) + x.value.real + 3j * x.value.imag,
        3 * x.tangent,
    ),
)

# --------------------------------------------------------------------------- neither

_piece(
    "gate by a layer",
    _square,
    lambda p, x: x * jax.nn.sigmoid(x @ p[0]),
    lambda p, x: x * _sigmoid(x @ p[0]),
)
_piece("product reversed", [], lambda p, x: x * x[::-1], lambda p, x: x * x[::-1])
_piece(
    "maximum rolled",
    [],
    lambda p, x: jnp.maximum(x, jnp.roll(x, 1)),
    lambda p, x: _choose(
        x.value.real > np.roll(x.value.real, 1), x, x.map(lambda a: np.roll(a, 1))
    ),
)
_piece(
    "chosen by a neighbour",
    [],
    lambda p, x: jnp.where(x[::-1] > 0, x, 2 * x),
    lambda p, x: _choose(x.value.real[::-1] > 0, x, 2.0 * x),
)
_piece(
    "times its sum", [], lambda p, x: x * jnp.sum(x), lambda p, x: x * x.sum(axis=0, keepdims=True)
)
_piece(
    "add the largest",
    [],
    lambda p, x: x + x[jnp.argmax(x)],
    lambda p, x: x + _take(x, [int(np.argmax(x.value.real))]),
)
_piece(
    "slice at the largest",
    [],
    lambda p, x: jax.lax.dynamic_slice(
        jnp.concatenate([x, x]), (jnp.argmax(x).astype(jnp.int32),), (x.size,)
    ),
    lambda p, x: _take(x, (np.arange(x.shape[0]) + int(np.argmax(x.value.real))) % x.shape[0]),
)
_piece("sort", [], lambda p, x: jnp.sort(x), lambda p, x: _take(x, np.argsort(x.value.real)))
_piece(
    "softmax",
    [],
    lambda p, x: jax.nn.softmax(x),
    lambda p, x: ref.exp(x) / ref.exp(x).sum(axis=0, keepdims=True),
)


def _layer_norm(p: Arrays, x: Any) -> Any:
    centred = x - jnp.mean(x)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2) + 0.1) * p[0] + p[1]


def _layer_norm_twin(p: Arrays, x: Dual) -> Dual:
    centred = x - x.sum(axis=0, keepdims=True) / x.shape[0]
    variance = (centred * centred).sum(axis=0, keepdims=True) / x.shape[0]
    return centred * (variance + 0.1) ** -0.5 * p[0] + p[1]


_piece("layer norm", lambda n: [(n,), (n,)], _layer_norm, _layer_norm_twin)
_piece(
    "residual",
    _square,
    lambda p, x: x + jnp.tanh(x @ p[0]),
    lambda p, x: x + _tanh(x @ p[0]),
)
_piece(
    "two branches",
    lambda n: [(n, n), (n, n)],
    lambda p, x: jnp.tanh(x @ p[0]) + jax.nn.softplus(x @ p[1]),
    lambda p, x: _tanh(x @ p[0]) + (x @ p[1]).elementwise("softplus"),
)
_piece(
    "gated linear unit",
    lambda n: [(n, n), (n, n)],
    lambda p, x: (x @ p[0]) * jax.nn.sigmoid(x @ p[1]),
    lambda p, x: (x @ p[0]) * _sigmoid(x @ p[1]),
)
_piece(
    "maxout",
    lambda n: [(n, n), (n, n)],
    lambda p, x: jnp.maximum(x @ p[0], x @ p[1]),
    lambda p, x: _choose((x @ p[0]).value.real > (x @ p[1]).value.real, x @ p[0], x @ p[1]),
)
_piece(
    "dense connection",
    lambda n: [(n, n), (2 * n, n)],
    lambda p, x: jnp.concatenate([x, jnp.tanh(x @ p[0])]) @ p[1],
    lambda p, x: ref.concatenate([x, _tanh(x @ p[0])]) @ p[1],
)
_piece(
    "unit length",
    [],
    lambda p, x: x / jnp.sqrt(jnp.sum(x**2) + 0.1),
    lambda p, x: x * ((x * x).sum(axis=0, keepdims=True) + 0.1) ** -0.5,
)
_piece(
    "root mean square",
    lambda n: [(n,)],
    lambda p, x: x * jax.lax.rsqrt(jnp.mean(x**2) + 0.1) * p[0],
    lambda p, x: x * ((x * x).sum(axis=0, keepdims=True) / x.shape[0] + 0.1) ** -0.5 * p[0],
)


def _in_groups(p: Arrays, x: Any) -> Any:
    z = jnp.concatenate([x, x @ p[0]]).reshape(2, -1)
    centred = z - z.mean(1, keepdims=True)
    normed = centred * jax.lax.rsqrt((centred**2).mean(1, keepdims=True) + 0.1)
    return normed.reshape(-1) @ p[1]


def _in_groups_twin(p: Arrays, x: Dual) -> Dual:
    groups = []
    for z in (x, x @ p[0]):
        centred = z - z.sum(axis=0, keepdims=True) / z.shape[0]
        variance = (centred * centred).sum(axis=0, keepdims=True) / z.shape[0]
        groups.append(centred * (variance + 0.1) ** -0.5)
    return ref.concatenate(groups) @ p[1]


_piece("group norm", lambda n: [(n, n), (2 * n, n)], _in_groups, _in_groups_twin)
_piece(
    "squeeze gate",
    lambda n: [(n, 2), (2, n)],
    lambda p, x: x * jax.nn.sigmoid(jax.nn.softplus(x @ p[0]) @ p[1]),
    lambda p, x: x * _sigmoid((x @ p[0]).elementwise("softplus") @ p[1]),
)
_piece(
    "gate by one number",
    lambda n: [(n,)],
    lambda p, x: x * jnp.tanh(x @ p[0]) + jnp.tanh(x),
    lambda p, x: x * _tanh((x * p[0]).sum(axis=0, keepdims=True)) + _tanh(x),
)
_piece(
    "normed residual",
    lambda n: [(n,), (n,), (n, n)],
    lambda p, x: x + jnp.tanh(_layer_norm(p, x) @ p[2]),
    lambda p, x: x + _tanh(_layer_norm_twin(p, x) @ p[2]),
)
_piece(
    "halves",
    [],
    lambda p, x: jnp.concatenate([x[:2], jnp.tanh(x[2:])]),
    lambda p, x: ref.concatenate([x[:2], _tanh(x[2:])]),
)
_piece(
    "tied",
    _square,
    lambda p, x: jnp.tanh(x @ p[0]) @ p[0].T,
    lambda p, x: _tanh(x @ p[0]) @ p[0].T,
)
_piece(
    "sum over a grid",
    [(3,)],
    lambda p, x: jnp.tanh(x[:, None] + p[0][None, :]).sum(axis=1),
    lambda p, x: (x.reshape(-1, 1) * np.ones((1, 3)) + p[0]).elementwise("tanh").sum(axis=1),
)
_piece(
    "outer product",
    lambda n: [(n,)],
    lambda p, x: jnp.outer(x, jnp.tanh(x)) @ p[0],
    lambda p, x: x * (_tanh(x) * p[0]).sum(axis=0, keepdims=True),
)

# --------------------------------------------------------------------------- wrapped


@jax.custom_vjp
def _ruled(w: Any, x: Any) -> Any:
    return jnp.tanh(x @ w)


def _ruled_forward(w: Any, x: Any) -> Any:
    y = jnp.tanh(x @ w)
    return y, (w, x, y)


def _ruled_backward(saved: Any, bar: Any) -> Any:
    w, x, y = saved
    pre_bar = bar * (1 - y**2)
    return jnp.outer(x, pre_bar), w @ pre_bar


_ruled.defvjp(_ruled_forward, _ruled_backward)

WITHOUT_FORWARD = {"custom vjp"}  # JAX itself refuses forward mode through these

_piece("custom vjp", _square, lambda p, x: _ruled(p[0], x), lambda p, x: _tanh(x @ p[0]))
_piece(
    "jit",
    _square,
    lambda p, x: jax.jit(lambda z: jnp.tanh(z @ p[0]))(x),
    lambda p, x: _tanh(x @ p[0]),
)
_piece(
    "checkpoint",
    _square,
    lambda p, x: jax.checkpoint(lambda w, z: jnp.tanh(z @ w))(p[0], x),
    lambda p, x: _tanh(x @ p[0]),
)
_piece(
    "scan",
    lambda n: [(2, n, n)],
    lambda p, x: jax.lax.scan(lambda z, w: (jnp.tanh(z @ w), None), x, p[0])[0],
    lambda p, x: _tanh(_tanh(x @ p[0][0]) @ p[0][1]),
)


def _convolved(p: Arrays, x: Any) -> Any:
    def convolve(x: Any, kernel: Any) -> Any:
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)

    return convolve(jnp.tanh(convolve(x.reshape(1, -1, 1, 1), p[0])), p[1]).reshape(-1)


_piece(
    "two convolutions",
    [(3, 1, 1, 2), (3, 1, 2, 1)],
    _convolved,
    lambda p, x: ref.convolve(_tanh(ref.convolve(x.reshape(-1, 1, 1), p[0], 1)), p[1], 1).reshape(
        -1
    ),
)


def _recurrent(p: Arrays, x: Any) -> Any:
    def step(h: Any, t: Any) -> Any:
        h = jnp.tanh(h * p[0] + t) + 0.5 * h
        return h, h

    return jax.lax.scan(step, jnp.zeros((), x.dtype), x)[1]


def _recurrent_twin(p: Arrays, x: Dual) -> Dual:
    h, states = 0.0 * x[:1], []
    for t in range(x.shape[0]):
        h = _tanh(h * p[0] + x[t : t + 1]) + 0.5 * h
        states.append(h)
    return ref.concatenate(states)


_piece("recurrence", [()], _recurrent, _recurrent_twin)
_piece(
    "loop",
    [],
    lambda p, x: jax.lax.fori_loop(0, 2, lambda i, z: jnp.tanh(z) + z[::-1], x),
    lambda p, x: (lambda z: _tanh(z) + z[::-1])(_tanh(x) + x[::-1]),
)
_piece(
    "vmap",
    [(2,)],
    lambda p, x: jax.vmap(lambda z: jnp.tanh(z * p[0]).sum())(x),
    lambda p, x: _tanh(x * p[0][0]) + _tanh(x * p[0][1]),
)
_piece(
    "condition",
    [],
    lambda p, x: jax.lax.cond(jnp.sum(x) > 0, jnp.tanh, lambda z: 2 * z, x),
    lambda p, x: _tanh(x) if x.value.real.sum() > 0 else 2.0 * x,
)


# --------------------------------------------------------------------------- sentences


class Sentence(NamedTuple):
    """An encoder made of pieces in a row."""

    names: tuple[str, ...]
    arrays: list[np.ndarray]
    counts: list[int]

    def encode(self, arrays: Arrays, x: Any) -> Any:
        """Apply the pieces in JAX."""
        return self._run(arrays, x, lambda piece: piece.function)

    def numpy(self, arrays: Arrays, x: Any) -> Any:
        """Apply the twins to a Dual."""
        return self._run(arrays, x, lambda piece: piece.twin)

    def _run(self, arrays: Arrays, x: Any, pick: Callable[[Piece], Any]) -> Any:
        start = 0
        for name, count in zip(self.names, self.counts, strict=True):
            x = pick(PIECES[name])(arrays[start : start + count], x)
            start += count
        return x


def sentence(names: tuple[str, ...], features: int, seed: int) -> Sentence:
    """Draw the arrays of an encoder of the given pieces, with outputs of order one."""
    rng = np.random.default_rng(seed)
    arrays, counts, width = [], [], features
    for name in names:
        shapes = PIECES[name].shapes(width)
        arrays += [rng.normal(size=shape) / np.sqrt(max(shape[:-1], default=1)) for shape in shapes]
        counts.append(len(shapes))
        width += {"widen": 1, "narrow": -1}.get(name, 0)
    return Sentence(names, arrays, counts)
