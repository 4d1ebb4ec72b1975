"""The figures of a run, put together: what `report.json` holds and the table shows."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxcae.runs.config import Config
from jaxcae.runs.material import Material
from jaxcae.training import Record
from jaxcae.types import Autoencoder, Params


def make_report(
    config: Config,
    material: Material,
    model: Autoencoder,
    initial: Mapping[str, Params],
    params: Mapping[str, Params],
    history: Sequence[Record],
    chosen: int,
) -> dict[str, Any]:
    """Put the figures of a run together, by network, before training and after.

    Args:
        config: What the run is.
        material: Its data.
        model: Its autoencoder.
        initial: The parameters before the first step, by network.
        params: The parameters that are its result, by network.
        history: One record per epoch; the first is epoch 0.
        chosen: The record of the epoch that `params` are of.

    Returns:
        Facts of the run, and under `networks` the figures of each on held-out samples.
    """
    spread = jax.jit(lambda params, xs: _spread(jax.vmap(model.encode, (None, 0))(params, xs)))
    data_spread = float(_spread(material.held_out))

    def figures(network: str, params: Mapping[str, Params], record: Record) -> dict[str, float]:
        held_out = f"held_out_{network}/"
        means = {
            name.removeprefix(held_out): value
            for name, value in record.items()
            if name.startswith(held_out)
        }
        # ‖J‖_F in units of (spread of the codes / spread of the samples). A decoder of its own can
        # undo any scale, so an encoder may shrink its codes and call it contraction; this figure
        # does not change when it does.
        code_spread = float(spread(params[network], material.held_out))
        if code_spread > 0 and data_spread > 0:
            means["relative_jacobian_norm"] = means["jacobian_norm"] * data_spread / code_spread
        return means

    return {
        "data": config.data.source,
        "held_out_samples": len(material.held_out),
        "train_samples": material.num_train,
        "epochs": int(history[-1]["epoch"]),
        "best_epoch": None if config.training.patience is None else int(history[chosen]["epoch"]),
        "steps": int(history[-1]["step"]),
        "model": config.model.label,
        "sizes": list(config.model.sizes),
        "contraction": config.objective.contraction,
        "curvature": config.objective.curvature,
        "input_metric": config.objective.input_metric,
        "reconstruction": config.objective.loss,
        "features": config.objective.features,
        "networks": {
            network: {
                "before": figures(network, initial, history[0]),
                "after": figures(network, params, history[chosen]),
            }
            for network in config.networks
        },
    }


def _spread(rows: Any) -> Any:
    """Root of the total variance, in the units of the rows."""
    return jax.numpy.sqrt(jax.numpy.sum(jax.numpy.var(rows, axis=0)))
