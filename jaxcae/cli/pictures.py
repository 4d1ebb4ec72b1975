"""The pictures of a run: what the networks make of held-out samples, and how they came to it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcae import plotting
from jaxcae.cli.threads import one_blas_thread
from jaxcae.results import analysis
from jaxcae.runs.config import Config
from jaxcae.runs.material import Material
from jaxcae.training import Record
from jaxcae.types import Autoencoder, Params

_IMAGES, _TRACES = 10, 6
_SPECTRUM_SAMPLES = 200


def draw(
    directory: Path,
    config: Config,
    material: Material,
    model: Autoencoder,
    params: Mapping[str, Params],
    history: Sequence[Record],
    chosen: int = -1,
) -> list[Path]:
    """Write the pictures of a finished run, and return the paths of those that can be drawn.

    Args:
        directory: Where to put them; made if need be.
        config: The configuration of the run.
        material: Its data.
        model: Its autoencoder.
        params: Parameters by network.
        history: One record per epoch.
        chosen: The record of the epoch that the parameters are of.
    """
    mlp = config.model.kind == "mlp"  # the one whose first layer has filters as wide as a sample
    figures = {
        "reconstructions": lambda: _reconstructions(
            config, material, model, params, history[chosen]
        ),
        **({"filters": lambda: _filters(config, material, params)} if mlp else {}),
        "curves": lambda: _curves(config, history, history[chosen]["epoch"]),
        "spectrum": lambda: _spectrum(material, model, params),
    }
    return plotting.save_each(directory, figures)


def _reconstructions(
    config: Config,
    material: Material,
    model: Autoencoder,
    params: Mapping[str, Params],
    record: Record,
) -> Any:
    shown = _one_of_each_label(material, _IMAGES if material.feature_shape else _TRACES)

    @jax.jit
    def reconstruct(params: Params, xs: Any) -> Any:
        x_hats = jax.vmap(lambda x: model.decode(params, model.encode(params, x)))(xs)
        return jax.nn.sigmoid(x_hats) if config.objective.loss == "bernoulli" else x_hats

    def look(xs: Any) -> np.ndarray:
        """Give images back the grey values that standardisation took; traces compare without."""
        images = material.feature_shape is not None
        scaling = material.standardization if images else None
        return np.asarray(xs) if scaling is None else scaling.invert(np.asarray(xs))

    return plotting.reconstructions(
        look(shown),
        {name: look(reconstruct(p, shown)) for name, p in params.items()},
        feature_shape=material.feature_shape,
        errors={name: record[f"held_out_{name}/reconstruction"] for name in params},
    )


def _one_of_each_label(material: Material, count: int) -> np.ndarray:
    """Choose the first held-out sample of each class in turn, or simply the first ones."""
    if material.labels is None:
        return material.held_out[:count]
    _, first = np.unique(material.labels, return_index=True)
    rest = np.setdiff1d(np.arange(len(material.held_out)), first)
    return material.held_out[np.concatenate([first, rest])[:count]]


def _filters(config: Config, material: Material, params: Mapping[str, Params]) -> Any:
    settings = config.model
    first = settings.activation if len(settings.sizes) > 2 else settings.latent_activation
    activity = jax.jit(analysis.first_layer_activity(first))
    return plotting.first_layer_filters(
        {name: np.asarray(analysis.first_layer_filters(p)) for name, p in params.items()},
        activity={name: np.asarray(activity(p, material.held_out)) for name, p in params.items()},
        feature_shape=material.feature_shape,
    )


def _curves(config: Config, history: Sequence[Record], kept: float) -> Any:
    keys = {
        "reconstruction": "{}/reconstruction",
        "held_out_reconstruction": "held_out_{}/reconstruction",
        "held_out_jacobian_norm": "held_out_{}/jacobian_norm",
    }
    curves: dict[str, dict[str, list[float]]] = {}
    for network in config.networks:
        curves[network] = {"epoch": [record["epoch"] for record in history]}
        for key, name in keys.items():
            name = name.format(network)
            curves[network][key] = [record.get(name, float("nan")) for record in history]
    label = "cross-entropy (nats)" if config.objective.loss == "bernoulli" else "‖x − x̂‖²"
    label += " / feature" if config.objective.features == "mean" else ""
    return plotting.training_curves(curves, reconstruction_label=label, kept=kept)


def _spectrum(material: Material, model: Autoencoder, params: Mapping[str, Params]) -> Any:
    xs = jnp.asarray(material.held_out[:_SPECTRUM_SAMPLES])
    singular_values = jax.jit(analysis.singular_values(model.encode))
    with one_blas_thread():
        values = {name: jax.block_until_ready(singular_values(p, xs)) for name, p in params.items()}
    return plotting.singular_value_spectrum(
        {name: tuple(map(np.asarray, analysis.average_spectrum(v))) for name, v in values.items()},
        dimensions={
            name: float(jnp.mean(analysis.effective_dimension(v))) for name, v in values.items()
        },
        samples=len(xs),
    )
