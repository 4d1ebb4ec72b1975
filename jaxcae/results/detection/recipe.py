"""The network of a detector: its widths by default, its training, and where calibration begins."""

import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Int

from jaxcae.data.standardization import DEVIATION_FLOOR, Standardization, shown_columns
from jaxcae.data.windows import window_starts
from jaxcae.errors import (
    InputError,
    check_nonnegative,
    check_positive,
    check_positive_int,
    unknown_name,
)
from jaxcae.models import mlp, temporal_conv
from jaxcae.models.rows import of_rows
from jaxcae.objective import Objective, cae_loss
from jaxcae.training import TrainState, fit
from jaxcae.types import Autoencoder, Params

MODELS = ("mlp", "temporal_conv")
LAMBDA_OF_WINDOWS, LAMBDA_OF_ROWS = 1.0, 0.03
_MOST_LATENT = 64
_LEAST_BATCHES = 8
_FEATURES, _ROWS_OF_CODE = 16, 8

Ranges = Int[np.ndarray, "_ 2"]


class Recipe(NamedTuple):
    """All that decides the network, and can be written down.

    Attributes:
        model: One of `MODELS`.
        size: Rows of a window, 1 for rows that stand alone.
        channels: Channels of a row.
        hidden: Width of the hidden layer; of a `temporal_conv` the features of each map.
        latent: Width of the code.
        contraction: λ; None for a plain autoencoder.
        learning_rate: Of Adam.
    """

    model: str
    size: int
    channels: int
    hidden: int
    latent: int
    contraction: float | None
    learning_rate: float

    @classmethod
    def of(
        cls,
        window: Any,
        channels: int,
        model: str,
        hidden: Any,
        latent: Any,
        contraction: Any,
        learning_rate: float,
    ) -> "Recipe":
        """Check what is asked for, and fill in what is not.

        Raises:
            ValueError: If something is not usable.
        """
        if window is not None:
            check_positive_int("window", window, "Use None for rows that stand alone.")
        if model not in MODELS:
            raise unknown_name("model", model, MODELS)
        size = 1 if window is None else int(window)
        for name, width in (("latent", latent), ("hidden", hidden)):
            if width is not None:
                check_positive_int(name, width)
        if latent is None:
            latent = max(1, min(_MOST_LATENT, size * channels // 2))
        if model == "temporal_conv":
            if window is None:
                raise InputError("model 'temporal_conv' is of a series: say the rows of `window`.")
            hidden = _FEATURES if hidden is None else hidden
        elif hidden is None:
            hidden = 2 * latent if window is not None else max(64, 2 * latent)
        if isinstance(contraction, str):
            if contraction != "auto":
                raise unknown_name("contraction", contraction, ("auto",))
            contraction = LAMBDA_OF_ROWS if window is None else LAMBDA_OF_WINDOWS
        if contraction is not None:
            check_nonnegative("contraction", contraction)
        check_positive("learning_rate", learning_rate)
        weight = None if contraction is None else float(contraction)
        return cls(model, size, channels, int(hidden), int(latent), weight, float(learning_rate))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Widths of the encoder, from a window as a row to the code."""
        return (self.size * self.channels, self.hidden, self.latent)

    @property
    def features(self) -> tuple[int, ...]:
        """Features of each map of a `temporal_conv`; the last map has about eight rows."""
        depth = max(1, round(math.log2(self.size / _ROWS_OF_CODE)))
        return (self.hidden,) * depth

    def make(self) -> tuple[Autoencoder, Objective, Any]:
        """Make model, loss and optimizer; those of equal recipes are the same objects."""
        return _made(self)


@functools.lru_cache(maxsize=8)  # a few, so that copies of a detector share what they compile
def _made(recipe: Recipe) -> tuple[Autoencoder, Objective, Any]:
    if recipe.model == "mlp":
        model = mlp(recipe.sizes)
    else:
        shape = (recipe.size, recipe.channels)
        model = of_rows(temporal_conv(shape, recipe.features, recipe.latent), shape)
    loss = cae_loss(model, recipe.contraction)
    return model, loss, optax.adam(recipe.learning_rate)


def train(
    recipe: Recipe,
    x: Any,
    ranges: Ranges,
    *,
    steps: int,
    batch_size: int,
    seed: int,
) -> tuple[Params, np.ndarray]:
    """Train on the windows of a standardised series.

    Args:
        recipe: What to train.
        x: Shape (rows, channels), float32.
        ranges: The segments to train on.
        steps: How many steps, about: whole epochs that come to so many or a few more.
        batch_size: Windows a step.
        seed: Of the first parameters, of the order, and of a choice of windows where there are more
            than all steps together would see.

    Returns:
        Parameters as NumPy arrays, and the windows as rows, (windows, size · channels).
    """
    check_positive_int("steps", steps)
    check_positive_int("batch_size", batch_size)
    starts = window_starts(len(x), recipe.size, segments=ranges)
    if len(starts) > steps * batch_size:
        chosen = np.random.default_rng(seed).choice(len(starts), steps * batch_size, replace=False)
        starts = starts[np.sort(chosen)]
    # Whole batches, some windows in an epoch twice or more where there are few: so detectors of
    # data of about one size share what was compiled, and short epochs do not wait for Python.
    different = len(starts)
    batches = max(math.ceil(len(starts) / batch_size), min(steps, _LEAST_BATCHES))
    starts = np.resize(starts, batches * batch_size)
    shape = (recipe.size, recipe.channels)
    view = np.lib.stride_tricks.sliding_window_view(x, shape)[:, 0]
    samples = np.ascontiguousarray(view[starts].reshape(len(starts), -1))
    model, loss, optimizer = recipe.make()
    key, order = jax.random.split(jax.random.key(seed))
    state = TrainState.create(model.init(key), optimizer, order)
    epochs = math.ceil(steps / batches)
    state, _ = fit(loss, optimizer, state, samples, epochs=epochs, batch_size=batch_size)
    return jax.device_get(state.params), samples[:different]


def scaling(
    x: Any, ranges: Ranges, names: tuple[str, ...] | None, in_time: bool
) -> Standardization:
    """Fit the mean and deviation of each column on the rows to train on.

    Raises:
        InputError: If a column of a series is constant, or one is too large to square.
    """
    rows = x[np.concatenate([np.arange(*pair) for pair in ranges])]
    if in_time:
        floor = DEVIATION_FLOOR[x.dtype.name] * np.abs(rows).max(0)
        constant = np.flatnonzero(np.ptp(rows, axis=0) <= floor)
        if len(constant):
            raise InputError(
                f"constant in the rows to train on: channel {shown_columns(constant, names)}. "
                "No change of it could be measured; leave it out."
            )
    with np.errstate(over="ignore", invalid="ignore"):
        fitted = Standardization.fit(rows, names)
    beyond = np.flatnonzero(~(np.isfinite(fitted.mean) & np.isfinite(fitted.deviation)))
    if len(beyond):
        raise InputError(
            f"values too large to square in column {shown_columns(beyond, names)}: scale them."
        )
    return fitted


def divide(ranges: Ranges, size: int, share: float) -> tuple[Ranges, Ranges]:
    """Divide a series into the part to train on and the part to calibrate on, the last `share`.

    Between them lies a gap of one window, so that no row of one part is close to the other.

    Raises:
        InputError: If either cannot hold a window.
    """
    rows = np.concatenate([np.arange(*pair) for pair in ranges])
    cut = int(rows[min(round((1 - share) * len(rows)), len(rows) - 1)])
    parts = clipped(ranges, 0, cut - size), clipped(ranges, cut, int(rows[-1]) + 1)
    longest = [int(np.max(part[:, 1] - part[:, 0], initial=0)) for part in parts]
    if min(longest) < size:
        raise InputError(
            f"the series is too short for windows of {size}: of {len(rows)} rows, the longest "
            f"stretches left have {longest[0]} for training and {longest[1]} for calibration. Use "
            "a longer series or a shorter window."
        )
    return parts


def clipped(ranges: Ranges, start: int, stop: int) -> Ranges:
    """Return what of the ranges lies in `start` to `stop`."""
    inside = np.clip(ranges, start, max(start, stop))
    return inside[inside[:, 1] > inside[:, 0]]
