"""`jaxcae explain`: how the penalty of a model is computed, what it costs, and why that way."""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

from jaxcae.activations import ACTIVATIONS
from jaxcae.cli.device import OnDevice
from jaxcae.cli.named import find_in_working_directory
from jaxcae.errors import InputError, unknown_name
from jaxcae.jacobian.choose import MEMORY_BUDGET
from jaxcae.jacobian.explanation import explain
from jaxcae.models import mlp
from jaxcae.runs import read_config
from jaxcae.runs.metric import Metric, load_metric
from jaxcae.runs.remake import remake_model
from jaxcae.types import Autoencoder


@dataclass(frozen=True)
class Arguments(OnDevice):
    """Explain how ‖J‖²_F of a fully connected encoder is computed exactly.

    For a run, or for any sizes: the segments found in the encoder, the plan, and what each exact
    method would take in operations and memory. Nothing is trained or timed.
    """

    run_dir: tyro.conf.Positional[Path | None] = None
    """The directory of a run; its model and batch size are explained."""
    model: str | None = None
    """Of a run whose model is your own: its PACKAGE.MODULE:FACTORY once more. What a directory
    names is not imported on its word."""
    sizes: tuple[int, ...] = (784, 256, 64)
    """Without a run: widths from the features to the code."""
    activation: str = "softplus"
    """Without a run: the hidden activation."""
    latent_activation: str = "identity"
    """Without a run: the activation on the code."""
    batch_size: int | None = None
    """Samples in a batch; the run's, or 128."""
    memory_budget: int = MEMORY_BUDGET
    """Bytes of temporaries that value and gradient of the penalty may take."""
    json: bool = False
    """Print the explanation as JSON."""


def run(arguments: Arguments) -> int:
    """Explain, on stdout."""
    model, features, batch_size, metric = _model(arguments)
    if batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {batch_size}.")
    if arguments.memory_budget < 1:
        raise InputError(f"--memory-budget must be at least 1, got {arguments.memory_budget}.")
    explanation = explain(
        model.encode,
        model.init(jax.random.key(0)),
        jax.ShapeDtypeStruct((batch_size, features), jnp.float32),
        memory_budget=arguments.memory_budget,
        input_metric=None if metric is None else metric.factor,
    )
    print(json.dumps(explanation.as_dict(), indent=2) if arguments.json else explanation)
    return 0


def _model(arguments: Arguments) -> tuple[Autoencoder, int, int, Metric | None]:
    if arguments.run_dir is not None:
        config = read_config(arguments.run_dir)
        find_in_working_directory(arguments.model)
        return (
            remake_model(config, arguments.model, arguments.run_dir),
            config.model.num_features,
            arguments.batch_size or config.training.batch_size,
            load_metric(arguments.run_dir, config),
        )
    for name in (arguments.activation, arguments.latent_activation):
        if name not in ACTIVATIONS:
            raise InputError(str(unknown_name("activation", name, ACTIVATIONS)))
    try:
        model = mlp(
            arguments.sizes, arguments.activation, latent_activation=arguments.latent_activation
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    batch_size = 128 if arguments.batch_size is None else arguments.batch_size
    return model, arguments.sizes[0], batch_size, None
