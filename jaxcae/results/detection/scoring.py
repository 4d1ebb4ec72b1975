"""Scores of a series: what the windows say, brought to timestamps."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxcae.data.windows import Placement, PointMeans, sliding, to_timestamps, window_starts
from jaxcae.jacobian.methods import Auto
from jaxcae.objective.forward import forward_pass
from jaxcae.penalty import jacobian_norm
from jaxcae.results.detection.neighbours import Neighbours, distances, to_neighbour
from jaxcae.results.scores import CHUNK_SIZE, score_in_chunks
from jaxcae.types import Autoencoder, Params

Score = Literal[
    "reconstruction", "two_scale", "neighbour", "reconstruction+neighbour", "jacobian_norm"
]
SCORES = ("reconstruction", "two_scale", "neighbour", "reconstruction+neighbour", "jacobian_norm")
"""`reconstruction`: ‖x − x̂‖² of a window. `two_scale`: that and the error at the timestamp itself,
averaged over an eighth of a window, each over its mean on normal rows. `neighbour` (experimental):
see `jaxcae.results.detection.neighbours`; with `+` the sum of both, in squared input units.
`jacobian_norm`: ‖J‖_F, for contractive networks alone."""

Ranges = Int[np.ndarray, "_ 2"]


class Measured(NamedTuple):
    """What a network says of the windows of a series, and of its rows.

    Attributes:
        values: One a window, by the score.
        recent: The mean squared error over the last eighth of each window, channels summed.
        points: The mean squared error of each row over the windows that cover it, by channel.
        expected: The mean reconstruction of each row over those windows.
    """

    values: Float[np.ndarray, " windows"]
    recent: Float[np.ndarray, " windows"]
    points: Float[np.ndarray, "rows channels"]
    expected: Float[np.ndarray, "rows channels"]


@functools.lru_cache(maxsize=8)  # a few, so that copies of a detector share what they compile
def looking(model: Autoencoder, with_norms: bool) -> Callable[[Any, Any], dict[str, Any]]:
    """Make `((params, neighbours or None), xs) -> what a score needs`, by name."""
    run = forward_pass(model, Auto(gradient=False), with_norms=with_norms)
    relate = to_neighbour(model)

    def look(arguments: Any, xs: Any) -> dict[str, Any]:
        params, reference = arguments
        forward = run(params, xs)
        found = {"x_hats": forward.x_hats}
        if with_norms:
            found["norms"] = jacobian_norm(forward.norms)
        if reference is not None:
            samples, codes, mean = reference
            zs = forward.codes - mean[None]
            found["deltas"], found["grams"] = relate(params, samples, codes, zs)
        return found

    return look


class Scorer:
    """A trained network and a kind of score; one program of one shape serves any series.

    Attributes:
        kind: One of `SCORES`.
        size: Rows of a window.
        channels: Channels of a row.
    """

    def __init__(
        self,
        model: Autoencoder,
        params: Params,
        kind: Score,
        size: int,
        channels: int,
        neighbours: Neighbours | None = None,
    ) -> None:
        """Take a model of windows as rows, (lag, channel) flattened."""
        self.kind, self.size, self.channels = kind, size, channels
        self._params, self._neighbours = params, neighbours
        self._look = looking(model, kind == "jacobian_norm")

    @property
    def box(self) -> int:
        """Rows over which `two_scale` averages the error at a timestamp."""
        return box_of(self.size)

    def reconstruct(
        self, x: Float[np.ndarray, "rows channels"], starts: Any
    ) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
        """Yield starts, windows (windows, size, channels) and what was found, in parts."""
        shape = (self.size, self.channels)
        view = np.lib.stride_tricks.sliding_window_view(x, shape)[:, 0]
        parts = (starts[at : at + CHUNK_SIZE] for at in range(0, len(starts), CHUNK_SIZE))
        reference = None
        if self._neighbours is not None:
            reference = jax.device_put(self._neighbours[:3])
        arguments = jax.device_put(self._params), reference
        blocks = (view[part].reshape(len(part), -1) for part in parts)
        at = 0
        for found in score_in_chunks(self._look, arguments, blocks):
            part = starts[at : at + CHUNK_SIZE]
            found["x_hats"] = found["x_hats"].reshape(len(part), *shape)
            yield part, view[part], found
            at += CHUNK_SIZE

    def measure(self, x: Float[np.ndarray, "rows channels"], ranges: Ranges) -> Measured:
        """Look at all windows of a standardised series."""
        starts = window_starts(len(x), self.size, segments=ranges)
        points = PointMeans(self.size, len(x), (self.channels,))
        expected = PointMeans(self.size, len(x), (self.channels,))
        values, recent = [], []
        for part, windows, found in self.reconstruct(x, starts):
            squares = (windows.astype(np.float64) - found["x_hats"]) ** 2
            points.add(part, squares)
            expected.add(part, found["x_hats"])
            values.append(self._value(squares, found))
            recent.append(squares[:, -self.box :].sum(2).mean(1))
        return Measured(
            np.concatenate(values), np.concatenate(recent), points.values, expected.values
        )

    def _value(self, squares: np.ndarray, found: dict[str, Any]) -> Float[np.ndarray, " windows"]:
        if self.kind == "jacobian_norm":
            return found["norms"].astype(np.float64)
        error = squares.sum((1, 2))
        if self._neighbours is None:
            return error
        distance = distances(found["deltas"], found["grams"], self._neighbours.epsilon)
        return distance if self.kind == "neighbour" else error + distance

    def parts(
        self, measured: Measured, placement: Placement, length: int, ranges: Ranges
    ) -> list[Float[np.ndarray, " rows"]]:
        """Bring values to timestamps; the score is the sum of the parts over their scales."""
        found = [to_timestamps(measured.values, self.size, length, how=placement, segments=ranges)]
        if self.kind == "two_scale" and placement == "last":
            found.append(
                to_timestamps(measured.recent, self.size, length, how="last", segments=ranges)
            )
        elif self.kind == "two_scale":
            found.append(boxed(measured.points.sum(1), self.box, ranges))
        return found

    def scales(self, parts: list[Float[np.ndarray, " rows"]]) -> tuple[float, ...]:
        """Return what to divide the parts by, from those of normal rows."""
        if len(parts) == 1:
            return (1.0,)
        return tuple(float(np.nanmean(part)) or 1.0 for part in parts)


def box_of(size: int) -> int:
    """Return over how many rows the error at a timestamp is averaged, by the rows of a window."""
    return min(size, max(3, size // 8))


def combined(
    parts: list[Float[np.ndarray, " rows"]], scales: tuple[float, ...]
) -> Float[np.ndarray, " rows"]:
    """Add up parts, each over its scale."""
    total: Any = sum(part / scale for part, scale in zip(parts, scales, strict=True))
    return total


def boxed(
    values: Float[np.ndarray, " rows"], width: int, ranges: Ranges
) -> Float[np.ndarray, " rows"]:
    """Average over `width` rows about each row, of the same segment; NaN counts as not there."""
    out = np.full(len(values), np.nan)
    before = width // 2
    pad = (before, width - 1 - before)
    for start, stop in ranges:
        part = values[start:stop]
        known = ~np.isnan(part)
        total = sliding(np.pad(np.where(known, part, 0.0), pad), width, np.add)
        count = sliding(np.pad(known.astype(np.float64), pad), width, np.add)
        out[start:stop] = np.where(known, total / np.maximum(count, 1), np.nan)
    return out
