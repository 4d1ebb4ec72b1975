"""Greedy stacking before a run: layer by layer, each on the codes of the one before.

What comes out is where the run begins. It is kept in the run directory, so that a run that is gone
on with does not learn it again; one that is stopped before begins the layers anew, and comes to the
same bits.

References:
    Rifai et al., "Contractive Auto-Encoders", ICML 2011, section 6.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import optax

from jaxcae.devices import Layout, gather
from jaxcae.models import mlp_layers, mlp_params
from jaxcae.objective import cae_loss
from jaxcae.runs.config import CONTRACTIVE, PLAIN, Config
from jaxcae.runs.directory import RunDirectory
from jaxcae.runs.entries import PRETRAINED
from jaxcae.runs.finished import check_params
from jaxcae.runs.material import Material
from jaxcae.runs.params_file import save_params
from jaxcae.training import TrainState, train_stages
from jaxcae.types import Autoencoder, Loss, Params

_LAYERS = 2**32 - 3
"""A stream of random numbers beside those of the run's own steps."""


def pretrain(
    directory: RunDirectory,
    config: Config,
    material: Material,
    state: TrainState,
    say: Callable[[str], None],
    layout: Layout | None = None,
) -> TrainState:
    """Return the state before the first step with the parameters of the layers, trained or stored.

    Args:
        directory: The run's.
        config: What the run is; `pretrain` epochs for each layer, at a constant step size.
        material: Its data, in memory.
        state: The state before the first step.
        say: Hears of each layer.
        layout: Which devices hold what.

    Raises:
        CheckpointError: If the file of an earlier call is damaged, or another configuration's.
    """
    file = directory.path / PRETRAINED
    if file.exists():
        params, _ = check_params(file, state.params, config)
    else:
        params = {
            name: _layers(config, name, material, state.key, say, layout)
            for name in config.networks
        }
        save_params(file, params, {"config": config.to_json()})
    return replace(state, params=params, best=None if state.best is None else params)


def _layers(
    config: Config,
    network: str,
    material: Material,
    key: Any,
    say: Callable[[str], None],
    layout: Layout | None,
) -> Params:
    """Train the layers of one network; all networks draw the same random numbers."""
    settings, training = config.model, config.training
    layers = mlp_layers(
        settings.sizes,
        settings.activation,
        tied=settings.tied,
        latent_activation=settings.latent_activation,
        output=settings.output,
    )
    losses = iter(_losses(config, network, layers))
    stages = train_stages(
        layers,
        lambda _: next(losses),
        optax.adam(training.learning_rate),
        jax.random.fold_in(key, _LAYERS),
        material.train,
        epochs=training.pretrain,
        batch_size=training.batch_size,
        layout=layout,
    )
    for number, stage in enumerate(stages):
        loss, widths = stage.history[-1]["loss"], settings.sizes[number : number + 2]
        say(f"{network}: layer {number + 1}, {widths[0]} to {widths[1]}, has loss {loss:.4g}")
    return mlp_params([gather(stage.params) for stage in stages])


def _losses(config: Config, network: str, layers: list[Autoencoder]) -> list[Loss]:
    """Make the loss of each layer: the run's on samples, squared errors on codes."""
    objective = config.objective
    weights: Mapping[str, float | None] = {CONTRACTIVE: objective.contraction, PLAIN: None}
    return [
        cae_loss(
            model,
            weights[network],
            method=objective.method,
            reconstruction="squared_error" if number else objective.loss,
            features=objective.features,  # type: ignore[arg-type]
            l1=objective.l1,
            l2=objective.l2,
            corruption=objective.corruption,  # type: ignore[arg-type]
            noise_scale=objective.noise_scale,
        )
        for number, model in enumerate(layers)
    ]
