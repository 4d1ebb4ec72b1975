"""Does an encoder of another library, unmodified, cost what the built-in one costs?"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

import jaxcae
from benchmarks import methods
from benchmarks.harness import Outcome, Row, Settings, Subject, compare
from benchmarks.steps import SHALLOW, title_of

TITLE = "Encoders of other libraries, unmodified, in the same training step"
_D, _H, _K = SHALLOW


class NNXEncoder(nnx.Module):
    """Two layers, as a user of Flax NNX writes them."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        """Make the layers."""
        self.first = nnx.Linear(_D, _H, rngs=rngs)
        self.second = nnx.Linear(_H, _K, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """Encode."""
        return self.second(nnx.relu(self.first(x)))


class LinenEncoder(linen.Module):
    """Two layers, as a user of Flax Linen writes them."""

    @linen.compact
    def __call__(self, x: Any) -> Any:
        """Encode."""
        x = linen.relu(linen.Dense(_H)(x))
        return linen.Dense(_K)(x)


def run(settings: Settings) -> Outcome:
    """Time each library's encoder next to the built-in one."""
    rows: list[Row] = []
    for batch in (128, 1024):
        rows += _group(batch, settings)
    return Outcome(rows, _notes(rows))


def _group(batch: int, settings: Settings) -> list[Row]:
    built_in, params, xs = methods.network(SHALLOW, batch, "relu")
    reference = methods.answer(methods.step(built_in, "reverse", chunk_size=8), params, xs)
    subjects = [
        methods.step_subject(built_in, params, xs, "plain"),
        methods.step_subject(built_in, params, xs, "auto", "built-in"),
    ]
    for name, make in ENCODERS.items():
        encode, encoder, as_built_in = make(params["encoder"])
        subjects.append(_subject(name, encode, encoder, as_built_in, built_in, params, xs))
    return compare(title_of(SHALLOW, batch), subjects, settings, reference, unit="built-in")


def _subject(
    name: str,
    encode: Callable[[Any, Any], Any],
    encoder: Any,
    as_built_in: Callable[[Any], Any],
    built_in: jaxcae.Autoencoder,
    params: Any,
    xs: Any,
) -> Subject:
    """Make a training step whose encoder is foreign and whose decoder is not.

    The gradient is brought into the form of the built-in one after the clock has stopped.
    """
    model = jaxcae.Autoencoder(
        built_in.init,
        lambda params, x: encode(params["encoder"], x),
        built_in.decode,
    )
    mixed = {"encoder": encoder, "decoder": params["decoder"]}
    subject = methods.subject(name, methods.step(model, "auto"), mixed, xs)
    found = subject.answers

    def answers() -> Any:
        assert found is not None
        return [
            a._replace(gradient=a.gradient | {"encoder": as_built_in(a.gradient["encoder"])})
            for a in found()
        ]

    return replace(subject, answers=answers)


def _nnx(layers: Any) -> tuple[Any, Any, Any]:
    graph, state = nnx.split(NNXEncoder(nnx.Rngs(0)))
    pure = nnx.to_pure_dict(state)
    for name, layer in zip(("first", "second"), ("layer_0", "layer_1"), strict=True):
        pure[name] = dict(layers[layer])
    nnx.replace_by_pure_dict(state, pure)

    def as_built_in(gradient: Any) -> Any:
        pure = nnx.to_pure_dict(gradient)
        return {"layer_0": pure["first"], "layer_1": pure["second"]}

    return lambda state, x: nnx.merge(graph, state)(x), state, as_built_in


def _linen(layers: Any) -> tuple[Any, Any, Any]:
    module = LinenEncoder()
    variables = {"params": {"Dense_0": layers["layer_0"], "Dense_1": layers["layer_1"]}}

    def as_built_in(gradient: Any) -> Any:
        return {"layer_0": gradient["params"]["Dense_0"], "layer_1": gradient["params"]["Dense_1"]}

    return module.apply, variables, as_built_in


def _equinox(layers: Any) -> tuple[Any, Any, Any]:
    import equinox as eqx

    module: Any = eqx.nn.Sequential(
        [
            eqx.nn.Linear(_D, _H, key=jax.random.key(0)),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Linear(_H, _K, key=jax.random.key(1)),
        ]
    )
    for place, layer in ((0, "layer_0"), (2, "layer_1")):
        values = (layers[layer]["kernel"].T, layers[layer]["bias"])
        module = eqx.tree_at(partial(_weight_and_bias, place), module, values)
    arrays, rest = eqx.partition(module, eqx.is_array)

    def as_built_in(gradient: Any) -> Any:
        return {
            name: {"kernel": jnp.asarray(gradient[place].weight).T, "bias": gradient[place].bias}
            for place, name in ((0, "layer_0"), (2, "layer_1"))
        }

    return lambda arrays, x: eqx.combine(arrays, rest)(x), arrays, as_built_in


def _weight_and_bias(place: int, module: Any) -> tuple[Any, Any]:
    return module[place].weight, module[place].bias


ENCODERS = {"Flax NNX": _nnx, "Flax Linen": _linen, "Equinox": _equinox}


def _notes(rows: list[Row]) -> list[str]:
    notes = []
    for group in dict.fromkeys(row.group for row in rows):
        found = {row.name: row for row in rows if row.group == group}
        told = []
        for name in ENCODERS:
            row, built_in = found[name], found["built-in"]
            if row.flops and built_in.flops and row.times_unit:
                told.append(
                    f"{name} {row.flops / built_in.flops:.4f} times the operations and "
                    f"{row.times_unit[0]:.2f} times the time"
                )
        notes.append(f"{group}: {'; '.join(told)}.")
    return notes
