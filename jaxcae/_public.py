"""The public names of the library, gathered; `jaxcae` itself opens this when one is asked for."""

import importlib

from jaxcae.activations import ACTIVATIONS, Activation, get_activation
from jaxcae.data.covariance import covariance_factor
from jaxcae.data.windows import point_errors, to_timestamps, windows
from jaxcae.devices import Layout, layout
from jaxcae.difference import jacobian_difference
from jaxcae.divergence import jacobian_trace, value_and_trace
from jaxcae.errors import install_hint
from jaxcae.jacobian.explanation import Explanation, explain
from jaxcae.jacobian.methods import (
    Auto,
    Chain,
    ControlVariate,
    FiniteDifference,
    Forward,
    Hutchinson,
    Reverse,
)
from jaxcae.jacobian.rules import register
from jaxcae.models import conv, from_equinox, from_flax, mlp, temporal_conv
from jaxcae.objective import Term, cae_loss
from jaxcae.objective.lambdas import Convention, convert_lambda
from jaxcae.objective.losses import bernoulli_cross_entropy, squared_error
from jaxcae.objective.weight_penalties import l1_penalty, l2_penalty
from jaxcae.penalty import contractive_penalty, encode_and_penalty, hutchinson_with_error
from jaxcae.training import TrainState, evaluate, fit, make_train_step
from jaxcae.types import Autoencoder

LAZY = {"ContractiveDetector": "jaxcae.results.detection.detector"}
"""Names whose modules load packages that not everybody has, each on its first use. They are not in
`__all__`, as `from jaxcae import *` uses all."""

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Auto",
    "Autoencoder",
    "Chain",
    "ControlVariate",
    "Convention",
    "Explanation",
    "FiniteDifference",
    "Forward",
    "Hutchinson",
    "Layout",
    "Reverse",
    "Term",
    "TrainState",
    "bernoulli_cross_entropy",
    "cae_loss",
    "contractive_penalty",
    "conv",
    "convert_lambda",
    "covariance_factor",
    "encode_and_penalty",
    "evaluate",
    "explain",
    "fit",
    "from_equinox",
    "from_flax",
    "get_activation",
    "hutchinson_with_error",
    "jacobian_difference",
    "jacobian_trace",
    "l1_penalty",
    "l2_penalty",
    "layout",
    "make_train_step",
    "mlp",
    "point_errors",
    "register",
    "squared_error",
    "temporal_conv",
    "to_timestamps",
    "value_and_trace",
    "windows",
]


def lazy(name: str) -> object:
    """Import one of the names of `LAZY`.

    Raises:
        ImportError: If a package that it needs is not installed; with the command that installs it.
    """
    try:
        return getattr(importlib.import_module(LAZY[name]), name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"jaxcae.{name} needs {(error.name or '').partition('.')[0]}, which is not installed: "
            f"run {install_hint('train')}"
        ) from error
