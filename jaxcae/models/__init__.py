"""Autoencoders: the built-in ones, and those of modules of other libraries."""

from jaxcae.models.conv import conv
from jaxcae.models.equinox import from_equinox
from jaxcae.models.flax import from_flax
from jaxcae.models.layerwise import mlp_layers, mlp_params
from jaxcae.models.mlp import mlp

__all__ = ["conv", "from_equinox", "from_flax", "mlp", "mlp_layers", "mlp_params"]
