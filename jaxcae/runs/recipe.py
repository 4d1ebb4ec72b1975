"""The model, losses and optimizer that a configuration stands for."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax

from jaxcae.errors import InputError, unknown_name
from jaxcae.models import conv, mlp, temporal_conv
from jaxcae.models.factory import from_factory, is_factory, load_factory, parse_arguments
from jaxcae.models.rows import of_rows
from jaxcae.objective import Forward, Term, cae_loss
from jaxcae.penalty import contractive_penalty, jacobian_norm
from jaxcae.runs.config import CONTRACTIVE, PLAIN, Config
from jaxcae.runs.metric import Metric
from jaxcae.runs.sections import ModelConfig, ObjectiveConfig
from jaxcae.training import TrainState, side_by_side
from jaxcae.types import Autoencoder, Loss

_CONV: dict[str, Any] = {"features": (16, 32), "latent": 64, "kernel_size": 3, "stride": 2}
"""What both kinds of `conv` take beside the settings shared with `mlp`, and what it is then; the
code of a window is at most half as wide as the window."""

# The same settings give the same functions, so that JAX compiles them once per process.
_remembered = functools.lru_cache(maxsize=4)


def make_model(config: Config) -> Autoencoder:
    """Make the autoencoder of a resolved configuration, of samples as rows.

    Raises:
        InputError: If its factory cannot be imported, or makes no autoencoder of such samples.
    """
    return _model(_bare(config.model), _factory(config))


def make_unflattened(config: Config) -> Autoencoder:
    """Make the autoencoder of samples in their own shape, of any kind but mlp."""
    return _unflattened(_bare(config.model), _factory(config))


def make_loss(config: Config, model: Autoencoder, metric: Metric | None = None) -> Loss:
    """Make the loss of all networks of the run, over `{network: params}`."""
    return _loss(config.objective, config.networks, model, metric)


def make_measure(config: Config, model: Autoencoder, metric: Metric | None = None) -> Loss:
    """Make what is reported on held-out samples: exact, and without noise.

    Metrics per network are `reconstruction`, `jacobian_norm` (the mean of ‖J‖_F),
    `jacobian_norm_squared` (the mean of ‖J‖²_F), and where they are trained `curvature` (the mean
    of ‖∇²h‖²_F, in the metric) and `metric_norm_squared` (that of ‖J Fᵀ‖²_F); the value is the sum
    of the networks' objectives without weight penalties.
    """
    return _measure(config.objective, config.networks, model, metric)


def check_curvature(config: Config, model: Autoencoder, features: int) -> None:
    """Find out, of shapes alone, whether the curvature can be had where it is asked for.

    Raises:
        InputError: If the encoder has none, or no exact form of it.
    """
    if not config.objective.curvature:
        return
    penalty = contractive_penalty(model.encode, config.objective.curvature_method, order=2)
    xs = jax.ShapeDtypeStruct((1, features), "float32")
    key = jax.random.key(0)
    try:
        jax.eval_shape(lambda key, xs: penalty(model.init(key), xs, key), key, xs)
    except ValueError as error:
        raise InputError(f"`curvature`: {error}") from None


def make_optimizer(config: Config, steps: int) -> optax.GradientTransformation:
    """Make the optimizer of a run of so many steps."""
    rate = config.training.learning_rate
    return _optimizer(rate, None if config.training.schedule == "constant" else steps)


def make_state(
    config: Config, model: Autoencoder, optimizer: optax.GradientTransformation
) -> TrainState:
    """Make the state before the first step; all networks start from the same parameters."""
    init_key, train_key = jax.random.split(jax.random.key(config.training.seed))
    params = {name: model.init(init_key) for name in config.networks}
    state = TrainState.create(params, optimizer, train_key)
    if config.training.patience is None:
        return state
    return dataclasses.replace(state, best=params)


def _factory(config: Config) -> Callable[..., Any] | None:
    """Import the factory; as an argument of what is remembered, it tells a reloaded one apart."""
    return load_factory(config.model.kind) if is_factory(config.model.kind) else None


def _bare(settings: ModelConfig) -> ModelConfig:
    """Leave out what only identifies a model."""
    return dataclasses.replace(settings, source="", frozen="")


@_remembered
def _model(settings: ModelConfig, factory: Callable[..., Any] | None) -> Autoencoder:
    if settings.kind == "mlp":
        return mlp(
            settings.sizes,
            settings.activation,
            tied=settings.tied,
            latent_activation=settings.latent_activation,
            output=settings.output,
        )
    own = _unflattened(settings, factory)
    try:
        return of_rows(own, settings.shape)
    except Exception as error:  # as many kinds as there are models
        raise InputError(f"`model` {settings.kind}: {' '.join(str(error).split())}") from error


@_remembered
def _unflattened(settings: ModelConfig, factory: Callable[..., Any] | None) -> Autoencoder:
    """Make a model of samples in their own shape."""
    if factory is not None:
        return from_factory(settings.kind, factory, settings.args, settings.shape)
    own = parse_arguments(settings.args)
    for name in own:
        if name not in _CONV:
            kind = f"argument of {settings.kind}"
            raise InputError(f"`model_args`: {unknown_name(kind, name, _CONV)}")
    shared: dict[str, Any] = {
        "activation": settings.activation,
        "latent_activation": settings.latent_activation,
        "output": settings.output,
    }
    try:
        if settings.kind == "conv":
            return conv(settings.shape, tied=settings.tied, **shared, **{**_CONV, **own})
        latent = min(_CONV["latent"], max(1, math.prod(settings.shape) // 2))
        return temporal_conv(settings.shape, **shared, **{**_CONV, "latent": latent, **own})
    except (TypeError, ValueError) as error:
        raise InputError(f"`model` {settings.kind}: {error}") from None


@_remembered
def _loss(
    settings: ObjectiveConfig,
    networks: tuple[str, ...],
    model: Autoencoder,
    metric: Metric | None,
) -> Loss:
    contraction = {CONTRACTIVE: settings.contraction, PLAIN: None}
    return side_by_side(
        {
            name: cae_loss(
                model,
                contraction[name],
                method=settings.method,
                curvature=(settings.curvature or None) if name == CONTRACTIVE else None,
                curvature_method=settings.curvature_method,
                input_metric=None if metric is None else metric.factor,
                reconstruction=settings.loss,
                features=settings.features,  # type: ignore[arg-type]
                l1=settings.l1,
                l2=settings.l2,
                corruption=settings.corruption,  # type: ignore[arg-type]
                noise_scale=settings.noise_scale,
            )
            for name in networks
        }
    )


@_remembered
def _measure(
    settings: ObjectiveConfig,
    networks: tuple[str, ...],
    model: Autoencoder,
    metric: Metric | None,
) -> Loss:
    weights = {CONTRACTIVE: settings.contraction, PLAIN: 0.0}
    bends = {CONTRACTIVE: settings.curvature, PLAIN: 0.0}
    factor = None if metric is None else metric.factor
    curved = contractive_penalty(
        model.encode, settings.curvature_method, order=2, input_metric=factor
    )
    measured = contractive_penalty(model.encode, input_metric=factor)

    def terms(name: str) -> Iterator[Term]:
        yield Term("jacobian_norm", 0.0, lambda forward: jacobian_norm(forward.norms))
        weight = weights[name] if metric is None else 0.0
        yield Term("jacobian_norm_squared", weight, lambda forward: forward.norms)
        if metric is not None:
            yield Term(
                "metric_norm_squared",
                weights[name],
                lambda forward: measured(forward.params, forward.inputs),
            )
        if settings.curvature:
            yield Term("curvature", bends[name], curvature)

    def curvature(forward: Forward) -> Any:
        # The same probes each time, where it is estimated: figures of two epochs can be compared.
        return curved(forward.params, forward.inputs, jax.random.key(0))

    return side_by_side(
        {
            name: cae_loss(
                model,
                None,
                reconstruction=settings.loss,
                features=settings.features,  # type: ignore[arg-type]
                terms=tuple(terms(name)),
            )
            for name in networks
        }
    )


@_remembered
def _optimizer(rate: float, steps: int | None) -> optax.GradientTransformation:
    return optax.adam(rate if steps is None else optax.cosine_decay_schedule(rate, steps))
