"""The objective: reconstruction plus penalties, and the one place that averages."""

from jaxcae.objective.cae import Corruption, Objective, cae_loss
from jaxcae.objective.forward import Forward, forward_pass
from jaxcae.objective.lambdas import CONVENTIONS, Convention, convert_lambda
from jaxcae.objective.losses import (
    RECONSTRUCTION_LOSSES,
    ReconstructionLoss,
    Reduction,
    bernoulli_cross_entropy,
    reconstruction_loss,
    squared_error,
)
from jaxcae.objective.side_by_side import side_by_side
from jaxcae.objective.terms import (
    Term,
    contraction_term,
    curvature_term,
    decoder_term,
    l1_term,
    l2_term,
    noise_curvature_term,
    reconstruction_map_term,
)
from jaxcae.objective.weight_penalties import kernels, l1_penalty, l2_penalty

__all__ = [
    "CONVENTIONS",
    "RECONSTRUCTION_LOSSES",
    "Convention",
    "Corruption",
    "Forward",
    "Objective",
    "ReconstructionLoss",
    "Reduction",
    "Term",
    "bernoulli_cross_entropy",
    "cae_loss",
    "contraction_term",
    "convert_lambda",
    "curvature_term",
    "decoder_term",
    "forward_pass",
    "kernels",
    "l1_penalty",
    "l1_term",
    "l2_penalty",
    "l2_term",
    "noise_curvature_term",
    "reconstruction_loss",
    "reconstruction_map_term",
    "side_by_side",
    "squared_error",
]
