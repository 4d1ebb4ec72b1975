"""A finished run: its model and parameters, verified."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcae.data import Preparation, Standardization
from jaxcae.errors import CheckpointError, InputError, RunError, UnfinishedRunError
from jaxcae.runs.checkpoints import checkpoint_steps
from jaxcae.runs.config import PLAIN, Config, differences, main_network
from jaxcae.runs.entries import CONFIG, read_config
from jaxcae.runs.leaves import leaf_names
from jaxcae.runs.params_file import load_params, params_record
from jaxcae.runs.remake import remake_model
from jaxcae.types import Autoencoder, Params


def params_path(path: Path, config: Config, network: str) -> Path:
    """Name the file for the parameters of one of the networks of a run."""
    return path / f"{'params' if network == main_network(config) else PLAIN}.safetensors"


def check_params(file: Path, like: Params, config: Config) -> tuple[Params, dict[str, Any]]:
    """Load parameters as `(params, record)`, verified, and of this configuration.

    Raises:
        CheckpointError: If they are damaged, another configuration's, or not finite.
    """
    stored = params_record(file).get("config")
    try:
        different = differences(Config.from_json(stored, str(file)), config)
    except InputError as error:
        raise CheckpointError(str(error)) from None
    if different:
        raise CheckpointError(
            f"{file}: belongs to another configuration than {CONFIG}: {'; '.join(different)}."
        )
    params, record = load_params(file, like)
    for name, leaf in zip(leaf_names(params), jax.tree.leaves(params), strict=True):
        bad = ~np.isfinite(np.asarray(leaf))
        if bad.any():
            raise CheckpointError(
                f"{file}: {name} holds {np.sum(bad):,} weights that are not finite. Whatever the "
                "data, nothing can be computed with them; train the run again."
            )
    return params, record


class Run(NamedTuple):
    """A finished run, verified.

    Attributes:
        config: What it is.
        model: Its autoencoder.
        params: The parameters of its main network, the contractive one unless λ is 0.
        plain: Those of the network without the penalty, if there are two.
        preparation: What was done to the features, and their names; new data needs the same.
        record: What the file of parameters says of itself.
    """

    config: Config
    model: Autoencoder
    params: Params
    plain: Params | None
    preparation: Preparation
    record: Mapping[str, Any]

    @property
    def standardization(self) -> Standardization | None:
        """What was applied to the features, if anything."""
        return self.preparation.standardization

    def params_of(self, network: str | None) -> Params:
        """Return the parameters of one of the networks by name; None is the main one.

        Raises:
            InputError: If the run has no such network.
        """
        if network is None or network == main_network(self.config):
            return self.params
        if network == PLAIN and self.plain is not None:
            return self.plain
        raise InputError(
            f"`network`: the run has {' and '.join(self.config.networks)}, got {network!r}."
        )


def open_run(path: str | Path, model: str | None = None) -> Run:
    """Load a finished run, and verify all that is loaded.

    Args:
        path: The directory of the run.
        model: Of a run whose model a factory makes, `PACKAGE.MODULE:FACTORY` once more: a directory
            may come from anywhere, and the code that it names is imported for nobody unasked.

    Raises:
        RunError: If there is no run, it has not finished, or its factory was not named.
        CheckpointError: If anything is damaged, or the parameters are another configuration's.
    """
    path = Path(path)
    config = read_config(path)
    file = path / "params.safetensors"
    if not file.exists() and not file.is_symlink():
        steps = checkpoint_steps(path / "checkpoints")
        raise UnfinishedRunError(
            f"{path}: has no params.safetensors, so the run has not finished "
            f"({f'its last checkpoint is of step {steps[-1]}' if steps else 'no checkpoint yet'}). "
            "Train it to its end first.",
        )
    if not config.model.num_features:
        raise RunError(f"{path / CONFIG}: 'sizes' is empty; it was not written by jaxcae train.")
    autoencoder = remake_model(config, model, path)
    like = jax.eval_shape(autoencoder.init, jax.random.key(0))
    params, record = check_params(file, like, config)
    plain = None
    if len(config.networks) > 1:
        plain, _ = check_params(params_path(path, config, PLAIN), like, config)
    try:
        preparation = Preparation.from_json(
            {**record, "feature_names": _names(config)},
            config.model.num_features,
        )
    except InputError as error:
        raise CheckpointError(f"{file}: {error}") from None
    return Run(config, autoencoder, params, plain, preparation, record)


def _names(config: Config) -> list[str] | None:
    """Name the features; those of windows have no names of their own, only their channels have."""
    names = config.data.feature_names
    return None if config.series.window is not None else list(names) or None


def load_run(path: str | Path, model: str | None = None) -> tuple[Config, Autoencoder, Params]:
    """Load a finished run as `(config, model, params)`, verified; see `open_run`."""
    run = open_run(path, model)
    return run.config, run.model, run.params
