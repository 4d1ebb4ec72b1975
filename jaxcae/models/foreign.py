"""Modules of other libraries as an `Autoencoder`: how they are called, and what is refused.

Flax writes modules for batches and Equinox for one sample; here functions see one sample. A module
for batches is called with a batch of one, once it has been seen that the samples of a batch do not
touch one another in it. How a module reads a sample is found when its shape is first seen, and
remembered.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from jaxcae.types import Autoencoder, Params

_NOTICEABLE = 1e-2
"""What another sample must change, of the largest entry, to have been mixed in and not rounded."""


class Calls(NamedTuple):
    """A module as pure functions of its parameters, over arrays in the shape that it takes.

    Attributes:
        name: What to call the module in messages.
        batched: Whether the arrays are batches.
        init: `init(key) -> params`.
        encode: `encode(params, x, key) -> z`, without random numbers where key is None.
        decode: `decode(params, z, key) -> x_hat`.
        module: `module(params)`, the other library's module with these parameters.
        frozen: Arrays of the module that are not trained, such as statistics of normalisation.
    """

    name: str
    batched: bool
    init: Callable[[PRNGKeyArray], Params]
    encode: Callable[[Params, Any, PRNGKeyArray | None], Any]
    decode: Callable[[Params, Any, PRNGKeyArray | None], Any]
    module: Callable[[Params], Any]
    frozen: Params


Readings = Sequence[Callable[[], Calls]]
"""The ways in which a module may be meant to be called, the likeliest first."""


class ModuleAutoencoder(Autoencoder):
    """An `Autoencoder` of another library's module, made by `from_flax` or `from_equinox`."""

    _reader: "_Reader"

    @classmethod
    def of(cls, readings: Readings, sample: Any) -> "ModuleAutoencoder":
        """Make the autoencoder; with a `sample`, check now what is else checked at first use.

        Args:
            readings: The ways to call the module.
            sample: One sample, its shape, or None.

        Raises:
            ValueError: If the module cannot encode and decode one sample by itself.
        """
        return cls._reading(_Reader(readings, layout_of(sample)), None)

    @classmethod
    def _reading(cls, reader: "_Reader", key: PRNGKeyArray | None) -> "ModuleAutoencoder":
        def encode(params: Params, x: Any) -> Any:
            calls = reader.of_sample(x)
            return _one(calls.encode, calls.batched, params, x, key)

        def decode(params: Params, z: Any) -> Any:
            calls = reader.of_code(z)
            return _one(calls.decode, calls.batched, params, z, key)

        model = cls(reader.calls.init, encode, decode)
        model._reader = reader
        return model

    @property
    def frozen(self) -> Params:
        """Arrays of the module that are not trained, such as statistics of normalisation.

        They are constants of `encode` and `decode`, so that no gradient, optimizer or weight
        penalty sees them.
        """
        return self._reader.calls.frozen

    def module(self, params: Params) -> Any:
        """Return the module with `params` in it: a new NNX or Equinox one, a bound Linen one.

        Two modules come as the pair (encoder, decoder). The module at hand is left as it is.
        """
        return self._reader.calls.module(params)

    def stochastic(self, key: PRNGKeyArray) -> "ModuleAutoencoder":
        """Switch dropout on, its masks drawn from `key`: the same for every sample of a batch.

        Codes and ‖J‖² are then those of the thinned network, exactly. Call it inside the loss, with
        the key of the step: `cae_loss(model.stochastic(key), 0.1)(params, xs)`.
        """
        return self._reading(self._reader, key)


def _one(call: Any, batched: bool, params: Params, x: Any, key: PRNGKeyArray | None) -> Any:
    return jnp.squeeze(call(params, x[None], key), 0) if batched else call(params, x, key)


class _Reader:
    """Finds out how a module is to be called, and remembers it by the shape of a sample."""

    def __init__(self, readings: Readings, sample: jax.ShapeDtypeStruct | None):
        self._readings = readings
        self._samples: dict[Any, Calls] = {}
        self._codes: dict[Any, Calls] = {}
        self.calls = self.of_sample(sample) if sample is not None else readings[0]()

    def of_sample(self, x: Any) -> Calls:
        """Return how to call the module with samples of this shape."""
        layout = _layout(x)
        if (at := (layout.shape, layout.dtype)) not in self._samples:
            calls, code = self._read(layout)
            self._samples[at] = self._codes[code] = calls
        return self._samples[at]

    def of_code(self, z: Any) -> Calls:
        """Return the same for codes; for a shape that no sample led to, by the decoder alone."""
        layout = _layout(z)
        if layout.shape not in self._codes:
            self._codes[layout.shape] = self._read_code(layout)
        return self._codes[layout.shape]

    def _read(self, x: jax.ShapeDtypeStruct) -> tuple[Calls, tuple[int, ...]]:
        """Return how one sample goes in, and the shape of its code."""
        name, problems = "", []
        for reading in self._readings:
            try:
                calls = reading()
                name = calls.name
                code = _round_trip(calls, x)
            except Refused:
                raise
            except Exception as error:  # of as many kinds as there are modules
                problems.append(_first_line(error))
                continue
            if calls.batched:
                _refuse_mixing(calls, x)
            return calls, code
        raise ValueError(
            f"{name or 'the module'} cannot encode and decode one sample of shape {x.shape}: "
            f"{'; or else '.join(dict.fromkeys(problems))}."
        )

    def _read_code(self, z: jax.ShapeDtypeStruct) -> Calls:
        for reading in self._readings[:-1]:
            calls = reading()
            zs, params = _many(z) if calls.batched else z, _params_of(calls)
            try:
                x_hats = _outcome(calls, "decode", params, zs)
            except Refused:
                raise
            except Exception:  # what is wrong with the last reading will show in the call
                continue
            if not calls.batched or x_hats.shape[:1] == zs.shape[:1]:
                return calls
        return self._readings[-1]()


def _params_of(calls: Calls) -> Params:
    """Return the parameters as shapes."""
    return jax.eval_shape(lambda: calls.init(jax.random.key(0)))


def _round_trip(calls: Calls, x: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """See by shapes that what was encoded is decoded, and return the shape of one code."""
    xs, params = _many(x) if calls.batched else x, _params_of(calls)
    code = _outcome(calls, "encode", params, xs)
    rows = xs.shape[:1] if calls.batched else ()
    if code.shape[: len(rows)] != rows:
        raise ValueError(f"encode gives {code.shape} for {xs.shape}")
    x_hat = _outcome(calls, "decode", params, code)
    if x_hat.shape != xs.shape:
        raise ValueError(f"decode gives {x_hat.shape} for the code of {xs.shape}")
    return tuple(code.shape[len(rows) :])


def _many(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Make a batch of more samples than an axis of one has entries, to tell it from an axis."""
    return jax.ShapeDtypeStruct((max((*x.shape, 1)) + 1, *x.shape), x.dtype)


def _outcome(calls: Calls, verb: str, params: Params, x: Any) -> Any:
    call = calls.encode if verb == "encode" else calls.decode
    out = jax.eval_shape(lambda params, x: call(params, x, None), params, x)
    if not isinstance(out, jax.ShapeDtypeStruct):
        raise Refused(
            f"{calls.name}: {verb} returned a {type(out).__name__} of {len(jax.tree.leaves(out))} "
            f"arrays, expected one array. Give a module whose {verb} returns that alone."
        )
    return out


def _refuse_mixing(calls: Calls, x: jax.ShapeDtypeStruct) -> None:
    """See that what becomes of one sample does not depend on another in its batch."""
    rng = np.random.default_rng(0)
    # Not the initial parameters: where a layer starts at zero, nothing would show.
    params = jax.tree.map(lambda leaf: _draw(rng, leaf), _params_of(calls))
    first, second, other = (_draw(rng, x)[None] for _ in range(3))

    @jax.jit
    def outputs(params: Params, xs: Any) -> tuple[Any, Any]:
        code = calls.encode(params, xs, None)
        return code[0], calls.decode(params, code, None)[0]

    with jax.ensure_compile_time_eval():  # the first use may be inside somebody's jit
        pairs = [outputs(params, np.concatenate([first, beside])) for beside in (second, other)]
    for verb, *values in zip(("encode", "decode"), *pairs, strict=True):
        one, another = (np.nan_to_num(np.asarray(value, np.float64)) for value in values)
        if np.abs(one - another).max(initial=0) > _NOTICEABLE * np.abs(one).max(initial=0):
            raise Refused(
                f"{calls.name}: {verb} mixes the samples of a batch, as normalisation over it "
                "does, so that one sample has no code of its own. Let it use running averages, or "
                "say batched=False if it is written for one sample."
            )


class Refused(ValueError):
    """What no other way of calling the module would mend."""


def copied(params: Params) -> Params:
    """Copy arrays, so that a step which donates its parameters leaves the module its own."""
    return jax.device_put(params, may_alias=False)


def is_trainable(leaf: Any) -> bool:
    """Tell whether an array can have a gradient."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def layout_of(sample: Any) -> jax.ShapeDtypeStruct | None:
    """Return the shape and dtype of a sample, or of what has the shape that was given."""
    if sample is None:
        return None
    if isinstance(sample, tuple) and all(isinstance(size, int) for size in sample):
        return jax.ShapeDtypeStruct(sample, jnp.float32)
    return _layout(sample if hasattr(sample, "dtype") else jnp.asarray(sample))


def _layout(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jnp.result_type(x.dtype))


def _draw(rng: np.random.Generator, leaf: Any) -> np.ndarray:
    fan_in = max(1, int(np.prod(leaf.shape[:-1])))
    return np.asarray(rng.normal(size=leaf.shape) / np.sqrt(fan_in)).astype(leaf.dtype)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".")
