"""Greedy stacking: an autoencoder per layer, each trained on the codes of the one before.

The parameters that come out are those of the deep model, ready for `fit` to fine-tune.

References:
    Rifai et al., "Contractive Auto-Encoders", ICML 2011, section 6 (stacks of CAEs). Bengio et al.,
    "Greedy layer-wise training of deep networks", NeurIPS 2006.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from jaxcae.training.loop import Record, Segment, fit
from jaxcae.training.samples import as_samples
from jaxcae.training.state import Optimizer, TrainState
from jaxcae.types import Autoencoder, Loss, Params

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Stage:
    """One layer, trained.

    Attributes:
        model: The autoencoder of this layer alone.
        params: Its parameters; of the best epoch where `patience` watched for one.
        history: One record per epoch, as `fit` returns it.
    """

    model: Autoencoder
    params: Params
    history: list[Record]


def train_stages(
    layers: Sequence[Autoencoder],
    make_loss: Callable[[Autoencoder], Loss],
    optimizer: Optimizer,
    key: PRNGKeyArray,
    xs: Any,
    *,
    held_out: Any = None,
    callback: Callable[[int, Segment], bool | None] | None = None,
    **options: Any,
) -> list[Stage]:
    """Train each layer on the codes of the one before, the first on the samples.

    Args:
        layers: An autoencoder per layer, such as `mlp_layers(sizes)`.
        make_loss: The loss of a layer; `lambda model: cae_loss(model, 0.1)` is the paper's stack.
        optimizer: Any optax gradient transformation; each layer starts with a fresh state.
        key: Layer i draws from `fold_in(key, i)`.
        xs: Samples in rows. Codes are kept in memory, a layer's at a time.
        held_out: Samples to evaluate on; each layer sees their codes.
        callback: Called as `fit` calls it, with the layer's number from 0 in front. To return True
            ends the layer and leaves out those after it.
        **options: Passed on to `fit`: `epochs`, `batch_size`, `patience` and so on.

    Returns:
        What was trained, layer by layer.

    Raises:
        DivergedError: If a loss is not finite.
        ValueError: If an argument is not usable.
    """
    if not layers:
        raise ValueError("stacking needs at least one layer, got none.")
    xs = as_samples("xs", xs)
    held_out = None if held_out is None else as_samples("held_out", held_out)
    stages: list[Stage] = []
    stopped = False

    def watch(index: int, segment: Segment) -> bool:
        nonlocal stopped
        stopped = bool(callback and callback(index, segment))
        return stopped

    for index, model in enumerate(layers):
        init_key, train_key = jax.random.split(jax.random.fold_in(key, index))
        start = TrainState.create(model.init(init_key), optimizer, train_key)
        state, history = fit(
            make_loss(model),
            optimizer,
            start,
            xs,
            held_out=held_out,
            callback=partial(watch, index),
            **options,
        )
        params = state.params if state.best is None else state.best
        stages.append(Stage(model, params, history))
        if stopped or index == len(layers) - 1:
            break
        encode = _encoder(model)
        xs = encode(params, xs)
        held_out = None if held_out is None else encode(params, held_out)
    return stages


def stacked(layers: Sequence[Autoencoder]) -> Autoencoder:
    """Make the deep autoencoder of layers of any kind; its parameters are a tuple of theirs.

    encode = encode_L ∘ … ∘ encode_1 and decode = decode_1 ∘ … ∘ decode_L.
    """
    models = tuple(layers)

    def init(key: PRNGKeyArray) -> Params:
        keys = jax.random.split(key, len(models))
        return tuple(model.init(own) for model, own in zip(models, keys, strict=True))

    def encode(params: Params, x: Any) -> Any:
        for model, own in zip(models, params, strict=True):
            x = model.encode(own, x)
        return x

    def decode(params: Params, z: Any) -> Any:
        for model, own in zip(models[::-1], params[::-1], strict=True):
            z = model.decode(own, z)
        return z

    return Autoencoder(init, encode, decode)


def _encoder(model: Autoencoder) -> Callable[[Params, Any], Any]:
    """Encode all samples, some at a time; the program goes with the layer."""

    def encode(params: Params, xs: Any) -> Any:
        return jax.lax.map(partial(model.encode, params), xs, batch_size=_ROWS_AT_ONCE)

    return jax.jit(encode)
