"""What simpler detectors say of the same series, with the same bookkeeping from windows to rows.

A network that does not beat these is not worth its training. `random` shows what chance reaches.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxcae.data.windows import PointMeans, to_timestamps, window_starts
from jaxcae.results.detection.scoring import box_of, boxed, combined

COMPONENTS = 8
"""Of PCA; of samples of fewer than 16 features, half as many as those."""
_MOST = 5000
"""Training windows that a baseline looks at; of more, as many at even distances."""
_AT_ONCE = 2048

Ranges = Int[np.ndarray, "segments 2"]


def baselines(
    train: Float[np.ndarray, "windows features"],
    x: Float[np.ndarray, "rows channels"],
    ranges: Ranges,
    seed: int = 0,
) -> dict[str, Float[np.ndarray, " rows"]]:
    """Score a series by simpler means.

    Args:
        train: Windows of normal rows, standardised, as samples: what a network is trained on.
        x: The series, standardised by channel.
        ranges: The segments that windows stay in.
        seed: Of the isolation forest and of the random numbers.

    Returns:
        By name one score a row, high for an anomaly, NaN where no window covers it: the error of
        PCA with 8 components, of windows and with that about the row beside it (`two_scale`); the
        distance to the nearest training window; an isolation forest on windows; |xₜ − xₜ₋₁| over
        all channels; random numbers.
    """
    from sklearn.ensemble import IsolationForest
    from sklearn.neighbors import NearestNeighbors

    size = train.shape[1] // x.shape[1]
    places = np.linspace(0, len(train) - 1, min(len(train), _MOST)).astype(int)
    kept = np.asarray(train[places], np.float64)
    starts = window_starts(len(x), size, segments=ranges)
    nearest = NearestNeighbors(n_neighbors=1).fit(kept)
    forest = IsolationForest(random_state=seed).fit(kept)
    windows, rows, usual = _pca(kept, x, starts, ranges)
    found = {"PCA": windows, "PCA, two scales": combined([windows, rows], (usual, usual / size))}
    kinds: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "1-NN of windows": lambda block: nearest.kneighbors(block)[0][:, 0] ** 2,
        "isolation forest": lambda block: -forest.score_samples(block),
    }
    for name, score in kinds.items():
        values = np.concatenate([score(block) for block in _blocks(x, starts, size)])
        found[name] = to_timestamps(values, size, len(x), segments=ranges)
    uncovered = np.isnan(windows)
    for name, values in untrained(x, ranges, seed).items():
        found[name] = np.where(uncovered, np.nan, values)
    return found


def untrained(
    x: Float[np.ndarray, "rows channels"], ranges: Ranges, seed: int = 0
) -> dict[str, Float[np.ndarray, " rows"]]:
    """Score a series by what needs no training: |xₜ − xₜ₋₁| over all channels, and chance."""
    steps, chance = np.full(len(x), np.nan), np.random.default_rng(seed).random(len(x))
    for start, stop in ranges.tolist():
        steps[start + 1 : stop] = np.abs(np.diff(x[start:stop], axis=0)).sum(1)
        steps[start] = 0.0  # the first of a stretch has none before it
    return {"|difference|": steps, "random": np.where(np.isnan(steps), np.nan, chance)}


def _pca(
    train: np.ndarray, x: np.ndarray, starts: np.ndarray, ranges: Ranges
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the error of the windows about a row, that at the row, and a training window's."""
    size, channels = train.shape[1] // x.shape[1], x.shape[1]
    mean = train.mean(0)
    _, _, directions = np.linalg.svd(train - mean, full_matrices=False)
    basis = directions[: min(COMPONENTS, max(1, train.shape[1] // 2))]
    points, values, at = PointMeans(size, len(x), (channels,)), [], 0
    for block in _blocks(x, starts, size):
        centred = block - mean
        squares = (centred - centred @ basis.T @ basis) ** 2
        values.append(squares.sum(1))
        points.add(starts[at : at + len(block)], squares.reshape(-1, size, channels))
        at += len(block)
    windows = to_timestamps(np.concatenate(values), size, len(x), segments=ranges)
    centred = train - mean
    usual = float(((centred - centred @ basis.T @ basis) ** 2).sum(1).mean()) or 1.0
    return windows, boxed(points.values.sum(1), box_of(size), ranges), usual


def _blocks(x: np.ndarray, starts: np.ndarray, size: int) -> Any:
    view = np.lib.stride_tricks.sliding_window_view(x, (size, x.shape[1]))[:, 0]
    for at in range(0, len(starts), _AT_ONCE):
        yield view[starts[at : at + _AT_ONCE]].reshape(-1, size * x.shape[1])
