"""Autoencoders: the built-in ones, and those of modules of other libraries."""

from jaxcae.models.conv import conv
from jaxcae.models.equinox import from_equinox
from jaxcae.models.flax import from_flax
from jaxcae.models.layerwise import mlp_layers, mlp_params
from jaxcae.models.mlp import mlp
from jaxcae.models.temporal_conv import temporal_conv

__all__ = ["conv", "from_equinox", "from_flax", "mlp", "mlp_layers", "mlp_params", "temporal_conv"]
