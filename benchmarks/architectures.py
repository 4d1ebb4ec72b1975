"""What does `auto` do with an architecture? Exact, with little noise, or one probe, each priced."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxcae
from benchmarks import methods
from benchmarks.harness import Outcome, Row, Settings, compare
from jaxcae.jacobian.cost import estimate

TITLE = "Training steps by architecture: exact, with little noise, and one random projection"
BATCH = 128
QUICK = ("gated", "conv")
METHODS = {
    "auto": "exact",
    "control_variate": "low noise",
    "hutchinson": "one projection",
}
"""The methods, and what the table calls them."""

_IMAGE = (28, 28)
_WIDTH, _CODE = 256, 64


class Architecture(NamedTuple):
    """An encoder to be priced.

    Attributes:
        name: What the table calls it.
        told: Its sizes.
        make: Makes the model.
        shape: The shape of a sample.
        low_noise: Whether the control variate can read it.
        loops: Whether it holds a loop, whose body XLA counts once: operations are counted in the
            traced program then.
    """

    name: str
    told: str
    make: Callable[[], jaxcae.Autoencoder]
    shape: tuple[int, ...]
    low_noise: bool = True
    loops: bool = False


def run(settings: Settings) -> Outcome:
    """Time the methods beside the plain step: all architectures, or those that compile soon."""
    rows: list[Row] = []
    for architecture in ARCHITECTURES:
        if settings.full or architecture.name in QUICK:
            rows += _group(architecture, BATCH, settings)
    return Outcome(rows, [_note(rows, group) for group in dict.fromkeys(r.group for r in rows)])


def _group(architecture: Architecture, batch: int, settings: Settings) -> list[Row]:
    model = architecture.make()
    params = model.init(jax.random.key(0))
    xs = jax.random.uniform(jax.random.key(1), (batch, *architecture.shape))
    names = [name for name in METHODS if architecture.low_noise or name != "control_variate"]
    settings.say(f"{architecture.name}: compiling {1 + len(names)} subjects")
    subjects = [methods.step_subject(model, params, xs, name) for name in ("plain", *names)]
    if architecture.loops:
        subjects = [replace(s, flops=_traced_flops(model, s.name, params, xs)) for s in subjects]
    reference = methods.answer(methods.step(model, "reverse", chunk_size=8), params, xs)
    group = f"{architecture.name}: {architecture.told}, batch {batch}"
    return compare(group, subjects, settings, reference)


def _traced_flops(model: jaxcae.Autoencoder, method: str, params: Any, xs: Any) -> float:
    return estimate(methods.step(model, method), params, xs, jax.random.key(0)).flops


def _note(rows: Sequence[Row], group: str) -> str:
    found = {row.name: row for row in rows if row.group == group}
    plain = found["plain"].flops
    told = [
        f"{title} {row.times_unit[0]:.2f} plain steps ({row.flops / plain:.2f} in operations)"
        for name, title in METHODS.items()
        if (row := found.get(name)) and row.times_unit and row.flops and plain
    ]
    return f"{group}: {'; '.join(told)}."


def table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Lay out one line for each architecture; operations and time over the plain step's.

    The first line is the head.
    """
    lines = [["encoder", "sizes"]]
    for title in METHODS.values():
        lines[0] += [f"{title}, operations", "time"]
    for group in dict.fromkeys(row["group"] for row in rows):
        found = {row["name"]: row for row in rows if row["group"] == group}
        name, sizes = group.split(": ")
        line = [name, sizes.rsplit(", batch", 1)[0]]
        for method in METHODS:
            row = found.get(method)
            if row is None:
                line += ["–", "–"]
            else:
                work = row["flops"] / found["plain"]["flops"]
                line += [f"{work:.2f}", f"{row['times_unit'][0]:.2f}"]
        lines.append(line)
    return lines


# --------------------------------------------------------------------------- the encoders


def _model(
    encode: Callable[[Any, Any], Any], shapes: Mapping[str, tuple[int, ...]], shape: tuple[int, ...]
) -> jaxcae.Autoencoder:
    """Make an autoencoder of an encoder and a decoder of two dense layers."""
    code = jax.eval_shape(
        encode,
        {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()},
        jax.ShapeDtypeStruct(shape, jnp.float32),
    ).shape[0]
    size = int(np.prod(shape))
    decoder = {"hidden": (code, _WIDTH), "out": (_WIDTH, size)}

    def init(key: Any) -> Any:
        keys = iter(jax.random.split(key, len(shapes) + 2))
        return {
            part: {
                name: jax.random.normal(next(keys), s) / np.sqrt(s[0]) for name, s in own.items()
            }
            for part, own in (("encoder", shapes), ("decoder", decoder))
        }

    def decode(params: Any, code: Any) -> Any:
        hidden = jax.nn.softplus(code @ params["decoder"]["hidden"])
        return (hidden @ params["decoder"]["out"]).reshape(shape)

    return jaxcae.Autoencoder(init, lambda params, x: encode(params["encoder"], x), decode)


def _residual() -> jaxcae.Autoencoder:
    shapes = {"in": (784, _WIDTH), "out": (_WIDTH, _CODE)}
    for i in range(2):
        shapes |= {f"up_{i}": (_WIDTH, _WIDTH), f"down_{i}": (_WIDTH, _WIDTH)}

    def encode(p: Any, x: Any) -> Any:
        h = x @ p["in"]
        for i in range(2):
            h = h + jax.nn.softplus(h @ p[f"up_{i}"]) @ p[f"down_{i}"]
        return h @ p["out"]

    return _model(encode, shapes, (784,))


def _gated() -> jaxcae.Autoencoder:
    widths = (784, _WIDTH, _WIDTH)
    shapes: dict[str, tuple[int, ...]] = {"out": (_WIDTH, _CODE)}
    for i in range(2):
        shapes |= {f"value_{i}": widths[i : i + 2], f"gate_{i}": widths[i : i + 2]}

    def encode(p: Any, x: Any) -> Any:
        for i in range(2):
            x = (x @ p[f"value_{i}"]) * jax.nn.sigmoid(x @ p[f"gate_{i}"])
        return x @ p["out"]

    return _model(encode, shapes, (784,))


def _normalised() -> jaxcae.Autoencoder:
    shapes = {"in": (784, _WIDTH), "out": (_WIDTH, _CODE)}

    def encode(p: Any, x: Any) -> Any:
        return jax.nn.softplus(jax.nn.standardize(x @ p["in"])) @ p["out"]

    return _model(encode, shapes, (784,))


def _recurrent() -> jaxcae.Autoencoder:
    inputs, units, code = _IMAGE[1], 64, 16
    shapes = {"in": (inputs, 3 * units), "state": (units, 3 * units), "out": (units, code)}

    def encode(p: Any, x: Any) -> Any:
        def cell(h: Any, row: Any) -> Any:
            (a, b, c), (d, e, f) = jnp.split(row @ p["in"], 3), jnp.split(h @ p["state"], 3)
            r, u = jax.nn.sigmoid(a + d), jax.nn.sigmoid(b + e)
            return (1 - u) * jnp.tanh(c + r * f) + u * h, None

        return jax.lax.scan(cell, jnp.zeros(units), x)[0] @ p["out"]

    return _model(encode, shapes, _IMAGE)


def _attention() -> jaxcae.Autoencoder:
    width, code = 32, 16
    shapes = {
        "in": (_IMAGE[1], width),
        **dict.fromkeys(("query", "key", "value", "mix"), (width, width)),
        "up": (width, 4 * width),
        "down": (4 * width, width),
        "out": (width, code),
    }

    def encode(p: Any, x: Any) -> Any:
        h = x @ p["in"]
        weights = jax.nn.softmax((h @ p["query"]) @ (h @ p["key"]).T / np.sqrt(width))
        h = h + weights @ (h @ p["value"]) @ p["mix"]
        h = h + jax.nn.gelu(h @ p["up"]) @ p["down"]
        return jnp.mean(h, 0) @ p["out"]

    return _model(encode, shapes, _IMAGE)


ARCHITECTURES = (
    Architecture("mlp", "784-512-256-64", lambda: jaxcae.mlp((784, 512, 256, 64)), (784,)),
    Architecture("residual", "784-256, two blocks, 64", _residual, (784,)),
    Architecture("gated", "two gated layers of 256, 64", _gated, (784,)),
    Architecture("normalised", "784-256, LayerNorm, 64", _normalised, (784,)),
    Architecture(
        "conv",
        "28×28, features 16 and 32, code 64",
        lambda: jaxcae.conv((*_IMAGE, 1), (16, 32), _CODE),
        (*_IMAGE, 1),
    ),
    Architecture(
        "temporal conv",
        "64 steps of 8, features 16 and 32, code 16",
        lambda: jaxcae.temporal_conv((64, 8), (16, 32), 16),
        (64, 8),
    ),
    Architecture(
        "GRU", "28 steps of 28, 64 units, code 16", _recurrent, _IMAGE, low_noise=False, loops=True
    ),
    Architecture(
        "attention", "28 tokens of 32, one block, code 16", _attention, _IMAGE, low_noise=False
    ),
)
