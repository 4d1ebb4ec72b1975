"""What the settings of a run must be, as far as that can be told without its data."""

import math

from jaxcae.activations import ACTIVATIONS
from jaxcae.errors import InputError, unknown_name
from jaxcae.objective.losses import RECONSTRUCTION_LOSSES
from jaxcae.penalty import METHODS
from jaxcae.runs.model_settings import check_model
from jaxcae.runs.sections import (
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    SeriesConfig,
    TrainingConfig,
)

STANDARDIZE = {"auto": None, "yes": True, "no": False}
"""Values of `standardize`; None leaves it to the data."""
DIGITS = ("float32", "float64")
SCORES = ("two_scale", "reconstruction", "neighbour", "reconstruction+neighbour", "jacobian_norm")
_MAX_NAMES = 2**22
_MAX_WINDOW = 2**16


def check_settings(
    data: DataConfig,
    model: ModelConfig,
    objective: ObjectiveConfig,
    training: TrainingConfig,
    series: SeriesConfig,
) -> None:
    """Check what can be checked without the data.

    Raises:
        InputError: With the first setting that is not usable.
    """
    for kind, value, known in (
        ("activation", model.activation, ACTIVATIONS),
        ("activation", model.latent_activation, ACTIVATIONS),
        ("output activation", model.output, ("auto", *ACTIVATIONS)),
        ("reconstruction loss", objective.loss, RECONSTRUCTION_LOSSES),
        ("reduction over features", objective.features, ("sum", "mean")),
        ("method", objective.method, METHODS),
        ("method of curvature", objective.curvature_method, ("auto", "hutchinson")),
        ("corruption", objective.corruption, ("gaussian", "masking")),
        ("schedule", training.schedule, ("cosine", "constant")),
        ("value of `standardize`", data.standardize, tuple(STANDARDIZE)),
    ):
        if value not in known:
            raise InputError(str(unknown_name(kind, value, known)))
    if data.digits not in DIGITS:
        raise InputError(str(unknown_name("value of `digits`", data.digits, DIGITS)))
    _ = data.table  # which checks itself
    if sum(map(len, data.feature_names)) > _MAX_NAMES:
        raise InputError(f"the names of the features take more than {_MAX_NAMES:,} letters.")
    for name in ("contraction", "curvature", "l1", "l2", "noise_scale"):
        value = getattr(objective, name)
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"`{name}` must be finite and at least 0, got {value!r}.")
    _check_metric(data, objective, training)
    if not (math.isfinite(training.learning_rate) and training.learning_rate > 0):
        raise InputError(f"`learning_rate` must be above 0, got {training.learning_rate!r}.")
    if not 0 < data.held_out < 1:
        raise InputError(f"`held_out` must be above 0 and below 1, got {data.held_out!r}.")
    if objective.corruption == "masking" and objective.noise_scale > 1:
        raise InputError(f"`noise_scale` is a probability here, got {objective.noise_scale!r}.")
    for name in ("epochs", "batch_size", "patience"):
        value = getattr(training, name)
        if (name, value) == ("epochs", 0) and series.window is not None:
            continue  # the data decides
        if value is not None and not 1 <= value < 2**31:
            raise InputError(f"`{name}` must be at least 1, got {value!r}.")
    if not 0 <= training.seed < 2**32:
        raise InputError(f"`seed` must be from 0 to 2³² − 1, got {training.seed!r}.")
    check_model(model)
    if not 0 <= training.pretrain < 2**31:
        raise InputError(f"`pretrain` must be at least 0, got {training.pretrain!r}.")
    if training.pretrain and model.kind != "mlp":
        raise InputError(f"`pretrain` stacks the layers of an mlp, got `model={model.kind}`.")
    if training.pretrain and data.stream:
        raise InputError("`pretrain` keeps the codes of a layer in memory: leave out `stream`.")
    _check_series(series, data)


def metric_rank(name: str) -> int | None:
    """Read RANK of a metric data:RANK; None of a file.

    Raises:
        InputError: If it is neither.
    """
    kind, _, rank = name.partition(":")
    if kind == "data" and rank.isascii() and rank.isdigit() and 1 <= len(rank) <= 9 and int(rank):
        return int(rank)
    if not name.endswith(".npy"):
        raise InputError(
            "`input_metric` must be data:RANK with a RANK of at least 1, such as data:100, or a "
            f".npy, got {name!r:.80}."
        )
    return None


def _check_metric(data: DataConfig, objective: ObjectiveConfig, training: TrainingConfig) -> None:
    name = objective.input_metric
    if name is None:
        return
    rank = metric_rank(name)
    if objective.contraction == objective.curvature == 0:
        raise InputError("`input_metric` weighs the contraction: give one above 0.")
    if training.pretrain:
        raise InputError("`pretrain` contracts codes, which have no metric: leave out one of both.")
    if data.stream and rank is not None:
        raise InputError(
            f"`input_metric={name}` needs the training data in memory: leave out `stream`, or give "
            "a .npy."
        )


def _check_series(series: SeriesConfig, data: DataConfig) -> None:
    if series.window is None:
        for name in ("train_until", "normal_label"):
            if getattr(series, name) is not None:
                raise InputError(f"`{name}` is of a series: give the rows of a `window`, too.")
        return
    if not 2 <= series.window <= _MAX_WINDOW:
        raise InputError(f"`window` must be from 2 to {_MAX_WINDOW:,} rows, got {series.window!r}.")
    if series.score not in SCORES:
        raise InputError(str(unknown_name("score", series.score, SCORES)))
    if not (math.isfinite(series.max_gap) and series.max_gap >= 1):
        raise InputError(f"`max_gap` must be finite and at least 1, got {series.max_gap!r}.")
    if data.stream:
        raise InputError("`stream` reads samples in rows; leave it out with `window`.")
