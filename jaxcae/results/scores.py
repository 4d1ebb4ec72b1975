"""Anomaly scores: how badly a sample is rebuilt, and how strongly the code reacts to it."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxcae.devices.layout import DATA, FEATURES, Layout, batch_sharding, place
from jaxcae.errors import InputError, check_positive_int, unknown_name
from jaxcae.jacobian.methods import EXACT_METHODS, Auto, Method, resolve
from jaxcae.objective.forward import forward_pass
from jaxcae.objective.losses import ReconstructionLoss, Reduction, reconstruction_loss
from jaxcae.penalty import jacobian_norm
from jaxcae.types import Autoencoder, Params

CHUNK_SIZE = 256

T = TypeVar("T")


class Scores(NamedTuple):
    """One value per sample.

    Attributes:
        reconstruction: The reconstruction loss; as a rule high for samples unlike the training
            data.
        jacobian_norm: ‖J_h(x)‖_F, not squared; how far a small step in the input moves the code.
            What that says of a sample depends on the network: a penalty pulls it down on the
            training data and less elsewhere, so that high values can mark strange samples; without
            one it can be lower on them. Look at both on labelled samples before trusting it.
    """

    reconstruction: Float[np.ndarray | Array, " rows"]
    jacobian_norm: Float[np.ndarray | Array, " rows"]


def scores(
    model: Autoencoder,
    *,
    reconstruction: str | ReconstructionLoss = "squared_error",
    features: Reduction = "sum",
    method: str | Method = "auto",
    **method_options: Any,
) -> Callable[[Params, Any], Scores]:
    """Make `score(params, xs) -> Scores`, a pure function of one batch.

    Args:
        model: The autoencoder.
        reconstruction: The loss that it was trained with.
        features: Whether that loss is a `"sum"` or a `"mean"` over features.
        method: How to compute the norms; see `contractive_penalty`. Estimators are refused: their
            noise would look like an anomaly.
        **method_options: Passed on to `contractive_penalty`.
    """
    chosen = resolve(method, method_options)
    if not chosen.is_exact:
        raise unknown_name("exact method", chosen.name, EXACT_METHODS)
    if isinstance(chosen, Auto) and chosen.gradient is None:
        chosen = dataclasses.replace(chosen, gradient=False)  # nothing is learned from a score
    rec = reconstruction_loss(reconstruction, features)
    run = forward_pass(model, chosen)

    def score(params: Params, xs: Any) -> Scores:
        forward = run(params, xs)
        return Scores(jax.vmap(rec)(xs, forward.x_hats), jacobian_norm(forward.norms))

    return score


def score_in_chunks(
    score: Callable[[Any, Any], T],
    params: Any,
    blocks: Iterable[Any],
    chunk_size: int = CHUNK_SIZE,
    layout: Layout | None = None,
) -> Iterator[T]:
    """Score any number of samples in compiled calls of one shape, yielding NumPy arrays.

    The batch size changes how a matrix product is summed, hence the last bits of a score (by up to
    5e-7). Here every call sees exactly `chunk_size` rows, the last one padded with copies of its
    last row, so that a sample's score depends on the sample and the chunk size alone: not on how
    many others there are, which they are, or where among them it stands.

    Args:
        score: What `scores` made, or any function of parameters and a batch to arrays, in a tuple
            or another pytree, with one entry a sample.
        params: The parameters.
        blocks: Arrays of samples in rows, of any lengths.
        chunk_size: Rows per compiled call, on each device.
        layout: Which devices share the rows; see `jaxcae.layout`.

    Yields:
        What `score` gives, of at most `chunk_size` samples a device at a time, in order.
    """
    check_positive_int("chunk_size", chunk_size)
    compiled, together = jax.jit(score if layout is None else _on_each(score, layout)), chunk_size
    if layout is not None:
        params, together = place(layout, params), chunk_size * layout.mesh.shape[DATA]
    for chunk in _rechunk(blocks, together):
        count = len(chunk)
        padding = np.broadcast_to(chunk[-1:], (together - count, *chunk.shape[1:]))
        result = jax.device_get(compiled(params, np.concatenate([chunk, padding])))
        yield jax.tree.map(lambda values, count=count: np.asarray(values)[:count], result)


def _on_each(score: Callable[[Any, Any], T], layout: Layout) -> Callable[[Any, Any], T]:
    """Share the rows among devices; where no device has a part of the features, each on its own."""
    rows = batch_sharding(layout)
    if FEATURES not in layout.mesh.axis_names:
        return jax.shard_map(
            score, mesh=layout.mesh, in_specs=(P(), P(DATA)), out_specs=P(DATA), check_vma=False
        )
    return lambda params, xs: score(params, jax.lax.with_sharding_constraint(xs, rows))


def score_array(
    score: Callable[[Params, Any], Scores],
    params: Params,
    xs: Any,
    chunk_size: int = CHUNK_SIZE,
    layout: Layout | None = None,
) -> Scores:
    """Score an array of samples in rows; see `score_in_chunks`.

    Raises:
        InputError: If there are none.
    """
    parts = list(score_in_chunks(score, params, [np.asarray(xs)], chunk_size, layout))
    if not parts:
        raise InputError("no rows to score.")
    return Scores(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _rechunk(blocks: Iterable[Any], size: int) -> Iterator[np.ndarray]:
    """Cut blocks of any lengths into blocks of `size` rows; the last may be shorter."""
    kept: list[np.ndarray] = []
    held = 0
    for block in blocks:
        array = np.asarray(block)
        while len(array):
            part, array = array[: size - held], array[size - held :]
            kept.append(part)
            held += len(part)
            if held == size:
                yield np.concatenate(kept)
                kept, held = [], 0
    if kept:
        yield np.concatenate(kept)
